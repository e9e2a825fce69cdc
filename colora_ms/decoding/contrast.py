"""Contrastive LoRA Decoding (CoLD, arXiv 2505.14620): the options of a request and the rule in NumPy.

The expert is base + adapter, the amateur is the base. With their logits e and a (papers' equation for s^CD)::

    valid = { i : e_i >= log(alpha) + max e }
    s_i   = (1 + beta) * e_i - beta * a_i     for i in valid
          = -inf                              elsewhere

An *adaptive* contrast puts beta_t = beta * share_t in the place of beta, with share_t in [0, 1] from the logits of step t.
With V the valid tokens, e1 >= e2 the expert's two highest logits, H the entropy in nats and JS the Jensen-Shannon
divergence::

    fixed        1                                          the paper's rule
    entropy      H(softmax of e over V) / ln |V|            contrast where the expert is undecided
    divergence   JS(softmax e, softmax a) / ln 2            contrast where the adapter changed the distribution (the
                                                            weight of AdaCAD, arXiv 2409.07394)
    margin       max(0, 1 - (e1 - e2) / -log(alpha))        contrast near a tie, fading out towards the cut

and with ``skip_copies`` the share is 0 where the expert's favourite goes on with a span of the prompt x: where
x_j = (the token generated last) and x_{j+1} = argmax e for some j. Numbers and names that an answer copies are so left
alone from their second token on.

The graph computes this with :func:`colora_ms.kernels.contrast_strength` and
:func:`colora_ms.kernels.contrastive_select`; the functions here are their readable twins, used by the naive baseline and
the tests.
"""

import dataclasses
import math

import numpy as np

from colora_ms.decoding.values import flag, is_real, real, shown, whole
from colora_ms.errors import DecodingError, near
from colora_ms.kernels.options import OptionRows
from colora_ms.kernels.strength import FORMS, SKIP_COPIES


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How strongly the base model's own preference is subtracted.

    Attributes:
        alpha: in (0, 1]; a token stays in play if the expert gives it at least alpha times the probability of the
            expert's favourite. 1 keeps the favourite alone, so the result is greedy decoding of the expert.
        beta: >= 0; weight of the amateur. 0 leaves the expert's scores unchanged.
        adapt: "fixed", or how beta is scaled at each step: "entropy", "divergence" or "margin"; see the head of this
            module.
        skip_copies: no contrast inside spans that are copied from the prompt.
    """

    alpha: float = 0.1
    beta: float = 0.5
    adapt: str = "fixed"
    skip_copies: bool = False

    def __post_init__(self):
        alpha, beta = real("alpha", self.alpha), real("beta", self.beta)
        if not 0.0 < alpha <= 1.0:
            rounds = "rounds to 0 in float32, which is" if alpha == 0 and self.alpha > 0 else "is"
            raise DecodingError(f"alpha={shown(self.alpha)} {rounds} outside (0, 1]; 0.1 is a usual value")
        if beta < 0.0:
            raise DecodingError(f"beta={shown(self.beta)} is negative; 0 switches the contrast off, 0.5 is a usual value")
        if not isinstance(self.adapt, str) or self.adapt not in FORMS:
            raise DecodingError(f"adapt={shown(self.adapt)} is no form of the contrast; there are {', '.join(FORMS)}."
                                f"{near(self.adapt, FORMS) if isinstance(self.adapt, str) else ''}")
        _store(self, alpha=alpha, beta=beta, skip_copies=flag("skip_copies", self.skip_copies))

    @property
    def mode(self):
        """The form as the number that the graph takes; see ``kernels.contrast_strength``."""
        return FORMS[self.adapt] + (SKIP_COPIES if self.skip_copies else 0)

    @property
    def label(self):
        """Short text for tables: "fixed, alpha 0.1, beta 0.5"."""
        name = f"{self.adapt}, no copies" if self.skip_copies else self.adapt
        return f"{name}, alpha {self.alpha:g}, beta {self.beta:g}"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one token is drawn from the scores that the contrast leaves.

    Attributes:
        temperature: 0 takes the best token (ties: the smallest id), whatever top_k and top_p are; otherwise scores are
            divided by it.
        top_k: 0 is off, as is any number from the size of the vocabulary on; otherwise only the k best tokens stay.
        top_p: in [0, 1]; the smallest set of best tokens with at least this probability stays; 0 is the best token alone.
        seed: starts the request's own random numbers; the same seed gives the same tokens in any batch. The lowest 64 bits
            count.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        temperature = real("temperature", self.temperature)
        if temperature < 0.0:
            raise DecodingError(f"temperature={shown(self.temperature)} is negative; 0 is greedy")
        top_k = whole("top_k", self.top_k, 0, " (0 is off)")
        top_p = real("top_p", self.top_p)
        if not 0.0 <= top_p <= 1.0:
            raise DecodingError(f"top_p={shown(self.top_p)} is outside [0, 1]; 0 is the best token alone, 1 is off")
        _store(self, temperature=temperature, top_k=top_k, top_p=top_p, seed=whole("seed", self.seed, 0))

    @classmethod
    def asked(cls, temperature=0.0, top_k=0, top_p=1.0, seed=0):
        """The sampling that a client asks for: at temperature 0 top_k and top_p are not read, so any number will do.

        Raises:
            DecodingError: a value is no number, or is read and out of its range.
        """
        if real("temperature", temperature) != 0.0:
            return cls(temperature, top_k, top_p, seed)
        for name, value in (("top_k", top_k), ("top_p", top_p)):
            if not is_real(value):
                raise DecodingError(f"{name}={shown(value)} is not a number")
        return cls(temperature, seed=seed)

    @property
    def greedy(self):
        """Whether the best token is taken, so that no random number is used."""
        return self.temperature == 0.0 or self.top_p == 0.0

    def uniforms(self, count, skip=0):
        """The request's random numbers ``skip ... skip + count`` as float32 in [0, 1); a token uses one each."""
        bits = np.random.Philox(key=int(self.seed) & (2**64 - 1))
        draws = np.random.Generator(bits).random(skip + count, dtype=np.float32)
        return draws[skip:]


