"""What a request may ask for, named, typed, checked and defaulted once: :class:`Contrast`, :class:`Sampling`,
:class:`Options`; mixes of several rows stand in :mod:`colora_ms.decoding.mix`.

A new way of choosing a token is a field of :class:`Sampling` (or :class:`Contrast`) and a column of the kernels'
table: the HTTP schema, the command line, ``Generator`` and the engine read the fields here, and
:mod:`colora_ms.decoding.batch` puts them into the columns of their names.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Dict, FrozenSet, Iterable, List, Optional, Tuple, Union

import numpy as np

from colora_ms.decoding.fields import Record, option
from colora_ms.decoding.grammar import Grammar, grammar_of
from colora_ms.decoding.mix import OWN, Mix, Voice, mix_of
from colora_ms.decoding.values import is_real, is_whole, real, sequence, shown, whole
from colora_ms.errors import DecodingError, near

#: Stop strings of a request, and characters of each, at most.
MOST_STOPS, LONGEST_STOP = 16, 256

#: Most tokens with a bias of their own, and the largest bias; tokens that are listed with their log-probabilities at
#: most.
MOST_BIASES, LARGEST_BIAS, MOST_LOGPROBS = 1024, 100.0, 20

#: Options of ``Generator.generate`` that may be a list with one entry a prompt, the adapter among them.
PER_PROMPT = ("adapter", "contrast", "mix", "sampling", "max_new_tokens", "grammar")


def _forms() -> Iterable[str]:
    from colora_ms.kernels.strength import FORMS  # late: the command line's parser reads the options without MindSpore

    return FORMS


@dataclasses.dataclass(frozen=True)
class Contrast(Record):
    """How strongly the base model's own preference is subtracted; the rule stands in
    :mod:`colora_ms.decoding.contrast`.

    Attributes:
        alpha: in (0, 1]; a token stays in play if the expert gives it at least alpha times the probability of the
            expert's favourite. 1 keeps the favourite alone, so the result is greedy decoding of the expert.
        beta: >= 0; weight of the amateur. 0 leaves the expert's scores unchanged.
        adapt: "fixed", or how beta is scaled at each step: "entropy", "divergence" or "margin".
        skip_copies: no contrast inside spans that are copied from the prompt.
    """

    alpha: float = option(float, 0.1, "the expert's cut, in (0, 1]", least=0.0, most=1.0, above=True,
                          hint="0.1 is a usual value")
    beta: float = option(float, 0.5, "weight of the base model's scores, >= 0", least=0.0,
                         hint="0 switches the contrast off, 0.5 is a usual value")
    adapt: str = option(str, "fixed", "form of the contrast: fixed, entropy, divergence, margin", choices=_forms)
    skip_copies: bool = option(bool, False, "no contrast inside spans copied from the prompt")

    @property
    def mode(self) -> int:
        """The form as the number that the graph takes; see ``kernels.contrast_strength``."""
        from colora_ms.kernels.strength import FORMS, SKIP_COPIES

        return FORMS[self.adapt] + (SKIP_COPIES if self.skip_copies else 0)

    @functools.cached_property
    def mix(self) -> Mix:
        """The same as a mix of two voices: the adapter, weight 1 + beta, and the base model, weight -beta."""
        return Mix((Voice("expert", OWN), Voice("amateur", None)), "contrast", "leading", self.alpha, self.beta,
                   self.adapt, self.skip_copies, self.label)

    @property
    def label(self) -> str:
        """Short text for tables: "fixed, alpha 0.1, beta 0.5"."""
        name = f"{self.adapt}, no copies" if self.skip_copies else self.adapt
        return f"{name}, alpha {self.alpha:g}, beta {self.beta:g}"


@dataclasses.dataclass(frozen=True)
class Sampling(Record):
    """How one token is drawn from the scores that the contrast leaves.

    Attributes:
        temperature: 0 takes the best token (ties: the smallest id), whatever the others are; otherwise scores are
            divided by it.
        top_k: 0 is off, as is any number from the size of the vocabulary on; otherwise only the k best tokens stay.
        top_p: in [0, 1]; the smallest set of best tokens with at least this probability stays; 0 is the best token
            alone.
        seed: starts the request's own random numbers; the same seed gives the same tokens in any batch. The lowest 64
            bits count.
        min_p: in [0, 1]; of what top_k and top_p leave, the tokens stay that have at least min_p times the best one's
            probability (arXiv 2407.01082); 0 is off.
    """

    temperature: float = option(float, 0.0, "0 is greedy", least=0.0, hint="0 is greedy")
    top_k: int = option(int, 0, "sample from the k best tokens; 0 is off", least=0, hint="0 is off")
    top_p: float = option(float, 1.0, "sample from the best tokens of this probability", least=0.0, most=1.0,
                          hint="0 is the best token alone, 1 is off")
    seed: int = option(int, 0, "seed of the sampling", least=0)
    min_p: float = option(float, 0.0, "sample from tokens of at least this share of the best one's probability",
                          least=0.0, most=1.0, hint="0 is off")

    @classmethod
    def asked(cls, temperature: float = 0.0, seed: int = 0, **others: Any) -> Sampling:
        """The sampling that a client asks for: at temperature 0 the other options are not read, so any number will do.

        Raises:
            DecodingError: a value is no number, or is read and out of its range.
        """
        if real("temperature", temperature) != 0.0:
            return cls(temperature=temperature, seed=seed, **others)
        for name, value in others.items():
            if not is_real(value):
                raise DecodingError(f"{name}={shown(value)} is not a number")
        return cls(temperature, seed=seed)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, so that no random number is used."""
        return self.temperature == 0.0 or self.top_p == 0.0

    def uniforms(self, count: int, skip: int = 0) -> np.ndarray:
        """The request's random numbers ``skip ... skip + count`` as float32 in [0, 1); a token uses one each."""
        bits = np.random.Philox(key=int(self.seed) & (2**64 - 1))
        draws = np.random.Generator(bits).random(skip + count, dtype=np.float32)
        return draws[skip:]


