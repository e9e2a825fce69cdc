"""Evaluation and generation split over two real processes, against one process."""

import json

import pytest

from colora_ms.cli import main

PROMPTS = ["one", "two and two", "three", "f", "five five five five", "six", "7"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "completion": str(k)}) + "\n"
                            for k, text in enumerate(PROMPTS)))
    return path


def answers(path):
    """Items of a results file: (id, text, tokens, correct), in its order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [(row["id"], row["text"], row["tokens"], row["correct"]) for row in rows]


def test_evaluation_on_two_workers_gives_the_items_of_one_in_order(start, tiny_folder, problems, tmp_path):
    options = ["--model", str(tiny_folder), "--data", str(problems), "--max-new-tokens", "6", "--batch-size", "2"]
    job = start("msrun_evaluate.sh", "-n", 2, "--log-dir", tmp_path / "logs", *options, "--output",
                tmp_path / "two.jsonl")
    assert main(["evaluate", *options, "--output", str(tmp_path / "one.jsonl")]) == 0
    code, output = job.wait()
    assert code == 0, output
    assert "% of 7" in output
    one = answers(tmp_path / "one.jsonl")
    assert len(one) == len(PROMPTS) and len({text for _, text, _, _ in one}) > 1
    assert answers(tmp_path / "two.jsonl") == one
    one, two = (json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("one", "two"))
    assert one["setup"] == two["setup"] and one["correct"] == two["correct"]
    assert one["mean_tokens"] == two["mean_tokens"]


def test_generation_on_two_workers_reads_standard_input_once(start, tiny_folder, tmp_path, capsys):
    options = ["--model", str(tiny_folder), "--max-new-tokens", "5", "--json"]
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    with open(tmp_path / "prompts") as handle:
        job = start("msrun_evaluate.sh", "generate", "-n", 2, "--log-dir", tmp_path / "logs", *options,
                    "--temperature", 1, "--seed", 3, "--output", tmp_path / "two.jsonl", stdin=handle)
    assert main(["generate", *options, "--temperature", "1", "--seed", "3", *PROMPTS]) == 0
    one = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    code, output = job.wait()
    assert code == 0, output
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in two] == PROMPTS
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]


@pytest.mark.slow  # a job of its own; a killed worker takes the same way
def test_a_failure_ends_the_job_with_the_reason(start, tiny_folder, problems, tmp_path):
    (tmp_path / "results.jsonl").write_text("something else\n")
    code, output = start("msrun_evaluate.sh", "--log-dir", tmp_path / "logs", "--model", tiny_folder, "--data",
                         problems,
                         "--max-new-tokens", 2, "--output", tmp_path / "results.jsonl").wait()
    assert code == 1
    assert "worker 0" in output and "ended with code 1" in output and "is not an evaluation of this package" in output
