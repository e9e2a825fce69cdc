"""Wrong calls of Ascend's built-in operators: each is refused with a sentence, by MindSpore's own inference of the real
operator, by the stand-in's check while the graph is compiled, or by its check when it runs.

What is checked when the operator runs is tried without MindSpore (a graph takes three seconds to say that a kernel
failed), but once.
"""
import ctypes

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor  # noqa: E402

from colora_ms.kernels import ascend_builtin as device  # noqa: E402
from colora_ms.kernels.aot import KernelError  # noqa: E402
from colora_ms.kernels.rehearsal import last_refusal, library  # noqa: E402
from test_rehearsal import (  # noqa: E402, F401
    AddRmsNorm,
    Chosen,
    Chunks,
    Decode,
    Embedding,
    Grouped,
    Linear,
    Nameless,
    Prompt,
    Quantized,
    RmsNorm,
    Rotary,
    Swiglu,
    Write,
    chunk_mask,
    loaded,
    paged,
    random,
)

H, B, F = ms.float16, ms.bfloat16, ms.float32


def t(*shape, dtype=H):
    return Tensor(np.ones(shape), dtype)


def ints(*values):
    return Tensor(np.array(values, np.int32))


def refused(words, cell, *arguments):
    with pytest.raises((KernelError, RuntimeError, TypeError, ValueError), match=words):
        cell(*arguments)


@pytest.mark.parametrize("words, cell, arguments", [
    ("gamma", RmsNorm(), (t(3, 32), t(32, dtype=B))),
    ("gamma", RmsNorm(), (t(3, 32), t(16))),
    ("gamma has dtype Float32", AddRmsNorm(), (t(3, 32), t(3, 32), t(32, dtype=F))),
    ("query has dtype Float32", Rotary(), (t(3, 64, dtype=F), t(3, 64, dtype=F), t(3, 64, dtype=F), t(3, 64, dtype=F),
                                           ints(3))),
    ("cos has dtype Float32", Rotary(), (t(3, 64), t(3, 64), t(3, 64, dtype=F), t(3, 64, dtype=F), ints(3))),
    ("query has shape", Rotary(), (t(1, 3, 1, 64), t(1, 3, 1, 64), t(1, 3, 1, 64), t(1, 3, 1, 64), ints(3))),
    ("head_dim is 48", Rotary(), (t(3, 96), t(3, 96), t(3, 48), t(3, 48), ints(3))),
    ("[Ii]nput|even", Swiglu(), (t(3, 33),)),
    ("MatMul", Linear(), (t(3, 32), t(32, 30))),
    ("weight has dtype|same dtype|must be", Linear(), (t(3, 32), t(30, 32, dtype=F))),
    ("MatMul", Chosen(), (t(3, 32, dtype=ms.bool_), t(3, 32), t(1), t(30, 32))),
    ("mask has shape", Chosen(), (t(1, 32, dtype=ms.bool_), t(3, 32), t(1), t(32, 30))),
    ("other has dtype|type", Chosen(), (t(3, 32, dtype=ms.bool_), t(3, 32), t(1, dtype=F), t(32, 30))),
    ("indices has dtype Int64", Embedding(), (t(8, 32), Tensor(np.array([1], np.int64)))),
    ("group_list has dtype", Grouped(), (t(6, 32), t(2, 32, 16), ints(2, 6))),
    ("weight has shape|shape", Grouped(), (t(6, 32), t(2, 16, 32), Tensor(np.array([2, 6])))),
    ("antiquant_group_size", Quantized(16), (t(3, 64), t(8, 64, dtype=ms.int8), t(4, 8))),
    ("antiquant_scale has shape", Quantized(), (t(3, 64), t(8, 64, dtype=ms.int8), t(8, 1))),
    ("antiquant_scale has shape", Quantized(32), (t(3, 64), t(8, 64, dtype=ms.int8), t(8, 2))),
    ("antiquant_scale", Quantized(), (t(3, 64), t(8, 64, dtype=ms.int8), t(8, dtype=F))),
])
def test_shapes_dtypes_and_attributes(words, cell, arguments):
    refused(words, cell, *arguments)


def test_there_is_no_bias_to_be_passed():
    with pytest.raises(TypeError, match="bias"):
        device.quantized_linear(t(3, 64), t(8, 64, dtype=ms.int8), t(8), bias=t(8))


def cache_call(key, cache=H, block=16):
    held = t(4, block, 2, 64, dtype=cache)
    return Write(held, held.copy()), (key, key.copy(), ints(1, 2, 3))


