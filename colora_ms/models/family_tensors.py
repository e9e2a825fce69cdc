"""A Hugging Face folder's tensors under the names that a config calls for, and back.

Folders of some families keep linears as one that stand apart in a decoder (``qkv_proj``, ``gate_up_proj``);
transformers 5 may write all experts of a layer as one tensor; multimodal models wrap the text model's names. The
families' records say which linears; here is the one place where they are taken apart and put together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family
from colora_ms.models.formats import StoredWeight

_WRAPPED = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."))
# Parts of a model that sees or hears.
_OTHERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.",
           "audio_tower.", "model.audio_tower.")
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)\.(weight|bias)")
_EXPERTS = re.compile(r"(model\.layers\.\d+\.)(.+\.experts)\.(gate_up_proj|down_proj)")


class Part(NamedTuple):
    """Where a tensor stands: the stored one's name, the index along its first axis (of experts), and its rows."""

    name: str
    index: Optional[int] = None
    rows: Optional[tuple[int, int]] = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the stored tensor."""
        return self.index is None and self.rows is None

    def of(self, value: np.ndarray) -> np.ndarray:
        """The part of the stored array."""
        value = value if self.index is None else value[self.index]
        return value if self.rows is None else value[self.rows[0]:self.rows[1]]


def fused_parts(config: DecoderConfig, fused: Mapping[str, tuple[str, ...]], name: str,
                rows: Optional[int]) -> Optional[dict[str, tuple[int, int]]]:
    """{name: its rows} of the tensors that ``name`` holds as one, or None where it is none of ``fused``.

    Args:
        fused: {name of a linear in a layer: its parts}; name: of a tensor; rows: of it, or None not to check them.

    Raises:
        CheckpointError: the rows are not those of the parts together.
    """
    match = _LAYER.fullmatch(name)
    if match is None or match.group(2) not in fused:
        return None
    shapes = part_rows(config)
    found, begin = {}, 0
    for part in fused[match.group(2)]:
        end = begin + shapes[part.rpartition(".")[2]]
        found[f"{match.group(1)}{part}.{match.group(3)}"] = (begin, end)
        begin = end
    if rows is not None and rows != begin:
        raise CheckpointError(f"{name} has {rows} rows, the config calls for {begin}: those of "
                              f"{', '.join(part.rpartition('.')[2] for part in fused[match.group(2)])}")
    return found


def part_rows(config: DecoderConfig) -> dict[str, int]:
    """Rows of the linears that can be fused."""
    key = config.num_key_value_heads * config.head_dim
    return {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": key, "v_proj": key,
            "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}


class FamilyTensors:
    """A store of tensors (``SafetensorsFolder``) under the names of ``config.parameter_shapes()``.

    Attributes:
        shapes: {name: shape}.

    Raises:
        CheckpointError: a fused tensor has another number of rows than its parts.
    """

    def __init__(self, store: Any, config: DecoderConfig) -> None:
        self.store = store
        self.parts: dict[str, Part] = {}
        record = family(config.model_type)
        wrapped = any(name.startswith(old) for name in store.shapes for old, _ in _WRAPPED)
        for own, shape in store.shapes.items():
            if wrapped and own.startswith(_OTHERS):
                continue
            name = next((new + own[len(old):] for old, new in _WRAPPED if own.startswith(old)), own)
            rows = fused_parts(config, record.fused, name, shape[0] if shape else 0)
            for part, place in (rows or {}).items():
                self.parts[part] = Part(own, None, place)
            if rows is None and not self._take_experts(own, name, shape, config, record):
                self.parts[name] = Part(own)
        self.shapes = {name: self._shape(part) for name, part in self.parts.items()}
        self._last: Optional[tuple[str, StoredWeight]] = None

    def _take_experts(self, own, name, shape, config, record):
        """Whether it is all experts' weights in one: (experts, 2 * width, hidden) or (experts, hidden, width)."""
        match = _EXPERTS.fullmatch(name)
        if match is None or record.routing is None or len(shape) != 3:
            return False
        if shape[0] != config.experts or shape[1] % 2 and match.group(3) == "gate_up_proj":
            raise CheckpointError(f"{name} has shape {tuple(shape)}, the config calls for {config.experts} experts")
        gate, up, down = record.routing.parts
        middle = shape[1] // 2
        places = {gate: (0, middle), up: (middle, shape[1])} if match.group(3) == "gate_up_proj" else {down: None}
        for index in range(shape[0]):
            for part, rows in places.items():
                self.parts[f"{match.group(1)}{record.mlp}.experts.{index}.{part}.weight"] = Part(own, index, rows)
        return True

    def _shape(self, part):
        shape = tuple(self.store.shapes[part.name])
        shape = shape if part.index is None else shape[1:]
        return shape if part.rows is None else (part.rows[1] - part.rows[0], *shape[1:])

    def stored(self, name: str) -> StoredWeight:
        """The tensor as it is stored."""
        part = self.parts[name]
        if part.whole:
            return self.store.stored(part.name)
        if self._last is None or self._last[0] != part.name:
            # The parts of one tensor follow one another, and a packed tensor is unpacked whole.
            self._last = part.name, self.store.stored(part.name)
        whole = self._last[1]
        data, scale = (None if one is None else np.ascontiguousarray(part.of(one)) for one in (whole.data, whole.scale))
        return dataclasses.replace(whole, shape=self.shapes[name], data=data, scale=scale)

    def check_dtypes(self, names: Iterable[str]) -> None:
        """As of the store."""
        self.store.check_dtypes(dict.fromkeys(self.parts[name].name for name in names))

    def same_bytes(self, first: str, second: str) -> bool:
        """As of the store."""
        return self.store.same_bytes(self.parts[first].name, self.parts[second].name)


class FolderTensors(Mapping):
    """The tensors of a decoder as its family's folders hold them: the linears that these keep as one put together.

    Args:
        config: of the decoder; tensors: {name of ``config.parameter_shapes()``: array}.

    Attributes:
        shapes: {name in the folder: shape}.
    """

    def __init__(self, config: DecoderConfig, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = tensors
        self._joined: dict[str, list[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        given = config.parameter_shapes()
        whole = {}
        for fused, parts in family(config.model_type).fused.items():
            for index in range(config.num_hidden_layers):
                layer = f"model.layers.{index}."
                for field in ("weight", "bias"):
                    names = [f"{layer}{part}.{field}" for part in parts]
                    if all(name in given for name in names):
                        whole.update(dict.fromkeys(names, f"{layer}{fused}.{field}"))
        for name, shape in given.items():
            target = whole.get(name, name)
            self._joined.setdefault(target, []).append(name)
            former = self.shapes.get(target)
            self.shapes[target] = tuple(shape) if former is None else (former[0] + shape[0], *former[1:])

    def __getitem__(self, name: str) -> np.ndarray:
        parts = [np.asarray(self.tensors[one]) for one in self._joined[name]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def __iter__(self) -> Any:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
