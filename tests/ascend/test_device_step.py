"""The device step's parts: what a batch is to its graphs, packed weights that follow the decoder, refusals by name; and
the rehearsal of the whole path in a process of its own."""
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ms = pytest.importorskip("mindspore")
from mindspore import Tensor  # noqa: E402

from colora_ms.adapters import LoraConfig, inject  # noqa: E402
from colora_ms.decoding.device_choice import choice_of  # noqa: E402
from colora_ms.decoding.device_step import INCREMENT, PREFILL, DeviceGraphs, step_inputs  # noqa: E402
from colora_ms.decoding.step import FlatBatch  # noqa: E402
from colora_ms.errors import CheckpointError, ConfigError  # noqa: E402
from colora_ms.kernels.options import SELECTION, OptionRows  # noqa: E402
from colora_ms.models import device_form, device_prompts  # noqa: E402
from colora_ms.models.config import DecoderConfig  # noqa: E402
from colora_ms.models.decoder import Decoder  # noqa: E402
from colora_ms.models.device_decoder import DeviceDecoder  # noqa: E402
from colora_ms.models.device_quantized import integer_tensors  # noqa: E402
from colora_ms.models.device_weights import Heads, PackedLinear, device_tensor  # noqa: E402
from colora_ms.models.formats import weight_format  # noqa: E402
from colora_ms.models.rope import rope_tables  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 128,
          "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}


def decoder(weight_format="float32", **other):
    return Decoder(DecoderConfig.from_hf({**CONFIG, **other}), None, weight_format)


def batch(rows, positions, slots, tables):
    options = [getattr(OptionRows(0), name) for name in SELECTION]
    nothing = np.zeros(0, np.int32)
    return FlatBatch(np.arange(len(rows), dtype=np.int32) + 100, np.array(rows, np.int32),
                     np.array(positions, np.int32), np.array(slots, np.int32), np.array(tables, np.int32),
                     np.zeros((0, 2), np.int32), *options, nothing, np.zeros((0, 1), np.float32), nothing)


# -- what a batch is to the graphs -------------------------------------------------------------------------------------


def test_every_token_of_an_increment_is_a_row_with_the_positions_that_it_sees():
    one = batch([0, 0, 0, 1], [15, 16, 17, 3], [1, -1], [[4, 7, -1], [2, -1, -1]])
    phase, inputs, moved = step_inputs(one, 16, 2, padded=False)
    tokens, positions, slots, places, tables, lengths, asked = inputs
    assert phase == INCREMENT and moved.tolist() == [0, 1, 2, 3]
    assert tokens.tolist() == [100, 101, 102, 103] and positions.tolist() == [15, 16, 17, 3]
    assert slots.tolist() == [1, 1, 1, -1] and places.tolist() == [4 * 16 + 15, 7 * 16, 7 * 16 + 1, 2 * 16 + 3]
    assert tables.tolist() == [[4, 7], [4, 7], [4, 7], [2, 0]]
    assert lengths.tolist() == [16, 17, 18, 4] and asked.tolist() == [1, 1, 1, 1]
    assert all(array.dtype == np.int32 for array in inputs)


def test_what_fills_an_increment_is_written_nowhere():
    one = batch([0, 1, 2, 3, 4], [3, 1, 0, 2, 5], [0, -1, -1, -1, 1], np.arange(5)[:, None])
    _, inputs, _ = step_inputs(one, 16, 2, padded=True)
    assert [len(array) for array in inputs] == [16] * 7 and inputs[4].shape == (16, 4)
    assert set(inputs[2][5:]) == {-1} and set(inputs[3][5:]) == {-1} and set(inputs[5][5:]) == {1}


def test_a_prefill_stands_in_the_order_of_its_adapters():
    one = batch([0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2, 0], [1, -1, 0], [[5], [6], [7]])
    phase, inputs, moved = step_inputs(one, 16, 2, padded=False)
    tokens, positions, slots, places, groups, lengths, asked = inputs
    assert phase == PREFILL and tokens.tolist() == [102, 103, 104, 105, 100, 101]
    assert slots.tolist() == [-1, -1, -1, 0, 1, 1] and groups.tolist() == [3, 4, 6] and groups.dtype == np.int64
    assert lengths.tolist() == [3, 1, 2] and asked.tolist() == [3, 1, 2]
    assert moved.tolist() == [4, 5, 0, 1, 2, 3] and positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert places.tolist() == [96, 97, 98, 112, 80, 81]


