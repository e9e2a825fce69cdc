"""The next token of each request: contrastive scores of expert and amateur, then argmax or sampling."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import ascend, bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import COLUMN, REAL, WHOLE
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_EXPERT, _AMATEUR, _TOP_K = COLUMN["expert_rows"], COLUMN["amateur_rows"], COLUMN["top_k"]
_ALPHA, _BETA, _TEMPERATURE = COLUMN["alpha"], COLUMN["beta"], COLUMN["temperature"]
_TOP_P, _MIN_P = COLUMN["top_p"], COLUMN["min_p"]

_MASKED = -3.0e38  # below every finite logit, and finite, so that differences with it are no NaN


def contrastive_select(logits: Tensor, whole: Tensor, real: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Pick one token per request by Contrastive LoRA Decoding (arXiv 2505.14620), in float32.

    Semantics, with e and a the logits rows of the request's expert and amateur::

        valid = {i : e[i] >= log(alpha) + max(e)}
        s[i]  = (1 + beta) * e[i] - beta * a[i]     for i in valid, else -infinity

    ``temperature = 0``: the token of the highest score, the smallest index among equals. Else a draw from
    softmax(s / temperature): the tokens sorted by descending score (ties by index) are cut to the first ``top_k``, then
    to the smallest set whose mass reaches ``top_p`` of what is left (at least one), then to those of at least ``min_p``
    times the best one's mass (arXiv 2407.01082), and the token is the first one whose cumulated mass exceeds
    ``uniform`` times the mass of that set.

    Args:
        logits: (rows, vocab) float32.
        whole, real: (R, columns) int32 and float32, the requests' options (:mod:`colora_ms.kernels.options`). Read are
            expert_rows: the logits row of each request; -1: the request is inactive, nothing is read and all its
            results are 0;
            amateur_rows: -1: no contrast, plain scores s = e with every token valid (alpha, beta not read);
            alpha in (0, 1]; beta >= 0;
            temperature >= 0; 0: argmax (top_k, top_p, min_p, uniform not read);
            top_k, 0: off; top_p in (0, 1], 1: off; min_p in [0, 1], 0: off.
        uniform: (R,) float32 in [0, 1), the random number of the draw.

    Returns:
        ``(ints, floats)``: ints (R, 3) int32 with the token, the expert's favourite (its own argmax), and the number of
        valid tokens; floats (R, 4) float32 with e[token], a[token] (0 without contrast), s[token], and max(e).

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a row number or an option is out of its range, or the logits that are read hold NaN or no finite
            maximum. Then nothing was written.

    Gradients: refused.
    """
    return bound.contrastive_select(logits, whole, real, uniform)


def _with_device_token(logits, whole, real, uniform):
    """:func:`contrastive_select` with the tokens of greedy requests chosen by the Ascend C operator."""
    ints, floats = bound.select_records(logits, whole, real, uniform)
    expert_rows, amateur_rows = whole[:, _EXPERT], whole[:, _AMATEUR]  # (R,)
    alpha, beta, temperature = real[:, _ALPHA], real[:, _BETA], real[:, _TEMPERATURE]
    contrast = amateur_rows >= 0
    expert = ops.gather(logits, ops.maximum(expert_rows, 0), 0)
    amateur = ops.gather(logits, ops.maximum(ops.where(contrast, amateur_rows, expert_rows), 0), 0)
    # alpha = 1 keeps the favourite alone: plain greedy decoding.
    token = ascend.contrastive_token(expert, amateur, ops.where(contrast, alpha, ops.ones_like(alpha)),
                                     ops.where(contrast, beta, ops.zeros_like(beta)))
    greedy = ops.logical_and(temperature == 0, expert_rows >= 0)
    return ops.concat((ops.where(greedy, token, ints[:, 0]).reshape(-1, 1), ints[:, 1:]), 1), floats


def contrastive_select_reference(logits: Tensor, whole: Tensor, real: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`contrastive_select` in built-in operators, any device; values are not checked."""
    expert_rows, amateur_rows, top_k = whole[:, _EXPERT], whole[:, _AMATEUR], whole[:, _TOP_K]  # (R,)
    alpha, beta, temperature = real[:, _ALPHA], real[:, _BETA], real[:, _TEMPERATURE]
    top_p, min_p = real[:, _TOP_P], real[:, _MIN_P]
    requests, vocab = expert_rows.shape[0], logits.shape[1]
    active, contrast = expert_rows >= 0, amateur_rows >= 0
    expert = ops.gather(logits, ops.maximum(expert_rows, 0), 0)  # (R, vocab)
    amateur = ops.gather(logits, ops.maximum(amateur_rows, 0), 0)
    highest = ops.max(expert, axis=1, keepdims=True)[0]
    favourite = ops.argmax(expert, 1).astype(ms.int32)
    alpha = ops.where(contrast, alpha, ops.ones_like(alpha)).reshape((requests, 1))
    beta = ops.where(contrast, beta, ops.zeros_like(beta)).reshape((requests, 1))
    contrast = contrast.reshape((requests, 1))
    valid = ops.logical_or(expert >= ops.log(alpha) + highest, ops.logical_not(contrast))
    # With beta = 0 the amateur must not matter at all, and 0 * infinity is NaN.
    scores = ops.where(beta > 0, (1.0 + beta) * expert - beta * amateur, expert)
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
    amateur_logit = ops.where(contrast, ops.gather_elements(amateur, 1, at), ops.zeros((requests, 1), ms.float32))
    ints = ops.stack((token, favourite, count.astype(ms.int32)), 1)
    floats = ops.concat((ops.gather_elements(expert, 1, at), amateur_logit, ops.gather_elements(scores, 1, at),
                         highest), 1)
    active = active.reshape((requests, 1))
    return ops.where(active, ints, ops.zeros_like(ints)), ops.where(active, floats, ops.zeros_like(floats))


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "contrastive_select"


def check_option_shapes(op: str, whole: list, real: list) -> int:
    """Shapes of the two tensors of options -> number of requests.

    Raises:
        KernelError: one is wrong.
    """
    require(len(whole) == 2 and whole[1] == len(WHOLE), op, "whole", whole, f"(requests, {len(WHOLE)})")
    require_shape(op, "real", real, (whole[0], len(REAL)))
    return whole[0]


def _shapes(logits, whole, real, uniform):
    require(len(logits) == 2, _NAME, "logits", logits, "(rows, vocab)")
    requests = check_option_shapes(_NAME, whole, real)
    require_shape(_NAME, "uniform", uniform, (requests,))
    return [requests, 3], [requests, 4]


def _dtypes(*dtypes):
    for argument, dtype in zip(("logits", "whole", "real", "uniform"), dtypes):
        require_dtype(_NAME, argument, element_type(dtype), (ms.int32,) if argument == "whole" else (ms.float32,))
    return ms.int32, ms.float32


def _no_gradient(logits, whole, real, uniform, out, dout):
    raise RuntimeError("contrastive_select has no gradient; it picks tokens")


def _operator():
    return custom(_NAME, _shapes, _dtypes, _no_gradient)


operation("contrastive_select", reference=lambda: contrastive_select_reference, cpu=_operator,
          emulator=lambda: _with_device_token, ascend=lambda: _with_device_token)
operation("select_records", reference=lambda: contrastive_select_reference, cpu=_operator)
