"""DoRA, PiSSA, OLoRA and a bias on lora_B: equal to peft, formulas in float64, gradients, merging, mixed batches."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from colora_ms.adapters import LoraConfig, adapters_of, digest, inject, load_adapter, load_adapters
from colora_ms.adapters.store import WEIGHTS_FILE
from colora_ms.errors import AdapterError, DecodingError
from colora_ms.kernels import ABSENT
from model_gradients import gradients

GOLDENS = {"dora": "llama", "dora_bias": "llama_bias", "lora_bias": "llama_bias", "pissa": "llama", "olora": "llama",
           "dora_pissa": "llama"}
RANDOM = {"init_lora_weights": False}
IDS = np.array([[3, 14, 15, 92, 65, 35], [8, 9, 7, 9, 3, 2], [27, 18, 28, 18, 28, 4]], np.int32)


def build(goldens, base):
    from colora_ms.models.checkpoint import open_checkpoint
    from colora_ms.models.decoder import Decoder

    checkpoint = open_checkpoint(goldens / "tiny" / base)
    return Decoder(checkpoint.config, checkpoint.tensors)


def run(net, slots, ids=IDS):
    from mindspore import Tensor

    slots = Tensor(np.array(slots, np.int32)) if isinstance(slots, list) else slots
    return net(Tensor(ids), Tensor(np.full(len(ids), ids.shape[1], np.int32)), slots).asnumpy()


def weights_of(net):
    return {p.name: p.asnumpy().tobytes() for p in net.get_parameters() if "lora" not in p.name
            and "saved" not in p.name}


# -- peft -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_pefts(mindspore, goldens, tmp_path, name):
    """Read from peft's folder, merged, and read again from a folder written here."""
    folder, net = goldens / "peft" / name, build(goldens, GOLDENS[name])
    stored = np.load(folder / "logits.npz")
    kept = weights_of(net)
    handle = load_adapter(net, folder)
    ours = run(net, handle.slots(2), stored["ids"])
    assert np.abs(ours[:, stored["positions"]] - stored["logits"]).max() < 5e-4
    assert (ours.argmax(-1) == stored["argmax"]).all()
    handle.merge(safe_merge=True)
    assert np.abs(run(net, handle.slots(2), stored["ids"]) - ours).max() < 2e-3
    assert np.abs(run(net, [0, 0], stored["ids"]) - ours).max() < 2e-3, "the slot's own rows get the change twice"
    handle.unmerge()
    assert weights_of(net) == kept and np.array_equal(run(net, handle.slots(2), stored["ids"]), ours)
    handle.save(tmp_path / "again")
    if "pissa" not in name and name != "olora":
        before, after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
        assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
        assert digest(folder) == digest(tmp_path / "again")
    else:
        handle.unload()
        again = load_adapter(net, tmp_path / "again")
        assert not again.config().changes_base
        assert np.abs(run(net, again.slots(2), stored["ids"]) - ours).max() < 1e-5


@pytest.mark.parametrize("name", ["dora", "dora_bias"])
def test_gradients_equal_pefts(mindspore, goldens, name):
    stored = np.load(goldens / "peft" / name / "gradients.npz")
    net = build(goldens, GOLDENS[name])
    handle = load_adapter(net, goldens / "peft" / name, trainable=True)
    _, found = gradients(net, handle, stored["ids"], stored["noise"], handle.slots(2))
    found = {path: gradient[0] for path, gradient in found.items()}
    checked = 0
    for key in set(stored.files) - {"ids", "noise"}:
        ours = key.removeprefix("base_model.model.").removesuffix(".weight")
        ours = ours.replace(".base_layer.bias", ".lora_bias")
        scale = np.abs(stored[key]).max()
        assert scale > 0 and np.abs(found[ours] - stored[key]).max() < 2e-4 * scale, key
        checked += 1
    assert checked == {"dora": 6, "dora_bias": 8}[name]


