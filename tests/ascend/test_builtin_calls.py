"""The calls of Ascend's built-in operators, held by name to the installed MindSpore's signatures."""
import inspect

import pytest

ms = pytest.importorskip("mindspore")

from colora_ms.kernels import ascend_builtin_calls as calls  # noqa: E402

FAR = 2147483647

#: face -> arguments of its call, primitive, its constructor's arguments and its call's, by name; what is not listed is
#: left at its default, or passed as None.
WANTED = {
    "rms_norm": (("x", "gamma", 0.5), "RmsNorm", {"epsilon": 0.5}, {"x": "x", "gamma": "gamma"}),
    "add_rms_norm": (("a", "b", "gamma", 0.5), "AddRmsNorm", {},
                     {"x1": "a", "x2": "b", "gamma": "gamma", "epsilon": 0.5}),
    "rotary": (("q", "k", "cos", "sin", "lengths"), "ApplyRotaryPosEmb", {"cos_format": 2},
               {"query": "q", "key": "k", "cos": "cos", "sin": "sin", "position_ids": "lengths"}),
    "reshape_and_cache": (("k", "v", "kc", "vc", "slots"), "ReshapeAndCache", {},
                          {"key": "k", "value": "v", "key_cache": "kc", "value_cache": "vc", "slot_mapping": "slots"}),
    "paged_attention": (("q", "kc", "vc", "tables", "lengths", "asked", "mask", 4, 0.5, 2), "PagedAttention",
                        {"head_num": 4, "scale_value": 0.5, "kv_head_num": 2},
                        {"query": "q", "key_cache": "kc", "value_cache": "vc", "block_tables": "tables",
                         "context_lens": "lengths", "attn_mask": "mask", "q_seq_lens": "asked"}),
    "flash_attention": (("q", "k", "v", "mask", 4, 0.5), "FlashAttentionScore",
                        {"head_num": 4, "keep_prob": 1.0, "scale_value": 0.5, "pre_tokens": FAR, "next_tokens": FAR,
                         "inner_precise": 0, "input_layout": "TH", "sparse_mode": 0},
                        {"query": "q", "key": "k", "value": "v", "attn_mask": "mask"}),
    "swiglu": (("x",), "Swiglu", {}, {"input": "x", "dim": -1}),
    "linear": (("x", "w"), "MatMul", {"transpose_a": False, "transpose_b": True}, {"input": "x", "mat2": "w"}),
    "product": (("x", "m"), "MatMul", {"transpose_a": False, "transpose_b": False}, {"input": "x", "mat2": "m"}),
    "where": (("mask", "x", "other"), "Select", {}, {"condition": "mask", "input": "x", "other": "other"}),
    "grouped_linear": (("x", "w", "groups", True), "GroupedMatmulV4", {},
                       {"x": ["x"], "weight": ["w"], "group_list": "groups", "split_item": 3, "group_type": 0,
                        "group_list_type": 1, "act_type": 0}),
    "top_experts": (("x", 2), "MoeGatingTopKSoftmax", {}, {"x": "x", "k": 2}),
    "by_expert": (("x", "experts", 5), "MoeInitRoutingV2", {},
                  {"x": "x", "expert_idx": "experts", "active_num": 0, "expert_capacity": 0, "expert_num": 5,
                   "drop_pad_mode": 0, "expert_tokens_count_or_cumsum_flag": 2,
                   "expert_tokens_before_capacity_flag": True}),
    "from_experts": (("y", "places", "shares"), "MoeTokenUnpermute", {},
                     {"permuted_tokens": "y", "sorted_indices": "places", "probs": "shares", "padded_mode": False}),
    "scaled_rows": (("x", "factors"), "Mul", {}, {"input": "x", "other": "factors"}),
    "quantized_linear": (("x", "w", "scale", 32), "WeightQuantBatchMatmul",
                         {"transpose_x": False, "transpose_weight": True, "antiquant_group_size": 32},
                         {"x": "x", "weight": "w", "antiquant_scale": "scale"}),
    "embedding": (("table", "tokens"), "Gather", {}, {"input_params": "table", "input_indices": "tokens", "axis": 0}),
    "add": (("a", "b"), "Add", {}, {"input": "a", "other": "b"}),
    "reshape": (("x", (2, 3)), "Reshape", {}, {"input": "x", "shape": (2, 3)}),
    "split": (("x", (2, 3)), "SplitWithSize", {}, {"input": "x", "split_size": (2, 3), "dim": -1}),
}


class Result(list):
    """Stands for what a primitive returns, however it is taken apart."""

    def __init__(self):
        super().__init__(range(4))

    def __iter__(self):
        return iter(range(3))


@pytest.fixture
def made(monkeypatch):
    """What calls were made: (primitive, its constructor's arguments, its call's) by name."""
    found = []

    def recorder(primitive):
        def construct(*given):
            init = inspect.signature(primitive.__init__).bind(None, *given).arguments

            def call(*arguments):
                found.append((primitive.__name__, dict(init), inspect.signature(primitive.__call__).bind(
                    None, *arguments).arguments))
                return Result()
            return call
        return construct

    monkeypatch.setattr(calls, "_get_cache_prim", recorder)
    return found


@pytest.mark.parametrize("name", sorted(WANTED))
def test_every_argument_stands_where_the_operator_looks_for_it(made, name):
    arguments, primitive, init, call = WANTED[name]
    calls.CALLS[name](*arguments)
    (used, given, passed), = made
    assert used == primitive
    assert {key: value for key, value in given.items() if key != "self"} == init
    assert {key: value for key, value in passed.items() if key != "self" and value is not None} == call


class Mask:
    def __init__(self, ndim):
        self.ndim = ndim


@pytest.mark.parametrize("ndim, sparse_mode", [(2, 2), (4, 1)])
def test_attention_for_training(made, ndim, sparse_mode):
    mask = Mask(ndim)
    calls.CALLS["causal"]("q", "k", "v", mask, 4, 0.5)
    (used, given, passed), = made
    assert used == "FlashAttentionScore" and given["sparse_mode"] == sparse_mode and given["input_layout"] == "BSH"
    assert given["head_num"] == 4 and given["scale_value"] == 0.5 and given["keep_prob"] == 1.0
    assert {key: value for key, value in passed.items() if key != "self" and value is not None} == {
        "query": "q", "key": "k", "value": "v", "attn_mask": mask}


def test_every_call_is_looked_at():
    assert {*WANTED, "causal"} == set(calls.CALLS)
