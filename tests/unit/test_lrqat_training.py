"""Quantisation recipes on a tiny decoder: learns, resumes exactly, saves and loads, refuses bad input without leftovers."""

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from colora_ms import runtime
from colora_ms.quantization.config import LrQatConfig
from colora_ms.quantization import quantize
from colora_ms.errors import AdapterError, CheckpointError, ConfigError, DataError
from colora_ms.models import load_model
from colora_ms.training.config import OptimizerConfig
from colora_ms.training.optimizer import AdamW
from colora_ms.training.quantize import QuantizationConfig, quantize_model
from colora_ms.training.text import encode_text, read_text
from colora_ms.training.trainer import Callback

ms.set_context(mode=ms.GRAPH_MODE)


class Letters:
    eos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [3 + ord(letter) % 90 for letter in text]

    def save(self, folder):
        pass


class StopAt(Callback):
    def on_step(self, trainer, record):
        trainer.stopped_by = "a test" if record["step"] == 2 else ""


@pytest.fixture
def recipe(tmp_path, one_layer_model):
    """A function (output, ...) -> QuantizationConfig whose model is the tiny decoder with one layer."""
    one_layer_model(Letters())
    (tmp_path / "train.txt").write_text("abcdefgh abcdefgh. " * 60)

    def make(output="run", adapter=None, train="train.txt", steps=4, **optimizer):
        return QuantizationConfig.from_dict({
            "output": str(tmp_path / output), "adapter": {"r": 4, "lora_alpha": 16, **(adapter or {})},
            "data": {"train": str(tmp_path / train), "max_length": 25, "batch_size": 4},
            "optimizer": {"learning_rate": 0.02, "scale_ratio": 0.05, **optimizer},
            "loop": {"steps": steps, "progress": False}})
    return make


def test_training_lowers_the_loss_and_exports_what_was_trained(recipe, monkeypatch):
    folder, result, quantized = quantize_model(recipe(steps=25, adapter={"bits": 3}))
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3]) - 0.5
    trained = {item.name.rsplit(".", 1)[-1] for item in quantized.trainable_params()}
    assert trained == {"learned_scale", "lrqat_up", "lrqat_down"}
    monkeypatch.undo()
    monkeypatch.setattr("colora_ms.models.tokenizer.load_tokenizer", lambda source: Letters())
    loaded, _ = load_model(str(folder))
    ids = np.random.default_rng(0).integers(3, 90, (3, 7)).astype(np.int32)
    args = Tensor(ids), Tensor(np.array([7, 1, 4], np.int32)), Tensor(np.full(3, -1, np.int32))
    quantized.net.set_train(False)
    np.testing.assert_array_equal(runtime.run(loaded, *args).asnumpy(), runtime.run(quantized.net, *args).asnumpy())


def test_resuming_is_exact(recipe):
    whole = quantize_model(recipe("a"))
    with pytest.raises(KeyboardInterrupt):
        quantize_model(recipe("b"), callbacks=[StopAt()])
    rest = quantize_model(recipe("b"), resume=True)
    assert rest[1].losses == whole[1].losses[2:]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (whole[0].parent / name).read_bytes() == (rest[0].parent / name).read_bytes()


def test_saved_values_load_into_another_model_and_misfits_are_refused(tiny_decoder, tmp_path):
    config = LrQatConfig(bits=4, r=3)
    first = quantize(tiny_decoder(num_hidden_layers=1), config, seed=1)
    for item in first.trainable_params():
        item.set_data(item + 0.25)
    first.save(tmp_path / "values")
    second = quantize(tiny_decoder(num_hidden_layers=1), config, seed=2)
    before = [item.asnumpy() for item in second.trainable_params()]
    second.load(tmp_path / "values")
    for one, other, old in zip(first.trainable_params(), second.trainable_params(), before):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy())
        assert np.abs(old - other.asnumpy()).max() > 0.1
    third = quantize(tiny_decoder(num_hidden_layers=2), LrQatConfig(bits=3, r=3))
    with pytest.raises(AdapterError, match="bits is 4 there, 3 here.*layers.1.*missing"):
        third.load(tmp_path / "values")


