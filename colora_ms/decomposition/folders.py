"""Decomposed models as folders: from a live model, and from file to file with one matrix in memory at a time.

The layout is that of :mod:`colora_ms.models.low_rank_folder`, which reads it.
"""

from __future__ import annotations

import collections.abc
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Optional

import numpy as np

from mindspore import nn

from colora_ms.adapters.slots import to_float32
from colora_ms.decomposition.decompose import Decomposed, factors_of, is_decomposed, plain_cells
from colora_ms.decomposition.plan import LrdPlan, linear_shapes
from colora_ms.errors import CheckpointError
from colora_ms.models.checkpoint import Checkpoint
from colora_ms.models.config import DecoderConfig
from colora_ms.models.formats import weight_format
from colora_ms.models.hf_folder import write_hf_folder, write_model_folder
from colora_ms.models.low_rank_folder import (
    ARCHITECTURE,
    CORE,
    FORMAT,
    INNER,
    MODEL_TYPE,
    OUTER,
    factor_shapes,
    low_rank_shapes,
)


def write_low_rank_folder(path: str | os.PathLike[str], config: DecoderConfig, modules: dict[str, tuple[int, int]],
                          tensors: Mapping[str, np.ndarray], tokenizer_source: Any = None, dtype: str = "float32",
                          overwrite: bool = False) -> str:
    """Write a decomposed model; the folder appears complete or not at all.

    Args:
        path: the folder to make.
        config: the base model's DecoderConfig.
        modules: {module: (rank, factors)}; not empty.
        tensors: mapping of the names of :func:`low_rank_shapes` to arrays, read one at a time.
        tokenizer_source, dtype, overwrite: as in ``write_hf_folder``.

    Raises:
        CheckpointError: as ``write_hf_folder``. Nothing is left behind.
    """
    values = config.to_hf()
    values = dict(values, model_type=MODEL_TYPE, architectures=[ARCHITECTURE], base_model_type=values["model_type"],
                  low_rank={"format": FORMAT, "modules": {name: {"rank": int(rank), "factors": int(factors)}
                                                          for name, (rank, factors) in modules.items()}})
    return write_model_folder(path, values, low_rank_shapes(config, modules), tensors, tokenizer_source, dtype,
                              overwrite=overwrite)


def save_decomposed(model: nn.Cell, folder: str | os.PathLike[str], tokenizer: Any = None, dtype: str = "float32",
                    overwrite: bool = False) -> str:
    """Write a decomposed decoder as a folder that ``load_model`` reads.

    Args:
        model: float32 or bfloat16, decomposed, without adapters.
        folder: the folder to make; it appears complete or not at all.
        tokenizer: what ``load_tokenizer`` takes, or a Tokenizer, or None.
        dtype: "float32", "bfloat16" or "float16", of all tensors on disk.
        overwrite: replace a folder that is there.

    Returns:
        The path as ``str``.

    Raises:
        AdapterError: the model has adapters. CheckpointError: integer weights, nothing decomposed, or the folder cannot
            be written.
    """
    chains = {path: cell for path, cell in plain_cells(model).items() if is_decomposed(cell)}
    if not chains:
        raise CheckpointError("nothing is decomposed in this model; call decompose(model, plan) first")
    if not weight_format(model.weight_format).is_float:
        raise CheckpointError(f"a model in {model.weight_format} cannot be saved; load and decompose it as float32 or "
                              "bfloat16, and choose the integer format when loading the decomposed folder")
    modules = {path: (cell.rank, cell.factors) for path, cell in chains.items()}
    parameters = {parameter.name: parameter for parameter in model.get_parameters()}
    packed = {f"{path}.weight": cell for path, cell in plain_cells(model).items()
              if path not in chains and getattr(cell, "format", None) is not None and not cell.format.is_float}

    def values(name):
        return packed[name].base_values()["weight"] if name in packed else to_float32(parameters[name])

    tensors = _Tensors(low_rank_shapes(model.config, modules), values)
    return write_low_rank_folder(folder, model.config, modules, tensors, tokenizer, dtype, overwrite)


def decompose_checkpoint(checkpoint: Checkpoint, plan: LrdPlan, folder: str | os.PathLike[str], dtype: str = "float32",
                         dense: bool = False, overwrite: bool = False,
                         on_row: Optional[Callable[[Decomposed], Any]] = None) -> list[Decomposed]:
    """Decompose a model from file to file, one matrix in memory at a time.

    Args:
        checkpoint: what ``open_checkpoint`` returned.
        plan: :class:`LrdPlan`.
        folder: the folder to make; it appears complete or not at all.
        dtype: as in :func:`save_decomposed`.
        dense: write the products in place of the factors: a plain Hugging Face folder of the original size.
        on_row: called with every :class:`Decomposed`.

    Returns:
        list of :class:`Decomposed`.

    Raises:
        ConfigError: the plan does not fit the model. CheckpointError: the model is decomposed already, or the folder
            cannot be written.
    """
    if checkpoint.low_rank:
        raise CheckpointError(f"{checkpoint.path} is decomposed already; start from the original model")
    pieces = plan.resolve(linear_shapes(checkpoint.config))
    modules = {path: (piece.rank, piece.factors) for path, piece in pieces.items()}
    owner = {name: path for path, piece in pieces.items()
             for name in factor_shapes(path, piece.shape, piece.rank, piece.factors)}
    report, last = [], {}

    def decomposed(path):
        if path not in last:
            found = factors_of(path, checkpoint.tensors[f"{path}.weight"], pieces[path])
            last.clear()
            last[path] = found
            report.append(Decomposed.of(path, pieces[path], found))
            if on_row is not None:
                on_row(report[-1])
        return last[path]

    def read(name):
        if dense:
            path = name[:-len(".weight")]
            return decomposed(path).product if path in pieces else checkpoint.tensors[name]
        if name in owner:
            found = decomposed(owner[name])
            return {INNER: found.inner, CORE: found.core, OUTER: found.outer}[name[len(owner[name]) + 1:]]
        return checkpoint.tensors[name]

    if dense:
        write_hf_folder(folder, checkpoint.config, _Tensors(checkpoint.config.parameter_shapes(), read),
                        checkpoint.tokenizer_source, dtype, overwrite=overwrite)
    else:
        tensors = _Tensors(low_rank_shapes(checkpoint.config, modules), read)
        write_low_rank_folder(folder, checkpoint.config, modules, tensors, checkpoint.tokenizer_source, dtype,
                              overwrite)
    return report


class _Tensors(collections.abc.Mapping):
    """Arrays by name, made when they are asked for; ``shapes`` without making them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
