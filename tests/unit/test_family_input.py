"""What families' files may have wrong, and what one form says that another leaves out: one clear sentence each."""

import json
import re

import numpy as np
import pytest

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.config import DecoderConfig
from colora_ms.models.hf_folder import write_hf_folder
from colora_ms.models.rope import default_positions, rope_frequencies, rope_tables
from test_family_goldens import Golden, tensor

SIZES = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 6,
         "num_attention_heads": 16, "num_key_value_heads": 4}


def config(model_type, **values):
    return DecoderConfig.from_hf({"model_type": model_type, **SIZES, **values})


@pytest.mark.parametrize("model_type, values, words", [
    ("mistral", {"sliding_window": 0}, "sliding_window is 0, but layer 0 slides"),
    ("gemma2", {"sliding_window": 0}, "sliding_window is 0, but layer 0 slides"),
    ("gemma3_text", {"sliding_window": -3}, "sliding_window is -3, but layer 0 slides"),
    ("gemma2", {"layer_types": ["full_attention"] * 5}, "layer_types has 5 entries, expected one for each of 6 layers"),
    ("gemma2", {"layer_types": ["chunked_attention"] * 6}, "only 'full_attention' and 'sliding_attention'"),
    ("mistral", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 3},
     "layer_types calls layer 1 of a mistral model full_attention, but sliding_window is 4 for all layers"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0], expected a 0 or 1 for each of 6 layers"),
    ("qwen3_moe", {"num_experts_per_tok": 200}, "num_experts_per_tok is 200, expected 1 to 128"),
    ("qwen3_moe", {"num_experts": 0}, "num_experts is 0, but qwen3_moe is a family of routed experts"),
    ("qwen3_moe", {"moe_intermediate_size": "wide"}, "moe_intermediate_size is 'wide', expected a whole number"),
    ("qwen2_moe", {"mlp_only_layers": [9]}, "mlp_only_layers is [9], expected numbers of layers"),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
     "sliding-window attention is not implemented for qwen2_moe"),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 6},
     "sliding-window attention is not implemented for qwen3_moe"),
    ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("granite", {"logits_scaling": 0}, "logits_scaling is 0, expected a positive finite number"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5, expected a number above 0, at most 1"),
    ("glm4", {"head_dim": 6}, "gives 3 channels, expected an even number"),
    ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
     "1 short factors and 2 long ones"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ("pixtral_thing", {"text_config": {"model_type": "falcon"}}, "wraps a text model: model_type 'falcon'"),
])
def test_a_config_that_cannot_be_used(model_type, values, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(model_type, **values)


def test_windows_where_nothing_is_said_and_where_nothing_slides():
    assert config("mistral").window == 4096 and all(config("mistral").sliding_layers)
    assert config("mistral", sliding_window=None).sliding_layers == ()
    assert config("mixtral").sliding_layers == () and config("mixtral").rope_theta == 1e6
    assert config("phi3").sliding_layers == () and config("phi3", sliding_window=2047).window == 2047
    assert config("qwen2_moe", sliding_window=0, use_sliding_window=False).sliding_layers == ()
    assert config("gemma2").sliding_layers == (True, False) * 3
    assert config("gemma3_text").sliding_layers == (True,) * 5 + (False,)
    assert config("gemma3_text", sliding_window_pattern=2).sliding_layers == (True, False) * 3
    command = config("cohere2")
    assert command.sliding_layers == command.rotary_layers == (True, True, True, False, True, True)
    assert config("cohere2", head_dim=12).head_dim == 4  # overwritten there, too
    assert config("smollm3").rotary_layers == (True, True, True, False, True, True)
    assert config("granite").score_scale == 1.0 and config("mistral", head_dim=16).score_scale == 0.25


def test_the_newer_spelling_of_two_rotary_tables():
    old = config("gemma3_text", rope_theta=1e6, rope_local_base_freq=5e3,
                 rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = config("gemma3_text", rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}})
    assert old == new and old.rope_scaling == new.rope_scaling
    with pytest.raises(ConfigError, match="of sliding layers"):
        config("gemma3_text", rope_parameters={"full_attention": {"rope_theta": 1e6},
                                               "sliding_attention": {"rope_type": "linear", "factor": 2.0}})


def test_longrope_is_the_reference_s_numbers_and_one_list_serves_all_positions():
    """n = 12, theta = 1e4, original length 32, 128 positions; one table for the life of a cache."""
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    made = DecoderConfig.from_hf({
        "model_type": "phi3", **SIZES, "num_attention_heads": 4, "partial_rotary_factor": 0.75,
        "max_position_embeddings": 128, "original_max_position_embeddings": 32,
        "rope_scaling": {"type": "su", "short_factor": short, "long_factor": long}})
    assert (made.head_dim, made.rotary_dim, default_positions(made)) == (16, 12, 32)
    wanted = {32: [1, .1958577, .0386799, .00769231, .00153888, .000309439],
              33: [1, .1077217, .0116040, .00125, .000134652, .0000145050]}
    for positions, numbers in wanted.items():
        found, factor = rope_frequencies(made, positions)
        np.testing.assert_allclose(found, numbers, rtol=1e-5)
        assert abs(factor - 1.1832160) < 1e-6
        cos, sin = rope_tables(made, positions)
        assert cos.shape == (positions, 8) and np.all(cos[:, 6:] == 1) and np.all(sin[:, 6:] == 0)
    assert DecoderConfig.from_hf(json.loads(json.dumps(made.to_hf()))) == made