def test_the_optimizer_gives_scales_their_own_rate_and_no_decay(tiny_decoder):
    quantized = quantize(tiny_decoder(num_hidden_layers=1), LrQatConfig(r=2, target_modules=["q_proj"]))
    params = quantized.trainable_params()
    config = OptimizerConfig(learning_rate=0.5, schedule="constant", warmup_ratio=0.0, scale_ratio=0.01,
                             weight_decay=0.1, max_grad_norm=None)
    optimizer = AdamW(params, config)
    before = {item.name: item.asnumpy().copy() for item in params}
    grads = tuple(Tensor(np.ones(item.shape, np.float32)) for item in optimizer.trained)
    runtime.run(optimizer, grads, Tensor(1.0, ms.float32), optimizer.hyper(1, 10))
    for item in params:
        old = before[item.name]
        expected = old - 0.005 if item.name.endswith("learned_scale") else old - 0.5 * (1 + 0.1 * old)
        np.testing.assert_allclose(item.asnumpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"bits": 5}, "bits is 5, expected one of 8, 4, 3, 2"), ({"bits": 4, "symmetric": False}, "asymmetric grid of 4 bits"),
    ({"group": 0}, "group is 0"), ({"bits": 8, "downcast": "fixed"}, "no fractional bits|fractional"),
    ({"downcast": "fixd"}, "Did you mean 'fixed'"), ({"activations": "a9"}, "a8, a8kv4, a4"),
    ({"method": "lrqt", "r": 0, "lora_alpha": -1.0}, "method.*r is 0.*lora_alpha is -1.0"),
    ({"rang_norm": 2}, "Did you mean 'range_norm'"), ({"target_modules": "q_proj"}, "list of names")])
def test_settings_that_cannot_be_used_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        LrQatConfig.from_dict(change)


def test_a_group_that_does_not_divide_leaves_the_model_alone(tiny_decoder):
    net = tiny_decoder()
    before = {name: cell for name, cell in net.cells_and_names()}
    with pytest.raises(ConfigError, match="group 12 does not divide the 32 inputs of .*q_proj; these would: 32, 16, 8"):
        quantize(net, LrQatConfig(group=12))
    with pytest.raises(ConfigError, match="'k_poj'; there are down_proj.*Did you mean 'k_proj'"):
        quantize(net, LrQatConfig(target_modules=["q_proj", "k_poj"]))
    assert {name: cell for name, cell in net.cells_and_names()} == before
    quantize(net, LrQatConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="has adapters|q_proj"):
        quantize(net, LrQatConfig(target_modules=["q_proj"]))


def test_calibration_data_with_nothing_in_it_is_refused_before_anything_is_written(recipe, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "short.txt").write_text("abc")
    for name, words in (("empty.txt", "is empty"), ("short.txt", "3 tokens, which do not fill a window of 25"),
                        ("none.txt", "cannot be read")):
        with pytest.raises(DataError, match=words):
            quantize_model(recipe("never", train=name))
        assert not (tmp_path / "never").exists()
    with pytest.raises(ConfigError, match="float weights"):
        QuantizationConfig.from_dict({"model": "x", "weight_format": "int4", "output": "x", "adapter": {},
                                      "data": {"train": "x"}, "loop": {"steps": 1}})


def test_a_run_is_not_overwritten(recipe):
    quantize_model(recipe(adapter={"method": "rtn", "downcast": "int"}))
    with pytest.raises(CheckpointError, match="holds a run already"):
        quantize_model(recipe())


def test_windows_share_one_token_and_cover_the_text(tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz"
    found = encode_text(text, Letters(), 6)
    ids = Letters().encode(text)
    assert [list(item.ids) for item in found.items] == [ids[k:k + 6] for k in range(0, 21, 5)]
    assert all((item.labels == item.ids).all() for item in found.items)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_text(tmp_path / "latin.txt")
