"""Contrastive LoRA Decoding (CoLD, arXiv 2505.14620): the rule in NumPy; its options are ``options.Contrast``.

The expert is base + adapter, the amateur is the base. With their logits e and a (papers' equation for s^CD)::

    valid = { i : e_i >= log(alpha) + max e }
    s_i   = (1 + beta) * e_i - beta * a_i     for i in valid
          = -inf                              elsewhere

An *adaptive* contrast puts beta_t = beta * share_t in the place of beta, with share_t in [0, 1] from the logits of
step t. With V the valid tokens, e1 >= e2 the expert's two highest logits, H the entropy in nats and JS the
Jensen-Shannon divergence::

    fixed        1                                          the paper's rule
    entropy      H(softmax of e over V) / ln |V|            contrast where the expert is undecided
    divergence   JS(softmax e, softmax a) / ln 2            contrast where the adapter changed the distribution (the
                                                            weight of AdaCAD, arXiv 2409.07394)
    margin       max(0, 1 - (e1 - e2) / -log(alpha))        contrast near a tie, fading out towards the cut

and with ``skip_copies`` the share is 0 where the expert's favourite goes on with a span of the prompt x: where
x_j = (the token generated last) and x_{j+1} = argmax e for some j. Numbers and names that an answer copies are so left
alone from their second token on.

The graph computes this with :func:`colora_ms.kernels.contrast_strength` and
:func:`colora_ms.kernels.contrastive_select`; the functions here are their readable twins, used by the naive baseline
and the tests.
"""

from __future__ import annotations

import math
from typing import Sequence

import numpy as np
from numpy.typing import ArrayLike

from colora_ms.decoding.options import Contrast


def contrastive_scores(expert: ArrayLike, amateur: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> np.ndarray:
    """The CoLD scores of one step in float32.

    Args:
        expert, amateur: unnormalised logits, each (..., vocab).
        alpha: in (0, 1], scalar or (...).
        beta: >= 0, scalar or (...).

    Returns:
        (..., vocab) float32; -inf outside the expert's alpha-cut.
    """
    expert = np.asarray(expert, np.float32)
    amateur = np.asarray(amateur, np.float32)
    alpha = np.asarray(alpha, np.float32)[..., None]
    beta = np.asarray(beta, np.float32)[..., None]
    cut = np.log(alpha) + expert.max(axis=-1, keepdims=True)
    scores = (np.float32(1) + beta) * expert - beta * amateur
    return np.where(expert >= cut, scores, -np.inf).astype(np.float32)


def contrast_strength(expert: ArrayLike, amateur: ArrayLike, contrast: Contrast, previous: int = -1,
                      prompt: Sequence[int] = ()) -> float:
    """beta of one step: ``contrast.beta`` times the share of the contrast's form (head of this module).

    Args:
        expert, amateur: unnormalised logits, each (vocab,).
        contrast: :class:`Contrast`.
        previous: the token generated last, -1 before the first one.
        prompt: ids of the prompt.

    Returns:
        float in [0, beta].
    """
    expert, amateur = np.asarray(expert, np.float64), np.asarray(amateur, np.float64)
    favourite = int(expert.argmax())
    pairs = zip(prompt[:-1], prompt[1:])
    if contrast.skip_copies and any(x == previous and y == favourite for x, y in pairs):
        return 0.0
    return contrast.beta * _SHARES[contrast.adapt](expert, amateur, contrast.alpha)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _entropy_share(expert: np.ndarray, amateur: np.ndarray, alpha: float) -> float:
    valid = expert[expert >= math.log(alpha) + expert.max()]
    return _entropy(_softmax(valid)) / math.log(len(valid)) if len(valid) > 1 else 0.0


def _divergence_share(expert: np.ndarray, amateur: np.ndarray, alpha: float) -> float:
    p, q = _softmax(expert), _softmax(amateur)
    return (_entropy(0.5 * (p + q)) - 0.5 * _entropy(p) - 0.5 * _entropy(q)) / math.log(2)


def _margin_share(expert: np.ndarray, amateur: np.ndarray, alpha: float) -> float:
    if alpha == 1 or len(expert) < 2:
        return 0.0
    second, best = np.sort(expert)[-2:]
    return max(0.0, 1 - (best - second) / -math.log(alpha))


_SHARES = {"fixed": lambda expert, amateur, alpha: 1.0, "entropy": _entropy_share, "divergence": _divergence_share,
           "margin": _margin_share}
