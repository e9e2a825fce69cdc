"""The next token of each request: the scores of its rows together, then argmax or sampling."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import ascend, bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import COLUMN, MOST_ROWS, REAL, SELECTION, WHOLE
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_TOP_K, _MIXING, _CUT = COLUMN["top_k"], COLUMN["mixing"], COLUMN["cut"]
_ALPHA, _BETA, _TEMPERATURE = COLUMN["alpha"], COLUMN["beta"], COLUMN["temperature"]
_TOP_P, _MIN_P = COLUMN["top_p"], COLUMN["min_p"]

_MASKED = -3.0e38  # below every finite logit, and finite, so that differences with it are no NaN


def contrastive_select(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                       uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one token per request from the logits of its rows, in float32.

    Semantics, with l_k the logits of the request's row k (row 0 is the leading one), w_k its weight and
    p_k = softmax(l_k). The score of a token i is, by ``mixing``::

        one row        l_0[i]
        contrast       (1 + beta) * l_0[i] - beta * l_1[i]        Contrastive LoRA Decoding, arXiv 2505.14620
        log            sum of w_k l_k[i]                          the sum of w_k log p_k but for a constant
        probability    log of the sum of w_k p_k[i]

    and the valid tokens, by ``cut`` (a contrast has "leading", one row has none)::

        none           all
        leading        l_0[i] >= log(alpha) + max(l_0)
        mixture        s[i] >= log(alpha) + max(s)

    A row of weight 0 is not read; a token to which row 0 gives -infinity is never taken.

    ``temperature = 0``: the token of the highest score, the smallest index among equals. Else a draw from
    softmax(s / temperature): the tokens sorted by descending score (ties by index) are cut to the first ``top_k``, then
    to the smallest set whose mass reaches ``top_p`` of what is left (at least one), then to those of at least ``min_p``
    times the best one's mass (arXiv 2407.01082), and the token is the first one whose cumulated mass exceeds
    ``uniform`` times the mass of that set.

    Args:
        logits: (rows, vocab) float32, after penalties, bias and masks (:func:`colora_ms.kernels.adjust_logits`).
        whole, real, mix_rows, mix_weights: the requests' options (:mod:`colora_ms.kernels.options`). Read are
            mix_rows: (R, 8), the rows of each request, -1 behind the last one; all -1: the request is inactive, nothing
            else is read and all its results are 0;
            mixing, cut; alpha in (0, 1] where there is a cut; beta >= 0 in a contrast; mix_weights (R, 8) in the other
            mixes, finite, not all 0, none below 0 for a mean of probabilities;
            temperature >= 0; 0: argmax (top_k, top_p, min_p, uniform not read);
            top_k, 0: off; top_p in (0, 1], 1: off; min_p in [0, 1], 0: off.
        uniform: (R,) float32 in [0, 1), the random number of the draw.

    Returns:
        ``(ints, floats)``: ints (R, 3) int32 with the token, the favourite of row 0 (its own argmax), and the number of
        valid tokens (of one row: the vocabulary); floats (R, 4) float32 with l_0[token], l_1[token] (0 where there is
        no second row), s[token], and max(l_0).

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a row number or an option is out of its range, or the logits that are read hold NaN or no finite
            maximum. Then nothing was written.

    Gradients: refused.
    """
    return bound.contrastive_select(logits, whole, real, mix_rows, mix_weights, uniform)


