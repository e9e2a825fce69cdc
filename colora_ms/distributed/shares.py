"""Which part of which tensor a worker has.

    column: q, k, v, gate, up     weight (out, in): each worker has its rows; y is the worker's part
    row:    o, down               each worker has its columns, for the part that it has of x; y = sum over workers

LoRA goes the way of its linear: a column-split one has ``up`` (out, r) split, a row-split one ``down`` (r, in), so
that base and adapter share the one sum. Embedding, norms and head are whole on every worker.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Optional, Union

import numpy as np

from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError
from colora_ms.models.builder import Weights
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family
from colora_ms.models.formats import StoredWeight

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")

_TENSOR = re.compile(r"(?:^|\.)(?P<linear>" + "|".join(COLUMN + ROW)
                     + r")\.(?P<field>weight|bias|lora_A\.weight|lora_B\.weight)$")


def local_config(config: DecoderConfig, world: int) -> DecoderConfig:
    """The config of one worker's share.

    Raises:
        ConfigError: lists the sizes that ``world`` does not divide; or the family cannot be split.
    """
    record = family(config.model_type)
    reason = "routed experts" if config.experts else "one norm over all heads" if record.whole_qk_norm else \
        "" if record.norms.before_attention else "no norm before attention"
    if reason:
        raise ConfigError(f"{config.model_type} cannot be split over workers: it has {reason}")
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    wrong = [f"{name}={getattr(config, name)}" for name in names if getattr(config, name) % world]
    if wrong:
        raise ConfigError(f"{world} workers cannot share {', '.join(wrong)}; choose a number of workers that "
                          "divides them")
    return dataclasses.replace(config, **{name: getattr(config, name) // world for name in names})


def share_of(name: str, value: np.ndarray, team: Workers) -> np.ndarray:
    """This worker's part of a tensor.

    Args:
        name: a name of a model's or of a PEFT adapter's file.
        value: the whole array.
        team: ``Workers``.

    Returns:
        A part of the rows or columns; the array itself where every worker needs it. The bias of a row-split linear is
        zero on all workers but the first, since the workers' outputs are summed.
    """
    if team.world == 1:
        return value
    axis = split_axis(name)
    if axis is None:
        summed = name.endswith(tuple(f"{linear}.bias" for linear in ROW))
        return np.zeros_like(value) if summed and not team.first else value
    size = value.shape[axis] // team.world
    part = [slice(None)] * value.ndim
    part[axis] = slice(team.rank * size, (team.rank + 1) * size)
    return np.ascontiguousarray(value[tuple(part)])


def joined(name: str, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The whole of a tensor of an adapter's file from all workers' parts; the inverse of :func:`share_of`."""
    axis = split_axis(name)
    return parts[0] if axis is None else np.ascontiguousarray(np.concatenate(parts, axis))


def split_axis(name: str) -> Optional[int]:
    """The axis along which a tensor is split, or None where every worker has it whole; name as for :func:`share_of`."""
    found = _TENSOR.search(name)
    if found is None:
        return None
    row, field = found["linear"] in ROW, found["field"]
    if field == "bias":
        return None if row else 0
    if field == ("lora_B.weight" if row else "lora_A.weight"):
        return None
    return 1 if row else 0


class Shares:
    """Weights by name, cut when they are read.

    Args:
        weights: mapping of Hugging Face names to what is stored under them, or to whole arrays; team: ``Workers``.
    """

    def __init__(self, weights: Weights, team: Workers) -> None:
        self.weights, self.team = weights, team

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __getitem__(self, name: str) -> Union[StoredWeight, np.ndarray]:
        found = self.weights[name]
        if isinstance(found, np.ndarray):
            return share_of(name, found, self.team)
        if not isinstance(found, StoredWeight) or not found.format.is_float:
            return share_of(name, found.values(), self.team)
        part = share_of(name, found.data, self.team)  # a view where it is rows of the file
        return StoredWeight(found.format, part.shape, part)