def test_experts_that_are_missing_or_of_a_wrong_size(tmp_path):
    golden = Golden("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    shape = golden.about["shapes"].pop(name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is missing"):
        open_checkpoint(golden.write(tmp_path / "missing"))
    golden.about["shapes"].update({name: shape, "model.layers.0.block_sparse_moe.gate.weight": [3, 32]})
    with pytest.raises(CheckpointError, match=r"block_sparse_moe.gate.weight has shape \(3, 32\), the config calls"):
        open_checkpoint(golden.write(tmp_path / "router"))
    phi = Golden("phi3_window")
    phi.about["shapes"]["model.layers.0.self_attn.qkv_proj.weight"][0] += 2
    with pytest.raises(CheckpointError, match="qkv_proj.weight has 66 rows, the config calls for 64"):
        open_checkpoint(phi.write(tmp_path / "fused"))


def test_experts_in_one_tensor_and_a_wrapped_text_model(tmp_path):
    """transformers 5 keeps a layer's experts as one; the text part of a model that sees."""
    from safetensors.numpy import load_file, save_file

    golden = Golden("qwen3_moe")
    apart = golden.write(tmp_path / "apart")
    plain = load_file(apart / "model.safetensors")
    fused = {name: value for name, value in plain.items() if ".experts." not in name}
    for layer in (1,):
        one = f"model.layers.{layer}.mlp.experts."
        fused[one + "gate_up_proj"] = np.stack([np.concatenate([
            plain[f"{one}{e}.gate_proj.weight"], plain[f"{one}{e}.up_proj.weight"]]) for e in range(5)])
        fused[one + "down_proj"] = np.stack([plain[f"{one}{e}.down_proj.weight"] for e in range(5)])
    together = golden.write(tmp_path / "together")
    save_file(fused, together / "model.safetensors")
    found = open_checkpoint(together)
    for name, value in open_checkpoint(apart).tensors.items():
        np.testing.assert_array_equal(found.tensors[name], value)
    gemma = Golden("gemma3_text")
    text = gemma.about["config"]
    gemma.about["config"] = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
                             "text_config": {**text, "architectures": None}, "eos_token_id": [1, 106]}
    for prefix, head in (("language_model.model.", "model."), ("model.language_model.", "model.")):
        folder = gemma.write(tmp_path / prefix)
        named = {prefix + name.removeprefix(head): value
                 for name, value in load_file(folder / "model.safetensors").items()}
        named["model.vision_tower.patch.weight" if prefix[0] == "m" else "vision_tower.patch.weight"] = np.zeros((2, 2))
        save_file({name: value.astype(np.float32) for name, value in named.items()}, folder / "model.safetensors")
        opened = open_checkpoint(folder)
        assert opened.config.model_type == "gemma3_text" and opened.config.eos_token_ids == (1, 106)
        name = "model.layers.6.mlp.up_proj.weight"
        np.testing.assert_array_equal(opened.tensors[name], tensor(name, (40, 32)))


@pytest.mark.parametrize("case", ["phi3_long", "gemma3_text", "qwen2_moe", "cohere2", "smollm3", "mistral", "granite"])
def test_a_folder_is_written_as_it_was_read(case, tmp_path):
    """Names, fused linears and settings: what transformers has written, and what this package writes of it."""
    from safetensors.numpy import load_file

    golden = Golden(case)
    read = open_checkpoint(golden.write(tmp_path / "read"))
    write_hf_folder(tmp_path / "written", read.config, read.tensors)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("read", "written"))
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value)
    again = open_checkpoint(tmp_path / "written").config
    assert again == read.config and again.rope_scaling == read.config.rope_scaling


