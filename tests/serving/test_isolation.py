"""One request takes nobody down: extreme values of every option, failing graphs, failing callers."""

import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colora_ms.decoding import Contrast, Sampling
from colora_ms.errors import ColoraError, DecodingError, ServingError
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import unfused
from tests.serving.test_http import call, halted

NEIGHBOUR = dict(adapter="a1", contrast=Contrast(0.1, 0.7), sampling=Sampling(0.9, 20, 0.95, 4), max_new_tokens=24,
                 ignore_eos=True)
NUMBERS = [2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, -1, -2**31 - 1, 0, 1, 0.0, -0.0, 1e39, -1e39,
           3.4028235e38, 3.4028236e38, 1e38, 1e-38, 1e-40, 1e-45, 1e-50, 5e-324, 1.0 + 2**-30, 1.7e308, math.inf,
           -math.inf,
           math.nan]
OTHERS = [True, False, "1", "", None, b"1", [], [1], {}, 1j, Decimal("0.5"), Fraction(1, 3), Fraction(10**500),
          object(),
          np.float32(1e-40), np.float64(1e300), np.float16(0.5), np.int64(2**40), np.uint64(2**64 - 1), np.bool_(True),
          np.float32("nan"), np.longdouble("1e4000"), np.array(0.5), np.array([0.5, 0.5])]
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(OTHERS), st.floats(), st.integers(),
                   st.floats(0, 1), st.integers(0, 100))
OPTIONS = ["alpha", "beta", "adapt", "skip_copies", "temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens",
           "priority", "timeout", "stop", "stop_token_ids", "records", "ignore_eos", "prompt", "adapter"]


@pytest.fixture(scope="module")
def alone(engine):
    return engine.submit([7, 8, 9], **NEIGHBOUR).result(60).tokens


def submit(engine, wanted):
    """A request with these options, the contrast's and the sampling's among them."""
    wanted = dict(wanted)
    prompt = wanted.pop("prompt", [5, 6])
    contrast = {name: wanted.pop(name) for name in ("alpha", "beta", "adapt", "skip_copies") if name in wanted}
    sampling = {name: wanted.pop(name) for name in ("temperature", "top_k", "top_p", "min_p", "seed") if name in wanted}
    return engine.submit(prompt, **{"adapter": "a0", "contrast": Contrast(**contrast), "max_new_tokens": 6,
                                    "sampling": Sampling(**{"temperature": 0.8, **sampling}), **wanted})


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=3))
def test_extreme_options_are_answered_or_refused_alone(engine, alone, wanted):
    failures = engine.stats()["failures"]
    neighbour = engine.submit([7, 8, 9], **NEIGHBOUR)
    try:
        found = submit(engine, wanted).result(60)
        assert found.finish_reason in ("stop", "length", "timeout")
    except ColoraError as error:
        assert 0 < len(str(error)) < 500
    assert neighbour.result(60).tokens == alone
    assert engine.stats()["failures"] == failures


@pytest.mark.parametrize("wanted, like", [
    (dict(top_k=2147483648), dict(top_k=0)), (dict(top_k=10**400), dict(top_k=0)), (dict(top_k=97), dict(top_k=0)),
    (dict(top_p=0), dict(temperature=0)), (dict(top_p=1e-50), dict(temperature=0)), (dict(top_p=0.0), dict(top_k=1)),
    (dict(min_p=1), dict(top_k=1)), (dict(min_p=0), dict(top_p=1.0)),
    (dict(temperature=1e-50), dict(temperature=0)), (dict(temperature=1e-42), dict(temperature=0)),
    (dict(beta=1e-50), dict(beta=0)), (dict(seed=2**64 + 3), dict(seed=3)),
    (dict(max_new_tokens=10**30), dict(max_new_tokens=94)),
    (dict(priority=10**30), {}), (dict(timeout=10**300), {}), (dict(alpha=np.float32(0.25)), dict(alpha=0.25)),
    (dict(temperature=np.float64(1.5)), dict(temperature=1.5)), (dict(top_k=np.int64(3)), dict(top_k=3)),
])
def test_extreme_options_with_a_clear_meaning(engine, wanted, like):
    assert submit(engine, wanted).result(60).tokens == submit(engine, like).result(60).tokens


