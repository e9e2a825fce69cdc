"""Training a real adapter on a tiny decoder: learns, resumes exactly, and its folder loads again."""

import json

import numpy as np
import pytest

import mindspore as ms
from mindspore import Tensor

from colora_ms.adapters import LoraConfig, adapters_of, load_adapter
from colora_ms.models.config import DecoderConfig
from colora_ms.models.decoder import Decoder
from colora_ms.training import run as module
from colora_ms.training.config import TrainingConfig
from colora_ms.training.trainer import Callback

ms.set_context(mode=ms.GRAPH_MODE)


class LetterTokenizer:
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 40 for letter in text]


def tiny_decoder():
    return Decoder(DecoderConfig(
        model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=64))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose model is the tiny decoder."""
    monkeypatch.setattr("colora_ms.models.load_model",
                        lambda name, weight_format: (tiny_decoder(), LetterTokenizer()))
    rows = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abcdefgh" * 4]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))

    def make(output, steps=30, **loop):
        return TrainingConfig.from_dict({
            "output": str(tmp_path / output), "adapter": {"r": 4, "lora_alpha": 16,
                                                          "target_modules": "all-linear"},
            "data": {"train": str(tmp_path / "train.jsonl"), "batch_size": 8, "buckets": [24],
                     "validation": str(tmp_path / "valid.jsonl")},
            "optimizer": {"learning_rate": 0.05},
            "loop": {"steps": steps, "progress": False, **loop}})
    return make


class Stop(Callback):
    def on_step(self, trainer, record):
        trainer.stopped_by = "a test" if record["step"] == 3 else ""


def logits_of(net, handle):
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    return net(Tensor(ids), Tensor(np.array([8, 5], np.int32)), handle.slots(2)).asnumpy()


def test_a_trained_adapter_learns_and_loads_again(recipe):
    seen = {}

    class Keep(Callback):
        def on_end(self, trainer, result):
            seen["decoder"] = trainer.stepper.loss_cell.decoder
    result = module.train(recipe("run"), callbacks=[Keep()])
    # Random weights of size 0.02 leave the frozen head little to say: the loss can fall this far only.
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3]) - 0.03
    files = {item.name for item in result.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    plain, trained = tiny_decoder(), tiny_decoder()
    handle = load_adapter(trained, str(result.adapter))
    own = seen["decoder"]
    own.set_train(False)
    if result.best_step == result.steps:
        np.testing.assert_array_equal(logits_of(own, adapters_of(own)), logits_of(trained, handle))
    base = plain(Tensor(np.arange(16, dtype=np.int32).reshape(2, 8)),
                 Tensor(np.array([8, 5], np.int32)), Tensor(np.array([-1, -1], np.int32))).asnumpy()
    assert np.abs(base - logits_of(trained, handle))[:, :5].max() > 0.1


def test_an_adapter_that_started_from_the_base_loads_on_the_untouched_one(recipe):
    """PiSSA with DoRA and LoRA+: the run's folder is plain, and holds what the run computed."""
    seen = {}

    class Keep(Callback):
        def on_end(self, trainer, result):
            seen["decoder"] = trainer.stepper.loss_cell.decoder
    config = recipe("run", steps=4)
    config.adapter.update(init_lora_weights="pissa", use_dora=True, target_modules=["q_proj", "up_proj"])
    config.optimizer.loraplus_lr_ratio = 4.0
    result = module.train(config, callbacks=[Keep()])
    settings = json.loads((result.adapter / "adapter_config.json").read_text())
    assert settings["r"] == 8 and settings["init_lora_weights"] is True and settings["use_dora"] is True
    own = seen["decoder"].set_train(False)
    trained = tiny_decoder()
    handle = load_adapter(trained, str(result.adapter))
    expected = logits_of(own, adapters_of(own))
    if result.best_step == result.steps:
        np.testing.assert_allclose(logits_of(trained, handle)[:, :5], expected[:, :5], atol=1e-4)
    handle.disable_adapter()
    assert np.abs(logits_of(trained, handle) - expected)[:, :5].max() > 1e-3, "the run must have changed something"


def test_resuming_with_a_real_adapter_is_exact(recipe):
    whole = module.train(recipe("a", steps=6))
    with pytest.raises(KeyboardInterrupt):
        module.train(recipe("b", steps=6), callbacks=[Stop()])
    rest = module.train(recipe("b", steps=6), resume=True)
    assert rest.losses == whole.losses[3:]
    a, b = (folder.parent / "adapter" / "adapter_model.safetensors"
            for folder in (whole.adapter, rest.adapter))
    assert a.read_bytes() == b.read_bytes()


def test_the_quick_start_recipe_is_valid_and_its_test_items_are_new():
    pytest.importorskip("reasoning_gym")
    from pathlib import Path

    from colora_ms.training.data import load_examples, without_overlap
    path = Path(__file__).parents[2] / "model_zoo" / "smollm2-135m" / "quickstart.yaml"
    config = TrainingConfig.from_yaml(path)
    train, _, removed = module.load_data(config)
    test = load_examples(config.data.held_out)
    assert len(test) >= 100 and 0 < removed < 0.1 * len(train)
    assert len(without_overlap(train, test)[0]) == len(train)
    assert config.adapter_config() == LoraConfig(**config.adapter)
