"""The router before several servers, against small servers of this test's own."""

import json
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from colora_ms.cli import main
from colora_ms.errors import ConfigError
from colora_ms.serving.http.router import Backend, create_router, named, order
from colora_ms.serving.http.server import Server


class Replica:
    """A server that says who it is, keeps what it was asked, and streams three pieces where asked to."""

    def __init__(self, name):
        self.name, self.asked, self.gate = name, [], threading.Event()
        self.gate.set()
        replica = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.answer()

            def do_DELETE(self):
                self.answer()

            def answer(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                value = json.loads(body or b"null")
                replica.asked.append((self.command, self.path, value, self.headers.get("authorization")))
                if value and value.get("stream"):
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream")
                    self.send_header("transfer-encoding", "chunked")
                    self.end_headers()
                    for piece in (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"):
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                        self.wfile.flush()
                        replica.gate.wait(20)
                    self.wfile.write(b"0\r\n\r\n")
                    return
                replica.gate.wait(20)
                text = json.dumps({"by": replica.name}).encode()
                self.send_response(418 if value and value.get("bad") == replica.name else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def replicas():
    found = [Replica(f"r{i}") for i in range(3)]
    yield found
    for one in found:
        one.gate.set()
        one.stop()


@pytest.fixture
def front(replicas):
    with Server(create_router([one.url for one in replicas], max_body_bytes=1000)) as server:
        yield server.url


def ask(url, path="/v1/completions", method="POST", **body):
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None,
                                     {"content-type": "application/json", "authorization": "Bearer x"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_name_has_its_server_and_keeps_it_when_another_one_goes(front, replicas):
    names = [f"a{i}" for i in range(24)]
    places = {name: ask(front, model=name)[1]["by"] for name in names}
    assert set(places.values()) == {"r0", "r1", "r2"}
    assert {name: ask(front, model=name)[1]["by"] for name in names} == places
    assert all(token == "Bearer x" for one in replicas for *_, token in one.asked)
    replicas[1].stop()
    after = {name: ask(front, model=name)[1]["by"] for name in names}
    assert all(after[name] == place for name, place in places.items() if place != "r1")
    assert set(after.values()) == {"r0", "r2"}
    status, health = ask(front, "/health", "GET")
    assert status == 200 and sorted(health["servers"].values()) == [False, True, True]


def test_one_name_spreads_when_its_server_has_much_to_do(front, replicas):
    for one in replicas:
        one.gate.clear()
    threads = [threading.Thread(target=ask, args=(front,), kwargs=dict(model="base")) for _ in range(9)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    counts = [len(one.asked) for one in replicas]
    for one in replicas:
        one.gate.set()
    for thread in threads:
        thread.join(20)
    assert sum(counts) == 9 and max(counts) <= 4 and min(counts) >= 1


def test_events_come_as_they_are_written(front, replicas):
    for one in replicas:
        one.gate.clear()
    request = urllib.request.Request(front + "/v1/completions", json.dumps({"model": "a", "stream": True}).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.read1(100) == b"data: 1\n\n"  # the others are held back
        for one in replicas:
            one.gate.set()
        assert answer.read() == b"data: 2\n\ndata: [DONE]\n\n"


def test_what_changes_adapters_goes_to_all(front, replicas):
    assert ask(front, "/v1/adapters", name="a")[0] == 200
    assert ask(front, "/v1/adapters/a", "DELETE")[0] == 200
    assert all([path for _, path, *_ in one.asked] == ["/v1/adapters", "/v1/adapters/a"] for one in replicas)
    assert ask(front, "/v1/adapters", name="b", bad="r1") == (418, {"by": "r1"})
    assert len(replicas[2].asked) == 2, "the ones behind a failure are not asked"


def test_what_cannot_be_answered_is_told(front, replicas):
    assert ask(front, model="x" * 2000)[0] == 413
    assert ask(front, "/metrics", "GET")[0] == 404
    for one in replicas:
        one.stop()
    status, body = ask(front, model="a")
    assert status == 503 and "none of the servers" in body["error"]["message"]
    assert ask(front, "/v1/load_lora_adapter", lora_name="a")[0] == 503
    assert ask(front, "/health", "GET")[0] == 503


def test_addresses_and_bodies(capsys):
    for urls in ([], ["http://a:1", "http://a:1"], ["ftp://a"], ["http://a:b"], ["http://a/x"], ["a:80"]):
        with pytest.raises(ConfigError):
            create_router(urls)
    assert Backend("http://host").port == 80
    assert [named(body) for body in (b'{"model": "a"}', b"{", b"[]", b'{"model": 3}')] == ["a", "", "", ""]
    backends = [Backend(f"http://h{i}:1") for i in range(4)]
    first = order(backends, "a")
    first[0].pause()
    assert order(backends, "a") == first[1:] + first[:1]
    assert main(["route", "--backend", "nowhere"]) == 1 and "no address" in capsys.readouterr().err
