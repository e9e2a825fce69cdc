"""Reading, checking and writing of model configs."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colora_ms.errors import ConfigError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import family

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
TINY = ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"]

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000,
    "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 2, "torch_dtype": "bfloat16", "rope_interleaved": False,
    "attention_dropout": 0.0, "pretraining_tp": 1, "use_cache": True}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936,
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 32768, "max_window_layers": 21, "sliding_window": 32768,
    "use_sliding_window": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 40960, "max_window_layers": 28, "sliding_window": None,
    "use_sliding_window": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000,
    "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False,
    "bos_token_id": 151643, "eos_token_id": [151645, 151643]}


def tiny(name):
    with open(os.path.join(GOLDENS, "tiny", name, "config.json"), encoding="utf-8") as file:
        return json.load(file)


# published parameter counts of the three models (Qwen3-0.6B: 596,049,920)
@pytest.mark.parametrize("values, count", [(SMOLLM2, 134_515_008), (QWEN25, 494_032_768),
                                           (QWEN3, 596_049_920)])
def test_released_models_have_their_published_parameter_count(values, count):
    config = DecoderConfig.from_hf(values)
    assert config.parameter_count() == count
    assert "lm_head.weight" not in config.parameter_shapes()


def test_family_switches():
    llama, qwen2, qwen3 = map(DecoderConfig.from_hf, (SMOLLM2, QWEN25, QWEN3))
    assert (llama.attention_bias, llama.attention_out_bias, llama.qk_norm) == (False, False, False)
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.attention_out_bias, qwen3.qk_norm) == (False, False, True)
    assert llama.head_dim == 64 and qwen2.head_dim == 64 and qwen3.head_dim == 128
    assert qwen3.eos_token_ids == (151645, 151643) and llama.eos_token_ids == (2,)
    both = DecoderConfig.from_hf(dict(SMOLLM2, attention_bias=True, mlp_bias=True))
    shapes = both.parameter_shapes()
    assert shapes["model.layers.29.self_attn.o_proj.bias"] == (576,)
    assert shapes["model.layers.0.self_attn.k_proj.bias"] == (192,)
    assert shapes["model.layers.0.mlp.gate_proj.bias"] == (1536,)
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2.parameter_shapes()


@pytest.mark.parametrize("name", TINY)
def test_shapes_equal_the_files_of_transformers(name):
    safetensors = pytest.importorskip("safetensors")
    path = os.path.join(GOLDENS, "tiny", name, "model.safetensors")
    with safetensors.safe_open(path, framework="np") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert DecoderConfig.from_hf(tiny(name)).parameter_shapes() == found


@pytest.mark.parametrize("values", [SMOLLM2, QWEN25, QWEN3] + [tiny(name) for name in TINY])
def test_round_trip(values):
    config = DecoderConfig.from_hf(values)
    written = json.loads(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(written) == config
    assert hash(DecoderConfig.from_hf(written)) == hash(config)
    assert written["architectures"] == [family(config.model_type).architecture]


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "llama_linear", "qwen2"])
def test_both_spellings_of_the_rotary_settings(name):
    old = tiny(name)
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = dict(old["rope_scaling"] or {"rope_type": "default"},
                                  rope_theta=old["rope_theta"])
    assert DecoderConfig.from_hf(new) == DecoderConfig.from_hf(old)
    legacy = dict(old)
    if old["rope_scaling"]:
        legacy["rope_scaling"] = dict(old["rope_scaling"])
        legacy["rope_scaling"]["type"] = legacy["rope_scaling"].pop("rope_type")
        assert DecoderConfig.from_hf(legacy) == DecoderConfig.from_hf(old)
    # both at once, as some releases write them, agree; a contradiction is refused
    assert DecoderConfig.from_hf(dict(old, rope_parameters=new["rope_parameters"])) == \
        DecoderConfig.from_hf(old)
    with pytest.raises(ConfigError, match="contradicts"):
        DecoderConfig.from_hf(dict(old, rope_parameters=dict(new["rope_parameters"],
                                                             rope_theta=77.0)))


REFUSED = [
    (dict(model_type="falcon", architectures=["FalconForCausalLM"]), "supported: llama"),
    (dict(model_type="qwen4"), "Did you mean 'qwen"),
    (dict(model_type=None, architectures=None), "model_type None"),
    (dict(model_type=["llama"]), "not supported"),
    (dict(architectures=["LlamaForSequenceClassification"]), "language-model head"),
    (dict(sliding_window=512), "sliding_window=512"),
    (dict(layer_types=["chunked_attention"] * 30), "layer_types"),
    (dict(rope_scaling={"rope_type": "longrope", "short_factor": [1]}), "'longrope'"),
    (dict(rope_scaling={"type": "mrope", "mrope_section": [1]}), "'mrope'"),
    (dict(rope_scaling={"rope_type": "linear"}), "lacks 'factor'"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0.5}), "0.5"),
    (dict(rope_scaling={"rope_type": "linear", "factor": float("nan")}), "nan"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0, "ramp": 1}), "'ramp'"),
    (dict(rope_scaling={"rope_type": "linear", "type": "yarn", "factor": 2.0}), "two types"),
    (dict(rope_scaling="linear"), "'linear'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                        "high_freq_factor": 1.0, "original_max_position_embeddings": 64}),
     "high_freq_factor"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "one set of rotary"),
    (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
     "partial_rotary_factor"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantized"),
    (dict(hidden_size=None), "missing hidden_size"),
    (dict(num_key_value_heads=2), "not a multiple"),
    (dict(head_dim=63), "head_dim=63"),
    (dict(hidden_size=577), "not a multiple"),
    (dict(vocab_size=10 ** 12), "vocab_size is 1000000000000"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True"),
    (dict(rms_norm_eps=-1.0), "rms_norm_eps is -1.0"),
    (dict(rope_theta=float("inf")), "rope_theta is inf"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes'"),
    (dict(attention_bias=1), "attention_bias is 1"),
    (dict(eos_token_id="</s>"), "eos_token_id"),
    (dict(bos_token_id=1.5), "bos_token_id is 1.5"),
]


@pytest.mark.parametrize("change, expected", REFUSED)
def test_refused(change, expected):
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.from_hf(dict(SMOLLM2, **change))
    assert expected in str(caught.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        DecoderConfig.from_hf(dict(SMOLLM2, hidden_act="gelu", sliding_window=8,
                                   rope_scaling={"type": "su"}))
    for part in ("gelu", "sliding_window=8", "'su'"):
        assert part in str(caught.value)


def test_sliding_window_that_is_not_used_is_accepted():
    assert DecoderConfig.from_hf(dict(QWEN25, use_sliding_window=False, sliding_window=4096))
    # used only by layers that do not exist, or as long as the whole context
    assert DecoderConfig.from_hf(dict(QWEN25, use_sliding_window=True, max_window_layers=24,
                                      sliding_window=4096))
    assert DecoderConfig.from_hf(dict(QWEN25, use_sliding_window=True))
    with pytest.raises(ConfigError, match="sliding-window"):
        DecoderConfig.from_hf(dict(QWEN25, use_sliding_window=True, sliding_window=4096))
    kinds = ["full_attention"] * 23 + ["sliding_attention"]
    with pytest.raises(ConfigError, match="sliding-window"):
        DecoderConfig.from_hf(dict(QWEN25, use_sliding_window=True, sliding_window=4096,
                                   layer_types=kinds))


def test_qwen_specific_contradictions():
    with pytest.raises(ConfigError, match="always has a bias"):
        DecoderConfig.from_hf(dict(QWEN25, attention_bias=False))
    with pytest.raises(ConfigError, match="mlp_bias"):
        DecoderConfig.from_hf(dict(QWEN3, mlp_bias=True))
    with pytest.raises(ConfigError, match="qk_norm is False"):
        DecoderConfig(**dict(vars(DecoderConfig.from_hf(QWEN3)), qk_norm=False))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(set(SMOLLM2) | set(QWEN25) | {
    "rope_parameters", "layer_types", "head_dim", "quantization_config", "mlp_bias"})), JSON,
    max_size=4))
def test_any_json_gives_a_config_or_a_config_error(change):
    for base in (SMOLLM2, QWEN25, QWEN3):
        try:
            config = DecoderConfig.from_hf(dict(base, **change))
        except ConfigError:
            continue
        assert all(math.prod(shape) > 0 for shape in config.parameter_shapes().values())


@pytest.mark.parametrize("values", [None, [], "llama", 3])
def test_config_that_is_no_object(values):
    with pytest.raises(ConfigError, match="JSON object"):
        DecoderConfig.from_hf(values)
