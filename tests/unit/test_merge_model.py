"""Merging adapters into a model's files: the logits of the unmerged model, whatever is written, or nothing written."""

import json
import shutil

import numpy as np
import pytest

from colora_ms.cli import main
from colora_ms.errors import AdapterError, CheckpointError, ColoraError, ConfigError
from colora_ms.models.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_files import tiny  # noqa: E402
from test_gguf_lora import adapter, decoder  # noqa: E402

IDS = np.array([[1, 5, 9, 40, 77, 3, 8, 2], [60, 61, 5, 7, 7, 12, 90, 33]], np.int32)


def logits(net, handle=None):
    from mindspore import Tensor

    slots = handle.slots(2) if handle else Tensor(np.full(2, -1, np.int32))
    return net(Tensor(IDS), Tensor(np.full(2, 8, np.int32)), slots).asnumpy()


def unmerged(name, folder):
    from colora_ms.adapters import load_adapter

    net = decoder(name)
    return logits(net, load_adapter(net, folder))


def loaded(path):
    from colora_ms.models import build_decoder

    return logits(build_decoder(open_checkpoint(str(path)), max_positions=32))


@pytest.fixture
def small(tmp_path):
    """A random adapter of tiny/llama on all linears."""
    adapter(tmp_path / "small", r=3, lora_alpha=0.5)
    return tmp_path / "small"


PEFTS = ["qv_r8", "all_rslora", "bias_lora_only", "dora", "dora_bias", "lora_bias", "save_lm_head", "pissa", "olora",
         "dora_pissa", "save_tied", "save_tied_embedding", "tokens", "tokens_both", "tokens_tied", "tokens_tied_apart",
         "tokens_tied_ensured", "tokens_tied_head", "larger", "larger_stored", "larger_tied", "larger_tied_stored",
         "larger_untrained", "larger_untrained_tied"]


@pytest.mark.filterwarnings("ignore::colora_ms.errors.AdapterWarning")
@pytest.mark.parametrize("name", PEFTS)
def test_every_kind_of_lora(name, mindspore, goldens, tmp_path):
    """peft's own adapters, with DoRA, biases, whole modules, token rows, larger vocabularies: merged files give peft's
    logits on torch."""
    from mindspore import Tensor

    from colora_ms.models import build_decoder
    from colora_ms.recipes.merge_model import merge_model

    folder = goldens / "peft" / name
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].split("/")[-1]
    out = "m.gguf" if PEFTS.index(name) % 2 else "m"
    report = merge_model(tiny(base), [folder], tmp_path / out)
    assert report.share <= 1e-3 and report.rounded_difference is None
    stored = np.load(folder / "logits.npz")
    ids = stored["ids"].astype(np.int32)
    net = build_decoder(open_checkpoint(str(tmp_path / out)), max_positions=64)
    lengths, slots = np.full(len(ids), ids.shape[1], np.int32), np.full(len(ids), -1, np.int32)
    got = net(Tensor(ids), Tensor(lengths), Tensor(slots)).asnumpy()
    assert np.abs(got[:, stored["positions"]] - stored["logits"]).max() < 2e-4
    assert [one.name for one in tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("out, option", [
    ("m", {"dtype": "bfloat16"}), ("m", {"dtype": "float16"}), ("m", {"dtype": "int8"}),
    ("m", {"dtype": "int4", "group": 8}), ("m.gguf", {"kind": "F16"}), ("m.gguf", {"kind": "BF16"}),
    ("m.gguf", {"kind": "Q8_0"}), ("m.gguf", {"kind": "Q4_0"})])
def test_rounding_is_measured(out, option, mindspore, small, tmp_path):
    from colora_ms.recipes.merge_model import merge_model

    report = merge_model(tiny("llama"), [small], tmp_path / out, **option)
    merge_model(tiny("llama"), [small], tmp_path / "plain")
    exact = loaded(tmp_path / "plain")
    got = loaded(tmp_path / out)
    assert 0 < report.rounded_mean < report.rounded_difference
    assert 0.2 < np.abs(got - exact).max() / report.rounded_difference < 5  # other texts, the same size
    assert report.rounded_loss != report.loss and abs(report.rounded_loss - report.loss) < 1.5


def test_several_adapters(mindspore, tmp_path):
    from colora_ms.adapters import load_adapters
    from colora_ms.recipes.merge_model import merge_model

    adapter(tmp_path / "a", r=2, lora_alpha=1)
    adapter(tmp_path / "b", r=5, lora_alpha=2, target_modules=["q_proj", "up_proj"])
    report = merge_model(tiny("llama"), [tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.7, -0.4])
    assert report.share <= 1e-3
    net = decoder("llama")
    handle = load_adapters(net, {"a": tmp_path / "a", "b": tmp_path / "b"})
    merged = open_checkpoint(tmp_path / "out")
    base = open_checkpoint(tiny("llama"))
    for path in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        want = base.tensors[path + ".weight"] + 0.7 * handle.sites[path, "lora"].delta(0)
        if "q_proj" in path:
            want = want - 0.4 * handle.sites[path, "lora"].delta(1)
        np.testing.assert_allclose(merged.tensors[path + ".weight"], want, atol=2e-5)
    for way, options in (("ties_svd", {"density": 0.5, "svd_rank": 7}), ("svd", {})):
        both = [tmp_path / "a", tmp_path / "b"]
        assert merge_model(tiny("llama"), both, tmp_path / way, combine=way, **options).share <= 1e-3
    with pytest.raises(AdapterError, match="equal ranks"):
        merge_model(tiny("llama"), [tmp_path / "a", tmp_path / "b"], tmp_path / "no", combine="linear")
    assert not (tmp_path / "no").exists()


def test_a_lora_gguf_is_merged_too(mindspore, small, tmp_path):
    from colora_ms.adapters.gguf_convert import convert_adapter
    from colora_ms.recipes.merge_model import merge_model

    convert_adapter(small, tmp_path / "lora.gguf")
    merge_model(tiny("llama"), [tmp_path / "lora.gguf"], tmp_path / "one.gguf")
    merge_model(tiny("llama"), [small], tmp_path / "two.gguf")
    one, two = open_checkpoint(tmp_path / "one.gguf").tensors, open_checkpoint(tmp_path / "two.gguf").tensors
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-6)


