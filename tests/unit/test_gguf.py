"""Reading of GGUF files: equal to the model they were made of, whatever is damaged is refused."""

import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.errors import CheckpointError, ColoraError, ConfigError
from colora_ms.models.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_files import write_gguf  # noqa: E402


def reject(path, *parts, error=CheckpointError):
    with pytest.raises(error) as caught:
        open_checkpoint(str(path))
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["llama_linear", "llama_yarn", "qwen2", "qwen3"])
def test_gguf_equals_the_model_it_was_made_of(name, tmp_path):
    path = tmp_path / "m.gguf"
    source = write_gguf(path, name)
    opened = open_checkpoint(str(path))
    assert opened.format == "gguf" and opened.tokenizer_source is None
    assert opened.config.to_hf() == dict(source.config.to_hf(), torch_dtype="float32")
    assert list(opened.tensors) == list(source.tensors)
    for key, value in source.tensors.items():
        np.testing.assert_array_equal(opened.tensors[key], value, err_msg=key)
    assert open_checkpoint(str(tmp_path)).path == str(path)  # a folder with one GGUF


def llama3_factors(theta, dim, factor):
    """The frequency factors that llama.cpp's converter writes for Llama 3.1, one by one."""
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * theta ** (i / dim)
        if wave < 8192 / 4:
            factors.append(1.0)
        elif wave > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_gguf_with_llama3_frequency_factors(tmp_path):
    path = tmp_path / "m.gguf"
    good = llama3_factors(500000.0, 8, 32.0)
    write_gguf(path, "llama", lambda tensors: tensors.update({"rope_freqs.weight": good}))
    assert open_checkpoint(str(path)).config.rope_scaling == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
    write_gguf(path, "llama", lambda tensors: tensors.update(
        {"rope_freqs.weight": np.array([1, 3, 5, 7], np.float32)}))
    reject(path, "rope_freqs.weight", error=ConfigError)


def test_gguf_head_that_repeats_the_embedding(tmp_path):
    """Two quantizations of one matrix: the model is tied and the finer copy serves both."""
    path, kept = tmp_path / "m.gguf", {}

    def change(tensors):
        embed = tensors["token_embd.weight"]
        kept["fine"] = tensors["output.weight"] = embed
    write_gguf(path, "qwen2", change, {"token_embd.weight": gguf.GGMLQuantizationType.Q4_0})
    opened = open_checkpoint(str(path))
    assert opened.config.tie_word_embeddings and "lm_head.weight" not in opened.tensors
    np.testing.assert_array_equal(opened.tensors["model.embed_tokens.weight"], kept["fine"])
    # qwen3's head is a matrix of its own
    write_gguf(path, "qwen3")
    assert not open_checkpoint(str(path)).config.tie_word_embeddings


@pytest.mark.parametrize("kind, bound", [("Q8_0", 0.01), ("Q5_0", 0.1), ("Q4_1", 0.15)])
def test_gguf_blocks_are_dequantized(kind, bound, tmp_path):
    path = tmp_path / "m.gguf"

    def widen(tensors):  # 48 columns are no whole blocks of 32
        for key in [key for key in tensors if "ffn_" in key]:
            if tensors[key].ndim == 2:
                tensors[key] = tensors[key].astype(np.float16)
    source = write_gguf(path, "qwen3", widen)
    embed = source.tensors["model.embed_tokens.weight"]
    number = gguf.GGMLQuantizationType[kind]

    def quantized(tensors):
        widen(tensors)
        tensors["token_embd.weight"] = gguf.quants.dequantize(
            gguf.quants.quantize(embed, number), number)
    write_gguf(path, "qwen3", quantized)
    got = open_checkpoint(str(path)).tensors["model.embed_tokens.weight"]
    error = np.sqrt(np.mean((got - embed) ** 2) / np.mean(embed ** 2))
    assert 0 < error < bound


def test_gguf_settings_that_are_not_implemented(tmp_path):
    path = tmp_path / "m.gguf"
    for key, value in (("qwen3.rope.dimension_count", 4), ("qwen3.expert_count", 8),
                       ("qwen3.attention.sliding_window", 16)):
        write_gguf(path, "qwen3", extra=[(key, value)])
        reject(path, key, error=ConfigError)
    write_gguf(path, "qwen3", extra=[("qwen3.rope.scaling.attn_factor", 2)])
    reject(path, "attn_factor", error=ConfigError)
    write_gguf(path, "qwen3", lambda tensors: tensors.update(
        {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}))
    reject(path, "blk.0.ffn_gate_exps.weight is unexpected")
    write_gguf(path, "qwen3", lambda tensors: tensors.pop("blk.1.attn_v.weight"))
    reject(path, "model.layers.1.self_attn.v_proj.weight is missing")
    write_gguf(path, "qwen3", lambda tensors: tensors.pop("token_embd.weight"))
    reject(path, "token_embd.weight")


def test_gguf_of_another_architecture(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen3")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0qwen3", b"\x05\0\0\0\0\0\0\0bloom", 1))
    reject(path, "'bloom'", "supported: llama", error=ConfigError)


def test_every_truncation_of_a_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "qwen3")
    whole = path.read_bytes()
    for size in [*range(0, 2800, 37), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:size])
        reject(path, "m.gguf")


GGUF_HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
KEY = struct.pack("<Q", 1) + b"k"
HOSTILE_GGUF = {
    "wrong magic": b"GGML" + b"\0" * 60, "version 1": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
    "many values": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
    "long key": GGUF_HEADER + struct.pack("<Q", 1 << 62) + b"k" * 20,
    "long string": GGUF_HEADER + KEY + struct.pack("<IQ", 8, 1 << 40) + b"x" * 20,
    "long array": GGUF_HEADER + KEY + struct.pack("<IIQ", 9, 4, 1 << 61) + b"x" * 20,
    "long array of strings": GGUF_HEADER + KEY + struct.pack("<IIQ", 9, 8, 1 << 58) + b"x" * 20,
    "nested arrays": GGUF_HEADER + KEY + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 20,
    "unknown type": GGUF_HEADER + KEY + struct.pack("<I", 77) + b"\0" * 20,
    "no tensors": GGUF_HEADER + KEY + struct.pack("<II", 4, 1) + b"\0" * 20,
    "alignment of zero": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 17)
                         + b"general.alignment" + struct.pack("<II", 4, 0) + b"\0" * 64,
}


@pytest.mark.parametrize("name", sorted(HOSTILE_GGUF))
def test_hostile_gguf(name, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE_GGUF[name])
    assert len(reject(path, "m.gguf")) < 600


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2600), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_gguf_headers_never_do_worse_than_an_error(tmp_path, changes):
    source = tmp_path / "source.gguf"
    if not source.exists():
        write_gguf(source, "llama_yarn")
    data = bytearray(source.read_bytes())
    for position, value in changes:
        data[position] = value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data)
    try:
        opened = open_checkpoint(str(path))
        for name in opened.tensors:
            assert opened.tensors[name].shape == opened.tensors.shapes[name]
    except ColoraError:
        pass