def _store(record, **values):
    """Put checked values into a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def operands(requests, size):
    """The options of a batch's requests as the graph takes them.

    Args:
        requests: (:class:`Contrast` or None, :class:`Sampling`) of each request.
        size: places of the batch; those that are left get a greedy request without a contrast.

    Returns:
        :class:`colora_ms.kernels.options.OptionRows`, in which the places of the requests (rows, budget) are still open.
    """
    rows = OptionRows(size)
    for row, (contrast, sampling) in enumerate(requests):
        if contrast is not None:
            rows.take(row, "contrast", contrast)
        if not sampling.greedy:
            rows.take(row, "sampling", sampling)
    return rows


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


def contrast_strength(expert, amateur, contrast, previous=-1, prompt=()):
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


def _softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _entropy_share(expert, amateur, alpha):
    valid = expert[expert >= math.log(alpha) + expert.max()]
    return _entropy(_softmax(valid)) / math.log(len(valid)) if len(valid) > 1 else 0.0


def _divergence_share(expert, amateur, alpha):
    p, q = _softmax(expert), _softmax(amateur)
    return (_entropy(0.5 * (p + q)) - 0.5 * _entropy(p) - 0.5 * _entropy(q)) / math.log(2)


def _margin_share(expert, amateur, alpha):
    if alpha == 1 or len(expert) < 2:
        return 0.0
    second, best = np.sort(expert)[-2:]
    return max(0.0, 1 - (best - second) / -math.log(alpha))


_SHARES = {"fixed": lambda expert, amateur, alpha: 1.0, "entropy": _entropy_share, "divergence": _divergence_share,
           "margin": _margin_share}
