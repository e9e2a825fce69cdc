"""The column ``rehearsal``: on a CPU, a strict stand-in for each operator that Ascend has built in.

A stand-in is one opaque node of the graph, and (a) calls the real primitive in the same graph with the same arguments
and uses its shape alone: MindSpore's own inference of the real operator runs and the node falls away; (b) checks what
the operator's documents ask for, shapes and dtypes while the graph is compiled, values when it runs; (c) computes it in
float32 and rounds to the outputs' dtype. Sources: ``ops/rehearsal``.

The attention operators read lengths as the device does: by name, on the host, from the inputs of the graph of a top
Cell. :func:`publish_inputs` gives them to the library whenever such a graph starts.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate as primitives
from mindspore.ops._primitive_cache import _get_cache_prim

from colora_ms.kernels import bound
from colora_ms.kernels.aot import ABSENT, KernelError, run_builder, source_builder
from colora_ms.kernels.ascend import note_library
from colora_ms.kernels.ascend_builtin_calls import CALLS
from colora_ms.kernels.registry import operation
from colora_ms.kernels.rehearsal_checks import CHECKS, argument

#: No limit of how far a query sees, as FlashAttentionScoreGrad's pre_tokens and next_tokens.
_FAR = 2147483647

#: Names of graph inputs whose values operators read on the host.
NAMED = ("batch_valid_length", "q_seq_lens", "actual_seq_qlen", "actual_seq_kvlen")


@functools.cache
def library() -> Path:
    """Path of the compiled stand-ins, built when they are not there.

    Raises:
        KernelError: there are no sources, or no compiler.
    """
    builder = source_builder("rehearsal")
    if not builder.is_file():
        raise KernelError(f"{builder} does not exist: the rehearsal runs from the source tree alone")
    try:
        return run_builder(builder)
    except RuntimeError as error:
        raise KernelError(str(error)) from error


@functools.cache
def _functions() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library()))
    loaded.colora_rehearsal_error.restype = ctypes.c_char_p
    loaded.colora_rehearsal_input.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64)
    return loaded


def last_refusal() -> str:
    """The sentence of the last stand-in that refused its call since a graph was started; "" if none did."""
    return _functions().colora_rehearsal_error().decode("utf-8", "replace")


@functools.cache
def publish_inputs() -> None:
    """From now on, whenever a Cell starts its graph, give the inputs of :data:`NAMED` to the stand-ins.

    That is what the device's runtime does with these names when a graph starts. Done once, for the process.
    """
    for name in ("compile_and_run", "_predict"):  # a Cell of phase "prefill" or "increment" has a short way of its own
        setattr(nn.Cell, name, _publishing(getattr(nn.Cell, name)))


def _publishing(plain):
    @functools.wraps(plain)
    def started(self, *args, **kwargs):
        functions = _functions()
        given = inspect.signature(self.construct).bind(*args, **kwargs).arguments
        boost = {**ms.context.get_jit_config(), **self.jit_config_dict}.get("infer_boost") == "on"
        functions.colora_rehearsal_start(int(boost))
        for name in NAMED:
            if isinstance(given.get(name), Tensor):
                _publish(functions, name, given[name])
        try:
            return plain(self, *args, **kwargs)
        except RuntimeError as error:
            said = last_refusal()
            if not said:
                raise
            raise KernelError(said) from error
        finally:
            functions.colora_rehearsal_end()

    return started


def _publish(functions, name, value):
    if value.dtype != ms.int32 or value.ndim != 1:
        raise KernelError(f"the graph's input {name} is {value.dtype} of shape {tuple(value.shape)}, expected int32 of "
                          "one axis: the runtime reads it as that without a check")
    numbers = np.ascontiguousarray(value.asnumpy())
    functions.colora_rehearsal_input(name.encode(), numbers.ctypes.data, numbers.size)


class _StandIn(ops.Custom):
    """An ``ops.Custom`` whose one inference function sees shapes, dtypes and constants together."""

    def __init__(self, name, bprop=None):
        publish_inputs()
        note_library(library())
        super().__init__(f"{library()}:{name}", lambda *_: None, lambda *_: None, "aot", bprop=bprop)
        self._check = CHECKS[name]

    def __infer__(self, *args):
        outputs = self._check(*[argument(one) for one in args])
        shapes, dtypes = tuple(shape for shape, _ in outputs), tuple(dtype for _, dtype in outputs)
        one = len(outputs) == 1
        return {"shape": shapes[0] if one else shapes, "dtype": dtypes[0] if one else dtypes, "value": None}


def _real_reshape_and_cache() -> Any:
    """The primitive without its side effect: only its inference is wanted, and the node is to fall away."""
    primitive = primitives.ReshapeAndCache()
    primitive.add_prim_attr("side_effect_mem", False)
    return primitive


def _writing() -> ops.Custom:
    made = _StandIn("ReshapeAndCache")
    made.add_prim_attr("side_effect_mem", True)
    return made


def _causal_bprop(query, key, value, mask, head_num, scale, out, dout):
    sparse_mode = 2 if mask.ndim == 2 else 1
    real = _get_cache_prim(primitives.FlashAttentionScoreGrad)(head_num, 1.0, scale, _FAR, _FAR, 0, "BSH", sparse_mode)(
        query, key, value, dout[3], None, None, None, mask, out[0], out[1], out[2], out[3])
    dq, dk, dv = bound.rehearsal_FlashAttentionScoreGrad(query, key, value, dout[3], mask, out[0], out[1], out[3],
                                                         head_num, scale)
    return _agreed(dq, real[0]), _agreed(dk, real[1]), _agreed(dv, real[2]), ops.zeros_like(mask), 0, 0.0


for _operator in CHECKS:
    if _operator not in ("ReshapeAndCache", "FlashAttentionScoreBSH"):
        operation(f"rehearsal_{_operator}", rehearsal=functools.partial(_StandIn, _operator))
operation("rehearsal_ReshapeAndCache", rehearsal=_writing)
operation("rehearsal_FlashAttentionScoreBSH",
          rehearsal=functools.partial(_StandIn, "FlashAttentionScoreBSH", _causal_bprop))
operation("rehearsal_reshape_and_cache_inference", rehearsal=_real_reshape_and_cache)


# -- the stand-ins; the arguments are those of the faces ---------------------------------------------------------------

def _agreed(y, real):
    """y, when it is what the real operator's inference says."""
    if y.shape != real.shape or y.dtype != real.dtype:
        raise ValueError("a stand-in's result has another shape or dtype than the real operator's")
    return y


