"""``colora-ms train`` on files of each layout, and what a run says and writes down about its data; on a tiny model."""

import json
import warnings

import numpy as np
import pytest

import mindspore as ms

from colora_ms.cli import main
from colora_ms.errors import DataError
from colora_ms.training import run as module
from colora_ms.training.config import TrainingConfig
from colora_ms.training.data import IGNORE, EncodedExample
from colora_ms.training.encoding import fingerprint
from colora_ms.training.report import read_log
from colora_ms.training.trainer import Callback
from test_training_layouts import CASES, quiet, tokenizer_of, write

ms.set_context(mode=ms.GRAPH_MODE)

LAYOUTS = {"completion": ["completion"],
           "completion_messages": ["completion messages", "completion of several messages"],
           "messages": ["openai", "openai with tools", "openai ends with a call", "openai with reasoning",
                        "openai with parts"],
           "sharegpt": ["sharegpt", "sharegpt with tools"], "alpaca": ["alpaca", "alpaca with input"]}


class Keep(Callback):
    """Keeps what identifies the data that was trained on."""

    def on_end(self, trainer, result):
        self.fingerprint, self.losses = trainer.loader.state()["data"], result.losses


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_decoder):
    """A function that makes a recipe whose model is a tiny decoder with a tokenizer of the goldens."""
    def load(name, weight_format="float32"):
        return tiny_decoder(num_hidden_layers=1, vocab_size=512, max_position_embeddings=512), \
            tokenizer_of("byte_level", "qwen3")
    monkeypatch.setattr("colora_ms.models.load_model", load)

    def make(output="run", steps=1, **section):
        return {"output": str(tmp_path / output), "adapter": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
                "data": {"batch_size": 4, "max_length": 512, "template": "chat", **section},
                "loop": {"steps": steps, "progress": False}}
    return make


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_training_on_a_layout_feeds_the_ids_of_transformers(recipe, tmp_path, layout):
    path = write(tmp_path / "d.jsonl", *(CASES["lines"][name] for name in LAYOUTS[layout]))
    expected = []
    for name in LAYOUTS[layout]:
        (made,) = next(case["made"] for case in CASES["cases"] if (case["tokenizer"], case["template"], case["line"]) ==
                       ("byte_level", "qwen3", name))
        for ids, learned in made["all"]:
            ids, labels = np.array(ids, np.int32), np.full(len(ids), IGNORE, np.int32)
            for begin, end in learned:
                labels[begin:end] = ids[begin:end]
            expected.append(EncodedExample(ids, labels))
    keep = Keep()
    quiet(module.train, TrainingConfig.from_dict(recipe(train=str(path), loss="all")), callbacks=[keep])
    assert keep.fingerprint == fingerprint(expected) and np.isfinite(keep.losses).all()


def test_the_command_trains_on_documents_and_refuses_pairs(recipe, tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", *({"text": "the little girl " * n} for n in range(1, 9)))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(train=str(path), max_length=12, on_long="windows")))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    first, second = read_log(tmp_path / "run" / "log.jsonl")
    assert first["kind"] == "data" and first["train"]["examples"] > 8 and first["train"]["skipped"] == 0
    assert second["kind"] == "step" and not first["warnings"]
    pairs = write(tmp_path / "p.jsonl", CASES["lines"]["preference"])
    with pytest.raises(DataError, match="train: dpo"):
        module.train(TrainingConfig.from_dict(recipe("other", train=str(pairs))))


def test_what_is_left_out_is_said_and_written_down_without_a_progress_bar(recipe, tmp_path):
    rows = [{"prompt": f"say {n}", "completion": "word " * (40 if n else 2), "id": f"r{n}"} for n in range(10)]
    rows += [{"prompt": "asked", "completion": "a", "id": "asked"}]
    path, held = write(tmp_path / "d.jsonl", *rows), write(tmp_path / "h.jsonl", rows[-1], rows[3])
    config = TrainingConfig.from_dict(recipe(train=str(path), max_length=64, validation=str(held), steps=2))
    config.loop.save_every = 1
    (result, said) = quiet(module.train, config)
    assert result.steps == 2
    for text in ("training data: removed 2 that stand in the validation or test data",
                 "training data: skipped 8 longer than 64 tokens (longest ",
                 "validation data: skipped 1 longer than 64 tokens"):
        assert sum(text in one for one in said) == 1, said
    log = read_log(tmp_path / "run" / "log.jsonl")
    assert [row["kind"] for row in log] == ["data", "step", "step", "evaluation"] and log[0]["step"] == 0
    train, validation = log[0]["train"], log[0]["validation"]
    assert (train["examples"], train["skipped"], validation["skipped"], log[0]["removed"]) == (1, 8, 1, 2)
    assert train["skipped_ids"] == [f"r{n}" for n in range(1, 10) if n != 3] and train["longest_skipped"] > 64
    assert set(log[0]["warnings"]) <= set(said)
    # A run that goes on keeps the record, and does not write it twice.
    quiet(module.train, config, resume=True)
    assert [row["kind"] for row in read_log(tmp_path / "run" / "log.jsonl")] == ["data", "step", "step", "evaluation"]


def test_nothing_is_said_where_nothing_is_left_out(recipe, tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "say", "completion": "a", "note": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        module.train(TrainingConfig.from_dict(recipe(train=str(path), columns=["prompt", "completion"])))
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["warnings"] == []


def test_a_mapping_of_columns_is_for_all_data_of_the_recipe(recipe, tmp_path):
    from colora_ms.recipes.settings import evaluation_settings
    from colora_ms.training.sources import load_examples

    rows = [{"question": f"say {n}", "reply": "a", "note": n} for n in range(3)]
    path, held = write(tmp_path / "d.jsonl", *rows), write(tmp_path / "h.jsonl", rows[0])
    columns = {"prompt": "question", "completion": "reply"}
    values = recipe(train=str(path), held_out=str(held), columns=columns)
    values["evaluate"] = {"decoders": ["base"]}
    config = TrainingConfig.from_dict(values)
    (train, validation, removed), said = quiet(module.load_data, config)
    assert ([one.prompt for one in train], validation, removed, said) == (["say 1", "say 2"], [], 1, [])
    assert [one.prompt for one in load_examples(evaluation_settings(config).data)] == ["say 0"]