def check_stop(name: str, stop: Any) -> Tuple[str, ...]:
    """The stop strings as a tuple; None is none, one may stand alone.

    Raises:
        DecodingError: they are no strings, empty, too long or too many.
    """
    strings = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(strings, (list, tuple, set, frozenset)) or len(strings) > MOST_STOPS \
            or any(not isinstance(s, str) or not 0 < len(s) <= LONGEST_STOP for s in strings):
        raise DecodingError(f"{name}={shown(stop, 200)}: at most {MOST_STOPS} stop strings of 1 to {LONGEST_STOP} "
                            "characters")
    return tuple(strings)


def check_stop_ids(name: str, ids: Any, vocabulary: Optional[int] = None) -> Tuple[int, ...]:
    """The stop ids as a tuple of ints; None is none, one id may stand alone.

    Args:
        vocabulary: the model's size of it; None: not known.

    Raises:
        DecodingError: they are no ids of the vocabulary.
    """
    found = () if ids is None else (ids,) if is_whole(ids) else sequence(ids)
    if found is None:
        raise DecodingError(f"{name}={shown(ids)} is not a list of token ids")
    for one in found:
        if not is_whole(one) or one < 0 or vocabulary is not None and one >= vocabulary:
            size = "" if vocabulary is None else f" of the vocabulary, 0..{vocabulary - 1}"
            raise DecodingError(f"{name} holds {shown(one)}, which is no token id{size}")
    return tuple(dict.fromkeys(int(one) for one in found))


def _texts(name: str, value: Any) -> Tuple[str, ...]:
    found = sequence(value)
    if found is None or any(not isinstance(one, str) for one in found):
        raise DecodingError(f"{name}={shown(value)} is not a list of special tokens' texts")
    return tuple(found)


def _seconds(name: str, timeout: Any) -> Optional[float]:
    if timeout is None:
        return None
    try:
        seconds = float(timeout) if is_real(timeout) else 0.0
    except OverflowError:
        seconds = math.inf
    if not 0.0 < seconds < math.inf:
        raise DecodingError(f"{name}={shown(timeout)} is not a number of seconds > 0")
    return seconds


def _contrast(name: str, value: Any) -> Optional[Contrast]:
    if value is not None and not isinstance(value, Contrast):
        raise DecodingError(f"{name}={shown(value)} is not a Contrast({', '.join(Contrast.known())})")
    return value


def _sampling(name: str, value: Any) -> Sampling:
    if value is not None and not isinstance(value, Sampling):
        raise DecodingError(f"{name}={shown(value)} is not a Sampling({', '.join(Sampling.known())})")
    return Sampling() if value is None else value


def _mix(name: str, value: Any) -> Optional[Mix]:
    if isinstance(value, Contrast):
        return value.mix
    return None if value is None else mix_of(value, name)


