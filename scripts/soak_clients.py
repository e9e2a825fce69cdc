"""The clients of soak_serving.py: random requests, good and bad, and what becomes of them."""

import asyncio
import collections
import http.client
import json
import random
import threading
import time

#: Connections of the flood that are open at a time; each takes two file descriptors of this process.
FLOOD_CONNECTIONS = 400

#: Few prompts, each with its own length of answer, so that most answers can be compared with a former one.
ANSWERS = (1, 8, 24, 48)

#: Adapters of an ensemble.
VOICES = 3

#: Requests that must be refused: (what it is, method, path, changes of a good body or a raw body, statuses).
BAD = [
    ("unknown adapter", "POST", "/v1/completions", {"model": "nobody"}, (404,)),
    ("name outside the folder", "POST", "/v1/completions", {"model": "../../etc"}, (400,)),
    ("broken adapter", "POST", "/v1/completions", {"model": "truncated"}, (400,)),
    ("adapter of too high a rank", "POST", "/v1/completions", {"model": "wide"}, (400,)),
    ("adapter with NaN", "POST", "/v1/completions", {"model": "nan"}, (400,)),
    ("prompt longer than the cache", "POST", "/v1/completions", {"prompt": [5] * 4000}, (400,)),
    ("token outside the vocabulary", "POST", "/v1/completions", {"prompt": [5, 10**6]}, (400,)),
    ("wrong type", "POST", "/v1/completions", {"max_tokens": "many"}, (400,)),
    ("unknown field", "POST", "/v1/completions", {"contrasts": {}}, (400,)),
    ("contrast out of range", "POST", "/v1/completions", {"contrast": {"alpha": 7.0}}, (400,)),
    ("no answers", "POST", "/v1/completions", {"n": 0}, (400,)),
    ("no JSON", "POST", "/v1/completions", "{", (400,)),
    ("body too large", "POST", "/v1/completions", "x" * 2_000_000, (413,)),
    ("unknown route", "GET", "/v1/nothing", None, (404,)),
    ("load of nothing", "POST", "/v1/adapters", '{"name": "nobody"}', (404,)),
]


class Tally:
    """Counts of all threads, and what went wrong."""

    def __init__(self):
        self._lock = threading.Lock()
        self.counts = collections.Counter()
        self.refusals = collections.Counter()
        self.lost = []
        self.expected = {}

    def add(self, name, count=1):
        with self._lock:
            self.counts[name] += count

    def refuse(self, name):
        with self._lock:
            self.refusals[name] += 1

    def lose(self, sentence):
        with self._lock:
            self.lost.append(sentence)

    def compare(self, key, text):
        """Whether all answers with this key are equal."""
        with self._lock:
            return self.expected.setdefault(key, text) == text