@pytest.mark.parametrize("name", ["pissa", "olora", "dora_pissa"])
def test_starts_equal_pefts(mindspore, goldens, name):
    stored = np.load(goldens / "peft" / name / "start.npz")
    import json

    values = json.loads((goldens / "peft" / name / "adapter_config.json").read_text())
    net = build(goldens, "llama")
    kept, base = weights_of(net), run(net, [-1] * 3)
    handle = inject(net, LoraConfig.from_peft(values))
    cell = handle.sites["model.layers.0.mlp.down_proj", "lora"]
    residual = cell.base_layer.weight.asnumpy()
    assert np.abs(residual - stored["residual"]).max() < 1e-5
    product = cell.change(0) / handle.matched().targets[cell.path].scaling
    assert np.abs(product - stored["up"] @ stored["down"]).max() < 1e-5
    for ours, theirs in ((cell.down, stored["down"]), (cell.up.asnumpy().transpose(0, 2, 1), stored["up"].T)):
        ours = np.asarray(ours.asnumpy() if hasattr(ours, "asnumpy") else ours)[0]
        signs = np.sign((ours * theirs).sum(1, keepdims=True))  # a singular vector's sign is free
        assert np.abs(ours - signs * theirs).max() < 1e-4
    if "magnitude" in stored:
        assert np.abs(cell.magnitude.asnumpy()[0] - stored["magnitude"]).max() < 1e-5
    assert np.abs(run(net, handle.slots(3)) - base).max() < 1e-3, "at first the model must compute what it did before"
    handle.unload()
    assert weights_of(net) == kept


# -- DoRA -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["float32", "int8"])
def mixed(request, mindspore, tiny_decoder):
    """(net, base logits, handle) with two DoRA adapters, a plain one and one of rsLoRA, loaded for inference."""
    import tempfile
    from pathlib import Path

    from colora_ms.models.decoder import Decoder

    changes = {"attention_bias": True, "attention_out_bias": True}
    config = tiny_decoder(**changes).config
    weights = {name: p.asnumpy() for name, p in tiny_decoder(**changes).parameters_dict().items()}
    folders = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, settings) in enumerate({
                "dora": {"use_dora": True, "target_modules": "all-linear", "r": 3},
                "dora_qv": {"use_dora": True, "target_modules": ["q_proj", "v_proj"], "r": 5, "use_rslora": True},
                "plain": {"target_modules": ["q_proj", "down_proj"], "r": 4}}.items()):
            net = Decoder(config, weights)
            handle = inject(net, LoraConfig(**RANDOM, **settings), name, seed=i)
            shake(handle, name, seed=i)
            folders[name] = Path(folder) / name
            handle.save(folders[name])
        net = Decoder(config, weights, weight_format=request.param)
        base = run(net, [-1] * 3)
        handle = load_adapters(net, folders, slots=4)
    return net, base, handle


def shake(handle, name, seed=0):
    """Magnitudes away from the lengths that they start as."""
    random = np.random.default_rng(seed)
    for cell in handle.sites.values():
        if hasattr(cell, "magnitude"):
            value = cell.magnitude.asnumpy()
            from mindspore import Tensor

            cell.magnitude.set_data(Tensor((value * random.uniform(0.5, 1.5, value.shape)).astype(np.float32)))


def test_mixed_batch_equals_each_adapter_alone(mixed):
    net, base, handle = mixed
    assert np.array_equal(run(net, handle.slots(3, "__base__")), base)
    alone = {name: run(net, handle.slots(3, name)) for name in handle.names}
    for names in (["dora", "plain", "__base__"], ["__base__", "dora_qv", "dora"], ["plain", "dora", "dora_qv"]):
        rows = run(net, handle.slots(3, names))
        for i, name in enumerate(names):
            assert np.array_equal(rows[i], base[i] if name == "__base__" else alone[name][i])
    assert min(np.abs(alone[name] - base).max() for name in alone) > 1e-2


def test_formula_in_float64(mixed):
    """One linear with a base bias against magnitude * (W + s up down) / length."""
    from mindspore import Tensor

    from colora_ms.adapters.outside import leaf

    _, _, handle = mixed
    cell = handle.sites["model.layers.1.self_attn.q_proj", "lora"]
    x = np.random.default_rng(0).standard_normal((4, 5, 32)).astype(np.float32)
    names = ["dora_qv", "plain", None, "dora"]
    slots = Tensor(np.array([-1 if n is None else handle.slot(n) for n in names], np.int32))
    got = cell(Tensor(x), (slots, ABSENT)).asnumpy()
    base = {key: value.astype(np.float64) for key, value in leaf(cell.base_layer).base_values().items()}
    for row, name in enumerate(names):
        weight = base["weight"]
        if name:
            target = handle.matched(name).targets[cell.path]
            shapes = {"down": (target.r, 32), "up": (32, target.r), "magnitude": (32,)}
            values = cell.read(handle.slot(name), shapes)
            weight = weight + target.scaling * values["up"].astype(np.float64) @ values["down"]
            if target.dora:
                weight = weight * (values["magnitude"] / np.sqrt((weight ** 2).sum(1)))[:, None]
        assert np.abs(got[row] - x[row] @ weight.T - base["bias"]).max() < 1e-4


