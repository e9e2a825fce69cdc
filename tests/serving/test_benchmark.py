"""What scripts/serving_worker.py asks of the engine for the serving benchmark, on the tiny model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import serving_worker  # noqa: E402

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12]]


@pytest.fixture
def ours(engine, monkeypatch):
    monkeypatch.setattr(serving_worker, "VOCABULARY", 97)
    handler = serving_worker.Ours()
    handler.engine, handler.bank, handler.names = engine, engine.bank, [f"a{i}" for i in range(6)]
    return handler


def test_a_full_batch_starts_together(ours):
    steps = {}
    for case in ("base", "single", "mixed"):
        before = ours.engine.stats()["steps"]
        found = ours.run(case, PROMPTS, 9)
        steps[case] = ours.engine.stats()["steps"] - before
        wanted = [ours.engine.submit(ids, adapter=name, max_new_tokens=9, ignore_eos=True).result(60).tokens
                  for ids, name in zip(PROMPTS, {"base": [None] * 3, "single": ["a0"] * 3, "mixed": ours.names}[case])]
        assert [tuple(answer) for answer in found["tokens"]] == wanted and found["seconds"] > 0
    # Three rows that went separately would take more steps than the 9 of one.
    assert all(9 <= count < 27 for count in steps.values())


def test_load(ours):
    found = ours.adapters_under_load(adapters=5, clients=3, requests=7, seed=1)
    assert found["tokens"] == 224 and len(found["first"]) == 7 and min(found["first"]) > 0
    assert len(found["between"]) > 7 and min(found["between"]) >= 0 and found["evictions"] > 0


def test_swaps(ours, monkeypatch):
    monkeypatch.setattr(ours.bank, "host_bytes", 30_000)  # one adapter or two
    for name in ours.names:
        ours.bank.load(name)
    found = ours.swaps(PROMPTS, tokens=40, count=3)
    assert found["same"] and len(found["read_ms"]) == 3 and min(found["read_ms"]) > 0 and min(found["place_ms"]) > 0
