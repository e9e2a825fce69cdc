"""Decomposed decoders: the chain Cell, decompose and recompose, folders, LoRA and contrast on top."""

import json

import numpy as np
import pytest

from mindspore import Tensor

from colora_ms.adapters import LoraConfig, inject, load_adapter
from colora_ms.decoding import Contrast, Generator
from colora_ms.decomposition import LrdPlan, decompose, decompose_checkpoint, recompose, save_decomposed
from colora_ms.errors import AdapterError, CheckpointError, ColoraError, ConfigError
from colora_ms.kernels import ABSENT, fuses_step
from colora_ms.models import build_decoder
from colora_ms.models.checkpoint import open_checkpoint
from colora_ms.models.formats import StoredFactors, stored_float
from colora_ms.models.low_rank import LowRankLinear, low_rank_linear
from colora_ms.runtime import run
from model_gradients import gradients
from test_inject import noise_of

PLAN = LrdPlan([1], "all", 4)
IDS = np.random.default_rng(2).integers(3, 96, (4, 6)).astype(np.int32)
BASE = np.full(4, -1, np.int32)
FULL = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 32, "up_proj": 32, "down_proj": 32}


def logits(net, slots=BASE):
    slots = slots if isinstance(slots, Tensor) else Tensor(slots)
    return run(net, Tensor(IDS), Tensor(np.full(4, 6, np.int32)), slots).asnumpy()


def weights_of(net):
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def numpy_product(values):
    parts = [values[name].astype(np.float64) for name in ("outer.weight", "core.weight", "inner.weight")
             if name in values]
    return np.linalg.multi_dot(parts) if len(parts) == 3 else parts[0] @ parts[1]


@pytest.mark.parametrize("out, inner, rank, factors", [(5, 7, 1, 3), (33, 17, 5, 3), (1, 9, 1, 2), (64, 31, 31, 2)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2,)])
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16"])
def test_the_cell_against_numpy(mindspore, out, inner, rank, factors, shape, weight_format):
    random = np.random.default_rng(rank)
    values = {"inner.weight": random.standard_normal((rank, inner)),
              "core.weight": random.standard_normal((rank, rank)),
              "outer.weight": random.standard_normal((out, rank))}
    if factors == 2:
        del values["core.weight"]
    bias = mindspore.Parameter(Tensor(random.standard_normal(out).astype(np.float32)), name="bias")
    parts = StoredFactors(*(stored_float(values[f"{part}.weight"]) if f"{part}.weight" in values else None
                            for part in ("inner", "outer", "core")))
    cell = low_rank_linear("p", parts, weight_format, bias)
    stored = {name: one.astype(mindspore.float32).asnumpy() for name, one in cell.factor_parameters().items()}
    assert cell.inner.dtype == getattr(mindspore, weight_format) and cell.factors == factors and cell.fusible
    x = random.standard_normal((*shape, inner)).astype(np.float32)
    y = cell(Tensor(x), (Tensor(np.full(shape[0], -1, np.int32)), ABSENT)).asnumpy()
    want = x.astype(np.float64) @ numpy_product(stored).T + bias.asnumpy()
    assert y.shape == (*shape, out) and np.abs(y - want).max() < 1e-5 * max(np.abs(want).max(), 1) * rank
    assert np.allclose(cell.stored().values(), numpy_product(stored), atol=1e-4)


@pytest.mark.parametrize("factors", [2, 3])
def test_full_rank_changes_nothing(tiny_decoder, factors):
    net = tiny_decoder(model_type="qwen2", attention_bias=True)
    before = logits(net)
    report = decompose(net, LrdPlan("all", "all", 1, factors, modules=FULL, force=True))
    assert len(report) == 14 and max(row.error for row in report) < 1e-6
    assert isinstance(net.model.layers[0].self_attn.q_proj, LowRankLinear)
    assert np.abs(logits(net) - before).max() < 1e-4


def test_decompose_is_the_model_with_the_products(tiny_decoder):
    """The chain gives what the dense model gives with each weight's float64 SVD in its place."""
    net, dense = tiny_decoder(), tiny_decoder()
    report = decompose(net, PLAN)
    for row in report:
        weight = dense.parameters_dict()[f"{row.path}.weight"]
        u, s, v = np.linalg.svd(weight.asnumpy().astype(np.float64))
        product = (u[:, :4] * s[:4]) @ v[:4]
        assert row.error == pytest.approx(np.sqrt((s[4:] ** 2).sum() / (s ** 2).sum()), abs=1e-5)
        weight.set_data(Tensor(product.astype(np.float32)))
    want = logits(dense)
    assert np.abs(logits(net) - want).max() < 1e-4 * np.abs(want).max()
    names = set(weights_of(net))
    assert "model.layers.1.mlp.up_proj.core.weight" in names and "model.layers.1.mlp.up_proj.weight" not in names
    assert sum(row.parameters_before - row.parameters_after for row in report) == (
        sum(v.size for v in weights_of(dense).values()) - sum(v.size for v in weights_of(net).values()))
    assert recompose(net) == [row.path for row in report]
    assert set(weights_of(net)) == set(weights_of(dense))
    assert np.abs(logits(net) - want).max() < 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8", "int4"])
