"""Logits that are not finite end their own request, in the graph as in the operator."""

from mindspore import Tensor, ops


def finite_rows(logits: Tensor, expert_rows: Tensor, amateur_rows: Tensor, beta: Tensor) -> Tensor:
    """The leading rows of the requests whose scores can be computed, -1 for the others.

    ``kernels.contrastive_select`` refuses a whole batch where logits that it reads are not finite or where a contrast
    overflows; a request of row -1 gets results of zeros, with 0 valid tokens, which tell the caller.

    Args:
        logits: (rows, vocab) float32.
        expert_rows, amateur_rows: (R,) int32; amateur -1 where there is no contrast.
        beta: (R,) float32.

    Returns:
        (R,) int32.
    """
    contrast = amateur_rows >= 0
    experts, amateurs = ops.maximum(expert_rows, 0), ops.maximum(amateur_rows, 0)
    finite = ops.isfinite(logits.sum(axis=1))  # (rows,)
    size = ops.abs(logits).max(axis=1)
    beta = ops.where(contrast, beta, ops.zeros_like(beta))
    reach = (1.0 + beta) * ops.gather(size, experts, 0) + beta * ops.gather(size, amateurs, 0)  # (R,)
    clean = ops.logical_and(ops.gather(finite, amateurs, 0), ops.isfinite(reach))
    fine = ops.logical_and(ops.gather(finite, experts, 0), ops.logical_or(ops.logical_not(contrast), clean))
    return ops.where(fine, expert_rows, ops.zeros_like(expert_rows) - 1)
