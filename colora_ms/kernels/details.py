"""Log-probabilities of chosen tokens, for requests that ask for them."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import COLUMN, DETAILS, MOST_ROWS, MOST_TOP, SELECTION
from colora_ms.kernels.registry import operation
from colora_ms.kernels.select import check_option_shapes, mixture_reference
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_LOGPROBS, _VOICES = COLUMN["logprobs"], COLUMN["voices"]


def token_details(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                  token: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a token of each request: in the mixture of its rows, of the best tokens there, in each row.

    They are those before temperature, top-k, top-p and min-p: the log-softmax of the scores of
    :func:`colora_ms.kernels.contrastive_select` over its valid tokens; a row's is the log-softmax of its logits over
    all tokens.

    Args:
        logits, whole, real, mix_rows, mix_weights: as for :func:`colora_ms.kernels.contrastive_select`. Read are
            logprobs, -1: nothing, else how many of the best tokens are listed; voices, 1: the rows' numbers are wanted.
        token: (R,) int32.

    Returns:
        ``(tops, details)``: tops (R, 20) int32, the best tokens in descending order (ties: the smaller one first), -1
        behind the last; details (R, 29) float32: the token's log-probability, those of tops, those of the rows, 0 where
        there is nothing. A request that asks for neither has -1 and 0 everywhere.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a row, an option or a token is out of its range.

    Gradients: refused.
    """
    return bound.token_details(logits, whole, real, mix_rows, mix_weights, token)


def token_details_reference(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                            token: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`token_details` in built-in operators, any device; values are not checked."""
    requests, vocab = mix_rows.shape[0], logits.shape[1]
    scores, valid, _ = mixture_reference(logits, whole, real, mix_rows, mix_weights)
    scores = ops.where(valid, scores, ops.full_like(scores, -float("inf")))
    chances = _log_softmax(scores)
    at = token.reshape((requests, 1))
    own = ops.gather_elements(chances, 1, at)  # (R, 1)
    count = min(MOST_TOP, vocab)
    ordered, order = ops.sort(chances, 1, True)
    place = ops.arange(count).astype(ms.int32).reshape((1, count))
    logprobs, voices = whole[:, _LOGPROBS].reshape((requests, 1)), whole[:, _VOICES].reshape((requests, 1))
    listed = ops.logical_and(place < logprobs, ordered[:, :count] > -float("inf"))
    tops = ops.where(listed, order[:, :count].astype(ms.int32), ops.zeros_like(place) - 1)
    best = ops.where(listed, ordered[:, :count], ops.zeros_like(ordered[:, :count]))
    if count < MOST_TOP:
        tops = ops.concat((tops, ops.zeros((requests, MOST_TOP - count), ms.int32) - 1), 1)
        best = ops.concat((best, ops.zeros((requests, MOST_TOP - count), ms.float32)), 1)
    parts = [own, best]
    for k in range(MOST_ROWS):
        row = _log_softmax(ops.gather(logits, ops.maximum(mix_rows[:, k], 0), 0))
        wanted = ops.logical_and(voices > 0, mix_rows[:, k:k + 1] >= 0)
        parts.append(ops.where(wanted, ops.gather_elements(row, 1, at), ops.zeros_like(own)))
    details = ops.concat(parts, 1)
    asked = ops.logical_and(ops.logical_or(logprobs >= 0, voices > 0), mix_rows[:, :1] >= 0)
    return ops.where(asked, tops, ops.zeros_like(tops) - 1), ops.where(asked, details, ops.zeros_like(details))


def _log_softmax(x):
    away = x - ops.max(x, axis=1, keepdims=True)[0]
    return away - ops.log(ops.exp(away).sum(1).reshape((-1, 1)))


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "token_details"


def _shapes(logits, whole, real, mix_rows, mix_weights, token):
    require(len(logits) == 2, _NAME, "logits", logits, "(rows, vocab)")
    requests = check_option_shapes(_NAME, whole, real, mix_rows, mix_weights)
    require_shape(_NAME, "token", token, (requests,))
    return [requests, MOST_TOP], [requests, DETAILS]


def _dtypes(*dtypes):
    for argument, dtype in zip(("logits", *SELECTION, "token"), dtypes):
        allowed = (ms.int32,) if argument in ("whole", "mix_rows", "token") else (ms.float32,)
        require_dtype(_NAME, argument, element_type(dtype), allowed)
    return ms.int32, ms.float32


def _no_gradient(logits, whole, real, mix_rows, mix_weights, token, out, dout):
    raise RuntimeError("token_details has no gradient; it tells about picked tokens")


operation("token_details", reference=lambda: token_details_reference,
          cpu=lambda: custom(_NAME, _shapes, _dtypes, _no_gradient))
