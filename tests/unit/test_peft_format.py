"""PEFT's directory format: logits equal to peft on torch, round trips, and strict loading."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from colora_ms.adapters import (
    LoraConfig,
    adapter_path,
    adapters_of,
    check_name,
    digest,
    inject,
    load_adapter,
    load_adapters,
)
from colora_ms.adapters.store import CONFIG_FILE, WEIGHTS_FILE
from colora_ms.errors import AdapterError

GOLDENS = {"qv_r8": "llama", "all_rslora": "llama", "save_lm_head": "llama", "bias_lora_only": "llama_bias"}
TOLERANCE = 2e-4


def build(goldens, base):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / base)
    return Decoder(checkpoint.config, checkpoint.tensors)


def logits(net, ids, slots):
    from mindspore import Tensor

    ids = np.asarray(ids, np.int32)
    return net(Tensor(ids), Tensor(np.full(ids.shape[0], ids.shape[1], np.int32)), slots).asnumpy()


@pytest.fixture(params=GOLDENS)
def golden(request, mindspore, goldens):
    return request.param, build(goldens, GOLDENS[request.param]), goldens / "peft" / request.param


def test_logits_equal_pefts(golden):
    _, net, folder = golden
    stored = np.load(folder / "logits.npz")
    adapters = load_adapter(net, folder)
    ours = logits(net, stored["ids"], adapters.slots(len(stored["ids"])))
    assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE
    assert (ours.argmax(-1) == stored["argmax"]).all()


def test_saved_again_it_is_the_same(golden, tmp_path):
    name, net, folder = golden
    load_adapter(net, folder).save(tmp_path / "again")
    before, after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert digest(folder) == digest(tmp_path / "again")


def test_smollm2_adapters_equal_pefts(smollm2, goldens, tmp_path):
    """Two adapters on the real model, in one batch with the base model."""
    import rules

    net, _ = smollm2
    stored = np.load(goldens / "smollm2.npz")
    names = list(rules.SMOLLM2_ADAPTERS)
    handle = inject(net, slots=2, max_rank=8, reserve="all-linear")
    for name, values in rules.SMOLLM2_ADAPTERS.items():
        handle.add_adapter("draft", LoraConfig(**values))
        handle.save(tmp_path / name, "draft")
        handle.delete_adapter("draft")
        tensors = {key: rules.adapter_tensor(key, value.shape)
                   for key, value in load_file(tmp_path / name / WEIGHTS_FILE).items()}
        save_file(tensors, tmp_path / name / WEIGHTS_FILE)
        handle.load(tmp_path / name, name)
    ours = logits(net, np.repeat(stored["ids0"][None], 3, 0), handle.slots(3, names + ["__base__"]))
    handle.unload()
    for row, key in zip(ours, [f"{name}.logits" for name in names] + ["logits0"]):
        assert np.abs(row[stored["positions0"]][:, stored["columns"]] - stored[key]).max() < TOLERANCE
    assert adapters_of(net) is None


@pytest.fixture(scope="module")
def tiny(mindspore, goldens):
    """A tiny Llama with an empty bank of three slots, shared by the tests of refusals."""
    net = build(goldens, "llama")
    return inject(net, slots=3, max_rank=8, reserve=LoraConfig(target_modules="all-linear", modules_to_save=["norm"]),
                  base_model="tiny/llama")


@pytest.fixture
def folder(goldens, tmp_path):
    """A copy of a golden adapter, to be spoiled."""
    shutil.copytree(goldens / "peft" / "qv_r8", tmp_path / "adapter")
    return tmp_path / "adapter"


def spoil_config(folder, **changes):
    values = json.loads((folder / CONFIG_FILE).read_text())
    values.update(changes)
    (folder / CONFIG_FILE).write_text(json.dumps(values))


def spoil_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def refused(handle, folder, words):
    """Loading must fail with these words and leave the handle as it was."""
    before = handle.names, handle.active
    with pytest.raises(AdapterError, match=words):
        handle.load(folder, "new")
    assert (handle.names, handle.active) == before


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_missing_tensor(tiny, folder):
    spoil_tensors(folder, lambda tensors: tensors.pop(KEY))
    refused(tiny, folder, r"1 problem:\n  - tensor 'base_model.*q_proj.lora_A.weight' of shape \(8, \d+\) is missing")


def test_unexpected_tensor(tiny, folder):
    spoil_tensors(folder, lambda tensors: tensors.update({KEY + ".extra": np.zeros((1, 1), np.float32)}))
    refused(tiny, folder, "extra' of shape .* is not part of the adapter")


def test_renamed_adapter_is_refused(tiny, folder):
    """peft takes such a file with a warning and answers like the base model."""
    def rename(tensors):
        for key in list(tensors):
            tensors[key.replace("base_model.model.", "other.")] = tensors.pop(key)
    spoil_tensors(folder, rename)
    refused(tiny, folder, "16 problems(.|\n)*missing(.|\n)*not part of the adapter")


def test_misshaped_and_not_finite_come_together_with_the_setting(tiny, folder):
    def change(tensors):
        tensors[KEY] = np.ones((8, 3), np.float32)
        other = KEY.replace("q_proj", "v_proj")
        tensors[other] = tensors[other].copy()
        tensors[other][0, 0] = np.nan
    spoil_tensors(folder, change)
    spoil_config(folder, use_qalora=True)
    with pytest.raises(AdapterError) as error:
        tiny.load(folder, "new")
    text = str(error.value)
    assert "3 problems" in text and "use_qalora" in text and "(8, 3)" in text and "1 value that is not finite" in text


def test_another_base_model_is_hinted_at(tiny, folder):
    spoil_config(folder, base_model_name_or_path="someone/else-7b", r=4)
    refused(tiny, folder, "another base model: it names 'someone/else-7b', this is 'tiny/llama'")


def test_half_an_adapter_of_doubled_rank(tiny, folder):
    spoil_config(folder, r=16)
    refused(tiny, folder, r"\(8, \d+\), the config and the model ask for \(16, \d+\)")


def test_integer_tensor(tiny, folder):
    spoil_tensors(folder, lambda tensors: tensors.update({KEY: tensors[KEY].astype(np.int32)}))
    refused(tiny, folder, "dtype I32")


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types_are_read(tiny, folder, dtype):
    spoil_tensors(folder, lambda tensors: tensors.update({key: v.astype(dtype) for key, v in tensors.items()}))
    tiny.load(folder, f"as-{dtype}")
    tiny.delete_adapter(f"as-{dtype}")


def test_pickle_is_refused(tiny, folder):
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    refused(tiny, folder, "pickle")


def test_no_weights_no_folder_no_config(tiny, folder):
    (folder / WEIGHTS_FILE).unlink()
    refused(tiny, folder, "has no adapter_model.safetensors")
    (folder / CONFIG_FILE).unlink()
    refused(tiny, folder, "cannot be read")
    refused(tiny, folder / "none", "there is no adapter folder")


def test_pipe_in_place_of_a_file(tiny, folder):
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)
    refused(tiny, folder, "not a regular file")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000, "\udcff", '{"peft_type": "LORA", "r": 1e999}'])
def test_config_that_is_no_config(tiny, folder, text):
    (folder / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AdapterError):
        tiny.load(folder, "new")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), header=st.none() | st.integers(0, 2**64 - 1), flip=st.none() | st.integers(8, 900))
def test_damaged_safetensors_never_crash(tiny, goldens, tmp_path, cut, header, flip):
    source = goldens / "peft" / "qv_r8"
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    if header is not None:
        data[:8] = struct.pack("<Q", header)
    if flip is not None:
        data[flip] ^= 0x15
    if cut:
        data = data[:-cut]
    (folder / WEIGHTS_FILE).write_bytes(data)
    if bytes(data) == (source / WEIGHTS_FILE).read_bytes():
        return
    try:
        tiny.load(folder, "new")
    except AdapterError:
        assert tiny.names == ()
    else:  # a bit of a weight was flipped
        tiny.delete_adapter("new")


def test_copies_of_the_base_are_taken_if_equal(goldens, mindspore, folder):
    """peft stores embedding and head beside an adapter in some cases."""
    net = build(goldens, "llama")
    own = net.model.embed_tokens.weight.asnumpy()
    spoil_tensors(folder, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": own}))
    load_adapter(net, folder, "fine").unload()
    changed = own.copy()
    changed[3] += 1
    spoil_tensors(folder, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": changed}))
    with pytest.raises(AdapterError, match="differs from it"):
        load_adapter(net, folder, "changed")
    longer = np.concatenate([own, own[:2]])
    spoil_tensors(folder, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.weight": longer}))
    with pytest.raises(AdapterError, match="vocabulary was changed"):
        load_adapter(net, folder, "longer")
    assert adapters_of(net) is None


def test_old_place_of_biases(goldens, mindspore, tmp_path):
    """Old versions of peft wrote the bias of an adapted linear without "base_layer"."""
    shutil.copytree(goldens / "peft" / "bias_lora_only", tmp_path / "old")

    def rename(tensors):
        for key in [key for key in tensors if key.endswith(".base_layer.bias")]:
            tensors[key.replace(".base_layer", "")] = tensors.pop(key)
    spoil_tensors(tmp_path / "old", rename)
    net = build(goldens, "llama_bias")
    adapters = load_adapter(net, tmp_path / "old")
    stored = np.load(tmp_path / "old" / "logits.npz")
    ours = logits(net, stored["ids"], adapters.slots(len(stored["ids"])))
    assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < TOLERANCE


# -- names and folders ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "../x", "x" * 65, "ä", "a\n", None, 3, "a\0"])
def test_bad_names(name):
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "...", "A.b_c-9", "x" * 64])
def test_good_names(name):
    assert check_name(name) == name


def test_links_that_lead_outside(tmp_path, goldens):
    root = tmp_path / "root"
    root.mkdir()
    (root / "away").symlink_to(goldens / "peft" / "qv_r8")
    with pytest.raises(AdapterError, match="lies outside"):
        adapter_path(root, "away")
    (root / "half").mkdir()
    (root / "half" / WEIGHTS_FILE).symlink_to(goldens / "peft" / "qv_r8" / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="lies outside"):
        adapter_path(root, "half")
    (root / "real").mkdir()
    (root / "near").symlink_to(root / "real")
    assert adapter_path(root, "near") == root / "near"


def test_saving_replaces_the_adapter_and_keeps_other_files(tiny, folder, tmp_path):
    tiny.load(folder, "kept")
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "deep.txt").write_text("too")
    spoil_config(folder, r=1)
    tiny.save(folder, "kept")
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "more" / "deep.txt").read_text() == "too"
    assert json.loads((folder / CONFIG_FILE).read_text())["r"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "temporary folders stay behind"
    tiny.delete_adapter("kept")


def test_failed_saving_leaves_what_was_there(tiny, folder, tmp_path, monkeypatch):
    tiny.load(folder, "kept")
    before = (folder / WEIGHTS_FILE).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="No space left"):
        tiny.save(folder, "kept")
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="is a file"):
        tiny.save(tmp_path / "file", "kept")
    tiny.delete_adapter("kept")


def test_values_that_are_not_finite_are_not_written(tiny, folder, tmp_path):
    tiny.load(folder, "kept")
    cell = tiny.sites["model.layers.0.self_attn.q_proj", "lora"]
    values = cell.read(tiny.slot("kept"), {"down": (8, cell.in_features), "up": (cell.out_features, 8)})
    values["up"][0, 0] = np.inf
    cell.write(tiny.slot("kept"), values, 1.0)
    with pytest.raises(AdapterError, match="not finite.*diverged"):
        tiny.save(tmp_path / "bad", "kept")
    assert not (tmp_path / "bad").exists()
    tiny.delete_adapter("kept")


def test_digest_is_of_the_content(folder, tmp_path):
    first = digest(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS_FILE, metadata={"a": "b"})
    spoil_config(folder, peft_version="x", base_model_name_or_path="y")
    assert digest(folder) == first
    spoil_config(folder, lora_alpha=17)
    assert digest(folder) != first


def test_all_linear_is_written_as_a_list(mindspore, goldens, tmp_path):
    net = build(goldens, "llama")
    inject(net, LoraConfig(r=2, target_modules="all-linear")).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


PEER = Path(__file__).resolve().parents[2] / ".venv-peers" / "bin" / "python"

PEER_SCRIPT = """
import sys, warnings
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
warnings.simplefilter("error")  # peft only warns about adapter keys that it does not find
warnings.filterwarnings("ignore", category=FutureWarning)
warnings.filterwarnings("ignore", category=DeprecationWarning)
for case in range(len(sys.argv) - 2):
    folder = f"{sys.argv[1]}/{case}"
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2 + case], torch_dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        ids = torch.from_numpy(np.load(folder + "/ids.npy")).long()
        np.save(folder + "/logits.npy", model(ids).logits.numpy())
