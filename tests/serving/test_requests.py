"""Streams, limits, refusals and ends of requests; prefixes; failures that must not end the engine."""

import threading
import time

import numpy as np
import pytest

from colora_ms.decoding import Contrast, Sampling
from colora_ms.errors import (
    AdapterError,
    DecodingError,
    EngineClosedError,
    QueueFullError,
    ServingError,
    UnknownAdapterError,
)
from tests.serving.conftest import adapter_tensors, write_adapter

LONG = dict(max_new_tokens=80, ignore_eos=True)


def busy(engine, count=4):
    """Requests that take all rows for a while."""
    return [engine.submit([5 + i], **LONG) for i in range(count)]


def end(handles):
    for handle in handles:
        handle.cancel()
    for handle in handles:
        handle.result(60)


def test_pieces_are_the_completion(engine):
    handle = engine.submit([7, 8, 9], adapter="a0", contrast=Contrast(), max_new_tokens=20, ignore_eos=True,
                           records=True)
    pieces = list(handle.pieces(60))
    done = handle.result()
    assert "".join(p.text for p in pieces) == done.text and len(pieces) > 2
    assert sum((p.tokens for p in pieces), ()) == done.tokens and len(done.tokens) == 20
    assert sum((p.records for p in pieces), ()) == done.records
    assert [r.token for r in done.records] == list(done.tokens)
    assert all((r.expert < r.best) == r.changed for r in done.records)
    assert all(abs(1.5 * r.expert - 0.5 * r.amateur - r.score) < 1e-3 for r in done.records)
    assert (done.prompt_tokens, done.finish_reason, done.adapter) == (3, "length", "a0")
    assert list(handle.pieces()) == [] and handle.usage.generated == 20
    timing = handle.timing
    assert timing.submitted <= timing.admitted <= timing.first_token <= timing.finished


def test_iteration_gives_text_and_listeners_hear_of_it(engine):
    news = threading.Event()
    handle = engine.submit("7 8 9", max_new_tokens=9, ignore_eos=True)
    handle.subscribe(news.set)
    assert "".join(handle) == handle.result().text and news.is_set()
    assert engine.submit("7 8 9", max_new_tokens=9).result(60).records == ()


def test_stop_strings_cut_text_and_tokens_wherever_the_chunk_ends(engine):
    whole = engine.submit([7, 8, 9], max_new_tokens=20, ignore_eos=True).result(60)
    words = whole.text.split(" ")
    stop = " " + words[6] + " "
    first = whole.text.index(stop)
    done = engine.submit([7, 8, 9], max_new_tokens=20, ignore_eos=True, stop=(stop, "never")).result(60)
    assert done.text == whole.text[:first] and done.finish_reason == "stop"
    kept = len(done.tokens)
    assert done.tokens == whole.tokens[:kept] and stop in engine.tokenizer.decode(done.tokens)
    assert stop not in engine.tokenizer.decode(done.tokens[:-1])
    streamed = engine.submit([7, 8, 9], max_new_tokens=20, ignore_eos=True, stop=stop)
    assert "".join(streamed) == done.text  # nothing of the stop string was ever shown


def test_end_of_sequence_ends_it(engine):
    handles = {first: engine.submit([first], max_new_tokens=24) for first in range(3, 63)}
    first, done = next((f, h.result(60)) for f, h in handles.items() if h.result(60).finish_reason == "stop")
    assert done.tokens[-1] == 2 and 2 not in done.tokens[:-1]
    longer = engine.submit([first], max_new_tokens=24, ignore_eos=True).result(60)
    assert longer.tokens[:len(done.tokens)] == done.tokens and len(longer.tokens) == 24


def test_budget_is_cut_to_the_cache(engine):
    done = engine.submit([9] * 90, max_new_tokens=50, ignore_eos=True).result(60)
    assert len(done.tokens) == 6 and done.finish_reason == "length"


@pytest.mark.parametrize("prompt, settings, error, message", [
    ("", {}, DecodingError, "empty"), ([], {}, DecodingError, "empty"), ([97], {}, DecodingError, "vocabulary"),
    ([-1], {}, DecodingError, "vocabulary"), ([5] * 96, {}, DecodingError, "holds 96"),
    ([5], dict(max_new_tokens=0), DecodingError, "max_new_tokens=0"),
    ([5], dict(max_new_tokens=True), DecodingError, "True"),
    ([5], dict(contrast=Contrast()), DecodingError, "needs adapter"),
    ([5], dict(contrast=0.5), DecodingError, "Contrast"),
    ([5], dict(sampling="greedy"), DecodingError, "Sampling"), ([5], dict(stop=("",)), DecodingError, "stop"),
    ([5], dict(stop=["x"] * 17), DecodingError, "at most 16"), ([5], dict(seed=-1), DecodingError, "seed=-1"),
    ([5], dict(priority="high"), DecodingError, "priority"), ([5], dict(timeout=0), DecodingError, "timeout=0"),
    ([5], dict(timeout=float("nan")), DecodingError, "timeout=nan"),
    ([5], dict(adapter="nobody"), UnknownAdapterError, "no adapter 'nobody'"),
    ([5], dict(adapter="../a0"), AdapterError, "cannot be an adapter's name"),
    ([5], dict(adapter="/etc"), AdapterError, "cannot be an adapter's name"),
])
def test_bad_requests_are_refused_at_once(engine, prompt, settings, error, message):
    before = engine.stats()
    with pytest.raises(error, match=message):
        engine.submit(prompt, **settings)
    after = engine.stats()
    assert after["refused"] == before["refused"] + 1 and after["submitted"] == before["submitted"]


