"""What the configs of all adapter methods share: PEFT's JSON object and the settings that name modules."""

import warnings
from dataclasses import fields
from typing import Any, Iterable

from colora_ms.errors import AdapterError, AdapterWarning, near


class PeftConfig:
    """Base of a method's config, which is a dataclass with ``peft_type`` and a class method ``parse_peft``."""

    def make_lists(self) -> None:
        """Turn the sets and tuples among the module settings into lists, which is what files hold."""
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                setattr(self, name, sorted(value))
            elif isinstance(value, tuple):
                setattr(self, name, list(value))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]

    def text_problems(self) -> list[str]:
        """What is wrong with the settings that are kept for the file only."""
        return [f"{name} is {getattr(self, name)!r}, expected a string"
                for name in ("task_type", "base_model_name_or_path", "revision")
                if getattr(self, name) is not None and not isinstance(getattr(self, name), str)]

    @staticmethod
    def unknown_settings(values: dict, known: Iterable[str]) -> list[str]:
        """What is wrong with the settings of an adapter_config.json that are not in ``known``: those with a value that
        may change something. A neutral one (null, false, 0, empty), as other versions of PEFT write it, is said in a
        warning.

        Args:
            values: the file's JSON object; known: names.
        """
        unknown = {key: value for key, value in values.items() if key not in known and key != "peft_type"}
        neutral = [key for key, value in unknown.items() if is_neutral(value)]
        if neutral:
            warnings.warn("the adapter's config has settings that this version does not know, switched off: "
                          + ", ".join(f"{key}={values[key]!r:.40}" for key in neutral[:20]) + "; they are passed over",
                          AdapterWarning, stacklevel=4)
        return [f"{key}={value!r:.60} is not a known setting.{near(key, known)}" for key, value in unknown.items()
                if key not in neutral]

    @classmethod
    def from_peft(cls, values: Any) -> Any:
        """The config of an ``adapter_config.json``.

        Args:
            values: the file's JSON object as a dict.

        Raises:
            AdapterError: another kind of adapter, unusable values, or settings that are not implemented; all in one
                message.
        """
        config, problems = cls.parse_peft(values)
        if problems:
            raise AdapterError("this adapter's config cannot be used: " + "; ".join(problems))
        return config

    def to_peft(self, target_modules: Any = None) -> dict[str, Any]:
        """The dict to write as ``adapter_config.json``.

        Args:
            target_modules: written in place of the config's own value (the names that "all-linear" stood for).
        """
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["target_modules"] = self.target_modules if target_modules is None else target_modules
        values["peft_type"] = self.peft_type
        values["inference_mode"] = True
        return values


def is_neutral(value: Any) -> bool:
    """Whether a setting's JSON value asks for nothing: null, false, 0, empty, or a container of such values."""
    if isinstance(value, dict):
        return all(is_neutral(one) for one in value.values())
    return not value
