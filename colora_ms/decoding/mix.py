"""Mixes: requests of several rows, whose distributions become one.

A :class:`Mix` says which voices a request has (an adapter or none, its strength, a weight, perhaps a prompt of its own)
and how they are combined; ``kernels.contrastive_select`` has the arithmetic, README.md the order of all steps. The
usual ones have names:

* :func:`Ensemble`: adapters that answer together, by the mean of log-probabilities or of probabilities;
* :func:`Guide`: the base model, steered by the difference of an expert and an anti-expert (DExperts, arXiv 2105.03023);
* :func:`Context`: what a document in the prompt adds, amplified (context-aware decoding, arXiv 2305.14739);
* :func:`Negative`: away from what a negative prompt asks for (classifier-free guidance, arXiv 2306.17806).

:class:`colora_ms.decoding.options.Contrast` is the mix of the adapter, weight 1 + beta, and the base model, weight
-beta.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

from colora_ms.decoding.fields import Record, option
from colora_ms.decoding.values import real, sequence, shown
from colora_ms.errors import DecodingError, near

#: Voices of a mix at most; ``kernels.options.MOST_ROWS`` is the same.
MOST_VOICES = 8

#: In the place of a voice's adapter: the one that the request asks for.
OWN = ""

MIXINGS = ("contrast", "log", "probability")
CUTS = ("none", "leading", "mixture")


def _forms() -> Iterable[str]:
    from colora_ms.kernels.strength import FORMS  # late: the command line's parser reads the options without MindSpore

    return FORMS


def _adapter(name: str, value: Any) -> Optional[str]:
    if value is not None and not isinstance(value, str):
        raise DecodingError(f"{name}={shown(value)} is not an adapter's name; None is the base model, \"\" the "
                            "request's")
    return value


def _prompt(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    parts = sequence(value)
    if parts is None:
        raise DecodingError(f"{name}={shown(value)} is no prompt: expected a string, token ids or chat messages")
    return parts


@dataclasses.dataclass(frozen=True)
class Voice(Record):
    """One row of a mix.

    Attributes:
        role: what it is called in records.
        adapter: an adapter's name, None: the base model, "": the adapter that the request asks for.
        weight: of its log-probabilities (or probabilities) in the mixture; a contrast has its own.
        scale: factor on the adapter's scale.
        prompt: a string, token ids or chat messages in the place of the request's prompt; None: the request's.
    """

    role: str = option(str, "voice", "what the row is called in records")
    adapter: Optional[str] = option(str, OWN, "adapter; null is the base model, \"\" the request's", check=_adapter)
    weight: float = option(float, 1.0, "weight in the mixture")
    scale: float = option(float, 1.0, "factor on the adapter's scale", least=-1e3, most=1e3)
    prompt: Any = option(Any, None, "prompt in the place of the request's", check=_prompt)


def _voices(name: str, value: Any) -> Tuple[Voice, ...]:
    found = sequence(value)
    if found is None or not 0 < len(found) <= MOST_VOICES or not all(isinstance(one, Voice) for one in found):
        raise DecodingError(f"{name}={shown(value, 200)}: expected 1 to {MOST_VOICES} voices, "
                            f"Voice({', '.join(Voice.known())})")
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Mix(Record):
    """Voices and how they become one distribution.

    Attributes:
        voices: :class:`Voice`, 1 to 8, the leading one first.
        by: "log": the sum of weight * log p; "probability": the weighted mean of p; "contrast": two voices with the
            weights 1 + beta and -beta, whose beta may adapt.
        within: whose best token's probability, times alpha, a token needs: "leading" (the first voice's), "mixture", or
            "none".
        alpha: in (0, 1], see ``within``.
        beta, adapt, skip_copies: of a contrast, as in :class:`colora_ms.decoding.options.Contrast`.
        title: short text for tables.
    """

    voices: Tuple[Voice, ...] = option(List[Any], (), "the rows, the leading one first", check=_voices)
    by: str = option(str, "log", "how they are combined: log, probability, contrast", choices=lambda: MIXINGS)
    within: str = option(str, "none", "whose best token the cut compares with: none, leading, mixture",
                         choices=lambda: CUTS)
    alpha: float = option(float, 1.0, "the cut, in (0, 1]", least=0.0, most=1.0, above=True,
                          hint="0.1 is a usual value")
    beta: float = option(float, 0.0, "strength of a contrast, >= 0", least=0.0)
    adapt: str = option(str, "fixed", "form of a contrast", choices=_forms)
    skip_copies: bool = option(bool, False, "no contrast inside spans copied from the prompt")
    title: str = option(str, "mix", "short text for tables")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "contrast":
            if len(self.voices) != 2 or self.within != "leading":
                raise DecodingError(f"a contrast has two voices, the first of which leads; this one has "
                                    f"{len(self.voices)} and within={self.within!r}")
        elif self.adapt != "fixed" or self.skip_copies or self.beta:
            raise DecodingError("beta, adapt and skip_copies belong to a contrast; say by=\"contrast\", or leave them "
                                "out")
        else:
            weights = [voice.weight for voice in self.voices]
            if not any(weights) or self.by == "probability" and min(weights) < 0:
                least = ", none of them negative," if self.by == "probability" else ""
                raise DecodingError(f"weights {weights}: expected numbers{least} that are not all 0")

    @property
    def mode(self) -> int:
        """The contrast's form as the number that the graph takes."""
        from colora_ms.kernels.strength import FORMS, SKIP_COPIES

        return FORMS[self.adapt] + (SKIP_COPIES if self.skip_copies else 0)

    @property
    def mixing(self) -> int:
        """``by`` as the number that the graph takes, see ``kernels.options.MIXINGS``."""
        return MIXINGS.index(self.by)

    @property
    def cut(self) -> int:
        """``within`` as the number that the graph takes, see ``kernels.options.CUTS``."""
        return CUTS.index(self.within)

    @property
    def label(self) -> str:
        """Short text for tables, such as "ensemble of a, b"."""
        return self.title

    @property
    def needs_adapter(self) -> bool:
        """Whether a voice has the adapter that the request asks for."""
        return any(voice.adapter == OWN for voice in self.voices)