"""

PEER_CASES = [
    ("llama", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "rank_pattern": {"layers.0.mlp.up_proj": 5}}),
    ("llama", {"r": 2, "lora_alpha": 3, "target_modules": ["down_proj", "q_proj"],
               "rank_pattern": {"model.layers.1.mlp.down_proj": 6, "down_proj": 4, "layers.0.*": 3},
               "alpha_pattern": {"model.layers.1.mlp.down_proj": 64, "down_proj": 8}}),
    ("llama", {"r": 2, "target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_rslora": True}),
    ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}),
    ("llama_bias", {"r": 2, "target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    ("qwen2", {"r": 2, "target_modules": ["k_proj"], "bias": "lora_only", "layers_to_transform": [1]}),
    ("llama_linear", {"r": 2, "target_modules": ["k_proj"], "trainable_token_indices": [3, 90, 7]}),
    ("llama", {"r": 2, "target_modules": ["k_proj"],
               "trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}}),
    ("llama_linear", {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"],
                      "ensure_weight_tying": True}),
]


@pytest.mark.skipif(not PEER.exists(), reason="peft on torch is not installed (scripts/setup_peers.sh)")
def test_peft_on_torch_reads_what_we_write(mindspore, goldens, tmp_path):
    expected = []
    for case, (base, values) in enumerate(PEER_CASES):
        net = build(goldens, base)
        adapters = inject(net, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM",
                                          base_model_name_or_path=str(goldens / "tiny" / base), **values), seed=5)
        random = np.random.default_rng(case)
        for parameter in adapters.trainable_params():  # biases and saved modules too must differ from the base
            noise = random.standard_normal(parameter.shape).astype(np.float32) * 0.1
            parameter.set_data(mindspore.Tensor(parameter.asnumpy() + noise))
        ids = random.integers(0, net.config.vocab_size, (1, 9)).repeat(2, 0)
        adapters.save(tmp_path / str(case))
        np.save(tmp_path / str(case) / "ids.npy", ids)
        ours = logits(net, ids, adapters.slots(2, ["default", "__base__"]))
        assert np.abs(ours[0] - ours[1]).max() > 0.05
        expected.append(ours[0])
    subprocess.run([PEER, "-c", PEER_SCRIPT, tmp_path, *(goldens / "tiny" / base for base, _ in PEER_CASES)],
                   check=True,
                   timeout=300)
    for case, ours in enumerate(expected):
        assert np.abs(ours - np.load(tmp_path / str(case) / "logits.npy")[0]).max() < TOLERANCE, PEER_CASES[case]


def test_several_folders_get_room_for_all(mindspore, goldens, tmp_path):
    net = build(goldens, "llama")
    folders = {name: goldens / "peft" / name for name in ("qv_r8", "all_rslora", "save_lm_head")}
    broken = tmp_path / "broken"
    shutil.copytree(folders["qv_r8"], broken)
    (broken / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(AdapterError):
        load_adapters(net, {**folders, "broken": broken})
    assert adapters_of(net) is None
    adapters = load_adapters(net, folders)
    assert adapters.names == tuple(folders) and adapters.active is None
    stored = {name: np.load(folder / "logits.npz") for name, folder in folders.items()}
    ids = np.concatenate([one["ids"][:1] for one in stored.values()])
    ours = logits(net, ids, adapters.slots(3, list(folders)))
    for row, one in zip(ours, stored.values()):
        assert np.abs(row[one["positions"]] - one["logits"][0]).max() < TOLERANCE
    with pytest.raises(AdapterError, match="slots is 1, but 2 adapters"):
        load_adapters(build(goldens, "llama"), {"a": folders["qv_r8"], "b": folders["all_rslora"]}, slots=1)
