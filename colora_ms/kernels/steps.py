"""The token loop of the generation as one operator: what costs the framework a millisecond a token otherwise."""

import mindspore as ms

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.layers import check_layer_dtypes, check_layer_shapes, check_norm, fuses_layers
from colora_ms.kernels.linear import check_linear, check_operand_dtypes
from colora_ms.kernels.registry import operation
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_NAME = "decode_steps"

#: Tensors before those of the layers, in order.
ARGUMENTS = ("token", "position", "active", "previous", "slots", "cache_rows", "expert_rows", "amateur_rows", "alpha",
             "beta", "temperature", "top_k", "top_p", "uniforms", "budget", "eos", "steps", "forgiving", "mode", "prompt",
             "lengths", "cos", "sin", "embed_tokens", "embed_tokens_scale", "norm", "norm_eps", "lm_head",
             "lm_head_scale", "lm_head_bias", "lm_head_down", "lm_head_up", "lm_head_adapter_scale")

_PER_REQUEST = ("position", "active", "previous", "expert_rows", "amateur_rows", "alpha", "beta", "temperature", "top_k",
                "top_p", "budget")
_REAL = ("alpha", "beta", "temperature", "top_p", "uniforms", "cos", "sin", "embed_tokens_scale", "norm_eps")
_HEAD = ARGUMENTS[-6:]


def fuses_steps():
    """Whether this device has the operator; elsewhere the loop is a ``while`` of the graph."""
    return fuses_layers()


def decode_steps(token, position, active, previous, slots, cache_rows, expert_rows, amateur_rows, alpha, beta, temperature,
                 top_k, top_p, uniforms, budget, eos, steps, forgiving, mode, prompt, lengths, cos, sin, *operands):
    """Make tokens for every active request until all have ended or ``steps`` steps were made.

    Semantics of one step, each line the operators of that name to the last bit, with row r of a request at its
    ``position``::

        x, residual = decoder_layers(embedding(token of the row's request), 0, ...)
        logits = multi_lora_linear(rms_norm_residual(x, residual)[0], lm_head)
        beta' = contrast_strength(logits, ..., mode, previous, prompt, lengths)       # beta where mode is ABSENT
        ints, floats = contrastive_select(logits, ..., beta', ..., uniforms[:, step])
        token = previous = ints[:, 0];  position += 1;  a request ends at a token of eos or when its budget is used up

    Only what is read is computed: rows of ended requests are left out, and the logits of a request's amateur are those of
    the tokens in the expert's alpha-cut (all of them for the divergence).

    Args:
        token: (R,) int32, the last token of each request; position: (R,) int32, the position it takes.
        active: (R,) int32, 0: the request has ended; previous: (R,) int32, the token that it generated last, -1: none.
        slots, cache_rows: (rows,) int32, adapter slot and row of the cache of each row.
        expert_rows, amateur_rows: (R,) int32, the rows of each request; no row has two users.
        alpha, beta, temperature, top_k, top_p: (R,), as for :func:`colora_ms.kernels.contrastive_select`.
        uniforms: (R, capacity) float32, a random number a step.
        budget: (R,) int32, tokens that each request may still take.
        eos: (ends,) int32.
        steps: (1,) int32, at most ``capacity``.
        forgiving: (1,) int32; 1: logits that are not finite end their request with results of zeros, 0: they are refused.
        mode, prompt, lengths: as for :func:`colora_ms.kernels.contrast_strength`, or each ``ABSENT``.
        cos, sin: as for :func:`colora_ms.kernels.cached_attention`.
        operands: weight and scale of the embedding, weight and eps of the last norm, the six of the head, then the tensors
            of ``colora_ms.kernels.layers.LAYOUT`` for every layer.

    Returns:
        ints (capacity, R, 3) int32 and floats (capacity, R, 4) float32, the results of ``contrastive_select`` for every
        step, 0 where a request took no token; then counts, token, position, active, each (R,) int32.

    Raises:
        KernelError: a shape or dtype is wrong, or the device has no such operator.
        RuntimeError: a value is out of its range; then nothing was written. Or logits are not finite.

    Gradients: none.
    """
    return bound.decode_steps(token, position, active, previous, slots, cache_rows, expert_rows, amateur_rows, alpha, beta,
                         temperature, top_k, top_p, uniforms, budget, eos, steps, forgiving, mode, prompt, lengths, cos,
                         sin, *operands)


def _shapes(*shapes):
    named = dict(zip(ARGUMENTS, shapes))
    requests = named["token"]
    require(len(requests) == 1, _NAME, "token", requests, "(requests,)")
    for name in _PER_REQUEST:
        require_shape(_NAME, name, named[name], requests)
    require(len(named["slots"]) == 1, _NAME, "slots", named["slots"], "(rows,)")
    require_shape(_NAME, "cache_rows", named["cache_rows"], named["slots"])
    require(len(named["uniforms"]) == 2 and named["uniforms"][0] == requests[0], _NAME, "uniforms", named["uniforms"],
            f"({requests[0]}, capacity)")
    require(len(named["eos"]) == 1, _NAME, "eos", named["eos"], "(ends,)")
    for name in ("steps", "forgiving"):
        require_shape(_NAME, name, named[name], (1,))
    if named["mode"]:
        require_shape(_NAME, "mode", named["mode"], requests)
        require_shape(_NAME, "lengths", named["lengths"], requests)
        require(len(named["prompt"]) == 2 and named["prompt"][0] == requests[0], _NAME, "prompt", named["prompt"],
                f"({requests[0]}, prompt length)")
    require(len(named["norm"]) == 1, _NAME, "norm", named["norm"], "(hidden,)")
    hidden = named["norm"][0]
    check_norm(_NAME, "norm", (named["norm"], named["norm_eps"]), hidden)
    check_linear(0, hidden, [named[name] for name in _HEAD], _NAME)
    require(len(named["cos"]) == 2, _NAME, "cos", named["cos"], "(max_len, head_dim / 2)")
    require_shape(_NAME, "sin", named["sin"], named["cos"])
    check_layer_shapes(_NAME, hidden, named["cos"], shapes[len(ARGUMENTS):])
    capacity = named["uniforms"][1]
    return [capacity, requests[0], 3], [capacity, requests[0], 4], requests, requests, requests, requests


def _dtypes(*dtypes):
    kinds = [element_type(dtype) for dtype in dtypes]
    weights = (ms.float32, ms.bfloat16, ms.int8, ms.uint8)
    named = dict(zip(ARGUMENTS, kinds))
    for name, kind in named.items():
        if name in _HEAD[1:]:
            continue
        if name in ("embed_tokens", "lm_head"):
            allowed = weights
        elif name == "norm":
            allowed = weights[:2]
        elif name in _REAL:
            allowed = (ms.float32,)
        elif name in ("mode", "prompt", "lengths"):
            allowed = (ms.int32, ms.float32)  # float32: ABSENT
        else:
            allowed = (ms.int32,)
        require_dtype(_NAME, name, kind, allowed)
    check_operand_dtypes(f"{_NAME} (lm_head)", [named[name] for name in _HEAD[1:]])
    check_layer_dtypes(_NAME, kinds[len(ARGUMENTS):])
    return ms.int32, ms.float32, ms.int32, ms.int32, ms.int32, ms.int32


operation("decode_steps", cpu=lambda: custom(_NAME, _shapes, _dtypes))
