"""How graphs call the primitives that Ascend has built in: one function each, constants become attributes.

The faces with their contracts stand in :mod:`colora_ms.kernels.ascend_builtin`. The stand-ins of the rehearsal make the
same calls, so that MindSpore's own shape and dtype inference of the real operator sees the real arguments.
"""

from __future__ import annotations

from mindspore.ops import auto_generate as primitives
from mindspore.ops._primitive_cache import _get_cache_prim

#: No limit of how far a query sees, as FlashAttentionScore's pre_tokens and next_tokens.
_FAR = 2147483647


def _rms_norm(x, gamma, eps):
    return _get_cache_prim(primitives.RmsNorm)(eps)(x, gamma)


def _add_rms_norm(x1, x2, gamma, eps):
    return _get_cache_prim(primitives.AddRmsNorm)()(x1, x2, gamma, eps)


def _rotary(query, key, cos, sin, lengths):
    return _get_cache_prim(primitives.ApplyRotaryPosEmb)(2)(query, key, cos, sin, lengths)


def _reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    return _get_cache_prim(primitives.ReshapeAndCache)()(key, value, key_cache, value_cache, slot_mapping)


def _paged_attention(query, key_cache, value_cache, block_tables, batch_valid_length, q_seq_lens, mask, head_num, scale,
                     kv_head_num):
    return _get_cache_prim(primitives.PagedAttention)(head_num, scale, kv_head_num)(
        query, key_cache, value_cache, block_tables, batch_valid_length, None, None, mask, q_seq_lens)


def _flash_attention(query, key, value, mask, head_num, scale):
    return _get_cache_prim(primitives.FlashAttentionScore)(head_num, 1.0, scale, _FAR, _FAR, 0, "TH", 0)(
        query, key, value, None, None, None, mask)[3]


def _causal(query, key, value, mask, head_num, scale):
    sparse_mode = 2 if mask.ndim == 2 else 1  # causal by a mask of fixed size; the whole mask
    return _get_cache_prim(primitives.FlashAttentionScore)(head_num, 1.0, scale, _FAR, _FAR, 0, "BSH", sparse_mode)(
        query, key, value, None, None, None, mask)[3]


def _swiglu(gate_up):
    return _get_cache_prim(primitives.Swiglu)()(gate_up, -1)


def _linear(x, weight):
    return _get_cache_prim(primitives.MatMul)(False, True)(x, weight)


def _product(x, matrix):
    return _get_cache_prim(primitives.MatMul)(False, False)(x, matrix)


def _where(mask, x, other):
    return _get_cache_prim(primitives.Select)()(mask, x, other)


def _grouped_linear(x, weight, group_list, counts):
    return _get_cache_prim(primitives.GroupedMatmulV4)()(
        [x], [weight], None, None, None, None, None, None, group_list, None, None, None, 3, 0, 1 if counts else 0, 0)[0]


def _top_experts(logits, count):
    return _get_cache_prim(primitives.MoeGatingTopKSoftmax)()(logits, None, count)[:2]


def _by_expert(x, experts, count):
    # as mindformers and vLLM-MindSpore call it: nothing is dropped (0, 0, ..., 0), sizes and not their sums (2); what
    # the last flag asks for is not read
    return _get_cache_prim(primitives.MoeInitRoutingV2)()(x, experts, 0, 0, count, 0, 2, True)[:3]


def _from_experts(y, places, shares):
    return _get_cache_prim(primitives.MoeTokenUnpermute)()(y, places, shares, False, None)


def _scaled_rows(x, factors):
    return _get_cache_prim(primitives.Mul)()(x, factors)


def _quantized_linear(x, weight, scale, group):
    return _get_cache_prim(primitives.WeightQuantBatchMatmul)(False, True, group)(x, weight, scale)


def _embedding(table, tokens):
    return _get_cache_prim(primitives.Gather)()(table, tokens, 0)


def _add(a, b):
    return _get_cache_prim(primitives.Add)()(a, b)


def _first(x, gamma, eps):
    return _rms_norm(x, gamma, eps)[0]


def _first_and_third(x1, x2, gamma, eps):
    y, _, total = _add_rms_norm(x1, x2, gamma, eps)
    return y, total


def _reshape(x, shape):
    return _get_cache_prim(primitives.Reshape)()(x, shape)


def _split(x, sizes):
    return _get_cache_prim(primitives.SplitWithSize)()(x, sizes, -1)


#: face -> the call of its primitive.
CALLS = {
    "rms_norm": _first, "add_rms_norm": _first_and_third, "rotary": _rotary, "reshape_and_cache": _reshape_and_cache,
    "paged_attention": _paged_attention, "flash_attention": _flash_attention, "causal": _causal, "swiglu": _swiglu,
    "linear": _linear, "product": _product, "where": _where, "grouped_linear": _grouped_linear,
    "top_experts": _top_experts, "by_expert": _by_expert, "from_experts": _from_experts, "scaled_rows": _scaled_rows,
    "quantized_linear": _quantized_linear, "embedding": _embedding, "add": _add, "reshape": _reshape, "split": _split}
