"""GPTQ, AWQ and compressed-tensors: layouts against vectors and loops written apart from the reader; folders."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from colora_ms.errors import CheckpointError
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.formats import FLOAT32, INT4_ZERO, INT4_ZERO_ORDERED, INT8_ZERO, INT8_ZERO_ORDERED
from colora_ms.models.hf_folder import PACKED_METHODS
from colora_ms.models.packed_folder import METHODS
from colora_ms.models.packed_layouts import awq, compressed, gptq
from colora_ms.models.repack import repacked

TINY = Path(__file__).resolve().parents[1] / "goldens" / "tiny" / "llama"
ZEROS = [3, 8, 15, 1, 7, 9, 2, 12]


def words(text):
    return np.array([int(one, 16) for one in text.split()], np.uint32).view(np.int32)


def half(groups=1, value=0.5):
    return np.full((groups, 8), value, np.float32)


# -- layouts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("zeros, version_1", [("c2971f83", False), ("b1860e72", True)])
def test_vector_of_gptq(zeros, version_1):
    qweight = words("76543210 98765432 ba987654 dcba9876 fedcba98 10fedcba 3210fedc 543210fe")[None]
    stored = gptq(qweight, words(zeros)[None], half(), 4, version_1, np.zeros(8, int)).stored()
    w = stored.values().T
    assert stored.format is INT4_ZERO and stored.scale.shape == (8, 1, 2)
    assert w[0].tolist() == [-1.5, -3, -5.5, 2.5, .5, .5, 5, 1] and w[7].tolist() == [2, .5, -2, 6, 4, -4, .5, -3.5]
    assert (np.arange(1, 65) * w.reshape(-1)).sum() == 476


def test_vector_of_activation_order():
    qweight = words("76543210 98765432 ba987654 dcba9876 fedcba98 10fedcba 3210fedc 543210fe")[None]
    zeros = np.stack([words("c2971f83"), words("88888888")])
    found = gptq(qweight, zeros, np.concatenate([half(), half(1, 0.25)]), 4, False, np.array([1, 0, 0, 1, 0, 1, 1, 0]))
    w = found.stored().values().T
    assert w[:, 0].tolist() == [-2, -1, -.5, -1.25, .5, -.75, -.5, 2]
    assert w[:, 3].tolist() == [-.5, 3, 3.5, .25, 4.5, .75, 1, 6]
    stored = found.stored()
    assert stored.format is INT4_ZERO_ORDERED and stored.order.tolist() == [1, 2, 4, 7, 0, 3, 5, 6]
    assert stored.scale.shape == (8, 2, 2)
    eight = found._replace(bits=8).stored()
    assert eight.format is INT8_ZERO_ORDERED and np.array_equal(eight.values(), stored.values())
    assert np.array_equal(repacked(stored, FLOAT32).data, stored.values())  # square: an order is no rows


def test_vector_of_awq():
    qweight = words("4a06f5b1 7d3928e4 a06c5b17 d39f8e4a")[:, None]
    w = awq(qweight, words("c91827f3")[None], half(), np.zeros(4, int)).stored().values().T
    assert w[0].tolist() == [-1, -1, -2, -.5, -1, .5, 6.5, -4] and w[3].tolist() == [3.5, 3.5, -5.5, 4, 3.5, -3, 3, .5]
    assert (np.arange(1, 33) * w.reshape(-1)).sum() == 214


def test_vectors_of_compressed_tensors():
    packed = np.repeat(words("3e94fa50")[None], 8, 0)
    w = compressed(packed, np.full((8, 1), .5, np.float32), words("d7af9850")[None], np.zeros(8, int),
                   4).stored().values()
    assert w[0].tolist() == [0, 2.5, 5, 7.5, 2, 4.5, 7, 1.5] and w[1].tolist() == [-2.5, 0, 2.5, 5, -.5, 2, 4.5, -1]
    eight = compressed(words("ff807f00")[None], np.ones((1, 1), np.float32), None, np.zeros(4, int), 8).stored()
    assert eight.format is INT8_ZERO and eight.values().tolist() == [[-128, -1, 0, 127]]


# -- folders ----------------------------------------------------------------------------------------------------------

def pack(fields, bits):
    """Integers (rows, n) -> int32 words (rows, n * bits / 32), one field after another, the lowest bits first."""
    per_word = 32 // bits
    found = np.zeros((len(fields), fields.shape[1] // per_word), np.uint64)
    for at, value in np.ndenumerate(fields):
        found[at[0], at[1] // per_word] |= np.uint64(int(value) << bits * (at[1] % per_word))
    return found.astype(np.uint32).view(np.int32)


def make(method, shape, rng, bits=4, group=16, minus_one=0, order=None, symmetric=False, inner="pack"):
    """-> ({suffix: array}, values (out, in) float32)."""
    out, columns = shape
    groups, most = columns // group, 2 ** bits
    q = rng.integers(0, most, (out, columns))
    zero = np.full((out, groups), most // 2) if symmetric else rng.integers(minus_one, most, (out, groups))
    scale = rng.uniform(0.01, 0.1, (out, groups)).astype(np.float16)
    index = np.arange(columns) // group if order is None else order
    values = (q - zero[:, index]).astype(np.float32) * scale.astype(np.float32)[:, index]
    if method == "gptq":
        parts = {"qweight": pack(q, bits).T, "qzeros": pack((zero - minus_one).T % most, bits), "scales": scale.T,
                 "g_idx": index.astype(np.int32)}
    elif method == "awq":
        places = np.arange(out).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
        parts = {"qweight": pack(q.T[:, places], 4), "qzeros": pack(zero.T[:, places], 4), "scales": scale.T}
    elif inner == "pack":
        parts = {"weight_packed": pack(q, bits), "weight_scale": scale, "weight_shape": np.array(shape, np.int64)}
        if not symmetric:
            parts["weight_zero_point"] = pack(zero.T, bits).T
    else:
        parts = {"weight": (q - 128).astype(np.int8), "weight_scale": scale,
                 "weight_zero_point": (zero - 128).astype(np.int8)}
    return {name: np.ascontiguousarray(part) for name, part in parts.items()}, values


def group_settings(bits=4, kind="pack-quantized", **weights):
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None,
                                          "weights": {"num_bits": bits, "type": "int", "strategy": "group",
                                                      "group_size": 16, "symmetric": False, **weights}}}}


def folder_of(path, settings, change=None, **options):
    """The tiny model with its linears packed; -> {name: values}."""
    source, rng = open_checkpoint(str(TINY)), np.random.default_rng(1)
    path.mkdir(exist_ok=True)
    config = json.loads((TINY / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(dict(config, quantization_config=settings)))
    tensors, values = {}, dict(source.tensors)
    for name, value in source.tensors.items():
        if "_proj.weight" not in name:
            tensors[name] = np.array(value)
            continue
        parts, values[name] = make(settings["quant_method"], value.shape, rng, **options)
        tensors.update({f"{name.removesuffix('.weight')}.{part}": array for part, array in parts.items()})
    if change:
        change(tensors)
    save_file(tensors, path / "model.safetensors")
    return values


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def test_every_method_is_known_to_the_folders():
    assert tuple(METHODS) == PACKED_METHODS


@pytest.mark.parametrize("settings, options", [
    (dict(GPTQ, checkpoint_format="gptq"), {"minus_one": 1}), (GPTQ, {"minus_one": 1}),
    (dict(GPTQ, checkpoint_format="gptq_v2"), {}), (dict(GPTQ, bits=8), {"minus_one": 1, "bits": 8}),
    (AWQ, {}), (group_settings(), {}), (group_settings(symmetric=True), {"symmetric": True}),
    (group_settings(8), {"bits": 8}), (group_settings(8, "int-quantized"), {"bits": 8, "inner": "plain"})],
    ids=["gptq", "gptq unlabelled", "gptq v2", "gptq 8", "awq", "packed", "packed symmetric", "packed 8", "int8"])
def test_folders_are_read_as_they_are_stored(settings, options, tmp_path):
    values = folder_of(tmp_path / "m", settings, **options)
    opened = open_checkpoint(str(tmp_path / "m"))
    assert opened.packed == [settings["quant_method"]] and list(opened.tensors) == list(values)
    for name, value in values.items():
        stored = opened.stored[name]
        assert np.array_equal(stored.values(), value), name
        if "_proj" in name:
            assert stored.format is (INT8_ZERO if options.get("bits") == 8 else INT4_ZERO)
            assert stored.as_format(None) is stored


@pytest.mark.parametrize("label, minus_one, warns", [("gptq", 1, False), ("gptq_v2", 0, False), ("gptq", 0, True),
                                                     ("gptq_v2", 1, True)])
def test_versions_of_gptq_are_told_by_the_contents(label, minus_one, warns, tmp_path):
    settings = dict(GPTQ, sym=True, checkpoint_format=label)
    values = folder_of(tmp_path / "m", settings, minus_one=minus_one, symmetric=True)
    opened = open_checkpoint(str(tmp_path / "m"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, value in values.items():
            assert np.array_equal(opened.stored[name].values(), value)
    assert [str(one.message).count("which was taken") for one in caught] == [1] * warns


def test_zero_points_of_0_in_version_1_borrow_from_the_whole_word():
    """0 less one is 15 with a borrow from the next nibble, as GPTQModel's subtraction leaves it."""
    zero = np.array([[0, 0, 5, 0, 1, 0, 9, 3]])
    word = (pack(zero, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    found = gptq(np.zeros((1, 8), np.int32), word, half(), 4, True, np.zeros(8, int))
    assert found.zero[:, 0].tolist() == zero[0].tolist()


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    """(folder, values) of the tiny model as GPTQ writes it with desc_act: q, k and v share an order, the others have
    their own, and o_proj's is sorted already."""
    path = tmp_path_factory.mktemp("ordered") / "m"
    values = {}

    def reorder(tensors):
        rng = np.random.default_rng(3)
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            out, columns = tensors[f"{name}.qweight"].shape[1], 8 * tensors[f"{name}.qweight"].shape[0]
            kind = 0 if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj") else rng.integers(1, 99)
            order = np.random.default_rng(kind).permutation(np.arange(columns) // 16)
            order = np.sort(order) if name.endswith("o_proj") else order
            parts, values[f"{name}.weight"] = make("gptq", (out, columns), rng, order=order, minus_one=1)
            tensors.update({f"{name}.{part}": array for part, array in parts.items()})

    whole = folder_of(path, dict(GPTQ, desc_act=True), reorder, minus_one=1)
    return path, {**whole, **values}


def test_info_says_how_a_folder_is_packed(ordered, capsys):
    from colora_ms.cli import main

    assert main(["info", str(ordered[0])]) == 0
    assert "packed      gptq: kept so unless another format is asked for" in capsys.readouterr().out


def test_activation_order_is_computed_in(ordered, mindspore):
    """The logits are those of the float32 model of the same values; asked for by name it is unpacked."""
    from colora_ms.models.decoder import Decoder

    path, values = ordered
    opened = open_checkpoint(str(path))
    assert all(np.array_equal(opened.tensors[name], value) for name, value in values.items())
    ids, lengths, slots = (mindspore.Tensor(np.array(one, np.int32)) for one in ([[1, 5, 9, 3, 7]], [5], [-1]))
    packed, floats = Decoder(opened.config, opened.stored), Decoder(opened.config, values)
    layer = packed.model.layers[0]
    assert layer.self_attn.o_proj.format is INT4_ZERO
    for cell in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.up_proj, layer.mlp.down_proj):
        assert cell.format is INT4_ZERO_ORDERED and cell.order.name.endswith("_proj.order")
        assert np.array_equal(cell.base_values()["weight"], values[cell.weight.name])
    got, want = (net(ids, lengths, slots).asnumpy() for net in (packed, floats))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    net = Decoder(opened.config, opened.stored, "float32")
    assert np.array_equal(net.model.layers[0].self_attn.q_proj.weight.asnumpy(),
                          values["model.layers.0.self_attn.q_proj.weight"])


@pytest.mark.parametrize("settings, words", [
    (dict(GPTQ, bits=3), "bits is 3"), (dict(GPTQ, checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (dict(GPTQ, dynamic={"-:x": {}}), "dynamic"), (dict(GPTQ, pack_dtype="int16"), "pack_dtype"),
    (dict(GPTQ, group_size=0), "group_size is 0"), (dict(AWQ, version="gemv"), "version is 'gemv'"),
    (dict(AWQ, zero_point=False), "zero_point is false"), (group_settings(kind="marlin-24"), "format is 'marlin-24'"),
    (group_settings(type="float"), "weights of group_0"), (group_settings(actorder="group"), "actorder"),
    (dict(group_settings(), transform_config={"x": 1}), "transform_config")])
def test_settings_that_are_not_read_are_named(settings, words, tmp_path):
    folder_of(tmp_path / "m", settings)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(str(tmp_path / "m"))


def test_groups_of_compressed_tensors_are_those_of_the_settings(tmp_path):
    """A last group may be shorter than the others; a size that the scales do not have is an error."""
    settings = group_settings(group_size=24)
    columns, rng = 32, np.random.default_rng(3)
    q, scale = rng.integers(0, 16, (8, columns)), rng.uniform(.01, .1, (8, 2)).astype(np.float32)
    index = np.arange(columns) // 24
    found = compressed(pack(q, 4), scale, None, index, 4).stored()
    assert np.array_equal(found.values(), (q - 8).astype(np.float32) * scale[:, index])
    folder_of(tmp_path / "m", settings, group=16)
    (tmp_path / "m" / "config.json").write_text(json.dumps(dict(
        json.loads((tmp_path / "m" / "config.json").read_text()), quantization_config=group_settings(group_size=8))))
    with pytest.raises(CheckpointError, match="has 2 groups of 32 inputs, but group_size is 8"):
        open_checkpoint(str(tmp_path / "m")).stored["model.layers.0.self_attn.q_proj.weight"]


def test_rounded_activations_are_refused(tmp_path):
    settings = group_settings(8, "int-quantized")
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    folder_of(tmp_path / "m", settings, bits=8, inner="plain")
    with pytest.raises(CheckpointError, match="input_activations of group_0 are rounded .W8A8."):
        open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize("suffix, wrong", [
    ("qzeros", np.zeros((1, 4), np.int32)), ("scales", np.ones((2, 8), np.float32)),
    ("g_idx", np.full(32, 9, np.int32)), ("qzeros", None)])
def test_tensors_that_do_not_fit_are_named(suffix, wrong, tmp_path):
    name = f"model.layers.0.self_attn.q_proj.{suffix}"

    def change(tensors):
        tensors[name] = wrong
        if wrong is None:
            del tensors[name]

    folder_of(tmp_path / "m", GPTQ, change, minus_one=1)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(str(tmp_path / "m")).stored["model.layers.0.self_attn.q_proj.weight"]


def test_fused_linears_of_packed_folders_are_taken_apart(tmp_path):
    """Phi-3's qkv_proj and gate_up_proj, packed as one: each part has its rows of the integers, factors and zeros."""
    source, rng = open_checkpoint(str(TINY)), np.random.default_rng(2)
    config = dict(json.loads((TINY / "config.json").read_text()), model_type="phi3", pad_token_id=0,
                  architectures=["Phi3ForCausalLM"], quantization_config=GPTQ)
    tensors, values = {}, {}
    for name, value in source.tensors.items():
        if "_proj.weight" not in name:
            tensors[name] = values[name] = np.array(value)
    for layer in range(config["num_hidden_layers"]):
        for fused, parts in (("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
                             ("mlp.gate_up_proj", ("gate_proj", "up_proj")), ("self_attn.o_proj", ("o_proj",)),
                             ("mlp.down_proj", ("down_proj",))):
            place = f"model.layers.{layer}.{fused}"
            names = [f"{place.rpartition('.')[0]}.{part}.weight" for part in parts]
            rows = [source.tensors[name].shape[0] for name in names]
            columns = source.tensors[names[0]].shape[1]
            order = rng.permutation(np.arange(columns) // 16) if layer else None
            made, whole = make("gptq", (sum(rows), columns), rng, minus_one=1, order=order)
            tensors.update({f"{place}.{part}": array for part, array in made.items()})
            values.update(zip(names, np.split(whole, np.cumsum(rows)[:-1])))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_checkpoint(str(tmp_path))
    assert set(opened.tensors) == set(values)
    for name, value in values.items():
        assert np.array_equal(opened.stored[name].values(), value), name


def test_older_folders_and_biases_of_zeros(tmp_path):
    values = folder_of(tmp_path / "m", GPTQ, lambda tensors: tensors.update(
        {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float16)}), minus_one=1)
    shutil.copy(TINY / "config.json", tmp_path / "m" / "config.json")
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "sym": False}))
    opened = open_checkpoint(str(tmp_path / "m"))
    assert all(np.array_equal(opened.tensors[name], value) for name, value in values.items())


def test_a_decoder_computes_with_the_packed_weights(tmp_path, mindspore):
    """The logits are those of the float32 model of the same values."""
    from colora_ms.models.decoder import Decoder

    values = folder_of(tmp_path / "m", AWQ)
    opened = open_checkpoint(str(tmp_path / "m"))
    ids, lengths, slots = (mindspore.Tensor(np.array(one, np.int32)) for one in ([[1, 5, 9, 3, 7]], [5], [-1]))
    packed, floats = Decoder(opened.config, opened.stored), Decoder(opened.config, values)
    assert packed.model.layers[0].mlp.up_proj.format is INT4_ZERO
    got, want = (net(ids, lengths, slots).asnumpy() for net in (packed, floats))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