def Ensemble(adapters: Sequence[Optional[str]], weights: Optional[Sequence[float]] = None, mean: str = "log",
             alpha: Optional[float] = None, scales: Optional[Sequence[float]] = None) -> Mix:
    """Adapters that answer together.

    Args:
        adapters: their names, None for the base model.
        weights: of each; None: equal ones. They are divided by their sum.
        mean: "log": of log-probabilities (a token needs everybody's consent); "prob": of probabilities.
        alpha: None, or the share of the best token's probability in the mixture that a token needs.
        scales: factors on the adapters' scales; None: 1.

    Raises:
        DecodingError: an argument cannot be used.
    """
    names = sequence(adapters)
    if not names:
        raise DecodingError(f"adapters={shown(adapters)}: an ensemble needs a list of adapter names")
    if mean not in ("log", "prob", "probability"):
        raise DecodingError(f"mean={shown(mean)} is none of log, prob")
    shares = _numbers("weights", weights, len(names))
    if min(shares) < 0 or sum(shares) <= 0:
        raise DecodingError(f"weights={shown(weights)}: an ensemble needs numbers >= 0, one of them above 0")
    total = sum(shares)
    voices = [Voice(_called(name), name, share / total, scale)
              for name, share, scale in zip(names, shares, _numbers("scales", scales, len(names)))]
    return Mix(tuple(voices), "log" if mean == "log" else "probability", "none" if alpha is None else "mixture",
               1.0 if alpha is None else alpha, title=f"ensemble of {', '.join(map(_called, names))} ({mean})")


def Guide(expert: Optional[str], anti: Optional[str], gamma: float = 1.0, alpha: Optional[float] = 0.1) -> Mix:
    """The base model, steered: base + gamma * (expert - anti) (DExperts, arXiv 2105.03023).

    Args:
        expert, anti: names of adapters, None for the base model.
        gamma: strength; the paper's alpha.
        alpha: share of the base model's best token's probability that a token needs; None: all tokens stay. (The paper
            keeps the base model's nucleus.)

    Raises:
        DecodingError: an argument cannot be used.
    """
    strength = real("gamma", gamma)
    voices = Voice("base", None, 1.0), Voice("expert", expert, strength), Voice("anti", anti, -strength)
    return Mix(voices, "log", *_leading(alpha),
               title=f"guided by {_called(expert)} against {_called(anti)}, gamma {strength:g}")


def Context(alpha: float = 0.1, beta: float = 0.5, without: Any = None, adapt: str = "fixed") -> Mix:
    """What a document in the prompt adds to the answer, amplified: (1 + beta) * with - beta * without (context-aware
    decoding, arXiv 2305.14739).

    Args:
        alpha: in (0, 1], share of the best token's probability (with the document) that a token needs.
        beta: >= 0; the paper's alpha.
        without: the prompt without the document: a string, token ids or chat messages.
        adapt: as of a contrast; "divergence" scales beta by how much the document changes (AdaCAD, arXiv 2409.07394).

    Raises:
        DecodingError: an argument cannot be used.
    """
    if without is None:
        raise DecodingError("Context needs without=…, the prompt without the document")
    voices = Voice("with", OWN), Voice("without", OWN, prompt=without)
    mix = Mix(voices, "contrast", "leading", alpha, beta, adapt)
    return dataclasses.replace(mix, title=f"context, {mix.adapt}, alpha {mix.alpha:g}, beta {mix.beta:g}")


