"""Reading of model folders whose linears are stored as integers and scales (written by ``colora_ms.quantization``).

Hugging Face's layout with two additions: ``config.json`` has a ``quantization_config`` with
``quant_method: colora_int``, and ``model.safetensors`` holds, for every quantised linear,

    <module>.weight        U8 (out, in / 2), two 4-bit values a byte (low nibble = even column,
                           value + 8), or I8 (out, in): the formats int4 and int8
    <module>.weight_scale  F32 (out, groups); groups = 1 is one scale an output channel

2- and 3-bit weights take the 4-bit container: their integers are a part of -8 .. 7. Every other
tensor is F32.
"""

from __future__ import annotations

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.activation_quant import ACTIVATIONS, activation_bits
from colora_ms.models.formats import FORMATS, StoredWeight, format_of_code
from colora_ms.models.hf_folder import SafetensorsFolder

METHOD = "colora_int"

_CODES = tuple(one.code for one in FORMATS.values() if one.scaled and one.tag is not None)


class QuantizedTensors:
    """The tensors of a folder with integer linears, by name.

    Attributes:
        shapes: ``{name: shape}`` of the model's tensors, as if they were float.
        modules: names of the quantised linears.
        settings: the ``quantization_config``.

    Raises:
        CheckpointError: lists integer weights without scales, scales without weights, wrong dtypes
            and shapes, and settings that are not known.
    """

    def __init__(self, store: SafetensorsFolder, settings: dict, where: str) -> None:
        self._store, self.settings = store, settings
        preset = settings.get("activations")
        if preset is not None and preset not in ACTIVATIONS:
            raise CheckpointError(f"{where}: quantization_config asks for activations {preset!r}, known are "
                                  f"{', '.join(ACTIVATIONS)}; it needs a newer version")
        scales = [name for name in store.shapes if name.endswith(".weight_scale")]
        self.modules = [name.removesuffix(".weight_scale") for name in scales]
        integer = {name for name in store.shapes if store.dtype(name) in _CODES}
        problems = [f"{name} holds integers, but there is no {name}_scale"
                    for name in sorted(integer) if name.removesuffix(".weight") not in self.modules]
        self.shapes = {name: shape for name, shape in store.shapes.items() if name not in scales}
        for module in self.modules:
            problems += self._check(module, integer)
        if problems:
            raise CheckpointError(f"{where}: the quantised tensors cannot be used: {problems[0]}"
                                  + (f" ({len(problems) - 1} more)" if problems[1:] else ""))

    def _check(self, module, integer):
        weight, scale = f"{module}.weight", f"{module}.weight_scale"
        if weight not in integer:
            return [f"{scale} is there, but {weight} holds no integers"]
        stored, shape = self._store.shapes[weight], self._store.shapes[scale]
        out, columns = format_of_code(self._store.dtype(weight)).shape(stored) if len(stored) == 2 else (0, 0)
        self.shapes[weight] = (out, columns)
        kind = self._store.dtype(scale)
        if kind != "F32" or len(shape) != 2 or shape[0] != out or not shape[1] or columns % shape[1]:
            return [f"{scale} has shape {tuple(shape)} {kind}, expected float32 ({out}, groups) with "
                    f"a number of groups that divides {columns}"]
        return []

    def stored(self, name: str) -> StoredWeight:
        """A tensor as it lies in the file: integers are views of the mapped bytes."""
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return self._store.stored(name)
        kind = format_of_code(self._store.dtype(name))
        data = np.frombuffer(self._store.raw(name), kind.dtype).reshape(self._store.shapes[name])
        return StoredWeight(kind, self.shapes[name], data, self._store.read(f"{module}.weight_scale"),
                            activations=activation_bits(self.settings.get("activations"), module))
