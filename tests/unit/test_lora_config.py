"""LoraConfig: values, PEFT's form, and refusals."""

import json

import pytest

from colora_ms.adapters.config import LoraConfig
from colora_ms.errors import AdapterError

PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}


@pytest.mark.parametrize("settings, words", [
    ({"r": 0}, "r is 0"),
    ({"r": True}, "r is True"),
    ({"r": "8"}, "r is '8'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
    ({"lora_dropout": -0.1}, "lora_dropout"),
    ({"bias": "lora"}, "bias is 'lora'.*Did you mean 'lora_only'"),
    ({"target_modules": [1]}, "target_modules is"),
    ({"target_modules": []}, "change nothing"),
    ({"target_modules": "x", "layers_to_transform": [1]}, "layers_to_transform needs a list"),
    ({"target_modules": ["x"], "layers_pattern": "h"}, "layers_to_transform is not given"),
    ({"target_modules": ["x"], "layers_to_transform": [-1]}, "layers_to_transform is"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern"),
    ({"alpha_pattern": {"q": "a"}}, "alpha_pattern"),
    ({"rank_pattern": [1]}, "rank_pattern is"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not implemented"),
    ({"init_lora_weights": "pissa_niter_"}, "init_lora_weights='pissa_niter_' is not implemented"),
    ({"init_lora_weights": "olora", "alpha_pattern": {"q_proj": 0}}, "needs every lora_alpha above 0"),
    ({"lora_bias": True, "use_dora": True}, "lora_bias and use_dora exclude each other"),
    ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias needs init_lora_weights True or False"),
    ({"use_dora": "yes"}, "use_dora is 'yes', expected true or false"),
    ({"init_lora_weights": 1}, "init_lora_weights=1"),
    ({"modules_to_save": [""]}, "modules_to_save is"),
])
def test_bad_values(settings, words):
    with pytest.raises(AdapterError, match=words):
        LoraConfig(**settings)


def test_all_bad_values_are_listed():
    with pytest.raises(AdapterError) as error:
        LoraConfig(r=-1, lora_dropout=3, bias="x")
    assert all(word in str(error.value) for word in ("r is -1", "lora_dropout is 3", "bias is 'x'"))


def test_defaults_are_pefts():
    config = LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias,
            config.use_rslora) == (8, 8, 0.0, "none", False)


@pytest.mark.parametrize("name", ["qv_r8", "all_rslora", "save_lm_head", "bias_lora_only", "dora", "lora_bias",
                                  "pissa", "olora"])
def test_pefts_own_files_round_trip(goldens, name):
    values = json.loads((goldens / "peft" / name / "adapter_config.json").read_text())
    config = LoraConfig.from_peft(values)
    again = config.to_peft()
    assert LoraConfig.from_peft(again) == config
    assert {key: again[key] for key in again if again[key] != values[key]} == {}


@pytest.mark.parametrize("key, value, words", [
    ("alora_invocation_tokens", [], "aLoRA"),
    ("alora_invocation_tokens", [1, 2], "aLoRA"),
    ("trainable_token_indices", [5, 5], "trainable_token_indices has 5 more than once"),
    ("trainable_token_indices", {"lm_head": [-1]}, r"trainable_token_indices\['lm_head'\] is \[-1\]"),
    ("trainable_token_indices", "all", "trainable_token_indices is 'all'"),
    ("ensure_weight_tying", "yes", "ensure_weight_tying is 'yes', expected true or false"),
    ("target_parameters", ["w"], "target_parameters"),
    ("layer_replication", [[0, 2]], "layer_replication"),
    ("megatron_config", {"a": 1}, "megatron_config"),
    ("use_qalora", True, "QALoRA"),
    ("something_new", 3, "something_new=3 is not a known setting"),
    ("lora_alfa", 3, "Did you mean 'lora_alpha'"),
    ("init_lora_weights", "loftq", "init_lora_weights='loftq'"),
    ("init_lora_weights", "loftq", "init_lora_weights='loftq'"),
])
def test_settings_that_are_not_implemented_are_refused(key, value, words):
    with pytest.raises(AdapterError, match=words):
        LoraConfig.from_peft({**PLAIN, key: value})


@pytest.mark.parametrize("key, value", [
    ("peft_version", "0.99"), ("auto_mapping", {"a": "b"}), ("loftq_config", {"bits": 4}), ("something_new", None),
    ("something_new", False), ("use_dora", False), ("qalora_group_size", 16), ("init_lora_weights", "eva"),
    ("rank_pattern", None), ("fan_in_fan_out", True),
])
def test_settings_that_change_nothing_are_taken(key, value):
    assert LoraConfig.from_peft({**PLAIN, key: value}).r == 4


def test_all_refusals_come_at_once():
    with pytest.raises(AdapterError) as error:
        LoraConfig.from_peft({**PLAIN, "use_qalora": True, "zzz": 1, "r": 0})
    assert all(word in str(error.value) for word in ("use_qalora", "zzz", "r is 0"))


@pytest.mark.parametrize("values", [[], None, {"peft_type": "IA3"}, {}, {"peft_type": ["LORA"]}])
def test_not_a_lora_config(values):
    with pytest.raises(AdapterError):
        LoraConfig.from_peft(values)


def test_scaling():
    assert LoraConfig(r=4, lora_alpha=6).scaling(4, 6) == 1.5
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scaling(4, 6) == 3.0


@pytest.mark.parametrize("settings", [
    {"r": 10**400}, {"lora_alpha": 10**400}, {"lora_alpha": 1e308}, {"rank_pattern": {"q": 10**12}},
    {"target_modules": ["x"] * 100_001}, {"rank_pattern": {str(i): 2 for i in range(5_001)}},
    {"modules_to_save": ["x"] * 5_001},
])
def test_absurd_sizes_are_refused(settings):
    with pytest.raises(AdapterError):
        LoraConfig(**settings)
