"""Wrong calls of Ascend's built-in operators: each is refused with a sentence, by MindSpore's own inference of the real
operator, by the stand-in's check while the graph is compiled, or by its check when it runs."""
import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor  # noqa: E402

from colora_ms.kernels import ascend_builtin as device  # noqa: E402
from colora_ms.kernels.aot import KernelError  # noqa: E402
from test_rehearsal import (  # noqa: E402, F401
    AddRmsNorm,
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
    back,
    chunk_mask,
    loaded,
    paged,
    random,
    tensor,
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


def cache_call(key, slots=(1, 2, 3), cache=H, block=16, dim=64):
    held = t(4, block, 2, dim, dtype=cache)
    return Write(held, held.copy()), (key, key.copy(), ints(*slots))


@pytest.mark.parametrize("words, call", [
    ("num_tokens|key has shape", cache_call(t(3, 2, 64))),
    ("key has shape", cache_call(t(3, 128))),
    ("Float32", cache_call(t(1, 3, 128, dtype=F), cache=F)),
    ("dtype", cache_call(t(1, 3, 128, dtype=B))),
    ("block size is 24", cache_call(t(1, 3, 128), block=24)),
    (r"slot_mapping\[1\] is 64", cache_call(t(1, 3, 128), (0, 64, 1))),
    (r"slot_mapping\[0\] is -2", cache_call(t(1, 3, 128), (-2, 0, 1))),
    ("place 5 twice", cache_call(t(1, 3, 128), (5, 5, -1))),
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
    ("above the 32 places", {"lengths": ints(1, 33, 3)}),
    ("batch_valid_length is 0", {"lengths": ints(1, 0, 3)}),
    ("block 99 of block_tables", {"tables": Tensor(np.full((3, 2), 99, np.int32))}),
])
def test_paged_attention(random, words, change):  # noqa: F811
    names = ("query", "key_cache", "value_cache", "tables", "lengths")
    case = dict(zip(names, paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])))
    refused(words, Decode(), *{**case, **change}.values())


def test_heads_that_the_cache_does_not_hold(random):  # noqa: F811
    case = paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])
    refused("kv_head_num is 4", Decode(4, 4), *case)
    refused("head_num is 3", Decode(3, 2), *case)


def test_lengths_come_by_name_from_a_cells_graph(random):  # noqa: F811
    case = paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])
    refused("no input named 'batch_valid_length'", Nameless(), *case)
    cell = Decode()

    @ms.jit
    def function(query, key_cache, value_cache, tables, lengths):
        return cell(query, key_cache, value_cache, tables, lengths)

    with pytest.raises(RuntimeError):
        function(*case).asnumpy()


def test_paged_attention_without_infer_boost_has_no_kernel(random):  # noqa: F811
    case = paged(random, H, 16, 64, [1, 20, 3], [1, 1, 1])
    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "off"})
    try:
        refused("infer_boost", Decode(), *case)
    finally:
        ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})


@pytest.mark.parametrize("dtype", [H, B])
def test_masks_of_chunks(random, dtype):  # noqa: F811
    lengths, queries = [5, 30], [3, 1]
    case = paged(random, dtype, 16, 64, lengths, queries)
    good, asked = chunk_mask(lengths, queries, 32, dtype), ints(*queries)
    Chunks()(*case, asked, good)
    refused("sees its future", Chunks(), *case, asked, tensor(np.zeros((1, 1)), dtype))
    refused(r"attn_mask\[0, 3\] is 1", Chunks(), *case, asked, tensor(back(good) != 0, dtype))
    refused(r"attn_mask\[0, 0\] is", Chunks(), *case, asked, tensor(np.full((4, 32), -10000.0), dtype))
    refused("covers 20 positions", Chunks(), *case, asked, tensor(back(good)[:, :20], dtype))
    refused("sum to 5", Chunks(), *case, ints(3, 2), good)


@pytest.mark.parametrize("dtype, other", [(H, B), (B, H)])
def test_masks_and_lengths_of_prompts(dtype, other):
    x, kv = t(6, 256, dtype=dtype), t(6, 128, dtype=dtype)
    mask, two = device.prompt_mask(dtype), ints(2, 4)
    Prompt()(x, kv, kv, mask, two, two)
    refused("attends to the future", Prompt(), x, kv, kv, device.prompt_mask(other).astype(dtype), two, two)
    refused("attn_mask has dtype", Prompt(), x, kv, kv, device.prompt_mask(other), two, two)
    refused("attn_mask", Prompt(), x, kv, kv, t(64, 64, dtype=dtype), two, two)
    refused("sum to 5", Prompt(), x, kv, kv, mask, ints(2, 3), ints(2, 3))
    refused("goes to PagedAttention", Prompt(), x, kv, kv, mask, ints(3, 4), two)


def test_groups_that_are_not_sorted_or_reach_too_far():
    x, weight = t(6, 32), t(2, 32, 16)
    refused(r"group_list\[1\] is 2", Grouped(), x, weight, Tensor(np.array([4, 2])))
    refused(r"group_list\[1\] is 7", Grouped(), x, weight, Tensor(np.array([4, 7])))
    refused(r"group_list\[0\] is -1", Grouped(True), x, weight, Tensor(np.array([-1, 7])))


def test_rotations_with_halves_that_differ_and_tokens_out_of_range():
    cos = tensor(np.arange(64)[None].repeat(3, 0), H)
    refused("two halves that differ", Rotary(), t(3, 64), t(3, 64), cos, cos, ints(3))
    refused("index 8", Embedding(), t(8, 32), ints(8))
