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

import dataclasses
import math
import re
from pathlib import Path

from colora_ms.errors import AdapterError, ConfigError, DataError, near

_MAX_RECIPE_BYTES = 1 << 20
_REQUIRED = object()


def _setting(default, sentence, check=None, expected="", factory=None):
    """A dataclass field with its sentence, and a check with the words that describe it."""
    metadata = {"help": sentence, "check": check, "expected": expected}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is _REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _at_least(least):
    return (lambda value: value >= least), f"a number of at least {least}"


def _above(least):
    return (lambda value: value > least), f"a number above {least}"


def _fraction():
    return (lambda value: 0 <= value < 1), "a number from 0 to below 1"


def _one_of(*names):
    return (lambda value: value in names), "one of " + ", ".join(names)


class _Section:
    """Checks types and values of a dataclass when it is built; subclasses are the recipe's sections."""

    _title = "recipe"

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value, problem = _coerce(value, field.type)
            if not problem and value is not None and field.metadata.get("check") \
                    and not field.metadata["check"](value):
                problem = f"expected {field.metadata['expected']}"
            if problem:
                problems.append(f"{field.name} is {_short(value)}, {problem}")
            else:
                setattr(self, field.name, value)
        problems = problems or self._relations()
        if problems:
            raise ConfigError(f"{self._title}: " + "; ".join(problems))

    def _relations(self):
        """Problems between settings, as a list of texts."""
        return []

    @classmethod
    def settings(cls):
        """``[(name, default, sentence)]`` of the section, for help texts."""
        rows = []
        for field in dataclasses.fields(cls):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            rows.append((field.name, None if default is dataclasses.MISSING else default,
                         field.metadata.get("help", "")))
        return rows


@dataclasses.dataclass
class DataConfig(_Section):
    """What to train on, and how it becomes batches (section ``data``)."""

    _title = "section data"

    train: object = _setting(_REQUIRED, "Training data: a JSON lines path, a source description "
                             "({kind: jsonl | reasoning_gym | datasets, ...}), or a list of these.")
    validation: object = _setting(None, "Data of the evaluations during training, in the same "
                                  "form; questions in it are removed from the training data.")
    held_out: object = _setting(None, "Data of a later test, in the same form; only used to remove "
                                "its questions from the training data.")
    template: str = _setting("{prompt}\nAnswer: {completion}", "\"chat\" for the model's chat "
                             "template, or a text with {prompt} that ends with {completion}.")
    system: "str | None" = _setting(None, "System message in front of chats that have none (only "
                                    "with the chat template).")
    max_length: int = _setting(256, "Longest example in tokens, prompt and answer together.",
                               *_at_least(2))
    on_long: str = _setting("skip", "What to do with longer examples: skip and count them, or "
                            "stop with an error.", *_one_of("skip", "error"))
    batch_size: int = _setting(8, "Examples in one batch on each process.", *_at_least(1))
    packing: bool = _setting(False, "Join short examples into full rows; faster, but an example "
                             "then sees the ones before it in its row.")
    buckets: "list | None" = _setting(None, "Lengths of the batches; chosen from the data when "
                                      "left out.",
                                      lambda value: bool(value) and all(_is_int(item) and item > 0
                                                                        for item in value),
                                      "a list of integers above 0")
    max_buckets: int = _setting(3, "At most this many lengths: more waste less padding, but each "
                                "one compiles a graph.", *_at_least(1))
    bucket_multiple: int = _setting(16, "Chosen lengths are multiples of this.", *_at_least(1))


