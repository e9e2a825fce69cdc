"""Lily on a whole decoder: training from a recipe, causality and batch invariance, generation with the contrast."""

import json

import numpy as np
import pytest

from colora_ms.adapters import LilyConfig, adapters_of, inject, load_adapter
from colora_ms.decoding import Contrast, Generator
from colora_ms.errors import ConfigError
from colora_ms.training import run as module
from colora_ms.training.config import TrainingConfig
from colora_ms.training.trainer import Callback

IDS = np.array([[3, 14, 15, 92, 65, 35, 8], [8, 9, 7, 9, 3, 2, 1], [27, 18, 28, 18, 28, 4, 5]], np.int32)


def logits(net, ids, lengths, slots):
    from mindspore import Tensor

    return net(Tensor(np.ascontiguousarray(ids)), Tensor(np.array(lengths, np.int32)), slots).asnumpy()


def lily(pool="token", **changes):
    values = dict(r=4, stride_A=2, num_B=3, scaling=1.0, router_pool=pool, init_weights=False,
                  target_modules=["q_proj", "v_proj", "down_proj"])
    return LilyConfig(**{**values, **changes})


def test_token_pooling_is_causal_and_ignores_the_batch(mindspore, tiny_decoder):
    net = tiny_decoder()
    handle = inject(net, lily(), seed=1, trainable=False)
    full = logits(net, IDS, [7, 7, 7], handle.slots(3))
    changed = IDS.copy()
    changed[:, 5:] = 50  # later tokens
    changed[1:] = 11  # and the other rows
    again = logits(net, changed, [7, 7, 7], handle.slots(3, ["default", "__base__", "default"]))
    assert np.array_equal(full[0, :5], again[0, :5])
    assert np.abs(full[0, 5:] - again[0, 5:]).max() > 1e-2
    assert np.array_equal(logits(net, IDS[:1], [7], handle.slots(1)), full[:1])


@pytest.mark.parametrize("pool", ["sequence", "batch"])
def test_pools_leave_padding_out_and_do_depend_on_what_they_pool(mindspore, tiny_decoder, pool):
    net = tiny_decoder()
    plain = logits(net, IDS, [4, 7, 6], mindspore.Tensor(np.full(3, -1, np.int32)))
    handle = inject(net, lily(pool), seed=1)
    full = logits(net, IDS, [4, 7, 6], handle.slots(3))
    padding = IDS.copy()
    padding[0, 4:], padding[2, 6:] = 77, 78
    again = logits(net, padding, [4, 7, 6], handle.slots(3))
    for row, length in enumerate([4, 7, 6]):
        assert np.abs(full[row, :length] - again[row, :length]).max() < 1e-4
    later = IDS.copy()
    later[1, 6] = 50
    assert np.abs(logits(net, later, [4, 7, 6], handle.slots(3))[1, :6] - full[1, :6]).max() > 1e-4
    others = np.abs(logits(net, later, [4, 7, 6], handle.slots(3))[0, :4] - full[0, :4]).max()
    assert others > 1e-5 if pool == "batch" else others < 1e-6
    assert np.abs(logits(net, IDS, [4, 7, 6], handle.slots(3, "__base__")) - plain).max() == 0
    handle.unload()
    assert type(net.model).__name__ == "DecoderModel"
    assert np.array_equal(logits(net, IDS, [4, 7, 6], mindspore.Tensor(np.full(3, -1, np.int32))), plain)


