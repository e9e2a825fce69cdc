"""What scripts/benchmark_serving.py asks of the engine, on the tiny model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark_serving  # noqa: E402

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12]]


@pytest.fixture
def ours(engine, monkeypatch):
    monkeypatch.setattr(benchmark_serving, "VOCABULARY", 97)
    monkeypatch.setattr(benchmark_serving, "ANSWER_TOKENS", 10)
    handler = benchmark_serving.Ours()
    handler.engine, handler.bank, handler.names = engine, engine.bank, [f"a{i}" for i in range(6)]
    return handler


def test_a_full_batch_starts_together(ours):
    steps = {}
    for case in ("base", "single", "mixed"):
        before = ours.engine.stats()["steps"]
        found = ours.run(case, PROMPTS, 9)
        steps[case] = ours.engine.stats()["steps"] - before
        wanted = [ours.engine.submit(ids, adapter=name, max_new_tokens=9, ignore_eos=True).result(60).tokens
                  for ids, name in zip(PROMPTS, ours.names_of(case, 3))]
        assert [tuple(answer) for answer in found["tokens"]] == wanted and found["seconds"] > 0
    # Three rows that went separately would take more steps than the 9 of one.
    assert all(9 <= count < 27 for count in steps.values())


def test_load(ours):
    found = ours.load_test(adapters=5, clients=3, requests=7, seed=1)
    assert found["tokens"] == 70 and len(found["first"]) == 7 and min(found["first"]) > 0
    assert len(found["between"]) > 7 and min(found["between"]) >= 0 and found["evictions"] > 0


def test_swaps(ours, monkeypatch):
    monkeypatch.setattr(ours.bank, "host_bytes", 30_000)  # one adapter or two
    for name in ours.names:
        ours.bank.load(name)
    found = ours.swaps(PROMPTS, tokens=40, count=3)
    assert found["same"] and len(found["read_ms"]) == 3 and min(found["read_ms"]) > 0 and min(found["place_ms"]) > 0