@pytest.mark.parametrize("name, value, words", [
    ("alpha", 1e-50, "rounds to 0 in float32"), ("alpha", 1e-40, "rounds to 0 in float32"),
    ("alpha", 1 + 1e-12, r"outside \(0, 1\]"),
    ("beta", 1e39, "more than float32 holds"), ("beta", -1e-50, "negative"),
    ("beta", 10**400, "more than float32 holds"),
    ("temperature", 1e39, "more than float32 holds"), ("temperature", -1e-50, "negative"),
    ("temperature", 10**400, "bits"),
    ("top_p", 1.1, r"outside \[0, 1\]"), ("top_p", -1e-50, r"outside \[0, 1\]"),
    ("top_p", math.nan, "not a finite number"),
    ("top_k", -1, "top_k=-1"), ("top_k", 1.0, "top_k=1.0"), ("seed", -2**70, "seed="),
    ("max_new_tokens", 1e3, "max_new_tokens=1000.0"),
    ("timeout", 10**400, "timeout="), ("stop", 5, "stop=5"), ("stop", {"a": 1}, "stop="),
    ("stop_token_ids", [97], "0..96"),
    ("stop_token_ids", "50", "list of token ids"), ("stop_token_ids", [2**40], "no token id"),
    ("stop_token_ids", [True], "no token id"),
    ("records", "yes", "records='yes'"), ("ignore_eos", 2, "ignore_eos=2"), ("prompt", 5, "the prompt is 5"),
    ("prompt", [5.0], "5.0"), ("prompt", [2**70], "outside the vocabulary"), ("prompt", ["5"], "no token id"),
])
def test_what_float32_and_int32_do_not_hold_is_refused(engine, name, value, words):
    with pytest.raises(DecodingError, match=words):
        submit(engine, {name: value})


def test_integers_too_long_to_be_written(engine):
    for name in OPTIONS:
        if name in ("top_k", "seed", "priority", "max_new_tokens"):
            assert submit(engine, {name: 10**5000}).result(60).tokens
        else:
            with pytest.raises(ColoraError):
                submit(engine, {name: [10**5000] if name == "prompt" else 10**5000})


def test_a_contrast_that_overflows_fails_alone(engine, alone):
    failures = engine.stats()["failures"]
    neighbour = engine.submit([7, 8, 9], **NEIGHBOUR)
    with pytest.raises(DecodingError, match="beta=3e.38 makes the scores"):
        submit(engine, dict(beta=3e38, alpha=1e-30)).result(60)
    assert neighbour.result(60).tokens == alone and engine.stats()["failures"] == failures


def test_a_contrast_that_overflows_fails_alone_in_the_graph_loop(tiny_decoder, word_tokenizer, tmp_path):
    """Where the token loop is no operator, its parts are, and they refuse a whole batch."""
    from colora_ms.serving import AdapterBank, Engine
    from tests.serving.conftest import write_adapter

    write_adapter(tmp_path / "a0", seed=0)
    decoder = tiny_decoder()
    with Engine(decoder, word_tokenizer, AdapterBank(decoder, tmp_path, max_loaded=1), rows=4, max_length=64,
                chunk=4) as engine:
        engine.call(lambda: unfused(engine._core.graph))
        request = dict(adapter="a0", contrast=Contrast(), max_new_tokens=12, ignore_eos=True)
        alone = engine.submit([7, 8], **request).result(120).tokens
        neighbour = engine.submit([7, 8], **request)
        with pytest.raises(DecodingError, match="beta=3e.38"):
            engine.submit([5, 6], adapter="a0", contrast=Contrast(1e-30, 3e38)).result(120)
        assert neighbour.result(60).tokens == alone and engine.stats()["failures"] == 0


# -- HTTP -------------------------------------------------------------------------------------------------------------

FIELDS = ["temperature", "top_p", "min_p", "top_k", "seed", "max_tokens", "priority", "stop", "stop_token_ids",
          "records",
          "ignore_eos", "echo", "contrast"]
JSON = st.one_of(st.sampled_from([v for v in NUMBERS if not isinstance(v, int) or v.bit_length() < 8000]),
                 st.sampled_from([None, True, False, "1", "", [], [1], ["1"], {}]), st.floats(), st.integers())


@pytest.fixture(scope="module")
def server(engine):
    with Server(create_app(engine, Settings(base_model="tiny", max_tokens=80))) as server:
        yield server


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
       contrast=st.none() | st.fixed_dictionaries({},
                                                  optional={"alpha": JSON, "beta": JSON, "adapt": JSON,
                                                            "skip_copies": JSON}))
