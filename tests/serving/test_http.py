"""The HTTP front through a real server: OpenAI's client, raw requests, refusals, and clients that leave."""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse

import pytest

from colora_ms.decoding import Contrast, Sampling
from colora_ms.errors import ConfigError
from colora_ms.serving.http import Server, Settings, create_app
from tests.serving.conftest import call, write_adapter

PROMPT = [5, 17, 33, 8]


@contextlib.contextmanager
def halted(engine):
    """The engine's thread stands still between two chunks."""
    stands, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=engine.call, args=(lambda: (stands.set(), go.wait(30)),))
    thread.start()
    assert stands.wait(30)
    try:
        yield
    finally:
        go.set()
        thread.join()


@pytest.fixture(scope="module")
def client(served):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=served[1].url + "/v1", api_key="none", max_retries=0)


# -- OpenAI's client ------------------------------------------------------------------------------------------------


def test_client_completion_equals_the_engine(client, served):
    wanted = served[0].submit(PROMPT, adapter="a1", contrast=Contrast(0.1, 0.7), max_new_tokens=12,
                              records=True).result(60)
    found = client.completions.create(model="a1", prompt=PROMPT, max_tokens=12,
                                      extra_body={"contrast": {"alpha": 0.1, "beta": 0.7}, "records": True})
    choice = found.choices[0]
    assert choice.text == wanted.text and choice.finish_reason == wanted.finish_reason and found.model == "a1"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (4, len(wanted.tokens))
    assert [r["token"] for r in choice.records] == list(wanted.tokens)
    assert [r["changed"] for r in choice.records] == [r.token != r.favourite for r in wanted.records]
    assert [r["score"] for r in choice.records] == pytest.approx([r.score for r in wanted.records])


def test_client_chat_stream_equals_the_whole_answer(client):
    options = dict(model="a2", messages=[{"role": "system", "content": "7 8"}, {"role": "user", "content": "9 10"}],
                   max_completion_tokens=20, temperature=0.9, seed=3, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**options)
    events = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content and len(text.split()) > 5
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == whole.choices[0].finish_reason == "length"
    assert events[-1].usage == whole.usage and whole.usage.prompt_tokens == 7 and whole.usage.completion_tokens == 20
    assert len([e for e in events if e.choices and e.choices[0].delta.content]) > 1


def test_client_streams_completions_with_records(client):
    events = list(client.completions.create(model="tiny", prompt="5 6 7", max_tokens=9, stream=True,
                                            extra_body={"records": True, "ignore_eos": True}))
    records = [r for e in events for r in e.choices[0].records]
    assert len(records) == 9 and all(r["token"] == r["favourite"] and not r["changed"] for r in records)
    assert events[-1].choices[0].finish_reason == "length"


def test_client_lists_models_and_gets_clear_errors(client):
    import openai

    assert [m.id for m in client.models.list()] == ["tiny", "a0", "a1", "a2", "a3", "a4", "a5"]
    assert client.models.retrieve("a3").parent == "tiny"
    with pytest.raises(openai.NotFoundError, match="a1"):
        client.completions.create(model="a11", prompt="5")
    with pytest.raises(openai.BadRequestError, match="best_of=2 is less than n=3"):
        client.completions.create(model="tiny", prompt="5", n=3, best_of=2)


# -- what a request may say -------------------------------------------------------------------------------------------


def test_seed_stop_and_several_prompts(ask, served):
    body = {"model": "a0", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.1, "seed": -5, "ignore_eos": True}
    text = ask("POST", "/v1/completions", body)[2]["choices"][0]["text"]
    wanted = served[0].submit(PROMPT, adapter="a0", sampling=Sampling(1.1, seed=2**64 - 5), max_new_tokens=20,
                              ignore_eos=True).result(60)
    assert text == wanted.text and len(text.split()) > 3
    stop = " " + text.split()[2]
    found = ask("POST", "/v1/completions", {**body, "stop": [stop]})[2]["choices"][0]
    assert found["text"] == text[:text.index(stop)] and found["finish_reason"] == "stop"
    without = {ask("POST", "/v1/completions", {**body, "seed": None})[2]["choices"][0]["text"] for _ in range(4)}
    assert len(without) > 1
    found = ask("POST", "/v1/completions", {"model": "a0", "prompt": ["5 6", "9", "5 6"], "max_tokens": 6})[2]
    wanted = [served[0].submit(prompt, adapter="a0", max_new_tokens=6).result(60).text
              for prompt in ("5 6", "9", "5 6")]
    assert [(c["index"], c["text"]) for c in found["choices"]] == list(enumerate(wanted))
    assert found["usage"]["prompt_tokens"] == 5


