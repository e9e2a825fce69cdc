"""Weight formats: one record a format, in one table, and the weights that are stored in them.

A format says how the values of a matrix (out, in) lie in memory: the shape of the stored tensor and of its scale, how
float32 values are packed and unpacked, how many bytes a row takes, and the number under which the kernels know it.
Files hand out :class:`StoredWeight`; a Cell keeps its format as ``cell.format``. Nothing may be told from a dtype: two
formats can share one (packed 4-bit values and blocks of bytes are both uint8).

Integer weights are symmetric, ``w ~ scale * q``, or have zero points, ``w ~ scale * (q - zero)``. int8 keeps q in
-127..127 with one scale an output channel or a group of neighbouring inputs; int4 keeps q in -8..7 with one scale a
group and packs two columns into a byte: the low nibble is the even column, stored as q + 8. int4_zero (GPTQ, AWQ) is
packed alike, q in 0..15 as it is; int8_zero keeps q in -128..127. The formats of GGUF files are rows of their blocks,
scales among them (:mod:`colora_ms.models.gguf_blocks`), which nobody takes apart before a kernel does.

A new format is one record here and, if the kernels are to compute in it, one case in ``ops/cpu/weights.h``; without a
kernel tag it can be read from files, and a decoder that is built from it packs it into the format that was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError, near
from colora_ms.models import packing
from colora_ms.models.gguf_blocks import BLOCKS, block_sizes, pack_blocks, unpack_type
from colora_ms.models.mapped import array_dtype
from colora_ms.models.safetensors_file import WRITE_DTYPES

if TYPE_CHECKING:
    from mindspore import Tensor

#: What packs a matrix: (float32 (out, in), group or None) -> (data, scale or None).
Pack = Callable[[np.ndarray, Optional[int]], "tuple[np.ndarray, Optional[np.ndarray]]"]
#: What unpacks it: (data, scale or None) -> float32 (out, in).
Unpack = Callable[[np.ndarray, Optional[np.ndarray]], np.ndarray]


@dataclass(frozen=True, eq=False)
class WeightFormat:
    """How the values of a weight are stored.

    Attributes:
        name: as in ``weight_format=...``.
        dtype: NumPy's name of the stored elements (bfloat16 as its bits, "<u2").
        element: MindSpore's name of them.
        code: their name in a safetensors file; None for a format that no such file has.
        tag: number of the format in the kernels (``Format`` in ops/cpu/weights.h); None: they do not compute in it.
        values, items: a row is a run of blocks; so many values of a row are so many stored elements.
        scaled: whether a float32 scale comes with the tensor, (out,) or (out, groups).
        zeros: whether that scale is (out, groups, 2): factors and zero points.
        ordered: whether an order (in,) int32 comes with it: column k of what is stored is column order[k].
        ggml: GGML's name of the type whose blocks a row consists of, or None.
        encode, decode: the arithmetic of :meth:`pack` and :meth:`unpack`.
        join, split: of formats of scaled integers, from the integers (out, in) int8 to the stored tensor, and back.
    """

    name: str
    dtype: str
    element: str
    code: Optional[str]
    tag: Optional[int]
    encode: Pack = field(repr=False)
    decode: Unpack = field(repr=False)
    values: int = 1
    items: int = 1
    scaled: bool = False
    zeros: bool = False
    ordered: bool = False
    ggml: Optional[str] = None
    join: Optional[Callable[[np.ndarray], np.ndarray]] = field(default=None, repr=False)
    split: Optional[Callable[[np.ndarray], np.ndarray]] = field(default=None, repr=False)

    @property
    def is_float(self) -> bool:
        """Whether the stored elements are the values themselves: what is added to them is not rounded away."""
        return not self.scaled and self.values == self.items

    @property
    def bits(self) -> int:
        """Bits that a value takes, without its scale."""
        return 8 * np.dtype(self.dtype).itemsize * self.items // self.values

    def data_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored tensor of a weight of ``shape`` (..., in).

        Raises:
            ConfigError: a row is no whole number of blocks.
        """
        if shape[-1] % self.values:
            raise ConfigError(f"{self.name} packs {self.values} columns into {self.items}, but the weight of shape "
                              f"{tuple(shape)} has {shape[-1]} on its last axis")
        return (*shape[:-1], shape[-1] // self.values * self.items)

    def shape(self, data_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (..., in) of the weight whose stored tensor has that shape: the inverse of :meth:`data_shape`."""
        return (*data_shape[:-1], data_shape[-1] // self.items * self.values)

    def row_bytes(self, columns: int, groups: int = 1) -> int:
        """Bytes of a row of so many values, with its ``groups`` scales where the format has them."""
        numbers = groups * (2 if self.zeros else 1) if self.scaled else 0
        return self.data_shape((columns,))[0] * np.dtype(self.dtype).itemsize + 4 * numbers

    def pack(self, weight: np.ndarray, group: Optional[int] = None) -> StoredWeight:
        """Store values, rounded to nearest.

        Args:
            weight: (out, in) float32; a vector where the format has no scale.
            group: inputs that share a scale; None: the format's own choice (int8: a whole row; int4: ``GROUP`` where
                that divides a row, else the row). Without effect where there is no scale.

        Raises:
            ConfigError: rows that cannot be packed, or that the group does not divide.
        """
        weight = np.ascontiguousarray(weight, np.float32)
        self.data_shape(weight.shape)
        if self.scaled and weight.ndim != 2:
            raise ConfigError(f"{self.name} stores matrices, but the weight has shape {weight.shape}")
        if self.scaled and group is not None and (group < 1 or weight.shape[1] % group):
            raise ConfigError(f"group {group} does not divide the {weight.shape[1]} inputs of the weight")
        data, scale = self.encode(weight, group)
        return StoredWeight(self, weight.shape, data, scale)

    def of_integers(self, q: np.ndarray, scale: np.ndarray) -> StoredWeight:
        """Store integers that are rounded already.

        Args:
            q: (out, in), of any number type, in the format's range; scale: (out,) or (out, groups) float32.
        """
        return StoredWeight(self, q.shape, self.join(np.asarray(q).astype(np.int8)), scale)

    def unpack(self, data: np.ndarray, scale: Optional[np.ndarray] = None) -> np.ndarray:
        """The values of a stored tensor, float32, its columns as they lie; of float32 itself the array that was
        given."""
        return self.decode(data, scale)

    def stored(self, weight: Tensor, scale: Optional[Tensor] = None, order: Optional[Tensor] = None) -> StoredWeight:
        """The arrays behind a Cell's tensors; ``scale``, ``order``: None or ``kernels.ABSENT`` (rank 0) for none."""
        data = weight.asnumpy()
        data = data.view(self.dtype) if data.dtype != np.dtype(self.dtype) else data
        own, columns = (None if one is None or not one.ndim else one.asnumpy() for one in (scale, order))
        return StoredWeight(self, self.shape(tuple(weight.shape)), data, own, order=columns)

    def check(self, weight: Tensor, scale: Optional[Tensor], order: Optional[Tensor] = None) -> None:
        """ConfigError unless a Cell's tensors can be of this format."""
        kind = str(weight.dtype).lower()
        pairs = scale is not None and scale.ndim == 3
        if kind != self.element or self.scaled != (scale is not None) or self.zeros != pairs \
                or self.ordered != (order is not None) \
                or weight.ndim == 2 and weight.shape[1] % self.items:
            given = "without a scale" if scale is None else f"with a scale of shape {tuple(scale.shape)}"
            given += "" if order is None else " and an order"
            wanted = (f"{'with' if self.scaled else 'without'} a scale{', in pairs' if self.zeros else ''}"
                      f"{', and an order, which linears alone can have' if self.ordered else ''}")
            raise ConfigError(f"a weight of dtype {kind} and shape {tuple(weight.shape)} {given} is none of the format "
                              f"{self.name}, which is {self.element}, {self.items} a block, {wanted}")


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A tensor as a file or a Cell holds it.

    Attributes:
        format: how it is stored; shape: of its values, (out, in) or (n,).
        data: array of the format's dtype and :meth:`WeightFormat.data_shape`; scale: (out,) or (out, groups) float32,
            or None; (out, groups, 2), factors and zero points, for formats that have those.
        activations: (bits of the linear's input, bits of its output) to which a model of rounded activations rounds
            them; 0: not at all.
        order: (in,) int32, a permutation, for formats that are ordered.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    data: np.ndarray
    scale: Optional[np.ndarray] = None
    activations: tuple[int, int] = (0, 0)
    order: Optional[np.ndarray] = None

    @property
    def group(self) -> Optional[int]:
        """Inputs that share a scale; None where a whole row does, or there is no scale."""
        return None if self.scale is None or self.scale.ndim == 1 else self.shape[1] // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(array.nbytes for array in (self.data, self.scale, self.order) if array is not None)

    def values(self) -> np.ndarray:
        """The values, float32 of ``shape``."""
        found = self.format.unpack(self.data, self.scale)
        return found if self.order is None else found[:, np.argsort(self.order)]

    def integers(self) -> np.ndarray:
        """The integers (out, in) int8 of a format of scaled integers."""
        return self.format.split(self.data)

    def as_format(self, wanted: Optional[WeightFormat]) -> StoredWeight:
        """In the wanted format, its values packed anew where it is in another one; None: as it is stored.

        Integers that were chosen when the weight was stored (int8 and int4 of ``colora-ms quantize``) are never rounded
        again.

        Raises:
            CheckpointError: None is wanted, but the kernels do not compute in its format.
        """
        own = self.format
        if own is wanted or wanted is None and own.tag is not None or own.join is not None and own.tag is not None:
            return self
        if wanted is None:
            raise CheckpointError(f"it is stored as {own.name}, in which nothing computes here (there are "
                                  f"{', '.join(WEIGHT_FORMATS)}); load the model in a format by name, such as "
                                  "weight_format=\"float32\" or \"int4\" (--weights), which unpacks it, or take "
                                  "another file")
        return wanted.pack(self.values())

    def and_rows(self, rows: np.ndarray) -> StoredWeight:
        """With more rows (n, in) float32 below it, packed alike."""
        more = self.format.pack(rows, self.group)
        scale = None if self.scale is None else np.concatenate([self.scale, more.scale])
        return StoredWeight(self.format, (self.shape[0] + len(rows), *self.shape[1:]),
                            np.concatenate([self.data, more.data]), scale, activations=self.activations)

    def tensors(self) -> tuple[Tensor, Optional[Tensor]]:
        """(weight, scale or None) as a Cell takes them: views of the arrays, so that a Parameter of
        :func:`colora_ms.models.mapped.parameter_of` lies where they lie."""
        import mindspore as ms
        from mindspore import Tensor

        data = self.data.view(array_dtype(ms.bfloat16)) if self.format.element == "bfloat16" else self.data
        weight, scale = (None if one is None else Tensor.from_numpy(np.ascontiguousarray(one))
                         for one in (data, self.scale))
        return weight, scale


@dataclass(frozen=True, eq=False)
class StoredFactors:
    """A weight (out, in) that is stored as a product ``outer @ core @ inner``, or ``outer @ inner``.

    Attributes:
        inner: (r, in); outer: (out, r); core: (r, r) or None.
    """

    inner: StoredWeight
    outer: StoredWeight
    core: Optional[StoredWeight] = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.outer.shape[0], self.inner.shape[1]

    def values(self) -> np.ndarray:
        """The product, float32."""
        parts = [one.values() for one in (self.outer, self.core, self.inner) if one is not None]
        return np.linalg.multi_dot(parts) if len(parts) == 3 else parts[0] @ parts[1]


def stored_float(values: Any) -> StoredWeight:
    """Any float array as a float32 :class:`StoredWeight`; a float32 array is not copied."""
    array = np.asarray(values, np.float32)
    return StoredWeight(FLOAT32, array.shape, array)


def wanted_format(name: str) -> Optional[WeightFormat]:
    """The format that ``weight_format=name`` asks for; None for "auto".

    Raises:
        ConfigError: there is none; says which there are.
    """
    if name not in WEIGHT_CHOICES:
        raise ConfigError(f"weight format {name!r} is not known; use one of {', '.join(WEIGHT_CHOICES)}."
                          + near(name, WEIGHT_CHOICES))
    return FORMATS.get(name)


def weight_format(name: str) -> WeightFormat:
    """The format of matrices that are made anew in a model of ``weight_format=name``: float32 for "auto".

    Raises:
        ConfigError: as for :func:`wanted_format`.
    """
    return wanted_format(name) or FLOAT32


def format_of_code(code: str) -> WeightFormat:
    """The format of a safetensors dtype, of those that the kernels compute in.

    Raises:
        CheckpointError: there is none.
    """
    found = next((one for one in FORMATS.values() if one.code == code and one.tag is not None), None)
    if found is None:
        raise CheckpointError(f"no weight format is stored as {code}; there are "
                              + ", ".join(f"{one.code} ({one.name})" for one in FORMATS.values() if one.code))
    return found


def weight_values(cell: Any) -> np.ndarray:
    """The weight of a Cell that carries its format, float32 (out, in)."""
    return cell.format.stored(cell.weight, cell.weight_scale, getattr(cell, "order", None)).values()


def logical_shape(cell: Any) -> tuple[int, ...]:
    """The shape (out, in) of such a Cell's weight."""
    return cell.format.shape(tuple(cell.weight.shape))


def holds_floats(cell: Any, parameter: Tensor) -> bool:
    """Whether a Cell's parameter is stored as floats: its weight's format says so, otherwise (biases, norms, Cells of
    another library) its dtype."""
    own = getattr(cell, "format", None)
    if isinstance(own, WeightFormat) and parameter is getattr(cell, "weight", None):
        return own.is_float
    return parameter.is_floating_point()


def is_matrix(cell: Any) -> bool:
    """Whether a linear is one matrix, in whatever format, and nothing else, as the fused losses take it: no factors, no
    order of its columns, no bias, no adapter on it."""
    own = getattr(cell, "format", None)
    return (isinstance(own, WeightFormat) and not own.ordered and hasattr(cell, "base")
            and getattr(cell, "weight", None) is not None and not getattr(cell, "has_bias", False)
            and not getattr(cell, "decomposed", False))


# -- the table ---------------------------------------------------------------------------------------------------------

FLOAT32 = WeightFormat("float32", "<f4", "float32", "F32", 0, packing.pack_float32, packing.unpack_float32)
BFLOAT16 = WeightFormat("bfloat16", "<u2", "bfloat16", "BF16", 1, packing.pack_bfloat16, packing.unpack_bfloat16)
INT8 = WeightFormat("int8", "|i1", "int8", "I8", 2, packing.pack_int8, packing.unpack_int8, scaled=True,
                    join=packing.itself, split=packing.itself)
INT4 = WeightFormat("int4", "|u1", "uint8", "U8", 3, packing.pack_int4, packing.unpack_int4, values=2, items=1,
                    scaled=True, join=packing.join_int4, split=packing.split_int4)
FLOAT16 = WeightFormat("float16", "<f2", "float16", "F16", 4, packing.pack_float16, packing.unpack_float16)
INT4_ZERO = WeightFormat("int4_zero", "|u1", "uint8", None, 13, packing.pack_int4_zero, packing.unpack_int4_zero,
                         values=2, items=1, scaled=True, zeros=True)
INT8_ZERO = WeightFormat("int8_zero", "|i1", "int8", None, 14, packing.pack_int8_zero, packing.unpack_int8_zero,
                         scaled=True, zeros=True)


def _no_packing(weight: np.ndarray, group: Optional[int]) -> packing.Packed:
    raise ConfigError("weights are not packed into this format, which files bring along; use one of "
                      + ", ".join(WEIGHT_FORMATS))


# GPTQ with activation order: the columns lie sorted by group. No other weight is packed so, nor asked for so.
INT4_ZERO_ORDERED = WeightFormat("int4_zero_ordered", "|u1", "uint8", None, 15, _no_packing, packing.unpack_int4_zero,
                                 values=2, items=1, scaled=True, zeros=True, ordered=True)
INT8_ZERO_ORDERED = WeightFormat("int8_zero_ordered", "|i1", "int8", None, 16, _no_packing, packing.unpack_int8_zero,
                                 scaled=True, zeros=True, ordered=True)


def _of_blocks(name: str, tag: int) -> WeightFormat:
    kind, values, size = BLOCKS[name]
    return WeightFormat(name, "|u1", "uint8", None, tag, lambda weight, group: (pack_blocks(name, weight), None),
                        lambda data, scale: unpack_type(kind, data), values=values, items=size, ggml=kind)


#: {name: record}, by tag.
FORMATS = {one.name: one for one in (FLOAT32, BFLOAT16, INT8, INT4, FLOAT16,
                                     *(_of_blocks(name, tag) for tag, name in enumerate(BLOCKS, 5)),
                                     INT4_ZERO, INT8_ZERO)}

#: Names of the formats that a decoder can be loaded in.
WEIGHT_FORMATS = tuple(name for name, one in FORMATS.items() if one.tag is not None)

#: Every weight in the format in which the file has it.
AUTO = "auto"

#: What ``weight_format=...`` can be.
WEIGHT_CHOICES = (AUTO, *WEIGHT_FORMATS)

_GGML_FORMATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16,
                 **{one.ggml: one for one in FORMATS.values() if one.ggml is not None}}


def format_of_ggml(kind: str) -> WeightFormat:
    """The format of a GGML type (its name, such as "Q4_K"); of one that the kernels do not compute in, a record that
    can be unpacked, if the ``gguf`` package can."""
    if kind in _GGML_FORMATS:
        return _GGML_FORMATS[kind]
    values, size = block_sizes(kind)
    return WeightFormat(kind, "|u1", "uint8", None, None, _no_packing, lambda data, scale: unpack_type(kind, data),
                        values=values, items=size, ggml=kind)


#: What the weights of a folder can be written as: floats, and integers rounded to nearest.
FOLDER_TYPES = (*WRITE_DTYPES, *(name for name in WEIGHT_FORMATS if FORMATS[name].join is not None))
