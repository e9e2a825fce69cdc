"""The colora-ms command: help, errors of one paragraph, exit codes; and what importing the package costs."""

import json
import os
import subprocess
import sys

import pytest

from colora_ms.cli import COMMANDS, main


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["info", "smollm3-135m"], "smollm2-135m"),
    (["info", "/nowhere/at/all"], "/nowhere/at/all"),
    (["train", "/nowhere/recipe.yaml"], "/nowhere/recipe.yaml"),
    (["generate", "--contrast", "--adapter", "/nowhere", "--model", "/nowhere", "hi"], "nowhere"),
    (["generate", "--contrast", "--alpha", "2", "--adapter", "/nowhere", "--model", "/nowhere", "hi"], "alpha=2.0"),
    (["evaluate", "--data", "{kind: reasoning_gim}"], "reasoning_gym"),
    (["evaluate", "--task", "gsm8k", "--shots", "4", "--data", "x"], "--shots-data"),
    (["evaluate", "--task", "choice", "--data", "/nowhere.json"], "/nowhere.json"),
    (["tune-contrast", "smollm2-135m", "--adapter", "/x", "--data", "x", "--forms", "margn"], "Did you mean 'margin'"),
    (["tune-contrast", "smollm2-135m", "--adapter", "/x", "--data", "x", "--alphas", "2"], "alpha=2.0"),
])
def test_errors_are_one_paragraph(arguments, words, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_info_of_a_folder(capsys, goldens):
    assert main(["info", str(goldens / "tiny" / "qwen3")]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out


def test_info_of_an_adapter(capsys, goldens):
    assert main(["info", str(goldens / "peft" / "qv_r8")]) == 0
    assert '"r": 8' in capsys.readouterr().out


def test_convert_round_trip(capsys, goldens, tmp_path):
    assert main(["convert", str(goldens / "tiny" / "llama"), str(tmp_path / "copy")]) == 0
    assert main(["info", str(tmp_path / "copy")]) == 0
    assert main(["convert", str(goldens / "tiny" / "llama"), str(tmp_path / "copy")]) == 1
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_generate_prints_json(capsys, goldens, shared):
    model = shared / "data" / "stories260k"
    assert main(["generate", "--model", str(model), "--max-new-tokens", "24", "--json", "Once upon a time"]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert row["text"].startswith(", there was a little girl named Lily.")
    assert len(row["tokens"]) == 24 and row["finish_reason"] == "length"


def test_generate_takes_what_the_generator_takes(capsys, shared):
    """An empty prompt, the first blank of an answer, a stop id, and numbers checked as everywhere."""
    def rows(*more):
        model = str(shared / "data" / "stories260k")
        code = main(["generate", "--model", model, "--max-new-tokens", "8", "--json", *more])
        out = capsys.readouterr()
        return json.loads(out.out.strip().splitlines()[-1]) if code == 0 else out.err

    assert rows("")["text"].startswith("Once upon") and rows("")["prompt_tokens"] == 1
    whole = rows("Once upon a time, there was a little girl named")
    assert whole["text"].startswith(" Lily. She")
    assert "".join(record["text"] for record in whole["records"]) == whole["text"]
    ended = rows("--stop-token-id", str(whole["tokens"][2]), "Once upon a time, there was a little girl named")
    assert ended["tokens"] == whole["tokens"][:3] and ended["finish_reason"] == "stop"
    assert rows("--top-p", "0", "--top-k", "-1", "a")["tokens"] == rows("a")["tokens"]
    assert rows("--temperature", "1", "--top-p", "0", "a")["tokens"] == rows("a")["tokens"]
    for option, value, words in (("--temperature", "1e39", "float32"), ("--temperature", "nan", "not a finite number"),
                                 ("--stop-token-id", "512", "0..511"), ("--mix", "{", "--mix '{' is no JSON"),
                                 ("--mix", "nowhere.yaml", "nowhere.yaml cannot be read"),
                                 ("--mix", '{"negativ": {}}', "Did you mean 'negative'"),
                                 ("--repetition-penalty", "0", "(0, 100]"), ("--adapter-scale", "2", "needs adapter")):
        assert words in rows(option, value, "a")


def test_generate_with_a_mix_and_penalties(capsys, shared):
    """The options' names on the command line are those of the records."""
    def row(*more):
        model = str(shared / "data" / "stories260k")
        assert main(["generate", "--model", model, "--max-new-tokens", "16", "--json", *more,
                     "Once upon a time, there was"]) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    plain = row()
    negative = row("--mix", '{"negative": {"prompt": "Once upon a time, there was a little", "gamma": 4.0}}')
    assert negative["tokens"] != plain["tokens"]
    assert [[name for name, _ in one["voices"]] for one in negative["records"]] == [["prompt", "negative"]] * 16
    assert row("--mix", '{"negative": {"prompt": "A little girl", "gamma": 1.0}}')["tokens"] == plain["tokens"]
    never = row("--presence-penalty", "2", "--frequency-penalty", "2", "--repetition-penalty", "9")["tokens"]
    assert never != plain["tokens"] and len(set(never)) == 16


def test_import_is_light():
    code = (
        "import time, mindspore; t = time.perf_counter(); import colora_ms, colora_ms.models, colora_ms.decoding, "
        "colora_ms.adapters; t = time.perf_counter() - t; import sys; "
        "assert 'mindformers' not in sys.modules and 'transformers' not in sys.modules and 'torch' not in sys.modules; "
        "print(t)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
                          env={**os.environ, "GLOG_v": "3"})
    assert float(done.stdout) < 3.0
    assert done.stderr == ""
