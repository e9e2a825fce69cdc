"""This project's engine in a process of its own, for benchmark_serving.py: it answers questions on standard input (see
``benchmark_common.serve``).

    python serving_worker.py
"""

import hashlib
import inspect
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmark_common import ROOT, BenchmarkError, peak_bytes, reset_peak, serve
from decode_worker import ALPHA, BETA, RANK
from serving_load import ANSWER_TOKENS, FIRST_ID, VOCABULARY, closed_loop, load_prompts

sys.path.insert(0, str(ROOT))  # so that it runs from a checkout that is not installed

#: Seconds that one request may take.
PATIENCE = 600


class Ours:
    """An engine, over a bank or over the base model alone; the handler of the questions."""

    def load(self, rows, chunk, longest, weight_format="float32", adapters=None, slots=1, adapter_format="float32",
             host_adapters=1, cache_bytes=None):
        """Make the engine and its graphs.

        Args:
            longest: tokens of a prompt and its answer together.
            adapters: folder of adapter folders; None: no bank.
            slots: adapters that the batch can mix.
            host_adapters: how many of them host memory takes.
            cache_bytes: memory of the key/value cache; None: the engine's own choice.

        Returns:
            {"backend", "slot_bytes", "graphs"} or {"missing": why this engine cannot do that}.
        """
        from colora_ms.kernels import backend
        from colora_ms.models import load_model
        from colora_ms.serving import AdapterBank, Engine

        known = inspect.signature(Engine).parameters
        if cache_bytes is not None and "cache_bytes" not in known:
            return {"missing": "this Engine has no cache_bytes"}
        decoder, tokenizer = load_model(weight_format=weight_format)
        self.bank = None
        if adapters is not None:
            one = sum(file.stat().st_size for file in next(Path(adapters).iterdir()).iterdir())
            self.bank = AdapterBank(decoder, adapters, max_loaded=slots, max_rank=RANK,
                                    host_bytes=int(one * host_adapters), adapter_format=adapter_format)
        more = {} if cache_bytes is None else {"cache_bytes": cache_bytes}
        # A cache of whole rows is as large as its longest request; one of blocks is the one that is served with.
        more["max_length"] = max(longest, 1024) if "cache_bytes" in known else longest
        self.engine = Engine(decoder, tokenizer, self.bank, rows=rows, chunk=chunk, **more)
        self.engine.warm_up()
        self.names = [] if self.bank is None else self.bank.names()
        return {"backend": backend(), "slot_bytes": 0 if self.bank is None else self.bank.slot_bytes,
                "graphs": self.engine.stats()["graphs"]}

    def stats(self):
        """The engine's counters, without the bank's."""
        return {key: value for key, value in self.engine.stats().items() if key != "bank"}

    def listen(self):
        """Open the HTTP server; returns "host:port"."""
        from colora_ms.serving.http import Server, Settings, create_app

        self.server = Server(create_app(self.engine, Settings(base_model="base")))
        self.server.__enter__()
        return self.server.url.removeprefix("http://")

    # -- full batches --------------------------------------------------------------------------------------------------

    def together(self, requests):
        """Hand in requests while the engine's thread stands still, so that they start together.

        Args:
            requests: list of (ids, keyword arguments of ``Engine.submit``).

        Returns:
            (seconds from the start to the last token, :class:`colora_ms.decoding.Completion` of each).
        """
        handles, start = self.engine.call(lambda: (
            [self.engine.submit(ids, ignore_eos=True, **options) for ids, options in requests], time.perf_counter()))
        answers = [handle.result(PATIENCE) for handle in handles]
        return time.perf_counter() - start, answers

    def run(self, case, prompts, tokens):
        """Seconds from the start of a full batch to its last token."""
        names = {"base": [None] * len(prompts), "single": self.names[:1] * len(prompts),
                 "mixed": self.names[:len(prompts)]}[case]
        self._hold(names)
        seconds, answers = self.together([(ids, {"adapter": name, "max_new_tokens": tokens})
                                          for ids, name in zip(prompts, names)])
        return {"seconds": seconds, "tokens": [list(map(int, one.tokens)) for one in answers]}

    def _hold(self, names):
        for name in set(names) - {None}:
            self.bank.resolve(name)

    def ensemble(self, count, prompt, tokens):
        """Seconds of one request: greedy with one adapter for ``count`` 1, else an ensemble of so many; or why not."""
        import colora_ms

        if count > 1 and not hasattr(colora_ms, "Ensemble"):
            return {"missing": "colora_ms has no Ensemble"}
        names = self.names[:count]
        self._hold(names)
        how = {"adapter": names[0]} if count == 1 else {"mix": colora_ms.Ensemble(names)}
        return {"seconds": self.together([(prompt, {**how, "max_new_tokens": tokens})])[0]}

    # -- loads ---------------------------------------------------------------------------------------------------------

    def adapters_under_load(self, adapters, clients, requests, seed):
        """Closed loop of short prompts over so many adapters."""
        random = np.random.default_rng(seed)
        work = [(random.integers(FIRST_ID, VOCABULARY, random.integers(8, 64)).tolist(), self.names[i % adapters])
                for i in range(requests)]

        def client(item):
            handle = self.engine.submit(item[0], adapter=item[1], max_new_tokens=32, ignore_eos=True)
            last, gaps = None, []
            for piece in handle.pieces(PATIENCE):
                now = time.monotonic()
                if last is not None and piece.tokens:
                    gaps += [(now - last) / len(piece.tokens)] * len(piece.tokens)
                last = now
            return handle.timing.first_token - handle.timing.submitted, gaps

        reset_peak()
        before = self.bank.info()["evictions"]
        seconds, found = closed_loop(work, clients, client)
        return {"seconds": seconds, "tokens": 32 * requests, "first": [first for first, _ in found],
                "between": [gap for _, gaps in found for gap in gaps],
                "evictions": self.bank.info()["evictions"] - before, "peak_bytes": peak_bytes()}

    def loaded(self, requests, clients, seed, tokens=ANSWER_TOKENS):
        """The load of the tables without HTTP: seconds, tokens, and a digest of all answers."""
        def client(ids):
            handle = self.engine.submit(ids, max_new_tokens=tokens, ignore_eos=True)
            return [int(one) for one in handle.result(PATIENCE).tokens]

        before = self.stats()
        seconds, answers = closed_loop(load_prompts(requests, seed), clients, client)
        after = self.stats()
        short = sum(len(one) != tokens for one in answers)
        return {"seconds": seconds, "tokens": sum(map(len, answers)), "lost": short,
                "digest": hashlib.sha256(json.dumps(answers).encode()).hexdigest(),
                "counts": {key: value - before[key] for key, value in after.items()
                           if isinstance(value, int) and key in before}}

    def parts(self, requests, rows, seed, tokens=ANSWER_TOKENS):
        """The parts of such a load: seconds of all its prompts with their first tokens, all handed in at once, and
        seconds of the other tokens, decoded by full batches whose prompts are in the cache."""
        prompts = load_prompts(requests, seed)

        def seconds(some, count):
            return self.together([(ids, {"max_new_tokens": count}) for ids in some])[0]

        alone, decode = seconds(prompts, 1), 0.0
        for start in range(0, requests, rows):
            some = prompts[start:start + rows]
            seconds(some, 1)  # they may have left the cache
            decode += -seconds(some, 1) + seconds(some, tokens)
        return {"prompts": alone, "decode": decode}

    def shared_prefix(self, adapters, clients, requests, prefix, own, tokens, seed):
        """Contrastive requests over ``adapters`` adapters whose prompts share their first ``prefix`` tokens.

        Returns:
            {"wanted": tokens of all rows' prompts, "cached": those that were not computed again, "seconds"}.
        """
        from colora_ms import Contrast

        random = np.random.default_rng((2, seed))
        shared = random.integers(FIRST_ID, VOCABULARY, prefix).tolist()
        work = [(shared + random.integers(FIRST_ID, VOCABULARY, own).tolist(), self.names[i % adapters])
                for i in range(requests)]

        def client(item):
            return self.engine.submit(item[0], adapter=item[1], contrast=Contrast(ALPHA, BETA), max_new_tokens=tokens,
                                      ignore_eos=True).result(PATIENCE)

        self._hold(self.names[:adapters])
        before = self.engine.stats()["cached_tokens"]
        seconds, _ = closed_loop(work, clients, client)
        return {"wanted": 2 * sum(len(ids) for ids, _ in work), "seconds": seconds,
                "cached": self.engine.stats()["cached_tokens"] - before}

    # -- swaps ---------------------------------------------------------------------------------------------------------

    def swaps(self, prompts, tokens, count):
        """Put other adapters into slots while a batch runs.

        The batch takes all rows but one; the swapped adapters answer in that one, a token each.
        """
        def batch():
            return [self.engine.submit(ids, adapter=self.names[0], max_new_tokens=tokens, ignore_eos=True)
                    for ids in prompts[:-1]]

        def answers(handles):
            return [handle.result(PATIENCE).tokens for handle in handles]

        wanted = answers(batch())
        running, read, place, same = batch(), [], [], True
        for _ in range(count):
            if all(handle.done for handle in running):
                same = answers(running) == wanted and same
                running = batch()
            name = next((name for name in self.names[1:] if self._state(name) == "disk"), None)
            if name is None:
                raise BenchmarkError("no adapter is left on disk alone; give more adapters than slots and host memory "
                                     "hold")
            for file in (self.bank.folder / name).iterdir():
                file.read_bytes()  # into the page cache
            self.engine.submit(prompts[-1], adapter=name, max_new_tokens=1).result(PATIENCE)
            info = self.bank.info()
            read.append(info["read_ms"])
            place.append(info["place_ms"])
        return {"read_ms": read, "place_ms": place, "same": answers(running) == wanted and same}

    def _state(self, name):
        return next(one["state"] for one in self.bank.info()["adapters"] if one["name"] == name)


if __name__ == "__main__":
    serve(Ours())
