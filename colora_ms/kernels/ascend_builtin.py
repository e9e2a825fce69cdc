"""Ascend's built-in operators as the device path calls them in graphs: one face each, with the contract it keeps.

Columns: ``ascend`` (the primitive of ``mindspore.ops.auto_generate``) and ``rehearsal`` (on a CPU, a strict stand-in
behind the very same call; :mod:`colora_ms.kernels.rehearsal`). The contracts are those of 910B/910_93 (A2/A3) as
MindSpore 2.9's inference functions, CANN's documents and the calls of mindformers 1.9 have them. Half types means
float16 or bfloat16. Numbers that are no tensors (epsilon, heads, scale) are constants of the graph.

Not yet run on an NPU.
"""

from __future__ import annotations

import functools
from typing import Optional

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels import bound
from colora_ms.kernels.ascend_builtin_calls import CALLS
from colora_ms.kernels.registry import bind, fill, operation, table
from colora_ms.kernels.rehearsal import STAND_INS

#: Side of the mask that FlashAttentionScore takes for prompts (layout TH).
PROMPT_MASK = 128

#: Side of the mask that it takes for training (layout BSH, sparse_mode 2).
TRAINING_MASK = 2048

#: face -> whether MindSpore has a gradient of its operator; a reshape and a cut have those of their kind.
GRADIENTS = {"rms_norm": True, "add_rms_norm": True, "rotary": False, "reshape_and_cache": False,
             "paged_attention": False, "flash_attention": True, "causal": True, "swiglu": True, "linear": True,
             "product": True, "where": True, "grouped_linear": True, "top_experts": False, "by_expert": False,
             "from_experts": True, "scaled_rows": True, "quantized_linear": False, "embedding": True, "add": True,
             "reshape": True, "split": True}


def rms_norm(x: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """``gamma * x / sqrt(mean(x^2) + eps)`` over the last axis (RmsNorm; its first output).

    Args:
        x: (..., hidden) float16, bfloat16 or float32.
        gamma: (hidden,) of x's dtype, or float32.
        eps: a constant in (0, 1].

    Returns:
        x's shape and dtype.
    """
    return bound.builtin_rms_norm(x, gamma, eps)


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of a sum and the sum (AddRmsNorm; its first and third outputs).

    Args:
        x1, x2: (..., hidden), one shape and dtype.
        gamma: (hidden,) of the same dtype.
        eps: a constant in (0, 1].

    Returns:
        ``(rms_norm(x1 + x2, gamma, eps), x1 + x2)``.
    """
    return bound.builtin_add_rms_norm(x1, x2, gamma, eps)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding in the halves convention (ApplyRotaryPosEmb with cos_format 2: a row of cos for each token).

    The two-dimensional form of MindSpore's internal library, the one mindformers and vLLM-MindSpore call for head sizes
    64 and 128 alike; aclnn's own form is 4-D and wants 128.

    Args:
        query: (tokens, heads * head_dim), half type; the axis a multiple of 32 bytes.
        key: (tokens, kv_heads * head_dim) of query's dtype.
        cos, sin: (tokens, head_dim) of query's dtype, gathered at the tokens' positions; both halves of a row alike.
        lengths: (rows,) int32, the graph's batch_valid_length; not read in this format.

    Returns:
        (query, key), rotated.
    """
    return bound.builtin_rotary(query, key, cos, sin, lengths)


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
                      slot_mapping: Tensor) -> Tensor:
    """Write keys and values into the paged caches in place (ReshapeAndCache).

    Args:
        key, value: (1, tokens, kv_heads * head_dim) or (tokens, 1, kv_heads * head_dim), half type, contiguous.
        key_cache, value_cache: Parameters (blocks, block, kv_heads, head_dim) of key's dtype; never float32.
        slot_mapping: (tokens,) int32: block number * block + place; -1 writes nothing; no place twice.

    Returns:
        key. The write is a side effect; make what reads the caches depend on the result (``ops.depend``).
    """
    return bound.builtin_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, block_tables: Tensor,
                    batch_valid_length: Tensor, q_seq_lens: Optional[Tensor], mask: Optional[Tensor], head_num: int,
                    scale: float, kv_head_num: int) -> Tensor:
    """Attention over the paged caches (PagedAttention): one query token a row, or several with a mask.

    The operator takes its lengths not from its arguments but, on the host when the graph starts, from the graph's
    inputs *named* ``batch_valid_length`` and ``q_seq_lens`` (arguments of the top Cell's construct).

    Args:
        query: (tokens, heads * head_dim), (1, tokens, ...) or (tokens, 1, ...), half type.
        key_cache, value_cache: (blocks, block, kv_heads, head_dim) of query's dtype. head_dim <= 256; block * head_dim
            <= 128^2; block 16, 32, 64 or 128.
        block_tables: (rows, blocks of a row) int32; behind those that a row uses anything.
        batch_valid_length: (rows,) int32, positions of each row, the new ones counted; at least 1.
        q_seq_lens: None (one query token a row), or (rows,) int32, new tokens of each row; they sum to tokens.
        mask: None, zeros (1, 1), or (tokens, positions) of query's dtype: 0 up to a token's own position, -10000
            behind it. Needed where a row has several query tokens.
        head_num, scale, kv_head_num: constants.

    Returns:
        query's shape and dtype.
    """
    return bound.builtin_paged_attention(query, key_cache, value_cache, block_tables, batch_valid_length, q_seq_lens,
                                         mask, head_num, scale, kv_head_num)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, head_num: int, scale: float) -> Tensor:
    """Causal attention of whole prompts, one behind another (FlashAttentionScore, layout TH; its fourth output).

    The lengths come from the graph's inputs named ``actual_seq_qlen`` and ``actual_seq_kvlen``, or else ``q_seq_lens``
    and ``batch_valid_length``: counts (not sums), at least 1 each, that sum to the tokens.

    Args:
        query: (tokens, heads * head_dim), half type. key, value: (tokens, kv_heads * head_dim), the same.
        mask: (128, 128) of the dtype; above the diagonal -10000 (float16) or 1 (bfloat16), else 0.
        head_num, scale: constants.

    Returns:
        query's shape and dtype.
    """
    return bound.builtin_flash_attention(query, key, value, mask, head_num, scale)