@pytest.mark.parametrize("words, call", [
    ("num_tokens|key has shape", cache_call(t(3, 2, 64))),
    ("key has shape", cache_call(t(3, 128))),
    ("Float32", cache_call(t(1, 3, 128, dtype=F), F)),
    ("dtype", cache_call(t(1, 3, 128, dtype=B))),
    ("block size is 24", cache_call(t(1, 3, 128), block=24)),
])
def test_writing_the_cache(words, call):
    refused(words, call[0], *call[1])


@pytest.mark.parametrize("words, change", [
    ("key_cache", {"key_cache": t(7, 16, 2, 64, dtype=F), "value_cache": t(7, 16, 2, 64, dtype=F)}),
    ("head_dim is 320", {"key_cache": t(7, 16, 2, 320), "value_cache": t(7, 16, 2, 320), "query": t(3, 1280)}),
    (r"block \* head_dim is 32768", {"key_cache": t(7, 128, 2, 256), "value_cache": t(7, 128, 2, 256),
                                     "query": t(3, 1024)}),
    ("Int64 of shape", {"lengths": Tensor(np.array([1, 20, 3], np.int64))}),
    ("block_tables", {"tables": Tensor(np.zeros((3, 2), np.int64))}),
])
def test_paged_attention(random, words, change):  # noqa: F811
    names = ("query", "key_cache", "value_cache", "tables", "lengths")
    case = dict(zip(names, paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])))
    refused(words, Decode(), *{**case, **change}.values())


def test_heads_masks_and_names_of_paged_attention(random):  # noqa: F811
    case = paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])
    refused("kv_head_num is 4", Decode(4, 4), *case)
    refused("head_num is 3", Decode(3, 2), *case)
    refused("attn_mask has dtype", Chunks(), *case, ints(1, 1, 1), chunk_mask([1, 20, 3], [1, 1, 1], 32, B))
    refused("no input named 'batch_valid_length'", Nameless(), *case)


@pytest.mark.parametrize("dtype, other", [(H, B), (B, H)])
def test_masks_of_prompts(dtype, other):
    x, kv, two = t(6, 256, dtype=dtype), t(6, 128, dtype=dtype), ints(2, 4)
    refused("attn_mask has dtype", Prompt(), x, kv, kv, device.prompt_mask(other), two, two)
    refused("attn_mask", Prompt(), x, kv, kv, t(64, 64, dtype=dtype), two, two)


# -- what the operators check when they run ---------------------------------------------------------------------------