def test_extreme_fields_over_http(server, engine, alone, wanted, contrast):
    """JSON as clients write it, NaN and Infinity among it."""
    failures = engine.stats()["failures"]
    neighbour = engine.submit([7, 8, 9], **NEIGHBOUR)
    body = {"model": "a0", "prompt": "5 6", "max_tokens": 4, "temperature": 0.7, **wanted}
    if contrast is not None:
        body["contrast"] = contrast
    status, _, answer = call(server.url, "POST", "/v1/completions", body)
    assert status in (200, 400), answer
    if status == 400:
        assert answer["error"]["type"] == "invalid_request_error" and 0 < len(answer["error"]["message"]) < 700
    else:
        json.dumps(answer, allow_nan=False)
    assert neighbour.result(60).tokens == alone and engine.stats()["failures"] == failures


@pytest.mark.parametrize("raw, status", [
    ('"temperature": NaN', 400), ('"temperature": Infinity', 400), ('"temperature": 1e400', 400),
    ('"temperature": 1e39', 400),
    ('"temperature": 0, "top_p": 0', 200), ('"temperature": 0, "top_p": 7.5, "top_k": -1', 200),
    ('"temperature": 0, "top_p": NaN', 400),
    ('"temperature": 1, "min_p": 1', 200), ('"temperature": 1, "min_p": 1.01', 400),
    ('"temperature": 1, "top_p": 0', 200), ('"temperature": 1, "top_p": 1e-50', 200),
    ('"temperature": 1, "top_k": 2147483648', 200),
    ('"temperature": 1, "top_k": 1' + "0" * 400, 200), ('"temperature": 1, "top_k": 1' + "0" * 6000, 400),
    ('"temperature": 1' + "0" * 400, 400), ('"contrast": {"beta": 1e39}', 400), ('"contrast": {"alpha": 1e-50}', 400),
    ('"contrast": {"beta": -Infinity}', 400), ('"stop_token_ids": [5, 96]', 200), ('"stop_token_ids": [97]', 400),
    ('"priority": 1' + "0" * 100, 200),
])
def test_numbers_of_json(server, raw, status):
    found = call(server.url, "POST", "/v1/completions",
                 raw='{"model": "a0", "prompt": "5 6", "max_tokens": 3, ' + raw + "}")
    assert found[0] == status, found[2]


# -- failures that are not a value's ----------------------------------------------------------------------------------


def poisoned(engine, monkeypatch, guilty, times=10**6):
    """A graph that fails, up to ``times``, whenever a request for which ``guilty`` holds takes part in a call."""
    left = [times]

    def run(batch, real=engine._core.graph.run):
        tables = {tuple(block for block in table if block >= 0) for table in batch.tables.tolist()}
        jobs = [seat.job for seat in engine._core.seats if any(tuple(line.table) in tables for line in seat.lines)]
        if left[0] and any(guilty(job) for job in jobs):
            left[0] -= 1
            raise RuntimeError("the operator refuses a row")
        return real(batch)

    monkeypatch.setattr(engine._core.graph, "run", run)


@pytest.fixture(scope="module")
def fragile(tiny_decoder, word_tokenizer, adapter_folder):
    """An engine whose graphs may fail; the shared one counts its failures."""
    from colora_ms.serving import AdapterBank, Engine

    decoder = tiny_decoder()
    bank = AdapterBank(decoder, adapter_folder, max_loaded=3, max_rank=6)
    with Engine(decoder, word_tokenizer, bank, rows=4, max_length=96, chunk=4, prompt_chunk=24) as engine:
        yield engine


MIX = [dict(adapter=None), dict(adapter="a0", contrast=Contrast(0.1, 0.5)),
       dict(adapter="a2", sampling=Sampling(1.0, seed=5), records=True)]