def test_a_prefill_is_filled_by_rows_that_cover_its_tokens():
    one = batch([0] * 5 + [1], [0, 1, 2, 3, 4, 0], [0, 0], [[5], [6]])
    _, inputs, _ = step_inputs(one, 16, 3, padded=True)
    tokens, lengths, groups = inputs[0], inputs[5], inputs[4]
    assert len(tokens) == 16 == lengths.sum() == groups[-1] and len(lengths) == 4 and lengths.min() == 1
    assert lengths[:2].tolist() == [5, 1] and groups.tolist() == [0, 6, 6, 16] and set(inputs[3][6:]) == {-1}


def test_a_row_that_goes_on_makes_an_increment_of_the_whole_batch():
    one = batch([0, 0, 1], [0, 1, 7], [0, 0], [[5], [6]])
    assert step_inputs(one, 16, 1, padded=False)[0] == INCREMENT
    assert step_inputs(batch([0, 1], [0, 0], [0, 0], [[5], [6]]), 16, 1, padded=False)[0] == INCREMENT


def options(**columns):
    rows = OptionRows(2)
    rows.put_rows(0, [0, 1], [0.75, 0.25])
    rows.put_rows(1, [2])
    for name, value in columns.items():
        rows.put(0, name, value)
    return dataclasses.replace(batch([0, 1, 2], [0, 0, 0], [-1] * 3, [[1], [2], [3]]),
                               **{name: getattr(rows, name) for name in SELECTION})


def test_what_one_operator_can_choose():
    takes = np.array([True, True])
    found = choice_of(options(alpha=0.5, beta=2.0), takes)
    assert found.rows[:, :2].tolist() == [[0, 1], [2, -1]]
    assert found.weights[:, :2].tolist() == [[3, -2], [1, 0]]
    np.testing.assert_allclose(found.log_alpha, [np.log(0.5), -np.inf])
    found = choice_of(options(mixing=1, cut=0, alpha=0.5), takes)
    assert found.weights[0, :2].tolist() == [0.75, 0.25] and found.log_alpha[0] == -np.inf
    assert choice_of(options(mixing=1, cut=1, alpha=0.5), takes).log_alpha[0] == np.log(np.float32(0.5))
    assert choice_of(options(), np.array([False, True])).rows[0].tolist() == [-1] * 8
    filled = found.filled(4)
    assert [len(one) for one in filled] == [4] * 3 and filled.rows[2:].max() == -1
    for asked in ({"temperature": 1}, {"mixing": 2}, {"mixing": 1, "cut": 2}, {"mode": 1}, {"logprobs": 0},
                  {"voices": 1}, {"masked": 1}):
        assert choice_of(options(**asked), takes) is None, asked
        assert choice_of(options(**asked), np.array([False, True])) is not None, asked
    with_bias = dataclasses.replace(options(), adjustments={"bias": [None, np.ones(1)]})
    assert choice_of(with_bias, takes) is None


# -- packed weights ----------------------------------------------------------------------------------------------------


def test_wider_heads_turn_the_same_pairs():
    random, heads = np.random.default_rng(1), Heads(3, 8, 32)
    q, k = (random.standard_normal((5, 24)).astype(np.float32) for _ in range(2))
    cos, sin = rope_tables(DecoderConfig.from_hf({**CONFIG, "head_dim": 8}), 5)

    def turned(x, dim, cos, sin):
        first, second = np.split(x.reshape(5, 3, dim), 2, -1)
        return np.concatenate((first * cos[:, None] - second * sin[:, None],
                               second * cos[:, None] + first * sin[:, None]), -1)

    one = Heads(1, 8, 32)
    wide = [one.spread(np.concatenate((half, half), 1), 1)[:, :16] for half in (cos, sin)]
    want = np.einsum("qhd,khd->hqk", turned(q, 8, cos, sin), turned(k, 8, cos, sin))
    got = np.einsum("qhd,khd->hqk", turned(heads.spread(q, 1), 32, *wide), turned(heads.spread(k, 1), 32, *wide))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    weight = random.standard_normal((7, 24))
    np.testing.assert_allclose(heads.spread(weight, 1) @ heads.spread(q, 1).T, weight @ q.T)