@pytest.mark.parametrize("pool", ["token", "static"])
def test_generation_with_the_contrast(mindspore, tiny_decoder, word_tokenizer, tmp_path, pool):
    """The cached loop against whole forwards; contrastive, greedy and base requests in one batch."""
    inject(tiny_decoder(), lily(pool, scaling=2.0), seed=1).save(tmp_path / "lily")
    net = tiny_decoder()
    handle = load_adapter(net, tmp_path / "lily")
    generator = Generator(net, word_tokenizer, handle)
    prompts = ["3 14 15 92", "8 9 7", "27 18 28 18 28 4"]
    answers = generator.generate(prompts, adapter=["lily", "lily", None], contrast=[Contrast(0.05, 1.0), None, None],
                                 max_new_tokens=6, ignore_eos=True, records=True)
    for i, prompt in enumerate(prompts):
        ids = [int(word) for word in prompt.split()]
        slot = [["lily"], ["lily"], ["__base__"]][i]
        for token in answers[i].tokens:
            row = np.array([ids], np.int32)
            expert = logits(net, row, [len(ids)], handle.slots(1, slot))[0, -1]
            score = expert
            if i == 0:
                amateur = logits(net, row, [len(ids)], handle.slots(1, "__base__"))[0, -1]
                score = np.where(expert >= np.log(0.05) + expert.max(), 2.0 * expert - amateur, -np.inf)
            best = np.sort(score)[-2:]
            if best[1] - best[0] < 1e-3:
                break
            assert token == score.argmax()
            ids.append(int(token))
    alone = Generator(tiny_decoder(), word_tokenizer).generate(prompts[2], max_new_tokens=6, ignore_eos=True,
                                                               records=True)
    assert answers[2].tokens == alone[0].tokens
    assert [r.expert for r in answers[2].records] == [r.expert for r in alone[0].records]


class LetterTokenizer:
    eos_token_id = 0

    def encode(self, text, add_special_tokens=True):
        return [1 + ord(letter) % 40 for letter in text]


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_decoder):
    """A function that makes a recipe of a Lily adapter on the tiny decoder."""
    monkeypatch.setattr("colora_ms.models.load_model", lambda name, weight_format: (tiny_decoder(), LetterTokenizer()))
    rows = [{"prompt": f"say {letter}", "completion": letter * 3} for letter in "abcdefgh" * 4]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(output, steps=20, **adapter):
        return TrainingConfig.from_dict({
            "output": str(tmp_path / output),
            "adapter": {"method": "lily", "r": 4, "stride_A": 2, "num_B": 2, "target_modules": ["q_proj", "v_proj"],
                        **adapter},
            "data": {"train": str(tmp_path / "train.jsonl"), "batch_size": 8, "buckets": [24]},
            "optimizer": {"learning_rate": 0.02}, "loop": {"steps": steps, "progress": False}})
    return make


class Stop(Callback):
    def on_step(self, trainer, record):
        trainer.stopped_by = "a test" if record["step"] == 3 else ""


class Keep(Callback):
    def on_end(self, trainer, result):
        self.decoder = trainer.stepper.loss_cell.decoder


def test_a_recipe_trains_lily_and_resumes_exactly(recipe, tiny_decoder):
    keep = Keep()
    result = module.train(recipe("run"), callbacks=[keep])
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3]) - 0.3
    own = keep.decoder
    trained = tiny_decoder()
    handle = load_adapter(trained, result.adapter)
    assert handle.config().router_pool == "token"
    own.set_train(False)
    ours = logits(own, IDS, [7, 5, 7], adapters_of(own).slots(3))
    assert np.abs(ours - logits(trained, IDS, [7, 5, 7], handle.slots(3))).max() < 1e-3
    assert np.abs(ours - logits(trained, IDS, [7, 5, 7], handle.slots(3, "__base__"))).max() > 1e-2
    with pytest.raises(KeyboardInterrupt):
        module.train(recipe("stopped"), callbacks=[Stop()])
    resumed = module.train(recipe("stopped"), resume=True)
    assert resumed.losses == result.losses[3:]


def test_static_weights_train_through_the_fused_operator(recipe):
    result = module.train(recipe("static", router_pool="static"))
    assert np.mean(result.losses[-3:]) < np.mean(result.losses[:3]) - 0.3
    assert json.loads((result.adapter / "adapter_config.json").read_text())["router_pool"] == "static"


@pytest.mark.parametrize("change, expected", [
    ({"method": "lilly"}, "peft_type 'LILLY' in section adapter is not implemented; known: LILY, LORA. Did you mean "
                          "'LILY'"),
    ({"method": 3}, "peft_type 3 in section adapter"),
    ({"lora_alpha": 3}, "section adapter has no setting 'lora_alpha'; it has method, r, stride_A"),
    ({"num_B": 1}, "num_B is 1"),
])
def test_unusable_adapter_sections_are_named(recipe, change, expected):
    with pytest.raises(ConfigError, match=expected):
        recipe("never", **change)
