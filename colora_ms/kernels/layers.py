"""Consecutive decoder layers over a key/value cache as one operator: what a decoding step mostly is."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.linear_operator import check_linear, check_linear_dtypes
from colora_ms.kernels.operands import LAYER, read_layer
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_NAME = "decoder_layers"

#: Inputs before those of the layers, in order; ops/cpu/operands.h has the same.
ARGUMENTS = ("x", "residual", "slots", "cos", "sin", "cache_rows", "start", "length")


def fuses_layers() -> bool:
    """Whether this device has the operator; elsewhere a model calls the operators of its parts."""
    return bound.fuses_layers


def decoder_layers(x: Tensor, residual: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, cache_rows: Tensor,
                   start: Tensor, length: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
    """Layers of the Llama family, one after another: pre-norm attention over the cache, then a gated MLP.

    Semantics of one layer, each line the operator of that name to the last bit::

        h, residual = rms_norm_residual(x, residual, input_layernorm)
        q, k, v = multi_lora_linear(h, slots, q_proj, k_proj, v_proj)     # q and k normed by heads where asked
        x = multi_lora_linear(cached_attention(q, k, v, ...), slots, o_proj)
        h, residual = rms_norm_residual(x, residual, post_attention_layernorm)
        x = multi_lora_linear(swiglu(*multi_lora_linear(h, slots, gate_proj, up_proj)), slots, down_proj)

    Args:
        x, residual: (rows, tokens, hidden) float32.
        slots: (rows,) int32, adapter slots, -1 for none.
        cos, sin, cache_rows, start, length: as for :func:`colora_ms.kernels.cached_attention`.
        operands: the tensors of every layer, as :func:`colora_ms.kernels.operands.flat_layer` puts them.

    Returns:
        (x, residual), both (rows, tokens, hidden) float32: the input of the next layer or of the last norm.

    Raises:
        KernelError: a shape or dtype is wrong, or the device has no such operator.
        RuntimeError: a slot, cache row, length or position is out of range; then nothing was written.

    Gradients: none; training goes through the operators of the parts.
    """
    return bound.decoder_layers(x, residual, slots, cos, sin, cache_rows, start, length, *operands)


def check_norm(op: str, name: str, weight: list, eps: list, width: int) -> None:
    """Shapes of a norm's weight and eps.

    Raises:
        KernelError: one does not fit.
    """
    require_shape(op, name, weight, (width,))
    require(list(eps) in ([], [1]), op, f"eps of {name}", eps, "one element")


def _check_layer(op, hidden, layer, shapes):
    given = {name: [shapes[place] for place in layer[name]] for name, kind in LAYER if kind != "linear"}

    def outputs(name, columns):
        return check_linear(op, layer[name], shapes, columns, f" of {name}")

    for name, kind in LAYER:
        if kind == "norm":
            check_norm(op, name, *given[name], hidden)
    k_cache, v_cache = given["k_cache"][0], given["v_cache"][0]
    require(len(k_cache) == 4, op, "k_cache", k_cache, "(cache_rows_total, kv_heads, max_len, head_dim)")
    require_shape(op, "v_cache", v_cache, k_cache)
    kv_width, dim = k_cache[1] * k_cache[3], k_cache[3]
    queries, keys, values = (outputs(name, hidden) for name in ("q_proj", "k_proj", "v_proj"))
    require(queries > 0 and queries % kv_width == 0, op, "outputs of q_proj", queries,
            f"a multiple of kv_heads * head_dim = {kv_width}")
    require(keys == values == kv_width, op, "outputs of k_proj and v_proj", f"{keys} and {values}",
            f"kv_heads * head_dim = {kv_width} as in k_cache")
    for name, kind in LAYER:
        if kind == "optional_norm" and given[name]:
            check_norm(op, name, *given[name], dim)
    inner = outputs("gate_proj", hidden)
    for name, columns, wanted in (("o_proj", queries, hidden), ("up_proj", hidden, inner),
                                  ("down_proj", inner, hidden)):
        out = outputs(name, columns)
        require(out == wanted, op, f"outputs of {name}", out, wanted)
    return k_cache


def _layers(op, shapes, at):
    """The parts of all layers from input ``at`` on, see ``read_layer``."""
    found = []
    while not found or at < len(shapes):
        layer, at = read_layer(op, shapes, at)
        found.append(layer)
    return found


def check_layer_shapes(op: str, hidden: int, cos: list, shapes: tuple, at: int) -> None:
    """Shapes of all layers, which begin at input ``at``; cos: shape of the rotary table.

    Raises:
        KernelError: one does not fit.
    """
    for layer in _layers(op, shapes, at):
        _, _, max_len, dim = _check_layer(op, hidden, layer, shapes)
        require(cos[1] * 2 == dim and cos[0] >= max_len, op, "cos", cos,
                f"head_dim / 2 = {dim // 2} columns and at least the cache's {max_len} positions")


def check_layer_dtypes(op: str, shapes: tuple, kinds: list, at: int) -> None:
    """Types of the tensors of all layers, which begin at input ``at``.

    Raises:
        KernelError: one is not of the types that its place may have.
    """
    for layer in _layers(op, shapes, at):
        for name, kind in LAYER:
            if kind == "linear":
                check_linear_dtypes(f"{op} ({name})", layer[name], tuple(kinds))
                continue
            for i, place in enumerate(layer[name]):
                require_dtype(op, name, kinds[place], (ms.float32,) if i else (ms.float32, ms.bfloat16))


def _shapes(*shapes):
    x, residual, slots, cos, sin, cache_rows, start, length = shapes[:len(ARGUMENTS)]
    require(len(x) == 3 and x[2] > 0, _NAME, "x", x, "(rows, tokens, hidden)")
    require_shape(_NAME, "residual", residual, x)
    require(len(cos) == 2, _NAME, "cos", cos, "(max_len, head_dim / 2)")
    require_shape(_NAME, "sin", sin, cos)
    if slots:
        require_shape(_NAME, "slots", slots, x[:1])
    for argument, shape in (("cache_rows", cache_rows), ("start", start), ("length", length)):
        require_shape(_NAME, argument, shape, x[:1])
    check_layer_shapes(_NAME, x[2], cos, shapes, len(ARGUMENTS))
    return x, x


def _dtypes(shapes, *dtypes):
    kinds = [element_type(dtype) for dtype in dtypes]
    for name, kind in zip(ARGUMENTS, kinds):
        wanted = {"slots": (ms.int32, ms.float32)}.get(
            name, (ms.int32,) if name in ("cache_rows", "start", "length") else (ms.float32,))
        require_dtype(_NAME, name, kind, wanted)
    check_layer_dtypes(_NAME, shapes, kinds, len(ARGUMENTS))
    return ms.float32, ms.float32


operation("decoder_layers", cpu=lambda: custom(_NAME, _shapes, _dtypes, by_shapes=True))
# With device sources for a part of a layer, emulated or not, a layer is not one operator.
operation("fuses_layers", reference=lambda: False, cpu=lambda: True, emulator=lambda: False, ascend=lambda: False)
