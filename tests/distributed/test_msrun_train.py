"""Training with two real processes under msrun against one process: values, files, a killed worker, resuming."""

import json
import os
import signal
import time

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from colora_ms.training.checkpoint import list_checkpoints
from colora_ms.training.report import read_log
from colora_ms.training.run import train

STEPS = 60


def recipe(folder, model, rows, train="sft", **loop):
    """The path of a recipe with ``rows`` rows a process; 21 training examples, so that batches are partial."""
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 21), ("validation", 5)):
        lines = [{"prompt": f"{name} {k}", "completion": "abcdefghij"[: 2 + k % 7] * (1 + k % 2)} for k in range(count)]
        if train == "dpo":
            lines = [{"prompt": line["prompt"], "chosen": line["completion"], "rejected": "xyz"[: 1 + k % 3] * 2}
                     for k, line in enumerate(lines)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {"model": str(model), "train": train, "output": str(folder / "run"),
              "adapter": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
              "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
                       "template": "{prompt}={completion}", "max_length": 32, "batch_size": rows, "buckets": [32]},
              "optimizer": {"learning_rate": 0.003, "accumulation_steps": 2, "max_grad_norm": 1.0},
              "loop": {"steps": STEPS, "seed": 5, "progress": False, **loop}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def numbers(folder, kind="step"):
    return {row["step"]: row["loss"] for row in read_log(folder / "run" / "log.jsonl") if row["kind"] == kind}


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    """One process with the global batch of the two workers."""
    folder = tmp_path_factory.mktemp("alone") / "a"
    train(recipe(folder, tiny_folder, 4, evaluate_every=30))
    return folder


def test_two_workers_equal_one_process_survive_a_kill_and_resume(start, alone, tiny_folder, tmp_path):
    folder, logs = tmp_path / "b", tmp_path / "logs"
    path = recipe(folder, tiny_folder, 2, evaluate_every=30, save_every=1, keep_checkpoints=3)
    job = start("msrun_train.sh", path, "-n", 2, "--log-dir", logs)
    job.poll_until(lambda: len(list_checkpoints(folder / "run")) >= 2)
    victim = worker(job.process.pid, 1)
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    code, output = job.wait()
    assert code == 1 and time.monotonic() - began < 60
    assert f"worker 1 (process {victim}) was killed by SIGKILL" in output and "--resume goes on" in output
    done = list_checkpoints(folder / "run")[-1][0]
    assert 2 <= done < STEPS, "the run was over before the kill; raise STEPS"

    # A polite stop: both workers leave after the same update, with a checkpoint.
    job = start("msrun_train.sh", path, "--workers", 2, "--log-dir", logs, "--resume")
    job.poll_until(lambda: list_checkpoints(folder / "run")[-1][0] >= done + 2)
    job.process.send_signal(signal.SIGTERM)
    code, output = job.wait()
    assert code == 130 and "continue with --resume" in output, output
    assert done + 2 <= list_checkpoints(folder / "run")[-1][0] == max(numbers(folder)) < STEPS

    code, output = start("msrun_train.sh", path, "--workers=2", "--log-dir", logs, "--resume").wait()
    assert code == 0, output
    assert f"{STEPS} updates, last loss" in output and output.count("adapter: ") == 1
    mine, theirs = numbers(folder), numbers(alone)
    assert list(mine) == list(theirs) == list(range(1, STEPS + 1))
    # The sum over 8 rows is split in two; 60 updates of Adam carry the rounding on.
    np.testing.assert_allclose(list(mine.values()), list(theirs.values()), rtol=2e-5)
    np.testing.assert_allclose(list(numbers(folder, "evaluation").values()),
                               list(numbers(alone, "evaluation").values()), rtol=2e-5)
    want = load_file(alone / "run" / "adapter" / "adapter_model.safetensors")
    have = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    assert want.keys() == have.keys()
    for name, value in want.items():
        np.testing.assert_allclose(have[name], value, atol=2e-4, err_msg=name)
    tokens = [row["tokens"] for row in read_log(folder / "run" / "log.jsonl") if row["kind"] == "step"]
    assert tokens == [row["tokens"] for row in read_log(alone / "run" / "log.jsonl") if row["kind"] == "step"]
    assert sorted(item.name for item in logs.iterdir()
                  if item.name.startswith("worker")) == ["worker_0.log", "worker_1.log"]


def test_two_workers_prefer_what_one_process_prefers(start, tiny_folder, tmp_path):
    """The loss is a mean over pairs, and so are the figures beside it: five pairs at the end are three and two."""
    train(recipe(tmp_path / "one", tiny_folder, 4, "dpo", steps=12, evaluate_every=6))
    path = recipe(tmp_path / "two", tiny_folder, 2, "dpo", steps=12, evaluate_every=6)
    code, output = start("msrun_train.sh", path, "-n", 2, "--log-dir", tmp_path / "logs").wait()
    assert code == 0, output
    one, two = ([row for row in read_log(tmp_path / name / "run" / "log.jsonl") if row["kind"] != "data"]
                for name in ("one", "two"))
    assert len(one) == len(two) == 14 and one[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    figures = ("loss", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
    for mine, theirs in zip(two, one):
        assert (mine["kind"], mine["step"]) == (theirs["kind"], theirs["step"])
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"])
        np.testing.assert_allclose([mine[name] for name in figures], [theirs[name] for name in figures],
                                   rtol=1e-4, atol=1e-4)


def worker(launcher, rank):
    """The process id of a worker below the launcher."""
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            values = child.environ()
        except psutil.Error:
            continue
        if values.get("MS_ROLE") == "MS_WORKER" and values.get("RANK_ID") == str(rank):
            return child.pid
    raise AssertionError(f"no worker {rank} below process {launcher}")
