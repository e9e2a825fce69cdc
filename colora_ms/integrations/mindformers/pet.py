"""The adapter methods of this package as pet types of mindformers: ``pet_config: {pet_type: colora_lora, ...}``.

Every registered method is a pet type ``colora_<method>``. The other keys of ``pet_config`` are the fields of the
method's config (``r``, ``lora_alpha``, ``target_modules`` ...); mindformers' own names ``lora_rank`` and
``exclude_layers`` and its ``param_init_type``, ``compute_dtype`` (the pair is float32, its product has the base's
dtype) are understood, too. ``target_modules`` is a list of names, or one regular expression for the whole name of a
module, as in PEFT.

mindformers builds the pet model in ``mindformers.pet.PetModel``: it wraps the base model, loads its weights, freezes
everything, then writes ``adapter_config.json``. :func:`prepare` lets it inject the adapter at that last step: the plain
base model's weights load under their own names, and the adapter's Parameters are not frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindpet.utils.constants import DELTA_LIST

import mindformers.pet.pet_model as pet_model
from mindformers.pet.pet_config import PetConfig
from mindspore import nn

from colora_ms.adapters import adapters_of, inject
from colora_ms.adapters.registry import METHODS
from colora_ms.adapters.store import config_text
from colora_ms.errors import AdapterError, near

if TYPE_CHECKING:
    from colora_ms.adapters.peft_config import PeftConfig

PREFIX = "colora_"

#: mindformers' names of settings -> ours.
SYNONYMS = {"lora_rank": "r", "exclude_layers": "exclude_modules"}

#: Keys that mindformers itself reads or adds, and settings of its own LoRA that mean nothing here.
IGNORED = ("pet_type", "freeze_include", "freeze_exclude", "param_init_type", "compute_dtype", "lora_a_init",
           "lora_b_init")


def register() -> list[str]:
    """Make every adapter method a pet type of mindformers; may be called again after a method was added.

    Returns:
        The names of the pet types.
    """
    names = []
    for peft_type in METHODS:
        name = PREFIX + peft_type.lower()
        names.append(name)
        pet_model.PET_TYPE_TO_MODEL_MAPPING[name] = prepare
        pet_model.PET_TYPE_TO_CONFIG_MAPPING[name] = _config_class(name)
        if name not in DELTA_LIST:
            DELTA_LIST.append(name)  # freeze_delta refuses other modes
    return names


def _config_class(pet_type: str) -> type:
    def init(self, **values):
        PetConfig.__init__(self, pet_type=pet_type, **values)
        # PetModel reads both without asking whether they are there; one of them must be given.
        self.freeze_include = values.get("freeze_include") or ["*"]
        self.freeze_exclude = values.get("freeze_exclude")

    return type("ColoraPetConfig", (PetConfig,), {"__init__": init, "__doc__": f"pet_config of pet_type {pet_type}."})


def adapter_config(pet_config: Mapping[str, Any]) -> PeftConfig:
    """The config of this package that a ``pet_config`` describes.

    Args:
        pet_config: mapping with ``pet_type`` ``colora_<method>`` and the settings.

    Raises:
        AdapterError: the pet type or a setting is not known, or a value cannot be used; the message names all of them.
    """
    pet_type = str(pet_config.get("pet_type"))
    known = {PREFIX + name.lower(): method for name, method in METHODS.items()}
    if pet_type not in known:
        raise AdapterError(f"pet_type {pet_type!r} is not one of {', '.join(sorted(known))}.{near(pet_type, known)}")
    kind = known[pet_type].config
    fields = {one.name for one in dataclasses.fields(kind)}
    values, wrong = {}, []
    for key, value in pet_config.items():
        name = SYNONYMS.get(key, key)
        if name in fields:
            values[name] = _plain(value)
        elif key not in IGNORED and value is not None:
            wrong.append(f"{key}={value!r:.60}.{near(key, fields)}")
    if wrong:
        raise AdapterError(f"pet_config has settings that {pet_type} does not know: {'; '.join(wrong)}")
    return kind(**values)


def _plain(value: Any) -> Any:
    """A YAML value without mindformers' dictionary class."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, (list, tuple)) else value


def prepare(pet_config: Mapping[str, Any], base_model: nn.Cell) -> nn.Cell:
    """What ``PetModel`` calls for its network: the base model, which gets its adapter at the end of that call.

    The model itself stands there, not a wrapper around it, so that it keeps all methods that ``PetModel`` passes on.

    Args:
        pet_config: mapping; base_model: a model of mindformers.

    Raises:
        AdapterError: a setting is not known, or its value cannot be used.
    """
    settings = adapter_config(pet_config)
    object.__setattr__(base_model, "save_pet_config", _AfterFreezing(base_model, settings))
    return base_model


class _AfterFreezing:
    """The last call of ``PetModel.__init__``: puts the adapter in, and writes its config in PEFT's format."""

    def __init__(self, model: nn.Cell, settings: PeftConfig) -> None:
        self.model, self.settings = model, settings

    def __call__(self, path: str | Path) -> None:
        handle = adapters_of(self.model) or inject(self.model, self.settings)
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        values = handle.config().to_peft(None if isinstance(self.settings.target_modules, list)
                                         else sorted(handle.plan().targets))
        Path(path).write_text(config_text(values), encoding="utf-8")
