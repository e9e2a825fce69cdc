"""How strongly each request contrasts at this step: beta of an adaptive contrast."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.options import COLUMN, SELECTION
from colora_ms.kernels.registry import operation
from colora_ms.kernels.select import check_option_shapes
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

#: The forms of a contrast and their numbers in ``mode``.
FORMS = {"fixed": 0, "entropy": 1, "divergence": 2, "margin": 3}

#: Added to ``mode``: no contrast where the expert's favourite goes on with a span of the prompt.
SKIP_COPIES = 8

_MODE, _MIXING = COLUMN["mode"], COLUMN["mixing"]
_ALPHA, _BETA = COLUMN["alpha"], COLUMN["beta"]

_LOWEST = -3.0e38  # below every finite logit, and finite


def contrast_strength(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                      previous: Tensor, prompt: Tensor, lengths: Tensor) -> Tensor:
    """The weight that ``contrastive_select`` is to give to each amateur at this step.

    Semantics, with e and a the logits rows of expert and amateur, V = {i : e[i] >= log(alpha) + max e} the expert's
    alpha-cut and e1 >= e2 its two highest logits: strength = beta * share, where share in [0, 1] is by ``mode``

    * 0, fixed: 1
    * 1, entropy: H(q) / ln |V|, q = softmax of e over V; 0 where |V| = 1
    * 2, divergence: JS(softmax e, softmax a) / ln 2, the Jensen-Shannon divergence over the whole vocabulary
    * 3, margin: max(0, 1 - (e1 - e2) / -log(alpha)); 1 at a tie, 0 where |V| = 1 or alpha = 1

    and with 8 added to ``mode``: 0 where the prompt x holds (``previous``, favourite) as neighbours, that is
    x[j] = previous and x[j + 1] = argmax e for some j; else the share of ``mode - 8``.

    Args:
        logits: (rows, vocab) float32.
        whole, real, mix_rows, mix_weights: the requests' options (:mod:`colora_ms.kernels.options`). Read are
            mix_rows: the rows of expert and amateur; -1 in either, or another mix than a contrast: the strength is 0;
            alpha in (0, 1]; beta >= 0; mode.
        previous: (R,) int32, the token generated last; -1: there is none yet.
        prompt: (R, P) int32, padded at the right; lengths: (R,) int32, tokens of each prompt.

    Returns:
        (R,) float32, at most beta.

    Raises:
        KernelError: a shape or dtype is wrong.
        RuntimeError: a row, an option or a length is out of its range.

    Gradients: refused.
    """
    return bound.contrast_strength(logits, whole, real, mix_rows, mix_weights, previous, prompt, lengths)


def contrast_strength_reference(logits: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor,
                                previous: Tensor, prompt: Tensor, lengths: Tensor) -> Tensor:
    """:func:`contrast_strength` in built-in operators, any device; values are not checked."""
    expert_rows, amateur_rows, mode = mix_rows[:, 0], mix_rows[:, 1], whole[:, _MODE]  # (R,)
    alpha, beta = real[:, _ALPHA], real[:, _BETA]
    requests, vocab = expert_rows.shape[0], logits.shape[1]
    contrast = ops.logical_and(ops.logical_and(expert_rows >= 0, amateur_rows >= 0), whole[:, _MIXING] == 0)
    expert = ops.gather(logits, ops.maximum(expert_rows, 0), 0)  # (R, vocab)
    amateur = ops.gather(logits, ops.maximum(amateur_rows, 0), 0)
    alpha = ops.where(contrast, alpha, ops.ones_like(alpha))
    skips = mode >= SKIP_COPIES
    kind = ops.where(skips, mode - SKIP_COPIES, mode)
    highest = ops.max(expert, axis=1, keepdims=True)[0]
    favourite = ops.argmax(expert, 1).astype(ms.int32).reshape((requests, 1))
    limit = ops.log(alpha)

    valid = (expert >= limit.reshape((requests, 1)) + highest).astype(ms.float32)
    count = valid.sum(1)
    gap = ops.maximum(expert - highest, _LOWEST)
    weight = ops.exp(gap) * valid
    mass = weight.sum(1)
    entropy = ops.log(mass) - (weight * ops.maximum(gap, -200.0)).sum(1) / mass
    many = count > 1
    entropy = ops.where(many, entropy / ops.log(ops.maximum(count, 2.0)), ops.zeros_like(entropy))

    others = ops.where(ops.arange(vocab).astype(ms.int32).reshape((1, vocab)) == favourite,
                       ops.full_like(expert, _LOWEST), expert)
    second = ops.max(others, axis=1)[0]
    below = limit < 0
    margin = 1.0 - (second - highest.reshape((requests,))) / ops.where(below, limit, -ops.ones_like(limit))
    margin = ops.where(ops.logical_and(below, many), ops.maximum(margin, 0.0), ops.zeros_like(margin))

    p, q = ops.softmax(expert, 1), ops.softmax(amateur, 1)
    middle = ops.maximum(0.5 * (p + q), 1e-30)
    apart = (p * ops.log(ops.maximum(p, 1e-30) / middle) + q * ops.log(ops.maximum(q, 1e-30) / middle)).sum(1)
    apart = 0.5 * apart / 0.6931471805599453

    share = ops.where(kind == 1, entropy, ops.ones_like(entropy))
    share = ops.where(kind == 2, apart, share)
    share = ops.where(kind == 3, margin, share)
    share = ops.clamp(share, 0.0, 1.0)

    width = prompt.shape[1]
    if width > 1:
        place = ops.arange(1, width).astype(ms.int32).reshape((1, width - 1))
        pairs = ops.logical_and(prompt[:, :-1] == previous.reshape((requests, 1)), prompt[:, 1:] == favourite)
        pairs = ops.logical_and(pairs, place < lengths.reshape((requests, 1)))
        copied = ops.logical_and(pairs.any(axis=1), skips)
        share = ops.where(copied, ops.zeros_like(share), share)
    return ops.where(contrast, beta * share, ops.zeros_like(beta))


# -- the CPU operator -------------------------------------------------------------------------------------------------

_NAME = "contrast_strength"
_ARGUMENTS = ("logits", *SELECTION, "previous", "prompt", "lengths")


def _shapes(logits, whole, real, mix_rows, mix_weights, previous, prompt, lengths):
    require(len(logits) == 2, _NAME, "logits", logits, "(rows, vocab)")
    requests = check_option_shapes(_NAME, whole, real, mix_rows, mix_weights)
    require_shape(_NAME, "previous", previous, (requests,))
    require(len(prompt) == 2 and prompt[0] == requests, _NAME, "prompt", prompt, f"({requests}, prompt length)")
    require_shape(_NAME, "lengths", lengths, (requests,))
    return [requests]


def _dtypes(*dtypes):
    for argument, dtype in zip(_ARGUMENTS, dtypes):
        require_dtype(_NAME, argument, element_type(dtype),
                      (ms.float32,) if argument in ("logits", "real", "mix_weights") else (ms.int32,))
    return ms.float32


def _no_gradient(logits, whole, real, mix_rows, mix_weights, previous, prompt, lengths, out, dout):
    raise RuntimeError("contrast_strength has no gradient; it picks tokens")


operation("contrast_strength", reference=lambda: contrast_strength_reference,
          cpu=lambda: custom(_NAME, _shapes, _dtypes, _no_gradient))
