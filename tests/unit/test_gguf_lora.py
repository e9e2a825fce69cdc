"""llama.cpp's LoRA files: laid out as its converter does, with the same product, read back into the same model."""

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from colora_ms.errors import AdapterError, CheckpointError
from colora_ms.models.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_files import interleave, tiny  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(name):
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(tiny(name))
    return Decoder(checkpoint.config, checkpoint.tensors, max_positions=32)


def adapter(folder, name="llama", **settings):
    """A random adapter of a tiny model as a PEFT folder; returns (its settings, {PEFT's name: array})."""
    from colora_ms.adapters import LoraConfig
    from colora_ms.adapters.config_modules import modules_of_config
    from colora_ms.adapters.matching import match
    from colora_ms.adapters.peft_format import write_adapter

    config = LoraConfig(**{"target_modules": ALL, "r": 4, "lora_alpha": 8, "base_model_name_or_path": tiny(name),
                           **settings})
    modules = modules_of_config(open_checkpoint(tiny(name)).config)
    made, random = match(config, modules), np.random.default_rng(3)
    values = {}
    for path, target in made.targets.items():
        module = modules[path]
        down = (target.r, module.in_features) if target.kind == "linear" else (module.in_features, target.r)
        values[path, "lora"] = {"down": random.standard_normal(down, np.float32),
                                "up": random.standard_normal((module.out_features, target.r), np.float32)}
    write_adapter(folder, config, made, modules, values)
    return made, values


def contents(path):
    reader = gguf.GGUFReader(str(path))
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {one.name: one for one in reader.tensors}


def test_the_table_of_modules_is_that_of_the_model(mindspore):
    from colora_ms.adapters import LoraConfig, inject
    from colora_ms.adapters.config_modules import modules_of_config

    for name in ("llama", "llama_bias", "qwen2", "qwen3"):
        net = decoder(name)
        found = inject(net, LoraConfig(target_modules=["q_proj"])).modules
        assert modules_of_config(net.config) == found, name


def test_layout_of_llama_cpps_converter(tmp_path):
    """Metadata, names, shapes and types; q and k permuted like the weight's rows, the rest as it is."""
    from colora_ms.adapters.gguf_convert import convert_adapter

    made, values = adapter(tmp_path / "a", target_modules=[*ALL, "embed_tokens", "lm_head"])
    assert convert_adapter(tmp_path / "a", tmp_path / "lora.gguf") == []
    fields, tensors = contents(tmp_path / "lora.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 8.0
    assert set(tensors) == {f"blk.{i}.{one}.weight.lora_{half}" for i in (0, 1) for half in "ab" for one in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")} | {
            f"{one}.weight.lora_{half}" for one in ("token_embd", "output") for half in "ab"}
    assert {one.tensor_type.name for one in tensors.values()} == {"F32"}
    for gguf_name, name, heads in (("blk.1.attn_q", "model.layers.1.self_attn.q_proj", 4),
                                   ("blk.0.attn_k", "model.layers.0.self_attn.k_proj", 2),
                                   ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", 0),
                                   ("token_embd", "model.embed_tokens", 0), ("output", "lm_head", 0)):
        own = values[name, "lora"]
        np.testing.assert_array_equal(tensors[gguf_name + ".weight.lora_a"].data, own["down"])
        up = interleave(own["up"], heads) if heads else own["up"]
        np.testing.assert_array_equal(tensors[gguf_name + ".weight.lora_b"].data, up)


def change_of(tensors, alpha, name, heads):
    """What llama.cpp adds to a weight, float64, in Hugging Face's row order."""
    down, up = (np.array(tensors[f"{name}.weight.lora_{half}"].data, np.float64) for half in "ab")
    scale = alpha / up.shape[1] if alpha else 1.0
    if heads:
        place = interleave(np.arange(up.shape[0]), heads)
        up = up[np.argsort(place)]
    return scale * up @ down


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.floats(0.01, 100), st.booleans(), st.dictionaries(st.sampled_from(ALL), st.integers(1, 9)),
       st.dictionaries(st.sampled_from([*ALL, "layers.1.mlp.up_proj"]), st.floats(0.01, 100)),
       st.sampled_from(["llama", "qwen2", "qwen3"]))