@pytest.fixture(params=["masked", "grouped"])
def form(request, monkeypatch):
    """How the pairs of prompts are computed."""
    monkeypatch.setattr(device_prompts, "MASKED_COLUMNS", 192 if request.param == "masked" else 0)
    return request.param


@pytest.fixture
def adapted(mindspore):
    net = decoder()
    handle = inject(net, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                    init_lora_weights=False), "one", slots=2, seed=1)
    return net, handle


def banks(packed):
    names = ("weight", "down", "up", "scale", "shrink", "expand")
    return {name: getattr(packed, name).astype(ms.float32).asnumpy() for name in names if hasattr(packed, name)}


def test_packed_adapters_are_those_of_the_cells(adapted, form):
    net, handle = adapted
    attention = net.model.layers[0].self_attn
    packed = PackedLinear("x", (attention.q_proj, attention.k_proj, attention.v_proj), ms.float16)
    found, x = banks(packed), np.random.default_rng(3).standard_normal((6, 128)).astype(np.float32)
    assert packed.ends.asnumpy().tolist() == [128, 192, 256] and found["scale"][0].tolist() == [2, 0, 2]
    base = np.concatenate([cell.base_layer.weight.asnumpy() if hasattr(cell, "base_layer") else cell.weight.asnumpy()
                           for cell in (attention.q_proj, attention.k_proj, attention.v_proj)])
    np.testing.assert_array_equal(found["weight"], base.astype(np.float16))
    want = np.zeros((6, 256), np.float32)
    for cell, part in ((attention.q_proj, slice(0, 128)), (attention.v_proj, slice(192, 256))):
        want[:, part] = 2 * x @ cell.down.asnumpy()[0].T @ cell.up.asnumpy()[0].T
    inner = (x @ found["down"][0].T).reshape(6, 3, 4) * found["scale"][0][:, None]
    got = np.concatenate([inner[:, i] @ found["up"][0][:, a:b] for i, (a, b) in
                          enumerate(((0, 128), (128, 192), (192, 256)))], 1)
    if form == "grouped":
        prompt = x @ found["shrink"][1] @ found["expand"][1]
        assert not found["shrink"][0].any() and not found["expand"][0].any(), "group 0 is the base's"
    else:
        assert "shrink" not in found and len(found["expand"]) == 2
        prompt = x @ found["down"][0].T @ found["expand"][0]
    for one in (got, prompt):
        np.testing.assert_allclose(one, want, atol=2e-3 * np.abs(want).max())


def test_written_slots_and_merged_weights_are_read_again_in_place(adapted, form):
    net, handle = adapted
    names = [parameter.name for parameter in net.get_parameters()]
    device = DeviceDecoder(net, ms.bfloat16)
    assert names == [parameter.name for parameter in net.get_parameters()]
    assert not {id(one) for one in net.get_parameters()} & {id(one) for one in device.get_parameters()}
    packed = device.layers[1].qkv
    before = banks(packed)
    kept = [packed.down, packed.up, packed.expand] + ([packed.shrink] if form == "grouped" else [])
    places = [parameter.data_ptr() for parameter in kept]
    handle.add_adapter("two", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False))
    device.refresh()
    after, fresh = banks(packed), banks(DeviceDecoder(net, ms.bfloat16).layers[1].qkv)
    assert not before["down"][1].any() and after["down"][1].any()
    for name, value in fresh.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert places == [parameter.data_ptr() for parameter in kept]
    handle.merge("one")
    device.refresh()
    merged = banks(packed)
    assert (merged["weight"] != before["weight"]).any() and not merged["scale"][0].any()
    handle.unmerge()
    device.refresh()
    for name, value in fresh.items():
        np.testing.assert_array_equal(banks(packed)[name], value, err_msg=name)