@dataclasses.dataclass
class OptimizerConfig(_Section):
    """AdamW and its schedule (section ``optimizer``)."""

    _title = "section optimizer"

    learning_rate: float = _setting(1e-3, "Highest learning rate, reached after the warm-up.",
                                    *_above(0))
    schedule: str = _setting("cosine", "Course of the learning rate after the warm-up.",
                             *_one_of("cosine", "linear", "constant"))
    warmup_ratio: float = _setting(0.06, "Share of the steps in which the rate rises from 0.",
                                   *_fraction())
    min_ratio: float = _setting(0.0, "Rate at the last step, as a share of the highest one.",
                                lambda value: 0 <= value <= 1, "a number from 0 to 1")
    beta1: float = _setting(0.9, "Decay of the mean of the gradients.", *_fraction())
    beta2: float = _setting(0.999, "Decay of the mean of the squared gradients.", *_fraction())
    epsilon: float = _setting(1e-8, "Added to the root of the squared mean.", *_above(0))
    weight_decay: float = _setting(0.0, "Share of each weight that is taken away per unit of "
                                   "learning rate.", *_at_least(0))
    max_grad_norm: "float | None" = _setting(1.0, "Gradients of a larger global norm are scaled "
                                             "down to it; null switches that off.", *_above(0))
    accumulation_steps: int = _setting(1, "Batches whose gradients make one update.",
                                       *_at_least(1))
    loraplus_lr_ratio: float = _setting(1.0, "Learning rate of the up factors relative to the down "
                                      "factors (LoRA+, arXiv 2402.12354, suggests about 16).",
                                      *_above(0))
    scale_ratio: float = _setting(0.01, "Learning rate of learned quantisation scales relative to "
                                  "the others (LR-QAT, arXiv 2406.06385).", *_above(0))


@dataclasses.dataclass
class LoopConfig(_Section):
    """Length of the run, evaluation, checkpoints (section ``loop``)."""

    _title = "section loop"

    steps: "int | None" = _setting(None, "Number of updates; give this or epochs.", *_at_least(1))
    epochs: "float | None" = _setting(None, "Passes over the data; give this or steps.", *_above(0))
    seed: int = _setting(0, "Seed of the adapter's start, the order of the data, and dropout.",
                         lambda value: 0 <= value < 2 ** 31, "an integer from 0 to 2^31 - 1")
    log_every: int = _setting(1, "Updates between two lines of the log.", *_at_least(1))
    evaluate_every: "int | None" = _setting(None, "Updates between two evaluations on the "
                                            "validation data; null: only at the end.",
                                            *_at_least(1))
    save_every: "int | None" = _setting(None, "Updates between two checkpoints; null: only at the "
                                        "end.", *_at_least(1))
    keep_checkpoints: int = _setting(2, "Newest checkpoints that stay on disk.", *_at_least(1))
    progress: bool = _setting(True, "Show a progress bar.")

    def _relations(self):
        if (self.steps is None) == (self.epochs is None):
            return ["exactly one of steps and epochs must be given"]
        return []


@dataclasses.dataclass
class TrainingConfig(_Section):
    """A whole recipe.

    Raises:
        ConfigError: unknown names (with a suggestion), wrong types, impossible values.
    """

    _title = "recipe"

    output: str = _setting(_REQUIRED, "Folder of the run: adapter, checkpoints, log, loss curve.",
                           lambda value: bool(value.strip()), "a path")
    data: object = _setting(_REQUIRED, "What to train on; see DataConfig.")
    loop: object = _setting(_REQUIRED, "Length of the run; see LoopConfig.")
    model: str = _setting("smollm2-135m", "Name of a known model, or the path of a folder or file.",
                          lambda value: bool(value.strip()), "a name or a path")
    weight_format: str = _setting("float32", "Format of the frozen weights.",
                                  *_one_of("float32", "bfloat16", "int8", "int4"))
    adapter: dict = _setting(None, "Settings of the adapter: method (lora or lily; lora if left out), and the "
                             "names of LoraConfig or LilyConfig (PEFT's).",
                             factory=lambda: {"r": 8, "lora_alpha": 16,
                                              "target_modules": "all-linear"})
    optimizer: object = _setting(None, "AdamW and its schedule; see OptimizerConfig.",
                                 factory=lambda: OptimizerConfig())

    def __post_init__(self):
        for name, section in _SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, section):
                setattr(self, name, _build(section, value, f"section {name}"))
        super().__post_init__()

    def _relations(self):
        try:
            kind, settings = self._adapter_kind()
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
        return self._template_problems()

    def _template_problems(self):
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

    def _adapter_kind(self):
        """(config class of the adapter's method, the settings without the method's name)."""
        from colora_ms.adapters import registry
        settings = dict(self.adapter)
        method = registry.named(settings.pop("method", "lora"), "section adapter")
        return method.config, settings

    def adapter_config(self):
        """The adapter's settings as its method's config, ``LoraConfig`` if no method is named."""
        kind, settings = self._adapter_kind()
        return kind(**settings)

    def to_dict(self):
        """The recipe as plain dictionaries; ``from_dict`` reads them back equal."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Build a recipe from nested dictionaries (a parsed YAML file)."""
        return _build(cls, values, "recipe")

    @classmethod
    def from_yaml(cls, path, overrides=()):
        """Read a recipe file.

        Args:
            path: the YAML file.
            overrides: texts like ``"loop.steps=50"`` that replace single settings; the value is
                read as YAML.

        Raises:
            ConfigError: unreadable file, broken YAML, doubled, unknown or unusable settings.
        """
        return cls.from_dict(_override(read_yaml(path), overrides))


