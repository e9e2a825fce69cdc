"""The benchmarks' load: what is asked, how answers are counted, the arithmetic of the measures; over fake servers."""

import argparse
import contextlib
import http.server
import json
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import benchmark_loading  # noqa: E402
import benchmark_serving  # noqa: E402
import llama_server  # noqa: E402
import serving_load  # noqa: E402
import serving_pairs  # noqa: E402
from benchmark_common import BenchmarkError  # noqa: E402


@contextlib.contextmanager
def fake_server(events, status=200, pause=0.0):
    """A server whose streams are these events; yields (address, bodies that came)."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            for event in events:
                time.sleep(pause)
                text = event if isinstance(event, str) else json.dumps(event)
                self.wfile.write(f"data: {text}\n\n".encode())
                self.wfile.flush()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def event(*texts, **more):
    return {"choices": [{"text": text} for text in texts], **more}


GOOD = [event("a"), event(""), event("b"), event("c", finish_reason=None), event(usage={"completion_tokens": 4}),
        "[DONE]"]


# -- what is asked ----------------------------------------------------------------------------------------------------


def test_prompts_have_the_same_lengths_and_no_common_beginning():
    one, other = serving_load.load_prompts(64, 1), serving_load.load_prompts(64, 2)
    lengths = [len(ids) for ids in one]
    assert lengths == [len(ids) for ids in other]
    assert min(lengths) == 16 and max(lengths) == 512 and np.mean(lengths) == pytest.approx(264, abs=1)
    assert lengths != sorted(lengths)
    assert len({tuple(ids[:2]) for ids in one + other}) == 128
    assert one == serving_load.load_prompts(64, 1)
    assert all(16 <= token < 49152 for ids in one for token in ids)


def test_a_closed_loop_keeps_its_clients_busy_and_the_order():
    lock, running, most = threading.Lock(), 0, 0

    def work(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return 10 * item

    seconds, results = serving_load.closed_loop(list(range(12)), 3, work)
    assert results == [10 * i for i in range(12)] and most == 3 and seconds >= 0.04


def test_a_closed_loop_ends_with_the_first_error():
    done = []

    def work(item):
        if item == 2:
            raise BenchmarkError("no answer")
        done.append(item)

    with pytest.raises(BenchmarkError, match="no answer"):
        serving_load.closed_loop(list(range(1000)), 1, work)
    assert done == [0, 1]


# -- answers over HTTP ------------------------------------------------------------------------------------------------


def test_a_stream_is_timed_by_its_texts_and_counted_by_its_usage():
    with fake_server(GOOD, pause=0.02) as (address, bodies):
        load = serving_load.drive(address, [[5, 6], [7]], 1, tokens=4)
    assert bodies[1] == {"model": "base", "prompt": [7], "max_tokens": 4, "temperature": 0, "ignore_eos": True,
                         "stream": True, "stream_options": {"include_usage": True}}
    assert [one.text for one in load.answers] == ["abc", "abc"]
    # The event without text begins no gap of its own: b comes two pauses after a, c one after b.
    assert len(load.first) == 2 and len(load.between) == 4 and min(load.first) >= 0.02
    first, second = load.answers[0].between
    assert first >= 0.04 and second >= 0.02
    assert load.tokens_per_second == pytest.approx(8 / load.seconds)


@pytest.mark.parametrize("events, status, words", [
    (["overloaded"], 503, "answered 503: data: overloaded"),
    ([event("a"), {"error": {"message": "the request failed"}}, "[DONE]"], 200, "the request failed"),
    (GOOD[:-1], 200, "without its last event"),
    ([*GOOD[:-2], "[DONE]"], 200, "token counts"),
    ([event(usage={"completion_tokens": 4}), "[DONE]"], 200, "any text"),
    ([event("a"), event(usage={"completion_tokens": 3}), "[DONE]"], 200, r"answers of \[3\] tokens in place of 4"),
])
def test_what_is_no_whole_answer_ends_the_benchmark(events, status, words):
    with fake_server(events, status) as (address, _), pytest.raises(BenchmarkError, match=words):
        serving_load.drive(address, [[5]], 1, tokens=4)


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_percentiles_are_milliseconds():
    assert serving_load.percentiles([0.001 * i for i in range(101)]) == pytest.approx([50.0, 99.0])


def test_parts_and_blocks():
    assert serving_load.over_parts(6.0, 3.0, 10.0) == pytest.approx(0.9)
    assert serving_load.blocks_wanted(8, 576, 16) == 288 and serving_load.blocks_wanted(2, 17, 16) == 4


def test_compilation_is_what_the_first_answer_costs_more():
    rounds = [{"first": 5.0, "second": 1.0, "bytes": 1 << 20}, {"first": 9.0, "second": 2.0, "bytes": 3 << 20},
              {"first": 4.0, "second": 2.0, "bytes": 2 << 20}]
    assert benchmark_loading.compilation(rounds) == {"s": 4.0, "mib": 2.0}


def test_steps_are_the_difference_of_two_runs():
    asked = []

    def case(name, step):
        return lambda tokens: asked.append((name, tokens)) or 1.0 + step * tokens

    found = benchmark_serving.step_seconds({"a": case("a", 0.5), "b": case("b", 0.25)}, 8, 2)
    assert found == {"a": pytest.approx([0.5, 0.5]), "b": pytest.approx([0.25, 0.25])}
    assert [name for name, tokens in asked if tokens == 1] == ["a", "b", "b", "a"]


def test_rounds_alternate_and_no_seed_comes_twice():
    asked = []
    found = serving_pairs.in_turn({side: lambda seed, side=side: asked.append((side, seed)) or seed
                                   for side in "ab"}, 3)
    assert [side for side, _ in asked] == ["a", "b", "b", "a", "a", "b"]
    assert found["a"] == found["b"] and len(set(found["a"])) == 3


# -- measures over fake workers ---------------------------------------------------------------------------------------


class FakeWorker:
    """Answers as a table says: {question: function of its arguments}."""

    def __init__(self, **answers):
        self.answers = answers

    def ask(self, what, **arguments):
        return self.answers[what](**arguments)

    def close(self):
        pass


@pytest.fixture
def bench(tmp_path):
    arguments = argparse.Namespace(rows=8, requests=64, load_repeats=3, chunk=8, threads=2, steps=4, repeats=1,
                                   peers_python=tmp_path / "bin" / "python")
    return benchmark_serving.Bench(arguments, tmp_path)


def values(bench):
    return {one["name"]: one["value"] for one in bench.measures}


def loaded(seconds, digest="same", **counts):
    return lambda **asked: {"seconds": seconds, "tokens": 4096, "lost": 0, "digest": digest, "counts": counts}


def test_the_load_over_its_parts(bench):
    worker = FakeWorker(loaded=loaded(20.0), parts=lambda **asked: {"prompts": 10.0, "decode": 8.0})
    bench._workers["base float32"] = worker, {}
    serving_pairs.measure_load(bench)
    assert values(bench) == {"load_over_parts": 0.9, "load_tokens_per_second": 204.8}


def test_pressure_against_enough_blocks(bench, monkeypatch):
    asked = {}
    monkeypatch.setitem(sys.modules, "colora_ms.models.paged_cache", argparse.Namespace(BLOCK=16))

    def start(name, **options):
        asked.update(options)
        return FakeWorker(loaded=loaded(25.0, preemptions=3), stats=lambda: {"blocks": 72}), {}

    enough = FakeWorker(loaded=loaded(20.0), stats=lambda: {"blocks": 500, "cache_bytes": 500_000})
    monkeypatch.setattr(bench, "engine", lambda name, **options: (enough, {}) if name == "base float32"
                        else start(name, **options))
    serving_pairs.measure_pressure(bench)
    assert asked["cache_bytes"] == 72 * 1000
    assert values(bench) == {"pressure_over_roomy": 0.8, "pressure_lost": 0, "pressure_same_answers": 1,
                             "pressure_preemptions": 9}


def test_what_an_engine_cannot_do_is_missing_with_its_reason(bench, capsys):
    bench._workers["base float32"] = FakeWorker(stats=lambda: {"rows": 8}), {}
    serving_pairs.measure_pressure(bench)
    bench._workers["float32"] = FakeWorker(ensemble=lambda **asked: {"missing": "colora_ms has no Ensemble"}), {}
    benchmark_serving.measure_ensemble(bench)
    serving_pairs.measure_llama_server(bench)
    assert not bench.measures
    assert "no blocks" in bench.missing["pressure_over_roomy"]
    assert bench.missing["ensemble3_over_greedy_1"] == "colora_ms has no Ensemble"
    for name in ("load_vs_llama_server_f32", "load_vs_llama_server_q8", "ttft_vs_llama_server",
                 "itl_p99_vs_llama_server"):
        assert "setup_peers.sh --llama-server" in bench.missing[name]
    assert capsys.readouterr().out.count("is missing:") == len(bench.missing)


def test_the_share_of_a_shared_prefix(bench):
    bench._workers["prefix"] = FakeWorker(shared_prefix=lambda **asked: {"cached": 600, "wanted": 66560, "seconds": 1},
                                          stats=lambda: {"graphs": 2}), {"graphs": 1}
    benchmark_serving.measure_prefix(bench)
    # 64 requests of two rows and 520 tokens; at best nine rows compute the 512 and every row its own 8.
    assert values(bench) == pytest.approx({"prefix_hit_share": 600 / 66560, "prefix_hit_share_most": 60928 / 66560,
                                           "graphs_until_ready": 1, "graphs_after_requests": 2}, abs=1e-6)


# -- llama-server -----------------------------------------------------------------------------------------------------

FAKE_SERVER = """#!{python}
import http.server, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("version: 0.5.0-dev", file=sys.stderr)
    sys.exit(0)
