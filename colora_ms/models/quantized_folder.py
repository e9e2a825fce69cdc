"""Model folders whose linears are stored as integers and scales.

Hugging Face's layout with two additions: ``config.json`` has a ``quantization_config`` with
``quant_method: colora_int``, and ``model.safetensors`` holds, for every quantised linear,

    <module>.weight        U8 (out, in / 2), two 4-bit values a byte (low nibble = even column,
                           value + 8), or I8 (out, in)
    <module>.weight_scale  F32 (out, groups); groups = 1 is one scale an output channel

2- and 3-bit weights take the 4-bit container: their integers are a part of -8 .. 7. Every other
tensor is F32. Reading gives float32 (``quantized`` of the ``Checkpoint`` has the integers), so that
whatever asks for weights sees the right numbers.
"""

import os

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.activation_quant import ACTIVATIONS, ActivationQuantizedLinear, \
    activation_bits
from colora_ms.models.hf_folder import SINGLE, new_folder, write_description
from colora_ms.models.quantize import dequantize, unpack_int4
from colora_ms.models.replacing import replace_cells

METHOD = "colora_int"
_DTYPES = {"U8": np.uint8, "I8": np.int8}


def dequantized(weight, scale):
    """Container and scale (out, groups) as float32 (out, in): one rounding a weight, as in the kernels."""
    q = unpack_int4(weight) if weight.dtype == np.uint8 else weight
    return dequantize(q, scale)


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

    def __init__(self, store, settings, where):
        self._store, self.settings = store, settings
        preset = settings.get("activations")
        if preset is not None and preset not in ACTIVATIONS:
            raise CheckpointError(f"{where}: quantization_config asks for activations {preset!r}, known are "
                                  f"{', '.join(ACTIVATIONS)}; it needs a newer version")
        scales = [name for name in store.shapes if name.endswith(".weight_scale")]
        self.modules = [name.removesuffix(".weight_scale") for name in scales]
        integer = {name for name in store.shapes if store.dtype(name) in _DTYPES}
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
        out, columns = self._store.shapes[weight] if len(self._store.shapes[weight]) == 2 else (0, 0)
        if self._store.dtype(weight) == "U8":
            columns *= 2
        shape = self._store.shapes[scale]
        self.shapes[weight] = (out, columns)
        if self._store.dtype(scale) != "F32" or len(shape) != 2 or shape[0] != out or not shape[1] or columns % shape[1]:
            return [f"{scale} has shape {tuple(shape)} {self._store.dtype(scale)}, expected float32 ({out}, groups) with "
                    f"a number of groups that divides {columns}"]
        return []

    def stored(self, module):
        """(weight, scale) of a quantised linear as they lie in the file."""
        name = f"{module}.weight"
        raw = self._store.raw(name).view(_DTYPES[self._store.dtype(name)])
        return raw.reshape(self._store.shapes[name]), self._store.read(f"{module}.weight_scale")

    def read(self, name):
        """A tensor as float32, integers multiplied out."""
        module = name.removesuffix(".weight")
        if module in self.modules:
            return dequantized(*self.stored(module))
        return self._store.read(name)

    def install(self, decoder):
        """Give a decoder that was built from these tensors the integers themselves.

        Args:
            decoder: :class:`colora_ms.models.decoder.Decoder` without adapters.
        """
        from mindspore import Parameter, Tensor
        cells = dict(decoder.cells_and_names())
        for module in self.modules:
            weight, scale = self.stored(module)
            cell = cells[module]
            # A Cell gives its Parameters its own name; the checkpoint's name is the one that counts.
            cell.weight = Parameter(Tensor(weight.copy()), name=f"{module}.weight", requires_grad=False)
            cell.weight_scale = Parameter(Tensor(scale.copy()), name=f"{module}.weight_scale", requires_grad=False)
            cell.weight.name, cell.weight_scale.name = f"{module}.weight", f"{module}.weight_scale"
        rounding = {module: activation_bits(self.settings.get("activations"), module) for module in self.modules}
        replace_cells(decoder, {module: ActivationQuantizedLinear(cells[module], *bits)
                                for module, bits in rounding.items() if any(bits)})


def write_quantized_folder(path, config, tensors, quantized, settings, tokenizer_source=None, overwrite=False,
                           files=None):
    """Write a model with integer linears; the folder appears complete or not at all.

    Args:
        path: the folder to make; an empty folder may exist there.
        config: ``DecoderConfig``.
        tensors: mapping of Hugging Face names to float32 arrays for all that is not quantised.
        quantized: ``{module: (weight, scale)}``, see the head of this module.
        settings: what else ``quantization_config`` should say (bits, group, activations ...).
        tokenizer_source: what ``load_tokenizer`` takes, or ``None``.
        overwrite: replace a folder that is not empty.
        files: {name: path} of files to copy into the folder, in the place of those of the tokenizer.

    Returns:
        The path as ``str``.

    Raises:
        CheckpointError: nothing to quantise, a folder in the way, or a place that cannot be
            written. Nothing is left behind.
    """
    path = os.path.abspath(os.fspath(path))
    if not quantized:
        raise CheckpointError("no linear is quantised; write the model as a float folder instead")
    with new_folder(path, overwrite) as work:
        values = dict(config.to_hf(), torch_dtype="float32", quantization_config={"quant_method": METHOD, **settings})
        write_description(work, values, tokenizer_source, files)
        _write_tensors(work, config, tensors, quantized)
    return path


def _write_tensors(folder, config, tensors, quantized):
    from safetensors.numpy import save_file
    arrays = {}
    for name in config.parameter_shapes():
        module = name.removesuffix(".weight")
        if module in quantized:
            weight, scale = quantized[module]
            arrays[name] = np.ascontiguousarray(weight)
            arrays[f"{name}_scale"] = np.ascontiguousarray(scale, np.float32)
        else:
            arrays[name] = np.ascontiguousarray(tensors[name], np.float32)
    file = os.path.join(folder, SINGLE)
    save_file(arrays, file, metadata={"format": "np"})
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
