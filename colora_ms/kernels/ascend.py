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
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp

from colora_ms import ascend_package, ascend_settings
from colora_ms.kernels import bound
from colora_ms.kernels.aot import KernelError, run_builder, source_builder
from colora_ms.kernels.ascend_shapes import SHAPES, output_dtype
from colora_ms.kernels.registry import backend, bind, operation

_F16, _BF16, _F32, _I32 = "float16", "bfloat16", "float32", "int32"
_T = (_F16, _BF16, _F32)  # the dtype that a kernel is compiled for; position k of every list below is one combination
_FLOAT, _INT = (_F32,) * 3, (_I32,) * 3

#: operator -> inputs [(name, dtypes, required)], outputs [(name, dtypes)], attributes [(name, type)], in the order of
#: the kernels' arguments; tests/ascend/test_contract.py holds the OpDef sources to this table. A call takes the inputs
#: and then a value for each attribute. At most one attribute of a type: MindSpore keeps their values in one growing
#: vector a type. ``exact``: float16 keeps the coefficients in float32 too (the other dtypes always do).
OPERATORS: "dict[str, dict[str, list[Any]]]" = {
    "MultiLora": {
        "inputs": [("x", _T, True), ("down", _T, True), ("up", _T, True), ("scale", _FLOAT, True),
                   ("slots", _INT, True), ("y", _T, True), ("ends", _INT, True)],
        "outputs": [("out", _T)], "attributes": [],
    },
    "LoraShrink": {
        "inputs": [("x", _T, True), ("down", _T, True), ("scale", _FLOAT, True), ("slots", _INT, True)],
        "outputs": [("h", _FLOAT)], "attributes": [],
    },
    "LoraExpand": {
        "inputs": [("h", _FLOAT, True), ("up", _T, True), ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("exact", "bool")],
    },
    "ContrastiveSelect": {
        "inputs": [("logits", _T, True), ("mix_rows", _INT, True), ("weights", _FLOAT, True),
                   ("log_alpha", _FLOAT, True)],
        "outputs": [("ints", _INT), ("floats", _FLOAT)], "attributes": [],
    },
    "LilyMix": {
        "inputs": [("h", _FLOAT, True), ("weights", _FLOAT, True), ("up", _T, True), ("scale", _FLOAT, True),
                   ("slots", _INT, True), ("y", _T, True)],
        "outputs": [("out", _T)],
        "attributes": [("exact", "bool")],
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
        for attribute, kind in spec["attributes"]:
            info.attr(attribute, "optional", kind)  # without a value here: it comes as an input of the call
    columns = [types for _, types, _ in spec["inputs"]] + [types for _, types in spec["outputs"]]
    for k in range(len(columns[0])):
        info.dtype_format(*[(types[k], "DefaultFormat") for types in columns])
    return info.target(target).get_op_info()


# -- where the compiled operators are -------------------------------------------------------------------------------

def find_package() -> Path:
    """Make the built Ascend package visible to MindSpore and return its path.

    Raises:
        KernelError: neither ``ASCEND_CUSTOM_OPP_PATH`` nor the package's own folder holds the operators, or MindSpore
            has read the variable already. ConfigError: they were built for another CANN or chip.
    """
    found = ascend_package.find()
    if found is None:
        raise KernelError(ascend_package.missing())
    if found.added:
        if ascend_settings.device_in_use():
            raise KernelError(ascend_package.too_late(found.path))
        ascend_package.put_first(found.path)
    ascend_package.check(found.path, OPERATORS, ascend_settings.unit())
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
    builder = source_builder("emulator")
    if builder.is_file():
        try:
            return run_builder(builder)
        except RuntimeError as error:
            raise KernelError(f"the emulated Ascend operators could not be built: {error}") from error
    library = Path(__file__).resolve().parent.parent / "_lib" / "libcolora_emulator.so"
    if library.is_file():
        return library
    raise KernelError(f"{library} does not exist; run `python ops/emulator/build.py {library}` in the source tree")


_PRIMITIVES: "dict[tuple[str, str], Callable[..., Any]]" = {}
_LIBRARIES = {}  # path of an emulated operators' library -> sha256 of what it held when a primitive was made from it


def libraries_in_use() -> "list[tuple[str, str]]":
    """[(path, sha256)] of the emulated libraries, and of the rehearsal's, from which this process has made primitives:
    a compiled graph names such a library by its path, so both belong to the key under which it is kept."""
    return sorted(_LIBRARIES.items())


def note_library(path: Path) -> None:
    """Count a library among :func:`libraries_in_use`."""
    _LIBRARIES[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()


def primitive(name: str, target: Optional[str] = None) -> Callable[..., Any]:
    """What a graph calls for an operator: with its inputs and then a value (a constant) for each of its attributes.

    On Ascend this is the ``ops.Custom`` primitive itself: attributes of an aclnn operator are inputs of the call, and
    MindSpore refuses a launch whose inputs and outputs are not as many as the types in the operator's header. Emulated,
    an operator has one C function for each value of ``exact``, because a CPU's ``ops.Custom`` takes tensors alone.
    Made once per name and target.

    Args:
        name: a key of :data:`OPERATORS`.
        target: "Ascend" or "CPU" (emulated); None: "Ascend" if the ascend kernels are in use, else "CPU".
    """
    target = target or ("Ascend" if backend() == "ascend" else "CPU")
    key = (name, target)
    if key not in _PRIMITIVES:
        if target == "Ascend":
            find_package()
            _PRIMITIVES[key] = _custom(f"aclnn{name}", name, target)
        else:
            library = emulator_library()
            note_library(library)
            plain = _custom(f"{library}:{name}", name, target)
            _PRIMITIVES[key] = plain if not OPERATORS[name]["attributes"] else _either(
                plain, _custom(f"{library}:{name}Exact", name, target))
    return _PRIMITIVES[key]


def _custom(function: str, name: str, target: str) -> ops.Custom:
    """The primitive of a compiled function, with the operator's inference."""
    inputs = len(OPERATORS[name]["inputs"])  # the shapes and dtypes of the attributes come after those of the inputs

    def shape(*given):
        return SHAPES[name](*given[:inputs])

    def dtype(*given):
        return output_dtype(name, OPERATORS[name], given[:inputs])

    return ops.Custom(function, shape, dtype, "aot", reg_info=registration(name, target))


def _either(plain: ops.Custom, exactly: ops.Custom) -> Callable[..., Any]:
    """The emulated form of an operator whose only attribute is ``exact``, the last value of a call."""
    def run(*given):
        if given[-1]:
            return exactly(*given[:-1])
        return plain(*given[:-1])

    return run


#: name in ``bound`` -> operator, for the faces below.
_FACES = {"device_multi_lora": "MultiLora", "device_lora_shrink": "LoraShrink", "device_lora_expand": "LoraExpand",
          "device_contrastive_select": "ContrastiveSelect", "device_lily_mix": "LilyMix"}

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


def multi_lora(x: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor, y: Tensor,
               ends: Tensor | None = None) -> Tensor:
    """``y[t] + scale[s] * (x[t] @ down[s].T) @ up[s]`` with s = slots[t]; ``y[t]``'s own bits where s = -1.

    The outputs may be several linears side by side (packed q, k, v; gate and up), slice by slice: with ``ends``, the
    columns ``ends[i - 1]`` to ``ends[i] - 1`` use the rows ``i * rank`` to ``(i + 1) * rank - 1`` of down and
    ``scale[s, i]``. An adapter whose rank is smaller than the bank's must be filled up with zeros in down and up.

    Args:
        x: (rows, tokens, in) or (tokens, in), float16, bfloat16 or float32.
        slots: int32, one per row. down: (slots, slices * rank, in), rank 1..256, at most 512 rows. up: (slots, rank,
            out), rank-major. scale: (slots, slices) float32, or (slots,) for one slice. y: x's shape with out columns.
            x, down, up, y share a dtype.
        ends: (slices,) int32, at most 8, ascending, the last one is out; None: one slice.

    Returns:
        A new tensor like y. Sums and coefficients are float32, rounded once at the end.

    Raises:
        KernelError: a shape or dtype is wrong. RuntimeError (emulated): a slot is outside -1..slots-1, or ends do not
        ascend to out.
    """
    ends = Tensor([up.shape[2]], ms.int32) if ends is None else ends
    scale = scale.reshape((-1, 1)) if scale.ndim == 1 else scale
    if x.ndim == 3:
        rows, tokens, _ = x.shape
        each = ops.broadcast_to(slots.reshape((rows, 1)), (rows, tokens)).reshape((rows * tokens,))
        flat = bound.device_multi_lora(x.reshape((rows * tokens, -1)), down, up, scale, each,
                                       y.reshape((rows * tokens, -1)), ends)
        return flat.reshape(y.shape)
    return bound.device_multi_lora(x, down, up, scale, slots, y, ends)


def low_rank(x: Tensor, slots: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """``scale[s] * (x[r] @ down[s].T) @ up[s].T`` of each row's slot, zeros where it is -1: the place of
    ``colora_ms.kernels.lora.low_rank_reference``, with ``up`` in the project's layout (slots, out, rank)."""
    y = ops.zeros(x.shape[:-1] + (up.shape[1],), x.dtype)
    return multi_lora(x, slots, down.astype(x.dtype), rank_major(up.astype(x.dtype)), scale, y)


def lora_shrink(x: Tensor, slots: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """``scale[s] * x[t] @ down[s].T`` as (tokens, rank) float32; zeros where slots[t] = -1. Arguments as
    multi_lora's."""
    return bound.device_lora_shrink(x, down, scale, slots)


def lora_expand(h: Tensor, slots: Tensor, up: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """``y[t] + h[t] @ up[s].T`` for h (tokens, rank) float32 and a rank-major ``up``; a new tensor like y."""
    return bound.device_lora_expand(h, up, slots, y, exact)


def contrastive_token(logits: Tensor, mix_rows: Tensor, weights: Tensor,
                      log_alpha: Tensor) -> "tuple[Tensor, Tensor]":
    """The token of each request by a weighted sum of its rows' logits, ties to the smallest index: the CoLD rule
    (arXiv 2505.14620), or any mix of log-probabilities; no sort of the vocabulary.

    Valid are the tokens whose logit in the leading row is finite and at least ``log_alpha`` plus that row's largest,
    and whose sum is a number above -infinity.

    Args:
        logits: (rows, vocabulary) of one float dtype, at most 262,144 tokens.
        mix_rows: (requests, voices) int32, at most 8 voices: rows of logits, -1 for none; the first leads, and a
            request without it is inactive. weights: (requests, voices) float32; a row of weight 0 takes no part in
            the sum. log_alpha: (requests,) float32, -inf for no cut.

    Returns:
        ints (requests, 3) int32: the token, the leading row's favourite (its own argmax), and how many tokens are valid
        (of one row: the vocabulary); floats (requests, 2 + voices) float32: the token's sum, the leading row's largest
        logit, and each row's logit of the token, 0 where there is no row. An inactive request's are 0; with no valid
        token it is token 0, sum -inf.

    Raises:
        KernelError: a shape or dtype is wrong. RuntimeError (emulated): a row is outside -1..rows-1.
    """
    return bound.device_contrastive_select(logits, mix_rows, weights, log_alpha)


def lily_mix(h: Tensor, weights: Tensor, slots: Tensor, up: Tensor, scale: Tensor, y: Tensor,
             exact: bool = False) -> Tensor:
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
    return bound.device_lily_mix(h, weights, up, scale, slots, y, exact)
