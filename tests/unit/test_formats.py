"""The table of weight formats against NumPy written apart from it, stored weights, and the Cells built from them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.models.formats import (
    BFLOAT16,
    FLOAT32,
    FORMATS,
    INT4,
    INT8,
    WEIGHT_FORMATS,
    StoredFactors,
    StoredWeight,
    WeightFormat,
    format_of_code,
    is_matrix,
    stored_float,
    weight_format,
)

ROOT = Path(__file__).resolve().parents[2]
SIZES = strategies.integers(1, 9)


def matrix(out, columns, seed):
    """Normal numbers with rows of zeros, tiny and large ones among them."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((out, columns)).astype(np.float32)
    return weight * random.choice([0, 1e-20, 1, 1, 1, 3e4], (out, 1)).astype(np.float32)


def rounded(weight, group, kind):
    """(integers, scale) of a group a loop at a time, in float32."""
    out, columns = weight.shape
    q, scale = np.zeros((out, columns), int), np.zeros((out, columns // group), np.float32)
    for row in range(out):
        for number in range(columns // group):
            part = weight[row, number * group:(number + 1) * group]
            if kind == "int8":
                one = max(np.float32(np.abs(part).max() / np.float32(127)), np.float32(1e-12))
                low, high = -127, 127
            else:
                one, low, high = np.float32(part[np.argmax(np.abs(part))] / np.float32(-8)), -8, 7
                one = one if abs(one) >= np.float32(1e-12) else np.float32(1e-12)
            scale[row, number] = one
            for column, value in enumerate(part):
                q[row, number * group + column] = min(max(int(np.rint(value / one)), low), high)
    return q, scale


# -- the table --------------------------------------------------------------------------------------------------------

def test_the_kernels_number_the_formats_alike():
    text = (ROOT / "ops" / "cpu" / "weights.h").read_text(encoding="utf-8")
    names = re.sub(r"\s", "", re.search(r"enum class Format \{([^}]*)\}", text)[1]).split(",")
    assert [one.removeprefix("k").lower() for one in names] == list(WEIGHT_FORMATS)
    assert [FORMATS[name].tag for name in WEIGHT_FORMATS] == list(range(len(names)))
    layouts = re.findall(r'\{"(\w+)", "(\w+)", (\d+), (\d+), (\d+), (\d+), (\w+)\}', text)
    assert layouts == [(name, one.element, *map(str, (one.values, one.items, np.dtype(one.dtype).itemsize,
                                                      one.scaled * (2 if one.zeros else 1))),
                        "true" if one.ggml else "false") for name, one in FORMATS.items()]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@settings(max_examples=20)
@given(out=SIZES, blocks=SIZES, seed=strategies.integers(0, 99))
def test_shapes_and_bytes_are_those_of_the_arrays(name, out, blocks, seed):
    one = FORMATS[name]
    columns = max(2, one.values) * blocks
    stored = one.pack(matrix(out, columns, seed).clip(-6e4, 6e4))  # float16 holds no more
    assert stored.data.shape == one.data_shape((out, columns)) and stored.data.dtype == np.dtype(one.dtype)
    assert one.shape(stored.data.shape) == stored.shape == (out, columns)
    groups = 1 if stored.scale is None or stored.scale.ndim == 1 else stored.scale.shape[1]
    assert stored.nbytes == out * one.row_bytes(columns, groups)
    assert one.bits == 8 * stored.data.nbytes // (out * columns)
    assert stored.values().shape == (out, columns) and stored.values().dtype == np.float32


@settings(max_examples=40)
@given(out=SIZES, columns=SIZES, seed=strategies.integers(0, 99))
def test_floats_come_back(out, columns, seed):
    weight = matrix(out, columns, seed)
    assert np.array_equal(FLOAT32.pack(weight).values(), weight)
    bits = BFLOAT16.pack(weight).data.astype(np.uint32)
    below = (weight.view(np.uint32) >> 16).astype(np.uint32)
    for value, got, floor in zip(weight.reshape(-1), bits.reshape(-1), below.reshape(-1)):
        near = {int(candidate): abs(float(np.uint32(candidate << 16).view(np.float32)) - float(value))
                for candidate in (floor, floor + 1)}
        assert near[int(got)] == min(near.values())
        if near[int(floor)] == near[int(floor) + 1]:
            assert got % 2 == 0
    assert np.array_equal(BFLOAT16.pack(weight).values().view(np.uint32), bits << 16)
    vector = weight[0]
    assert np.array_equal(FLOAT32.pack(vector).values(), vector) and BFLOAT16.pack(vector).shape == vector.shape


@pytest.mark.parametrize("kind", ["int8", "int4"])
@settings(max_examples=60)
@given(out=SIZES, groups=SIZES, size=SIZES, seed=strategies.integers(0, 99))
def test_integers_against_a_loop(kind, out, groups, size, seed):
    size = 2 * size if kind == "int4" and size * groups % 2 else size
    weight = matrix(out, groups * size, seed)
    stored = FORMATS[kind].pack(weight, size)
    q, scale = rounded(weight, size, kind)
    assert stored.scale.tolist() == scale.tolist() and stored.group == size
    assert stored.integers().tolist() == q.tolist()
    values = np.array([[np.float32(q[row, column]) * scale[row, column // size] for column in range(weight.shape[1])]
                       for row in range(out)], np.float32)
    assert np.array_equal(stored.values(), values)
    if kind == "int4":
        for row, column in np.ndindex(out, weight.shape[1]):
            byte = int(stored.data[row, column // 2])
            assert (byte >> 4 if column % 2 else byte & 15) - 8 == q[row, column]
    again = FORMATS[kind].of_integers(stored.integers(), scale)
    assert again.data.dtype == stored.data.dtype and np.array_equal(again.data, stored.data)


@pytest.mark.parametrize("kind, columns, group, shape", [
    ("int8", 7, None, (3,)), ("int8", 64, None, (3,)), ("int4", 64, 32, (3, 2)), ("int4", 48, 48, (3, 1)),
    ("int4", 6, 6, (3, 1))])
def test_the_groups_that_a_format_takes_by_itself(kind, columns, group, shape):
    weight = matrix(3, columns, 4)
    stored = FORMATS[kind].pack(weight)
    q, scale = rounded(weight, group or columns, kind)
    assert stored.scale.shape == shape and stored.scale.reshape(3, -1).tolist() == scale.tolist()
    assert stored.integers().tolist() == q.tolist() and stored.group == group


@pytest.mark.parametrize("call, words", [
    (lambda: INT4.pack(np.zeros((2, 3), np.float32)), r"int4 packs 2 columns into 1.*\(2, 3\)"),
    (lambda: INT8.pack(np.zeros(3, np.float32)), r"int8 stores matrices.*\(3,\)"),
    (lambda: INT4.pack(np.zeros((2, 8), np.float32), 3), "group 3 does not divide the 8 inputs"),
    (lambda: weight_format("int5"), "int5.*auto, float32, bfloat16, int8, int4"),
    (lambda: format_of_code("F64"), "F64.*U8 .int4."),
    (lambda: FORMATS["q4_k"].pack(np.zeros((2, 128), np.float32)), r"q4_k packs 256 columns into 144.*\(2, 128\)"),
    (lambda: FORMATS["float16"].pack(np.full((1, 2), 7e4, np.float32)), "65504.*70000"),
    (lambda: FORMATS["q4_1"].pack(np.full((1, 32), -7e4, np.float32)), "q4_1.*65504.*70000")])
def test_what_cannot_be_stored_is_refused(call, words):
    with pytest.raises((ConfigError, CheckpointError), match=words):
        call()


def test_the_table_is_read_without_mindspore():
    code = "import sys, colora_ms.models.formats; assert 'mindspore' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_other_file_tells_a_format_from_a_dtype():
    """Outside the kernels, nothing asks whether a dtype is uint8 or int8, or packs nibbles by itself."""
    told = re.compile(r"dtype (?:==|in|!=) *\(?(?:ms|np|mindspore)\.u?int8|>> 4\) - 8|(?:join|pack)_int4\(")
    for path in (ROOT / "colora_ms").rglob("*.py"):
        if "kernels" in path.parts or path.name in ("formats.py", "packing.py"):
            continue
        assert not told.search(path.read_text(encoding="utf-8")), path


# -- stored weights ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, group", [("int8", 4), ("int4", 4), *((name, None) for name in WEIGHT_FORMATS)])
def test_more_rows_are_packed_like_those_before(kind, group):
    columns = max(8, FORMATS[kind].values)
    weight, rows = (matrix(count, columns, count).clip(-6e4, 6e4) for count in (5, 2))
    one = FORMATS[kind].pack(weight, group)
    more, apart = one.and_rows(rows), FORMATS[kind].pack(rows, group)
    assert more.shape == (7, columns) and np.array_equal(more.values(), np.concatenate([one.values(), apart.values()]))
    assert one.scale is None or more.scale.ndim == one.scale.ndim


@pytest.mark.parametrize("kind", WEIGHT_FORMATS)
def test_a_cells_tensors_and_back(mindspore, kind):
    stored = FORMATS[kind].pack(matrix(5, max(8, FORMATS[kind].values), 3).clip(-6e4, 6e4))
    tensor, scale = stored.tensors()
    assert str(tensor.dtype).lower() == FORMATS[kind].element
    FORMATS[kind].check(tensor, scale)
    back = FORMATS[kind].stored(tensor, scale)
    assert np.array_equal(back.data, stored.data) and np.array_equal(back.values(), stored.values())
    own = FORMATS[kind]
    for other in FORMATS.values():
        if (other.element, other.scaled, other.zeros) != (own.element, own.scaled, own.zeros) \
                or stored.data.shape[1] % other.items:
            with pytest.raises(ConfigError, match=f"none of the format {other.name}"):
                other.check(tensor, scale)


def test_bfloat16_is_rounded_as_mindspore_rounds(mindspore):
    random = np.random.default_rng(0)
    weight = random.integers(0, 2 ** 32, (200, 501), np.uint32).view(np.float32)
    weight[0, :4] = np.inf, -np.inf, 3.4e38, 1e-45
    theirs = mindspore.Tensor(weight).astype(mindspore.bfloat16).asnumpy().view(np.uint16)
    ours, nan = BFLOAT16.pack(weight).data, np.isnan(weight)
    assert np.array_equal(ours[~nan], theirs[~nan]) and np.isnan(BFLOAT16.pack(weight).values()[nan]).all()


def test_integers_are_not_rounded_again_and_floats_are_packed():
    weight = matrix(3, 8, 5)
    integers = INT8.pack(weight)
    assert integers.as_format(INT4) is integers and integers.as_format(FLOAT32) is integers
    assert BFLOAT16.pack(weight).as_format(INT4).format is INT4
    plain = stored_float(weight)
    assert plain.as_format(FLOAT32) is plain and plain.values() is weight
    for one in FORMATS.values():
        packed = one.pack(matrix(2, max(8, one.values), 6).clip(-6e4, 6e4))
        assert packed.as_format(None) is packed
        other = packed.as_format(FLOAT32)
        assert other is packed if one in (INT8, INT4) else np.array_equal(other.values(), packed.values())


def test_factors_are_their_product():
    random = np.random.default_rng(1)
    outer, core, inner = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (2, 2), (2, 7)))
    three = StoredFactors(stored_float(inner), stored_float(outer), stored_float(core))
    two = StoredFactors(stored_float(inner), stored_float(outer))
    assert three.shape == two.shape == (5, 7)
    assert np.allclose(three.values(), outer @ core @ inner, atol=1e-5) and np.array_equal(two.values(), outer @ inner)


# -- decoders ---------------------------------------------------------------------------------------------------------

def blocks_with_scales():
    """A format that the kernels do not know: blocks of 16 values, a float16 scale in front of their integers."""
    def encode(weight, group):
        blocks = weight.reshape(len(weight), -1, 16)
        scale = (np.abs(blocks).max(2, keepdims=True) / 127).astype("<f2")
        q = np.rint(blocks / np.maximum(scale.astype(np.float32), 1e-6)).clip(-127, 127).astype(np.int8)
        return np.concatenate([scale.view(np.uint8), q.view(np.uint8)], 2).reshape(len(weight), -1), None

    def decode(data, scale):
        blocks = data.reshape(len(data), -1, 18)
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
        return (np.ascontiguousarray(blocks[..., 2:]).view(np.int8) * scales).reshape(len(data), -1).astype(np.float32)

    return WeightFormat("blocks", "|u1", "uint8", None, None, encode, decode, values=16, items=18)


def with_offsets():
    """Another one: bytes with a factor and an offset a row."""
    def decode(data, scale):
        return data.astype(np.float32) * scale[:, :1] + scale[:, 1:]

    return WeightFormat("offsets", "|u1", "uint8", None, None, None, decode, scaled=True)


def test_a_format_without_a_kernel_is_one_record(tiny_decoder):
    """What is stored in it is unpacked and packed into the format that is asked for."""
    from colora_ms.models.decoder import Decoder

    config = tiny_decoder().config
    random = np.random.default_rng(3)
    values = {name: random.standard_normal(shape).astype(np.float32)
              for name, shape in config.parameter_shapes().items()}
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    blocks = blocks_with_scales()
    assert blocks.row_bytes(32) == 36 and not blocks.is_float and blocks.bits == 9
    out, columns = values[up].shape
    zeros = StoredWeight(with_offsets(), (out, columns), random.integers(0, 256, (out, columns)).astype(np.uint8),
                         np.tile(np.array([0.5, -64], np.float32), (out, 1)))
    net = Decoder(config, {**values, gate: blocks.pack(values[gate]), up: zeros}, "int8")
    mlp = net.model.layers[0].mlp
    assert np.abs(blocks.pack(values[gate]).values() - values[gate]).max() < 0.02
    assert mlp.gate_proj.format is mlp.up_proj.format is INT8
    for cell, stored in ((mlp.gate_proj, blocks.pack(values[gate])), (mlp.up_proj, zeros)):
        assert np.array_equal(cell.weight.asnumpy(), INT8.pack(stored.values()).data)
    with pytest.raises(CheckpointError, match=f"{gate}.*stored as blocks.*weight_format=.float32"):
        Decoder(config, {**values, gate: blocks.pack(values[gate]), up: zeros})


@pytest.mark.parametrize("wanted", ["auto", *(name for name in WEIGHT_FORMATS if FORMATS[name].values <= 2)])
def test_the_builder_picks_cell_and_format(tiny_decoder, wanted):
    from colora_ms.models.activation_quant import ActivationQuantizedLinear
    from colora_ms.models.decoder import Decoder
    from colora_ms.models.low_rank import LowRankLinear

    net = tiny_decoder(model_type="qwen2", attention_bias=True, tie_word_embeddings=True)
    shapes = net.config.parameter_shapes()
    random = np.random.default_rng(4)
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    base = "model.layers.1"
    kept = INT4.pack(values[f"{base}.mlp.up_proj.weight"], 8)
    rounding = StoredWeight(INT8, (32, 48), *(lambda s: (s.data, s.scale))(
        INT8.pack(values[f"{base}.mlp.down_proj.weight"])), activations=(8, 0))
    factors = StoredFactors(stored_float(random.standard_normal((3, 32))),
                            stored_float(random.standard_normal((32, 3))))
    special = {f"{base}.mlp.up_proj.weight": kept, f"{base}.mlp.down_proj.weight": rounding,
               f"{base}.self_attn.q_proj.weight": factors}
    net = Decoder(net.config, {**values, **special}, wanted)
    layer = net.model.layers[1]
    up, down, q = layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.q_proj
    assert up.format is INT4 and np.array_equal(up.weight.asnumpy(), kept.data) and up.weight_scale.shape == (48, 4)
    assert isinstance(down, ActivationQuantizedLinear) and down.linear.format is INT8 and down.quantize_input.bits == 8
    assert isinstance(q, LowRankLinear) and q.has_bias
    assert q.format is (FLOAT32 if wanted in ("auto", "float32") else BFLOAT16)
    embed = net.model.embed_tokens
    chosen = FORMATS.get(wanted, FLOAT32)
    assert embed.format is net.lm_head.format is chosen is layer.mlp.gate_proj.format
    assert net.lm_head.weight is embed.weight and is_matrix(net.lm_head)
    assert is_matrix(up) and not is_matrix(q) and not is_matrix(down)
    names = {parameter.name for parameter in net.get_parameters()}
    expected = {f"{base}.mlp.up_proj.weight", f"{base}.mlp.up_proj.weight_scale", f"{base}.mlp.down_proj.weight",
                f"{base}.mlp.down_proj.weight_scale", f"{base}.self_attn.q_proj.inner.weight",
                f"{base}.self_attn.q_proj.outer.weight", f"{base}.self_attn.q_proj.bias", "model.norm.weight"}
    assert expected <= names and f"{base}.self_attn.q_proj.weight" not in names
    assert all(parameter.name in shapes or parameter.name.startswith("rope.") or parameter.name in expected
               or parameter.name.endswith("weight_scale") for parameter in net.get_parameters())


def test_an_embedding_of_factors_is_refused(tiny_decoder):
    from colora_ms.models.decoder import Decoder

    net = tiny_decoder()
    values = {name: np.zeros(shape, np.float32) for name, shape in net.config.parameter_shapes().items()}
    values["model.embed_tokens.weight"] = StoredFactors(stored_float(np.zeros((2, 32))),
                                                        stored_float(np.zeros((97, 2))))
    with pytest.raises(CheckpointError, match="embed_tokens is stored as factors"):
        Decoder(net.config, values)


def test_a_bfloat16_folder_hands_out_its_bits(goldens, tmp_path):
    from colora_ms.models.checkpoint import open_checkpoint, write_hf_folder

    source = open_checkpoint(goldens / "tiny" / "llama")
    write_hf_folder(tmp_path / "m", source.config, source.tensors, dtype="bfloat16")
    found = open_checkpoint(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    assert found.stored[name].format is BFLOAT16 and found.stored[name].shape == source.stored[name].shape
    assert np.array_equal(found.stored[name].data, BFLOAT16.pack(source.tensors[name]).data)
    assert np.array_equal(found.tensors[name], BFLOAT16.pack(source.tensors[name]).values())
    assert source.stored[name].format is FLOAT32 and not source.stored[name].data.flags.owndata


PEAK = """
import json, resource, sys
from colora_ms.models import build_decoder
from colora_ms.models.checkpoint import open_checkpoint
import mindspore

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

checkpoint = open_checkpoint(sys.argv[1])
build_decoder(open_checkpoint(sys.argv[2]))
before = peak()
net = build_decoder(checkpoint)
held = sum(p.asnumpy().nbytes for p in net.get_parameters())
print(json.dumps({"grown": peak() - before, "held": held, "formats": sorted({c.format.name for _, c in
      net.cells_and_names() if getattr(c, "format", None)})}))
"""


def test_an_integer_folder_is_loaded_without_a_float_copy(tiny_decoder, tmp_path):
    """The peak grows by what the model holds and the mapped file's pages, not by its weights in float32."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.quantization import write_quantized_folder

    sizes = dict(model_type="llama", vocab_size=97, num_attention_heads=4, num_key_value_heads=4,
                 max_position_embeddings=64, num_hidden_layers=6)
    for name, hidden, inner in (("small", 64, 64), ("large", 1024, 4096)):
        config = DecoderConfig(hidden_size=hidden, intermediate_size=inner, head_dim=hidden // 4, **sizes)
        random = np.random.default_rng(0)
        modules = {key.removesuffix(".weight"): shape for key, shape in config.parameter_shapes().items()
                   if key.endswith("_proj.weight")}
        quantized = {path: INT4.of_integers(random.integers(-8, 8, shape, np.int8), np.ones((shape[0], 1), np.float32))
                     for path, shape in modules.items()}
        tensors = {key: np.zeros(shape, np.float32) for key, shape in config.parameter_shapes().items()
                   if key.removesuffix(".weight") not in modules}
        write_quantized_folder(tmp_path / name, config, tensors, quantized, {"bits": 4})
    floats = 4 * sum(math.prod(shape) for shape in modules.values())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small")], check=True,
                          capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["formats"] == ["float32", "int4"]
    assert found["grown"] < 2 * found["held"] < floats / 2
