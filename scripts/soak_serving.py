#!/usr/bin/env python
"""Soak of the HTTP server: many adapters over few slots, random loads and unloads, clients that leave, and bad
requests.

    python scripts/soak_serving.py --minutes 10 --json soak.json                  SmolLM2-135M
    python scripts/soak_serving.py --minutes 1 --tiny --json soak.json            a tiny random model: seconds to start

A real uvicorn server in this process, clients in threads. Every request must end in one of two ways: an answer whose
tokens are right, or a refusal with a status below 500 and a sentence. What does neither is *lost*, and the script
fails. ``--flood`` then sends that many requests as fast as the server takes connections: each must be answered or
refused at once because the queue is full, and the server must answer as before when the flood is over.
"Right": greedy answers of the same prompt and adapter are always the same, whatever runs beside them. Memory is the
resident memory when the warm-up (a fifth of the time) is over and at the end.
"""

import argparse
import asyncio
import collections
import http.client
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, measure, table, versions, write_json

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

#: Connections of the flood that are open at a time; each takes two file descriptors of this process.
FLOOD_CONNECTIONS = 400

#: Few prompts, each with its own length of answer, so that most answers can be compared with a former one.
ANSWERS = (1, 8, 24)

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
    ("two answers", "POST", "/v1/completions", {"n": 2}, (400,)),
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
    """One thread's requests until the time is over."""

    def __init__(self, number, address, names, prompts, tally, end):
        self.random = random.Random(number)
        self.address, self.names, self.prompts, self.tally, self.end = address, names, prompts, tally, end

    def run(self):
        while time.monotonic() < self.end:
            kind = self.random.choices((self.answer, self.stream, self.leave, self.bad, self.turn), (8, 6, 2, 4, 2))[0]
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
            self.tally.lose(f"another answer than before for {key}: {text[:80]!r}")
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


def resident():
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- models and adapters ----------------------------------------------------------------------------------------------


def tiny_model():
    """(decoder, tokenizer) of a random model: hidden 32, 2 layers, 97 tokens that are numbers."""
    from colora_ms.models.config import DecoderConfig
    from colora_ms.models.decoder import Decoder

    class Numbers:
        eos_token_id, chat_template = 2, None

        def encode(self, text, add_special_tokens=True):
            return [int(word) for word in text.split()]

        def decode(self, ids, skip_special_tokens=True):
            return " ".join(str(i) for i in ids if i > 2)

    config = DecoderConfig(model_type="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
                           eos_token_ids=(2,))
    return Decoder(config), Numbers()


def write_adapters(folder, config, count):
    """Adapters "a00", "a01", ... of ranks 1 to 16 on all linears, and the broken ones of BAD."""
    from safetensors.numpy import save_file

    shapes = {name.removesuffix(".weight"): shape for name, shape in config.parameter_shapes().items()
              if name.endswith("_proj.weight")}

    def write(name, seed, r):
        values, source = {}, np.random.default_rng(seed)
        for module, (out, inner) in shapes.items():
            for half, shape in (("lora_A", (r, inner)), ("lora_B", (out, r))):
                scale = np.float32(0.5 / shape[1] ** 0.5 if half == "lora_A" else 0.05)
                values[f"base_model.model.{module}.{half}.weight"] = source.standard_normal(shape, np.float32) * scale
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "r": r, "lora_alpha": 16, "bias": "none",
            "target_modules": sorted({module.rsplit(".", 1)[1] for module in shapes})}))
        if name == "nan":
            next(iter(values.values()))[0, 0] = np.nan
        save_file(values, str(folder / name / "adapter_model.safetensors"))

    for i in range(count):
        write(f"a{i:02d}", i, 1 + i % 16)
    for name, r in (("truncated", 4), ("wide", 17), ("nan", 4)):
        write(name, count, r)
    path = folder / "truncated" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return [f"a{i:02d}" for i in range(count)]