def test_a_row_that_an_operator_refuses_ends_alone(fragile, monkeypatch):
    wanted = [dict(one, max_new_tokens=20, ignore_eos=True) for one in MIX[:2]]
    alone = [fragile.submit([5 + i, 6], **one).result(60) for i, one in enumerate(wanted)]
    poisoned(fragile, monkeypatch, lambda request: request.adapter == "a3")
    before = fragile.stats()
    good = [fragile.submit([5 + i, 6], **one) for i, one in enumerate(wanted)]
    for handle in good:
        next(handle.pieces(60))  # all have begun when the bad one comes
    bad = fragile.submit([5, 6, 7], adapter="a3", max_new_tokens=9)
    with pytest.raises(ServingError, match="refuses a row"):
        bad.result(60)
    for handle, one in zip(good, alone):
        found = handle.result(60)
        assert (found.tokens, found.text, found.finish_reason) == (one.tokens, one.text, one.finish_reason)
        assert handle.usage.generated == len(found.tokens)
    stats = fragile.stats()
    assert stats["failed"] == before["failed"] + 1 and stats["bank"]["pinned"] == 0 and stats["rows_used"] == 0


def test_a_value_that_got_past_the_checks_ends_its_request(fragile):
    """The operator itself refuses: MindSpore does not run that graph again, so the neighbours go on in new ones."""
    alone = [fragile.submit([7, 8, 9], **one, max_new_tokens=20, ignore_eos=True).result(60) for one in MIX[:2]]
    hacked = Sampling(1.0)
    object.__setattr__(hacked, "top_p", 7.0)
    with halted(fragile):
        bad = fragile.submit([5, 6], sampling=hacked, max_new_tokens=9, priority=1)
        good = [fragile.submit([7, 8, 9], **one, max_new_tokens=20, ignore_eos=True) for one in MIX[:2]]
    with pytest.raises(ServingError, match="top_p"):
        bad.result(120)
    assert [handle.result(120) for handle in good] == alone


@pytest.mark.parametrize("times, ended", [(1, 0), (2, 1)])  # the second failure meets a request that runs alone
def test_a_failure_in_a_batch_ends_at_most_one(fragile, monkeypatch, times, ended):
    wanted = dict(max_new_tokens=20, ignore_eos=True)
    alone = [fragile.submit([5, 6], **one, **wanted).result(60) for one in MIX]
    poisoned(fragile, monkeypatch, lambda request: len(request.answer.tokens) >= 8, times)
    with halted(fragile):
        handles = [fragile.submit([5, 6], **one, **wanted) for one in MIX]
    failed = 0
    for handle, one in zip(handles, alone):
        try:
            parts = list(handle.pieces(60))
        except ServingError:
            failed += 1
            continue
        assert handle.result(60) == one
        assert "".join(part.text for part in parts) == one.text
        assert sum((part.tokens for part in parts), ()) == one.tokens
        assert sum((part.records for part in parts), ()) == one.records
    assert failed == ended and fragile.stats()["bank"]["pinned"] == 0


def test_a_prompt_that_fails_ends_alone(fragile, monkeypatch):
    alone = fragile.submit([7, 8, 9], **NEIGHBOUR).result(60).tokens
    real = fragile._core.graph.run

    def run(batch):
        if ((batch.tokens == 66) & (batch.positions == 1)).any():
            raise RuntimeError("the prompt is refused")
        return real(batch)

    monkeypatch.setattr(fragile._core.graph, "run", run)
    handles = [fragile.submit([7, 8, 9], **NEIGHBOUR), fragile.submit([5, 66, 5], max_new_tokens=3),
               fragile.submit([9, 8, 7], max_new_tokens=3)]
    with pytest.raises(ServingError, match="prompt is refused"):
        handles[1].result(60)
    assert handles[0].result(60).tokens == alone and handles[2].result(60).tokens


def test_a_listener_that_fails_hurts_nobody(engine, alone):
    neighbour, handle = engine.submit([7, 8, 9], **NEIGHBOUR), engine.submit([5], max_new_tokens=8)
    calls = []

    def listener():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("a caller's fault")

    handle.subscribe(listener)
    assert handle.result(60).tokens and neighbour.result(60).tokens == alone


def test_a_tokenizer_that_fails_ends_its_request(engine, alone, monkeypatch):
    failures = engine.stats()["failures"]
    neighbour = engine.submit([7, 8, 9], **NEIGHBOUR)
    handle = engine.submit([5], max_new_tokens=8)
    # The stand-in of the tokenizer is one for all; only this request's decoder is broken.
    request = next((r for r in engine._core.jobs if r.handle is handle), None) or next(
        item[2] for item in engine._waiting._items if item[2].handle is handle)
    monkeypatch.setattr(request.answer._stream, "push", lambda one: 1 / 0)
    with pytest.raises(ServingError, match="division"):
        handle.result(60)
    assert neighbour.result(60).tokens == alone and engine.stats()["failures"] == failures
