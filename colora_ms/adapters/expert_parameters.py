"""PEFT's adapters on fused expert weights (``target_parameters``), for decoders whose experts are linears of their own.

Transformers 5 keeps the experts of a layer as ``mlp.experts.gate_up_proj`` (E, 2I, H) and ``mlp.experts.down_proj``
(E, H, I). PEFT stores one pair for each, without the parameter's name: lora_A (E * r, in), row e * r + k, and lora_B
(out, r * E), column k * E + e. Up to 0.19.0 it took the parameter's dimensions the other way round: lora_A (E * r, out)
and lora_B (in, r * E), of which the change is lora_A's transpose times lora_B's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Optional

import numpy as np

from colora_ms.adapters.key_names import PREFIX
from colora_ms.errors import AdapterError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family

_KEY = re.compile(re.escape(PREFIX) + r"(model\.layers\.\d+)\.\w+\.experts\.(base_layer\.)?lora_(A|B)\.weight")
_NAMES = ("gate_up_proj", "down_proj")


def without_parameters(values: Any) -> tuple[Any, tuple[str, ...]]:
    """(an adapter_config's values without ``target_parameters``, those names); where no modules are named beside them,
    the names stand in ``target_modules`` until the model is known."""
    names = values.get("target_parameters") if isinstance(values, dict) else None
    if not isinstance(names, list) or not names or not all(map(_is_of_experts, names)):
        return values, ()
    rest = {key: value for key, value in values.items() if key not in ("target_parameters", "target_modules")}
    return dict(rest, target_modules=values.get("target_modules") or names), tuple(names)


def _is_of_experts(name):
    return isinstance(name, str) and name.rpartition(".")[2] in _NAMES and ".experts." in f".{name}"


class ExpertFile:
    """A file of tensors in which each expert has its own pair, with the face of ``SafetensorsFile``."""

    def __init__(self, file: Any, own: dict[str, str], made: dict[str, tuple[str, tuple, Callable]]) -> None:
        """own: {name: name in the file}; made: {name: (name in the file, shape, function of its array)}."""
        self.file, self._own, self._made = file, own, made
        self.entries = {name: file.entries[source] for name, source in own.items()}
        self.entries.update({name: ("F32", shape, *file.entries[source][2:])
                             for name, (source, shape, _) in made.items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.entries[name][1])

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        if name in self._own:
            return self.file.read(self._own[name])
        source, _, part = self._made[name]
        return np.ascontiguousarray(part(self.file.read(source)))

    def raw(self, name: str) -> Any:
        """The bytes of a tensor, uint8 (n,)."""
        return self.file.raw(self._own[name]) if name in self._own else self.read(name).view(np.uint8).reshape(-1)


def split_experts(file: Any, config: Any, model: Any, names: tuple[str, ...],
                  version: Optional[str]) -> tuple[Any, Any]:
    """(file, config) of an adapter with the pairs of fused expert weights taken apart, an expert each.

    Args:
        file, config: as for :func:`colora_ms.adapters.fused_linears.split_fused`; model: the model's config.
        names: the adapter's ``target_parameters``; version: of the PEFT that wrote it, if the file says it.

    Raises:
        AdapterError: the model has no experts, a pair fits none of the two forms, or both and no version is said.
    """
    if not names:
        return file, config
    if not isinstance(model, DecoderConfig) or not model.experts:
        raise AdapterError(f"it adapts {names[0]!r}, fused weights of experts, which the model does not have")
    kinds = [kind for kind in _NAMES if any(name.endswith(kind) for name in names)]
    record = family(model.model_type)
    assert record.routing is not None
    gate, up, down = record.routing.parts
    own: dict[str, str] = {}
    made: dict[str, tuple[str, tuple, Callable]] = {}
    modules, ranks = [], {}
    for key in file.entries:
        match = _KEY.fullmatch(key)
        if match is None:
            own[key] = key
            continue
        kind = kinds[0] if len(kinds) == 1 or match.group(2) else kinds[1]
        other = key.replace(f"lora_{match.group(3)}.", f"lora_{'B' if match.group(3) == 'A' else 'A'}.")
        if other not in file.entries:
            raise AdapterError(f"tensor {key!r} has no partner {other!r}")
        first, second = (key, other) if match.group(3) == "A" else (other, key)
        width = 2 * model.expert_size
        sizes = (width, model.hidden_size) if kind == _NAMES[0] else (model.hidden_size, model.expert_size)
        rank, older = _form(file, first, second, sizes, model.experts, version)
        half = model.expert_size
        parts = {gate: (0, half), up: (half, width)} if kind == _NAMES[0] else {down: (0, sizes[0])}
        for expert in range(model.experts):
            for part, rows in parts.items():
                module = f"{match.group(1)}.{record.mlp}.experts.{expert}.{part}"
                # of the pair (down, up) each comes from one of the two tensors
                is_down = (match.group(3) == "A") != older
                name = f"{PREFIX}{module}.lora_{'A' if is_down else 'B'}.weight"
                shape = (rank, sizes[1]) if is_down else (rows[1] - rows[0], rank)
                made[name] = (key, shape, _taker(match.group(3), expert, rank, model.experts, older,
                                                 None if is_down else rows))
                modules.append(module)
                if rank != config.r:
                    ranks[re.escape(module)] = rank
    modules = list(dict.fromkeys(modules))
    targets = config.target_modules
    kept = [one for one in targets if one not in names] if isinstance(targets, list) else targets
    alphas = {re.escape(module): alpha for pattern, alpha in config.alpha_pattern.items() for module in modules
              if pattern.rpartition(".")[2] in _NAMES and _of_kind(module, pattern.rpartition(".")[2], down)}
    changes = {"rank_pattern": {**{key: value for key, value in config.rank_pattern.items()
                                   if key.rpartition(".")[2] not in _NAMES}, **ranks},
               "alpha_pattern": {**{key: value for key, value in config.alpha_pattern.items()
                                    if key.rpartition(".")[2] not in _NAMES}, **alphas},
               "target_modules": kept + modules if isinstance(kept, list) else kept}
    return ExpertFile(file, own, made), dataclasses.replace(config, **changes)


def _of_kind(module, kind, down):
    return (module.rpartition(".")[2] == down) == (kind == _NAMES[1])


def _form(file, first, second, sizes, experts, version):
    """(rank, whether lora_A has the outputs, as PEFT wrote it up to 0.19.0)."""
    one, two = file.shape(first), file.shape(second)
    rank = one[0] // experts if len(one) == 2 else 0
    fits = [len(one) == len(two) == 2 and rank > 0 and one == (experts * rank, inner) and two == (outer, rank * experts)
            for outer, inner in (sizes, sizes[::-1])]
    if not any(fits):
        raise AdapterError(f"tensors {first!r} {one} and {second!r} {two} are no pair for {experts} experts of "
                           f"{sizes[0]} rows and {sizes[1]} columns")
    if all(fits):
        if version is None:
            raise AdapterError(f"tensors {first!r} and {second!r} can be read two ways, since {sizes[0]} = {sizes[1]}: "
                               "put the version of PEFT that wrote them into adapter_config.json as peft_version")
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        return rank, numbers <= (0, 19, 0)
    return rank, fits[1]


def _taker(half, expert, rank, experts, older, rows):
    """The function that takes an expert's part out of lora_A or lora_B."""
    def take(value):
        part = value[expert * rank:(expert + 1) * rank] if half == "A" else value[:, expert::experts]
        part = part.T if older else part
        return part if rows is None else part[rows[0]:rows[1]]
    return take
