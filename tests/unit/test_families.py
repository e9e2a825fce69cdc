"""The families' records: what each of them says, and a made-up family that is known everywhere by one record."""

import json
import re

import numpy as np
import pytest

from colora_ms.errors import AdapterError, ConfigError
from colora_ms.models import families, gguf_names
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import FAMILIES, GGUF_LAYER, NEUTRAL, Family, family
from colora_ms.models.hf_folder import write_hf_folder
from colora_ms.models.tokenizer_classes import CLASS_TOKENS, tokenizer_class

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}

WIDE = {**SIZES, "hidden_size": 64, "num_attention_heads": 16}

#: What transformers' configuration classes take and have, family by family:
#: model_type: (class, biases of q k v, o and mlp without keys, the same with both keys true or None where one is
#: refused,
#:              q/k norm, head size, longest sequence, rows of q and k interleaved in a GGUF, key/value heads of 16,
#:              eps, rotary base, whether the head is tied)
NONE, QKVO, ALL = (False, False, False), (True, True, False), (True, True, True)
TABLE = {
    "llama": ("LlamaForCausalLM", NONE, ALL, False, 4, 2048, True, 16, 1e-6, 1e4, False),
    "qwen2": ("Qwen2ForCausalLM", (True, False, False), None, False, 4, 32768, False, 16, 1e-6, 1e4, False),
    "qwen3": ("Qwen3ForCausalLM", NONE, None, True, 128, 32768, False, 16, 1e-6, 1e4, False),
    "mistral": ("MistralForCausalLM", NONE, None, False, 4, 131072, True, 8, 1e-6, 1e4, False),
    "gemma2": ("Gemma2ForCausalLM", NONE, None, False, 256, 8192, False, 4, 1e-6, 1e4, True),
    "gemma3_text": ("Gemma3ForCausalLM", NONE, None, True, 256, 131072, False, 4, 1e-6, 1e6, True),
    "phi3": ("Phi3ForCausalLM", NONE, None, False, 4, 4096, False, 16, 1e-5, 1e4, False),
    "granite": ("GraniteForCausalLM", NONE, ALL, False, 4, 2048, True, 16, 1e-6, 1e4, False),
    "smollm3": ("SmolLM3ForCausalLM", NONE, ALL, False, 4, 32768, True, 4, 1e-6, 2e6, True),
    "glm4": ("Glm4ForCausalLM", (True, False, False), None, False, 128, 131072, False, 2, 1.5625e-7, 1e4, False),
    "cohere2": ("Cohere2ForCausalLM", NONE, None, False, 4, 8192, False, 16, 1e-5, 1e4, True),
    "olmo2": ("Olmo2ForCausalLM", NONE, None, True, 4, 2048, False, 16, 1e-5, 1e4, False),
    "mixtral": ("MixtralForCausalLM", NONE, None, False, 4, 131072, True, 8, 1e-5, 1e6, False),
    "qwen2_moe": ("Qwen2MoeForCausalLM", (True, False, False), None, False, 4, 32768, False, 16, 1e-6, 1e4, False),
    "qwen3_moe": ("Qwen3MoeForCausalLM", NONE, None, True, 4, 32768, False, 4, 1e-6, 1e4, False),
}