if "broken" in arguments[arguments.index("--model") + 1]:
    print("cannot read the model", file=sys.stderr)
    sys.exit(3)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "llama-server"
    path.write_text(FAKE_SERVER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_slot_holds_the_request_and_one_token_more():
    assert [llama_server.context(tokens) for tokens in (255, 256, 576)] == [256, 512, 768]


def test_a_server_is_started_waited_for_and_ended(program):
    assert llama_server.missing(program) == "" and llama_server.version(program) == "0.5.0-dev"
    server = llama_server.LlamaServer(program, "model.gguf", 2, 8, 640)
    process = server._process
    assert process.poll() is None and process.args[1:7] == ["--model", "model.gguf", "--parallel", "8", "--ctx-size",
                                                            "5120"]
    server.close()
    assert process.poll() is not None


def test_a_server_that_ends_says_why(program):
    with pytest.raises(BenchmarkError, match=r"exit code 3(?s:.)*cannot read the model"):
        llama_server.LlamaServer(program, "broken.gguf", 2, 8, 640)


def test_a_program_that_cannot_run_is_missing(tmp_path):
    path = tmp_path / "llama-server"
    assert "is not there" in llama_server.missing(path)
    path.write_text("#!/bin/sh\necho 'illegal instruction' >&2\nexit 4\n")
    path.chmod(0o755)
    assert "ends with 4: illegal instruction" in llama_server.missing(path)
