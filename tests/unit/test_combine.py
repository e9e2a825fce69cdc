"""Combined adapters: equal to peft's where nothing is random, the right sums where it is, and refusals."""

import numpy as np
import pytest

from colora_ms.adapters import LoraConfig, inject, load_adapter
from colora_ms.adapters.combine import COMBINATIONS
from colora_ms.errors import AdapterError

RANDOM = {"init_lora_weights": False}


@pytest.fixture(scope="module")
def rules():
    import rules as module

    return module


@pytest.fixture(scope="module")
def bank(mindspore, goldens, rules):
    """tiny/llama with the adapters of ``rules.COMBINED`` and two free slots."""
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / "llama")
    handle = inject(Decoder(checkpoint.config, checkpoint.tensors), slots=len(rules.COMBINED) + 2, max_rank=16,
                    reserve=LoraConfig(target_modules=["q_proj", "up_proj", "down_proj", "embed_tokens"]))
    for name, settings in rules.COMBINED.items():
        handle.add_adapter(name, LoraConfig(**settings))
        matched = handle.matched(name)
        for path, target in matched.targets.items():
            module = handle.modules[path]
            down = rules.combined_tensor(name, f"{path}.lora_A", (target.r, module.in_features))
            up = rules.combined_tensor(name, f"{path}.lora_B", (module.out_features, target.r))
            handle.sites[path, "lora"].write(
                handle.slot(name), {"down": down.T if target.kind == "embedding" else down, "up": up}, target.scaling)
    return handle


def change(handle, name, path):
    return handle.sites[path, "lora"].delta(handle.slot(name))


def test_equal_to_peft(bank, rules, goldens):
    stored = np.load(goldens / "combine.npz")
    seen = 0
    for case, (names, weights, options) in rules.COMBINATIONS.items():
        bank.add_weighted_adapter(names, weights, "new", **options)
        for short, path in rules.COMBINED_MODULES.items():
            key = f"{case}.{short}"
            assert (key in stored) == (path in bank.matched("new").targets), key
            if key in stored:
                got = change(bank, "new", path)[:24]
                assert np.abs(got - stored[key]).max() < 2e-5, key
                seen += 1
        bank.delete_adapter("new")
    assert seen == len(stored.files)