def Negative(prompt: Any, gamma: float = 1.5, alpha: Optional[float] = None) -> Mix:
    """Guidance away from a negative prompt: uncond + gamma * (cond - uncond) (arXiv 2306.17806).

    Args:
        prompt: what the answer is to be led away from: a string, token ids or chat messages.
        gamma: 1 changes nothing, 1.5 is a usual value.
        alpha: None, or the share of the best token's probability (of the request's prompt) that a token needs.

    Raises:
        DecodingError: an argument cannot be used.
    """
    if prompt is None:
        raise DecodingError("Negative needs a prompt to lead away from")
    strength = real("gamma", gamma)
    voices = Voice("prompt", OWN, strength), Voice("negative", OWN, 1.0 - strength, prompt=prompt)
    return Mix(voices, "log", *_leading(alpha), title=f"negative prompt, gamma {strength:g}")


#: The named mixes; :func:`mix_of` takes their arguments under these names.
NAMED = {"ensemble": Ensemble, "guide": Guide, "context": Context, "negative": Negative}


def mix_of(value: Any, name: str = "mix") -> Mix:
    """The mix of a mapping, as JSON and YAML have it.

    Either ``{"ensemble": {"adapters": ["a", "b"], "mean": "prob"}}`` with one of :data:`NAMED` and its arguments, or
    the attributes of :class:`Mix`, its voices as mappings of the attributes of :class:`Voice`.

    Raises:
        DecodingError: something in it cannot be used; says what.
    """
    if isinstance(value, Mix):
        return value
    if not isinstance(value, dict) or not value:
        raise DecodingError(f"{name}={shown(value)}: expected a mapping, such as "
                            "{\"ensemble\": {\"adapters\": [\"a\", \"b\"]}}")
    if len(value) == 1 and next(iter(value)) in NAMED:
        kind, arguments = next(iter(value.items()))
        if not isinstance(arguments, dict):
            raise DecodingError(f"{name}.{kind}={shown(arguments)}: expected a mapping of its arguments")
        return _called_with(NAMED[kind], arguments, f"{name}.{kind}")
    known = [*NAMED, *Mix.known()]
    for key in value:
        if key not in Mix.known():
            hint = near(key, known) if isinstance(key, str) else ""
            raise DecodingError(f"{name} has {shown(key)}; a mix has one of {', '.join(NAMED)} alone, or "
                                f"{', '.join(Mix.known())}.{hint}")
    voices = sequence(value.get("voices"))
    if not voices or not all(isinstance(one, dict) for one in voices):
        raise DecodingError(f"{name}.voices={shown(value.get('voices'))}: expected a list of mappings of "
                            f"{', '.join(Voice.known())}")
    made = tuple(_called_with(Voice, one, f"{name}.voices[{i}]") for i, one in enumerate(voices))
    return Mix(**{**value, "voices": made})


def as_mapping(mix: Mix) -> Dict[str, Any]:
    """What :func:`mix_of` makes the mix of again."""
    voices = [{name: getattr(voice, name) for name in Voice.known()} for voice in mix.voices]
    return {**{name: getattr(mix, name) for name in Mix.known()}, "voices": voices}


def _called_with(make: Any, arguments: Dict[str, Any], where: str) -> Any:
    import inspect

    known = list(inspect.signature(make).parameters)
    for key in arguments:
        if key not in known:
            raise DecodingError(f"{where} has {shown(key)}; there are {', '.join(known)}."
                                f"{near(key, known) if isinstance(key, str) else ''}")
    missing = [name for name, one in inspect.signature(make).parameters.items()
               if one.default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise DecodingError(f"{where} lacks {', '.join(missing)}")
    return make(**arguments)


def _called(adapter: Optional[str]) -> str:
    return "base" if adapter is None else adapter or "adapter"


def _numbers(name: str, values: Any, count: int) -> List[float]:
    if values is None:
        return [1.0] * count
    found = sequence(values)
    if found is None or len(found) != count:
        raise DecodingError(f"{name}={shown(values)}: expected {count} numbers, one for each adapter")
    return [real(name, one) for one in found]


def _leading(alpha: Optional[float]) -> Tuple[str, float]:
    return ("none", 1.0) if alpha is None else ("leading", alpha)