def test_freed_slots_and_plain_adapters_get_no_magnitude(mixed):
    net, base, handle = mixed
    slot = handle.slot("dora_qv")
    before = run(net, handle.slots(3, "plain"))
    handle.add_adapter("late", LoraConfig(r=2, target_modules=["v_proj"], **RANDOM))
    late = run(net, handle.slots(3, "late"))
    handle.delete_adapter("late")
    assert np.array_equal(run(net, handle.slots(3, "plain")), before) and np.abs(late - base).max() > 1e-3
    graphs = len(net.compile_cache)
    values = {}
    for path, target in handle.matched("dora_qv").targets.items():
        cell = handle.sites[path, "lora"]
        values[path] = cell.read(slot, {"down": cell.down.shape[1:], "up": cell.up.shape[1:],
                                        "magnitude": (cell.out_features,)})
        cell.clear(slot)
    assert np.array_equal(run(net, [slot] * 3), base)
    for path, one in values.items():
        handle.sites[path, "lora"].write(slot, {**one, "magnitude": one["magnitude"] * np.nan},
                                         handle.matched("dora_qv").targets[path].scaling)
    assert np.isnan(run(net, [slot] * 3)).any() and np.array_equal(run(net, [-1] * 3), base)
    for path, one in values.items():
        handle.sites[path, "lora"].write(slot, one, handle.matched("dora_qv").targets[path].scaling)
    assert len(net.compile_cache) == graphs


