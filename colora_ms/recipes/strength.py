"""A copy of an adapter at another strength: the same factors, another scale."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from colora_ms.adapters import store
from colora_ms.errors import AdapterError

#: Settings of each method by which what it adds is multiplied.
_SCALES = {"LORA": "lora_alpha", "LILY": "scaling"}

#: Settings that add something else to the factors, which no scale multiplies.
_UNSCALED = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")


def copy_adapter(source: str | os.PathLike, target: str | os.PathLike, strength: float = 1.0) -> Path:
    """Write a copy of an adapter folder whose change of every linear is ``strength`` times the original's.

    Only ``adapter_config.json`` differs (``lora_alpha`` and ``alpha_pattern``; Lily's ``scaling``), so that other
    readers of PEFT's format see the same adapter.

    Args:
        source: folder of the adapter.
        target: the new folder; its parents are made.
        strength: 1 for an equal copy.

    Returns:
        The new folder.

    Raises:
        AdapterError: the adapter has no such scale, trains more than its factors (which would not be scaled), or a file
            cannot be read or written.
    """
    source, target = Path(source), Path(target)
    values = dict(store.read_config(source))
    if strength != 1:
        values.update(_scaled(values, strength, source))
    weights = store.regular_file(source / store.WEIGHTS_FILE)

    def write(temporary: Path) -> None:
        shutil.copyfile(weights, temporary / store.WEIGHTS_FILE)
        (temporary / store.CONFIG_FILE).write_text(store.config_text(values), encoding="utf-8")

    store.write_folder(target, write)
    return target


def _scaled(values: dict, strength: float, source: Path) -> dict:
    """The settings that change."""
    name = _SCALES.get(values.get("peft_type", "LORA"))
    unscaled = [key for key in _UNSCALED if values.get(key)]
    if values.get("bias", "none") != "none":
        unscaled.append("bias")
    if name is None or name not in values or unscaled:
        why = f"it has {', '.join(unscaled)}, which no scale multiplies" if unscaled else "its method has no scale"
        raise AdapterError(f"the adapter {source} cannot be copied at another strength: {why}")
    found = {name: strength * values[name]}
    if values.get("alpha_pattern"):
        found["alpha_pattern"] = {module: strength * alpha for module, alpha in values["alpha_pattern"].items()}
    return found