def test_values_that_ask_for_nothing_are_taken(ask):
    body = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "5 6"}], "name": None}],
            "n": 1, "logprobs": False, "presence_penalty": 0.0, "user": "someone", "tools": [], "max_tokens": 3,
            "response_format": {"type": "text"}, "stop": None, "stream": None}
    assert ask("POST", "/v1/chat/completions", body)[0] == 200


BAD = [
    (dict(n=0), "n", "n=0"),
    (dict(n=True), "n", "integer"),
    (dict(n=129), "n", "128 a request"),
    (dict(n=2, best_of=1), "best_of", "less than n=2"),
    (dict(logprobs=21), "logprobs", "0 to 20"),
    (dict(logprobs=True), "logprobs", "a number"),
    (dict(logprobs=1, echo=True, contrast={}), "echo", "together with contrast"),
    (dict(presence_penalty=2.5), "presence_penalty", "outside [-2, 2]"),
    (dict(logit_bias={"x": 1.0}), None, "no token id"),
    (dict(min_tokens=3), "min_tokens", "more than the answer may have, 2"),
    (dict(best_of=3, stream=True), "best_of", "cannot be streamed"),
    (dict(suffix="x"), "suffix", "does not implement"),
    (dict(frequency_penalty=-2.5), "frequency_penalty", "outside [-2, 2]"),
    (dict(length_penalty=0.5), "length_penalty", "leave it out"),
    (dict(contrats={"alpha": 0.1}), "contrats", "'contrast'"),
    (dict(contrast={"alpha": 2.0}), None, "alpha=2.0"),
    (dict(contrast={"alfa": 0.1}), "contrast.alfa", "Extra inputs"),
    (dict(contrast={}, model="tiny"), None, "needs adapter"),
    (dict(contrast={"adapt": "entropi"}), None, "'entropy'"),
    (dict(max_tokens=81), "max_tokens", "allows, 80"),
    (dict(max_tokens=0), "max_tokens", "max_tokens=0"),
    (dict(max_tokens=-2), "max_tokens", "max_tokens=-2"),
    (dict(max_tokens="9"), "max_tokens", "integer"),
    (dict(temperature=-1.0), None, "temperature=-1.0"),
    (dict(temperature=float("nan")), None, "not a finite number"),
    (dict(top_p=1.5, temperature=1.0), None, "top_p"),
    (dict(min_p=-0.1, temperature=1.0), None, "min_p"),
    (dict(stop=[""]), None, "stop"),
    (dict(stop=["x"] * 17), None, "at most 16"),
    (dict(prompt=""), None, "empty"),
    (dict(prompt=[]), None, "empty"),
    (dict(prompt=[5, 97]), None, "token id 97"),
    (dict(prompt=[5] * 96), None, "max_length"),
    (dict(prompt=["5"] * 17), "prompt", "17 prompts"),
    (dict(prompt=None), "prompt", "valid"),
    (dict(prompt={"a": 1}), "prompt", "valid"),
    (dict(stream_options={"include_usage": True}), "stream_options", "stream"),
    (dict(model=None), "model", "string"),
    (dict(model="../a0"), "model", "cannot be an adapter's name"),
    (dict(model="/etc"), "model", "cannot be an adapter's name"),
    (dict(model=""), "model", "cannot be an adapter's name"),
]