def test_the_product_is_the_adapters(tmp_path, r, alpha, rslora, ranks, alphas, model):
    """Property: patterns and rslora folded into lora_b, for any of them; exact where the factor is a power of two."""
    from colora_ms.adapters.gguf_convert import convert_adapter

    target = tmp_path / "lora.gguf"
    target.unlink(missing_ok=True)
    made, values = adapter(tmp_path / "a", model, r=r, lora_alpha=alpha, use_rslora=rslora, rank_pattern=ranks,
                           alpha_pattern=alphas)
    notes = convert_adapter(tmp_path / "a", target)
    fields, tensors = contents(target)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    folded = False
    for path, one in made.targets.items():
        own = values[path, "lora"]
        want = one.scaling * own["up"].astype(np.float64) @ own["down"]
        _, _, layer, _, short = path.split(".")
        heads = {"q_proj": 4, "k_proj": 2}.get(short, 0) if model == "llama" else 0
        name = f"blk.{layer}.{names[short]}"
        got = change_of(tensors, fields["adapter.lora.alpha"], name, heads)
        assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
        factor = np.float32(one.scaling * one.r / fields["adapter.lora.alpha"])
        folded |= factor != 1
        if np.frexp(factor)[0] == 0.5 and not heads:
            np.testing.assert_array_equal(tensors[f"{name}.weight.lora_b"].data, own["up"] * factor)
    assert bool(notes) == folded


def logits(net, handle):
    from mindspore import Tensor

    ids = Tensor(np.array([[1, 5, 9, 40, 77, 3, 8, 2]], np.int32))
    return net(ids, Tensor(np.array([8], np.int32)), handle.slots(1)).asnumpy()


@pytest.mark.parametrize("model, options", [
    ("llama", {"target_modules": [*ALL, "embed_tokens", "lm_head"], "rank_pattern": {"layers.0.mlp.up_proj": 2}}),
    ("qwen3", {"use_rslora": True, "r": 3}), ("qwen2", {"alpha_pattern": {"down_proj": 3.0}})])
def test_read_back_into_the_same_model(model, options, mindspore, tmp_path):
    from colora_ms.adapters import digest, load_adapter
    from colora_ms.adapters.gguf_convert import convert_adapter

    adapter(tmp_path / "a", model, **options)
    convert_adapter(tmp_path / "a", tmp_path / "lora.gguf")
    net, twin = decoder(model), decoder(model)
    want = logits(net, load_adapter(net, tmp_path / "a"))
    handle = load_adapter(twin, tmp_path / "lora.gguf")
    got = logits(twin, handle)
    assert handle.names == ("lora.gguf",) and np.abs(got - want).max() < 1e-4 * np.ptp(want)
    base = logits(twin, handle) if handle.disable_adapter() else None
    assert np.abs(base - want).max() > 0.05 * np.ptp(want)  # the adapter does something
    handle.enable_adapter()
    handle.save(tmp_path / "again")
    third = decoder(model)
    assert np.abs(logits(third, load_adapter(third, tmp_path / "again")) - logits(twin, handle)).max() == 0
    assert len(digest(tmp_path / "lora.gguf")) == 64


def test_adapter_beside_a_loaded_one(mindspore, tmp_path):
    from colora_ms.adapters import load_adapter
    from colora_ms.adapters.gguf_convert import convert_adapter

    adapter(tmp_path / "a")
    convert_adapter(tmp_path / "a", tmp_path / "lora.gguf")
    net = decoder("llama")
    handle = load_adapter(net, tmp_path / "a", slots=2)
    first = logits(net, handle)
    handle.load(tmp_path / "lora.gguf", "twin")
    handle.set_adapter("twin")
    assert np.abs(logits(net, handle) - first).max() < 1e-5 * np.ptp(first)


