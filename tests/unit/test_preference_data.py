"""Preference pairs from records to batches, and a run of ``train: dpo`` from its recipe to its adapter."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_decoder import LetterTokenizer, Stop, tiny_decoder

from colora_ms.adapters import adapters_of, load_adapter
from colora_ms.errors import CheckpointError, ConfigError, DataError
from colora_ms.recipes.training import differences
from colora_ms.training import run as module
from colora_ms.training.config import PreferenceConfig, TrainingConfig
from colora_ms.training.data import encode_examples, make_template
from colora_ms.training.encoding import IGNORE, EncodedExample
from colora_ms.training.row_reader import example_from_record
from colora_ms.training.preference_data import EncodedPair, PairLoader, encode_preferences
from colora_ms.training.quantize import QuantizationConfig
from colora_ms.training.report import read_log
from colora_ms.training.trainer import Callback

USER, GOOD, BAD = ({"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"},
                   {"role": "assistant", "content": "5"})


# -- records -----------------------------------------------------------------------------------------------------------


def pairs_of(records):
    return [example_from_record(record, f"data:{number}") for number, record in enumerate(records, 1)]


@pytest.mark.parametrize("record", [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]}])
def test_pairs_of_messages_become_the_rows_of_pairs_of_texts(record):
    plain, = encode([{"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}]).items
    pair, = encode([record]).items
    for side in ("chosen", "rejected"):
        np.testing.assert_array_equal(getattr(pair, side).ids, getattr(plain, side).ids)
        np.testing.assert_array_equal(getattr(pair, side).labels, getattr(plain, side).labels)


def encode(records, **options):
    options = {"max_length": 40, **options}
    template = make_template("{prompt}={completion}", None)
    return encode_preferences(pairs_of(records), LetterTokenizer(), template, **options)


def test_both_answers_are_encoded_as_examples_are():
    records = [{"prompt": f"say {k}", "chosen": "ab" * k, "rejected": "cde"} for k in (1, 2, 5)]
    encoded = encode(records)
    pairs = pairs_of(records)
    for side in ("chosen", "rejected"):
        want = encode_examples([getattr(pair, f"{side}_example") for pair in pairs], LetterTokenizer(),
                               make_template("{prompt}={completion}", None), 40)
        for item, alone in zip(encoded.items, want.items):
            np.testing.assert_array_equal(getattr(item, side).ids, alone.ids)
            np.testing.assert_array_equal(getattr(item, side).labels, alone.labels)
            assert getattr(item, side).labels[-1] == LetterTokenizer.eos_token_id
    assert [len(item) for item in encoded.items] == [10, 11, 17]
    assert encoded.summary().startswith("3 pairs of answers, 10 to 17")


def test_a_pair_with_an_answer_that_is_too_long_is_left_out_and_said():
    records = [{"prompt": "p", "chosen": "a" * n, "rejected": "b" * m, "id": f"{n}-{m}"}
               for n, m in ((3, 4), (30, 4), (3, 31))]
    encoded = encode(records, max_length=20)
    assert [item.index for item in encoded.items] == [0] and encoded.skipped == ["30-4", "3-31"]
    assert "skipped 2 longer than 20 tokens (longest 34)" in encoded.summary()
    with pytest.raises(DataError, match="example 30-4#chosen has 33 tokens"):
        encode(records, max_length=20, on_long="error")
    with pytest.raises(DataError, match="none of the 2 pairs can be used: in 2 an answer with its prompt is longer than "
                                        "max_length=20"):
        encode(records[1:], max_length=20)


def test_equal_answers_are_refused_with_their_number():
    records = [{"prompt": "p", "chosen": "a", "rejected": "b" if k % 2 else "a", "id": f"n{k}"} for k in range(14)]
    with pytest.raises(DataError, match="7 of 14 preference pairs cannot be used: pair n0: the chosen and the rejected "
                                        "answer are equal; pair n2.*and 2 more"):
        encode(records)
    same = [{"prompt": "p", "chosen": "a", "rejected": chr(ord("a") + 40)}]  # 40 letters further have the same ids
    with pytest.raises(DataError, match="1 of 1 .*have the same tokens"):
        encode(same)


# -- batches -----------------------------------------------------------------------------------------------------------


def encoded_pairs(lengths):
    def example(length, first):
        ids = (np.arange(length) + first).astype(np.int32)
        return EncodedExample(ids, np.where(np.arange(length) < 1, IGNORE, ids).astype(np.int32))
    return [EncodedPair(example(one, 100 * k), example(other, 100 * k + 50), k)
            for k, (one, other) in enumerate(lengths)]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=25),
       size=st.integers(1, 5), world=st.integers(1, 3), buckets=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_pair_is_seen_once_with_both_answers_together(lengths, size, world, buckets, seed):
    items = encoded_pairs(lengths)
    seen = []
    for rank in range(world):
        loader = PairLoader(items, size, seed, max_buckets=buckets, multiple=8, rank=rank, world=world)
        for batch in loader.epoch_batches():
            assert batch.ids.shape == batch.labels.shape and batch.ids.shape[0] == 2 * size
            assert batch.ids.shape[1] in loader.buckets
            for row in range(0, 2 * size, 2):
                if batch.labels[row].max() == IGNORE:  # fills up
                    assert batch.labels[row + 1].max() == IGNORE and batch.lengths[row] == batch.lengths[row + 1] == 0
                    continue
                number = batch.ids[row, 0] // 100
                for half, which in ((items[number].chosen, row), (items[number].rejected, row + 1)):
                    length = len(half) - 1
                    np.testing.assert_array_equal(batch.ids[which, :length], half.ids[:-1])
                    np.testing.assert_array_equal(batch.labels[which, :length], half.labels[1:])
                    assert batch.lengths[which] == length and (batch.labels[which, length:] == IGNORE).all()
                seen.append(number)
    assert sorted(seen) == list(range(len(items)))


def test_the_order_is_restored_and_other_pairs_are_refused():
    items = encoded_pairs([(5, 7)] * 9)
    whole = PairLoader(items, 2, 3)
    assert whole.summary().startswith("5 an epoch, of 2 pairs each: 4 rows of 16 tokens")
    batches = [whole.next() for _ in range(12)]
    half = PairLoader(items, 2, 3)
    for _ in range(7):
        half.next()
    again = PairLoader(items, 2, 3)
    again.restore(json.loads(json.dumps(half.state())))
    for want in batches[7:]:
        got = again.next()
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.labels, want.labels)
    turned = [EncodedPair(item.rejected, item.chosen, item.index) for item in items]
    with pytest.raises(CheckpointError, match="data is"):
        PairLoader(turned, 2, 3).restore(half.state())


# -- recipes -----------------------------------------------------------------------------------------------------------


def recipe_of(**changes):
    return TrainingConfig.from_dict({"output": "out", "data": {"train": "t.jsonl"}, "loop": {"steps": 1}, **changes})


def test_the_section_is_read_with_its_defaults():
    assert recipe_of().train == "sft" and recipe_of().dpo is None
    assert recipe_of(train="dpo").dpo == PreferenceConfig(0.1, "sigmoid", 0.0, False)
    config = recipe_of(train="dpo", dpo={"beta": "5e-2", "label_smoothing": 0.1, "length_normalised": True})
    assert config.dpo == PreferenceConfig(0.05, "sigmoid", 0.1, True)
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("changes, words", [
    ({"train": "rlhf"}, "train is 'rlhf', expected one of sft, dpo"),
    ({"train": "dpo", "dpo": {"betta": 1}}, "section dpo has no setting 'betta'.*Did you mean 'beta'"),
    ({"train": "dpo", "dpo": {"beta": 0}}, "beta is 0.0, expected a number above 0"),
    ({"train": "dpo", "dpo": {"loss": "kto"}}, "loss is 'kto', expected one of sigmoid, ipo"),
    ({"train": "dpo", "dpo": {"label_smoothing": 0.5}}, "label_smoothing is 0.5, expected a number from 0 to"),
    ({"train": "dpo", "dpo": {"label_smoothing": 0.1, "loss": "ipo"}}, "label_smoothing is 0.1, which loss ipo does not"),
    ({"train": "dpo", "dpo": {"length_normalised": "yes"}}, "length_normalised is 'yes'"),
    ({"train": "dpo", "dpo": 5}, "section dpo is 5, expected settings"),
    ({"dpo": {"beta": 0.1}}, "section dpo is given, but train is sft"),
    ({"train": "dpo", "data": {"train": "t.jsonl", "packing": True}}, "data.packing joins examples"),
    ({"train": "dpo", "data": {"train": "t.jsonl", "loss": "all"}}, "data.loss is all, but with train: dpo only"),
    ({"train": "dpo", "adapter": {"r": 4, "init_lora_weights": "pissa"}}, "init_lora_weights is 'pissa', which changes"),
])
def test_mistakes_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        recipe_of(**changes)


def test_a_quantisation_has_no_reference():
    with pytest.raises(ConfigError, match="train is dpo: a quantised model has no adapter"):
        QuantizationConfig.from_dict({"output": "o", "train": "dpo", "adapter": {"method": "rtn"},
                                      "data": {"train": "t"}, "loop": {"steps": 1}})


def test_runs_from_before_preference_training_are_known_again(tmp_path):
    config = recipe_of()
    import yaml
    old = {key: value for key, value in config.to_dict().items() if key not in ("train", "dpo")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
    assert differences(tmp_path / "recipe.yaml", config) == []
    found = differences(tmp_path / "recipe.yaml", recipe_of(train="dpo"))
    assert "train was 'sft', is 'dpo'" in found and any("dpo.beta" in one for one in found)


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe whose model is the tiny decoder: answers that go on with "ab" are preferred to those with "yz"."""
    monkeypatch.setattr("colora_ms.models.load_model", lambda name, weight_format: (tiny_decoder(), LetterTokenizer()))
    letters = "abcdefgh"
    rows = [{"prompt": f"say {first}{second}", "chosen": second + "ab", "rejected": second + "yz"}
            for first in letters for second in letters]
    for name, part in (("train", rows[::2] + rows[1::4]), ("valid", rows[3::4])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def make(output, steps=40, beta=0.5, accumulation=1, **loop):
        return TrainingConfig.from_dict({
            "output": str(tmp_path / output), "train": "dpo", "dpo": {"beta": beta},
            "adapter": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
            "data": {"train": str(tmp_path / "train.jsonl"), "batch_size": 8, "buckets": [24],
                     "validation": str(tmp_path / "valid.jsonl")},
            "optimizer": {"learning_rate": 0.01, "accumulation_steps": accumulation},
            "loop": {"steps": steps, "progress": False, **loop}})
    return make


def test_a_run_learns_the_order_and_its_adapter_loads(recipe):
    seen = {}

    class Keep(Callback):
        def on_end(self, trainer, result):
            seen["decoder"] = trainer.stepper.loss_cell.decoder
    result = module.train(recipe("run", evaluate_every=20), callbacks=[Keep()])
    about, *rows = read_log(result.adapter.parent / "log.jsonl")
    assert about["kind"] == "data" and about["train"]["examples"] == 48 and about["validation"]["examples"] == 16
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == first["chosen_reward"] == 0
    assert last["kind"] == "evaluation" and last["accuracy"] > 0.7 and last["loss"] < 0.6 and last["margin"] > 0.1
    for row in rows:
        assert row["margin"] == pytest.approx(row["chosen_reward"] - row["rejected_reward"], abs=1e-4)
        assert row["chosen_logprob"] < 0 and row["rejected_logprob"] < 0 and 0 <= row["accuracy"] <= 1
    trained = tiny_decoder()
    handle = load_adapter(trained, str(result.adapter))
    own = adapters_of(seen["decoder"])
    if result.best_step == result.steps:
        for place, values in own.values("default").items():
            for name, value in values.items():
                np.testing.assert_array_equal(handle.values()[place][name], value)
    assert (result.adapter.parent / "loss.png").is_file()


def test_the_reference_of_an_adapter_that_goes_on_is_the_base_alone(recipe, capsys):
    first = module.train(recipe("first", steps=20))
    config = recipe("second", steps=1)
    config.adapter = {"start_from": str(first.adapter)}
    config.loop.progress = True
    module.train(config)
    assert "the reference is the base model alone, not the adapter that the training starts from" in capsys.readouterr().err
    steps = [row for row in read_log(first.adapter.parents[1] / "second" / "log.jsonl") if row["kind"] == "step"]
    assert steps[0]["margin"] > 0.05 and steps[0]["loss"] < np.log(2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_is_exact_and_another_beta_is_refused(recipe, accumulation):
    whole = module.train(recipe("a", steps=6, accumulation=accumulation))
    with pytest.raises(KeyboardInterrupt):
        module.train(recipe("b", steps=6, accumulation=accumulation), callbacks=[Stop()])
    with pytest.raises(CheckpointError, match="dpo.beta was 0.5, is 0.25"):
        module.train(recipe("b", steps=6, beta=0.25, accumulation=accumulation), resume=True)
    rest = module.train(recipe("b", steps=6, accumulation=accumulation), resume=True)
    assert rest.losses == whole.losses[3:]
    a, b = (folder.parent / "adapter" / "adapter_model.safetensors" for folder in (whole.adapter, rest.adapter))
    assert a.read_bytes() == b.read_bytes()