@pytest.mark.parametrize("change, param, words", BAD)
def test_bad_values_are_400_with_a_sentence(ask, change, param, words):
    status, _, answer = ask("POST", "/v1/completions", {"model": "a0", "prompt": "5", "max_tokens": 2, **change})
    error = answer["error"]
    assert status == 400 and words in error["message"] and error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("message, words", [
    ([], "empty"), ([{"role": "user"}], "content"), ([{"content": "5"}], "role"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "text only"),
    ([{"role": "assistant", "content": "5", "tool_calls": [{}]}], "tool_calls"), ("5", "list"),
])
def test_bad_messages(ask, message, words):
    status, _, answer = ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": message})
    assert status == 400 and words in answer["error"]["message"]


def test_broken_bodies(ask):
    post = lambda **more: ask("POST", "/v1/completions", **more)  # noqa: E731
    assert post(raw="{")[0] == 400 and "JSON" in post(raw="{")[2]["error"]["message"]
    assert post(raw="[" * 15_000)[0] == 400
    assert post(raw="[1]")[0] == 400
    assert post()[0] == 400
    assert post(raw='{"model": "tiny", "prompt": "5", "max_tokens": 1}',
                headers={"Content-Type": "text/plain"})[0] == 400
    status, _, answer = post(raw='"' + "a" * 20_001 + '"')
    assert status == 413 and "20000 bytes" in answer["error"]["message"]
    chunked = (b'{"model": "' + b"a" * 9_000 for _ in range(3))
    assert post(raw=chunked)[0] == 413  # sent in chunks, without its length
    assert ask("GET", "/v1/nothing")[2]["error"]["type"] == "not_found_error"
    assert ask("GET", "/v1/completions")[0] == 405


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_load_use_unload(ask, adapter_folder):
    write_adapter(adapter_folder / "late", seed=50, r=2)
    try:
        assert ask("POST", "/v1/adapters", {"name": "late"})[2]["state"] == "host"
        assert ask("POST", "/v1/completions", {"model": "late", "prompt": "5", "max_tokens": 2})[0] == 200
        assert ask("DELETE", "/v1/adapters/late")[2]["deleted"] is True
        status, _, answer = ask("POST", "/v1/completions", {"model": "late", "prompt": "5", "max_tokens": 2})
        assert status == 404 and answer["error"]["code"] == "model_not_found"
        assert "unloaded" in answer["error"]["message"]
        assert "late" not in [m["id"] for m in ask("GET", "/v1/models")[2]["data"]]
        assert ask("POST", "/v1/adapters", {"name": "late"})[0] == 200
        assert ask("POST", "/v1/completions", {"model": "late", "prompt": "5", "max_tokens": 2})[0] == 200
    finally:
        ask("DELETE", "/v1/adapters/late")
        for file in (adapter_folder / "late").iterdir():
            file.unlink()
        (adapter_folder / "late").rmdir()


