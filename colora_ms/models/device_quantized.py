"""int8 and int4 weights as Ascend's WeightQuantBatchMatmul reads them, converted once from how the decoder keeps them.

The operator takes signed integers (out, in), two of int4 in a byte with the even column low, and scales of the compute
type by output or by group of inputs, (groups, out). Our int4 is stored as value + 8 and our scales are (out, groups)
float32. Groups are multiples of 32 there; smaller ones are refused by name: to make them larger would round the
weights again. There is never a bias in the call, for which MindSpore and aclnn want different types.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn

from colora_ms.errors import CheckpointError

#: Formats of linears that are kept as integers.
INTEGERS = ("int8", "int4")

#: What the groups of the operator are multiples of.
GROUP = 32

#: How far a scale may be off for being stored in the compute type, relative; float16 has too small numbers for some.
_FAR = 2.0 ** -8


def group_of(cell: nn.Cell) -> int:
    """Inputs that share a scale of a linear with integer weights; 0: all of a row."""
    scale = cell.weight_scale
    if scale.ndim == 1 or scale.shape[1] == 1:
        return 0
    return cell.in_features // scale.shape[1]


def why_not_integers(cells: Sequence[nn.Cell], wide_heads: bool) -> str:
    """Why linears of integer weights that read the same input cannot be one call, "" if they can.

    wide_heads: whether the device's heads are wider than the model's.
    """
    names = sorted({cell.format.name for cell in cells})
    groups = sorted({group_of(cell) for cell in cells})
    if len(names) > 1 or len(groups) > 1:
        return (f"neighbours are kept as {', '.join(names)} with groups of {', '.join(map(str, groups))}; the device "
                "reads them in one product")
    if groups[0] % GROUP:
        return (f"groups of {groups[0]} inputs share a scale, the device takes multiples of {GROUP}: quantize with "
                "one, or keep the weights as bfloat16")
    if wide_heads:
        return "integer weights need a head_dim that is a multiple of 32"
    return ""


def integer_tensors(cells: Sequence[nn.Cell], dtype: Any, name: str) -> tuple[Tensor, Tensor, int]:
    """(weight, scale, group) of the call, for linears one below another.

    Returns:
        weight: (out, in) int8 or (out, in / 2) qint4x2; scale: (out,) or (groups, out) of dtype; group: 0: by output.

    Raises:
        CheckpointError: a scale cannot be had in dtype.
    """
    stored = [cell.format.stored(cell.weight, cell.weight_scale) for cell in cells]
    integers = np.concatenate([one.integers() for one in stored])
    scale = np.concatenate([one.scale.reshape(len(one.scale), -1) for one in stored]).T  # (groups, out)
    group = group_of(cells[0])
    half = _in_dtype(scale if group else scale[0], dtype, name)
    if cells[0].format.name == "int8":
        return Tensor(np.ascontiguousarray(integers)), half, group
    nibbles = (integers & 15).astype(np.uint8)
    return Tensor((nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int8), dtype=ms.qint4x2), half, group


def _in_dtype(scale: np.ndarray, dtype: Any, name: str) -> Tensor:
    made = Tensor(np.ascontiguousarray(scale, np.float32)).astype(dtype)
    back = made.astype(ms.float32).asnumpy()
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(back - scale) <= _FAR * np.abs(scale))
    if np.any(wrong):
        raise CheckpointError(f"a scale of {name} is {scale[wrong][0]:g}, which {dtype} does not hold; set "
                              "COLORA_ASCEND_DTYPE=bfloat16")
    return made