def test_the_table_has_every_family():
    assert set(TABLE) == set(FAMILIES) and all(name == record.name for name, record in FAMILIES.items())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_is(name):
    architecture, plain, biased, qk_norm, head_dim, length, interleaved, groups, eps, theta, tied = TABLE[name]
    record = family(name)
    config = DecoderConfig.from_hf({"model_type": name, **WIDE})
    assert DecoderConfig.from_hf({"architectures": [architecture], **WIDE}) == config
    assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == plain and config.qk_norm == qk_norm
    assert (config.head_dim, config.max_position_embeddings, config.num_key_value_heads) == (head_dim, length, groups)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (eps, theta, tied)
    keys = {"attention_bias": True, "mlp_bias": True}
    if biased is None:
        with pytest.raises(ConfigError, match=f"mlp_bias is true, but {name} has none"):
            DecoderConfig.from_hf({"model_type": name, **WIDE, **keys})
    else:
        config = DecoderConfig.from_hf({"model_type": name, **WIDE, **keys})
        assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == biased
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    heads = [gguf_names.interleaved_heads(config, f"model.layers.0.{module}")
             for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")]
    assert heads == ([16, groups, 0, 0] if interleaved else [0, 0, 0, 0])
    assert record.tokenizer in CLASS_TOKENS and tokenizer_class("f", {}, {"model_type": name}) == record.tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_has_one_name_in_llama_cpp_and_back(name):
    record = family(name)
    config = DecoderConfig.from_hf({"model_type": name, **WIDE, **{key: True for key in record.keys()}})
    names = {one: gguf_names.gguf_name(one, record) for one in config.parameter_shapes() if f".{record.mlp}." not in one
             or record.routing is None}  # experts share tensors: gguf_names.expert_tensors
    assert None not in names.values() and len(set(names.values())) == len(names)
    assert {gguf_names.hf_name(other, record): other for other in names.values()} == names
    assert gguf_names.gguf_name("model.layers.0.self_attn.rotary.weight", record) is None
    assert gguf_names.hf_name("blk.0.attn_qkv.weight", record) is None


@pytest.mark.parametrize("name, key", [(name, key) for name, record in FAMILIES.items() for key in record.refused()])
def test_a_setting_that_changes_the_mathematics_is_refused(name, key):
    for value in FAMILIES[name].refused()[key]:
        assert DecoderConfig.from_hf({"model_type": name, **WIDE, key: value})
    with pytest.raises(ConfigError, match=f"{key} is 7"):
        DecoderConfig.from_hf({"model_type": name, **WIDE, key: 7})


def test_a_key_that_no_record_reads_is_neutral_in_all():
    for key in NEUTRAL:
        assert sum(key in record.refused() for record in FAMILIES.values()) >= len(FAMILIES) // 2


@pytest.mark.parametrize("name, change, used", [
    ("llama", {}, True), ("llama", {"use_sliding_window": False}, False), ("llama", {"use_sliding_window": True}, True),
    ("qwen2", {}, False), ("qwen2", {"use_sliding_window": True}, False),  # from layer 28 on
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, True),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, False),
    ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, True),
    # a config that only names its class is read as its family
    (None, {"architectures": ["Qwen2ForCausalLM"]}, False), (None, {"architectures": ["LlamaForCausalLM"]}, True)])
def test_whose_window_is_used(name, change, used):
    values = {**SIZES, "num_hidden_layers": 2, "sliding_window": 8, "max_position_embeddings": 64, **change}
    values.update({} if name is None else {"model_type": name})
    if used:
        with pytest.raises(ConfigError, match="sliding_window=8"):
            DecoderConfig.from_hf(values)
    else:
        assert DecoderConfig.from_hf(values).max_position_embeddings == 64


# ---------------------------------------------------------------- a family that nothing but its record knows

MADE = Family(
    "made", "MadeForCausalLM", gguf="made-up", tokenizer="GemmaTokenizer",
    defaults={"max_position_embeddings": 50, "head_dim": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
              "rope_theta": 200.0, "tie_word_embeddings": True, "qkv_bias": True},
    attention_bias="qkv_bias", attention_out_bias=False, mlp_bias=True, qk_norm=True,
    neutral={**NEUTRAL, "made_scale": (None, 2.0)},
    gguf_layer={**{key: value for key, value in GGUF_LAYER.items() if key not in ("ffn_norm", "attn_q")},
                "pre_ffn_norm": "post_attention_layernorm", "attn_query": "self_attn.q_proj"},
    gguf_interleaved=True, gguf_writes=True)


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setitem(FAMILIES, "made", MADE)
    return DecoderConfig.from_hf({"model_type": "made", **SIZES})


def tensors_of(config, seed=0):
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal(shape) * (0.3 if len(shape) > 1 else 0.1)
                   + name.endswith("norm.weight")).astype(np.float32)
            for name, shape in config.parameter_shapes().items()}