def test_other_weight_formats(tiny_decoder, goldens, weight_format):
    checkpoint = open_checkpoint(goldens / "tiny" / "llama")
    net = build_decoder(checkpoint, weight_format)
    decompose(net, PLAN)
    cell = net.model.layers[1].mlp.down_proj
    assert str(cell.inner.dtype) == "BFloat16" and np.isfinite(logits(net)).all()
    recompose(net)
    assert net.model.layers[1].mlp.down_proj.weight.dtype == net.model.layers[0].mlp.down_proj.weight.dtype


@pytest.mark.parametrize("plan, words", [
    (LrdPlan([2]), "blocks 0 to 1"), (LrdPlan([0], "all", 14), "past break-even"),
    (LrdPlan([0], modules={"qproj": 2}), "q_proj")])
def test_bad_plans_leave_the_model_alone(tiny_decoder, plan, words):
    net = tiny_decoder()
    before = weights_of(net)
    with pytest.raises(ConfigError, match=words):
        decompose(net, plan)
    assert weights_of(net).keys() == before.keys()


def test_a_weight_that_is_not_finite_is_named(tiny_decoder):
    net = tiny_decoder()
    weight = net.model.layers[1].mlp.up_proj.weight
    weight.set_data(Tensor(np.where(np.arange(weight.size).reshape(weight.shape) == 3, np.inf, weight.asnumpy())))
    before = weights_of(net)
    with pytest.raises(ConfigError, match="layers.1.mlp.up_proj.*not finite"):
        decompose(net, PLAN)
    assert weights_of(net).keys() == before.keys()


def test_states_that_are_refused(tiny_decoder, tmp_path):
    net = tiny_decoder()
    with pytest.raises(CheckpointError, match="nothing is decomposed"):
        save_decomposed(net, tmp_path / "m")
    decompose(net, PLAN)
    with pytest.raises(AdapterError, match="decomposed already"):
        decompose(net, LrdPlan([0, 1]))
    handle = inject(net, LoraConfig(r=2))
    for call in (lambda: decompose(net, LrdPlan([0])), lambda: recompose(net),
                 lambda: save_decomposed(net, tmp_path / "m")):
        with pytest.raises(AdapterError, match="unload"):
            call()
    handle.unload()
    assert len(recompose(net)) == 7 and not (tmp_path / "m").exists()


# -- folders ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model, factors", [("llama_bias", 3), ("qwen3", 2)])
def test_folder_round_trip(goldens, tmp_path, model, factors):
    """From a live model and from file to file: the same folder, which loads with the same output."""
    checkpoint = open_checkpoint(goldens / "tiny" / model)
    plan = LrdPlan([1], "all", 3, factors)
    net = build_decoder(checkpoint)
    report = decompose(net, plan)
    want = logits(net)
    save_decomposed(net, tmp_path / "live")
    rows = decompose_checkpoint(checkpoint, plan, tmp_path / "files")
    assert [(r.path, r.error) for r in rows] == [(r.path, r.error) for r in report]
    for name in ("live", "files"):
        loaded = build_decoder(open_checkpoint(tmp_path / name))
        assert np.array_equal(logits(loaded), want)
        saved = weights_of(net)
        assert all(np.array_equal(value, saved[key]) for key, value in weights_of(loaded).items())


def test_dense_folder_is_a_plain_model(goldens, tmp_path):
    checkpoint = open_checkpoint(goldens / "tiny" / "llama")
    net = build_decoder(checkpoint)
    decompose(net, PLAN)
    decompose_checkpoint(checkpoint, PLAN, tmp_path / "dense", dense=True)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"
    assert np.abs(logits(build_decoder(open_checkpoint(tmp_path / "dense"))) - logits(net)).max() < 1e-4


