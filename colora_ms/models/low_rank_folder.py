"""Reading of folders of decomposed models, which ``colora_ms.decomposition`` writes.

It is a Hugging Face folder with factors in the place of some weights:
``config.json`` is the base model's with ``model_type`` "colora_low_rank", so that no other program takes it for a
complete model, ``base_model_type``, and ``low_rank``: {"format": 1, "modules": {module: {"rank", "factors"}}}. The
tensor ``<module>.weight`` is replaced by ``<module>.inner.weight`` (r, in), ``<module>.core.weight`` (r, r; with three
factors only) and ``<module>.outer.weight`` (out, r).
"""

from __future__ import annotations

import math
import os
from typing import Union

from colora_ms.errors import CheckpointError, near
from colora_ms.files import read_json
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import find_family
from colora_ms.models.formats import StoredFactors, StoredWeight
from colora_ms.models.hf_folder import SafetensorsFolder, parse_config

MODEL_TYPE = "colora_low_rank"
ARCHITECTURE = "ColoraLowRankForCausalLM"
FORMAT = 1

#: Last parts of the names of a decomposed linear's factors, in memory and on disk.
INNER, CORE, OUTER = "inner.weight", "core.weight", "outer.weight"


def is_low_rank(folder: str) -> bool:
    """Whether a folder's config.json says that it holds a decomposed model."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        return False
    values = read_json(path)
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def factor_shapes(path: str, shape: tuple[int, int], rank: int, factors: int) -> dict[str, tuple[int, int]]:
    """{tensor name: shape} of one decomposed module of shape (out, in)."""
    shapes = {f"{path}.{INNER}": (rank, shape[1])}
    if factors == 3:
        shapes[f"{path}.{CORE}"] = (rank, rank)
    shapes[f"{path}.{OUTER}"] = (shape[0], rank)
    return shapes


def low_rank_shapes(config: DecoderConfig, modules: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """All tensors of a decomposed model: {name: shape}; modules: {module: (rank, factors)}."""
    shapes = {}
    for name, shape in config.parameter_shapes().items():
        path = name[:-len(".weight")] if name.endswith(".weight") else None
        if path in modules:
            shapes.update(factor_shapes(path, shape, *modules[path]))
        else:
            shapes[name] = shape
    return shapes


def read_low_rank_config(folder: str) -> tuple[DecoderConfig, dict[str, tuple[int, int]]]:
    """(the base model's config, {module: (rank, factors)}) of a decomposed model's folder.

    Raises:
        CheckpointError: an unreadable config, another format, or modules that the model does not have; ConfigError as
            for other folders.
    """
    file = os.path.join(folder, "config.json")
    values = read_json(file)
    base = values.get("base_model_type")
    known = find_family(base)
    config = parse_config(folder, file, dict(values, model_type=base,
                                             architectures=[known.architecture] if known else None))
    return config, _modules(file, values.get("low_rank"), config)


class LowRankTensors:
    """The tensors of a decomposed model's files, by the names of the base model.

    Args:
        store: the files; modules: {module: (rank, factors)}.
    """

    def __init__(self, store: SafetensorsFolder, modules: dict[str, tuple[int, int]]) -> None:
        self._store, self.modules = store, modules

    def stored(self, name: str) -> Union[StoredWeight, StoredFactors]:
        """What is stored under a name: for the weight of a decomposed linear its factors."""
        path = name.removesuffix(".weight")
        if path not in self.modules:
            return self._store.stored(name)
        core = self._store.stored(f"{path}.{CORE}") if self.modules[path][1] == 3 else None
        return StoredFactors(self._store.stored(f"{path}.{INNER}"), self._store.stored(f"{path}.{OUTER}"), core)


def parameter_count(config: DecoderConfig, modules: dict[str, tuple[int, int]]) -> int:
    """Weights of a decomposed model as it is stored."""
    return sum(math.prod(shape) for shape in low_rank_shapes(config, modules).values())


def _modules(file, values, config):
    """{module: (rank, factors)} of a config's ``low_rank``, checked against the model's linears."""
    if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("modules"), dict):
        raise CheckpointError(f"{file}: low_rank is {values!r:.80}, expected a mapping with format {FORMAT} and "
                              "modules; the folder may have been written by a newer version")
    shapes = config.parameter_shapes()
    linears = {name[:-len(".weight")]: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    problems, modules = [], {}
    for path, entry in values["modules"].items():
        if path not in linears:
            problems.append(f"{path!r:.100} is no linear of the model.{near(path, linears, 1)}")
            continue
        rank, factors = (entry.get("rank"), entry.get("factors")) if isinstance(entry, dict) else (None, None)
        limit = min(linears[path])
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= limit or factors not in (2, 3):
            problems.append(f"{path} has {entry!r:.80}, expected a rank from 1 to {limit} and 2 or 3 factors")
            continue
        modules[path] = (rank, factors)
    if not problems and not modules:
        problems.append("it names no module")
    if problems:
        more = f" ({len(problems) - 1} more)" if problems[1:] else ""
        raise CheckpointError(f"{file}: low_rank cannot be used: {problems[0]}{more}")
    return modules