def _rms_norm(x, gamma, eps):
    return _agreed(bound.rehearsal_RmsNorm(x, gamma, eps)[0], CALLS["rms_norm"](x, gamma, eps))


def _add_rms_norm(x1, x2, gamma, eps):
    real = CALLS["add_rms_norm"](x1, x2, gamma, eps)
    y, _, total = bound.rehearsal_AddRmsNorm(x1, x2, gamma, eps)
    return _agreed(y, real[0]), _agreed(total, real[1])


def _rotary(query, key, cos, sin, lengths):
    real = CALLS["rotary"](query, key, cos, sin, lengths)
    turned, turned_key = bound.rehearsal_ApplyRotaryPosEmb(query, key, cos, sin, lengths, 2)
    return _agreed(turned, real[0]), _agreed(turned_key, real[1])


def _reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    real = bound.rehearsal_reshape_and_cache_inference(key, value, key_cache, value_cache, slot_mapping)
    y = bound.rehearsal_ReshapeAndCache(key, value, key_cache, value_cache, slot_mapping)
    if y.shape != real.shape or y.dtype != real.dtype:  # as argument of _agreed the node would not fall away
        raise ValueError("a stand-in's result has another shape or dtype than the real operator's")
    return y


def _paged_attention(query, key_cache, value_cache, block_tables, batch_valid_length, q_seq_lens, mask, head_num, scale,
                     kv_head_num):
    real = CALLS["paged_attention"](query, key_cache, value_cache, block_tables, batch_valid_length, q_seq_lens, mask,
                                    head_num, scale, kv_head_num)
    asked = ABSENT if q_seq_lens is None else q_seq_lens
    hidden = ABSENT if mask is None else mask
    y = bound.rehearsal_PagedAttention(query, key_cache, value_cache, block_tables, batch_valid_length, hidden, asked,
                                       head_num, scale, kv_head_num)
    return _agreed(y, real)