def test_gradients_are_those_of_finite_differences_at_constant_length(mindspore, tiny_decoder):
    """The length counts as a constant: in the differences, the magnitude follows it."""
    from mindspore import Tensor

    net = tiny_decoder(attention_bias=True, attention_out_bias=True)
    handle = inject(net, LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"], **RANDOM))
    shake(handle, "default")
    slots = handle.slots(3)
    noise = np.random.default_rng(0).standard_normal((3, 6, 97)).astype(np.float32)
    _, found = gradients(net, handle, IDS, noise, slots)
    random = np.random.default_rng(1)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        cell = handle.sites[path, "lora"]
        magnitude = cell.magnitude.asnumpy().copy()

        def length():
            weight = cell.base_layer.weight.asnumpy().astype(np.float64) + cell.change(0)
            return np.sqrt((weight ** 2).sum(1))

        start_length = length()
        for parameter in (cell.down, cell.up, cell.magnitude):
            start = parameter.asnumpy().copy()
            direction = random.standard_normal(start.shape).astype(np.float32)
            direction /= np.linalg.norm(direction)
            step, ends = 1e-2, []
            for sign in (1, -1):
                parameter.set_data(Tensor(start + np.float32(sign * step) * direction))
                if parameter is not cell.magnitude:
                    cell.magnitude.set_data(Tensor((magnitude * (length() / start_length)).astype(np.float32)))
                ends.append((run(net, slots).astype(np.float64) * noise).sum())
            parameter.set_data(Tensor(start))
            cell.magnitude.set_data(Tensor(magnitude))
            slope, gradient = (ends[0] - ends[1]) / (2 * step), found[parameter.name]
            assert abs((gradient * direction).sum() - slope) < 2e-2 * max(abs(slope), np.linalg.norm(gradient) * 0.1), \
                parameter.name


def test_a_new_dora_adapter_changes_nothing_and_dropout_acts_in_training_only(mindspore, tiny_decoder):
    net = tiny_decoder(attention_bias=True, attention_out_bias=True)
    base = run(net, [-1] * 3)
    handle = inject(net, LoraConfig(r=2, use_dora=True, lora_dropout=0.5, target_modules=["q_proj", "up_proj"]))
    net.set_train(False)
    assert np.abs(run(net, handle.slots(3)) - base).max() < 1e-4
    for cell in handle.sites.values():
        cell.write(0, {"down": np.full((2, 32), 0.2, np.float32),
                       "up": np.full((cell.out_features, 2), 0.2, np.float32),
                       "magnitude": cell.magnitude.asnumpy()[0]}, 1.0)
    calm = run(net, handle.slots(3))
    net.set_train(True)
    first, second = run(net, handle.slots(3)), run(net, handle.slots(3))
    assert not np.array_equal(first, second) and np.abs(first - calm).max() > 1e-3
    assert np.allclose(run(net, [-1] * 3), base, atol=1e-4)


def test_a_bias_that_the_base_has_no_place_for_is_not_merged(mindspore):
    from mindspore import nn

    net = nn.SequentialCell([nn.Dense(7, 9), nn.Dense(9, 5, has_bias=False)])
    handle = inject(net, LoraConfig(r=2, lora_bias=True, target_modules=["0", "1"], **RANDOM))
    before = [cell.base_layer.weight.asnumpy().copy() for cell in handle.cells.values() if hasattr(cell, "base_layer")]
    for (path, _), cell in handle.sites.items():
        out, columns = cell.base_layer.weight.shape
        cell.write(0, {"down": np.ones((2, columns), np.float32), "up": np.ones((out, 2), np.float32),
                       "up_bias": np.ones(out, np.float32)}, 1.0)
    with pytest.raises(AdapterError, match=r"lora_bias\) to 1, whose base layer has none.*unmerged"):
        handle.merge()
    assert handle.merged is None
    after = [cell.base_layer.weight.asnumpy() for cell in handle.cells.values() if hasattr(cell, "base_layer")]
    assert all(np.array_equal(one, other) for one, other in zip(before, after))


def test_dora_and_lora_bias_on_dense_cells(mindspore, tmp_path):
    """Cells of other models, with and without bias and activation, against the formula; merging; a round trip."""
    from mindspore import Tensor, nn

    x = np.random.default_rng(0).standard_normal((3, 7)).astype(np.float32)

    def network():
        import mindspore as ms

        ms.set_seed(3)
        return nn.SequentialCell([nn.Dense(7, 9, activation="tanh"), nn.Dense(9, 5, has_bias=False)])

    for settings in ({"use_dora": True}, {"lora_bias": True, "target_modules": ["0"]}):
        for trainable in (True, False):
            net = network()
            handle = inject(net, LoraConfig(**{"r": 2, "target_modules": ["0", "1"], **RANDOM, **settings}),
                            trainable=trainable)
            random = np.random.default_rng(5)
            for (path, _), cell in handle.sites.items():
                target = handle.matched().targets[path]
                values = {"down": random.standard_normal((2, cell.base_layer.weight.shape[1])).astype(np.float32),
                          "up": random.standard_normal((cell.base_layer.weight.shape[0], 2)).astype(np.float32)}
                own = random.uniform(0.5, 2, cell.base_layer.weight.shape[0]).astype(np.float32)
                values["magnitude" if target.dora else "up_bias"] = own
                cell.write(0, values, target.scaling)
            h = x.astype(np.float64)
            for path, layer in (("0", net[0]), ("1", net[1])):
                cell = handle.sites.get((path, "lora"))
                dense = cell.base_layer if cell else layer
                weight, bias = dense.weight.asnumpy().astype(np.float64), dense.bias.asnumpy() if dense.has_bias else 0
                if cell:
                    weight = weight + cell.change(0)
                    if settings.get("use_dora"):
                        weight *= (cell.magnitude.asnumpy()[0] / np.sqrt((weight ** 2).sum(1)))[:, None]
                    else:
                        bias = bias + cell.scale.asnumpy()[0] * cell.up_bias.asnumpy()[0]
                h = h @ weight.T + bias
                h = np.tanh(h) if path == "0" else h
            got = net(Tensor(x)).asnumpy()
            assert np.abs(got - h).max() < 1e-4
            handle.merge()
            assert np.abs(net(Tensor(x)).asnumpy() - h).max() < 1e-4
            handle.unmerge()
            handle.save(tmp_path / "dense")
            other = network()
            load_adapter(other, tmp_path / "dense")
            assert np.abs(other(Tensor(x)).asnumpy() - got).max() < 1e-6


def test_refusals(mindspore, tiny_decoder, goldens, tmp_path):
    net = tiny_decoder()
    cells = [type(cell) for _, cell in net.cells_and_names()]
    for config, words in [
            (LoraConfig(use_dora=True, target_modules=["embed_tokens"]), "use_dora is implemented for linears"),
            (LoraConfig(lora_bias=True, target_modules=["embed_tokens", "q_proj"]),
             "lora_bias is implemented for linears"),
            (LoraConfig(init_lora_weights="pissa", target_modules=["embed_tokens"]), "embed_tokens is an embedding"),
            (LoraConfig(init_lora_weights="olora", target_modules=["k_proj"], r=17),
             "k_proj has rank 17, but its weight has only 16 directions")]:
        with pytest.raises(AdapterError, match=words):
            inject(net, config)
        assert [type(cell) for _, cell in net.cells_and_names()] == cells and adapters_of(net) is None
    handle = inject(net, LoraConfig(r=2, target_modules=["q_proj"], **RANDOM), slots=2)
    for config, words in [
            (LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "not prepared for DoRA"),
            (LoraConfig(r=2, lora_bias=True, target_modules=["q_proj"]), "not prepared for a bias on lora_B"),
            (LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]), "on which default rely")]:
        with pytest.raises(AdapterError, match=words):
            handle.add_adapter("new", config)
    assert handle.names == ("default",)
    shutil.copytree(goldens / "peft" / "dora", tmp_path / "dora")
    from safetensors.numpy import save_file

    tensors = load_file(tmp_path / "dora" / WEIGHTS_FILE)
    key = next(key for key in tensors if "magnitude" in key)
    del tensors[key]
    save_file(tensors, tmp_path / "dora" / WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=f"'{key}' of shape .* is missing"):
        load_adapter(build(goldens, "llama"), tmp_path / "dora")


