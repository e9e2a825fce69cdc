"""The training benchmark's batch and its report, without running a model."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark_training  # noqa: E402
from benchmark_common import BenchmarkError  # noqa: E402

ARGUMENTS = argparse.Namespace(rows=2, tokens=8)
INFORMATION = {"compile_s": 3.0}


def test_every_label_is_the_next_id():
    batch = benchmark_training.make_batch(3, 5)
    ids, labels = np.array(batch["ids"]), np.array(batch["labels"])
    assert ids.shape == labels.shape == (3, 5) and np.array_equal(ids[:, 1:], labels[:, :-1])
    assert 0 <= min(ids.min(), labels.min()) and max(ids.max(), labels.max()) < benchmark_training.VOCABULARY


def test_the_ratio_is_taken_within_rounds(capsys):
    seconds = {"colora_ms": [[1.0, 1.0], [10.0, 10.0]], "peft": [[2.0, 2.0], [20.0, 20.0]]}
    losses = {"colora_ms": [5.0, 4.0], "peft": [5.0001, 4.0]}
    found = {m["name"]: m["value"] for m in benchmark_training.report(
        ARGUMENTS, INFORMATION, seconds, losses, {"colora_ms": 2 << 20, "peft": 1 << 20})}
    assert found["train_step_vs_peft"] == 2 and found["train_peak_vs_peft"] == 2 and found["train_peak_mib"] == 2
    assert found["train_step_s"] == 5.5 and "tokens/s" in capsys.readouterr().out


def test_times_of_different_trainings_are_not_compared():
    seconds = {"colora_ms": [[1.0]], "peft": [[2.0]]}
    with pytest.raises(BenchmarkError, match="differ by 25.0%"):
        benchmark_training.report(ARGUMENTS, INFORMATION, seconds, {"colora_ms": [5.0], "peft": [4.0]},
                                  dict.fromkeys(seconds, 1))
    alone = benchmark_training.report(ARGUMENTS, INFORMATION, {"colora_ms": [[1.0]]}, {"colora_ms": [5.0]}, {"colora_ms": 1})
    assert {m["name"] for m in alone} == {"train_step_s", "train_first_step_s", "train_peak_mib"}