def foreign(path, tensors, alpha=16.0, kind="adapter", arch="llama", **more):
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in more.items():
        writer.add_array(key.replace("__", "."), value) if isinstance(value, list) else writer.add_string(
            key.replace("__", "."), value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(r=2, inner=32, outer=32, dtype=np.float32):
    random = np.random.default_rng(1)
    return random.standard_normal((r, inner)).astype(dtype), random.standard_normal((outer, r)).astype(dtype)


def test_a_file_without_alpha_has_the_factor_one(mindspore, tmp_path):
    from colora_ms.adapters import load_adapter

    (a, b), (c, d) = pair(4), pair(2)
    path = foreign(tmp_path / "x.gguf", {"blk.0.attn_v.weight.lora_a": a, "blk.0.attn_v.weight.lora_b": b[:16],
                                         "blk.1.attn_output.weight.lora_a": c.astype(np.float16),
                                         "blk.1.attn_output.weight.lora_b": d}, alpha=0.0)
    net = decoder("llama")
    handle = load_adapter(net, path)
    for name, want in (("model.layers.0.self_attn.v_proj", b[:16] @ a),
                       ("model.layers.1.self_attn.o_proj", d @ c.astype(np.float16).astype(np.float32))):
        np.testing.assert_allclose(handle.sites[name, "lora"].delta(0), want, rtol=1e-5, atol=1e-6)


def refused(net, path, *words):
    from colora_ms.adapters import load_adapter

    with pytest.raises(AdapterError) as caught:
        load_adapter(net, path)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_cannot_be_read_is_named(mindspore, tmp_path):
    net = decoder("llama")
    a, b = pair()
    good = {"blk.0.attn_output.weight.lora_a": a, "blk.0.attn_output.weight.lora_b": b}
    refused(net, foreign(tmp_path / "1.gguf", good, kind="model"), "not an adapter")
    refused(net, foreign(tmp_path / "2.gguf", good, arch="qwen2"), "'qwen2'", "'llama'")
    refused(net, foreign(tmp_path / "3.gguf", {**good, "blk.1.ffn_up.weight.lora_a": a}), "ffn_up", "no partner")
    refused(net, foreign(tmp_path / "4.gguf", {**good, "blk.0.ssm_in.weight.lora_a": a,
                                               "blk.0.ssm_in.weight.lora_b": b}), "ssm_in", "no linear")
    refused(net, foreign(tmp_path / "5.gguf", {**good, "blk.0.attn_q.bias": a}), "attn_q.bias")
    refused(net, foreign(tmp_path / "6.gguf", {"blk.9.attn_output.weight.lora_a": a,
                                               "blk.9.attn_output.weight.lora_b": b}), "layers.9")
    refused(net, foreign(tmp_path / "7.gguf", {**good, "blk.0.attn_output.weight.lora_b": pair(2, outer=48)[1]}),
            "(48, 2)")
    refused(net, foreign(tmp_path / "8.gguf", {**good, "blk.0.attn_output.weight.lora_b": pair(3)[1]}),
            "different ranks")
    refused(net, foreign(tmp_path / "9.gguf", good, adapter__alora__invocation_tokens=[1, 2]), "aLoRA")
    refused(net, foreign(tmp_path / "10.gguf", {"blk.0.attn_output.weight.lora_a": a * np.nan,
                                                "blk.0.attn_output.weight.lora_b": b}), "not finite")
    refused(net, foreign(tmp_path / "11.gguf", {}), "")
    (tmp_path / "12.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0))
    refused(net, tmp_path / "12.gguf", "12.gguf")
    shutil.copy(tmp_path / "2.gguf", tmp_path / "plain")  # known by its content
    refused(net, tmp_path / "plain", "'qwen2'")
    refused(net, tmp_path / "absent.gguf", "absent.gguf")
    assert getattr(net, "colora_adapters", None) is None


def test_norms_are_left_out_as_llama_cpp_does_and_said(mindspore, tmp_path):
    from colora_ms.adapters import load_adapter

    a, b = pair()
    path = foreign(tmp_path / "x.gguf", {"blk.0.attn_output.weight.lora_a": a, "blk.0.attn_output.weight.lora_b": b,
                                         "blk.0.attn_norm.weight": np.ones(32, np.float32)})
    with pytest.warns(UserWarning, match="blk.0.attn_norm.weight"):
        load_adapter(decoder("llama"), path)


def test_a_lora_file_is_no_model(tmp_path):
    a, b = pair()
    path = foreign(tmp_path / "x.gguf", {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b})
    with pytest.raises(CheckpointError, match="is a LoRA adapter.*give it as the adapter"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("folder, words", [
    ("dora", "DoRA"), ("bias_lora_only", "bias of"), ("lora_bias", "bias on lora_B"), ("save_lm_head", "whole"),
    ("tokens", "tokens"), ("larger", "rows for tokens")])
def test_what_llama_cpp_cannot_say_is_refused(folder, words, goldens, tmp_path):
    from colora_ms.adapters.gguf_convert import convert_adapter

    values = json.loads((goldens / "peft" / folder / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match=words) as caught:
        convert_adapter(goldens / "peft" / folder, tmp_path / "x.gguf", goldens / values["base_model_name_or_path"])
    assert "colora-ms merge" in str(caught.value) and list(tmp_path.iterdir()) == []


def test_pissa_becomes_plain_lora(goldens, tmp_path, mindspore):
    from colora_ms.adapters import load_adapter
    from colora_ms.adapters.gguf_convert import convert_adapter

    folder = goldens / "peft" / "pissa"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].split("/")[-1]
    convert_adapter(folder, tmp_path / "x.gguf", tiny(base))
    net, twin = decoder(base), decoder(base)
    want = logits(net, load_adapter(net, folder))
    assert np.abs(logits(twin, load_adapter(twin, tmp_path / "x.gguf")) - want).max() < 1e-4 * np.ptp(want)


def test_the_ends_of_a_tied_model_are_refused(tmp_path):
    from colora_ms.adapters.gguf_lora import write_gguf_lora

    made, values = adapter(tmp_path / "a", "qwen3", target_modules=["embed_tokens", "q_proj"])
    config = dataclasses.replace(open_checkpoint(tiny("qwen3")).config, tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="tied"):
        write_gguf_lora(tmp_path / "x.gguf", config, made, values)


def test_command(tmp_path, capsys, goldens):
    from colora_ms.cli import main

    adapter(tmp_path / "a")
    target = str(tmp_path / "lora.gguf")
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", target, "--type", "f16"]) == 0
    assert {one.tensor_type.name for one in contents(target)[1].values()} == {"F16"}
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", target]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", str(tmp_path / "x")]) == 1
    assert ".gguf" in capsys.readouterr().err
    full = str(tmp_path / "full.gguf")
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", full]) == 0
    assert main(["convert", "--adapter", full, "--to", str(tmp_path / "back"), "--base", tiny("llama")]) == 0
    one, two = (load_file(str(folder / "adapter_model.safetensors")) for folder in (tmp_path / "a", tmp_path / "back"))
    assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert main(["convert", "--adapter", full, "--to", str(tmp_path / "back"), "--base", tiny("llama")]) == 1
    values = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    del values["base_model_name_or_path"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(values))
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", str(tmp_path / "y.gguf")]) == 1
    assert "give --base" in capsys.readouterr().err
    named = ["--base", tiny("llama")]
    assert main(["convert", "--adapter", str(tmp_path / "a"), "--to", str(tmp_path / "y.gguf"), *named]) == 0
    assert main(["convert", tiny("llama"), str(tmp_path / "m.gguf"), "--type", "q8_0"]) == 0
    assert "stored in F16" in capsys.readouterr().err
    for wrong in (["convert", tiny("llama"), str(tmp_path / "n.gguf"), "--dtype", "float16"],
                  ["convert", tiny("llama"), str(tmp_path / "n"), "--type", "F16"], ["convert", tiny("llama")],
                  ["convert", tiny("llama"), str(tmp_path / "n"), "--base", "x"]):
        assert main(wrong) == 1
    assert not (tmp_path / "n").exists() and not (tmp_path / "n.gguf").exists()