def same(one, other):
    assert list(one.tensors) == list(other.tensors)
    for name in one.tensors:
        np.testing.assert_array_equal(one.tensors[name], other.tensors[name], err_msg=name)


def test_an_unknown_family_lists_those_that_are_known(monkeypatch):
    with pytest.raises(ConfigError, match="model_type 'made' is not supported; supported: llama .LlamaForCausalLM., "
                                          "qwen2 .Qwen2ForCausalLM., qwen3 .Qwen3ForCausalLM.") as caught:
        family("made")
    assert "MadeForCausalLM" not in str(caught.value)
    monkeypatch.setitem(FAMILIES, "made", MADE)
    assert family("made") is MADE and families.find_gguf_family("made-up") is MADE
    with pytest.raises(ConfigError, match=r"made \(MadeForCausalLM\)\. Did you mean 'made'"):
        family("mader")
    for nothing in (None, ["llama"], 3, {}):
        assert families.find_family(nothing) is families.find_gguf_family(nothing) is None


def test_the_made_up_config(made):
    assert (made.head_dim, made.num_key_value_heads, made.max_position_embeddings) == (6, 2, 50)
    assert (made.rms_norm_eps, made.rope_theta, made.tie_word_embeddings) == (1e-3, 200.0, True)
    assert (made.attention_bias, made.attention_out_bias, made.mlp_bias, made.qk_norm) == (True, False, True, True)
    written = made.to_hf()
    assert written["qkv_bias"] is True and "attention_bias" not in written and "mlp_bias" not in written
    plain = DecoderConfig.from_hf({"model_type": "made", **SIZES, "qkv_bias": False, "made_scale": 2.0})
    assert not plain.attention_bias and DecoderConfig.from_hf(json.loads(json.dumps(plain.to_hf()))) == plain
    for change, words in (({"made_scale": 3.0}, "made_scale is 3.0: only None is implemented"),
                          ({"qkv_bias": "yes"}, "qkv_bias is 'yes', expected true or false"),
                          ({"mlp_bias": False}, "mlp_bias is false, but made always has a bias on gate, up and down")):
        with pytest.raises(ConfigError, match=re.escape(words)):
            DecoderConfig.from_hf({"model_type": "made", **SIZES, **change})
    with pytest.raises(ConfigError, match="mlp_bias is False, but made with attention_bias=True has True"):
        DecoderConfig(**dict(vars(made), mlp_bias=False))


def test_a_made_up_family_from_a_folder_and_from_a_gguf(made, tmp_path):
    gguf = pytest.importorskip("gguf")
    from colora_ms.models.gguf_writer import write_gguf
    from gguf_files import interleave
    tensors = tensors_of(made)
    write_hf_folder(tmp_path / "folder", made, tensors)
    # as a folder that leaves out whatever it may
    (tmp_path / "folder" / "config.json").write_text(json.dumps(
        {"model_type": "made", "architectures": ["MadeForCausalLM"], **SIZES}))
    folder = open_checkpoint(tmp_path / "folder")
    assert folder.config == made and set(folder.tensors) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(folder.tensors[name], value)
    assert write_gguf(tmp_path / "m.gguf", made, tensors) == []
    reader = gguf.GGUFReader(str(tmp_path / "m.gguf"))
    assert reader.fields["general.architecture"].contents() == "made-up"
    assert reader.fields["made-up.attention.key_length"].contents() == 6
    stored = {one.name: np.array(one.data) for one in reader.tensors}
    assert {"blk.1.attn_query.bias", "blk.0.pre_ffn_norm.weight", "blk.0.ffn_up.bias"} < set(stored)
    assert not {"blk.0.attn_q.weight", "blk.0.ffn_norm.weight", "output.weight"} & set(stored)
    for key, module, heads in (("attn_query", "q_proj", 4), ("attn_k", "k_proj", 2)):
        for kind in ("weight", "bias"):
            np.testing.assert_array_equal(stored[f"blk.0.{key}.{kind}"],
                                          interleave(tensors[f"model.layers.0.self_attn.{module}.{kind}"], heads))
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.config.to_hf() == made.to_hf()
    same(opened, folder)