def test_seed_replaces_the_samplings_own(engine):
    hot = Sampling(1.5, seed=1)
    a, b, c = (engine.submit([5, 6], sampling=s, seed=seed, max_new_tokens=12).result(60).tokens
               for s, seed in ((hot, None), (Sampling(1.5, seed=2), 1), (hot, 3)))
    assert a == b != c


def test_cancel_in_the_batch_and_in_the_queue(engine):
    running = busy(engine)
    waiting = engine.submit([5], **LONG)
    next(running[0].pieces(60))
    end([waiting, running[0]])
    assert waiting.result().finish_reason == "cancelled" and waiting.result().tokens == ()
    partial = running[0].result()
    assert partial.finish_reason == "cancelled" and 0 < len(partial.tokens) < 80
    end(running)
    running[0].cancel()  # harmless by now


def test_timeouts_in_the_queue_and_in_the_batch(engine):
    running = busy(engine)
    next(running[-1].pieces(60))
    late = engine.submit([5], timeout=1e-4, **LONG)
    assert late.result(60).finish_reason == "timeout" and late.result().tokens == ()
    with pytest.raises(TimeoutError, match="has not ended"):
        engine.submit([5], priority=-5, **LONG).result(1e-6)
    end(running)
    hurried = engine.submit([5], timeout=0.02, **LONG).result(60)
    assert hurried.finish_reason in ("timeout", "length")
    while engine.stats()["running"]:
        time.sleep(0.01)


def test_priorities_go_first_and_pairs_start_together(engine):
    running = busy(engine)
    order = []
    later = [engine.submit([9], adapter="a0" if pair else None, contrast=Contrast() if pair else None, priority=p,
                           max_new_tokens=3, ignore_eos=True)
             for p, pair in ((0, False), (2, True), (1, False), (2, False))]
    end(running)
    for handle in later:
        handle.result(60)
    order = [h.timing.admitted for h in later]
    assert order[1] <= order[3] <= order[2] <= order[0]


def test_ten_thousand_requests(engine):
    running = busy(engine)
    taken, refused = [], 0
    for i in range(10_000):
        try:
            taken.append(engine.submit([3 + i % 90], max_new_tokens=1))
        except QueueFullError as error:
            refused += 1
            message = str(error)
    assert refused >= 9_000 and "try again later" in message
    assert engine.stats()["waiting"] <= 64
    end(running)
    assert all(len(handle.result(60).tokens) == 1 for handle in taken)


def test_common_prefixes_are_computed_once_and_change_nothing(engine):
    prefix = np.random.default_rng(8).integers(3, 97, 50).tolist()
    prompts = [prefix + [10 + i, 11] for i in range(6)]
    settings = [dict(adapter="a0"), dict(adapter="a0", contrast=Contrast()), dict(adapter="a1", contrast=Contrast()),
                dict(adapter=None), dict(adapter="a0"), dict(adapter=None)]

    def computed():
        return engine.stats()["prompt_rows_tokens"]

    engine.call(engine._core.clear)
    handles = [engine.submit(p, max_new_tokens=10, **s) for p, s in zip(prompts, settings)]
    before = computed()
    together = [h.result(60).tokens for h in handles]
    # a0: one whole prompt and two ends; a1: one whole; the base (two amateurs, two requests): one whole and three ends.
    assert computed() - before <= 3 * 51 + 5 * 2
    assert sum(h.usage.cached for h in handles) >= 5 * 49
    for prompt, setting, tokens in zip(prompts, settings, together):
        engine.call(engine._core.clear)
        handle = engine.submit(prompt, max_new_tokens=10, **setting)
        assert handle.result(60).tokens == tokens and handle.usage.cached == 0


def test_a_salt_keeps_prefixes_apart(engine):
    prompt = np.random.default_rng(10).integers(3, 97, 40).tolist()
    handles = [engine.submit(prompt, adapter="a0", max_new_tokens=8, cache_salt=salt)
               for salt in (None, "one", "one", None, "two")]
    assert len({handle.result(60).tokens for handle in handles}) == 1
    assert [handle.usage.cached for handle in handles] == [0, 0, 39, 39, 0]
    for salt in ("", 5, "x" * 257):
        with pytest.raises(DecodingError, match="cache_salt="):
            engine.submit(prompt, cache_salt=salt)