# -- starts from the base ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"up_proj": 7}},
    {"init_lora_weights": "pissa_niter_4", "use_dora": True},
    {"init_lora_weights": "olora"},
])
def test_trained_it_becomes_plain_lora_of_twice_the_rank(mindspore, tiny_decoder, tmp_path, word_tokenizer, settings):
    from mindspore import Tensor

    net = tiny_decoder()
    kept, base = weights_of(net), run(net, [-1] * 3)
    handle = inject(net, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **settings), slots=2,
                    seed=4)
    assert handle.changed_base == "default" and weights_of(net) != kept
    assert np.abs(run(net, handle.slots(3)) - base).max() < 1e-3
    random = np.random.default_rng(0)
    for parameter in handle.trainable_params():
        value = parameter.asnumpy()
        parameter.set_data(Tensor((value + 0.1 * random.standard_normal(value.shape)
                                   * (value != 0)).astype(np.float32)))
    trained = run(net, handle.slots(3))
    handle.save(tmp_path / "plain", as_lora=True)
    for action in (lambda: handle.slots(3, "__base__"), lambda: handle.disable_adapter(),
                   lambda: handle.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"])),
                   lambda: handle.load(tmp_path / "plain", "b")):
        with pytest.raises(AdapterError, match="'default' started from the base weights and changed them"):
            action()
    if "niter" in settings["init_lora_weights"]:
        with pytest.raises(AdapterError, match="random numbers that a PEFT folder does not hold"):
            handle.save(tmp_path / "own")
    else:
        handle.save(tmp_path / "own")
    from colora_ms.decoding import Contrast, Generator

    generator = Generator(net, word_tokenizer, handle, max_rows=2)
    for arguments in ({}, {"adapter": "default", "contrast": Contrast()}):
        with pytest.raises(DecodingError, match="started from the base weights"):
            generator.generate([[3, 4]], max_new_tokens=1, **arguments)
    handle.merge()
    assert np.abs(run(net, handle.slots(3)) - trained).max() < 1e-3
    handle.unmerge()
    handle.delete_adapter("default")
    assert weights_of(net) == kept and np.array_equal(run(net, [-1] * 3), base)
    other = tiny_decoder()
    for name in ("plain", "own"):
        if (tmp_path / name).is_dir():
            again = load_adapter(other, tmp_path / name)
            assert again.config().r == 8 and again.config().init_lora_weights is True
            assert weights_of(other) == kept
            assert np.abs(run(other, again.slots(3)) - trained).max() < 1e-3 * np.abs(trained).max()
            again.unload()


def test_the_start_is_part_of_the_digest(goldens, tmp_path):
    import json

    found = set()
    for start in ("pissa", "olora", True, "gaussian"):
        shutil.copytree(goldens / "peft" / "pissa", tmp_path / str(start))
        path = tmp_path / str(start) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": start}))
        found.add(digest(path.parent))
    assert len(found) == 3


def test_pissa_by_iterations_is_near_the_exact_one():
    from colora_ms.adapters.principal import truncated_svd

    random = np.random.default_rng(0)
    weight = (random.standard_normal((40, 30)) * 0.8 ** np.arange(30)).astype(np.float32)
    exact = np.linalg.svd(weight.astype(np.float64))[1][:5]
    u, s, v = truncated_svd(weight, 5, 8, random)
    assert np.abs(s / exact - 1).max() < 1e-3
    assert np.abs(u.T @ u - np.eye(5)).max() < 1e-5 and np.abs(v @ v.T - np.eye(5)).max() < 1e-5


def test_integer_and_tied_weights_cannot_be_split(mindspore, tiny_decoder):
    from colora_ms.models.decoder import Decoder

    weights = {name: p.asnumpy() for name, p in tiny_decoder().parameters_dict().items()}
    net = Decoder(tiny_decoder().config, weights, weight_format="int8")
    with pytest.raises(AdapterError, match="cannot start: .* is stored as integers"):
        inject(net, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    net = tiny_decoder(tie_word_embeddings=True)
    with pytest.raises(AdapterError, match="lm_head.weight is tied to another module"):
        inject(net, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights="pissa"))
    assert adapters_of(net) is None
