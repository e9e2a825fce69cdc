"""The serving scripts: what the soak counts as lost, and a short soak over a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import soak_serving  # noqa: E402


@pytest.fixture
def client():
    return soak_serving.Client(0, "nowhere", ["base", "a00"], [[5]], soak_serving.Tally(), end=0)


def refusal(message):
    return json.dumps({"error": {"message": message}})


def test_what_is_lost_and_what_is_a_refusal(client, monkeypatch):
    monkeypatch.setattr(soak_serving.time, "sleep", lambda seconds: None)
    tally = client.tally
    assert not client.settle(200, "{}") and client.settle(429, refusal("64 requests wait"))
    assert client.settle(404, refusal("adapter 'a00' was unloaded")) and not tally.lost
    assert dict(tally.refusals) == {"queue full": 1, "adapter unloaded": 1}
    assert client.settle(500, refusal("the server failed")) and client.settle(400, refusal("the prompt is empty"))
    assert len(tally.lost) == 2
    client.finish("key", "5 6", "length")
    client.finish("key", "5 6", "stop")
    assert tally.counts["answered"] == 2 and len(tally.lost) == 2
    client.finish("key", "5 7", "length")
    client.finish("other", "5", "timeout")
    assert "another answer" in tally.lost[2] and "timeout" in tally.lost[3] and tally.counts["answered"] == 2


def test_a_bad_request_that_is_taken_is_lost(client, monkeypatch):
    monkeypatch.setattr(client, "call", lambda *arguments: (200, '{"choices": []}'))
    client.bad()
    assert len(client.tally.lost) == 1 and not client.tally.refusals


@pytest.mark.slow
def test_short_soak(tmp_path):
    done = subprocess.run([sys.executable, SCRIPTS / "soak_serving.py", "--tiny", "--minutes", "0.3", "--flood", "1000",
                           "--adapters", "12", "--slots", "3", "--json", tmp_path / "soak.json"], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    values = {m["name"]: m["value"] for m in json.loads((tmp_path / "soak.json").read_text())["measures"]}
    assert values["lost"] == 0 and values["answered"] > 0 and values["refused"] > 0 and values["slot_evictions"] > 0