def test_a_made_up_family_decodes(made, tmp_path):
    """The Cells' logits are those of the textbook's formulas."""
    from mindspore import Tensor

    from colora_ms import runtime
    from colora_ms.models import build_decoder
    from test_forward_float64 import forward
    tensors = tensors_of(made, seed=1)
    write_hf_folder(tmp_path / "folder", made, tensors)
    ids = np.random.default_rng(2).integers(0, 40, (2, 9)).astype(np.int32)
    decoder = build_decoder(open_checkpoint(tmp_path / "folder"))
    logits = runtime.run(decoder, Tensor(ids), Tensor(np.array([9, 9], np.int32)), Tensor(np.array([-1, -1], np.int32)))
    np.testing.assert_allclose(logits.asnumpy(), forward(made, tensors, ids), atol=2e-4, rtol=0)


def test_an_adapter_of_a_made_up_family_as_llama_cpps_file(made, tmp_path):
    pytest.importorskip("gguf")
    from safetensors.numpy import load_file, save_file

    from colora_ms.adapters.gguf_convert import convert_adapter
    from colora_ms.models.gguf_reader import GgufFile
    write_hf_folder(tmp_path / "folder", made, tensors_of(made))
    random, adapter = np.random.default_rng(3), {}
    for name, out, inner in (("self_attn.q_proj", 24, 16), ("self_attn.v_proj", 12, 16), ("mlp.down_proj", 16, 24)):
        for layer in range(2):
            key = f"base_model.model.model.layers.{layer}.{name}"
            adapter[f"{key}.lora_A.weight"] = random.standard_normal((2, inner)).astype(np.float32)
            adapter[f"{key}.lora_B.weight"] = random.standard_normal((out, 2)).astype(np.float32)
    (tmp_path / "a").mkdir()
    save_file(adapter, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}))
    base = str(tmp_path / "folder")
    assert convert_adapter(tmp_path / "a", tmp_path / "a.gguf", base) == []
    file = GgufFile(tmp_path / "a.gguf")
    assert file.metadata["general.architecture"] == "made-up" and "blk.1.attn_query.weight.lora_b" in file.tensors
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    assert not np.array_equal(file.read("blk.1.attn_query.weight.lora_b"), adapter[key])
    assert convert_adapter(tmp_path / "a.gguf", tmp_path / "again", base) == []
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(again) == set(adapter)
    for name, value in adapter.items():
        np.testing.assert_array_equal(again[name], value)
    llama = DecoderConfig.from_hf({"model_type": "llama", **SIZES})
    write_hf_folder(tmp_path / "llama", llama, tensors_of(llama))
    with pytest.raises(AdapterError, match="made for the architecture 'made-up', the model is 'llama'"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "no", str(tmp_path / "llama"))


def test_the_tokenizer_of_a_made_up_family(made):
    assert tokenizer_class("f", {}, {"model_type": "made"}) == "GemmaTokenizer"
    assert tokenizer_class("f", {"tokenizer_class": "GPT2TokenizerFast"}, {"model_type": "made"}) == "GPT2Tokenizer"
    # tokenizers of models that are none of ours are read, too
    assert tokenizer_class("f", {}, {"model_type": "mistral"}) == "LlamaTokenizer"
    assert tokenizer_class("f", {}, {"model_type": "unheard-of"}) is tokenizer_class("f", {}, {}) is None


@pytest.mark.parametrize("change, words", [
    ({"gguf_biases": False}, "a made model with qkv_bias cannot be written as GGUF: llama.cpp has no such biases"),
    ({}, "rope_scaling of type llama3 on made cannot be written as GGUF: llama.cpp has the factors for llama only")])
def test_what_llama_cpp_has_no_words_for(made, tmp_path, monkeypatch, change, words):
    import dataclasses

    from colora_ms.models.gguf_writer import write_gguf
    monkeypatch.setitem(FAMILIES, "made", dataclasses.replace(MADE, **change))
    scaled = dataclasses.replace(made, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})
    with pytest.raises(ConfigError, match=words):
        write_gguf(tmp_path / "m.gguf", scaled, tensors_of(scaled))
    assert not list(tmp_path.iterdir())