def test_packed_bases(mindspore, small, tmp_path):
    """Into a dequantised copy of integers, of GGUF blocks, of factors; and it is said."""
    from colora_ms.models.gguf_writer import write_gguf
    from colora_ms.quantization import quantize
    from colora_ms.quantization.config import LrQatConfig
    from colora_ms.recipes.merge_model import merge_model

    source = open_checkpoint(tiny("llama"))
    quantize(decoder("llama"), LrQatConfig(method="rtn", bits=8, downcast="int")).export(tmp_path / "int8")
    write_gguf(tmp_path / "q8.gguf", source.config, source.tensors, kind="Q8_0")
    for base, words in (("int8", "integers"), ("q8.gguf", "Q8_0")):
        report = merge_model(tmp_path / base, [small], tmp_path / f"merged_{base}.gguf", kind="F32")
        assert any(words in note and "copy" in note for note in report.notes) and report.share <= 1e-3
        opened, merged = open_checkpoint(tmp_path / base), open_checkpoint(tmp_path / f"merged_{base}.gguf")
        assert merged.packed == []
        name = "model.embed_tokens.weight"  # not adapted: the copy itself
        np.testing.assert_array_equal(merged.tensors[name], opened.tensors[name])
    report = merge_model(tmp_path / "int8", [small], tmp_path / "again", dtype="int8")
    assert report.rounded_difference > 0 and open_checkpoint(tmp_path / "again").quantized is not None


def test_a_tied_model_gets_a_head_of_its_own_where_it_has_to(mindspore, tmp_path):
    import dataclasses

    from colora_ms.adapters import load_adapter
    from colora_ms.models import build_decoder
    from colora_ms.models.hf_folder import write_hf_folder
    from colora_ms.recipes.merge_model import merge_model

    source = open_checkpoint(tiny("qwen3"))
    config = dataclasses.replace(source.config, tie_word_embeddings=True)
    tensors = {key: value for key, value in source.tensors.items() if key != "lm_head.weight"}
    write_hf_folder(tmp_path / "base", config, tensors)
    for modules, own in ((["q_proj"], False), (["q_proj", "embed_tokens"], True), (["lm_head"], True)):
        adapter(tmp_path / "a", "qwen3", target_modules=modules, base_model_name_or_path=str(tmp_path / "base"))
        out = tmp_path / f"out{len(modules)}{own}"
        report = merge_model(tmp_path / "base", [tmp_path / "a"], out)
        net = build_decoder(open_checkpoint(tmp_path / "base"), max_positions=32)
        want = logits(net, load_adapter(net, tmp_path / "a"))
        assert open_checkpoint(out).config.tie_word_embeddings is not own
        assert any("of its own" in note for note in report.notes) is own
        assert np.abs(loaded(out) - want).max() <= 1e-4 * np.ptp(want)


