"""Low-rank decomposition without a model: SVD and HOOI against float64 and TensorLy, plans, counts, break-even."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.decomposition import (
    LrdPlan,
    break_even,
    factor_parameters,
    factorise,
    hooi,
    linear_shapes,
    place,
    plan_for,
    preset,
    reconstruct,
    reduction,
)
from colora_ms.errors import ConfigError
from colora_ms.models.config import DecoderConfig
from make_tucker_goldens import CASES, tensor_of

LLAMA_2_7B = DecoderConfig("llama", 32000, 4096, 11008, 32, 32, 32, 128, 4096)
SMOLLM2 = DecoderConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tie_word_embeddings=True)


def best_error(weight, rank):
    """Relative error of the best approximation: the singular values that are left out (Eckart and Young)."""
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(weight @ weight.T)[::-1], 0))
    return np.sqrt((values[rank:] ** 2).sum() / (values ** 2).sum())


@pytest.mark.parametrize("method", ["svd", "hooi"])
@pytest.mark.parametrize("shape, rank", [((9, 7), 1), ((9, 7), 4), ((7, 9), 7), ((1, 5), 1), ((5, 1), 1), ((33, 20), 19)])
def test_factors_are_the_best_of_their_rank(method, shape, rank):
    weight = np.random.default_rng(rank).standard_normal(shape)
    found = factorise(weight, rank, 3, method)
    assert found.inner.shape == (rank, shape[1]) and found.core.shape == (rank, rank) and found.outer.shape == (shape[0], rank)
    assert np.allclose(found.outer.T @ found.outer, np.eye(rank), atol=1e-10)
    assert np.allclose(found.inner @ found.inner.T, np.eye(rank), atol=1e-10)
    error = np.linalg.norm(weight - found.outer @ found.core @ found.inner) / np.linalg.norm(weight)
    assert abs(error - best_error(weight, rank)) < 1e-7 and abs(found.error - error) < 1e-12
    two = factorise(weight, rank, 2, method)
    assert two.core is None and np.allclose(two.product, found.product, atol=1e-12)


def test_svd_and_hooi_agree_and_are_exact_at_full_rank():
    weight = np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)
    for rank in (1, 5, 16):
        svd, iterated = (factorise(weight, rank, 3, method).product for method in ("svd", "hooi"))
        assert svd.dtype == iterated.dtype == np.float32
        assert np.abs(svd - iterated).max() < 1e-5
    assert np.abs(svd - weight).max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
def test_error_falls_with_the_rank(rows, columns, seed):
    weight = np.random.default_rng(seed).standard_normal((rows, columns))
    errors = [factorise(weight, rank).error for rank in range(1, min(rows, columns) + 1)]
    assert all(a >= b - 1e-12 for a, b in zip(errors, errors[1:])) and errors[-1] < 1e-12


def test_weight_of_zeros():
    found = factorise(np.zeros((4, 3), np.float32), 2, 3, "hooi")
    assert found.error == 0 and not found.product.any()


@pytest.mark.parametrize("name", CASES)
def test_hooi_equals_tensorly(name, goldens):
    want = np.load(goldens / "tucker.npz")[name]
    tensor, ranks = tensor_of(name), CASES[name][1]
    core, bases = hooi(tensor, ranks, iterations=1000, tolerance=1e-14)
    assert core.shape == tuple(ranks)
    assert np.abs(reconstruct(core, bases) - want).max() < 1e-6


def test_hooi_from_random_bases_finds_the_svd():
    weight = np.random.default_rng(5).standard_normal((12, 9))
    core, bases = hooi(weight, (3, 3), init="random", iterations=500, tolerance=1e-15)
    assert np.abs(reconstruct(core, bases) - factorise(weight, 3).product).max() < 1e-5


@pytest.mark.parametrize("change, word", [
    (dict(rank=0), "rank is 0"), (dict(rank=4), "from 1 to 3"), (dict(rank=True), "True"), (dict(factors=4), "2 or 3"),
    (dict(method="svg"), "svd"), (dict(weight=np.full((4, 3), np.nan)), "not finite"), (dict(weight=np.ones(3)), "matrix")])
def test_bad_arguments(change, word):
    with pytest.raises(ConfigError, match=word):
        factorise(**{**dict(weight=np.ones((4, 3)), rank=1), **change})


def test_break_even_ranks_of_the_reference():
    # papers.md section 5.1
    assert [break_even(4096, 4096), break_even(4096, 11008)] == [1696, 2553]
    assert [break_even(4096, 4096, 2), break_even(4096, 11008, 2)] == [2048, 2985]


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([2, 3]))
def test_break_even_is_the_last_rank_that_saves(out, inner, factors):
    rank = break_even(out, inner, factors)
    assert factor_parameters(out, inner, rank, factors) <= out * inner < factor_parameters(out, inner, rank + 1, factors)


@pytest.mark.parametrize("rank, percent", [(1, 9.006), (8, 8.98), (64, 8.79), (250, 8.12), (500, 7.19)])
def test_llama_2_7b_counts_of_the_reference(rank, percent):
    # papers.md section 5.4: three whole blocks of Llama-2-7B
    assert LLAMA_2_7B.parameter_count() == 6_738_415_616
    pieces = LrdPlan((9, 16, 23), rank=rank).resolve(linear_shapes(LLAMA_2_7B))
    assert len(pieces) == 21
    assert abs(100 * reduction(LLAMA_2_7B, pieces) - percent) < 0.006


def test_single_matrices_in_all_blocks_of_llama_2_7b():
    shapes = linear_shapes(LLAMA_2_7B)
    for tensor, percent in (("q_proj", 7.97), ("up_proj", 21.4)):
        found = reduction(LLAMA_2_7B, LrdPlan("all", (tensor,)).resolve(shapes))
        assert abs(100 * found - percent) < 0.06


def test_the_preset():
    assert preset("lrd-9", LLAMA_2_7B) == LrdPlan((9, 16, 23), "all", 1, 3)
    small = preset("lrd-9", SMOLLM2)
    assert (small.layers, small.rank) == ((9, 13, 18, 22), 48)
    assert 0.09 <= reduction(SMOLLM2, small.resolve(linear_shapes(SMOLLM2))) < 0.092
    with pytest.raises(ConfigError, match="lrd-9"):
        preset("lrd9", SMOLLM2)


@pytest.mark.parametrize("placement", ["early", "middle", "late", "spread"])
@pytest.mark.parametrize("tensors", ["all", "attn", "mlp"])
def test_plans_for_a_share_reach_it_with_the_largest_rank(placement, tensors):
    shapes = linear_shapes(SMOLLM2)
    plan = plan_for(SMOLLM2, 0.09, placement, tensors)
    assert reduction(SMOLLM2, plan.resolve(shapes)) >= 0.09
    larger = 8 * (plan.rank // 8 + 1)
    assert reduction(SMOLLM2, LrdPlan(plan.layers, tensors, larger, force=True).resolve(shapes)) < 0.09


def test_a_share_out_of_reach():
    with pytest.raises(ConfigError, match="not within reach"):
        plan_for(SMOLLM2, 0.9)


def test_placements():
    assert place(32, 3, "spread") == (9, 16, 23)
    assert place(30, 4, "early") == (0, 1, 2, 3) and place(30, 4, "late") == (26, 27, 28, 29)
    assert place(30, 4, "middle") == (13, 14, 15, 16)
    for layers, count in ((30, 14), (30, 5), (12, 3), (5, 2), (3, 1), (1, 1), (4, 4)):
        chosen = place(layers, count, "spread")
        assert len(set(chosen)) == count and min(chosen) >= 0 and max(chosen) < layers
        if 2 * count <= layers - 1:
            assert min(np.diff(chosen), default=2) >= 2
    with pytest.raises(ConfigError, match="cannot be chosen"):
        place(3, 4, "late")
    with pytest.raises(ConfigError, match="early"):
        place(3, 2, "earlly")


def test_exceptions_by_name():
    plan = LrdPlan([0, 2], "attn", 4, modules={
        "k_proj": 0, "layers.2.self_attn.q_proj": {"rank": 6, "factors": 2},
        "model.layers.5.mlp.down_proj": {"rank": 3, "method": "hooi"}})
    pieces = plan.resolve(linear_shapes(SMOLLM2))
    assert {path: (piece.rank, piece.factors, piece.method) for path, piece in pieces.items()} == {
        "model.layers.0.self_attn.q_proj": (4, 3, "svd"), "model.layers.0.self_attn.v_proj": (4, 3, "svd"),
        "model.layers.0.self_attn.o_proj": (4, 3, "svd"), "model.layers.2.self_attn.q_proj": (6, 2, "svd"),
        "model.layers.2.self_attn.v_proj": (4, 3, "svd"), "model.layers.2.self_attn.o_proj": (4, 3, "svd"),
        "model.layers.5.mlp.down_proj": (3, 3, "hooi")}
    assert LrdPlan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("values, words", [
    (dict(layers=[30, 31]), ["30, 31", "blocks 0 to 29"]),
    (dict(layers=[]), ["chooses no matrix"]),
    (dict(layers=[1], tensors=["q_prj"]), ["q_prj", "q_proj"]),
    (dict(layers=[1], tensors="atn"), ["atn", "attn"]),
    (dict(layers=[1], modules={"gate_prj": 4}), ["gate_prj", "gate_proj"]),
    (dict(layers=[1], modules={"model.layers.1.mlp.gate": 4}), ["model.layers.1.mlp.gate_proj"]),
    (dict(layers=[1], rank=400), ["past break-even", "force"]),
    (dict(layers=[1], tensors=["k_proj"], rank=193), ["193", "(192, 576)"]),
    (dict(layers=[1], rank=0), ["rank is 0"]),
    (dict(layers=["one"]), ["one"]),
    (dict(layers=[1], factors=5, method="qr"), ["factors is 5", "method is 'qr'"]),
    (dict(layers=[1], modules={"q_proj": {"rnk": 3}}), ["rnk"]),
    (dict(layer=[1]), ["layer", "layers"]),
])
def test_bad_plans(values, words):
    with pytest.raises(ConfigError) as error:
        LrdPlan.from_dict(values).resolve(linear_shapes(SMOLLM2))
    assert all(word in str(error.value) for word in words), error.value


def test_ranks_past_break_even_can_be_forced():
    shapes = linear_shapes(SMOLLM2)
    pieces = LrdPlan([1], ["q_proj"], 400, force=True).resolve(shapes)
    assert pieces["model.layers.1.self_attn.q_proj"].saved < 0
    limit = break_even(576, 576)
    assert LrdPlan([1], ["q_proj"], limit).resolve(shapes)
