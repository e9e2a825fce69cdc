"""What shapes and dtypes the Ascend C operators take, and what they give; the limits are those of the device source.

A dimension of -1 is one that is not known while the graph is compiled: it agrees with any, and the tiling function on
the host checks the sizes of each launch.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms

from colora_ms.kernels.shapes import agree, element_type, require, require_dtype, require_shape

MOST_RANKS = 256
MOST_TOKENS_OF_A_VOCABULARY = 262144
MOST_MIXED_BYTES = 16384  # coefficients of a token in lily_mix, all experts


def _within(size, most):
    return size == -1 or 1 <= size <= most


def _check_down(name, down, columns):
    require(len(down) == 3 and agree(down[2], columns) and _within(down[1], MOST_RANKS), name, "down", down,
            f"(slots, rank, {columns}) with a rank of 1..{MOST_RANKS}")


def _lora_shapes(name, x, down, up, scale, slots, y, starts=None):
    require(len(x) == 2, name, "x", x, "(tokens, in)")
    _check_down(name, down, x[1])
    require(len(up) == 3 and agree(up[0], down[0]) and agree(up[1], down[1]), name, "up", up,
            f"({down[0]}, {down[1]}, out), rank-major")
    require_shape(name, "scale", scale, (down[0],))
    require_shape(name, "y", y, (x[0], up[2]))
    if starts is None:
        require_shape(name, "slots", slots, (x[0],))
    else:
        require(len(slots) == 1, name, "slots", slots, "(segments,)")
        require_shape(name, "starts", starts, (slots[0] + 1 if slots[0] != -1 else -1,))
    return list(y)


def _shrink_shapes(x, down, scale, slots):
    require(len(x) == 2, "LoraShrink", "x", x, "(tokens, in)")
    _check_down("LoraShrink", down, x[1])
    require_shape("LoraShrink", "scale", scale, (down[0],))
    require_shape("LoraShrink", "slots", slots, (x[0],))
    return [x[0], down[1]]


def _expand_shapes(h, up, slots, y):
    require(len(h) == 2 and _within(h[1], MOST_RANKS), "LoraExpand", "h", h,
            f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(up) == 3 and agree(up[1], h[1]), "LoraExpand", "up", up, f"(slots, {h[1]}, out), rank-major")
    require_shape("LoraExpand", "slots", slots, (h[0],))
    require_shape("LoraExpand", "y", y, (h[0], up[2]))
    return list(y)


def _select_shapes(expert, amateur, log_alpha, beta, mask):
    name = "ContrastiveSelect"
    require(len(expert) == 2 and _within(expert[1], MOST_TOKENS_OF_A_VOCABULARY), name, "expert", expert,
            f"(requests, vocabulary), at most {MOST_TOKENS_OF_A_VOCABULARY} tokens")
    require_shape(name, "amateur", amateur, expert)
    require_shape(name, "log_alpha", log_alpha, expert[:1])
    require_shape(name, "beta", beta, expert[:1])
    every = len(mask) == 2 and agree(mask[1], expert[1]) and (mask[0] == 1 or agree(mask[0], expert[0]))
    require(list(mask) == [1] or every, name, "mask", mask,
            f"(1,) for none, (1, {expert[1]}) or {tuple(expert)}")
    return [expert[0]]


def _w4_shapes(x, weight, weight_scale, down, up, scale, slots):
    name = "W4Lora"
    require(len(x) == 2, name, "x", x, "(tokens, in)")
    require(len(weight) == 2 and (-1 in (weight[1], x[1]) or weight[1] * 2 == x[1]), name, "weight", weight,
            f"(out, {x[1] / 2:g}), two values a byte")
    out = weight[0]
    require(len(weight_scale) in (1, 2) and agree(weight_scale[0], out), name, "weight_scale", weight_scale,
            f"({out},) or ({out}, groups)")
    groups = weight_scale[1] if len(weight_scale) == 2 else 1
    require(groups in (1, -1) or (groups > 1 and (x[1] == -1 or x[1] % (8 * groups) == 0)), name, "weight_scale",
            weight_scale,
            f"one scale a row, or groups of a multiple of 8 columns that divide {x[1]}")
    _check_down(name, down, x[1])
    require(len(up) == 3 and all(map(agree, up, (down[0], down[1], out))), name, "up", up,
            f"({down[0]}, {down[1]}, {out}), rank-major")
    require_shape(name, "scale", scale, (down[0],))
    require_shape(name, "slots", slots, (x[0],))
    return [x[0], out]


def _mix_shapes(h, weights, up, scale, slots, y):
    name = "LilyMix"
    require(len(h) == 2 and _within(h[1], MOST_RANKS), name, "h", h, f"(tokens, rank), rank 1..{MOST_RANKS}")
    require(len(weights) == 2 and agree(weights[0], h[0]) and weights[1] != 0, name, "weights", weights,
            f"({h[0]}, experts)")
    require(len(up) == 4 and agree(up[1], weights[1]) and agree(up[2], h[1]), name, "up", up,
            f"(slots, {weights[1]}, {h[1]}, out), rank-major")
    # The kernel refuses by the bytes of its dtype; the larger of the two forms is asked for here.
    most = max(weights[1], 0) * max(-(-h[1] // 8) * 32, -(-h[1] // 16) * 32 + 32)
    require(most <= MOST_MIXED_BYTES, name, "up", up,
            f"fewer experts or ranks: {most} bytes of coefficients a token, at most {MOST_MIXED_BYTES} fit")
    require_shape(name, "scale", scale, (up[0],))
    require_shape(name, "slots", slots, (h[0],))
    require_shape(name, "y", y, (h[0], up[3]))
    return list(y)


#: operator -> function of the inputs' shapes that gives the output's, or raises a KernelError.
SHAPES = {
    "MultiLora": lambda x, down, up, scale, slots, y: _lora_shapes("MultiLora", x, down, up, scale, slots, y),
    "MultiLoraSegments": lambda x, down, up, scale, starts, slots, y: _lora_shapes(
        "MultiLoraSegments", x, down, up, scale, slots, y, starts),
    "LoraShrink": _shrink_shapes,
    "LoraExpand": _expand_shapes,
    "ContrastiveSelect": _select_shapes,
    "W4Lora": _w4_shapes,
    "LilyMix": _mix_shapes,
}


def output_dtype(name: str, spec: dict[str, list[Any]], given: Sequence[Any]) -> Any:
    """The output's dtype for those of the inputs.

    Args:
        name: the operator. spec: its entry in ``ascend.OPERATORS``, where position k of every list of dtypes is one
            combination. given: the dtypes of its inputs.

    Raises:
        KernelError: they are none of the combinations.
    """
    given = [element_type(one) for one in given]
    typed = next(i for i, (_, types, _) in enumerate(spec["inputs"]) if len(set(types)) > 1)
    known = {"float16": ms.float16, "bfloat16": ms.bfloat16, "float32": ms.float32, "int32": ms.int32,
             "uint8": ms.uint8}
    choices = [known[one] for one in spec["inputs"][typed][1]]
    require_dtype(name, spec["inputs"][typed][0], given[typed], choices)
    k = choices.index(given[typed])
    for (argument, types, _), dtype in zip(spec["inputs"], given):
        require_dtype(name, argument, dtype, (known[types[k]],))
    return known[spec["outputs"][0][1][k]]
