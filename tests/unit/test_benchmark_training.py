"""The training benchmark's batch and its report, without running a model."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark_training  # noqa: E402
import packing_benchmark  # noqa: E402
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
    alone = benchmark_training.report(ARGUMENTS, INFORMATION, {"colora_ms": [[1.0]]}, {"colora_ms": [5.0]},
                                      {"colora_ms": 1})
    assert {m["name"] for m in alone} == {"train_step_s", "train_first_step_s", "train_peak_mib"}


# -- packing ----------------------------------------------------------------------------------------------------------

SIDES = {"padded": {"fill": 0.75, "batches": 4, "tokens": 900, "shapes": "4 of 2 x 150"},
         "packed": {"fill": 0.95, "batches": 3, "tokens": 900, "shapes": "3 of 1 x 316"}}


def passes(padded, packed, loss=2.0, other=2.0):
    return {"padded": [{"seconds": s, "loss": loss, "norm": 1.0} for s in padded],
            "packed": [{"seconds": s, "loss": other, "norm": 1.0} for s in packed]}


def test_the_speedup_is_the_ratio_of_real_tokens_within_rounds(capsys):
    found = {"sides": SIDES, "whole": {"padded": 0.74, "packed": 0.98}}
    rounds = passes([3.0, 30.0, 6.0], [2.0, 20.0, 5.0], other=2.00001)
    values = {m["name"]: m["value"] for m in packing_benchmark.report(found, rounds)}
    assert values["packing_speedup"] == 1.5 and values["packed_tokens_s"] == 180 and values["padded_tokens_s"] == 150
    assert values["packing_loss_difference"] == pytest.approx(5e-6, rel=1e-3)
    assert "padded 74.0 %, packed 98.0 % real tokens" in capsys.readouterr().out


@pytest.mark.parametrize("other, tokens", [(2.0001, 900), (float("nan"), 900), (2.0, 901)])
def test_the_speedup_of_another_training_is_refused(other, tokens):
    sides = {"padded": SIDES["padded"], "packed": dict(SIDES["packed"], tokens=tokens)}
    with pytest.raises(BenchmarkError, match="do not train the same thing"):
        packing_benchmark.report({"sides": sides, "whole": {"padded": 0.74}}, passes([1.0], [1.0], other=other))


def test_the_sample_has_whole_batches_of_each_bucket_by_its_share():
    sizes = np.random.default_rng(0).integers(1, 100, 1000)
    chosen = packing_benchmark.whole_batches(sizes, [20, 60, 100], 4, 20)
    assert chosen == sorted(set(chosen)) == packing_benchmark.whole_batches(sizes, [20, 60, 100], 4, 20)
    counts = np.bincount(np.searchsorted([20, 60, 100], sizes[chosen]))
    assert (counts % 4 == 0).all() and abs(counts.sum() - 80) <= 8
    assert np.abs(counts / counts.sum() - np.bincount(np.searchsorted([20, 60, 100], sizes)) / 1000).max() < 0.06
    assert packing_benchmark.whole_batches([5, 5, 90], [20, 100], 2, 9) == [0, 1]


def test_an_absent_data_file_is_a_sentence(tmp_path):
    arguments = argparse.Namespace(data=tmp_path / "none.jsonl")
    with pytest.raises(BenchmarkError, match="none.jsonl is not there.*--data"):
        packing_benchmark.benchmark(arguments, tmp_path)
