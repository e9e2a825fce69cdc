"""Penalties, bias and masks: what a request does to its rows' logits before a token is chosen."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import COLUMN, ENDS, IN_PROMPT, MOST_ROWS, TENSORS
from colora_ms.kernels.registry import operation
from colora_ms.kernels.select import check_option_shapes
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_PRESENCE, _FREQUENCY = COLUMN["presence_penalty"], COLUMN["frequency_penalty"]
_REPETITION = COLUMN["repetition_penalty"]
_MIN_TOKENS, _MASKED = COLUMN["min_tokens"], COLUMN["masked"]


def adjust_logits(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor, entries: Tensor,
                  bias: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
    """The logits as the selection is to see them; every row of a request is treated alike.

    Semantics for token i with logit x, n times in the request's answer, in this order::

        repetition   x / repetition if x >= 0, else x * repetition, where prompt or answer has i
        frequency    x - frequency * n
        presence     x - presence where n > 0
        bias         x + bias
        ends, mask   -infinity where i ends the answer and min_tokens > 0, or where the mask's bit is 0

    The penalties are those of OpenAI's interface (presence, frequency) and of arXiv 1909.05858 as transformers has it
    (repetition).

    Args:
        logits: (rows, vocab) float32.
        whole, real, mix_rows, mix_weights, entries, bias, offsets, mask: the requests' options
            (:mod:`colora_ms.kernels.options`); ``ABSENT`` for entries, bias and offsets, or for mask: there are none.

    Returns:
        (rows, vocab) float32; rows of no request, or of one without adjustments, as they are.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a value is out of its range, an entry's tokens do not ascend, or two requests share a row that one
            of them adjusts.

    Gradients: refused.
    """
    return bound.adjust_logits(logits, whole, real, mix_rows, mix_weights, entries, bias, offsets, mask)


def adjust_logits_reference(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                            entries: Tensor, bias: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
    """:func:`adjust_logits` in built-in operators, any device; values are not checked."""
    rows, vocab = logits.shape
    requests = mix_rows.shape[0]
    numbers = ops.arange(rows).astype(ms.int32).reshape((rows, 1, 1))
    uses = (mix_rows.reshape((1, requests, MOST_ROWS)) == numbers).any(axis=2)  # (rows, requests)
    used = uses.any(axis=1).reshape((rows, 1))
    place = ops.arange(requests).astype(ms.int32).reshape((1, requests))
    owner = (uses.astype(ms.int32) * place).max(axis=1)  # (rows,)
    found = logits
    if offsets.ndim > 0:
        capacity = entries.shape[0]
        place = ops.arange(capacity).astype(ms.int32).reshape((capacity, 1))
        whose = (place >= offsets[1:].reshape((1, requests))).astype(ms.int32).sum(1)  # (capacity,)
        there = (whose < requests).astype(ms.float32)
        at = ops.minimum(whose, requests - 1) * vocab + entries[:, 0]  # of (requests, vocab), flat
        at = ops.where(whose < requests, at, ops.zeros_like(at)).reshape((capacity, 1))
        flags = entries[:, 2]

        def spread(values):
            """(rows, vocab): the values (capacity,) of the entries at their tokens."""
            flat = ops.tensor_scatter_elements(ops.zeros((requests * vocab, 1), ms.float32), at,
                                               (values * there).reshape((capacity, 1)), 0, "add")
            return ops.gather(flat.reshape((requests, vocab)), owner, 0)

        count = spread(entries[:, 1].astype(ms.float32))
        seen = spread(ops.bitwise_and(flags, ops.full_like(flags, IN_PROMPT)).astype(ms.float32))
        ends = spread((ops.bitwise_and(flags, ops.full_like(flags, ENDS)) > 0).astype(ms.float32))
        repetition = ops.gather(real[:, _REPETITION], owner, 0).reshape((rows, 1))
        turned = ops.where(logits < 0, logits * repetition, logits / repetition)
        x = ops.where(ops.logical_or(count > 0, seen > 0), turned, logits)
        less = ops.gather(real[:, _FREQUENCY], owner, 0).reshape((rows, 1)) * count \
            + ops.gather(real[:, _PRESENCE], owner, 0).reshape((rows, 1)) * (count > 0).astype(ms.float32)
        x = x - less + spread(bias)
        early = ops.gather(whole[:, _MIN_TOKENS], owner, 0).reshape((rows, 1)) > 0
        x = ops.where(ops.logical_and(early, ends > 0), ops.full_like(x, -float("inf")), x)
        found = ops.where(used, x, found)
    if mask.ndim > 0:
        token = ops.arange(vocab).astype(ms.int32)
        words = ops.gather(ops.gather(mask, owner, 0), token // 32, 1)  # (rows, vocab)
        bits = ops.bitwise_and(words, ops.bitwise_left_shift(ops.ones_like(token), token % 32).reshape((1, vocab)))
        masked = ops.logical_and(ops.gather(whole[:, _MASKED], owner, 0).reshape((rows, 1)) > 0, used)
        found = ops.where(ops.logical_and(masked, bits == 0), ops.full_like(found, -float("inf")), found)
    return found


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "adjust_logits"
_ARGUMENTS = ("logits", *TENSORS)


def check_adjustment_shapes(op: str, requests: int, entries: list, bias: list, offsets: list, mask: list) -> None:
    """Check the shapes of the tensors of adjustments.

    Raises:
        KernelError: one is wrong.
    """
    if offsets:
        require(len(entries) == 2 and entries[1] == 3, op, "entries", entries, "(capacity, 3)")
        require_shape(op, "bias", bias, (entries[0],))
        require_shape(op, "offsets", offsets, (requests + 1,))
    if mask:
        require(len(mask) == 2 and mask[0] == requests, op, "mask", mask, f"({requests}, words)")


def _shapes(logits, whole, real, mix_rows, mix_weights, entries, bias, offsets, mask):
    require(len(logits) == 2, _NAME, "logits", logits, "(rows, vocab)")
    requests = check_option_shapes(_NAME, whole, real, mix_rows, mix_weights)
    check_adjustment_shapes(_NAME, requests, entries, bias, offsets, mask)
    return list(logits)


def _dtypes(*dtypes):
    for argument, dtype in zip(_ARGUMENTS, dtypes):
        allowed = (ms.float32,) if argument in ("logits", "real", "mix_weights", "bias") else (ms.int32,)
        if argument in ("entries", "offsets", "mask"):
            allowed = (ms.int32, ms.float32)  # float32: ABSENT
        require_dtype(_NAME, argument, element_type(dtype), allowed)
    return ms.float32


def _no_gradient(logits, whole, real, mix_rows, mix_weights, entries, bias, offsets, mask, out, dout):
    raise RuntimeError("adjust_logits has no gradient; it is a part of picking tokens")


operation("adjust_logits", reference=lambda: adjust_logits_reference,
          cpu=lambda: custom(_NAME, _shapes, _dtypes, _no_gradient))
