"""Contrastive LoRA Decoding (CoLD, arXiv 2505.14620): the options of a request and the rule in NumPy.

The expert is base + adapter, the amateur is the base. With their logits e and a (papers' equation for s^CD)::

    valid = { i : e_i >= log(alpha) + max e }
    s_i   = (1 + beta) * e_i - beta * a_i     for i in valid
          = -inf                              elsewhere

The graph computes this with :func:`colora_ms.kernels.contrastive_select`; the functions here are its readable twin,
used by the naive baseline and the tests.
"""

import dataclasses
import math
import numbers

import numpy as np

from colora_ms.errors import DecodingError


def _finite(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise DecodingError(f"{name}={value!r} is not a finite number")
    return float(value)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How strongly the base model's own preference is subtracted.

    Attributes:
        alpha: in (0, 1]; a token stays in play if the expert gives it at least alpha times the probability of the
            expert's favourite. 1 keeps the favourite alone, so the result is greedy decoding of the expert.
        beta: >= 0; weight of the amateur. 0 leaves the expert's scores unchanged.
    """

    alpha: float = 0.1
    beta: float = 0.5

    def __post_init__(self):
        if not 0.0 < _finite("alpha", self.alpha) <= 1.0:
            raise DecodingError(f"alpha={self.alpha!r} is outside (0, 1]; 0.1 is a usual value")
        if _finite("beta", self.beta) < 0.0:
            raise DecodingError(f"beta={self.beta!r} is negative; 0 switches the contrast off, 0.5 is a usual value")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one token is drawn from the scores that the contrast leaves.

    Attributes:
        temperature: 0 takes the best token (ties: the smallest id); otherwise scores are divided by it.
        top_k: 0 is off; otherwise only the k best tokens stay.
        top_p: in (0, 1]; the smallest set of best tokens with at least this probability stays.
        seed: starts the request's own random numbers; the same seed gives the same tokens in any batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if _finite("temperature", self.temperature) < 0.0:
            raise DecodingError(f"temperature={self.temperature!r} is negative; 0 is greedy")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, numbers.Integral) or self.top_k < 0:
            raise DecodingError(f"top_k={self.top_k!r} is not a whole number >= 0 (0 is off)")
        if not 0.0 < _finite("top_p", self.top_p) <= 1.0:
            raise DecodingError(f"top_p={self.top_p!r} is outside (0, 1]")
        if isinstance(self.seed, bool) or not isinstance(self.seed, numbers.Integral) or self.seed < 0:
            raise DecodingError(f"seed={self.seed!r} is not a whole number >= 0")

    def uniforms(self, count, skip=0):
        """The request's random numbers ``skip ... skip + count`` as float32 in [0, 1); a token uses one each."""
        bits = np.random.Philox(key=int(self.seed) & (2**64 - 1))
        draws = np.random.Generator(bits).random(skip + count, dtype=np.float32)
        return draws[skip:]


def contrastive_scores(expert, amateur, alpha, beta):
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