def call(operator, *arrays, boost=True, started=True, **named):
    """Call a stand-in with arrays (the last ones are outputs); bfloat16 is uint16 here. Returns its sentence, or ""."""
    functions = ctypes.CDLL(str(library()))
    if started:
        functions.colora_rehearsal_start(int(boost))
    for name, values in named.items():
        held = np.array(values, np.int32)
        functions.colora_rehearsal_input(name.encode(), ctypes.c_void_p(held.ctypes.data), ctypes.c_int64(held.size))
    arrays = [np.ascontiguousarray(array) if np.ndim(array) else np.array(array) for array in arrays]
    kinds = [b"bfloat16" if array.dtype == np.uint16 else str(array.dtype).encode() for array in arrays]
    shapes = [np.array(array.shape or (0,), np.int64) for array in arrays]
    count = len(arrays)
    status = getattr(functions, operator)(
        count, (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
        (ctypes.c_int * count)(*[array.ndim for array in arrays]),
        (ctypes.c_void_p * count)(*[shape.ctypes.data for shape in shapes]), (ctypes.c_char_p * count)(*kinds), None,
        None)
    functions.colora_rehearsal_end()
    return last_refusal() if status else ""


NONE = np.float32(0)  # an argument left out


@pytest.mark.parametrize("words, slots", [("slot_mapping[1] is 64", (0, 64, 1)), ("slot_mapping[0] is -2", (-2, 0, 1)),
                                          ("place 5 twice", (5, 5, -1)), ("", (5, -1, -1))])
def test_places_in_the_cache(words, slots):
    key, cache = np.ones((1, 3, 128), np.float16), np.zeros((4, 16, 2, 64), np.float16)
    said = call("ReshapeAndCache", key, key, cache, cache.copy(), np.array(slots, np.int32), key)
    assert words in said and bool(words) == bool(said)


def paged_call(lengths=(5, 30), queries=(3, 1), table=0, mask=None, asked=True, names=None, given=None, **options):
    cache = np.ones((4, 16, 2, 64), np.float16)
    query = np.ones((4, 256), np.float16)
    if mask is None:
        rows = [np.where(np.arange(32) <= length - count + t, 0, -10000.0)
                for length, count in zip((5, 30), (3, 1)) for t in range(count)]
        mask = np.stack(rows)
    mask = mask if mask is NONE else np.asarray(mask, np.float16)
    queries_ = np.array(queries, np.int32) if asked else NONE
    names = {"batch_valid_length": lengths, "q_seq_lens": queries} if names is None else names
    return call("PagedAttention", query, cache, cache, np.full((2, 2), table, np.int32),
                np.array(lengths if given is None else given, np.int32), mask, queries_, np.int64(4),
                np.float32(0.125), np.int64(2), query, **names, **options)


def test_lengths_tables_and_masks_of_paged_attention():
    right = np.stack([np.where(np.arange(32) <= at, 0, -10000.0) for at in (2, 3, 4, 29)])
    assert paged_call() == ""
    assert "infer_boost" in paged_call(boost=False)
    assert "did not start as a Cell" in paged_call(names={}, started=False)
    assert "no input named 'batch_valid_length'" in paged_call(names={"q_seq_lens": (3, 1)})
    assert "no input named 'q_seq_lens'" in paged_call(names={"batch_valid_length": (5, 30)})
    assert "differs from the argument context_lens" in paged_call(given=(4, 30))
    assert "sum to 5" in paged_call(queries=(3, 2))
    assert "one a row without q_seq_lens" in paged_call(asked=False)
    assert "above the 32 places" in paged_call(lengths=(5, 33))
    assert "batch_valid_length is 0" in paged_call(lengths=(5, 0))
    assert "block 9 of block_tables" in paged_call(table=9)
    assert "sees its future" in paged_call(mask=NONE)
    assert "sees its future" in paged_call(mask=np.zeros((1, 1)))
    assert "attn_mask[0, 3] is 1" in paged_call(mask=right != 0)
    assert "attn_mask[0, 0] is -10000" in paged_call(mask=np.full((4, 32), -10000.0))
    assert "covers 20 positions" in paged_call(mask=right[:, :20])


def test_masks_and_lengths_of_flash_attention():
    above = np.triu(np.ones((128, 128)), 1)

    def said(mask, queries=(2, 4), keys=(2, 4), dtype=np.float16):
        x, kv = np.ones((6, 256), dtype), np.ones((6, 128), dtype)
        return call("FlashAttentionScore", x, kv, kv, mask.astype(dtype), np.int64(4), np.float32(0.125), x,
                    batch_valid_length=keys, q_seq_lens=queries)

    half, bf16 = above * -10000, above * 0x3F80  # the bits of 1 in bfloat16
    assert said(half) == said(bf16, dtype=np.uint16) == ""
    assert "attends to the future" in said(above)
    assert "attends to the future" in said(above * 0xC61C, dtype=np.uint16)  # about -10000
    assert "sum to 5" in said(half, (2, 3), (2, 3))
    assert "goes to PagedAttention" in said(half, (2, 4), (3, 4))


def test_groups_that_are_not_sorted_or_reach_too_far():
    def said(groups, counts):
        return call("GroupedMatmul", np.ones((6, 32), np.float16), np.ones((2, 32, 16), np.float16),
                    np.array(groups, np.int64), np.int64(counts), np.ones((6, 16), np.float16))

    assert said((2, 6), 0) == said((2, 4), 1) == ""
    assert "group_list[1] is 2" in said((4, 2), 0)
    assert "group_list[1] is 7" in said((4, 7), 0)
    assert "group_list[0] is -1" in said((-1, 7), 1)


def test_rotations_with_halves_that_differ_tokens_out_of_range_and_a_bad_epsilon():
    x, cos = np.ones((3, 64), np.float16), np.arange(64, dtype=np.float16)[None].repeat(3, 0)
    assert "two halves" in call("ApplyRotaryPosEmb", x, x, cos, cos, np.array([3], np.int32), np.int64(2), x, x)
    assert "index 8" in call("Gather", np.ones((8, 32), np.float16), np.array([8], np.int32), x[:1, :32])
    assert "epsilon is 0" in call("RmsNorm", x, x[0], np.float32(0), x, np.ones((3, 1), np.float32))