_SECTIONS = {"data": DataConfig, "optimizer": OptimizerConfig, "loop": LoopConfig}


def _build(section, values, title):
    """A section from a dictionary; unknown and missing names are errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{title} is {_short(values)}, expected settings (name: value)")
    known = [field.name for field in dataclasses.fields(section)]
    problems = [f"{title} has no setting {name!r}; it has {', '.join(known)}.{near(name, known)}"
                for name in values if name not in known]
    needed = [field.name for field in dataclasses.fields(section)
              if field.default is dataclasses.MISSING
              and field.default_factory is dataclasses.MISSING]
    problems += [f"{title} needs the setting {name!r}" for name in needed if name not in values]
    if problems:
        raise ConfigError("; ".join(problems))
    return section(**values)


def read_yaml(path):
    """The parsed YAML file at ``path``: a dictionary.

    Raises:
        ConfigError: missing or too large file, not UTF-8, broken YAML, a doubled key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses doubled keys, which YAML's own loader resolves silently."""

    def mapping(loader, node, deep=False):
        keys = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConfigError(f"{path}, line {key_node.start_mark.line + 1}: the name {key!r} "
                                  "must be a text")
            if key in keys:
                raise ConfigError(f"{path}, line {key_node.start_mark.line + 1}: {key!r} is given "
                                  "twice")
            keys.add(key)
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
                           lambda loader, node: mapping(loader, node, deep=True))
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes; a recipe is a small file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {_short(values)}, expected settings (name: value)")
    return values


def _override(values, overrides):
    """``values`` with texts like "loop.steps=50" applied."""
    import yaml
    values = dict(values)
    for text in overrides:
        name, equals, raw = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"the override {text!r} is not of the form section.name=value")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise ConfigError(f"the override {text!r}: {raw!r} is not a YAML value") from None
        place = values
        for part in parts[:-1]:
            inner = place.get(part, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"the override {text!r}: {part} is {_short(inner)}, which has no "
                                  "settings inside")
            place[part] = dict(inner)
            place = place[part]
        place[parts[-1]] = value
    return values


def _coerce(value, kind):
    """``(value, problem)``: the value in its declared type, or what is wrong with it."""
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    kinds = [part.strip() for part in kind.split("|")]
    if "object" in kinds or value is None and "None" in kinds:
        return value, ""
    for name in kinds:
        if name == "bool" and isinstance(value, bool):
            return value, ""
        if name == "int" and _is_int(value):
            return value, ""
        if name == "float":
            # YAML 1.1 reads 1e-3 (without a point) as a text; people mean the number.
            if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
                value = float(value)
            if not isinstance(value, bool) and isinstance(value, (int, float)):
                return (float(value), "") if math.isfinite(value) else (value, "expected a finite "
                                                                        "number")
        if name in ("str", "dict", "list") and isinstance(value, {"str": str, "dict": dict,
                                                                   "list": list}[name]):
            return value, ""
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a text",
             "dict": "settings (name: value)", "list": "a list", "None": "null"}
    return value, "expected " + " or ".join(words[name] for name in kinds)


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value):
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
