"""The Ascend C operators of ``ops/ascend`` as MindSpore primitives, on the NPU or emulated on a CPU.

On Ascend a primitive is ``ops.Custom("aclnn<Name>", ..., func_type="aot")``: MindSpore finds the built package through
``ASCEND_CUSTOM_OPP_PATH`` (or the folder ``_lib/ascend`` of the installed package, which :func:`find_package` adds).
With ``COLORA_KERNELS=emulator`` it is the same device source, compiled for the host by ``ops/emulator/build.py``.

Layout at this border: the project keeps ``up`` as (slots, out, rank); the device wants it rank-major, (slots, rank,
out), so that one row of weights lies along the outputs. :func:`rank_major` converts, once, when a bank is loaded.

Not yet run on an NPU: ``scripts/verify_on_npu.sh`` is there for the first who can.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp

from colora_ms import ascend_package, ascend_settings
from colora_ms.kernels import bound
from colora_ms.kernels.aot import KernelError
from colora_ms.kernels.ascend_shapes import SHAPES
from colora_ms.kernels.registry import backend, bind, operation
from colora_ms.kernels.shapes import element_type, require, require_dtype

_F16, _BF16, _F32, _I32, _U8 = "float16", "bfloat16", "float32", "int32", "uint8"
_T = (_F16, _BF16, _F32)  # the dtype that a kernel is compiled for; position k of every list below is one combination
_FLOAT, _INT, _BYTE = (_F32,) * 3, (_I32,) * 3, (_U8,) * 3

#: operator -> inputs [(name, dtypes, required)], outputs [(name, dtypes)], attributes [(name, type, default)], in the
#: order of the kernels' arguments. tests/ascend/test_contract.py holds the OpDef sources to this table.
OPERATORS: "dict[str, dict[str, list[Any]]]" = {
    "MultiLora": {
        "inputs": [("x", _T, True), ("down", _T, True), ("up", _T, True), ("scale", _FLOAT, True),
                   ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("offset", "int", 0), ("exact", "bool", False)],
    },
    "MultiLoraSegments": {
        "inputs": [("x", _T, True), ("down", _T, True), ("up", _T, True), ("scale", _FLOAT, True),
                   ("starts", _INT, True), ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("offset", "int", 0), ("exact", "bool", False)],
    },
    "LoraShrink": {
        "inputs": [("x", _T, True), ("down", _T, True), ("scale", _FLOAT, True), ("slots", _INT, True)],
        "outputs": [("h", _FLOAT)], "attributes": [],
    },
    "LoraExpand": {
        "inputs": [("h", _FLOAT, True), ("up", _T, True), ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("offset", "int", 0), ("exact", "bool", False)],
    },
    "ContrastiveSelect": {
        "inputs": [("expert", _T, True), ("amateur", _T, True), ("log_alpha", _FLOAT, True), ("beta", _FLOAT, True),
                   ("mask", _FLOAT, True)],
        "outputs": [("token", _INT)], "attributes": [],
    },
    "W4Lora": {
        "inputs": [("x", _T, True), ("weight", _BYTE, True), ("weight_scale", _FLOAT, True), ("down", _T, True),
                   ("up", _T, True), ("scale", _FLOAT, True), ("slots", _INT, True)],
        "outputs": [("out", _T)],
        "attributes": [("exact", "bool", False)],
    },
    "LilyMix": {
        "inputs": [("h", _FLOAT, True), ("weights", _FLOAT, True), ("up", _T, True), ("scale", _FLOAT, True),
                   ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("offset", "int", 0), ("exact", "bool", False)],
    },
}


def registration(name: str, target: str = "Ascend") -> dict:
    """The ``reg_info`` of an operator, as ``CustomRegOp`` builds it.

    Args:
        name: a key of :data:`OPERATORS`.
        target: "Ascend" or "CPU".
    """
    spec = OPERATORS[name]
    info = CustomRegOp(f"aclnn{name}" if target == "Ascend" else name)
    for i, (argument, _, required) in enumerate(spec["inputs"]):
        info.input(i, argument, "required" if required else "optional")
    for i, (argument, _) in enumerate(spec["outputs"]):
        info.output(i, argument, "required")
    if target == "Ascend":
        for attribute, kind, default in spec["attributes"]:
            info.attr(attribute, "optional", kind, value=str(default).lower() if kind == "bool" else default)
    columns = [types for _, types, _ in spec["inputs"]] + [types for _, types in spec["outputs"]]
    for k in range(len(columns[0])):
        info.dtype_format(*[(types[k], "DefaultFormat") for types in columns])
    return info.target(target).get_op_info()


# -- where the compiled operators are -------------------------------------------------------------------------------

def find_package() -> Path:
    """Make the built Ascend package visible to MindSpore and return its path.

    Raises:
        KernelError: neither ``ASCEND_CUSTOM_OPP_PATH`` nor the package's own folder holds the operators, or MindSpore
            has read the variable already. ConfigError: they were built for another CANN.
    """
    found = ascend_package.find()
    if found is None:
        raise KernelError(ascend_package.missing())
    if found.added:
        if ascend_settings.device_in_use():
            raise KernelError(ascend_package.too_late(found.path))
        ascend_package.put_first(found.path)
    ascend_package.check(found.path, OPERATORS)
    return found.path


def emulator_library() -> Path:
    """Path of the emulated operators; built on first use when the sources are there.

    ``COLORA_EMULATOR_LIBRARY`` names another file. Raises KernelError when there is neither a library nor a source.
    """
    override = os.environ.get("COLORA_EMULATOR_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise KernelError(f"COLORA_EMULATOR_LIBRARY={override!r} does not exist")
        return Path(override)
    package = Path(__file__).resolve().parent.parent
    builder = package.parent / "ops" / "emulator" / "build.py"
    if builder.is_file():
        spec = importlib.util.spec_from_file_location("colora_emulator_build", builder)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]  # the file is there
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        try:
            return Path(module.build())
        except RuntimeError as error:
            raise KernelError(f"the emulated Ascend operators could not be built: {error}") from error
    library = package / "_lib" / "libcolora_emulator.so"
    if library.is_file():
        return library
    raise KernelError(f"{library} does not exist; run `python ops/emulator/build.py {library}` in the source tree")


_PRIMITIVES = {}
_LIBRARIES = {}  # path of an emulated operators' library -> sha256 of what it held when a primitive was made from it


def libraries_in_use() -> "list[tuple[str, str]]":
    """[(path, sha256)] of the emulated libraries, and of the rehearsal's, from which this process has made primitives:
    a compiled graph names such a library by its path, so both belong to the key under which it is kept."""
    return sorted(_LIBRARIES.items())


def note_library(path: Path) -> None:
    """Count a library among :func:`libraries_in_use`."""
    _LIBRARIES[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()


def primitive(name: str, target: Optional[str] = None, **attributes: Any) -> ops.Custom:
    """The ``ops.Custom`` primitive of an operator; made once per name, target and attributes.

    Args:
        name: a key of :data:`OPERATORS`.
        target: "Ascend" or "CPU" (emulated); None: "Ascend" if the ascend kernels are in use, else "CPU".
        attributes: values for the operator's attributes. Emulated, ``offset`` must be 0 (cut the slice out of y) and
            ``exact`` exists for MultiLora alone.
    """
    target = target or ("Ascend" if backend() == "ascend" else "CPU")
    key = (name, target, tuple(sorted(attributes.items())))
    if key not in _PRIMITIVES:
        known = [attribute for attribute, _, _ in OPERATORS[name]["attributes"]]
        for attribute in attributes:
            require(attribute in known, name, attribute, "given", f"one of {', '.join(known) or 'no attributes'}")
        if target == "Ascend":
            find_package()
            function = f"aclnn{name}"
        else:
            require(not attributes.get("offset"), name, "offset", attributes.get("offset"), "0 when emulated")
            library = emulator_library()
            _LIBRARIES[str(library)] = hashlib.sha256(library.read_bytes()).hexdigest()
            function = f"{library}:{name}{'Exact' if attributes.get('exact') and name == 'MultiLora' else ''}"
        made = ops.Custom(function, SHAPES[name], _DTYPES[name], "aot", reg_info=registration(name, target))
        for attribute, value in attributes.items():
            if target == "Ascend":
                made.add_prim_attr(attribute, value)
        _PRIMITIVES[key] = made
    return _PRIMITIVES[key]


# -- dtypes
# -------------------------------------------------------------------------------------------------------------

def _dtype_function(name):
    spec = OPERATORS[name]

    def infer(*given):
        given = [element_type(one) for one in given]
        names = {ms.float16: _F16, ms.bfloat16: _BF16, ms.float32: _F32, ms.int32: _I32, ms.uint8: _U8}
        typed = next(i for i, (_, types, _) in enumerate(spec["inputs"]) if types is _T)
        for (argument, _, _), dtype in zip(spec["inputs"], given):
            require_dtype(name, argument, dtype, tuple(names))
        kind = names[given[typed]]
        require(kind in _T, name, spec["inputs"][typed][0], kind, "float16, bfloat16 or float32")
        k = _T.index(kind)
        back = {value: key for key, value in names.items()}
        for (argument, types, _), dtype in zip(spec["inputs"], given):
            require_dtype(name, argument, dtype, (back[types[k]],))
        return back[spec["outputs"][0][1][k]]

    return infer


_DTYPES = {name: _dtype_function(name) for name in OPERATORS}


#: name in ``bound`` -> operator, for the faces below.
_FACES = {"device_multi_lora": "MultiLora", "device_multi_lora_segments": "MultiLoraSegments",
          "device_lora_shrink": "LoraShrink", "device_lora_expand": "LoraExpand",
          "device_contrastive_select": "ContrastiveSelect", "device_w4_lora": "W4Lora", "device_lily_mix": "LilyMix"}

for _face, _operator in _FACES.items():
    operation(_face, emulator=functools.partial(primitive, _operator, "CPU"),
              ascend=functools.partial(primitive, _operator, "Ascend"))


def load(target: str) -> None:
    """Make the primitives of the faces below usable beside another column of the table, for tests and golden files.

    Args:
        target: "Ascend" or "CPU" (emulated).
    """
    bind()
    vars(bound).update({face: primitive(operator, target) for face, operator in _FACES.items()})


# -- the faces --------------------------------------------------------------------------------------------------------

def rank_major(up: Tensor) -> Tensor:
    """(slots, out, rank) -> (slots, rank, out), the layout in which the device reads ``up``."""
    if up.dtype == ms.bfloat16:  # a CPU has no Transpose for it; the way through float32 is exact
        return ops.transpose(up.astype(ms.float32), (0, 2, 1)).astype(ms.bfloat16)
    return ops.transpose(up, (0, 2, 1))


def multi_lora(x: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """``y[t] + scale[s] * (x[t] @ down[s].T) @ up[s].T`` with s = slots[t]; ``y[t]``'s own bits where s = -1.

    Args:
        x: (rows, tokens, in) or (tokens, in), float16, bfloat16 or float32.
        slots: int32, one per row. down: (slots, rank, in), rank 1..256. up: (slots, rank, out), rank-major.
        scale: (slots,) float32. y: x's shape with out columns. x, down, up, y share a dtype.

    Returns:
        A new tensor like y. Sums are float32; float16 coefficients (x @ down, times scale) are rounded to float16.

    Raises:
        KernelError: a shape or dtype is wrong. RuntimeError (emulated): a slot is outside -1..slots-1.
    """
    if x.ndim == 3:
        rows, tokens, _ = x.shape
        each = ops.broadcast_to(slots.reshape((rows, 1)), (rows, tokens)).reshape((rows * tokens,))
        flat = bound.device_multi_lora(x.reshape((rows * tokens, -1)), down, up, scale, each,
                                       y.reshape((rows * tokens, -1)))
        return flat.reshape(y.shape)
    return bound.device_multi_lora(x, down, up, scale, slots, y)


def low_rank(x: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """``scale[s] * (x[r] @ down[s].T) @ up[s].T`` of each row's slot, zeros where it is -1: the place of
    ``colora_ms.kernels.lora.low_rank_reference``, with ``up`` in the project's layout (slots, out, rank)."""
    y = ops.zeros(x.shape[:-1] + (up.shape[1],), x.dtype)
    return multi_lora(x, slots, down.astype(x.dtype), rank_major(up.astype(x.dtype)), scale, y)


