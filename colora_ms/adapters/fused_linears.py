"""Adapters of linears that a family's folders keep as one (``qkv_proj``, ``gate_up_proj``), for decoders in which their
parts stand apart: each part has the same ``lora_A`` and its rows of ``lora_B``."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from colora_ms.adapters.key_names import PREFIX
from colora_ms.errors import AdapterError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family
from colora_ms.models.family_tensors import part_rows

_SHARED = ("lora_A.weight",)  # of which every part has the whole


class SplitFile:
    """A file of tensors in which fused linears stand apart, with the face of ``SafetensorsFile``.

    Args:
        file: the file; parts: {name here: (name in the file, rows or None for all)}.
    """

    def __init__(self, file: Any, parts: dict[str, tuple[str, Any]]) -> None:
        self.file, self._parts = file, parts
        self.entries = {}
        for name, (own, rows) in parts.items():
            dtype, shape, *rest = file.entries[own]
            self.entries[name] = (dtype, shape if rows is None else (rows[1] - rows[0], *shape[1:]), *rest)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.entries[name][1])

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        own, rows = self._parts[name]
        value = self.file.read(own)
        return value if rows is None else np.ascontiguousarray(value[rows[0]:rows[1]])

    def raw(self, name: str) -> Any:
        """The bytes of a tensor, uint8 (n,); of a part, of its values."""
        own, rows = self._parts[name]
        return self.file.raw(own) if rows is None else self.read(name).view(np.uint8).reshape(-1)


def split_fused(file: Any, config: Any, model: Any) -> tuple[Any, Any]:
    """(file, config) of an adapter with the fused linears of the model's family taken apart; the same where there are
    none.

    Args:
        file: has ``entries``, ``shape``, ``read`` and ``raw``; config: the method's config; model: the model's config.

    Raises:
        AdapterError: a fused tensor has other rows than its parts together.
    """
    fused = family(model.model_type).fused if isinstance(model, DecoderConfig) else {}
    if not fused:
        return file, config
    pattern = re.compile(re.escape(PREFIX) + rf"(model\.layers\.\d+\.)({'|'.join(map(re.escape, fused))})\.(.+)")
    sizes, parts, modules, found = part_rows(model), {}, [], False
    for name in file.entries:
        match = pattern.fullmatch(name)
        if match is None:
            parts[name] = (name, None)
            modules.append(name.removeprefix(PREFIX).partition(".lora_")[0])
            continue
        found, begin = True, 0
        for part in fused[match.group(2)]:
            end = begin + sizes[part.rpartition(".")[2]]
            rows = None if match.group(3) in _SHARED else (begin, end)
            parts[f"{PREFIX}{match.group(1)}{part}.{match.group(3)}"] = (name, rows)
            modules.append(match.group(1) + part)
            begin = end
        if match.group(3) not in _SHARED and file.shape(name)[0] != begin:
            raise AdapterError(f"tensor {name!r} has {file.shape(name)[0]} rows, the model asks for {begin}")
    if not found:
        return file, config
    names = {whole.rpartition(".")[2]: [part.rpartition(".")[2] for part in own] for whole, own in fused.items()}
    targets = config.target_modules
    if isinstance(targets, str):
        targets = targets if targets.lower() == "all-linear" else list(dict.fromkeys(modules))
    elif targets is not None:
        targets = [one for target in targets for one in _apart(target, names)]
    changes = {field: {one: value for key, value in getattr(config, field).items() for one in _apart(key, names)}
               for field in ("rank_pattern", "alpha_pattern") if getattr(config, field, None)}
    return SplitFile(file, parts), dataclasses.replace(config, target_modules=targets, **changes)


def _apart(text, names):
    """A name or pattern, once for each part where it ends with a fused linear's name."""
    for whole, parts in names.items():
        if text.rstrip("$").endswith(whole):
            return [text.replace(whole, part) for part in parts]
    return [text]