def test_cat_is_the_weighted_sum_and_saves(bank, tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    bank.add_weighted_adapter(["a", "b", "wide"], [0.5, -2, 1], "sum", combination_type="cat")
    expected = 0.5 * change(bank, "a", path) - 2 * change(bank, "b", path) + change(bank, "wide", path)
    assert np.abs(change(bank, "sum", path) - expected).max() < 1e-5
    assert bank.config("sum").r == 14 and bank.config("sum").lora_alpha == 14 and not bank.config("sum").use_rslora
    bank.save(tmp_path / "sum", "sum")
    bank.delete_adapter("sum")
    bank.load(tmp_path / "sum", "again")
    assert np.abs(change(bank, "again", path) - expected).max() < 1e-5
    bank.delete_adapter("again")


def test_svd_at_the_full_rank_is_exact_and_at_a_lower_one_the_best(bank):
    path = "model.layers.1.mlp.down_proj"
    exact = 0.5 * change(bank, "a", path)
    bank.add_weighted_adapter(["a", "c"], [0.5, 3], "svd", svd_rank=2)
    values = np.linalg.svd(exact.astype(np.float64), compute_uv=False)
    left = np.linalg.norm(change(bank, "svd", path) - exact)
    assert left == pytest.approx(np.sqrt((values[2:] ** 2).sum()), rel=1e-4)
    bank.delete_adapter("svd")
    bank.add_weighted_adapter(["a", "c"], [0.5, 3], "whole")
    bank.add_weighted_adapter(["a", "c"], [0.5, 3], "cut", svd_clamp=0.9)
    shapes = {"down": (4, 48), "up": (32, 4)}
    whole, cut = (np.concatenate([v.ravel() for v in bank.sites[path, "lora"].read(bank.slot(name), shapes).values()])
                  for name in ("whole", "cut"))
    limit = np.quantile(whole, 0.9)
    assert np.abs(cut - np.clip(whole, -limit, limit)).max() < 1e-6 and np.abs(whole).max() > 1.5 * limit
    for name in ("whole", "cut"):
        bank.delete_adapter(name)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_random_by_its_seed_only(bank, kind):
    path = "model.layers.0.self_attn.q_proj"
    found = []
    for seed in (0, 0, 1):
        bank.add_weighted_adapter(["a", "c"], [1, 1], "new", kind, density=0.5, seed=seed)
        found.append(change(bank, "new", path))
        bank.delete_adapter("new")
    assert np.array_equal(found[0], found[1]) and np.abs(found[0] - found[2]).max() > 1e-3


def test_dare_keeps_the_mean():
    from colora_ms.adapters.combine import _dropped

    tensor = np.random.default_rng(0).random((200, 300), np.float32)
    dropped = _dropped(tensor, 0.3, np.random.default_rng(1))
    assert (dropped == 0).mean() == pytest.approx(0.7,
                                                  abs=0.01) and dropped.mean() == pytest.approx(tensor.mean(), rel=0.02)
    kept = dropped != 0
    assert np.allclose(dropped[kept], tensor[kept] / np.float32(0.3))


def test_refusals_list_everything_and_change_nothing(bank):
    before = bank.names
    for names, weights, options, words in [
            (["a", "zz"], [1, 1], {}, "there is no adapter 'zz'"),
            (["a", "b"], [1], {}, "2 adapters but 1 weights"),
            ([], [], {}, "no adapter is named"),
            (["a"], [float("nan")], {"combination_type": "sdv"},
             "weight of 'a' is nan.*combination_type is 'sdv'.*Did you mean 'svd'"),
            (["a", "c"], [1, 1], {"combination_type": "ties"}, "density is None; ties needs"),
            (["a", "c"], [1, 1], {"combination_type": "dare_ties", "density": 0}, "density is 0"),
            (["a", "c"], [1, 1], {"svd_rank": 0}, "svd_rank is 0"),
            (["a", "c"], [1, 1], {"svd_clamp": 2}, "svd_clamp is 2"),
            (["a", "c"], [1, 1], {"majority_sign_method": "most"}, "majority_sign_method is 'most'"),
            (["a", "wide"], [1, 1], {"combination_type": "linear"}, "'a' has 4, 'wide' has 6; use 'cat' or 'svd'"),
            (["a", "b", "c", "wide"], [1] * 4, {"combination_type": "cat"},
             "has room for rank 16, the adapter has rank 18")]:
        with pytest.raises(AdapterError, match=words):
            bank.add_weighted_adapter(names, weights, "new", **options)
        assert bank.names == before
    with pytest.raises(AdapterError, match="there is an adapter 'b' already"):
        bank.add_weighted_adapter(["a"], [1], "b")


def test_adapters_with_more_than_pairs_are_refused(mindspore, tiny_decoder):
    handle = inject(tiny_decoder(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], **RANDOM),
                    slots=2)
    with pytest.raises(AdapterError, match="also trains lm_head"):
        handle.add_weighted_adapter(["default"], [1], "new")


def test_combined_targets_are_named_exactly(mindspore, tiny_decoder, tmp_path):
    """Adapters of single layers: the new one may touch no other layer, also after loading it elsewhere."""
    handle = inject(tiny_decoder(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=0, **RANDOM), "x",
                    slots=3, reserve="all-linear")
    handle.add_adapter("y", LoraConfig(r=2, target_modules=["up_proj"], **RANDOM))
    handle.add_weighted_adapter(["x", "y"], [1, 1], "z")
    wanted = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert set(handle.matched("z").targets) == wanted
    handle.save(tmp_path / "z", "z")
    assert set(load_adapter(tiny_decoder(), tmp_path / "z").matched("z").targets) == wanted


def test_names_are_pefts():
    assert set(COMBINATIONS) == {"cat", "svd", "linear", "ties", "ties_svd", "dare_ties", "dare_linear",
                                 "dare_ties_svd",
                                 "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"}