def check_bias(name: str, value: Any) -> Tuple[Tuple[int, float], ...]:
    """{token id: bias} as ascending pairs; None is none. Ids may be strings of digits, as JSON has them.

    Raises:
        DecodingError: it is no such mapping, or too large.
    """
    pairs = [] if value is None else list(value.items()) if isinstance(value, dict) else sequence(value)
    if pairs is None or any(len(sequence(one) or ()) != 2 for one in pairs):
        raise DecodingError(f"{name}={shown(value)} is not a mapping of token ids to numbers")
    found: Dict[int, float] = {}
    for token, bias in pairs:
        number = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        if not is_whole(number) or number < 0:
            raise DecodingError(f"{name} holds {shown(token)}, which is no token id")
        found[int(number)] = real(f"{name}[{number}]", bias)
        if abs(found[int(number)]) > LARGEST_BIAS:
            raise DecodingError(f"{name}[{number}]={shown(bias)} is outside [-{LARGEST_BIAS:g}, {LARGEST_BIAS:g}]")
    if len(found) > MOST_BIASES:
        raise DecodingError(f"{name} has {len(found)} tokens, at most {MOST_BIASES} may have a bias")
    return tuple(sorted(found.items()))


def _logprobs(name: str, value: Any) -> Optional[int]:
    if value is None:
        return None
    if not is_whole(value) or not 0 <= value <= MOST_LOGPROBS:
        raise DecodingError(f"{name}={shown(value)} is not a whole number of 0 to {MOST_LOGPROBS}; None: no "
                            "log-probabilities")
    return int(value)


def _grammar(name: str, value: Any) -> Optional[Grammar]:
    return None if value is None else grammar_of(value, name)


def _seed(name: str, value: Any) -> Optional[int]:
    return None if value is None else whole(name, value, 0)


def _priority(name: str, value: Any) -> int:
    if not is_whole(value):
        raise DecodingError(f"{name}={shown(value)} is not a whole number; larger ones go first, 0 is usual")
    return int(value)


def _salt(name: str, value: Any) -> Optional[str]:
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= LONGEST_STOP):
        raise DecodingError(f"{name}={shown(value)} is not a text of 1 to {LONGEST_STOP} characters")
    return value


