"""LR-QAT on a tiny decoder: gradients against float64 differences, exact export, loading, LoRA and contrast on top."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms import runtime
from colora_ms.errors import AdapterError
from colora_ms.kernels import ABSENT
from colora_ms.models import load_model
from colora_ms.quantization import quantize
from colora_ms.quantization.cells import QuantizedMatmul, round_to_nearest
from colora_ms.quantization.config import LrQatConfig
from colora_ms.quantization.grids import downcast, search_range

ms.set_context(mode=ms.GRAPH_MODE)


class Gradients(nn.Cell):
    """y and all gradients of sum(y * weight)."""

    def __init__(self, matmul):
        super().__init__(auto_prefix=False)
        self.matmul = matmul
        self.grad = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *args):
        return self.grad(self.matmul)(*args)


def surrogate_gradients(x, phi, up, down, scale, scaling, low, levels, group, sens, full):
    """Finite differences, float64, of the straight-through surrogate around the given point.

    round and clip are replaced by their value at the point plus the mask times the change of their argument.
    """
    def z_of(phi, up, down):
        return (phi if full else phi + scaling * up @ down).reshape(-1, group)

    z0 = z_of(phi, up, down)
    rounded = np.rint(z0)
    q0 = np.clip(rounded, low, low + levels)
    mask = (rounded == q0).astype(np.float64)

    def loss(x, phi, up, down, scale):
        q = q0 + mask * (z_of(phi, up, down) - z0)
        weight = (q * scale.reshape(-1, 1)).reshape(phi.shape)
        return (sens * (x @ weight.T)).sum()

    values, gradients = [x, phi, up, down, scale], []
    for i, value in enumerate(values):
        gradient = np.zeros_like(value)
        for place in np.ndindex(*value.shape):
            ends = []
            for sign in (1, -1):
                moved = [v.copy() for v in values]
                moved[i][place] += sign * 1e-3
                ends.append(loss(*moved))
            gradient[place] = (ends[0] - ends[1]) / 2e-3
        gradients.append(gradient)
    return q0.reshape(phi.shape), gradients


@pytest.mark.parametrize("bits, group, symmetric, method, how", [
    (4, None, True, "lrqat", "fixed"), (3, 2, True, "lrqat", "float"), (2, 5, False, "lrqat", "fixed"),
    (8, None, True, "lrqat", "int"), (2, None, True, "lrqat", "int"), (4, 5, True, "full", "float")])
def test_gradients_are_those_of_the_straight_through_surrogate(bits, group, symmetric, method, how):
    rng = np.random.default_rng(bits)
    out, inner, r, tokens = 3, 10, 2, 5
    config = LrQatConfig(bits=bits, group=group, symmetric=symmetric, method=method, downcast=how, r=r, lora_alpha=3)
    grid, size = config.grid, config.grid.group_of(inner)
    weight = rng.standard_normal((out, inner)).astype(np.float32)
    rows = grid.rows(weight)
    scale, low = search_range(rows, grid)
    scale = scale * np.float32(0.7)  # so that some weights lie outside the grid
    stored = downcast(rows, scale, low, grid, how).reshape(out, inner)
    phi = stored.astype(np.float64)
    if how == "fixed":
        shift = np.repeat((low - grid.lowest)[:, None], size, 1).reshape(out, inner)
        phi = phi * 2.0 ** (bits - 8) + shift
    up, down = rng.standard_normal((out, r)) * 0.4, rng.standard_normal((r, inner)) * 0.7
    x, sens = rng.standard_normal((1, tokens, inner)), rng.standard_normal((1, tokens, out))
    x, sens, up, down = (v.astype(np.float32).astype(np.float64) for v in (x, sens, up, down))
    full = method == "full"
    z = (phi + (0 if full else config.scaling * up @ down))
    assert np.abs(z - np.floor(z) - 0.5).min() > 1e-4, "a tie would make the comparison depend on the last bit"
    if how == "int":
        phi = phi + (np.rint(config.scaling * up @ down) - config.scaling * up @ down)
    q, (dx, dphi, dup, ddown, dscale) = surrogate_gradients(
        x[0], phi, up, down, scale.astype(np.float64), config.scaling, low[:, None], grid.levels, size, sens[0], full)
    matmul = QuantizedMatmul(grid, out, inner, how, None if full else config.scaling)
    f32 = lambda v: Tensor(np.asarray(v, np.float32))  # noqa: E731
    factors = (ABSENT, ABSENT) if full else (f32(up), f32(down))
    found = runtime.run(Gradients(matmul), f32(x), Tensor(np.array([-1], np.int32)), Tensor(stored), f32(low[:, None]),
                        *factors, f32(scale.reshape(out, -1)), ABSENT, f32(sens))
    assert 0 < (np.abs(q) > 0).mean() and (q == low.repeat(size).reshape(out, inner)).any()
    pairs = [(found[0].asnumpy()[0], dx), (found[6].asnumpy().reshape(-1), dscale)]
    pairs += [(found[2].asnumpy(), dphi)] if full else [(found[4].asnumpy(), dup), (found[5].asnumpy(), ddown)]
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


# -- whole models ----------------------------------------------------------------------------------


def batch(rows=2, tokens=9):
    ids = np.random.default_rng(3).integers(3, 97, (rows, tokens)).astype(np.int32)
    return Tensor(ids), Tensor(np.array([tokens, tokens - 4][:rows], np.int32)), Tensor(np.full(rows, -1, np.int32))


def disturb(quantized, seed=1):
    """Give the trained values something to say."""
    rng = np.random.default_rng(seed)
    for item in quantized.trainable_params():
        change = rng.standard_normal(item.shape).astype(np.float32)
        if item.name.endswith("learned_scale"):
            item.set_data(Tensor(item.asnumpy() * np.exp(0.1 * change)))
        else:
            item.set_data(Tensor(item.asnumpy() + 0.3 * change))


@pytest.mark.parametrize("settings", [
    dict(bits=4), dict(bits=4, group=16), dict(bits=8), dict(bits=3, group=8, downcast="float"), dict(bits=2),
    dict(bits=2, group=16, downcast="int"), dict(bits=8, activations="a8"), dict(bits=4, activations="a8kv4"),
    dict(bits=4, method="full"), dict(bits=3, method="scales")], ids=str)
def test_the_exported_model_equals_the_training_forward_bit_for_bit(tiny_decoder, tmp_path, settings, word_tokenizer,
                                                                    monkeypatch):
    net = tiny_decoder(num_hidden_layers=1)
    quantized = quantize(net, LrQatConfig(r=3, lora_alpha=6, **settings))
    disturb(quantized)
    args = batch()
    expected = runtime.run(net, *args).asnumpy()
    quantized.export(tmp_path / "model")
    monkeypatch.setattr("colora_ms.models.tokenizer.load_tokenizer", lambda source: word_tokenizer)
    loaded, _ = load_model(str(tmp_path / "model"))
    np.testing.assert_array_equal(runtime.run(loaded, *args).asnumpy(), expected)
    assert np.isfinite(expected).all() and expected.std() > 0.01
    names = {item.name for item in loaded.get_parameters()}
    assert {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight_scale"} <= names


def test_round_to_nearest_is_where_training_with_integers_starts(tiny_decoder):
    weight = tiny_decoder().model.layers[0].mlp.up_proj.weight.asnumpy()
    for bits in (8, 4, 3, 2):
        config = LrQatConfig(bits=bits, downcast="int", r=2)
        quantized = quantize(tiny_decoder(), config)
        found = quantized.exported("model.layers.0.mlp.up_proj")
        expected = round_to_nearest(weight, config)
        assert found.format is expected.format and found.format.name == ("int4" if bits <= 4 else "int8")
        np.testing.assert_array_equal(found.data, expected.data)
        np.testing.assert_array_equal(found.scale, expected.scale)
        q = found.integers()
        spread = q.max(1).astype(int) - q.min(1)
        assert spread.max() <= 2 ** bits - 1 and spread.max() > 2 ** bits // 2


def test_lora_and_the_contrast_answer_on_top_of_the_exported_model(tiny_decoder, tmp_path, word_tokenizer, monkeypatch):
    from colora_ms import Contrast, Generator, LoraConfig, inject
    quantize(tiny_decoder(num_hidden_layers=1), LrQatConfig(bits=4, r=2)).export(tmp_path / "w4")
    monkeypatch.setattr("colora_ms.models.tokenizer.load_tokenizer", lambda source: word_tokenizer)
    net, tokenizer = load_model(str(tmp_path / "w4"))
    assert net.model.layers[0].mlp.up_proj.weight.dtype == ms.uint8
    handle = inject(net, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False))
    args = batch()[:2]
    base = runtime.run(net, *args, Tensor(np.array([-1, -1], np.int32))).asnumpy()
    adapted = runtime.run(net, *args, handle.slots(2)).asnumpy()
    assert np.abs(adapted - base).max() > 1e-3
    generator = Generator(net, tokenizer, handle)
    answers = generator.generate([[5, 6, 7]] * 2, adapter="default", contrast=[None, Contrast(0.5, 1.0)],
                                 max_new_tokens=4, records=True)
    assert all(len(answer.tokens) > 0 for answer in answers)


def test_a_damaged_quantised_folder_is_refused(tiny_decoder, tmp_path):
    from safetensors.numpy import load_file, save_file

    from colora_ms.errors import CheckpointError
    from colora_ms.models.checkpoint import open_checkpoint
    folder = tmp_path / "w4"
    quantized = quantize(tiny_decoder(num_hidden_layers=1), LrQatConfig(bits=4, method="rtn"))
    quantized.export(folder)
    stored, plain = quantized.sizes()
    assert stored == sum(v.nbytes for k, v in load_file(folder / "model.safetensors").items()
                         if k.endswith("_scale") or v.dtype == np.uint8) < 0.25 * plain
    with pytest.raises(CheckpointError, match="exists already"):
        quantized.export(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for change, words in (({name + "_scale": None}, "holds integers, but there is no"),
                          ({name: tensors[name].astype(np.float32)}, "holds no integers"),
                          ({name + "_scale": tensors[name + "_scale"][:, [0] * 5]}, "groups that divides 32")):
        broken = {k: v for k, v in {**tensors, **change}.items() if v is not None}
        save_file({k: np.ascontiguousarray(v) for k, v in broken.items()}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(str(folder))


def test_a_decomposed_model_is_refused_before_anything_changes(tiny_decoder):
    from colora_ms.decomposition import LrdPlan, decompose

    net = tiny_decoder()
    decompose(net, LrdPlan([0], "mlp", 2))
    with pytest.raises(AdapterError, match="decomposed into factors, which are not quantised"):
        quantize(net, LrQatConfig(method="rtn", bits=4, downcast="int"))