def test_what_a_gguf_leaves_out(tmp_path):
    pytest.importorskip("gguf")
    from colora_ms.models.families import family
    from family_gguf import write_family_gguf

    golden = Golden("gemma2")
    small = open_checkpoint(write_family_gguf(tmp_path / "9b.gguf", "gemma2", golden)).config
    assert small.score_scale == 12 ** -0.5
    for model_type, layers in (("gemma2", 46), ("gemma3_text", 62)):
        values = {"num_hidden_layers": layers, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
        family(model_type).gguf_rest(values, {})
        assert values["query_pre_attn_scalar"] == 144
    with pytest.raises(ConfigError, match="sliding-window attention is not implemented"):  # OLMo-3 under OLMo-2's name
        open_checkpoint(write_family_gguf(tmp_path / "olmo3.gguf", "olmo2", Golden("olmo2"),
                                          {"attention.sliding_window": 4}))
    for number, (change, drop, window) in enumerate((({"attention.sliding_window": 0}, (), None),
                                                     ({}, ("attention.sliding_window",), None),
                                                     ({"attention.sliding_window": 4}, (), 4))):
        path = write_family_gguf(tmp_path / f"phi{number}.gguf", "phi3_window", Golden("phi3_window"), change, drop)
        assert open_checkpoint(path).config.window == window


def test_ends_of_a_gguf_and_its_heads_are_told_by_the_file(tmp_path):
    """d * heads is not the hidden size: Nemo's case, from both forms."""
    pytest.importorskip("gguf")
    from family_gguf import write_family_gguf

    golden = Golden("mistral")
    for path in (golden.write(tmp_path / "m"), write_family_gguf(tmp_path / "m.gguf", "mistral", golden)):
        found = open_checkpoint(path).config
        assert found.head_dim * found.num_attention_heads == 48 != found.hidden_size


# ---------------------------------------------------------------- adapters on the experts' fused weights


@pytest.fixture
def experts():
    """Two experts of width 3 on a hidden size of 4."""
    return config("mixtral", hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2,
                  intermediate_size=3, num_local_experts=2, num_hidden_layers=1)


class Tensors:
    def __init__(self, tensors):
        self.tensors = tensors
        self.entries = {name: ("F32", value.shape, 0, 0) for name, value in tensors.items()}

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def lora(names, **more):
    from colora_ms.adapters.config import LoraConfig
    from colora_ms.adapters.expert_parameters import without_parameters

    values, found = without_parameters({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [],
                                        "target_parameters": names, **more})
    return LoraConfig.from_peft(values), found


@pytest.mark.parametrize("older", [False, True])
def test_pairs_of_fused_experts_are_taken_apart(experts, older):
    """By PEFT's own rule for the change of expert e, in both forms; both parameters, of which the inner wrapper is
    gate_up_proj."""
    from colora_ms.adapters.expert_parameters import split_experts

    random, key = np.random.default_rng(1), "base_model.model.model.layers.0.mlp.experts."
    tensors, changes = {}, {}
    for wrapper, out, inner in (("base_layer.", 6, 4), ("", 4, 3)):
        first, second = (out, inner) if older else (inner, out)
        a, b = random.normal(size=(2 * 2, first)), random.normal(size=(second, 2 * 2))
        tensors[f"{key}{wrapper}lora_A.weight"], tensors[f"{key}{wrapper}lora_B.weight"] = np.float32(a), np.float32(b)
        for e in range(2):
            one, two = a.reshape(2, 2, first)[e], b.reshape(second, 2, 2)[..., e]  # (r, in), (out, r)
            changes[wrapper, e] = one.T @ two.T if older else two @ one
    settings, names = lora(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    file, settings = split_experts(Tensors(tensors), settings, experts, names, None)
    assert len(file.entries) == 12 and len(settings.target_modules) == 6 and not settings.rank_pattern
    for e in range(2):
        own = f"base_model.model.model.layers.0.block_sparse_moe.experts.{e}."
        for part, wrapper, rows in (("w1", "base_layer.", slice(0, 3)), ("w3", "base_layer.", slice(3, 6)),
                                    ("w2", "", slice(0, 4))):
            down, up = file.read(f"{own}{part}.lora_A.weight"), file.read(f"{own}{part}.lora_B.weight")
            assert (down.shape, up.shape) == tuple(file.shape(f"{own}{part}.lora_{half}.weight") for half in "AB")
            np.testing.assert_allclose(up @ down, changes[wrapper, e][rows], atol=1e-5)


def test_the_order_of_ranks_and_experts_is_peft_s():
    """E = 2, r = 2, in = out = 1: 70 and 220, not 50 and 250; with equal sizes the version decides."""
    from colora_ms.adapters.expert_parameters import split_experts
    from colora_ms.errors import AdapterError

    made = config("mixtral", hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2,
                  intermediate_size=2, num_local_experts=2, num_hidden_layers=1)
    key = "base_model.model.model.layers.0.mlp.experts.lora_"
    a = np.float32([[1, 0], [2, 0], [3, 0], [4, 0]])
    b = np.float32([[10, 20, 30, 40], [0, 0, 0, 0]])
    settings, names = lora(["mlp.experts.down_proj"])
    with pytest.raises(AdapterError, match="can be read two ways"):
        split_experts(Tensors({f"{key}A.weight": a, f"{key}B.weight": b}), settings, made, names, None)
    file, _ = split_experts(Tensors({f"{key}A.weight": a, f"{key}B.weight": b}), settings, made, names, "0.19.1")
    own = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.w2.lora_{}.weight"
    assert [float((file.read(own.format(e, "B")) @ file.read(own.format(e, "A")))[0, 0]) for e in (0, 1)] == [70, 220]
    with pytest.raises(AdapterError, match="are no pair for 2 experts"):
        split_experts(Tensors({f"{key}A.weight": a[:3], f"{key}B.weight": b}), settings, made, names, None)
    with pytest.raises(AdapterError, match="which the model does not have"):
        split_experts(Tensors({}), settings, config("mistral"), names, None)
