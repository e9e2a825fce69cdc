"""The selection of a step in a graph of single operators: what ``kernels.step`` does behind the head."""

from mindspore import Tensor, ops

from colora_ms.kernels import adjust_logits, contrast_strength, contrastive_select, token_details
from colora_ms.kernels.options import COLUMN, replaced
from colora_ms.kernels.select import row_weights

_BETA = COLUMN["beta"]


def finite_rows(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor) -> Tensor:
    """The leading rows of the requests whose scores can be computed, -1 for the others.

    ``kernels.contrastive_select`` refuses a whole batch where logits that it reads are not finite or where a mixture
    overflows; a request of row -1 gets results of zeros, with 0 valid tokens, which tell the caller.

    Args:
        logits: (rows, vocab) float32, before adjustments.
        whole, real, mix_rows, mix_weights: see :mod:`colora_ms.kernels.options`.

    Returns:
        (R,) int32.
    """
    finite = ops.isfinite(logits.sum(axis=1))  # (rows,)
    size = ops.abs(logits).max(axis=1)
    weights = ops.abs(row_weights(whole, real, mix_rows, mix_weights))  # (R, 8)
    places = ops.maximum(mix_rows, 0)
    clean = ops.logical_or(ops.gather(finite, places, 0), mix_rows < 0).all(axis=1)  # (R,)
    sizes = ops.where(weights > 0, weights * ops.gather(size, places, 0), ops.zeros_like(weights))
    fine = ops.logical_and(clean, ops.isfinite(sizes.sum(axis=1)))
    return ops.where(fine, mix_rows[:, 0], ops.zeros_like(mix_rows[:, 0]) - 1)


def select(logits: Tensor, options: tuple, adjustments: tuple, uniform: Tensor, previous: Tensor, prompt: Tensor,
           lengths: Tensor) -> tuple:
    """Choose a token for every active request, with its adjustments, and beta as ``kernels.contrast_strength`` scales
    it.

    Args:
        logits: (rows, vocab) float32.
        options: (whole, real, mix_rows, mix_weights); adjustments: (entries, bias, offsets, mask), see
            :mod:`colora_ms.kernels.options`.
        uniform: (R,) float32; previous: (R,) int32, the token generated last, -1: none.
        prompt: (R, width) int32; lengths: (R,) int32.

    Returns:
        (ints (R, 3), floats (R, 4)) of ``kernels.contrastive_select``, (tops (R, 20), details (R, 29)) of
        ``kernels.token_details``.
    """
    whole, real, mix_rows, mix_weights = options
    mix_rows = replaced(mix_rows, 0, finite_rows(logits, whole, real, mix_rows, mix_weights))
    logits = adjust_logits(logits, whole, real, mix_rows, mix_weights, *adjustments)
    beta = contrast_strength(logits, whole, real, mix_rows, mix_weights, previous, prompt, lengths)  # (R,)
    real = replaced(real, _BETA, beta)
    ints, floats = contrastive_select(logits, whole, real, mix_rows, mix_weights, uniform)
    tops, details = token_details(logits, whole, real, mix_rows, mix_weights, ints[:, 0])
    return ints, floats, tops, details
