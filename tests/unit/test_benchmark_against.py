"""The arithmetic of ``benchmark_decode.py --against``, without running a model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark_against  # noqa: E402
from benchmark_against import Sides, Timed, measures_of, order, results_table  # noqa: E402
from benchmark_common import BenchmarkError  # noqa: E402

TIMED = [Timed("decode_float32_1", {"old": [2.0, 40.0, 3.0], "new": [1.0, 10.0, 3.0]}, True),
         Timed("decode_int4_8", {"old": [0.99, 0.9, 0.98], "new": [1.0, 1.0, 1.0]}, True),
         Timed("train_step", {"old": [1.0], "new": [2.0]})]
PEAKS = {"float32": {"old": 3 << 20, "new": 4 << 20}}


def test_a_ratio_is_old_over_new_and_taken_within_rounds():
    assert [one.ratio for one in TIMED] == [2.0, 0.98, 0.5]


def test_the_smallest_ratios_are_of_decoding_and_of_everything():
    found = {one["name"]: one["value"] for one in measures_of(TIMED, PEAKS)}
    assert found == {"decode_float32_1_old_over_new": 2.0, "decode_int4_8_old_over_new": 0.98,
                     "train_step_old_over_new": 0.5, "peak_float32_old_over_new": 0.75, "decode_old_over_new_min": 0.98,
                     "old_over_new_min": 0.5}
    assert "decode_old_over_new_min" not in {one["name"] for one in measures_of(TIMED[2:], PEAKS)}


def test_each_side_goes_first_in_every_second_round():
    assert [order(number)[0] for number in range(4)] == ["old", "new", "old", "new"]
    assert all(sorted(order(number)) == ["new", "old"] for number in range(4))


def test_the_table_has_both_sides_and_the_ratio():
    lines = results_table(TIMED, PEAKS).splitlines()
    assert lines[2].split() == ["|", "decode_float32_1", "|", "3000.00", "|", "3000.00", "|", "ms", "|", "2.000", "|"]
    assert "3" in lines[-1] and "MiB" in lines[-1] and "0.750" in lines[-1]


def test_a_side_runs_its_own_package_operators_and_graphs(tmp_path):
    sides = Sides({"old": tmp_path / "old", "new": tmp_path / "new"}, tmp_path / "caches")
    old, new = sides.environment("old"), sides.environment("new")
    assert set(old) == set(new) == {"PYTHONPATH", "COLORA_CACHE", "COLORA_CPU_LIBRARY"}
    assert all(old[name] != new[name] for name in old)
    sides.check("old", str((tmp_path / "old" / "colora_ms").resolve()))
    with pytest.raises(BenchmarkError, match="the worker of old ran"):
        sides.check("old", str((tmp_path / "new" / "colora_ms").resolve()))


def test_a_worker_imports_the_package_that_it_is_told(tmp_path):
    """Not the one beside the script, nor the installed one."""
    (tmp_path / "colora_ms").mkdir()
    (tmp_path / "colora_ms" / "__init__.py").write_text("")
    script = ("import against_worker, colora_ms; print(colora_ms.__file__); "
              "print(all(hasattr(against_worker.Revision, name) for name in "
              "('load', 'encode', 'run', 'load_training', 'train')))")
    for tree in (tmp_path, benchmark_against.ROOT):
        done = subprocess.run([sys.executable, "-c", script], cwd=benchmark_against.ROOT / "scripts", text=True,
                              check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(tree)})
        assert done.stdout.split() == [str(tree / "colora_ms" / "__init__.py"), "True"]
