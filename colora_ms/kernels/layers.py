"""Consecutive decoder layers over a key/value cache as one operator: what a decoding step mostly is."""

import mindspore as ms

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.registry import operation
from colora_ms.kernels.linear import OPERANDS, check_linear, check_operand_dtypes
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_NAME = "decoder_layers"

#: Tensors before those of the layers: x, residual, slots, cos, sin, cache_rows, start, length.
FIXED = 8

#: Tensors of one layer, in order: (name, how many). Norms are weight and eps, linears the six of multi_lora_linear, or in
#: the place of a weight a product of small ones: ABSENT, ABSENT, bias, inner (r, in), outer (out, r), core (r, r) or ABSENT.
LAYOUT = (("input_layernorm", 2), ("q_proj", OPERANDS), ("k_proj", OPERANDS), ("v_proj", OPERANDS), ("q_norm", 2),
          ("k_norm", 2), ("k_cache", 1), ("v_cache", 1), ("o_proj", OPERANDS), ("post_attention_layernorm", 2),
          ("gate_proj", OPERANDS), ("up_proj", OPERANDS), ("down_proj", OPERANDS))
PER_LAYER = sum(count for _, count in LAYOUT)


def fuses_layers():
    """Whether this device has the operator; elsewhere a model calls the operators of its parts."""
    return bound.fuses_layers


def decoder_layers(x, residual, slots, cos, sin, cache_rows, start, length, *operands):
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
        operands: the tensors of ``LAYOUT`` for every layer; q_norm and k_norm ``ABSENT`` where the model has none.

    Returns:
        (x, residual), both (rows, tokens, hidden) float32: the input of the next layer or of the last norm.

    Raises:
        KernelError: a shape or dtype is wrong, or the device has no such operator.
        RuntimeError: a slot, cache row, length or position is out of range; then nothing was written.

    Gradients: none; training goes through the operators of the parts.
    """
    return bound.decoder_layers(x, residual, slots, cos, sin, cache_rows, start, length, *operands)


def _split(tensors):
    """{name: its tensors} of one layer."""
    parts, at = {}, 0
    for name, count in LAYOUT:
        parts[name] = tensors[at:at + count]
        at += count
    return parts


def check_norm(op, name, norm, width, optional=False):
    """Shapes of a norm's (weight, eps)."""
    weight, eps = norm
    if weight or not optional:
        require_shape(op, name, weight, (width,))
        require(list(eps) in ([], [1]), op, f"eps of {name}", eps, "one element")


def _check_product(op, name, columns, operands):
    """Shapes of a linear of a layer, or of the product in its place -> number of outputs."""
    weight, weight_scale, bias, inner, outer, core = operands
    if weight or not inner:
        return check_linear(0, columns, operands, op)
    require(not weight_scale, op, f"weight_scale of {name}", weight_scale, "absent where there is no weight")
    rank = columns
    for argument, factor in (("inner", inner), ("core", core), ("outer", outer)):
        if factor or argument != "core":
            require(len(factor) == 2 and factor[1] == rank, op, f"{argument} of {name}", factor, f"(outputs, {rank})")
            rank = factor[0]
    if bias:
        require_shape(op, f"bias of {name}", bias, (rank,))
    return rank


def _check_layer(op, hidden, layer):
    check_norm(op, "input_layernorm", layer["input_layernorm"], hidden)
    check_norm(op, "post_attention_layernorm", layer["post_attention_layernorm"], hidden)
    k_cache, v_cache = layer["k_cache"][0], layer["v_cache"][0]
    require(len(k_cache) == 4, op, "k_cache", k_cache, "(cache_rows_total, kv_heads, max_len, head_dim)")
    require_shape(op, "v_cache", v_cache, k_cache)
    kv_width, dim = k_cache[1] * k_cache[3], k_cache[3]
    queries, keys, values = (_check_product(op, name, hidden, layer[name]) for name in ("q_proj", "k_proj", "v_proj"))
    require(queries > 0 and queries % kv_width == 0, op, "outputs of q_proj", queries,
            f"a multiple of kv_heads * head_dim = {kv_width}")
    require(keys == values == kv_width, op, "outputs of k_proj and v_proj", f"{keys} and {values}",
            f"kv_heads * head_dim = {kv_width} as in k_cache")
    check_norm(op, "q_norm", layer["q_norm"], dim, optional=True)
    check_norm(op, "k_norm", layer["k_norm"], dim, optional=True)
    inner = _check_product(op, "gate_proj", hidden, layer["gate_proj"])
    for name, columns, wanted in (("o_proj", queries, hidden), ("up_proj", hidden, inner), ("down_proj", inner, hidden)):
        out = _check_product(op, name, columns, layer[name])
        require(out == wanted, op, f"outputs of {name}", out, wanted)


def check_layer_shapes(op, hidden, cos, operands):
    """Shapes of the tensors of ``LAYOUT`` for every layer; cos: shape of the rotary table."""
    require(len(operands) >= PER_LAYER and len(operands) % PER_LAYER == 0, op, "number of operands", len(operands),
            f"{PER_LAYER} a layer")
    for at in range(0, len(operands), PER_LAYER):
        layer = _split(operands[at:at + PER_LAYER])
        _check_layer(op, hidden, layer)
        _, _, max_len, dim = layer["k_cache"][0]
        require(cos[1] * 2 == dim and cos[0] >= max_len, op, "cos", cos,
                f"head_dim / 2 = {dim // 2} columns and at least the cache's {max_len} positions")


def check_layer_dtypes(op, kinds):
    """Types of the tensors of ``LAYOUT`` for every layer."""
    for at in range(0, len(kinds), PER_LAYER):
        for name, (first, *others) in _split(kinds[at:at + PER_LAYER]).items():
            allowed = (ms.float32, ms.bfloat16)
            if name.endswith("_proj"):
                require_dtype(op, name, first, allowed + (ms.int8, ms.uint8))
                check_operand_dtypes(f"{op} ({name})", others, (ms.float32, ms.bfloat16))
                continue
            require_dtype(op, name, first, allowed)
            for other in others:
                require_dtype(op, name, other, (ms.float32,))


def _shapes(x, residual, slots, cos, sin, cache_rows, start, length, *operands):
    require(len(x) == 3 and x[2] > 0, _NAME, "x", x, "(rows, tokens, hidden)")
    require_shape(_NAME, "residual", residual, x)
    require(len(cos) == 2, _NAME, "cos", cos, "(max_len, head_dim / 2)")
    require_shape(_NAME, "sin", sin, cos)
    if slots:
        require_shape(_NAME, "slots", slots, x[:1])
    for argument, shape in (("cache_rows", cache_rows), ("start", start), ("length", length)):
        require_shape(_NAME, argument, shape, x[:1])
    check_layer_shapes(_NAME, x[2], cos, operands)
    return x, x


def _dtypes(*dtypes):
    kinds = [element_type(dtype) for dtype in dtypes]
    for name, kind in zip(("x", "residual", "slots", "cos", "sin", "cache_rows", "start", "length"), kinds):
        wanted = {"slots": (ms.int32, ms.float32)}.get(
            name, (ms.int32,) if name in ("cache_rows", "start", "length") else (ms.float32,))
        require_dtype(_NAME, name, kind, wanted)
    check_layer_dtypes(_NAME, kinds[FIXED:])
    return ms.float32, ms.float32


operation("decoder_layers", cpu=lambda: custom(_NAME, _shapes, _dtypes))
# With device sources for a part of a layer, emulated or not, a layer is not one operator.
operation("fuses_layers", reference=lambda: False, cpu=lambda: True, emulator=lambda: False, ascend=lambda: False)
