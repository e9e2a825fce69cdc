"""Lily's config and what it matches: parameter counts of published recipes, who shares with whom, refusals. No model is
built."""

import dataclasses

import pytest

from colora_ms.adapters import LilyConfig, LoraConfig
from colora_ms.adapters.lily_matching import entries, initial_values, match, parameter_count
from colora_ms.adapters.matching import Module
from colora_ms.errors import AdapterError


def linears(layers, shapes, prefix="model.layers"):
    """{name: Module} of a model with these linears in every layer; shapes: {name: (in, out)}."""
    return {f"{prefix}.{i}.{name}": Module("linear", *shape, {"weight": shape[::-1]})
            for i in range(layers) for name, shape in shapes.items()}


LLAMA3_8B = linears(32, {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024),
                         "self_attn.v_proj": (4096, 1024), "self_attn.o_proj": (4096, 4096)})


def test_parameter_counts_of_the_published_recipes():
    """The paper's 1.2M for LLaMA3-8B (q, k, v, rank 16, 4 A's, 4 B's) and 3.3M for Falcon-Mamba-7B (in_proj, rank
    40)."""
    config = LilyConfig(r=16, stride_A=32 // 4, num_B=4, target_modules=["q_proj", "k_proj", "v_proj"])
    assert parameter_count(match(config, LLAMA3_8B), LLAMA3_8B) == 1_185_792
    mamba = linears(64, {"mixer.in_proj": (4096, 16384)}, "backbone.layers")
    config = LilyConfig(r=40, stride_A=64 // 4, num_B=4, target_modules=["in_proj"])
    assert parameter_count(match(config, mamba), mamba) == 3_287_040
    static = dataclasses.replace(config, router_pool="static")
    assert parameter_count(match(static, mamba), mamba) == 3_287_040 - 64 * 40 * 4 + 64 * 4


def test_blocks_share_a_and_all_layers_share_b():
    modules = linears(5, {"q": (6, 8), "v": (6, 4)})
    targets = match(LilyConfig(r=2, stride_A=2, num_B=3, target_modules=["q", "v"]), modules).targets
    assert list(targets) == list(modules)
    # Five layers with a stride of 2: blocks of 2, 2 and 1.
    assert [targets[f"model.layers.{i}.v"].down_owner[13] for i in range(5)] == list("00224")
    assert [targets[f"model.layers.{i}.v"].block for i in range(5)] == [0, 0, 1, 1, 2]
    assert {targets[f"model.layers.{i}.v"].up_owner for i in range(5)} == {"model.layers.0.v"}
    assert {targets[f"model.layers.{i}.q"].up_owner for i in range(5)} == {"model.layers.0.q"}


def test_entries_name_every_copy_that_peft_writes_once():
    modules = linears(3, {"q": (6, 8)})
    found = entries(match(LilyConfig(r=2, stride_A=2, num_B=3, target_modules=["q"]), modules), modules)
    names = [key for key, entry in found.items() for key in (key, *entry.copies)]
    expected = [f"base_model.model.model.layers.{i}.q.{part}.weight" for i in range(3)
                for part in ("lily_A", "lily_B", "lily_router")]
    assert sorted(names) == sorted(expected)
    first = found["base_model.model.model.layers.0.q.lily_B.weight"]
    assert first.shape == (3 * 2, 8) and len(first.copies) == 2
    assert found["base_model.model.model.layers.2.q.lily_A.weight"].copies == ()


def test_unequal_shapes_cannot_share_unless_by_pefts_rule():
    modules = {**linears(2, {"q": (6, 8)}), **linears(2, {"q": (6, 10)}, "other.layers")}
    config = LilyConfig(r=2, target_modules=["q"])
    with pytest.raises(AdapterError,
                       match=r"called 'q' cannot share.*6 to 8.*other.layers.0.q maps 6 to 10.*share=\"entry\""):
        match(config, modules)
    targets = match(dataclasses.replace(config, share="entry"), modules).targets
    assert targets["other.layers.1.q"].up_owner == "other.layers.0.q"
    assert targets["model.layers.1.q"].up_owner == "model.layers.0.q"


def test_pefts_rule_lets_equal_shapes_share_under_an_expression():
    modules = linears(2, {"q": (6, 6), "o": (6, 6), "v": (6, 2)})
    by_entry = match(LilyConfig(r=2, target_modules=r".*\.[qov]", share="entry"), modules).targets
    assert by_entry["model.layers.1.o"].up_owner == "model.layers.0.q"
    assert by_entry["model.layers.1.v"].up_owner == "model.layers.0.v"
    by_type = match(LilyConfig(r=2, target_modules=r".*\.[qov]"), modules).targets
    assert by_type["model.layers.1.o"].up_owner == "model.layers.0.o"


def test_embeddings_are_refused():
    modules = {"embed": Module("embedding", 10, 6, {"weight": (10, 6)}), **linears(1, {"q": (6, 6)})}
    with pytest.raises(AdapterError, match="'embed', which is an embedding"):
        match(LilyConfig(r=2, target_modules=["embed", "q"]), modules)


@pytest.mark.parametrize("values, expected", [
    ({"r": 0}, "r is 0, expected a whole number from 1"),
    ({"r": True}, "r is True"),
    ({"stride_A": 0}, "stride_A is 0"),
    ({"num_B": 1}, "num_B is 1.*at least two experts"),
    ({"scaling": float("nan")}, "scaling is nan"),
    ({"router_pool": "tokens"}, "router_pool is 'tokens'.*Did you mean 'token'"),
    ({"router_form": "peft"}, "router_form is 'peft'.*code, paper"),
    ({"share": "all"}, "share is 'all'"),
    ({"init_weights": 1}, "init_weights is 1"),
    ({"target_modules": []}, "target_modules is empty"),
    ({"layers_to_transform": [1], "target_modules": "all-linear"}, "layers_to_transform needs a list"),
])
def test_unusable_values_are_named(values, expected):
    with pytest.raises(AdapterError, match="this Lily config cannot be used: .*" + expected):
        LilyConfig(**values)


def test_all_problems_come_at_once():
    with pytest.raises(AdapterError) as caught:
        LilyConfig(r=-1, num_B=1, router_pool="x", target_modules=[3])
    assert all(word in str(caught.value)
               for word in ("r is -1", "num_B is 1", "router_pool is 'x'", "target_modules is [3]"))


def test_a_config_of_peft_means_what_peft_computes():
    config, problems = LilyConfig.parse_peft({"peft_type": "LILY", "r": 4, "stride_A": 2, "num_B": 2, "scaling": 2.0,
                                              "target_modules": ["q_proj"], "peft_version": "0.21.2",
                                              "auto_mapping": None})
    assert not problems and (config.router_pool, config.share, config.router_form) == ("batch", "entry", "code")
    ours = LilyConfig(r=4, target_modules=["q_proj"])
    assert LilyConfig.from_peft(ours.to_peft()) == ours
    config, problems = LilyConfig.parse_peft({"peft_type": "LILY", "strideA": 2})
    assert len(problems) == 1 and "Did you mean 'stride_A'" in problems[0]
    assert LilyConfig.parse_peft(LoraConfig().to_peft())[0] is None


def test_start_values_are_zero_experts_and_differing_routers():
    import numpy as np

    modules = linears(3, {"q": (6, 8)})
    config = LilyConfig(r=2, stride_A=2, num_B=3, target_modules=["q"])
    targets = match(config, modules).targets
    first, second = (initial_values(config, targets[f"model.layers.{i}.q"], modules[f"model.layers.{i}.q"],
                                    np.random.default_rng(i)) for i in range(2))
    assert set(first) == {"down", "up", "router"} and set(second) == {"router"}
    assert not first["up"].any() and first["up"].shape == (8, 6)
    assert 0 < np.abs(first["down"]).max() <= 6 ** -0.5 and np.abs(first["router"]).max() <= 2 ** -0.5
    assert not np.array_equal(first["router"], second["router"])