def multi_lora_segments(x: Tensor, starts: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor,
                        y: Tensor) -> Tensor:
    """:func:`multi_lora` for a prefill: tokens ``starts[k]`` to ``starts[k + 1] - 1`` use adapter ``slots[k]``.

    Args:
        x: (total tokens, in). starts: (segments + 1,) int32, ascending. slots: (segments,) int32; the rest as there.
    """
    return bound.device_multi_lora_segments(x, down, up, scale, starts, slots, y)


def lora_shrink(x: Tensor, slots: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """``scale[s] * x[t] @ down[s].T`` as (tokens, rank) float32; zeros where slots[t] = -1. Arguments as
    multi_lora's."""
    return bound.device_lora_shrink(x, down, scale, slots)


def lora_expand(h: Tensor, slots: Tensor, up: Tensor, y: Tensor) -> Tensor:
    """``y[t] + h[t] @ up[s].T`` for h (tokens, rank) float32 and a rank-major ``up``; a new tensor like y."""
    return bound.device_lora_expand(h, up, slots, y)


def contrastive_token(expert: Tensor, amateur: Tensor, alpha: Tensor, beta: Tensor,
                      mask: Tensor | None = None) -> Tensor:
    """The token of each request by the CoLD rule (arXiv 2505.14620), ties to the smallest index.

    Args:
        expert, amateur: (requests, vocabulary) logits of one float dtype, at most 262,144 tokens.
        alpha: (requests,) float32 in (0, 1]. beta: (requests,) float32 >= 0.
        mask: None, or float32 (1, vocabulary) or (requests, vocabulary), added to the expert's logits.

    Returns:
        (requests,) int32.
    """
    nothing = ops.zeros((1,), ms.float32) if mask is None else mask
    return bound.device_contrastive_select(expert, amateur, ops.log(alpha), beta, nothing)


def w4_lora(x: Tensor, slots: Tensor, weight: Tensor, weight_scale: Tensor, down: Tensor, up: Tensor,
            scale: Tensor) -> Tensor:
    """``x[t] @ W.T + scale[s] * (x[t] @ down[s].T) @ up[s].T`` with an int4 weight and s = slots[t], in one launch; the
    first term alone where s = -1.

    Args:
        x: (tokens, in), float16, bfloat16 or float32; in is even.
        slots: (tokens,) int32.
        weight: (out, in / 2) uint8, two values a byte, low nibble = even column, stored as value + 8 (LR-QAT's export).
        weight_scale: (out,) float32, or (out, groups) with in / groups a multiple of 8.
        down: (slots, rank, in), rank 1..256. up: (slots, rank, out), rank-major. Both of x's dtype.
        scale: (slots,) float32.

    Returns:
        (tokens, out) of x's dtype. Sums are float32 and rounded once; float16 coefficients as in :func:`multi_lora`.

    Raises:
        KernelError: a shape or dtype is wrong. RuntimeError (emulated): a slot is outside -1..slots-1.
    """
    return bound.device_w4_lora(x, weight, weight_scale, down, up, scale, slots)


def lily_mix(h: Tensor, weights: Tensor, slots: Tensor, up: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """``y[t] + scale[s] * h[t] @ sum_e(weights[t, e] * up[s, e])`` with s = slots[t] (Lily, arXiv 2407.09946), without
    forming the sum; ``y[t]``'s own bits where s = -1.

    Args:
        h: (tokens, rank) float32, the shrunk rows. weights: (tokens, experts) float32, the router's.
        slots: (tokens,) int32. up: (slots, experts, rank, out), rank-major. scale: (slots,) float32.
        y: (tokens, out) of up's dtype.

    Returns:
        A new tensor like y. Sums are float32; float16 coefficients (weight * scale * h) are rounded to float16.

    Raises:
        KernelError: a shape or dtype is wrong. RuntimeError (emulated): a slot is outside -1..slots-1.
    """
    return bound.device_lily_mix(h, weights, up, scale, slots, y)