class Client:
    """One thread's requests until the time is over.

    Args:
        number: seed; address: "host:port"; names: the base model's name, then adapters'; end: when the time is over.
        mixed: function (prompt, adapters, most tokens) that returns the ids of an ensemble's answer; None: there is
            none.
    """

    def __init__(self, number, address, names, prompts, tally, end, mixed=None):
        self.random = random.Random(number)
        self.address, self.names, self.prompts, self.tally, self.end = address, names, prompts, tally, end
        self.mixed = mixed

    def run(self):
        kinds = {self.answer: 8, self.stream: 6, self.leave: 2, self.bad: 4, self.turn: 2}
        if self.mixed is not None:
            kinds[self.mix] = 3
        while time.monotonic() < self.end:
            kind = self.random.choices(list(kinds), list(kinds.values()))[0]
            try:
                kind()
            except Exception as error:  # whatever it is, a request got no proper end
                self.tally.lose(f"{kind.__name__}: {error!r}")

    def body(self, **more):
        which, name = self.random.randrange(len(self.prompts)), self.random.choice(self.names)
        contrast = {"alpha": 0.1, "beta": 0.5} if name != "base" and self.random.random() < 0.3 else None
        key = (which, name, contrast is None)
        return key, {"model": name, "prompt": self.prompts[which], "max_tokens": ANSWERS[which], "contrast": contrast,
                     **more}

    def call(self, method, path, body):
        connection = http.client.HTTPConnection(self.address, timeout=120)
        try:
            data = body if isinstance(body, str) or body is None else json.dumps(body)
            try:
                connection.request(method, path, data, {"Content-Type": "application/json"})
            except (BrokenPipeError, ConnectionResetError):
                pass  # a body that is too large is refused before it was read
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def settle(self, status, text):
        """Take a refusal that may happen to a good request; False if it is none."""
        message = json.loads(text)["error"]["message"] if status != 200 else ""
        if status == 429 and message:
            self.tally.refuse("queue full")
            time.sleep(0.2)
            return True
        if status == 404 and "unloaded" in message:
            self.tally.refuse("adapter unloaded")
            return True
        if status != 200:
            self.tally.lose(f"status {status}: {text[:200]}")
            return True
        return False

    def finish(self, key, text, reason):
        if reason not in ("stop", "length"):
            self.tally.lose(f"finish_reason {reason!r}")
        elif not self.tally.compare(key, text):
            self.tally.lose(f"another answer than before for {key}: {str(text)[:80]!r}")
        else:
            self.tally.add("answered")

    def answer(self):
        key, body = self.body()
        status, text = self.call("POST", "/v1/completions", body)
        if not self.settle(status, text):
            choice = json.loads(text)["choices"][0]
            self.finish(key, choice["text"], choice["finish_reason"])

    def stream(self):
        key, body = self.body(stream=True)
        status, text = self.call("POST", "/v1/completions", body)
        if not self.settle(status, text):
            events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
            if events[-1] != "[DONE]":
                # the error of a stream is its last event
                self.settle(404 if "unloaded" in events[-1] else 500, events[-1])
                return
            choices = [json.loads(e)["choices"][0] for e in events[:-1]]
            self.finish(key, "".join(c["text"] for c in choices), choices[-1]["finish_reason"])

    def mix(self):
        """An answer of several adapters together."""
        from colora_ms.errors import QueueFullError, UnknownAdapterError

        which = self.random.randrange(len(self.prompts))
        voices = tuple(sorted(self.random.sample(self.names[1:], VOICES)))
        try:
            tokens = self.mixed(self.prompts[which], list(voices), ANSWERS[which])
        except QueueFullError:
            self.tally.refuse("queue full")
        except UnknownAdapterError:
            self.tally.refuse("adapter unloaded")
        else:
            self.tally.add("mixes")
            self.finish((which, voices), tokens, "stop")

    def leave(self):
        connection = http.client.HTTPConnection(self.address, timeout=120)
        _, body = self.body(stream=self.random.random() < 0.7)
        body["max_tokens"] = 64
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(self.random.random() * 0.1)
        connection.close()
        self.tally.add("left by the client")

    def bad(self):
        name, method, path, change, statuses = self.random.choice(BAD)
        body = {**self.body()[1], "model": self.names[1], **change} if isinstance(change, dict) else change
        status, text = self.call(method, path, body)
        if status == 429 or (status == 404 and "unloaded" in text):
            self.settle(status, text)
        elif status not in statuses or not json.loads(text)["error"]["message"]:
            self.tally.lose(f"{name}: status {status}, {text[:200]}")
        else:
            self.tally.refuse(name)

    def turn(self):
        """Withdraw an adapter and load it again."""
        name = self.random.choice(self.names[1:])
        for method, path, body in (("DELETE", f"/v1/adapters/{name}", None), ("POST", "/v1/adapters", {"name": name})):
            status, text = self.call(method, path, body)
            if status != 200 and "unloaded" not in text:
                self.tally.lose(f"{method} {path}: {status}, {text[:200]}")
        self.tally.add("reloaded adapters")


class Flood:
    """Many requests at once, from one thread; one connection each."""

    def __init__(self, address, names, prompts, tally):
        self.host, self.port = address.rsplit(":", 1)
        self.names, self.prompts, self.tally = names, prompts, tally
        self.seconds, self.slowest_refusal = 0.0, 0.0

    def run(self, count):
        start = time.monotonic()
        asyncio.run(self._all(count))
        self.seconds = time.monotonic() - start

    async def _all(self, count):
        gate = asyncio.Semaphore(FLOOD_CONNECTIONS)

        async def one(number):
            async with gate:
                try:
                    await asyncio.wait_for(self._one(number), 300)
                except Exception as error:  # whatever it is, a request got no proper end
                    self.tally.lose(f"flood: {error!r}")

        await asyncio.gather(*(one(number) for number in range(count)))

    async def _one(self, number):
        body = json.dumps({"model": self.names[number % len(self.names)], "max_tokens": 4,
                           "prompt": self.prompts[number % len(self.prompts)]}).encode()
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        start = time.monotonic()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = await reader.read()
        writer.close()
        head, _, text = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1])
        if status == 429 and json.loads(text)["error"]["message"]:
            self.tally.refuse("flood: queue full")
            self.slowest_refusal = max(self.slowest_refusal, time.monotonic() - start)
        elif status == 200:
            self.tally.add("flood answered")
        else:
            self.tally.lose(f"flood: status {status}, {text[:200]!r}")
