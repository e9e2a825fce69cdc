"""Reading of Hugging Face folders whose linears are GPTQ, AWQ (gemm) or compressed-tensors integers.

What ``quantization_config`` says (old GPTQ folders: ``quantize_config.json``) is read, or refused by name. Weights
become int4_zero or int8_zero, with GPTQ's activation order their ordered forms; what a folder leaves in float stays as
it is. Layouts: :mod:`colora_ms.models.packed_layouts`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.models.formats import StoredWeight
from colora_ms.models.hf_folder import SafetensorsFolder
from colora_ms.models.packed_layouts import Integers, awq, compressed, gptq

#: {quant_method (``hf_folder.PACKED_METHODS``): suffixes of a linear's tensors, first the one that every linear has}.
METHODS = {"gptq": ("qweight", "qzeros", "scales", "g_idx"), "awq": ("qweight", "qzeros", "scales"),
           "compressed-tensors": ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight")}

_NOT_READ = {"dynamic": (None, {}, []), "pack_dtype": (None, "int32"), "transform_config": (None, {}),
             "sparsity_config": (None, {}), "kv_cache_scheme": (None,)}


class PackedTensors:
    """The tensors of such a folder, by name.

    Args:
        store: the folder's tensors; settings: of ``hf_folder.packed_settings``; expected: {name: shape} of the model's
            tensors; where: path, for messages.

    Attributes:
        shapes: ``{name: shape}`` of the model's tensors, as if they were float.

    Raises:
        CheckpointError: a setting that is not implemented, or tensors that do not fit together.
    """

    def __init__(self, store: SafetensorsFolder, settings: dict, expected: Mapping[str, tuple[int, ...]],
                 where: str) -> None:
        self._store, self._where, self._settings = store, where, settings
        self.method = settings["quant_method"]
        self._check_settings()
        suffixes = METHODS[self.method]
        first = f".{suffixes[0]}"
        self.modules = [name.removesuffix(first) for name in store.shapes if name.endswith(first)]
        parts = {f"{module}.{suffix}" for module in self.modules for suffix in suffixes}
        self.shapes = {name: shape for name, shape in store.shapes.items() if name not in parts}
        for module in self.modules:
            self.shapes[f"{module}.weight"] = self._shape(module, expected.get(f"{module}.weight"))
        # AutoGPTQ writes biases of zeros where the model has none.
        for name in [name for name in self.shapes if name.endswith(".bias") and name not in expected]:
            if name.removesuffix(".bias") in self.modules and not store.read(name).any():
                del self.shapes[name]
        self._told = False

    def stored(self, name: str) -> StoredWeight:
        """A tensor as it is computed with."""
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return self._store.stored(name)
        read = {"gptq": self._gptq, "awq": self._awq, "compressed-tensors": self._compressed}[self.method]
        return read(module).stored()

    def check_dtypes(self, names: Iterable[str]) -> None:
        """As of the store, of what is no packed linear."""
        self._store.check_dtypes(name for name in names if name.removesuffix(".weight") not in self.modules)

    def same_bytes(self, first: str, second: str) -> bool:
        """As of the store."""
        return self._store.same_bytes(first, second)

    # -- settings -----------------------------------------------------------------------------------------------------

    def _check_settings(self):
        settings = self._settings
        for key, allowed in _NOT_READ.items():
            if settings.get(key) not in allowed:
                raise self._refused(f"{key} is {settings[key]!r:.80}")
        if self.method == "compressed-tensors":
            return self._check_groups()
        bits = settings.get("bits", settings.get("w_bit"))
        if bits not in ((4, 8) if self.method == "gptq" else (4,)):
            raise self._refused(f"bits is {bits!r}, expected {'4 or 8' if self.method == 'gptq' else '4'}")
        self.bits = bits
        size = settings.get("group_size", settings.get("q_group_size"))
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise self._refused(f"group_size is {size!r}, expected a positive number or -1")
        self.group_size = size
        if self.method == "gptq":
            if settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2", None):
                raise self._refused(f"checkpoint_format is {settings['checkpoint_format']!r}, expected gptq or gptq_v2")
            return None
        if str(settings.get("version", "gemm")).lower() != "gemm":
            raise self._refused(f"version is {settings['version']!r}, expected gemm")
        if settings.get("zero_point", True) is not True:
            raise self._refused("zero_point is false")
        return None

    def _check_groups(self):
        kind = self._settings.get("format")
        if kind not in ("pack-quantized", "int-quantized", "naive-quantized"):
            raise self._refused(f"format is {kind!r}, expected pack-quantized or int-quantized")
        groups = self._settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self._refused(f"config_groups is {groups!r:.80}, not a group of settings")
        bits, self.sizes = set(), set()
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict) or weights.get("type") != "int" or weights.get("num_bits") not in (4, 8):
                raise self._refused(f"weights of {name} are {weights!r:.120}, expected integers of 4 or 8 bits")
            for what in ("input_activations", "output_activations"):
                if group.get(what) is not None:
                    raise self._refused(f"{what} of {name} are rounded (W{weights['num_bits']}A"
                                        f"{group[what].get('num_bits') if isinstance(group[what], dict) else '?'})")
            if weights.get("strategy") not in ("group", "channel", "tensor"):
                raise self._refused(f"strategy of {name} is {weights.get('strategy')!r}")
            if weights["strategy"] == "group":
                size = weights.get("group_size")
                if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                    raise self._refused(f"group_size of {name} is {size!r}, expected a positive number")
                self.sizes.add(size)
            if weights.get("actorder") not in (None, False, "weight", "static"):
                raise self._refused(f"actorder of {name} is {weights['actorder']!r}")
            bits.add(weights["num_bits"])
        if len(bits) > 1:
            raise self._refused(f"its groups have {sorted(bits)} bits, expected one number")
        self.bits = bits.pop()

    def _refused(self, what):
        return CheckpointError(f"{self._where}: the {self.method} setting {what}, which is not implemented; use "
                               "another quantisation of the model, a GGUF file, or the unquantised model")

    # -- tensors ------------------------------------------------------------------------------------------------------

    def _problem(self, name, what):
        return CheckpointError(f"{self._where}: {name} {what}")

    def _part(self, module, suffix, kinds, shape):
        """A tensor of a linear, checked: its dtype is one of ``kinds``, its shape ``shape`` (None: any size)."""
        name = f"{module}.{suffix}"
        if name not in self._store.shapes:
            raise self._problem(name, "is missing")
        found, kind = self._store.shapes[name], self._store.dtype(name)
        if kind not in kinds or len(found) != len(shape) or any(
                want is not None and size != want for size, want in zip(found, shape)):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise self._problem(name, f"has shape {tuple(found)} {kind}, expected ({sizes}) {' or '.join(kinds)}")
        if kind in ("F16", "BF16", "F32"):
            return self._store.read(name)
        return np.frombuffer(self._store.raw(name), {"I32": "<i4", "I64": "<i8", "I8": "|i1"}[kind]).reshape(found)

    def _shape(self, module, expected):
        if self.method == "compressed-tensors":
            plain = self._store.shapes.get(f"{module}.weight")
            if plain is not None:
                return plain
            if f"{module}.weight_shape" not in self._store.shapes:
                raise self._problem(f"{module}.weight_shape", "is missing")
            return tuple(int(size) for size in self._part(module, "weight_shape", ("I64", "I32"), (2,)))
        words = self._store.shapes[f"{module}.qweight"]
        if len(words) != 2:
            raise self._problem(f"{module}.qweight", f"has shape {tuple(words)}, expected two dimensions")
        per_word = 32 // self.bits
        return (words[1], words[0] * per_word) if self.method == "gptq" else (words[1] * per_word, words[0])

    def _groups(self, columns):
        """(in,) group of each input, and how many groups there are."""
        size = columns if self.group_size == -1 else self.group_size
        return np.arange(columns) // size, -(-columns // size)

    def _gptq(self, module) -> Integers:
        out, columns = self.shapes[f"{module}.weight"]
        group, count = self._groups(columns)
        per_word = 32 // self.bits
        qweight = self._part(module, "qweight", ("I32",), (columns // per_word, out))
        qzeros = self._part(module, "qzeros", ("I32",), (count, out // per_word))
        scales = self._part(module, "scales", ("F16", "BF16", "F32"), (count, out))
        if f"{module}.g_idx" in self._store.shapes:
            given = self._part(module, "g_idx", ("I32", "I64"), (columns,))
            if given.any():  # all zero: it was not written
                group = given.astype(np.int64)
        if group.min() < 0 or group.max() >= count:
            raise self._problem(f"{module}.g_idx", f"names group {group.max()}, expected 0 to {count - 1}")
        return gptq(qweight, qzeros, scales, self.bits, self._adds_one(qzeros), group)

    def _adds_one(self, qzeros):
        """Whether zero points are stored less one (version 1): told by the contents where these can only mean one
        thing, else by the label."""
        label = self._settings.get("checkpoint_format") != "gptq_v2"
        words = qzeros.view(np.uint32)
        first, second = (0x77777777, 0x88888888) if self.bits == 4 else (0x7F7F7F7F, 0x80808080)
        if self._settings.get("sym", True) is True and (words == words.flat[0]).all() \
                and words.flat[0] in (first, second):
            found = bool(words.flat[0] == first)
            if found != label:
                self._tell(f"its checkpoint_format says version {1 if label else 2} of GPTQ, but its zero points are "
                           f"of version {1 if found else 2}, which was taken")
            return found
        if label and self._settings.get("sym") is False and self.bits == 4 and (words & 15 == 15).any():
            self._tell("it has zero points of 0 in version 1 of GPTQ, which some writers spoil; compare its answers "
                       "with another copy of the model")
        return label

    def _tell(self, what):
        if not self._told:
            warnings.warn(f"{self._where}: {what}", stacklevel=2)
        self._told = True

    def _awq(self, module) -> Integers:
        out, columns = self.shapes[f"{module}.weight"]
        group, count = self._groups(columns)
        return awq(self._part(module, "qweight", ("I32",), (columns, out // 8)),
                   self._part(module, "qzeros", ("I32",), (count, out // 8)),
                   self._part(module, "scales", ("F16", "BF16", "F32"), (count, out)), group)

    def _compressed(self, module) -> Integers:
        out, columns = self.shapes[f"{module}.weight"]
        floats, shape = ("F16", "BF16", "F32"), self._store.shapes[f"{module}.weight_scale"]
        if len(shape) == 1:  # one scale for all
            scale = np.broadcast_to(self._part(module, "weight_scale", floats, (1,)), (out, 1))
        else:
            scale = self._part(module, "weight_scale", floats, (out, None))
        groups = scale.shape[1]
        fits = {columns} if groups == 1 else {size for size in self.sizes if -(-columns // size) == groups}
        if len(fits) != 1:
            raise self._problem(f"{module}.weight_scale", f"has {groups} groups of {columns} inputs, but group_size is "
                                f"{', '.join(map(str, sorted(self.sizes))) or 'not given'}")
        packed = f"{module}.weight_packed" in self._store.shapes
        if packed:
            words = self._part(module, "weight_packed", ("I32",), (out, -(-columns * self.bits // 32)))
        else:
            words = self._part(module, "weight", ("I8",), (out, columns))
        zero = None
        if f"{module}.weight_zero_point" in self._store.shapes:
            if packed:
                zero = self._part(module, "weight_zero_point", ("I32",), (-(-out * self.bits // 32), groups))
            elif len(shape) == 1:
                zero = np.broadcast_to(self._part(module, "weight_zero_point", ("I8",), (1,)), (out, 1))
            else:
                zero = self._part(module, "weight_zero_point", ("I8",), (out, groups))
        return compressed(words, scale, zero, np.arange(columns) // fits.pop(), self.bits if packed else 8)