def _flash_attention(query, key, value, mask, head_num, scale):
    real = CALLS["flash_attention"](query, key, value, mask, head_num, scale)
    return _agreed(bound.rehearsal_FlashAttentionScore(query, key, value, mask, head_num, scale), real)


def _causal(query, key, value, mask, head_num, scale):
    real = CALLS["causal"](query, key, value, mask, head_num, scale)
    return _agreed(bound.rehearsal_FlashAttentionScoreBSH(query, key, value, mask, head_num, scale)[3], real)


def _swiglu(gate_up):
    return _agreed(bound.rehearsal_Swiglu(gate_up, -1), CALLS["swiglu"](gate_up))


def _linear(x, weight):
    return _agreed(bound.rehearsal_MatMul(x, weight), CALLS["linear"](x, weight))


def _product(x, matrix):
    return _agreed(bound.rehearsal_Product(x, matrix), CALLS["product"](x, matrix))


def _where(mask, x, other):
    return _agreed(bound.rehearsal_Select(mask, x, other), CALLS["where"](mask, x, other))


def _grouped_linear(x, weight, group_list, counts):
    real = CALLS["grouped_linear"](x, weight, group_list, counts)
    return _agreed(bound.rehearsal_GroupedMatmul(x, weight, group_list, 1 if counts else 0), real)


def _top_experts(logits, count):
    real = CALLS["top_experts"](logits, count)
    shares, experts, _ = bound.rehearsal_MoeGatingTopKSoftmax(logits, count)
    return _agreed(shares, real[0]), _agreed(experts, real[1])


def _by_expert(x, experts, count):
    real = CALLS["by_expert"](x, experts, count)
    rows, places, sizes, _ = bound.rehearsal_MoeInitRoutingV2(x, experts, count)
    return _agreed(rows, real[0]), _agreed(places, real[1]), _agreed(sizes, real[2])


def _from_experts(y, places, shares):
    return _agreed(bound.rehearsal_MoeTokenUnpermute(y, places, shares), CALLS["from_experts"](y, places, shares))


def _scaled_rows(x, factors):
    return _agreed(bound.rehearsal_Mul(x, factors), CALLS["scaled_rows"](x, factors))


def _quantized_linear(x, weight, scale, group):
    real = CALLS["quantized_linear"](x, weight, scale, group)
    return _agreed(bound.rehearsal_WeightQuantBatchMatmul(x, weight, scale, group), real)


def _embedding(table, tokens):
    return _agreed(bound.rehearsal_Gather(table, tokens), CALLS["embedding"](table, tokens))


def _add(a, b):
    return _agreed(bound.rehearsal_Add(a, b), CALLS["add"](a, b))


def _reshape(x, shape):
    real = CALLS["reshape"](x, shape)
    axes = real.shape
    if len(axes) == 1:
        return _agreed(bound.rehearsal_Reshape(x, axes[0]), real)
    if len(axes) == 2:
        return _agreed(bound.rehearsal_Reshape(x, axes[0], axes[1]), real)
    if len(axes) == 3:
        return _agreed(bound.rehearsal_Reshape(x, axes[0], axes[1], axes[2]), real)
    return _agreed(bound.rehearsal_Reshape(x, axes[0], axes[1], axes[2], axes[3]), real)


def _split(x, sizes):
    real = CALLS["split"](x, sizes)
    if len(sizes) == 2:
        first, second = bound.rehearsal_SplitWithSize(x, sizes[0], sizes[1])
        return _agreed(first, real[0]), _agreed(second, real[1])
    first, second, third = bound.rehearsal_SplitWithSize(x, sizes[0], sizes[1], sizes[2])
    return _agreed(first, real[0]), _agreed(second, real[1]), _agreed(third, real[2])


#: face -> its stand-in.
STAND_INS = {
    "rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "rotary": _rotary, "reshape_and_cache": _reshape_and_cache,
    "paged_attention": _paged_attention, "flash_attention": _flash_attention, "causal": _causal, "swiglu": _swiglu,
    "linear": _linear, "product": _product, "where": _where, "grouped_linear": _grouped_linear,
    "top_experts": _top_experts, "by_expert": _by_expert, "from_experts": _from_experts, "scaled_rows": _scaled_rows,
    "quantized_linear": _quantized_linear, "embedding": _embedding, "add": _add, "reshape": _reshape, "split": _split}
