"""The recipe of a training run: every setting, its meaning, its check; read from YAML or made in Python.

A recipe looks like the sections of ``TrainingConfig``:

    model: smollm2-135m
    output: runs/sorting
    adapter: {r: 8, lora_alpha: 16, target_modules: all-linear}
    data:
      train: {kind: jsonl, path: train.jsonl}
      max_length: 128
    optimizer: {learning_rate: 1.0e-3}
    loop: {steps: 200}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from colora_ms.errors import AdapterError, ConfigError, DataError, near
from colora_ms.models.formats import WEIGHT_CHOICES
from colora_ms.training.encoding import LOSSES, ON_LONG
from colora_ms.training.settings import (
    REQUIRED,
    Section,
    above,
    at_least,
    build,
    fraction,
    is_int,
    one_of,
    override,
    read_yaml,
    setting,
)

if TYPE_CHECKING:
    from colora_ms.adapters.peft_config import PeftConfig


#: Folder inside a run's, where it keeps the adapter that it started from.
START_FOLDER = "start"


@dataclasses.dataclass
class DataConfig(Section):
    """What to train on, and how it becomes batches (section ``data``)."""

    _title = "section data"

    train: object = setting(REQUIRED, "Training data: a JSON lines path, a source description "
                            "({kind: jsonl | json | running_totals | datasets | "
                            "reasoning_gym, ...}), or a list of these. The layout of "
                            "the rows is recognised from their columns, or named (layout: alpaca); see "
                            "colora_ms.training.layouts.")
    validation: object = setting(None, "Data of the evaluations during training, in the same "
                                 "form; questions in it are removed from the training data.")
    held_out: object = setting(None, "Data of a later test, in the same form; only used to remove "
                               "its questions from the training data.")
    template: str = setting("{prompt}\nAnswer: {completion}", "\"chat\" for the model's chat "
                            "template, or a text with {prompt} that ends with {completion}.")
    system: str | None = setting(None, "System message in front of chats that have none (only "
                                 "with the chat template).")
    columns: object = setting(None, "Which columns of files are read: a list of names, or {name in the layout: name in "
                              "the file}; all others are left out without a warning. Left out: all that the layout "
                              "knows, and the others are named in a warning. A source's own columns go before.",
                              lambda value: isinstance(value, (list, dict)) and bool(value),
                              "a list of names, or {name in the layout: name in the file}")
    loss: str = setting("last", "What of a conversation is learned: the last answer, or all assistant turns.",
                        *one_of(*LOSSES))
    max_length: int = setting(256, "Longest example in tokens, prompt and answer together.",
                              *at_least(2))
    on_long: str = setting("skip", "What to do with longer examples: skip and count them, "
                           "stop with an error, or windows: cut plain texts into windows (others are skipped).",
                           *one_of(*ON_LONG))
    batch_size: int = setting(8, "Examples in one batch on each process.", *at_least(1))
    packing: bool = setting(False, "Put several examples into a row, where none sees another: less padding, so "
                            "faster. A batch keeps its size in tokens, and so holds more examples.")
    buckets: list | None = setting(None, "Lengths of the batches; chosen from the data when "
                                   "left out.",
                                   lambda value: bool(value) and all(is_int(item) and item > 0
                                                                     for item in value),
                                   "a list of integers above 0")
    max_buckets: int = setting(3, "At most this many lengths: more waste less padding, but each "
                               "one compiles a graph.", *at_least(1))
    bucket_multiple: int = setting(16, "Chosen lengths are multiples of this.", *at_least(1))


@dataclasses.dataclass
class OptimizerConfig(Section):
    """AdamW and its schedule (section ``optimizer``)."""

    _title = "section optimizer"

    learning_rate: float = setting(1e-3, "Highest learning rate, reached after the warm-up.",
                                   *above(0))
    schedule: str = setting("cosine", "Course of the learning rate after the warm-up.",
                            *one_of("cosine", "linear", "constant"))
    warmup_ratio: float = setting(0.06, "Share of the steps in which the rate rises from 0.",
                                  *fraction())
    min_ratio: float = setting(0.0, "Rate at the last step, as a share of the highest one.",
                               lambda value: 0 <= value <= 1, "a number from 0 to 1")
    beta1: float = setting(0.9, "Decay of the mean of the gradients.", *fraction())
    beta2: float = setting(0.999, "Decay of the mean of the squared gradients.", *fraction())
    epsilon: float = setting(1e-8, "Added to the root of the squared mean.", *above(0))
    weight_decay: float = setting(0.0, "Share of each weight that is taken away per unit of "
                                  "learning rate.", *at_least(0))
    max_grad_norm: float | None = setting(1.0, "Gradients of a larger global norm are scaled "
                                          "down to it; null switches that off.", *above(0))
    accumulation_steps: int = setting(1, "Batches whose gradients make one update.",
                                      *at_least(1))
    loraplus_lr_ratio: float = setting(1.0, "Learning rate of the up factors relative to the down "
                                     "factors (LoRA+, arXiv 2402.12354, suggests about 16).",
                                     *above(0))
    scale_ratio: float = setting(0.01, "Learning rate of learned quantisation scales relative to "
                                 "the others (LR-QAT, arXiv 2406.06385).", *above(0))


@dataclasses.dataclass
class LoopConfig(Section):
    """Length of the run, evaluation, checkpoints (section ``loop``)."""

    _title = "section loop"

    steps: int | None = setting(None, "Number of updates; give this or epochs.", *at_least(1))
    epochs: float | None = setting(None, "Passes over the data; give this or steps.", *above(0))
    seed: int = setting(0, "Seed of the adapter's start, the order of the data, and dropout.",
                        lambda value: 0 <= value < 2 ** 31, "an integer from 0 to 2^31 - 1")
    log_every: int = setting(1, "Updates between two lines of the log.", *at_least(1))
    evaluate_every: int | None = setting(None, "Updates between two evaluations on the "
                                         "validation data; null: only at the end.",
                                         *at_least(1))
    save_every: int | None = setting(None, "Updates between two checkpoints; null: only at the "
                                     "end.", *at_least(1))
    keep_checkpoints: int = setting(2, "Newest checkpoints that stay on disk.", *at_least(1))
    progress: bool = setting(True, "Show a progress bar.")

    def _relations(self) -> list[str]:
        if (self.steps is None) == (self.epochs is None):
            return ["exactly one of steps and epochs must be given"]
        return []


@dataclasses.dataclass
class PreferenceConfig(Section):
    """Direct Preference Optimization (section ``dpo``); see :mod:`colora_ms.training.preference`."""

    _title = "section dpo"

    beta: float = setting(0.1, "How strongly the adapter is held to the base model: rewards are beta times its "
                          "log-ratio to the base.", *above(0))
    loss: str = setting("sigmoid", "sigmoid (DPO, arXiv 2305.18290) or ipo (arXiv 2310.12036; other libraries then "
                        "average log-probabilities, which is length_normalised here).", *one_of("sigmoid", "ipo"))
    label_smoothing: float = setting(0.0, "Share of the pairs whose order is taken to be wrong (conservative DPO); "
                                     "only with loss sigmoid.", lambda value: 0 <= value < 0.5,
                                     "a number from 0 to below 0.5")
    length_normalised: bool = setting(False, "Average log-probabilities over the answer's tokens in place of adding "
                                      "them up.")

    def _relations(self) -> list[str]:
        if self.label_smoothing and self.loss != "sigmoid":
            return [f"label_smoothing is {self.label_smoothing}, which loss {self.loss} does not have; use loss: "
                    "sigmoid"]
        return []


@dataclasses.dataclass
class DistributedConfig(Section):
    """How the workers of a job share the work (section ``distributed``)."""

    _title = "section distributed"

    tensor_parallel: int = setting(1, "Workers over which the model is split, each with its part of every linear; "
                                   "groups of so many train side by side on different rows.", *at_least(1))


_C = TypeVar("_C", bound="TrainingConfig")


@dataclasses.dataclass
class TrainingConfig(Section):
    """A whole recipe.

    Raises:
        ConfigError: unknown names (with a suggestion), wrong types, impossible values.
    """

    _title = "recipe"

    output: str = setting(REQUIRED, "Folder of the run: adapter, checkpoints, log, loss curve.",
                          lambda value: bool(value.strip()), "a path")
    data: DataConfig = setting(REQUIRED, "What to train on; see DataConfig.")
    loop: LoopConfig = setting(REQUIRED, "Length of the run; see LoopConfig.")
    model: str = setting("smollm2-135m", "Name of a known model, or the path of a folder or file.",
                         lambda value: bool(value.strip()), "a name or a path")
    weight_format: str = setting("auto", "Format of the frozen weights; auto: as the file has them.",
                                 *one_of(*WEIGHT_CHOICES))
    train: str = setting("sft", "What the adapter learns from: sft (answers) or dpo (pairs of a better and a worse "
                         "answer).", *one_of("sft", "dpo"))
    dpo: PreferenceConfig | None = setting(None, "Preference training, with train: dpo; see PreferenceConfig.")
    adapter: dict = setting(None, "Settings of the adapter: method (lora or lily; lora if left out), and the "
                            "names of LoraConfig or LilyConfig (PEFT's); or start_from, the folder of an adapter to "
                            "go on with, which brings its own settings.",
                            factory=lambda: {"r": 8, "lora_alpha": 16,
                                             "target_modules": "all-linear"})
    optimizer: OptimizerConfig = setting(None, "AdamW and its schedule; see OptimizerConfig.",
                                         factory=lambda: OptimizerConfig())
    distributed: DistributedConfig = setting(None, "Model and rows over the workers of a job; see DistributedConfig.",
                                             factory=lambda: DistributedConfig())
    evaluate: dict | None = setting(None, "What ``colora-ms run`` measures after the training; see "
                                    "colora_ms.recipes.settings. Its questions leave the training data.")

    def __post_init__(self) -> None:
        if self.train == "dpo" and self.dpo is None:
            self.dpo = PreferenceConfig()
        elif self.dpo is not None and not isinstance(self.dpo, PreferenceConfig):
            self.dpo = build(PreferenceConfig, self.dpo, "section dpo")
        for name, section in _SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, section):
                setattr(self, name, build(section, value, f"section {name}"))
        super().__post_init__()

    def _relations(self) -> list[str]:
        try:
            if self.start_from is not None:
                problems = self._start_problems()
                if problems:
                    return problems
            kind: Any  # a dataclass
            kind, settings = self._adapter_kind()
            if self.start_from is not None:
                settings = {}
            known = [field.name for field in dataclasses.fields(kind)]
            for name in settings:
                if name not in known:
                    return [f"section adapter has no setting {name!r}; it has method, {', '.join(known)}."
                            f"{near(name, known)}"]
            kind(**settings)
        except AdapterError as error:
            return [f"section adapter: {error}"]
        if self.loop.evaluate_every is not None and self.data.validation is None:
            return ["loop.evaluate_every is given, but data.validation is not"]
        return self._preference_problems() + self._template_problems() + self._split_problems()

    def _split_problems(self) -> list[str]:
        if self.distributed.tensor_parallel == 1:
            return []
        if self.train != "sft":
            return [f"distributed.tensor_parallel is {self.distributed.tensor_parallel}, which is for train: sft; this "
                    f"recipe has train: {self.train}"]
        return []

    def _preference_problems(self) -> list[str]:
        if self.train != "dpo":
            return [] if self.dpo is None else [f"section dpo is given, but train is {self.train}; set train: dpo"]
        problems = []
        if self.data.loss != "last":
            problems.append(f"data.loss is {self.data.loss}, but with train: dpo only the two answers of a pair count; "
                            "leave it out")
        if self.data.packing:
            problems.append("data.packing joins examples to rows, but with train: dpo the two answers of a pair are a "
                            "row each; leave it out")
        # What training starts from is on the disk, and never of this kind: such adapters are saved as plain LoRA.
        if self.adapter.get("start_from") is None and getattr(self.adapter_config(), "changes_base", False):
            problems.append(f"section adapter: init_lora_weights is {self.adapter.get('init_lora_weights')!r}, which "
                            "changes the base weights, but with train: dpo the base model is the reference; use true "
                            "or gaussian")
        return problems

    def _template_problems(self) -> list[str]:
        from colora_ms.training.templates import TextTemplate
        if self.data.template == "chat":
            return []
        if self.data.system is not None:
            return ["data.system needs the chat template (data.template: chat)"]
        try:
            TextTemplate(self.data.template)
        except (ConfigError, DataError) as error:
            return [f"data.template: {error}"]
        return []

    def _adapter_kind(self) -> tuple[type[PeftConfig], dict]:
        """(config class of the adapter's method, the settings without ``method`` and ``start_from``)."""
        from colora_ms.adapters import registry
        settings = dict(self.adapter)
        settings.pop("start_from", None)
        method = registry.named(settings.pop("method", "lora"), "section adapter")
        return method.config, settings

    @property
    def start_from(self) -> str | None:
        """Folder of the adapter that training goes on with, or None for a new one."""
        return self.adapter.get("start_from")

    @property
    def start_folder(self) -> Path:
        """Where the adapter to go on with is read: the copy that a run with checkpoints keeps of it, otherwise
        ``start_from`` itself."""
        from colora_ms.training.checkpoint import list_checkpoints
        kept = Path(self.output) / START_FOLDER
        given: Any = self.start_from
        return kept if kept.is_dir() and list_checkpoints(self.output) else Path(given)

    def _start_problems(self) -> list[str]:
        """What is wrong with ``start_from`` and the settings beside it, as far as the adapter's config tells."""
        from colora_ms.adapters import continuing, registry
        if not isinstance(self.start_from, str) or not self.start_from.strip():
            return [f"section adapter: start_from is {self.start_from!r}, expected the path of an adapter folder"]
        _, given = self._adapter_kind()
        if not self.start_folder.exists():
            return []  # training says so; a recipe may be read where its files are not
        config = continuing.config_of(self.start_folder)
        if self.start_folder != Path(self.start_from):
            return []  # a run's own copy: it was compared when the run began
        asked = registry.named(self.adapter.get("method", config.peft_type), "section adapter").config.peft_type
        if asked != config.peft_type:
            return [f"section adapter: method is {self.adapter['method']!r}, but the adapter in {self.start_from} is "
                    f"of the method {config.peft_type.lower()!r}; leave it out, it comes from the adapter"]
        return [f"section adapter: {one}" for one in continuing.disagreements(given, config, self.start_from)]

    def adapter_config(self) -> PeftConfig:
        """The adapter's settings as its method's config, ``LoraConfig`` if no method is named; those of the folder that
        training starts from, if it does."""
        if self.start_from is not None:
            from colora_ms.adapters.continuing import config_of
            return config_of(self.start_folder)
        kind, settings = self._adapter_kind()
        return kind(**settings)

    def to_dict(self) -> dict:
        """The recipe as plain dictionaries; ``from_dict`` reads them back equal."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[_C], values: dict) -> _C:
        """Build a recipe from nested dictionaries (a parsed YAML file)."""
        return build(cls, values, "recipe")

    @classmethod
    def from_yaml(cls: type[_C], path: str | Path, overrides: Iterable[str] = ()) -> _C:
        """Read a recipe file.

        Args:
            path: the YAML file.
            overrides: texts like ``"loop.steps=50"`` that replace single settings; the value is
                read as YAML.

        Raises:
            ConfigError: unreadable file, broken YAML, doubled, unknown or unusable settings.
        """
        return cls.from_dict(override(read_yaml(path), overrides))


_SECTIONS = {"data": DataConfig, "optimizer": OptimizerConfig, "loop": LoopConfig,
             "distributed": DistributedConfig}