def greedy_records(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor,
                   mix_weights: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`contrastive_select` of greedy requests whose scores are sums of logits and whose cut, if any, is the
    leading row's, by the Ascend C operator: nothing is sorted. What it gives for other requests means nothing."""
    alpha, mixing = real[:, _ALPHA], whole[:, _MIXING]
    cut = ops.logical_and(mix_rows[:, 1] >= 0, ops.logical_or(mixing == 0, whole[:, _CUT] == 1))
    least = ops.where(cut, ops.log(alpha), ops.full_like(alpha, -float("inf")))
    ints, floats = ascend.contrastive_token(logits, mix_rows, row_weights(whole, real, mix_rows, mix_weights), least)
    return ints, ops.concat((floats[:, 2:4], floats[:, :2]), 1)


def needs_distribution(whole: Tensor, real: Tensor, mix_rows: Tensor) -> Tensor:
    """(requests,) bool: the requests that :func:`greedy_records` does not serve. They sample, or mix probabilities, or
    cut by the mixture."""
    mixture = ops.logical_or(whole[:, _MIXING] == 2, ops.logical_and(whole[:, _MIXING] != 0, whole[:, _CUT] == 2))
    needs = ops.logical_or(real[:, _TEMPERATURE] > 0, ops.logical_and(mix_rows[:, 1] >= 0, mixture))
    return ops.logical_and(mix_rows[:, 0] >= 0, needs)


def _with_device_token(logits, whole, real, mix_rows, mix_weights, uniform):
    """:func:`contrastive_select` with the Ascend C operator; the built-in operators, and their sort of the vocabulary,
    only where a request needs them."""
    ints, floats = greedy_records(logits, whole, real, mix_rows, mix_weights)
    others = needs_distribution(whole, real, mix_rows)
    if others.any():
        every, values = bound.select_records(logits, whole, real, mix_rows, mix_weights, uniform)
        others = others.reshape((-1, 1))
        ints, floats = ops.where(others, every, ints), ops.where(others, values, floats)
    return ints, floats


def row_weights(whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor) -> Tensor:
    """(R, 8) float32: the weight of each row of each request, 0 where there is none; for graphs."""
    places = ops.arange(MOST_ROWS).astype(ms.int32).reshape((1, MOST_ROWS))
    beta = real[:, _BETA].reshape((-1, 1))
    alone = (places == 0).astype(ms.float32)
    contrast = (1.0 + beta) * alone - beta * (places == 1).astype(ms.float32)
    several = mix_rows[:, 1:2] >= 0
    weights = ops.where(whole[:, _MIXING].reshape((-1, 1)) == 0, contrast, mix_weights)
    weights = ops.where(several, weights, ops.zeros_like(weights) + alone)
    return ops.where(mix_rows >= 0, weights, ops.zeros_like(weights))


def mixture_reference(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor) -> tuple:
    """The scores of all tokens in built-in operators.

    Returns:
        (scores (R, vocab) float32, valid (R, vocab) bool, first (R, vocab): the logits of row 0).
    """
    requests, vocab = mix_rows.shape[0], logits.shape[1]
    weights = row_weights(whole, real, mix_rows, mix_weights)
    first = ops.gather(logits, ops.maximum(mix_rows[:, 0], 0), 0)  # (R, vocab)
    total, share = ops.zeros((requests, vocab), ms.float32), ops.zeros((requests, vocab), ms.float32)
    for k in range(MOST_ROWS):
        row = ops.gather(logits, ops.maximum(mix_rows[:, k], 0), 0)  # (R, vocab)
        weight = weights[:, k:k + 1]  # (R, 1)
        used = weight != 0  # a row of weight 0 must not matter at all, and 0 * infinity is NaN
        total = total + ops.where(used, weight * row, ops.zeros_like(row))
        away = row - ops.max(row, axis=1, keepdims=True)[0]
        share = share + ops.where(used, weight * ops.softmax(away, 1), ops.zeros_like(row))
    several = mix_rows[:, 1:2] >= 0
    mixing = whole[:, _MIXING].reshape((requests, 1))
    scores = ops.where(ops.logical_and(several, mixing == 2), ops.log(share), total)
    out = first > -float("inf")
    cut = ops.where(mixing == 0, ops.ones_like(mixing), whole[:, _CUT].reshape((requests, 1)))
    cut = ops.where(several, cut, ops.zeros_like(cut))
    least = ops.log(ops.where(cut > 0, real[:, _ALPHA].reshape((requests, 1)), ops.ones((requests, 1), ms.float32)))
    scores = ops.where(out, scores, ops.full_like(scores, -float("inf")))
    valid = ops.where(cut == 1, first >= least + ops.max(first, axis=1, keepdims=True)[0],
                      scores >= least + ops.max(scores, axis=1, keepdims=True)[0])
    valid = ops.logical_or(valid, cut == 0)
    return scores, ops.logical_and(valid, ops.logical_and(out, scores > -float("inf"))), first


def contrastive_select_reference(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                                 uniform: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`contrastive_select` in built-in operators, any device; values are not checked."""
    top_k, temperature = whole[:, _TOP_K], real[:, _TEMPERATURE]  # (R,)
    top_p, min_p = real[:, _TOP_P], real[:, _MIN_P]
    requests, vocab = mix_rows.shape[0], logits.shape[1]
    scores, valid, expert = mixture_reference(logits, whole, real, mix_rows, mix_weights)
    amateur = ops.gather(logits, ops.maximum(mix_rows[:, 1], 0), 0)
    several = mix_rows[:, 1:2] >= 0
    highest = ops.max(expert, axis=1, keepdims=True)[0]
    favourite = ops.argmax(expert, 1).astype(ms.int32)
    scores = ops.where(valid, scores, ops.full_like(scores, _MASKED))
    count = valid.astype(ms.int32).sum(1)

    ordered, order = ops.sort(scores, 1, True)
    steps = ops.arange(vocab).astype(ms.int32).reshape((1, vocab))
    limit = ops.where(top_k > 0, ops.minimum(top_k, count), count).reshape((requests, 1))
    heat = ops.where(temperature > 0, temperature, ops.ones_like(temperature)).reshape((requests, 1))
    mass = ops.exp((ordered - ordered[:, :1]) / heat) * (steps < limit).astype(ms.float32)
    below = ops.cumsum(mass, 1) - mass  # the mass before each token
    total = mass.sum(1).reshape((requests, 1))
    top_p = top_p.reshape((requests, 1))
    kept = ops.logical_and(ops.logical_or(below < top_p * total, top_p >= 1.0), steps < limit)
    kept = ops.logical_and(kept, mass >= min_p.reshape((requests, 1)))  # the best one's mass is 1
    mass = mass * kept.astype(ms.float32)
    reached = ops.cumsum(mass, 1)
    passed = ops.logical_and(reached <= uniform.reshape((requests, 1)) * reached[:, -1:], kept)
    place = ops.minimum(passed.astype(ms.int32).sum(1), kept.astype(ms.int32).sum(1) - 1)
    sampled = ops.gather_elements(order, 1, ops.maximum(place, 0).reshape((requests, 1)).astype(ms.int32))
    greedy = ops.argmax(scores, 1).astype(ms.int32)
    token = ops.where(temperature > 0, sampled.reshape((requests,)).astype(ms.int32), greedy)

    at = token.reshape((requests, 1))
    amateur_logit = ops.where(several, ops.gather_elements(amateur, 1, at), ops.zeros((requests, 1), ms.float32))
    count = ops.where(several.reshape((requests,)), count, ops.zeros_like(count) + vocab)
    ints = ops.stack((token, favourite, count.astype(ms.int32)), 1)
    floats = ops.concat((ops.gather_elements(expert, 1, at), amateur_logit, ops.gather_elements(scores, 1, at),
                         highest), 1)
    active = mix_rows[:, :1] >= 0
    return ops.where(active, ints, ops.zeros_like(ints)), ops.where(active, floats, ops.zeros_like(floats))


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "contrastive_select"


def check_option_shapes(op: str, whole: list, real: list, mix_rows: list, mix_weights: list) -> int:
    """Shapes of the options that the selection takes -> number of requests.

    Raises:
        KernelError: one is wrong.
    """
    require(len(whole) == 2 and whole[1] == len(WHOLE), op, "whole", whole, f"(requests, {len(WHOLE)})")
    require_shape(op, "real", real, (whole[0], len(REAL)))
    require_shape(op, "mix_rows", mix_rows, (whole[0], MOST_ROWS))
    require_shape(op, "mix_weights", mix_weights, (whole[0], MOST_ROWS))
    return whole[0]


def _shapes(logits, whole, real, mix_rows, mix_weights, uniform):
    require(len(logits) == 2, _NAME, "logits", logits, "(rows, vocab)")
    requests = check_option_shapes(_NAME, whole, real, mix_rows, mix_weights)
    require_shape(_NAME, "uniform", uniform, (requests,))
    return [requests, 3], [requests, 4]


def _dtypes(*dtypes):
    for argument, dtype in zip(("logits", *SELECTION, "uniform"), dtypes):
        allowed = (ms.int32,) if argument in ("whole", "mix_rows") else (ms.float32,)
        require_dtype(_NAME, argument, element_type(dtype), allowed)
    return ms.int32, ms.float32


def _no_gradient(logits, whole, real, mix_rows, mix_weights, uniform, out, dout):
    raise RuntimeError("contrastive_select has no gradient; it picks tokens")


def _operator():
    return custom(_NAME, _shapes, _dtypes, _no_gradient)


operation("contrastive_select", reference=lambda: contrastive_select_reference, cpu=_operator,
          emulator=lambda: _with_device_token, ascend=lambda: _with_device_token)
operation("select_records", reference=lambda: contrastive_select_reference, cpu=_operator)