@dataclasses.dataclass(frozen=True)
class Options(Record):
    """The options of one request, beside its prompt and its adapter: keyword arguments of ``Generator.generate`` and
    ``Engine.submit``.

    Attributes:
        contrast: :class:`Contrast`, or None: the expert alone.
        sampling: :class:`Sampling`; None is greedy.
        max_new_tokens: tokens that the answer may have, at least 1; cut to the room behind the prompt.
        stop: strings that end the answer, which is cut before them; one that spells a special token ends it at that
            token.
        stop_token_ids: ids that end it, beside the end of sequence.
        seed: in place of the sampling's own.
        records: whether a :class:`colora_ms.decoding.TokenRecord` is kept for each token.
        ignore_eos: go on behind an end-of-sequence token (for benchmarks).
        show_special: special tokens whose text is shown in the answer, such as "<tool_call>"; the others' is not.
        priority: larger ones leave the engine's queue first.
        timeout: seconds from submission on after which the engine ends the request; None: no limit.
        cache_salt: what stands in the cache of this request is found by requests of the same salt alone, so that nobody
            else can tell by the time of an answer what was asked before; None: by all that have none.
        mix: :class:`colora_ms.decoding.mix.Mix` or a mapping of one (:func:`colora_ms.decoding.mix.mix_of`), in the
            place of a contrast.
        adapter_scale: factor on the scale of the request's adapter, in its voices too.
        presence_penalty, frequency_penalty: taken off the logits of tokens that the answer has, once and for each time
            (OpenAI's definitions).
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens that prompt or answer have
            (transformers' definition); 1 is off.
        logit_bias: {token id: number of -100 to 100} added to logits; kept as ascending pairs.
        min_tokens: tokens before the first one that may end the answer.
        logprobs: None, or how many of the best tokens (0 to 20) are listed with their log-probabilities at each token,
            beside the chosen one's.
        grammar: :class:`colora_ms.decoding.grammar.Grammar` that the answer keeps to, or None.
    """

    contrast: Optional[Contrast] = option(Contrast, None, "contrast of the adapter with the base model",
                                          check=_contrast)
    sampling: Sampling = option(Sampling, None, "how a token is drawn", check=_sampling)
    max_new_tokens: int = option(int, 64, "longest answer", least=1)
    stop: Tuple[str, ...] = option(Union[str, List[str]], (), "end the answer before this text", check=check_stop)
    stop_token_ids: Tuple[int, ...] = option(List[int], (), "end the answer at this token, too", check=check_stop_ids)
    seed: Optional[int] = option(int, None, "in place of the sampling's own seed", check=_seed)
    records: bool = option(bool, False, "list what the contrast did at each token")
    ignore_eos: bool = option(bool, False, "go on behind an end-of-sequence token")
    show_special: Tuple[str, ...] = option(List[str], (), "special tokens whose text is shown", check=_texts)
    priority: int = option(int, 0, "larger ones leave the queue first", check=_priority, engine=True)
    timeout: Optional[float] = option(float, None, "seconds after which the request ends", check=_seconds, engine=True)
    cache_salt: Optional[str] = option(str, None, "shares cached prefixes with requests of the same salt alone",
                                       check=_salt, engine=True)
    mix: Optional[Mix] = option(Dict[str, Any], None, "several voices in the place of a contrast", check=_mix)
    adapter_scale: float = option(float, 1.0, "factor on the adapter's scale", least=-1e3, most=1e3)
    presence_penalty: float = option(float, 0.0, "taken off the logits of tokens that the answer has", least=-2.0,
                                     most=2.0)
    frequency_penalty: float = option(float, 0.0, "the same, for each time that it has them", least=-2.0, most=2.0)
    repetition_penalty: float = option(float, 1.0, "shrinks the logits of tokens of prompt and answer; 1 is off",
                                       least=0.0, most=100.0, above=True, hint="1 is off, 1.1 is a usual value")
    logit_bias: Tuple[Tuple[int, float], ...] = option(Dict[str, float], (), "numbers added to the logits of tokens",
                                                       check=check_bias)
    min_tokens: int = option(int, 0, "tokens before the first one that may end the answer", least=0)
    logprobs: Optional[int] = option(int, None, "list log-probabilities, and those of so many of the best tokens",
                                     check=_logprobs)
    grammar: Optional[Grammar] = option(Dict[str, Any], None, "what the answer keeps to: a JSON schema, a regex",
                                        check=_grammar)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None:
            object.__setattr__(self, "sampling", dataclasses.replace(self.sampling, seed=self.seed))
        if self.contrast is not None and self.mix is not None:
            raise DecodingError("contrast and mix are both given; a contrast is a mix of two voices, so give one of "
                                "them")
        if self.min_tokens > self.max_new_tokens:
            raise DecodingError(f"min_tokens={self.min_tokens} is more than max_new_tokens={self.max_new_tokens}")

    @functools.cached_property
    def mixture(self) -> Optional[Mix]:
        """The mix, that of a contrast too; None: one row."""
        return self.mix if self.contrast is None else self.contrast.mix

    @property
    def rows_wanted(self) -> bool:
        """Whether records tell the log-probability of the chosen token in each row of a mix."""
        return self.records and self.mix is not None and self.mix.by != "contrast"

    @property
    def penalised(self) -> bool:
        """Whether tokens are counted for penalties."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    @classmethod
    def asked(cls, engine: bool = True, **wanted: Any) -> Options:
        """The options of these keyword arguments.

        Args:
            engine: whether they are for the serving engine, which takes some more.

        Raises:
            DecodingError: an unknown option, or a value that cannot be used.
        """
        known = [name for name, one in cls.known().items() if engine or not one.engine]
        for name in wanted:
            if name not in known:
                only = "; only the serving engine has it" if name in cls.known() else ""
                raise DecodingError(f"there is no option {name!r} here{only}; there are {', '.join(known)}."
                                    f"{near(name, known)}")
        return cls(**wanted)

    def fitting(self, vocabulary: int, room: int) -> Options:
        """The options for a model: at most ``room`` tokens of answer.

        Raises:
            DecodingError: a stop id, or a token with a bias, is outside the vocabulary.
        """
        check_stop_ids("stop_token_ids", self.stop_token_ids, vocabulary)
        check_stop_ids("logit_bias", [token for token, _ in self.logit_bias], vocabulary)
        most = min(self.max_new_tokens, room)
        return dataclasses.replace(self, max_new_tokens=most, min_tokens=min(self.min_tokens, most))

    def ends(self, eos: Iterable[int]) -> FrozenSet[int]:
        """The ids that end the answer; ``eos``: those of the model."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos))
