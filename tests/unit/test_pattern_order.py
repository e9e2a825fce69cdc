"""The order of rank_pattern and alpha_pattern is part of their meaning: the first key that matches a module holds."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colora_ms.adapters import LoraConfig, digest, inject, load_adapter
from colora_ms.adapters.matching import Module, match
from colora_ms.adapters.store import CONFIG_FILE, config_text
from colora_ms.recipes.report import recipe_hash
from colora_ms.recipes.training import differences
from colora_ms.training.config import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore::colora_ms.errors.AdapterWarning")

NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 11)
         for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")]
MODULES = {name: Module("linear", 64, 64, {"weight": (64, 64)}) for name in NAMES}

KEYS = st.one_of(
    st.sampled_from(NAMES), st.sampled_from([name.split(".", 2)[2] for name in NAMES]),
    st.sampled_from(["q_proj", "down_proj", "mlp.up_proj", "1.mlp.down_proj", ".*", r"layers\.\d+\.mlp\..*", "proj",
                     "zzz",
                     r".*_proj", r"(q|k)_proj", r"^model.layers.1.*", "z|up_proj", "up_proj|q_proj"]))


def patterns(values):
    """Dicts in any order of keys."""
    return st.lists(st.tuples(KEYS, values), max_size=6, unique_by=lambda pair: pair[0]).map(dict)


def first_match(table, name, otherwise):
    """peft.utils.other.get_pattern_key, and the value."""
    for key, value in table.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


@given(patterns(st.integers(1, 60)), patterns(st.integers(1, 99)), st.booleans())
def test_written_and_read_patterns_give_each_module_the_same_numbers(ranks, alphas, rslora):
    config = LoraConfig(r=7, lora_alpha=5, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
                        rank_pattern=ranks,
                        alpha_pattern=alphas, use_rslora=rslora)
    again = LoraConfig.from_peft(json.loads(config_text(config.to_peft())))
    assert list(again.rank_pattern.items()) == list(ranks.items())
    assert list(again.alpha_pattern.items()) == list(alphas.items())
    for one in (config, again):
        found = match(one, MODULES).targets
        for name in NAMES:
            r = first_match(ranks, name, 7)
            alpha = first_match(alphas, name, 5)
            assert (found[name].r, found[name].alpha) == (r, alpha)
            assert found[name].scaling == alpha / (np.sqrt(r) if rslora else r)


def test_a_module_keeps_its_own_alpha_through_a_folder(mindspore, tiny_decoder, tmp_path):
    """Scalings 2 and 16 stay 2 and 16; sorted keys gave 2 and 2."""
    values = dict(r=4, target_modules=["down_proj"], init_lora_weights=False,
                  alpha_pattern={"model.layers.1.mlp.down_proj": 64, "down_proj": 8})
    handle = inject(tiny_decoder(), LoraConfig(**values))
    handle.save(tmp_path / "a")
    again = load_adapter(tiny_decoder(), tmp_path / "a")
    assert [one.scaling for one in again.matched().targets.values()] == [2, 16]
    other = LoraConfig(**{**values, "alpha_pattern": dict(reversed(values["alpha_pattern"].items()))})
    inject(tiny_decoder(), other).save(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "b"), "other numbers are another content"


def test_a_folder_with_overlapping_ranks_is_read_again(mindspore, tiny_decoder, tmp_path):
    handle = inject(tiny_decoder(), LoraConfig(
        r=4, target_modules=["down_proj", "q_proj"], init_lora_weights=False,
        rank_pattern={"model.layers.1.mlp.down_proj": 6, "down_proj": 2, "layers.0.*": 3, ".*": 5}))
    assert [one.r for one in handle.matched().targets.values()] == [3, 2, 5, 6]
    handle.save(tmp_path / "a")
    again = load_adapter(tiny_decoder(), tmp_path / "a")
    assert again.matched() == handle.matched()
    for place, values in handle.values().items():
        for field, value in values.items():
            assert np.array_equal(again.values()[place][field], value)
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / CONFIG_FILE).read_bytes() == (tmp_path / "b" / CONFIG_FILE).read_bytes()


def recipe(alphas):
    return TrainingConfig.from_dict({
        "output": "x", "data": {"train": "x.jsonl"}, "loop": {"steps": 1},
        "adapter": {"r": 4, "target_modules": ["down_proj"], "alpha_pattern": alphas}})


def test_a_recipe_with_another_order_is_another_recipe(tmp_path):
    import yaml

    first = recipe({"model.layers.1.mlp.down_proj": 64, "down_proj": 8})
    other = recipe({"down_proj": 8, "model.layers.1.mlp.down_proj": 64})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(first.to_dict(), sort_keys=False))
    assert differences(tmp_path / "recipe.yaml", first) == []
    assert "alpha_pattern" in " ".join(differences(tmp_path / "recipe.yaml", other))
    assert recipe_hash(first) != recipe_hash(other)
    assert list(first.adapter_config().alpha_pattern) != list(other.adapter_config().alpha_pattern)


def test_settings_are_sorted_and_patterns_are_not():
    text = config_text({"b": 1, "a": 2, "rank_pattern": {"z": 1, "a": 2}})
    assert list(json.loads(text)) == ["a", "b", "rank_pattern"] and text.index('"z"') < text.index('"a": 2\n  }')


def test_mindformers_writer_keeps_the_order(tmp_path):
    """A pair with another rank gets a key with its whole name, which no other module matches."""
    from colora_ms.integrations.mindformers.lora_files import to_peft
    from colora_ms.models.config import DecoderConfig

    config = DecoderConfig(model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=12,
                           num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=8)
    ranks = {1: 2, 11: 3, 0: 4}
    tensors = {}
    for layer, r in ranks.items():
        tensors[f"model.layers.{layer}.attention.wq.mindpet_delta_lora_a"] = np.ones((r, 8), np.float32)
        tensors[f"model.layers.{layer}.attention.wq.mindpet_delta_lora_b"] = np.ones((8, r), np.float32)
    written = to_peft(tensors, tmp_path / "out", config, alpha=8, layout="legacy")
    read = LoraConfig.from_peft(json.loads((tmp_path / "out" / CONFIG_FILE).read_text()))
    assert list(read.rank_pattern.items()) == list(written.rank_pattern.items())
    modules = {f"model.layers.{i}.self_attn.q_proj": Module("linear", 8, 8, {"weight": (8, 8)}) for i in ranks}
    assert {name: one.r for name, one in match(read, modules).targets.items()} == {
        f"model.layers.{i}.self_attn.q_proj": r for i, r in ranks.items()}