def test_nothing_is_overwritten_or_half_written(mindspore, small, tmp_path, monkeypatch):
    from colora_ms.recipes import merge_model as module

    before = sorted(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    for target, error in (("there", CheckpointError),):
        with pytest.raises(error, match="exists already"):
            module.merge_model(tiny("llama"), [small], tmp_path / target)
    (tmp_path / "there").rmdir()
    for options, error in (({"dtype": "float8"}, ConfigError), ({"kind": "Q8_0"}, ConfigError),
                           ({"group": 8}, ConfigError), ({"weights": [1, 2]}, AdapterError),
                           ({"svd_rank": 2}, AdapterError),
                           ({"combine": "nothing", "weights": [2]}, AdapterError)):
        with pytest.raises(error):
            module.merge_model(tiny("llama"), [small], tmp_path / "m", **options)
    with pytest.raises(ConfigError, match="--type"):
        module.merge_model(tiny("llama"), [small], tmp_path / "m.gguf", dtype="float16")
    with pytest.raises(ColoraError):
        module.merge_model(tiny("qwen3"), [small], tmp_path / "m")
    with pytest.raises(AdapterError, match="no adapter"):
        module.merge_model(tiny("llama"), [], tmp_path / "m")
    huge = shutil.copytree(small, tmp_path.parent / "huge")
    values = json.loads((huge / "adapter_config.json").read_text())
    (huge / "adapter_config.json").write_text(json.dumps(dict(values, lora_alpha=1e38)))
    with pytest.raises(AdapterError):
        module.merge_model(tiny("llama"), [huge], tmp_path / "m")
    (huge / "adapter_config.json").write_text(json.dumps(dict(values, lora_alpha=1e6)))
    with pytest.raises(ColoraError):  # values beyond float16
        module.merge_model(tiny("llama"), [huge], tmp_path / "m.gguf", kind="F16")
    assert sorted(tmp_path.iterdir()) == before


def test_a_lily_adapter_with_a_router_cannot_be_merged(mindspore, goldens, tmp_path):
    from colora_ms.recipes.merge_model import merge_model

    folder = next(one for one in sorted((goldens / "peft_lily").iterdir()) if (one / "adapter_config.json").is_file())
    base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "tiny/llama"
    with pytest.raises(ColoraError):
        merge_model(tiny(str(base).rsplit("/", maxsplit=1)[-1]), [folder], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_files_travel_along(mindspore, shared, tmp_path, capsys):
    """The tokenizer's files, template and generation config of the base; nothing of the adapter's folder."""
    from colora_ms.models.tokenizer import load_tokenizer

    base = shutil.copytree(shared / "data" / "stories260k", tmp_path / "base")
    generation = {"bos_token_id": 1, "eos_token_id": [2, 5], "temperature": 0.3, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    folder = tmp_path / "a"
    stories_adapter(base, folder)
    (folder / "tokenizer.json").write_text("{}")
    assert main(["merge", str(base), str(folder), str(tmp_path / "out"), "--json", str(tmp_path / "n.json")]) == 0
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    one, two = load_tokenizer(str(tmp_path / "out")), load_tokenizer(str(base))
    assert one.encode("Once upon a time") == two.encode("Once upon a time")
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert f"{numbers['share']:.2g} of their range" in printed and numbers["share"] <= 1e-3
    assert main(["merge", str(base), str(folder), str(tmp_path / "out.gguf"), "--type", "q8_0"]) == 0
    assert "rounded to Q8_0" in capsys.readouterr().out
    read = load_tokenizer(str(tmp_path / "out.gguf"))
    assert read.chat_template == "{{ messages[0].content }}"
    assert open_checkpoint(tmp_path / "out.gguf").config.eos_token_ids == (2, 5)
    assert main(["merge", str(base), str(folder), str(tmp_path / "out")]) == 1
    assert main(["merge", str(base), str(folder), str(tmp_path / "o2"), "--weights", "x"]) == 1
    assert "expected numbers" in capsys.readouterr().err


def stories_adapter(base, folder, seed=0, size=0.05):
    """A random LoRA of stories260k on all linears that changes its answers."""
    from colora_ms.adapters import LoraConfig
    from colora_ms.adapters.config_modules import modules_of_config
    from colora_ms.adapters.matching import match
    from colora_ms.adapters.peft_format import write_adapter

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", base_model_name_or_path=str(base))
    modules = modules_of_config(open_checkpoint(base).config)
    made, random = match(config, modules), np.random.default_rng(seed)
    values = {(path, "lora"): {
        "down": random.standard_normal((4, modules[path].in_features), np.float32) * np.float32(size),
        "up": random.standard_normal((modules[path].out_features, 4), np.float32)} for path in made.targets}
    write_adapter(folder, config, made, modules, values)
