"""A whole model in quantisation-aware training: replace its linears, train, export integers.

    quantized = quantize(decoder, LrQatConfig(bits=4, lora_alpha=32))   # train quantized.trainable_params()
    quantized.export("model-w4", tokenizer_source)                      # a folder for load_model

LR-QAT changes the base model and has no slots, so it stands beside the adapter methods, not among them: LoRA adapters
and the contrast come on top of the exported model.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
from safetensors.numpy import save_file

from mindspore import ParameterTuple, Tensor, nn

from colora_ms import runtime
from colora_ms.adapters import tree
from colora_ms.adapters.slots import to_float32
from colora_ms.adapters.store import read_config, regular_file, write_folder
from colora_ms.errors import AdapterError, ConfigError, near
from colora_ms.models.formats import StoredWeight
from colora_ms.models.leaf import Leaf
from colora_ms.models.replacing import check_names, replace_cells
from colora_ms.models.safetensors_file import SafetensorsFile
from colora_ms.quantization.cells import LrQatLinear
from colora_ms.quantization.config import LrQatConfig
from colora_ms.quantization.export import write_quantized_folder

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def quantize(net: nn.Cell, config: LrQatConfig, seed: int = 0) -> QuantizedModel:
    """Put quantised linears in the place of a decoder's linears, in place. All other parameters are frozen.

    Args:
        net: :class:`colora_ms.models.decoder.Decoder` with float weights and without adapters.
        config: :class:`LrQatConfig`.
        seed: of the start of the low-rank factors; each linear has its own stream.

    Returns:
        :class:`QuantizedModel`.

    Raises:
        ConfigError: no linear matches, or a group does not divide the inputs of one; the model is unchanged.
        AdapterError: the model has adapters, or its linears are integers already, or factors.
    """
    targets = _targets(net, config)
    for path, cell in targets.items():
        config.grid.group_of(cell.in_features, path)
    check_names(net)
    for parameter in net.get_parameters():
        parameter.requires_grad = False
    cells = {}
    for path, cell in targets.items():
        random = np.random.default_rng([seed, zlib.crc32(path.encode())])
        cells[path] = LrQatLinear(cell, path, cell.base_values()["weight"], config, random)
        cell.weight = None  # the pretrained weight is not needed again: let its memory go
    replace_cells(net, cells)
    return QuantizedModel(net, config, cells)


def _targets(net, config):
    """{path: Linear} of what the config names."""
    decomposed = [path for path, cell in tree.cells_by_name(net).items() if isinstance(cell, Leaf) and cell.decomposed]
    if decomposed:
        raise AdapterError(f"{decomposed[0]} is decomposed into factors, which are not quantised; recompose(model) "
                           "first, or write the products with colora-ms convert and quantise those")
    found = {path: cell for path, cell in tree.cells_by_name(net).items()
             if isinstance(cell, Leaf) and cell.kind == "linear" and cell.plain
             and path.rsplit(".", 1)[-1] not in tree.HEADS}
    if not found:
        raise AdapterError("the model has no plain linears: it has adapters already, or is quantised; start from the "
                           "unadapted float model")
    integers = [path for path, cell in found.items() if cell.format.join is not None]
    if integers:
        raise AdapterError(f"{integers[0]} holds integers already; quantisation-aware training starts from float "
                           "weights (weight_format float32 or bfloat16)")
    if config.target_modules is None:
        return found
    chosen, unused = {}, []
    for name in config.target_modules:
        hits = {path: cell for path, cell in found.items() if path == name or path.endswith("." + name)}
        chosen.update(hits)
        unused += [name] * (not hits)
    if unused:
        ends = sorted({path.rsplit(".", 1)[-1] for path in found})
        raise ConfigError(f"target_modules: no linear is called {unused[0]!r}; there are {', '.join(ends)}."
                          + near(unused[0], ends))
    return {path: cell for path, cell in found.items() if path in chosen}


class _Integers(nn.Cell):
    """The integers of one linear as a graph of its own, so that export computes what the training graph computes."""

    def __init__(self, matmul):
        super().__init__(auto_prefix=False)
        self.matmul = matmul

    def construct(self, phi, low, up, down):
        return self.matmul.integers(phi, low, up, down)


class QuantizedModel:
    """What :func:`quantize` returns.

    Attributes:
        net: the decoder; config: :class:`LrQatConfig`; cells: {path: :class:`LrQatLinear`}.
    """

    def __init__(self, net: nn.Cell, config: LrQatConfig, cells: dict[str, LrQatLinear]) -> None:
        self.net, self.config, self.cells = net, config, cells
        self._graphs = {}

    def trainable_params(self) -> ParameterTuple:
        """The Parameters that training changes; empty for method "rtn"."""
        return ParameterTuple([item for cell in self.cells.values() for item in cell.get_parameters()
                               if item.requires_grad])

    # -- saving --------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the trained values (scales and factors) and the config; whole or not at all.

        Raises:
            AdapterError: the folder cannot be written.
        """
        values = {"peft_type": "LRQAT", **self.config.to_dict()}
        arrays = {f"{path}.{field}": np.ascontiguousarray(item.asnumpy())
                  for path, cell in self.cells.items() for field, item in cell.trained().items()}

        def write(temporary):
            save_file(arrays, str(temporary / _WEIGHTS), metadata={"format": "np"})
            (temporary / _CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

        write_folder(folder, write)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Put the values of :meth:`save` back.

        Raises:
            AdapterError: lists every missing, unexpected, mis-shaped or non-finite tensor and every setting that
                differs; nothing is changed then.
        """
        stored = read_config(folder)
        if not isinstance(stored, dict) or stored.get("peft_type") != "LRQAT":
            raise AdapterError(f"{folder} holds no LR-QAT values (peft_type is "
                               f"{stored.get('peft_type') if isinstance(stored, dict) else stored!r:.60})")
        problems = [f"{name} is {stored.get(name)!r} there, {value!r} here"
                    for name, value in self.config.to_dict().items() if stored.get(name) != value]
        file = SafetensorsFile(regular_file(Path(folder) / _WEIGHTS))
        wanted = {f"{path}.{field}": item for path, cell in self.cells.items()
                  for field, item in cell.trained().items()}
        problems += [f"{name} is missing" for name in wanted if name not in file.entries]
        problems += [f"{name} is unexpected" for name in file.entries if name not in wanted]
        values = {}
        for name, item in wanted.items():
            if name not in file.entries:
                continue
            if file.shape(name) != tuple(item.shape):
                problems.append(f"{name} has shape {file.shape(name)}, expected {tuple(item.shape)}")
                continue
            values[name] = np.array(file.read(name))
            if not np.isfinite(values[name]).all():
                problems.append(f"{name} holds non-finite values")
        if problems:
            more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
            raise AdapterError(f"{folder} does not fit this model: " + "; ".join(problems[:8]) + more)
        for name, item in wanted.items():
            item.set_data(Tensor(values[name]))

    # -- integers ------------------------------------------------------------------------------

    def exported(self, path: str) -> StoredWeight:
        """One linear as integers, with a scale (out, groups)."""
        cell = self.cells[path]
        key = (cell.out_features, cell.in_features)
        graph = self._graphs.setdefault(key, _Integers(cell.matmul))
        data = runtime.run(graph, cell.phi, cell.low, cell.up, cell.down).asnumpy()
        return StoredWeight(cell.grid.container(cell.in_features), key, data, cell.exported_scale())

    def export(self, folder: str | os.PathLike[str], tokenizer_source: Any = None, overwrite: bool = False,
               files: Optional[Mapping[str, str]] = None) -> str:
        """Write the model as integers and scales, for :func:`colora_ms.load_model`.

        In float32 the exported model gives the same numbers as the training forward, bit for bit.

        Args:
            folder: the folder to make.
            tokenizer_source: what ``load_tokenizer`` takes (the base model's folder or file), or None.
            overwrite: replace a folder that is not empty.
            files: {name: path} of files to copy into the folder, in the place of those of the tokenizer.

        Returns:
            The path as ``str``.

        Raises:
            CheckpointError: the folder is in the way or cannot be written; AdapterError: a scale is not finite.
                Nothing is left behind.
        """
        quantized = {path: self.exported(path) for path in self.cells}
        wrong = [path for path, stored in quantized.items() if not np.isfinite(stored.scale).all()]
        if wrong:
            raise AdapterError(f"the scales of {wrong[0]} are not finite ({len(wrong)} linears in all); train with a "
                               "lower learning rate")
        tensors = {parameter.name: parameter for parameter in self.net.get_parameters()}
        return write_quantized_folder(folder, self.net.config, _AsArrays(tensors), quantized, self._settings(),
                                      tokenizer_source, overwrite, files)

    def _settings(self):
        config = self.config
        return {"bits": config.bits, "group_size": config.group, "symmetric": config.symmetric,
                "activations": config.activations, "method": config.method}

    def sizes(self) -> tuple[int, int]:
        """(bytes of the quantised linears as integers and scales, bytes of the same linears in float32)."""
        stored = plain = 0
        for cell in self.cells.values():
            weights = cell.out_features * cell.in_features
            stored += cell.out_features * cell.grid.container(cell.in_features).row_bytes(cell.in_features,
                                                                                         cell.scale.shape[1])
            plain += 4 * weights
        return stored, plain


class _AsArrays:
    """Parameters by name, read as float32 arrays when asked for."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __getitem__(self, name):
        return to_float32(self.parameters[name])