def test_what_was_trained_is_read_again_when_asked(adapted):
    net, handle = adapted
    device = DeviceDecoder(net, ms.float16)
    cell = net.model.layers[0].mlp.down_proj
    cell.down.asnumpy()[...] = 0.5  # as an optimizer does, which says nothing
    norm = net.model.layers[0].input_layernorm.weight
    norm.requires_grad = True
    norm.asnumpy()[...] = 0.25
    device.refresh(trained=True)
    assert (device.layers[0].before.gamma.asnumpy() == 0.25).all()
    assert (banks(device.layers[0].mlp.down)["down"][0] == 0.5).all()


@pytest.mark.parametrize("name, group", [("int8", None), ("int8", 64), ("int4", 32), ("int4", 128)])
def test_integers_are_those_of_the_format(mindspore, name, group):
    cells = [decoder(name).model.layers[0].mlp.gate_proj for _ in range(2)]
    random = np.random.default_rng(5)
    for cell in cells:
        stored = weight_format(name).pack(random.standard_normal((160, 128)).astype(np.float32), group)
        weight, scale = stored.tensors()
        cell.weight.set_data(weight)
        cell.weight_scale = ms.Parameter(scale, name="scale")
    weight, scale, found = integer_tensors(cells, ms.bfloat16, "x")
    assert found == (0 if group in (None, 128) else group)
    scales = scale.astype(ms.float32).asnumpy()
    if weight.dtype == ms.int8:
        integers = weight.asnumpy()
    else:
        assert weight.dtype == ms.qint4x2
        bits = weight.asnumpy().view(np.uint8)
        integers = np.stack((bits & 15, bits >> 4), -1).reshape(320, 128).astype(np.int8)
        integers = np.where(integers > 7, integers - 16, integers)
    values = integers * np.repeat(scales.reshape(-1, 320).T, 128 // scales.reshape(-1, 320).shape[0], 1)
    want = np.concatenate([cell.base_values()["weight"] for cell in cells])
    np.testing.assert_allclose(values, want, rtol=2.0 ** -8)


def test_values_that_float16_does_not_hold_are_refused():
    with pytest.raises(CheckpointError, match="x holds 70000.*COLORA_ASCEND_DTYPE=bfloat16"):
        device_tensor(np.array([1, 7e4]), ms.float16, "x")
    assert device_tensor(np.array([7e4]), ms.bfloat16, "x").astype(ms.float32).asnumpy() == 70144


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_banks_that_are_not_finite_are_refused(adapted, dtype):
    net, handle = adapted
    device = DeviceDecoder(net, dtype)
    net.model.layers[1].mlp.down_proj.up.asnumpy()[0, 3, 1] = np.inf
    for read in (lambda: device.refresh(trained=True), lambda: DeviceDecoder(net, dtype)):
        with pytest.raises(CheckpointError, match="slot 0 of device.layers.1.down_proj, up of its linear 0, holds inf"):
            read()


# -- forms and refusals ------------------------------------------------------------------------------------------------


def test_the_form_of_the_cache_is_the_devices(mindspore, monkeypatch):
    net = decoder()
    assert device_form.cache_form(net).block == 16 and not device_form.cache_form(net).on_device
    monkeypatch.setattr(device_form, "backend", lambda: "rehearsal")
    form = device_form.cache_form(net)
    assert form.block == 128 and form.dtype(None) == ms.bfloat16 and form.on_device
    cache = form.make(net.config, 3)
    assert cache.keys[0].shape == (3, 128, 2, 32) and cache.nbytes == 3 * form.block_bytes(net.config)
    for kind in (ms.int8, ms.float32):
        with pytest.raises(ConfigError, match="cannot be had here.*compute type"):
            form.dtype(kind)
    monkeypatch.setenv("COLORA_ASCEND_BLOCK", "24")
    with pytest.raises(ConfigError, match="COLORA_ASCEND_BLOCK='24' is not one of 16, 32, 64, 128"):
        device_form.cache_form(net)
    monkeypatch.setenv("COLORA_ASCEND_BLOCK", "16")
    monkeypatch.setenv("COLORA_ASCEND_DTYPE", "float32")
    with pytest.raises(ConfigError, match="COLORA_ASCEND_DTYPE='float32' is not known"):
        device_form.cache_form(net)


def test_models_that_have_no_device_step_say_why(mindspore):
    assert device_form.why_not(decoder()) == ""
    assert device_form.why_not(decoder(head_dim=8)) == ""
    other = SimpleNamespace(config=dataclasses.make_dataclass("C", [("cap", float, 0.0)], bases=(DecoderConfig,),
                                                              frozen=True)(**vars(decoder().config)), model=None)
    object.__setattr__(other.config, "cap", 30.0)
    assert device_form.why_not(other) == "cap=30.0, which the device step does not compute"
    object.__setattr__(other.config, "model_type", "gemma")
    assert device_form.why_not(other).startswith("model_type 'gemma'; the device step has the layers of llama")
    assert "head_dim=512" in device_form.why_not(decoder(head_dim=512))
    assert "larger than the 128 * 128" in device_form.why_not(decoder(head_dim=160), 128)
    assert device_form.why_not(decoder("int8")) == ""
    assert "multiple of 32" in device_form.why_not(decoder("int8", head_dim=8))
    net = decoder("int4")
    net.model.layers[0].mlp.down_proj.weight_scale = Tensor(np.ones((128, 20), np.float32))
    assert "groups of 8 inputs share a scale" in device_form.why_not(net)
    net = decoder()
    inject(net, LoraConfig(r=200, target_modules=["q_proj"]))
    assert "rank 200" in device_form.why_not(net)
    net = decoder()
    inject(net, LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    assert device_form.why_not(net) == "" or "computes more" in device_form.why_not(net)


def test_the_cells_of_a_step_have_their_phases_and_settings(mindspore):
    net = decoder()
    cache = device_form.CacheForm(16, (ms.float16,), True).make(net.config, 2)
    graphs = DeviceGraphs(DeviceDecoder(net, ms.float16), cache)
    for phase in (PREFILL, INCREMENT):
        cell = graphs.step(phase, adapters=True)
        assert cell.phase == phase and not cell.adapters
        assert {"jit_level": "O0", "infer_boost": "on"}.items() <= cell.jit_config_dict.items()
        names = cell.construct.__code__.co_varnames
        assert "batch_valid_length" in names and "q_seq_lens" in names
        assert graphs.step(phase, adapters=False) is cell


# -- the whole path ----------------------------------------------------------------------------------------------------


def process(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, env={
        **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_rehearsal(emulator, tmp_path):
    """Mixed requests through the device's graph, in a process whose column is ``rehearsal``."""
    out = tmp_path / "measures.json"
    process(SCRIPTS / "rehearse_ascend.py", "--requests", 8, "--tokens", 12, "--dtype", "float16", "--rows", 8,
            "--blocks", 9, "--json", out)
    found = {one["name"]: one["value"] for one in json.loads(out.read_text())["measures"]}
    assert found["rehearsal_equal"] == 1 and found["rehearsal_decided_float16"] > 0.5
    assert found["rehearsal_preemptions_float16"] > 0
    assert found["launches_per_layer"] <= 15 and found["launches_outside_layers"] <= 10
    assert found["copied_bytes_step"] == 0 and found["bytes_over_minimum_step"] <= 1.05


@pytest.mark.slow
def test_lily_in_a_rehearsal(emulator):
    found = json.loads(process(ROOT / "tests" / "ascend" / "lily_step.py").splitlines()[-1])
    assert found["cache"] == "DeviceCache" and found["rows"] == 6 and found["effect"] > 0.05 * found["largest"]
    assert found["worst"] < 16 * 2.0 ** -11 * found["largest"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, block", [("bfloat16", 128), ("float16", 16)])
def test_the_rehearsal_of_a_small_real_model(emulator, shared, tmp_path, dtype, block):
    out = tmp_path / "measures.json"
    process(SCRIPTS / "rehearse_ascend.py", "--model", shared / "data" / "stories260k", "--requests", 20,
            "--tokens", 32, "--dtype", dtype, "--block", block, "--json", out)
    found = {one["name"]: one["value"] for one in json.loads(out.read_text())["measures"]}
    assert found["rehearsal_equal"] == 1 and found[f"rehearsal_decided_{dtype}"] > 0.2