def test_broken_adapters_are_refused_and_the_engine_goes_on(ask, adapter_folder):
    path = adapter_folder / "broken"
    write_adapter(path, seed=51, r=7)  # the bank takes 6
    try:
        for method, target, body in (("POST", "/v1/adapters", {"name": "broken"}),
                                     ("POST", "/v1/completions", {"model": "broken", "prompt": "5"})):
            status, _, answer = ask(method, target, body)
            assert status == 400 and answer["error"]["code"] == "adapter_invalid"
            assert "rank 7" in answer["error"]["message"]
            assert str(adapter_folder) not in answer["error"]["message"]
        (path / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
        assert ask("POST", "/v1/adapters", {"name": "broken"})[0] == 400
    finally:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    for name in ("../a0", "a0/../a1", "%2e%2e%2fa0", "..", "nothing"):
        assert ask("DELETE", f"/v1/adapters/{name}")[0] in (400, 404)
    for body in ({"name": "../x"}, {"name": 5}, {}, {"name": "a0", "path": "/"}, {"name": "tiny"}, []):
        assert ask("POST", "/v1/adapters", body)[0] == 400
    assert ask("POST", "/v1/adapters", {"name": "nothing"})[0] == 404
    assert ask("POST", "/v1/completions", {"model": "a0", "prompt": "5", "max_tokens": 2})[0] == 200


def test_an_unload_beside_a_load(ask, served, monkeypatch):
    bank = served[0].bank
    load = bank.load
    monkeypatch.setattr(bank, "load", lambda name: (load(name), bank.unload(name)))
    status, _, answer = ask("POST", "/v1/adapters", {"name": "a5"})
    monkeypatch.undo()
    assert status == 404 and "was unloaded" in answer["error"]["message"]
    assert ask("POST", "/v1/adapters", {"name": "a5"})[0] == 200


def test_base_name_must_differ_from_the_adapters(engine):
    with pytest.raises(ConfigError, match="a0"):
        create_app(engine, Settings(base_model="a0"))


# -- load and state ---------------------------------------------------------------------------------------------------


def test_full_queue_is_429(ask, served):
    engine = served[0]
    with halted(engine):
        handles = [engine.submit([5], max_new_tokens=1) for _ in range(64)]
        status, headers, answer = ask("POST", "/v1/completions", {"model": "tiny", "prompt": "5"})
        assert status == 429 and headers["Retry-After"] == "1" and "64 requests wait" in answer["error"]["message"]
        # Of several prompts all are taken or none.
        handles.pop().cancel()
    assert all(handle.result(60).tokens for handle in handles)
    assert ask("POST", "/v1/completions", {"model": "tiny", "prompt": "5", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize("stream", (True, False))
def test_a_client_that_leaves_cancels_its_request(served, stream):
    engine, server = served
    before = engine.stats()
    seen = []
    submit = engine.submit
    engine.submit = lambda *a, **k: seen.append(submit(*a, **k)) or seen[-1]
    try:
        with halted(engine):
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(server.url).netloc, timeout=30)
            body = json.dumps({"model": "a1", "prompt": ["5 6", "7"], "max_tokens": 80, "stream": stream,
                               "ignore_eos": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            wait_for(lambda: len(seen) == 2)
            cancelled = []
            for handle in seen:
                inner = handle._cancel
                handle._cancel = lambda one, inner=inner: (cancelled.append(one), inner(one))
            connection.close()
            wait_for(lambda: len(cancelled) == 2)
        assert [handle.result(60).finish_reason for handle in seen] == ["cancelled"] * 2
        assert engine.stats()["cancelled"] == before["cancelled"] + 2
    finally:
        del engine.submit


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_health_and_metrics(ask, served):
    ask("POST", "/v1/completions", {"model": "a0", "prompt": "5 6", "max_tokens": 5, "ignore_eos": True})
    assert ask("GET", "/healthz")[2]["status"] == "ok"
    text = ask("GET", "/metrics")[2]
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    stats = served[0].stats()
    assert float(values["colora_generated_tokens_total"]) == stats["generated_tokens"] >= 5
    assert float(values["colora_adapter_slot_hits_total"]) == stats["bank"]["hits"]
    assert float(values["colora_requests_waiting"]) == 0 and float(values["colora_batch_rows"]) == stats["rows"]
    assert float(values["colora_first_token_seconds_count"]) >= 1 and float(values["colora_token_seconds_count"]) >= 1
    assert any(name.startswith("colora_http_responses_total") and 'route="/v1/completions"' in name and '"200"' in name
               for name in values)


def test_token(engine):
    app = create_app(engine, Settings(base_model="tiny", token="s3cret"))
    with Server(app) as server:
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Basic s3cret"},
                        {"Authorization": "Bearer \u00e9"}):
            status, answered, answer = call(server.url, "GET", "/v1/models", headers=headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert answered["WWW-Authenticate"] == "Bearer"
        assert call(server.url, "GET", "/metrics")[0] == 401
        assert call(server.url, "GET", "/v1/models", headers={"Authorization": "Bearer s3cret"})[0] == 200
        assert call(server.url, "GET", "/healthz")[0] == 200
    for token in ("", " a", "\u00e9"):
        with pytest.raises(ConfigError):
            Settings(token=token)


def test_loopback_unless_told_otherwise(served):
    assert urllib.parse.urlsplit(served[1].url).hostname == "127.0.0.1"
