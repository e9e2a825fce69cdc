"""Sections of a recipe: dataclasses that check their values, and the strict reading of YAML.

A section's field is made by ``setting``: its default, a sentence about it, and a check. Unknown names, wrong types and
impossible values are errors that name the setting and suggest the nearest one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from colora_ms.errors import ConfigError, near
from colora_ms.models.messages import short

_MAX_RECIPE_BYTES = 1 << 20
REQUIRED = object()
_S = TypeVar("_S", bound="Section")


def setting(default: Any, sentence: str, check: Callable[[Any], bool] | None = None, expected: str = "",
            factory: Callable[[], Any] | None = None) -> Any:
    """A dataclass field with its sentence, and a check with the words that describe it."""
    metadata = {"help": sentence, "check": check, "expected": expected}
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    """Check and words of a :func:`setting`, as the other functions here: a number from ``least`` on."""
    return (lambda value: value >= least), f"a number of at least {least}"


def above(least: float) -> tuple[Callable[[Any], bool], str]:
    """A number above ``least``."""
    return (lambda value: value > least), f"a number above {least}"


def fraction() -> tuple[Callable[[Any], bool], str]:
    """A number from 0 to below 1."""
    return (lambda value: 0 <= value < 1), "a number from 0 to below 1"


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """One of these values."""
    return (lambda value: value in names), "one of " + ", ".join(names)


@dataclasses.dataclass
class Section:
    """Checks types and values of a dataclass when it is built; subclasses are the recipe's sections."""

    _title = "recipe"
    _kinds: ClassVar[dict[str, type[Section]]] = {}  # by name: what a field's annotation may say

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Section._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        problems = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value, problem = coerce(value, field.type)
            if not problem and value is not None and field.metadata.get("check") \
                    and not field.metadata["check"](value):
                problem = f"expected {field.metadata['expected']}"
            if problem:
                problems.append(f"{field.name} is {short(value)}, {problem}")
            else:
                setattr(self, field.name, value)
        problems = problems or self._relations()
        if problems:
            raise ConfigError(f"{self._title}: " + "; ".join(problems))

    def _relations(self) -> list[str]:
        """Problems between settings, as a list of texts."""
        return []

    @classmethod
    def settings(cls) -> list[tuple[str, Any, str]]:
        """``[(name, default, sentence)]`` of the section, for help texts."""
        rows = []
        for field in dataclasses.fields(cls):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            rows.append((field.name, None if default is dataclasses.MISSING else default,
                         field.metadata.get("help", "")))
        return rows


def build(section: type[_S], values: object, title: str) -> _S:
    """A section from a dictionary; unknown and missing names are errors."""
    if not isinstance(values, dict):
        raise ConfigError(f"{title} is {short(values)}, expected settings (name: value)")
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


def read_yaml(path: str | Path) -> dict:
    """The parsed YAML file at ``path``: a dictionary.

    Raises:
        ConfigError: missing or too large file, not UTF-8, broken YAML, a doubled key.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses doubled keys, which YAML's own loader resolves silently."""

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict:
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
        raise ConfigError(f"{path} holds {short(values)}, expected settings (name: value)")
    return values


def override(values: dict, overrides: Iterable[str]) -> dict:
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
                raise ConfigError(f"the override {text!r}: {part} is {short(inner)}, which has no "
                                  "settings inside")
            place[part] = dict(inner)
            place = place[part]
        place[parts[-1]] = value
    return values


def coerce(value: Any, kind: str | type) -> tuple[Any, str]:
    """``(value, problem)``: the value in its declared type, or what is wrong with it."""
    kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    kinds = [part.strip() for part in kind.split("|")]
    if "object" in kinds or value is None and "None" in kinds:
        return value, ""
    for name in kinds:
        if name in Section._kinds and isinstance(value, Section._kinds[name]):
            return value, ""
        if name == "bool" and isinstance(value, bool):
            return value, ""
        if name == "int" and is_int(value):
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
    return value, "expected " + " or ".join(words.get(name, words["dict"]) for name in kinds)


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)
