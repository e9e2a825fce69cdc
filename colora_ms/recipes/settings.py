"""The section ``evaluate`` of a recipe: what is measured after the training.

    evaluate:
      data: {kind: reasoning_gym, task: chain_sum, size: 200, seed: 10100000}      # data.held_out if left out
      decoders: [base, greedy, {alpha: 0.1, beta: [0.25, 0.5]}]
      max_new_tokens: 16

``decoders`` are ``base`` (the model without its adapter), ``greedy`` (with it) and contrasts (CoLD), whose settings may
be
lists: all combinations are decoded.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.errors import ConfigError, DecodingError, near
from colora_ms.training.settings import Section, at_least, build, one_of, override, read_yaml, setting, short

if TYPE_CHECKING:
    from typing import TypeGuard

    from colora_ms.decoding import Contrast
    from colora_ms.training.config import TrainingConfig
    from colora_ms.training.quantize import QuantizationConfig

#: Decoders that have a name; a contrast is given by its settings.
NAMED = ("base", "greedy")

#: Tasks, and which of them decode, so that a contrast means something.
TASKS = ("problems", "choice", "perplexity")

#: What --fast leaves of a recipe: updates, and items (characters of a text).
FAST_STEPS, FAST_ITEMS, FAST_CHARACTERS = 30, 40, 8000


def _default_decoders() -> list:
    return ["base", "greedy", {"alpha": 0.1, "beta": 0.5}]


@dataclasses.dataclass
class EvaluationSettings(Section):
    """What to measure, on what, with which decoders (section ``evaluate``).

    Raises:
        ConfigError: unknown names (with a suggestion), wrong types, impossible values.
    """

    _title = "section evaluate"

    task: str = setting("problems", "problems: generate answers and score them; choice: multiple choice by "
                        "log-likelihood (the commonsense sets' JSON layout); perplexity: of a text.", *one_of(*TASKS))
    data: object = setting(None, "Problems in the form of data.train, or the path of the choice or text file; "
                           "data.held_out if left out.")
    items: int | None = setting(None, "Only the first items (perplexity: characters); null: all.", *at_least(1))
    decoders: list = setting(None, "base, greedy, and contrasts such as {alpha: 0.1, beta: [0.25, 0.5]}.",
                             lambda value: bool(value), "at least one decoder", factory=_default_decoders)
    scorer: str = setting("number", "How an answer is scored.", *one_of("number", "exact", "normalised"))
    template: str | None = setting(None, "Prompt template; data.template if left out.")
    max_new_tokens: int = setting(128, "Longest answer in tokens.", *at_least(1))
    stop: list = setting(None, "Texts that end an answer.", lambda value: all(isinstance(t, str) and t for t in value),
                         "a list of texts", factory=list)
    rows: int = setting(16, "Rows of a batch; a contrast takes two for each answer.", *at_least(2))
    form: str = setting("text", "choice: rank the answers' texts, or the labels that an adapter was trained to write.",
                        *one_of("text", "label"))
    normalise: str = setting("token", "choice: divide the log-likelihood by this length.",
                             *one_of("none", "token", "byte"))
    window: int = setting(512, "perplexity: tokens of a window.", *at_least(2))
    stride: int | None = setting(None, "perplexity: tokens between windows; null: half a window.", *at_least(1))

    def _relations(self) -> list[str]:
        try:
            contrasts = [one for one in expand(self.decoders) if not isinstance(one, str)]
        except (ConfigError, DecodingError) as error:
            return [str(error)]
        if contrasts and self.task != "problems":
            return [f"the contrast {contrasts[0].label} needs task problems; {self.task} has the decoders base and "
                    "greedy"]
        if self.task == "perplexity" and self.stride is not None and self.stride >= self.window:
            return [f"stride is {self.stride}, expected less than the window of {self.window} tokens"]
        return []


def expand(decoders: Sequence[Any]) -> list[str | Contrast]:
    """The section's decoders as "base", "greedy" and :class:`Contrast`, lists of alpha and beta multiplied out.

    Raises:
        ConfigError: an unknown decoder or setting, or one given twice. DecodingError: alpha or beta out of its range.
    """
    from colora_ms.decoding import Contrast

    known = [field.name for field in dataclasses.fields(Contrast)]
    found: list[str | Contrast] = []
    for one in decoders:
        if isinstance(one, str) and one in NAMED:
            found.append(one)
        elif isinstance(one, dict) and one:
            for name in one:
                if name not in known:
                    raise ConfigError(f"a contrast has no setting {name!r}; it has "
                                      f"{', '.join(known)}.{near(name, known)}")
            lists = [value if isinstance(value, list) else [value] for value in one.values()]
            found += [Contrast(**dict(zip(one, values))) for values in itertools.product(*lists)]
        else:
            raise ConfigError(f"there is no decoder {short(one)}; expected base, greedy, or a contrast such as "
                              f"{{alpha: 0.1, beta: 0.5}}.{near(one, NAMED)}")
    doubled = [one for number, one in enumerate(found) if one in found[:number]]
    if doubled:
        raise ConfigError(f"the decoder {getattr(doubled[0], 'label', doubled[0])} is given twice")
    return found


def read_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainingConfig:
    """A recipe file as ``TrainingConfig``, or as ``QuantizationConfig`` if its adapter's method is one of LR-QAT's.

    Raises:
        ConfigError: as ``TrainingConfig.from_yaml``.
    """
    from colora_ms.quantization.config import METHODS
    from colora_ms.training.config import TrainingConfig

    values = override(read_yaml(path), overrides)
    adapter = values.get("adapter")
    if isinstance(adapter, dict) and adapter.get("method") in METHODS:
        from colora_ms.training.quantize import QuantizationConfig

        return QuantizationConfig.from_dict(values)
    return TrainingConfig.from_dict(values)


def evaluation_settings(config: TrainingConfig) -> EvaluationSettings:
    """The checked section ``evaluate`` of a recipe, its data filled in.

    Raises:
        ConfigError: there is no section, it cannot be used, or it has no data.
    """
    if config.evaluate is None:
        raise ConfigError("the recipe has no section evaluate, so there is nothing to run after the training; add one "
                          "(evaluate: {decoders: [base, greedy]}), or use colora-ms train")
    settings = build(EvaluationSettings, config.evaluate, "section evaluate")
    if settings.data is None:
        settings = dataclasses.replace(settings, data=_held_out(config, settings.task))
    if settings.data is None:
        raise ConfigError("section evaluate needs the setting 'data': the recipe has no data.held_out either")
    if settings.task != "problems" and not isinstance(settings.data, str):
        raise ConfigError(f"section evaluate: data is {short(settings.data)}, expected the path of a file for task "
                          f"{settings.task}")
    if quantizes(config) and any(one not in NAMED for one in expand(settings.decoders)):
        raise ConfigError("section evaluate: a quantised model is one model without an adapter, so that there is "
                          "nothing to contrast; its decoders are base (the float model) and greedy (the quantised one)")
    return settings


def _held_out(config: TrainingConfig, task: str) -> Any:
    """``data.held_out``; problems in files are read as ``data.columns`` says."""
    from colora_ms.training.sources import with_columns

    found: Any = config.data.held_out
    columns: Any = config.data.columns
    return found if found is None or columns is None or task != "problems" else with_columns(found, columns)


def quantizes(config: TrainingConfig) -> TypeGuard[QuantizationConfig]:
    """Whether a recipe makes a quantised model in place of an adapter."""
    return hasattr(config, "quantization")


def shorten(config: TrainingConfig, settings: EvaluationSettings, fast: bool = False,
            limit: int | None = None) -> tuple[TrainingConfig, EvaluationSettings]:
    """(config, settings) with fewer updates and items: ``--fast`` and ``--limit``.

    A fast run has an output folder of its own, since it trains something else.

    Raises:
        ConfigError: limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}, expected at least 1")
    most = min((n for n in (settings.items, limit) if n is not None), default=None)
    if fast:
        short_of = FAST_CHARACTERS if settings.task == "perplexity" else FAST_ITEMS
        most = min(short_of, most or short_of)
        loop = dataclasses.replace(config.loop, steps=min(FAST_STEPS, config.loop.steps or FAST_STEPS), epochs=None)
        config = dataclasses.replace(config, output=f"{config.output.rstrip('/')}-fast", loop=loop)
    return config, dataclasses.replace(settings, items=most)