def test_new_content_never_meets_old_keys_and_values(engine, adapter_folder):
    prompt = np.random.default_rng(9).integers(3, 97, 40).tolist()
    write_adapter(adapter_folder / "fresh", seed=50, r=3)
    first = engine.submit(prompt, adapter="fresh", max_new_tokens=10).result(60).tokens
    write_adapter(adapter_folder / "fresh", seed=51, r=3)
    engine.bank.load("fresh")
    handle = engine.submit(prompt, adapter="fresh", max_new_tokens=10)
    second = handle.result(60).tokens
    assert handle.usage.cached == 0 and second != first
    write_adapter(adapter_folder / "twin", seed=51, r=3)  # another name of the same content may use them
    handle = engine.submit(prompt, adapter="twin", max_new_tokens=10)
    assert handle.result(60).tokens == second and handle.usage.cached == 39


def test_an_adapter_that_overflows_fails_alone(engine, adapter_folder):
    tensors = {key: np.full_like(value, 1e30) for key, value in adapter_tensors(3, 2).items()}
    write_adapter(adapter_folder / "huge", seed=0, r=2, tensors=tensors)
    alone = engine.submit([5, 6, 7], adapter="a0", max_new_tokens=20, ignore_eos=True).result(60).tokens
    before = engine.stats()
    good = engine.submit([5, 6, 7], adapter="a0", max_new_tokens=20, ignore_eos=True)
    bad = [engine.submit([5, 6, 7], adapter="huge", contrast=c, max_new_tokens=20) for c in (None, Contrast())]
    for handle in bad:
        with pytest.raises(AdapterError, match="'huge' makes the model's logits infinite"):
            handle.result(60)
        with pytest.raises(AdapterError):
            list(handle.pieces())
    assert good.result(60).tokens == alone
    after = engine.stats()
    assert after["failures"] == before["failures"] and after["failed"] == before["failed"] + 2


def test_nothing_compiles_after_the_warm_up(engine, adapter_folder):
    engine.warm_up()
    compiled = engine.stats()["graphs"]
    random = np.random.default_rng(4)
    handles = []
    for i in range(30):
        adapter = [None, "a0", "a1", "a2", "a3", "a4", "a5"][random.integers(7)]
        contrast = Contrast(0.1, random.random()) if adapter and random.random() < 0.5 else None
        handles.append(engine.submit(random.integers(3, 97, random.integers(1, 60)).tolist(), adapter=adapter,
                                     contrast=contrast, sampling=Sampling(float(random.integers(2)), seed=i),
                                     max_new_tokens=int(random.integers(1, 15))))
    for handle in handles:
        assert handle.result(60).finish_reason in ("stop", "length")
    stats = engine.stats()
    assert stats["graphs"] == compiled and stats["bank"]["pinned"] == 0
    assert stats["waiting"] == stats["starting"] == stats["running"] == 0


def test_a_failing_graph_ends_its_requests_only(engine, monkeypatch):
    alone = engine.submit([5, 6, 7], max_new_tokens=8).result(60).tokens
    graph, run = engine._core.graph, engine._core.graph.run

    def fail(batch):
        monkeypatch.setattr(graph, "run", run)
        raise RuntimeError("out of order")

    monkeypatch.setattr(graph, "run", fail)
    with pytest.raises(ServingError, match="out of order"):
        engine.submit([5, 6, 7], adapter="a0", max_new_tokens=8).result(60)
    assert engine.submit([5, 6, 7], max_new_tokens=8).result(60).tokens == alone
    stats = engine.stats()
    assert stats["failures"] == 1 and stats["bank"]["pinned"] == 0 and stats["rows_used"] == 0


def test_close(tiny_decoder, word_tokenizer):
    from colora_ms.serving import Engine

    engine = Engine(tiny_decoder(), word_tokenizer, rows=2, max_length=64, chunk=2)
    with pytest.raises(UnknownAdapterError, match="no adapter bank"):
        engine.submit([5], adapter="a0")
    handles = [engine.submit([5], max_new_tokens=60, ignore_eos=True) for _ in range(4)]
    next(handles[0].pieces(60))
    engine.close()
    for handle in handles:
        with pytest.raises(EngineClosedError):
            handle.result(0)
    with pytest.raises(EngineClosedError):
        engine.submit([5])
    with pytest.raises(EngineClosedError):
        engine.call(lambda: None)
    engine.close()
    engine = Engine(tiny_decoder(), word_tokenizer, rows=2, max_length=64, chunk=2)
    handle = engine.submit([5], max_new_tokens=3, ignore_eos=True)
    engine.close(drain=True)
    assert len(handle.result(0).tokens) == 3