def causal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, head_num: int, scale: float) -> Tensor:
    """Attention of whole rows for training (FlashAttentionScore, layout BSH; its fourth output): causal by a mask of a
    fixed size (sparse_mode 2), or of what the whole mask leaves (sparse_mode 1; packed rows).

    Args:
        query: (rows, tokens, heads * head_dim), half type. key, value: (rows, tokens, kv_heads * head_dim), the same.
        mask: uint8. (2048, 2048), 1 above the diagonal, however many tokens there are (``bound.builtin_causal_mask``);
            or (rows, 1, tokens, tokens), 1 where a query does not see a key. Each query sees one at least.
        head_num, scale: constants; at most 256 heads, head_dim a multiple of 16 up to 512.

    Returns:
        query's shape and dtype.

    Gradients: query, key and value (FlashAttentionScoreGrad).
    """
    return bound.builtin_causal(query, key, value, mask, head_num, scale)


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(first half) * second half`` of the last axis (Swiglu): gate and up come from one product.

    Args:
        gate_up: (..., 2 * width), float16, bfloat16 or float32.

    Returns:
        (..., width).
    """
    return bound.builtin_swiglu(gate_up)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` (MatMul with transpose_b: the weight is read as it lies, no copy).

    Args:
        x: (tokens, in). weight: (out, in) of x's dtype.

    Returns:
        (tokens, out) of x's dtype; sums are float32.
    """
    return bound.builtin_linear(x, weight)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` (MatMul, nothing transposed): for banks that lie rank-major.

    Args:
        x: (tokens, in). matrix: (in, out) of x's dtype.

    Returns:
        (tokens, out) of x's dtype; sums are float32.
    """
    return bound.builtin_product(x, matrix)


def where(mask: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """x where the mask is true, other elsewhere (Select): what is not chosen does not count, not even a NaN.

    Args:
        mask: bool of x's shape. x: half type or float32. other: (1,) of x's dtype.
    """
    return bound.builtin_where(mask, x, other)


def grouped_linear(x: Tensor, weight: Tensor, group_list: Tensor, counts: bool = False) -> Tensor:
    """``x[rows of g] @ weight[g]`` for rows sorted by group (GroupedMatmulV4, split_item 3, group_type 0).

    Args:
        x: (rows, in), half type or float32; in < 65,536.
        weight: (groups, in, out) of x's dtype, at most 1,024 groups; out < 65,536. Not transposed: a bank for the
            shrink is (groups, in, rank), for the expand (groups, rank, out).
        group_list: (groups,) int64 on the device: ends of the groups, or their sizes with ``counts``.
        counts: which of them; a constant.

    Returns:
        (rows, out) of x's dtype. Rows behind the last group are **not written**: let group 0 be a zero adapter.
    """
    return bound.builtin_grouped_linear(x, weight, group_list, counts)


def top_experts(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of the softmax of a row, and where they stand (MoeGatingTopKSoftmax; its first two outputs).

    Args:
        logits: (tokens, experts), half type or float32. Numbers that are not finite are not for the operator: its
            documents do not say what it takes for their experts.
        count: a constant, 1 to the experts, at most 1,024.

    Returns:
        (tokens, count) of logits' dtype, the largest first, not divided by their sum; (tokens, count) int32.
    """
    return bound.builtin_top_experts(logits, count)


def by_expert(x: Tensor, experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token once for each of its experts, an expert's tokens beside each other in their order (MoeInitRoutingV2,
    nothing dropped; its first three outputs).

    Args:
        x: (tokens, hidden), half type or float32.
        experts: (tokens, k) int32, 0 to count - 1; count: a constant, how many experts there are.

    Returns:
        ((tokens * k, hidden) of x's dtype, (tokens * k,) int32: at i * k + j the row of it that is token i for its j-th
        expert, (count,) int32: how many each expert has).
    """
    return bound.builtin_by_expert(x, experts, count)


def from_experts(y: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """The sum over a token's experts of what they made of it times its shares (MoeTokenUnpermute).

    Args:
        y: (tokens * k, hidden), half type or float32, in the order of :func:`by_expert`.
        places: (tokens * k,) int32, its second result: none twice. shares: (tokens, k) of y's dtype; k at most 512.

    Returns:
        (tokens, hidden) of y's dtype; sums are float32.
    """
    return bound.builtin_from_experts(y, places, shares)


def scaled_rows(x: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor (Mul): x (rows, columns), factors (rows, 1) of one dtype."""
    return bound.builtin_scaled_rows(x, factors)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, group: int = 0) -> Tensor:
    """``x @ (weight * scale).T`` (WeightQuantBatchMatmul with transpose_weight). There is no bias: MindSpore wants a
    bfloat16 one, aclnn a float32 one.

    Args:
        x: (tokens, in), half type.
        weight: (out, in) int8; or (out, in / 2) qint4x2 with the low nibble the even column, values -8..7 in two's
            complement (our stored + 8 loses the 8 first).
        scale: x's dtype; (out,) or (1, out), or with groups (ceil(in / group), out).
        group: 0, or a multiple of 32 up to in - 1; a constant.

    Returns:
        (tokens, out) of x's dtype.
    """
    return bound.builtin_quantized_linear(x, weight, scale, group)


def embedding(table: Tensor, tokens: Tensor) -> Tensor:
    """``table[tokens]`` (Gather on axis 0); numbers out of range are not checked on the device.

    Args:
        table: (vocabulary, hidden). tokens: int32 of any shape.

    Returns:
        tokens' shape + (hidden,), table's dtype.
    """
    return bound.builtin_embedding(table, tokens)


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b`` (Add) of one dtype; b has a's shape, or is a row, (columns,), as a bias is."""
    return bound.builtin_add(a, b)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in another shape of one to four axes (Reshape): a view, no launch. A CPU has no Reshape for bfloat16, which is
    why the rehearsal needs a face for it."""
    return bound.builtin_reshape(x, shape)


def split(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The last axis cut into two or three parts (SplitWithSize): one launch that copies, so that the parts are
    contiguous, as the operators of the internal library want them.

    Args:
        x: (..., sum of the sizes). sizes: two or three constants.
    """
    return bound.builtin_split(x, sizes)


def prompt_mask(dtype: ms.Type) -> Tensor:
    """The mask of :func:`flash_attention`: (128, 128) of a half type."""
    ones = ops.triu(ops.ones((PROMPT_MASK, PROMPT_MASK), ms.float32), 1)
    return (ones * (1.0 if dtype == ms.bfloat16 else -10000.0)).astype(dtype)


def _causal_mask():
    return Tensor(np.triu(np.ones((TRAINING_MASK, TRAINING_MASK), np.uint8), 1))


operation("builtin_causal_mask", ascend=_causal_mask, rehearsal=_causal_mask)
for _name in CALLS:
    operation(f"builtin_{_name}", ascend=functools.partial(CALLS.__getitem__, _name),
              rehearsal=functools.partial(STAND_INS.__getitem__, _name))


def load() -> None:
    """Make the faces of this module usable beside another column of the table, with their stand-ins; for tests."""
    bind()
    fill([name for name, _ in table() if name.startswith(("builtin_", "rehearsal_"))], "rehearsal")
