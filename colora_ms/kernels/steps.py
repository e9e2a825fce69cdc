"""The token loop of the generation as one operator: what costs the framework a millisecond a token otherwise."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor

from colora_ms.kernels import bound
from colora_ms.kernels.aot import custom
from colora_ms.kernels.layers import check_layer_dtypes, check_layer_shapes, check_norm, fuses_layers
from colora_ms.kernels.linear_operator import check_base, check_linear, check_linear_dtypes
from colora_ms.kernels.operands import read_linear
from colora_ms.kernels.options import DETAILS, MOST_TOP, SELECTION, TENSORS
from colora_ms.kernels.registry import operation
from colora_ms.kernels.adjust import check_adjustment_shapes
from colora_ms.kernels.select import check_option_shapes
from colora_ms.kernels.shapes import element_type, require, require_dtype, require_shape

_NAME = "decode_steps"

#: Inputs before the embedding, the head and the layers, in order; ops/cpu/operands.h has the same.
ARGUMENTS = ("token", "position", "active", "previous", "slots", "cache_rows", *TENSORS, "uniforms", "eos", "steps",
             "forgiving", "prompt", "lengths", "cos", "sin", "norm", "norm_eps")

_PER_REQUEST = ("token", "position", "active", "previous")
_REAL = ("real", "mix_weights", "uniforms", "cos", "sin", "norm_eps")


def fuses_steps() -> bool:
    """Whether this device has the operator; elsewhere the loop is a ``while`` of the graph."""
    return fuses_layers()


def decode_steps(token: Tensor, position: Tensor, active: Tensor, previous: Tensor, slots: Tensor, cache_rows: Tensor,
                 whole: Tensor, real: Tensor, mix_rows: Tensor, mix_weights: Tensor, entries: Tensor, bias: Tensor,
                 offsets: Tensor, mask: Tensor, uniforms: Tensor, eos: Tensor, steps: Tensor, forgiving: Tensor,
                 prompt: Tensor, lengths: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, norm_eps: Tensor,
                 *operands: Tensor) -> tuple[Tensor, ...]:
    """Make tokens for every active request until all have ended or ``steps`` steps were made.

    Semantics of one step, each line the operators of that name to the last bit, with row r of a request at its
    ``position``::

        x, residual = decoder_layers(embedding(token of the row's request), 0, ...)
        logits = multi_lora_linear(rms_norm_residual(x, residual)[0], lm_head)
        logits = adjust_logits(logits, *options)
        beta' = contrast_strength(logits, whole, real, mix_rows, mix_weights, previous, prompt, lengths)
        ints, floats = contrastive_select(logits, whole, real with beta', mix_rows, mix_weights, uniforms[:, step])
        tops, details = token_details(logits, whole, real with beta', mix_rows, mix_weights, ints[:, 0])
        token = previous = ints[:, 0];  position += 1;  a request ends at a token of eos or when its budget is used up

    Only what is read is computed: rows of ended requests are left out, and, of rows behind a leading one, the logits of
    tokens outside its cut (but for the divergence, a mean of probabilities and ``voices``). The tokens that a request
    takes are counted for its penalties and ``min_tokens``.

    Args:
        token: (R,) int32, the last token of each request; position: (R,) int32, the position it takes.
        active: (R,) int32, 0: the request has ended; previous: (R,) int32, the token that it generated last, -1: none.
        slots, cache_rows: (rows,) int32, adapter slot and row of the cache of each row.
        whole, real, mix_rows, mix_weights, entries, bias, offsets, mask: the requests' options
            (:mod:`colora_ms.kernels.options`), as for :func:`colora_ms.kernels.adjust_logits`,
            :func:`colora_ms.kernels.contrastive_select`, :func:`colora_ms.kernels.contrast_strength` and
            :func:`colora_ms.kernels.token_details`; no row has two users; budget: tokens that each request may still
            take.
        uniforms: (R, capacity) float32, a random number a step.
        eos: (ends,) int32.
        steps: (1,) int32, at most ``capacity``.
        forgiving: (1,) int32; 1: logits that are not finite end their request with results of zeros, 0: they are
            refused.
        prompt, lengths: as for :func:`colora_ms.kernels.contrast_strength`; ``ABSENT``: no contrast adapts.
        cos, sin: as for :func:`colora_ms.kernels.cached_attention`.
        norm, norm_eps: weight and eps of the last norm.
        operands: the embedding (a base alone) and the head (a linear), as
            :func:`colora_ms.kernels.operands.flat_linears` puts them, then every layer, as ``flat_layer`` does.

    Returns:
        ints (capacity, R, 3) int32 and floats (capacity, R, 4) float32, the results of ``contrastive_select`` for every
        step, 0 where a request took no token; then counts, token, position, active, each (R,) int32; then tops
        (capacity, R, 20) int32 and details (capacity, R, 29) float32, the results of ``token_details``.

    Raises:
        KernelError: a shape or dtype is wrong, or the device has no such operator.
        RuntimeError: a value is out of its range; then nothing was written. Or logits are not finite.

    Gradients: none.
    """
    return bound.decode_steps(token, position, active, previous, slots, cache_rows, whole, real, mix_rows, mix_weights,
                              entries, bias, offsets, mask, uniforms, eos, steps, forgiving, prompt, lengths, cos, sin, norm, norm_eps, *operands)


def _ends(shapes):
    """Places of the embedding and of the head, and where the layers begin."""
    table, at = read_linear(_NAME, shapes, len(ARGUMENTS))
    head, at = read_linear(_NAME, shapes, at)
    return table, head, at


def _shapes(*shapes):
    named = dict(zip(ARGUMENTS, shapes))
    requests = check_option_shapes(_NAME, *(named[name] for name in SELECTION))
    check_adjustment_shapes(_NAME, requests, *(named[name] for name in TENSORS[4:]))
    for name in _PER_REQUEST:
        require_shape(_NAME, name, named[name], (requests,))
    require(len(named["slots"]) == 1, _NAME, "slots", named["slots"], "(rows,)")
    require_shape(_NAME, "cache_rows", named["cache_rows"], named["slots"])
    require(len(named["uniforms"]) == 2 and named["uniforms"][0] == requests, _NAME, "uniforms", named["uniforms"],
            f"({requests}, capacity)")
    require(len(named["eos"]) == 1, _NAME, "eos", named["eos"], "(ends,)")
    for name in ("steps", "forgiving"):
        require_shape(_NAME, name, named[name], (1,))
    if named["lengths"]:
        require_shape(_NAME, "lengths", named["lengths"], (requests,))
        require(len(named["prompt"]) == 2 and named["prompt"][0] == requests, _NAME, "prompt", named["prompt"],
                f"({requests}, prompt length)")
    require(len(named["norm"]) == 1, _NAME, "norm", named["norm"], "(hidden,)")
    hidden = named["norm"][0]
    check_norm(_NAME, "norm", named["norm"], named["norm_eps"], hidden)
    require(len(named["cos"]) == 2, _NAME, "cos", named["cos"], "(max_len, head_dim / 2)")
    require_shape(_NAME, "sin", named["sin"], named["cos"])
    table, head, at = _ends(shapes)
    check_base(_NAME, table, shapes, hidden, " of embed_tokens")
    check_linear(_NAME, head, shapes, hidden, " of lm_head")
    check_layer_shapes(_NAME, hidden, named["cos"], shapes, at)
    capacity = named["uniforms"][1]
    return [capacity, requests, 3], [capacity, requests, 4], [requests], [requests], [requests], [requests], \
        [capacity, requests, MOST_TOP], [capacity, requests, DETAILS]


def _dtypes(shapes, *dtypes):
    kinds = [element_type(dtype) for dtype in dtypes]
    for name, kind in zip(ARGUMENTS, kinds):
        if name == "norm":
            allowed = (ms.float32, ms.bfloat16)
        elif name in _REAL:
            allowed = (ms.float32,)
        elif name in ("prompt", "lengths", *TENSORS[4:]):
            allowed = (ms.int32, ms.float32)  # float32: ABSENT
        else:
            allowed = (ms.int32,)
        require_dtype(_NAME, name, kind, allowed)
    table, head, at = _ends(shapes)
    check_linear_dtypes(f"{_NAME} (embed_tokens)", table, kinds)
    check_linear_dtypes(f"{_NAME} (lm_head)", head, kinds)
    check_layer_dtypes(_NAME, shapes, kinds, at)
    return ms.int32, ms.float32, ms.int32, ms.int32, ms.int32, ms.int32, ms.int32, ms.float32


operation("decode_steps", cpu=lambda: custom(_NAME, _shapes, _dtypes, by_shapes=True))