def spoil(**changes):
    def change(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        values.update(changes)
        path.write_text(json.dumps(values))
    return change


def low_rank(modules):
    return spoil(low_rank={"format": 1, "modules": modules})


@pytest.mark.parametrize("change, words", [
    (spoil(low_rank={"format": 2}), "format 1"),
    (spoil(low_rank=None), "low_rank"),
    (low_rank({}), "names no module"),
    (low_rank({"model.layers.1.mlp.up_prj": {"rank": 4, "factors": 3}}), "up_proj"),
    (low_rank({"model.layers.1.mlp.up_proj": {"rank": 99, "factors": 3}}), "from 1 to 32"),
    (low_rank({"model.layers.1.mlp.up_proj": {"rank": 4, "factors": 3}}), "do not fit the config"),
    (low_rank({"model.layers.1.mlp.up_proj": 4}), "expected a rank"),
    (spoil(base_model_type="gpt2"), "gpt2"),
    (spoil(base_model_type=None), "model_type None"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "usable safetensors"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
])
def test_bad_folders(goldens, tmp_path, change, words):
    decompose_checkpoint(open_checkpoint(goldens / "tiny" / "llama"), PLAN, tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(ColoraError, match=words):
        open_checkpoint(tmp_path / "m")


def test_nothing_is_left_behind(goldens, tmp_path):
    checkpoint = open_checkpoint(goldens / "tiny" / "llama")
    with pytest.raises(ConfigError):
        decompose_checkpoint(checkpoint, LrdPlan([9]), tmp_path / "m")

    class Stop(Exception):
        pass

    def stop(row):
        raise Stop
    with pytest.raises(Stop):
        decompose_checkpoint(checkpoint, PLAN, tmp_path / "m", on_row=stop)
    assert not list(tmp_path.iterdir())
    decompose_checkpoint(checkpoint, PLAN, tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists already"):
        decompose_checkpoint(checkpoint, PLAN, tmp_path / "m")
    with pytest.raises(CheckpointError, match="decomposed already"):
        decompose_checkpoint(open_checkpoint(tmp_path / "m"), PLAN, tmp_path / "n")


# -- LoRA on top ------------------------------------------------------------------------------------------------------

RANDOM = dict(lora_alpha=8, init_lora_weights=False)


def test_lora_over_a_chain_equals_lora_over_its_product(tiny_decoder, tmp_path):
    """Row by row: an adapter over the chains gives what it gives over the recomposed matrices, and -1 the base."""
    net, dense = tiny_decoder(), tiny_decoder()
    decompose(net, PLAN)
    decompose(dense, PLAN)
    recompose(dense)
    config = LoraConfig(r=3, target_modules="all-linear", **RANDOM)
    handles = [inject(one, config, slots=2, seed=4) for one in (net, dense)]
    for handle in handles:
        handle.add_adapter("other", LoraConfig(r=2, target_modules=["down_proj", "q_proj"], **RANDOM))
    rows = ["default", "__base__", "other", "default"]
    found, want = (logits(one, handle.slots(4, rows)) for one, handle in zip((net, dense), handles))
    assert np.abs(found - want).max() < 2e-4 * np.abs(want).max()
    base = logits(net)
    assert np.array_equal(found[1], base[1]) and all(np.abs(found[i] - base[i]).max() > 1e-2 for i in (0, 2, 3))

    handles[0].save(tmp_path / "lora", "default")
    served = tiny_decoder()
    decompose(served, PLAN)
    handle = load_adapter(served, tmp_path / "lora")
    assert served.model.layers[1].mlp.up_proj.fusible
    assert np.abs(logits(served, handle.slots(4))
                  - logits(net, handles[0].slots(4, "default"))).max() < 2e-4 * np.abs(want).max()


def test_gradients_over_a_chain_are_those_over_its_product(tiny_decoder):
    nets = [tiny_decoder(), tiny_decoder()]
    for one in nets:
        decompose(one, PLAN)
    recompose(nets[1])
    results = []
    for one in nets:
        handle = inject(one, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **RANDOM), seed=1)
        results.append(gradients(one, handle, IDS, noise_of(one), handle.slots(4)))
    (value, found), (expected, want) = results
    assert found.keys() == want.keys() and len(found) == 8
    assert value == pytest.approx(expected, rel=1e-4)
    for name, gradient in found.items():
        assert np.abs(gradient - want[name]).max() < 1e-3 * np.abs(want[name]).max(), name


def test_gradients_over_a_chain_are_those_of_finite_differences(mindspore, tiny_decoder):
    net = tiny_decoder()
    decompose(net, PLAN)
    handle = inject(net, LoraConfig(r=2, target_modules=["v_proj", "up_proj"], **RANDOM))
    slots = handle.slots(4)
    noise = noise_of(net)
    _, found = gradients(net, handle, IDS, noise, slots)
    random = np.random.default_rng(1)
    for parameter, gradient in list(zip(handle.trainable_params(), found.values()))[::3]:
        start = parameter.asnumpy().copy()
        direction = random.standard_normal(start.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        ends = []
        for sign in (1, -1):
            parameter.set_data(Tensor(start + np.float32(sign * 1e-2) * direction))
            ends.append((logits(net, slots).astype(np.float64) * noise).sum())
        parameter.set_data(Tensor(start))
        slope = (ends[0] - ends[1]) / 2e-2
        assert abs((gradient * direction).sum() - slope) < 2e-2 * max(abs(slope), np.linalg.norm(gradient) * 0.1, 1e-3)


def test_bias_dropout_and_what_is_refused(tiny_decoder):
    net = tiny_decoder(model_type="qwen2", attention_bias=True)
    decompose(net, PLAN)
    handle = inject(net, LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", lora_dropout=0.5, **RANDOM))
    cell = net.model.layers[1].self_attn.q_proj
    net.set_train(False)
    before = logits(net, handle.slots(4))
    cell.bias.set_data(Tensor(cell.bias.asnumpy() + 0.5))
    assert np.abs(logits(net, handle.slots(4)) - before).max() > 1e-3
    net.set_train(True)
    first, second = (logits(net, handle.slots(4)) for _ in range(2))
    net.set_train(False)
    assert np.abs(first - second).max() > 1e-3
    with pytest.raises(AdapterError, match="recompose"):
        handle.merge()
    assert handle.merged is None
    handle.unload()
    with pytest.raises(AdapterError, match="down_proj"):
        inject(net, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.down_proj"]))
    for options in (dict(use_dora=True), dict(init_lora_weights="pissa")):
        with pytest.raises(AdapterError, match="LowRankLinear"):
            inject(net, LoraConfig(r=2, target_modules=["q_proj"], **options))


def test_contrast_on_a_decomposed_model(tiny_decoder, word_tokenizer, tmp_path):
    maker = tiny_decoder()
    inject(maker, LoraConfig(r=3, target_modules="all-linear", **RANDOM)).save(tmp_path / "a")
    net = tiny_decoder()
    decompose(net, PLAN)
    generator = Generator(net, word_tokenizer, load_adapter(net, tmp_path / "a"))
    contrast, prompt = Contrast(0.1, 0.7), [5, 9, 33]
    answers = [generator.generate([prompt], adapter=name, contrast=with_, max_new_tokens=8)[0].tokens
               for name, with_ in (("a", contrast), ("a", None), (None, None))]
    assert len(set(answers)) == 3
    # The rule on full forwards of the same model, without a cache: expert and base logits after every prefix.
    ids, lengths = np.zeros((2, 12), np.int32), np.full(2, 0, np.int32)
    ids[:, :11] = prompt + list(answers[0])
    lengths[:] = 11
    expert, base = run(net, Tensor(ids), Tensor(lengths), Tensor(np.array([0, -1], np.int32))).asnumpy()
    for step, token in enumerate(answers[0]):
        e, a = expert[2 + step], base[2 + step]
        scores = np.where(e >= np.log(0.1) + e.max(), 1.7 * e - 0.7 * a, -np.inf)
        assert scores[token] >= scores.max() - 1e-3


@pytest.mark.skipif(not fuses_step(), reason="the compiled operators are not there")
@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("model, weight_format", [("llama_bias", "float32"), ("qwen3", "int8")])
def test_the_fused_step_takes_products(goldens, word_tokenizer, model, weight_format, factors):
    answers = []
    for fused in (True, False):
        net = build_decoder(open_checkpoint(goldens / "tiny" / model), weight_format)
        decompose(net, LrdPlan([1], ["q_proj", "o_proj", "up_proj", "down_proj"], 4, factors=factors))
        for _, cell in net.cells_and_names():
            if isinstance(cell, LowRankLinear):
                cell.fusible = fused
        handle = inject(net, LoraConfig(r=3, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
                                        layers_to_transform=[0] if factors == 2 else [0, 1],
                                        init_lora_weights=False), seed=1)
        generator = Generator(net, word_tokenizer, handle, max_rows=8)
        answers.append(generator.generate([[5, 6, 7], [9]], adapter="default", contrast=[Contrast(0.1, 1.0), None],
                                          max_new_tokens=12, ignore_eos=True, records=True))
        assert generator._core.graph.fused is fused
    for a, b in zip(*answers):
        assert a.tokens == b.tokens and a.records == b.records
