"""The serving scripts: what the soak counts as lost, and a short soak over a tiny model."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import soak_clients  # noqa: E402
import soak_serving  # noqa: E402


@pytest.fixture
def client():
    return soak_clients.Client(0, "nowhere", ["base", "a00", "a01", "a02"], [[5]], soak_clients.Tally(), end=0)


def refusal(message):
    return json.dumps({"error": {"message": message}})


def test_what_is_lost_and_what_is_a_refusal(client, monkeypatch):
    monkeypatch.setattr(soak_clients.time, "sleep", lambda seconds: None)
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


def test_equal_ensembles_give_equal_answers(client):
    from colora_ms.errors import QueueFullError, UnknownAdapterError

    asked, answers = [], [[5, 6], [5, 6], [5, 7]]
    client.mixed = lambda prompt, adapters, tokens: asked.append((prompt, adapters, tokens)) or answers[len(asked) - 1]
    for _ in answers:
        client.mix()
    assert asked == [([5], ["a00", "a01", "a02"], 1)] * 3
    assert client.tally.counts["mixes"] == 3 and client.tally.counts["answered"] == 2
    assert len(client.tally.lost) == 1 and "another answer" in client.tally.lost[0]

    def refuse(*arguments, error):
        raise error("no")

    for error in (QueueFullError, UnknownAdapterError):
        client.mixed = lambda *arguments, error=error: refuse(error=error)
        client.mix()
    assert dict(client.tally.refusals) == {"queue full": 1, "adapter unloaded": 1} and len(client.tally.lost) == 1


def test_the_soaks_engine_gets_few_blocks(monkeypatch):
    paged = types.SimpleNamespace(BLOCK=16, block_bytes=lambda config: 100)
    monkeypatch.setitem(sys.modules, "colora_ms.models.paged_cache", paged)
    # The longest ensemble: three rows of 60 + 64 tokens, eight blocks each.
    assert soak_serving.engine_options(None) == {"max_length": 160, "cache_bytes": 26 * 100, "ahead": 1}


@pytest.mark.slow
def test_short_soak(tmp_path):
    done = subprocess.run([sys.executable, SCRIPTS / "soak_serving.py", "--tiny", "--minutes", "0.3", "--flood", "1000",
                           "--adapters", "12", "--slots", "3", "--json", tmp_path / "soak.json"], capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    values = {m["name"]: m["value"] for m in json.loads((tmp_path / "soak.json").read_text())["measures"]}
    assert values["lost"] == 0 and values["answered"] > 0 and values["refused"] > 0 and values["slot_evictions"] > 0