def soak(arguments, folder):
    """(tally, memory after the warm-up, memory at the end, engine's counters, the flood)"""
    from colora_ms.models import load_model
    from colora_ms.serving import AdapterBank, Engine
    from colora_ms.serving.http import Server, Settings, create_app

    decoder, tokenizer = tiny_model() if arguments.tiny else load_model(max_positions=256)
    names = ["base", *write_adapters(folder, decoder.config, arguments.adapters)]
    bank = AdapterBank(decoder, folder, max_loaded=arguments.slots, max_rank=16,
                       host_bytes=arguments.host_megabytes << 20)
    tally, source = Tally(), np.random.default_rng(3)
    prompts = [source.integers(3, decoder.config.vocab_size, source.integers(1, 60)).tolist() for _ in ANSWERS]
    with Engine(decoder, tokenizer, bank, rows=8, max_length=160, queue=arguments.clients // 2) as engine:
        engine.warm_up()
        with Server(create_app(engine, Settings(base_model="base"))) as server:
            start = time.monotonic()
            end = start + 60 * arguments.minutes
            address = server.url.removeprefix("http://")
            threads = [threading.Thread(target=Client(i, address, names, prompts, tally, end).run)
                       for i in range(arguments.clients)]
            for thread in threads:
                thread.start()
            time.sleep((end - start) / 5)
            first = resident()
            for thread in threads:
                thread.join()
            last = resident()
            flood = Flood(address, names[:1 + arguments.slots], prompts, tally)
            if arguments.flood:
                flood.run(arguments.flood)
                check = Client(0, address, names, prompts, tally, end)
                before = tally.counts["answered"]
                for _ in range(5):
                    check.answer()
                if tally.counts["answered"] != before + 5:
                    tally.lose("the server does not answer after the flood")
            waited = time.monotonic() + 30
            while (state := engine.stats())["waiting"] + state["starting"] + state["running"]:
                if time.monotonic() > waited:
                    tally.lose(f"{state['waiting']} waiting and {state['running']} running requests are left behind")
                    break
                time.sleep(0.1)
            ended = sum(state[key] for key in ("finished", "cancelled", "timeouts", "failed"))
            if ended != state["submitted"]:
                tally.lose(f"{state['submitted']} requests were taken, {ended} ended")
            # A waiting request fails if its adapter is withdrawn and pushed out of memory before its turn.
            if state["failures"] or state["failed"] > tally.refusals["adapter unloaded"] or state["bank"]["pinned"]:
                tally.lose(f"failures: {state['failures']}, failed: {state['failed']}, pinned slots: "
                           f"{state['bank']['pinned']}")
    return tally, first, last, state, flood


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long")
    parser.add_argument("--flood", type=int, default=0, help="requests of the flood at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary here")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model in place of SmolLM2-135M")
    parser.add_argument("--adapters", type=int, default=64, help="adapters")
    parser.add_argument("--slots", type=int, default=8, help="slots")
    parser.add_argument("--host-megabytes", type=int, default=256, help="host memory for adapters behind the slots")
    parser.add_argument("--clients", type=int, default=24, help="threads that send requests; the queue takes half as "
                                                                "many")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOG_v", "3")
    if not 1 <= arguments.adapters <= 99 or arguments.minutes <= 0 or arguments.clients < 2:
        parser.error("--adapters must be 1 to 99, --minutes above 0, --clients at least 2")
    with tempfile.TemporaryDirectory(prefix="soak-serving-") as folder:
        tally, first, last, state, flood = soak(arguments, Path(folder))
    bank = state["bank"]
    measures = [
        measure("requests", sum(tally.counts.values()) + sum(tally.refusals.values()), "requests"),
        measure("answered", tally.counts["answered"], "requests"),
        measure("left_by_client", tally.counts["left by the client"], "requests"),
        measure("reloaded", tally.counts["reloaded adapters"], "adapters"),
        measure("refused", sum(tally.refusals.values()), "requests"),
        measure("lost", len(tally.lost), "requests"),
        measure("different_answers_kept", len(tally.expected), "prompt, adapter, contrast"),
        measure("slot_loads", bank["loads"], "adapters"), measure("slot_evictions", bank["evictions"], "adapters"),
        measure("generated_tokens", state["generated_tokens"], "tokens"),
        measure("memory_after_warm_up_mib", first, "MiB"), measure("memory_at_end_mib", last, "MiB"),
    ]
    if arguments.flood:
        measures += [measure("flood_requests", arguments.flood, "requests"),
                     measure("flood_seconds", flood.seconds, "s"),
                     measure("flood_answered", tally.counts["flood answered"], "requests"),
                     measure("flood_refused", tally.refusals["flood: queue full"], "requests"),
                     measure("flood_slowest_refusal_s", flood.slowest_refusal, "s"),
                     measure("memory_after_flood_mib", resident(), "MiB")]
    print(table(("measure", "value", "unit"), [(m["name"], f"{m['value']:g}", m["unit"]) for m in measures]))
    print(table(("refused", "requests"), sorted(tally.refusals.items())))
    for sentence in tally.lost[:20]:
        print(f"lost: {sentence}")
    if arguments.json:
        write_json(arguments.json, measures, versions("colora-ms", "mindspore", "fastapi", "uvicorn"),
                   refusals=dict(tally.refusals), lost=tally.lost[:100], minutes=arguments.minutes, tiny=arguments.tiny)
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
