"""A load of requests: what is asked, clients that ask one request after the other, and the numbers that come of it.

NumPy and the standard library only. :func:`drive` speaks to any server with OpenAI's ``/v1/completions``, so that two
servers are measured by the same client; :func:`closed_loop` works without a server, too.
"""

import dataclasses
import http.client
import json
import threading
import time

import numpy as np

from benchmark_common import BenchmarkError

VOCABULARY = 49152
#: Ids below this one are SmolLM2's special tokens.
FIRST_ID = 16
#: The load of the tables: prompts of these lengths, answers of that one.
SHORTEST, LONGEST, ANSWER_TOKENS = 16, 512, 64
#: Seconds that one request may take.
PATIENCE = 600


def load_prompts(count, seed, shortest=SHORTEST, longest=LONGEST):
    """Lists of ids that have no beginning in common with those of another seed, of the same lengths whatever the seed.

    Lengths are spread evenly from ``shortest`` to ``longest`` and stand in a fixed random order.
    """
    lengths = np.random.default_rng(0).permutation(np.linspace(shortest, longest, count).round().astype(int))
    ids = np.random.default_rng((1, seed))
    return [ids.integers(FIRST_ID, VOCABULARY, length).tolist() for length in lengths]


def percentiles(seconds):
    """p50 and p99 in milliseconds."""
    return [1e3 * float(np.percentile(seconds, q)) for q in (50, 99)]


def closed_loop(items, clients, work):
    """``clients`` threads, each of which takes the next item when ``work(item)`` has come back.

    Returns:
        (seconds from the start to the last end, what ``work`` returned in the items' order).

    Raises:
        The first exception of ``work``; the other threads end with the item that they have.
    """
    results, errors, lock = [None] * len(items), [], threading.Lock()
    queue = iter(enumerate(items))

    def client():
        while True:
            with lock:
                place, item = next(queue, (None, None))
            if place is None or errors:
                return
            try:
                results[place] = work(item)
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - start, results


@dataclasses.dataclass
class Answer:
    """A streamed answer: seconds to its first text, seconds between its pieces of text, its tokens and its text."""

    first: float
    between: list
    tokens: int
    text: str


@dataclasses.dataclass
class Load:
    """What a load came to; times in seconds."""

    seconds: float
    answers: list

    @property
    def tokens_per_second(self):
        """Generated tokens over the time from the first request to the last answer."""
        return sum(one.tokens for one in self.answers) / self.seconds

    @property
    def first(self):
        """Seconds to the first text of each answer."""
        return [one.first for one in self.answers]

    @property
    def between(self):
        """Seconds between two pieces of text that follow one another in a stream, of all streams.

        A server that sends several tokens at once has long gaps here, as its clients see them: nothing is divided by
        the number of tokens that a piece brings.
        """
        return [gap for one in self.answers for gap in one.between]


def stream(address, body):
    """Send one request to ``/v1/completions`` and read its events.

    Args:
        address: "host:port"; body: dict, ``stream`` and ``stream_options`` are added.

    Raises:
        BenchmarkError: another status than 200, an error event, or a stream without end or token counts.
    """
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    text, first, between, tokens, ended = [], None, [], None, False
    start = last = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions",
                           json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            reason = response.read()[:300].decode(errors="replace")
            raise BenchmarkError(f"{address} answered {response.status}: {reason}")
        for line in response:
            if not line.startswith(b"data: "):
                continue
            now, content = time.perf_counter(), line[6:].strip()
            if content == b"[DONE]":
                ended = True
                break
            event = json.loads(content)
            if "error" in event:
                raise BenchmarkError(f"{address} broke a stream off: {content[:300].decode(errors='replace')}")
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            piece = "".join(choice.get("text") or "" for choice in event["choices"])
            if piece:
                text.append(piece)
                if first is None:
                    first = now - start
                else:
                    between.append(now - last)
                last = now
    finally:
        connection.close()
    if not ended or tokens is None or first is None:
        raise BenchmarkError(f"{address} ended a stream without its last event, its token counts, or any text")
    return Answer(first, between, tokens, "".join(text))


def drive(address, prompts, clients, tokens=ANSWER_TOKENS, **more):
    """Greedy answers of ``tokens`` tokens to all prompts, over HTTP.

    Args:
        prompts: lists of ids; more: further fields of the requests.

    Returns:
        :class:`Load`.

    Raises:
        BenchmarkError: a request failed, or an answer has another number of tokens.
    """
    bodies = [{"model": "base", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
              for ids in prompts]
    load = Load(*closed_loop(bodies, clients, lambda body: stream(address, body)))
    wrong = sorted({one.tokens for one in load.answers} - {tokens})
    if wrong:
        raise BenchmarkError(f"{address} gave answers of {wrong} tokens in place of {tokens}")
    return load


def over_parts(prompts, decode, wall):
    """How near a load comes to its parts: (seconds of its prompts alone + of its decoding alone) / its seconds."""
    return (prompts + decode) / wall


def blocks_wanted(clients, tokens, block):
    """Blocks of ``block`` positions that ``clients`` requests of ``tokens`` tokens, prompt and answer, hold at most."""
    return clients * -(-tokens // block)
