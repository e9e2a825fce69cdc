"""``colora-ms run``: from a recipe to the table on a tiny model; nothing is done twice; bad input stops before the
training."""

import json
import re
import shlex
from pathlib import Path

import pytest

import mindspore as ms

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.recipes import runner
from colora_ms.recipes.report import summary_text, table
from colora_ms.recipes.settings import EvaluationSettings, expand, read_config
from colora_ms.training.config import TrainingConfig

ms.set_context(mode=ms.GRAPH_MODE)

DECODERS = ["base", "greedy", {"alpha": 0.1, "beta": [0.5, 1.0]}]


class Letters:
    """Ids 3 + letter; id 2 ends a text."""

    eos_token_id = 2

    def encode(self, text, add_special_tokens=True):
        return [3 + (ord(letter) - 32) % 90 for letter in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(32 + (i - 3)) for i in ids if i > 2)

    def save(self, folder):
        pass


class Counter:
    """Counts the calls of a function."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.function(*arguments, **options)


@pytest.fixture
def recipe(tmp_path, one_layer_model):
    """A function that makes a recipe's dictionary; its model is a tiny decoder of one layer."""
    one_layer_model(Letters())
    rows = [{"prompt": f"say {letter}{other}", "completion": letter * 3, "id": f"{letter}{other}"}
            for letter in "abcdefgh" for other in "xyz"]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows[6:])))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:6])))

    def make(evaluate=None, adapter=None, steps=3, **changes):
        return {"output": str(tmp_path / "run"),
                "adapter": adapter or {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
                "data": {"train": str(tmp_path / "train.jsonl"), "batch_size": 8, "buckets": [24]},
                "optimizer": {"learning_rate": 0.05}, "loop": {"steps": steps, "progress": False},
                "evaluate": {"data": str(tmp_path / "test.jsonl"), "decoders": DECODERS, "max_new_tokens": 4, "rows": 4,
                             "scorer": "exact", **(evaluate or {})}, **changes}
    return make


def test_train_evaluate_table_and_nothing_twice(recipe, tmp_path, monkeypatch):
    from colora_ms.decoding import Generator
    from colora_ms.training import run as training_run

    counted = Counter(Generator.generate)
    monkeypatch.setattr(Generator, "generate", lambda self, *a, **o: counted(self, *a, **o))
    training = Counter(training_run.train)
    monkeypatch.setattr(training_run, "train", training)
    lines = []
    config = TrainingConfig.from_dict(recipe())
    first = runner.run(config, name="tiny", say=lines.append)
    assert training.calls == 1 and counted.calls == 2 + 2 + 3 + 3  # six items in batches of four, or of two
    assert [row["key"] for row in first["decoders"]] == ["base", "greedy", "cold-fixed-0.1-0.5", "cold-fixed-0.1-1"]
    assert first["complete"] and first["training"]["steps"] == 3 and first["training"]["ms_per_step"] > 0
    assert first["training"]["compile_seconds"] is not None and first["seed"] == 0 and first["items"] == 6
    assert all(set(row["against_greedy"]) == {"fixed", "broken", "p_value"} for row in first["decoders"]
               if row["key"] != "greedy")
    assert set(first["hashes"]) == {"model", "trained", "recipe"} and first["versions"]["mindspore"]
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert kept == json.loads(json.dumps(first))
    assert table(first["decoders"]) in (tmp_path / "run" / "table.md").read_text()

    # A second call, as after a kill in the third evaluation: two of its items are there.
    answers = tmp_path / "run" / "evaluation"
    half = next(answers.glob("*/cold-fixed-0.1-0.5.jsonl"))
    half.write_text("".join(half.read_text().splitlines(True)[:3]))
    second = runner.run(config, name="tiny", say=lines.append)
    assert training.calls == 1 and counted.calls == 10 + 2
    for one, other in zip(first["decoders"], second["decoders"]):
        assert one["accuracy"] == other["accuracy"] and other["tokens_per_second"] > 0
    assert any(line.startswith("trained before: 3 updates") for line in lines)

    limited = runner.run(config, name="tiny", limit=2, say=lines.append)
    assert training.calls == 1 and limited["items"] == 2
    with pytest.raises(CheckpointError, match="another recipe: data.batch_size was 8, is 4"):
        changed = recipe()
        changed["data"]["batch_size"] = 4
        runner.run(TrainingConfig.from_dict(changed), say=lines.append)
    other = tmp_path / "other.jsonl"
    other.write_text((tmp_path / "train.jsonl").read_text())
    with pytest.raises(CheckpointError, match="whose questions were not left out of the training data"):
        runner.run(TrainingConfig.from_dict(recipe({"data": str(other)})), say=lines.append)


def test_the_quick_start(recipe, tmp_path, capsys, monkeypatch):
    from colora_ms.cli import main

    monkeypatch.setattr("sys.argv", ["colora-ms"])
    values = recipe()
    values["data"]["held_out"] = values["evaluate"]["data"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    assert main(["quickstart", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "quick"),
                 "--max-new-tokens", "4", "--scorer", "exact", "--json", str(tmp_path / "measures.json")]) == 0
    text = capsys.readouterr().out
    assert "| LoRA + CoLD (alpha 0.1, beta 0.5) |" in text and "exact McNemar" in text and "greedy |" in text
    run = next((tmp_path / "quick").glob("*"))
    written = json.loads((run / "quickstart.json").read_text())
    assert written["steps"] == 3 and len(written["results"]) == 3

    # Eight requests one after another and as one batch: the same tokens, and the ratio of the times.
    measures = {one["name"]: one["value"] for one in json.loads((tmp_path / "measures.json").read_text())["measures"]}
    assert measures["batch8_equal"] == 1 and f"batch8_speedup {measures['batch8_speedup']:.2f}, the same tokens" in text
    greedy = written["results"]["LoRA, greedy"]
    assert measures["batch8_speedup"] > 0 and measures["adapter_accuracy"] == greedy["accuracy"]

    lines = text.splitlines()
    assert re.fullmatch(r"ready after \d+ s \(without installation\)", lines[-1])
    commands = [shlex.split(line) for line in lines if line.startswith("    colora-ms ")]
    assert [words[1] for words in commands] == ["chat", "serve", "train"]
    check_next_commands([words[1:] for words in commands], run)
    assert main(commands[2][1:]) == 0
    assert (run / "own" / "adapter" / "adapter_model.safetensors").is_file()


def check_next_commands(commands, run):
    """The first two commands are complete and find the adapters that the run has left."""
    from colora_ms.adapters.peft_format import StoredAdapter
    from colora_ms.cli import build_parser

    for words in commands[:2]:
        parsed = build_parser().parse_args(words)
        assert Path(parsed.adapters) == run / "adapters"
        full, half = (StoredAdapter(Path(parsed.adapters) / name) for name in ("trained", "half"))
        assert (full.problems, half.problems) == ([], []) and half.config.lora_alpha == full.config.lora_alpha / 2
    assert build_parser().parse_args(commands[0]).adapter == "trained"


def test_the_tests_questions_leave_the_training_data(recipe, tmp_path):
    from colora_ms.training.run import load_data

    values = recipe()
    values["data"]["train"] = [values["data"]["train"], values["evaluate"]["data"]]
    train, _, removed = load_data(TrainingConfig.from_dict(values))
    assert len(train) == 18 and removed == 6


def test_choice_and_perplexity_of_an_adapter_that_is_trained_once(recipe, tmp_path):
    rows = [{"instruction": f"Is {n} even?\n\nAnswer format: true/false", "answer": "true" if n % 2 else "false"}
            for n in range(5)]
    (tmp_path / "choice.json").write_text(json.dumps(rows))
    (tmp_path / "test.txt").write_text("abcdefgh hgfedcba. " * 10)
    lines = []
    shared = {"decoders": ["base", "greedy"]}
    chosen = runner.run(TrainingConfig.from_dict(recipe({**shared, "task": "choice",
                                                         "data": str(tmp_path / "choice.json")})),
                        say=lines.append)
    assert [row["decoder"] for row in chosen["decoders"]] == ["base", "LoRA"] and chosen["items"] == 5
    assert set(chosen["decoders"][0]["against_greedy"]) == {"fixed", "broken", "p_value"}
    read = runner.run(TrainingConfig.from_dict(recipe({**shared, "task": "perplexity",
                                                       "data": str(tmp_path / "test.txt"),
                                                       "window": 16})), say=lines.append)
    assert read["decoders"][0]["perplexity"] != read["decoders"][1]["perplexity"]
    assert sum(line.startswith("trained: ") for line in lines) == 1
    assert "| LoRA |" in (tmp_path / "run" / "table.md").read_text()


def test_quantised_model_by_perplexity(recipe, tmp_path, goldens):
    (tmp_path / "train.txt").write_text("abcdefgh abcdefgh. " * 60)
    (tmp_path / "test.txt").write_text("abcdefgh hgfedcba. " * 10)
    values = recipe({"task": "perplexity", "data": str(tmp_path / "test.txt"), "decoders": ["base", "greedy"],
                     "window": 16},
                    {"method": "rtn", "bits": 4})
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    result = runner.run(read_config(path), say=lambda line: None)
    assert [row["decoder"] for row in result["decoders"]] == ["base", "rounded W4"]
    assert all(row["perplexity"] > 1 for row in result["decoders"]) and result["characters"] == 190


@pytest.mark.parametrize("evaluate, expected", [
    ({"decoder": ["base"]}, "section evaluate has no setting 'decoder'.*Did you mean 'decoders'"),
    ({"decoders": ["gredy"]}, "there is no decoder 'gredy'.*Did you mean 'greedy'"),
    ({"decoders": [{"alpa": 0.1}]}, "a contrast has no setting 'alpa'.*Did you mean 'alpha'"),
    ({"decoders": [{"alpha": 2}]}, r"alpha=2 is outside"),
    ({"decoders": ["base", "base"]}, "the decoder base is given twice"),
    ({"decoders": []}, "at least one decoder"),
    ({"task": "choice"}, "needs task problems"),
    ({"task": "perplexity", "decoders": ["base"], "window": 8, "stride": 8}, "stride is 8, expected less"),
    ({"scorer": "nmber"}, "expected one of number, exact, normalised"),
    ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl"),
    ({"data": None}, "needs the setting 'data'"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
])
def test_mistakes_stop_before_the_training(recipe, tmp_path, evaluate, expected):
    from colora_ms.errors import ColoraError

    with pytest.raises(ColoraError, match=expected):
        runner.run(TrainingConfig.from_dict(recipe(evaluate)), say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_recipe_without_the_section(recipe):
    with pytest.raises(ConfigError, match="no section evaluate"):
        runner.run(TrainingConfig.from_dict({**recipe(), "evaluate": None}))


def test_fast_has_a_folder_and_a_length_of_its_own(recipe):
    from colora_ms.recipes.settings import evaluation_settings, shorten

    config = TrainingConfig.from_dict(recipe(loop={"epochs": 2}))
    fast, settings = shorten(config, evaluation_settings(config), fast=True)
    assert fast.output.endswith("run-fast") and fast.loop.steps == 30 and fast.loop.epochs is None
    assert settings.items == 40
    with pytest.raises(ConfigError, match="--limit is 0"):
        shorten(config, settings, limit=0)


def test_lists_of_a_contrast_are_multiplied_out():
    found = expand([{"alpha": [0.1, 0.3], "beta": [0.5, 1.0], "adapt": "margin"}])
    assert [(one.alpha, one.beta) for one in found] == [(0.1, 0.5), (0.1, 1.0), (0.3, 0.5), (0.3, 1.0)]


def test_every_setting_has_a_sentence():
    assert all(len(sentence) > 15 for _, _, sentence in EvaluationSettings.settings())


def test_the_command_says_what_is_wrong_in_one_paragraph(tmp_path, capsys):
    from colora_ms.cli import main

    path = tmp_path / "recipe.yaml"
    path.write_text("output: x\ndata: {train: t.jsonl}\nloop: {steps: 1}\nevaluat: {}\n")
    assert main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    assert "Did you mean 'evaluate'" in error and len(error.strip().splitlines()) == 1


def test_refused_items_stand_below_the_table():
    row = {"key": "greedy", "decoder": "LoRA, greedy", "accuracy": 0.5, "interval": [0.1, 0.9],
           "tokens_per_second": 1.0,
           "changed_share": 0.0, "refused": 2}
    result = {"recipe": "r", "decoders": [row, {**row, "decoder": "base", "refused": 0}], "versions": {}, "seed": 0,
              "model": "m",
              "training_summary": "none", "processors": 2, "hashes": {"model": "a", "trained": "b", "recipe": "c"}}
    text = summary_text(result)
    assert "LoRA, greedy: 2 items were refused" in text and text.count("were refused") == 1
