"""The low-rank pairs of many tokens at once, as a prefill graph has them: masked dense, or grouped.

*Masked*: the bank of all slots is one matrix. ``x @ down^T`` (MatMul), what belongs to another slot than the token's
becomes 0 (Select), ``@ expand`` (MatMul), Add. ``down`` is the bank of the decode step as it lies, its axes of slots,
slices and ranks made one by a view; ``expand`` is (slots, slices * rank, out), the scales in it, and the rows of a
packed slice are 0 at the outputs of the others, so that nothing is cut or joined. Which column is whose is told once a
step, by one Equal for each width of a slot (three in a model whose linears have one rank: one, two and three slices).

*Grouped*: GroupedMatmul twice over the tokens in the order of their slots, which the host gives them once a step, and
Add. ``shrink`` is (1 + slots, in, slices * rank), ``expand`` (1 + slots, slices * rank, out) with the scales in it, and
number 0 is an adapter of zeros, for the base's rows: rows without a group would stay unwritten.

Select takes what it does not choose for nothing, whatever it is, so that a slot whose inner product is beyond float16
spoils its own rows alone; ``expand`` is multiplied by these zeros, which is why banks must be finite.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from mindspore import Parameter, Tensor, ops

from colora_ms.kernels import ascend_builtin

#: Most columns, slots * slices * rank, of the masked form: up to there it costs no more than the grouped one by
#: scripts/ascend_prefill.py at 1,024 tokens and 4,096 inputs, packed linears with their zeros counted: q, k and v of
#: four adapters of rank 16, o of twelve (ops/ascend/README.md, "Modelled costs"; held by tests/ascend/test_costs.py).
MASKED_COLUMNS = 192


def is_masked(slots: int, columns: int) -> bool:
    """Whether a bank takes the masked form; columns: slices * rank of a slot."""
    return slots * columns <= MASKED_COLUMNS


def banks_of(masked: bool) -> list[str]:
    """The banks that a form needs beside those of the decode step."""
    return ["expand"] if masked else ["shrink", "expand"]


def owners_of(linears: Sequence[Any], dtype: Any) -> tuple[list[Parameter], Parameter]:
    """Give each masked linear its ``owner``, and return the owners: (1, columns) int32 the slot of each column, one for
    every width there is; and a zero (1,) of the compute type."""
    widths: list[tuple[int, int]] = []
    for one in linears:
        if one.has_lora and one.masked:
            width = (one.slots, one.slices * one.rank)
            if width not in widths:
                widths.append(width)
            one.owner = widths.index(width)
    owners = [np.repeat(np.arange(slots, dtype=np.int32), columns)[None] for slots, columns in widths]
    return ([Parameter(Tensor(one), name=f"device.owner.{i}", requires_grad=False) for i, one in enumerate(owners)],
            Parameter(Tensor(np.zeros(1, np.float32)).astype(dtype), name="device.zero", requires_grad=False))


def prepared(slots: tuple, owners: tuple, zero: Parameter) -> tuple:
    """What the pairs of a prompt read, made once a step.

    Args:
        slots: ((tokens,) int32, -1 for the base; (1 + slots,) int64, where the base's tokens end and those of each
            slot).
        owners, zero: of :func:`owners_of`.

    Returns:
        these two, a mask (tokens, columns) bool for each of the owners, and zero.
    """
    column = ops.expand_dims(slots[0], 1)
    masks = ()
    for owner in owners:
        masks = masks + (ops.equal(column, owner),)
    return slots[0], slots[1], masks, zero


def masked_pair(x: Tensor, down: Parameter, expand: Parameter, mask: Tensor, zero: Parameter) -> Tensor:
    """The masked pair: x (tokens, in) -> what is added to the base product, (tokens, out)."""
    slots, columns, width = down.shape
    inner = ascend_builtin.linear(x, ascend_builtin.reshape(down, (slots * columns, width)))
    inner = ascend_builtin.where(mask, inner, zero)
    return ascend_builtin.product(inner, ascend_builtin.reshape(expand, (slots * columns, expand.shape[2])))
