"""``Engine``: continuous batching over one decoder, its adapters, and one key/value cache.

One thread owns MindSpore. It repeats: take away what was cancelled or is too late, let waiting requests in, compute a
piece of prompts, make a chunk of steps for all that run, hand out the new text. Everything else (tokenizing, reading
and checking adapters) happens in the threads that call :meth:`Engine.submit`.
"""

import atexit
import itertools
import logging
import threading
import time

import mindspore as ms

from colora_ms import runtime
from colora_ms.decoding.answer import Answer
from colora_ms.decoding.prompt import ending_ids
from colora_ms.decoding.settings import check_settings
from colora_ms.decoding.values import shown
from colora_ms.errors import ColoraError, ConfigError, DecodingError, EngineClosedError, UnknownAdapterError
from colora_ms.models.cache import KeyValueCache
from colora_ms.serving import recovery
from colora_ms.serving.batch import Batch
from colora_ms.serving.handle import RequestHandle, Timing, Usage
from colora_ms.serving.prompts import Prompts
from colora_ms.serving.request import Request, check_prompt
from colora_ms.serving.scheduler import WaitingQueue, prompt_shapes, row_buckets
from colora_ms.serving.worker import Graphs

_log = logging.getLogger(__name__)

#: Bytes of the engine thread's stack: MindSpore parses deep graphs by recursion.
_STACK = 256 << 20


class Engine:
    """Serves requests with different adapters, or none, in one running batch.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`.
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        bank: :class:`colora_ms.serving.AdapterBank` of the decoder; None serves the base model alone.
        rows: rows of the running batch; a contrastive request takes two.
        max_length: tokens that a prompt and its answer may have together.
        chunk: steps between which requests may join and leave; fewer give shorter waits and smoother streams, more give
            less overhead.
        queue: requests that may wait; a further one is refused with QueueFullError.
        prefix_rows: further rows of the cache that only hold prefixes of former prompts.
        prompt_chunk: tokens of prompts that are computed between two chunks of steps, about: pieces of prompts are begun
            until it is used up.
        cache_dtype: ``mindspore.float32`` or ``mindspore.bfloat16`` for keys and values.

    Raises:
        ConfigError: a number is out of range, or the bank is another model's.
    """

    def __init__(self, decoder, tokenizer, bank=None, rows=16, max_length=1024, chunk=8, queue=256, prefix_rows=4,
                 prompt_chunk=128, cache_dtype=ms.float32):
        limit = min(decoder.max_positions, decoder.config.max_position_embeddings)
        for label, value, least in (("rows", rows, 2), ("max_length", max_length, 2), ("chunk", chunk, 1),
                                    ("queue", queue, 1), ("prefix_rows", prefix_rows, 0), ("prompt_chunk", prompt_chunk, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{label}={value!r} is not a whole number >= {least}")
        if bank is not None and bank.decoder is not decoder:
            raise ConfigError("the bank was made for another decoder than the engine's; make it with this one")
        runtime.configure()
        decoder.set_train(False)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.bank = bank
        self.rows = rows
        self.max_length = min(max_length, limit)
        self.chunk = chunk
        self.eos = ending_ids(decoder, tokenizer)
        self._buckets = row_buckets(rows)
        cache = KeyValueCache(decoder.config, rows + prefix_rows, self.max_length, cache_dtype)
        self._graphs = Graphs(decoder, cache)
        self._prompt_chunk = min(prompt_chunk, self.max_length)
        self._prompts = Prompts(self._graphs, cache.rows, prompt_shapes(rows, self._prompt_chunk))
        self._waiting = WaitingQueue(queue)
        self._starting = []  # admitted; their prompts are being computed
        self._running = []
        self._numbers = itertools.count()
        self._calls = []  # functions that the thread runs between two chunks
        self._working = []  # the requests that the thread is busy with, for the case that it fails
        self._wake = threading.Condition()
        self._closing = None  # None, "drain" or "now"
        self._started = time.monotonic()
        self._counts = dict.fromkeys(("submitted", "refused", "finished", "cancelled", "timeouts", "failed",
                                      "prompt_tokens", "generated_tokens", "steps", "row_steps", "chunks", "failures"), 0)
        before = threading.stack_size(_STACK)
        try:
            self._thread = threading.Thread(target=self._work, name="colora-engine", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # MindSpore must not be torn down under a running graph
        finally:
            threading.stack_size(before)

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt, adapter=None, contrast=None, sampling=None, max_new_tokens=64, stop=(), seed=None, priority=0,
               timeout=None, records=False, ignore_eos=False, stop_token_ids=()):
        """Hand in a request; any thread may.

        Args:
            prompt: a string, token ids, or chat messages (``{"role": …, "content": …}``).
            adapter: an adapter's name in the bank; None: the base model.
            contrast: :class:`colora_ms.decoding.Contrast`; None: the expert alone.
            sampling: :class:`colora_ms.decoding.Sampling`; None: greedy.
            max_new_tokens: tokens that the answer may have; cut to what the cache holds behind the prompt.
            stop: a string, or strings, that end the answer; it is cut before them. One that spells a special token ends
                it at that token.
            seed: in place of the sampling's own.
            priority: larger ones leave the queue first.
            timeout: seconds until the request ends, wherever it is then, with finish_reason "timeout".
            records: whether the completion and the pieces carry a TokenRecord for each token.
            ignore_eos: go on behind an end-of-sequence token (for benchmarks).
            stop_token_ids: ids that end the answer, beside the end of sequence.

        Returns:
            :class:`RequestHandle`.

        Raises:
            DecodingError: a setting or the prompt cannot be used.
            UnknownAdapterError, AdapterError: there is no such adapter, or it cannot be loaded.
            QueueFullError: too many requests wait.
            EngineClosedError: the engine was closed.
        """
        try:
            return self._submit(prompt, adapter, contrast=contrast, sampling=sampling, max_new_tokens=max_new_tokens,
                                stop=stop, stop_token_ids=stop_token_ids, seed=seed, priority=priority,
                                timeout=timeout, records=records, ignore_eos=ignore_eos)
        except ColoraError:
            with self._wake:
                self._counts["refused"] += 1
            raise

    def _submit(self, prompt, adapter, **wanted):
        self._check_open()
        self._waiting.check()  # before the work, so that a flood costs little
        vocabulary = self.decoder.config.vocab_size
        settings = check_settings(adapter, **wanted, vocabulary=vocabulary)
        ids = check_prompt(self.tokenizer, prompt, vocabulary, self.max_length)
        settings = settings.within(self.max_length - len(ids))
        if settings.rows > self.rows:
            raise DecodingError(f"a contrastive request takes two rows, the engine has {self.rows}")
        digest = ""
        if adapter is not None:
            if not isinstance(adapter, str):
                raise UnknownAdapterError(f"adapter={shown(adapter)} is not an adapter's name")
            if self.bank is None:
                raise UnknownAdapterError(f"adapter {adapter!r:.80} was asked for, but this engine has no adapter bank")
            digest = self.bank.resolve(adapter)
        request = Request(ids, adapter, digest, settings, Answer(self.tokenizer, ids, settings, self.eos))
        now = time.monotonic()
        request.handle = RequestHandle(next(self._numbers), adapter, Timing(submitted=now), Usage(prompt=len(ids)),
                                       lambda handle: self._cancel(request))
        request.deadline = None if settings.timeout is None else now + settings.timeout
        with self._wake:
            self._check_open()
            self._waiting.add(request)
            self._counts["submitted"] += 1
            self._wake.notify_all()
        return request.handle

    def _cancel(self, request):
        with self._wake:
            request.cancelled = True
            self._wake.notify_all()

    def _check_open(self):
        if self._closing is not None:
            raise EngineClosedError("the engine was closed")

    # -- life --------------------------------------------------------------------------------------------------------

    def warm_up(self):
        """Compile all graphs now (or take them from the graph cache), so that no request waits for one."""
        self.call(lambda: self._graphs.warm_up(self._buckets, self._prompts.shapes, self.chunk))

    def call(self, function):
        """Run a function in the engine's thread between two chunks of steps, and return what it returns."""
        done = threading.Event()
        outcome = {}

        def task():
            try:
                outcome["value"] = function()
            except BaseException as error:  # it belongs to the caller
                outcome["error"] = error
            done.set()

        with self._wake:
            self._check_open()
            self._calls.append(task)
            self._wake.notify_all()
        while not done.wait(1.0):
            if not self._thread.is_alive() and not done.is_set():
                raise EngineClosedError("the engine was closed")
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    def close(self, drain=False, timeout=None):
        """Take no more requests and end the thread.

        Args:
            drain: finish what has been taken; otherwise it ends with EngineClosedError.
            timeout: seconds to wait for the thread.
        """
        with self._wake:
            if self._closing != "now":
                self._closing = "drain" if drain else "now"
            self._wake.notify_all()
        atexit.unregister(self.close)
        self._thread.join(timeout)

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self.close()

    def stats(self):
        """Counters since the start and the present state.

        Returns:
            dict of numbers: ``waiting``, ``starting`` and ``running`` requests, ``rows`` and ``rows_used``, counts of
            requests ``submitted``, ``refused``, ``finished``, ``cancelled``, ``timeouts``, ``failed``; ``prompt_tokens``,
            ``prompt_rows_tokens`` (computed, all rows), ``cached_tokens`` (taken from other rows), ``copied_rows``,
            ``generated_tokens``; ``steps``, ``row_steps`` (rows in use summed over the steps), ``chunks``, ``failures`` (of
            a graph), ``graphs`` (compiled), ``cache_bytes``, ``seconds``; ``bank``: :meth:`AdapterBank.info` or None.
        """
        starting, running = list(self._starting), list(self._running)
        return {
            "waiting": len(self._waiting), "starting": len(starting), "running": len(running), "rows": self.rows,
            "rows_used": sum(r.settings.rows for r in starting + running), **self._counts, **self._prompts.counts,
            "graphs": self._graphs.compilations(), "cache_bytes": self._graphs.cache.nbytes,
            "seconds": time.monotonic() - self._started, "bank": None if self.bank is None else self.bank.info(),
        }

    # -- the thread --------------------------------------------------------------------------------------------------

    def _work(self):
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                closing, calls = self._closing, list(self._calls)
                self._calls.clear()
            for task in calls:
                task()
            busy = len(self._waiting) or self._starting or self._running
            if closing == "now" or closing == "drain" and not busy:
                break
            try:
                self._tick()
            except Exception as error:  # the engine must outlive anything that a request can do
                try:
                    self._recover(error)
                except Exception:
                    _log.exception("the engine cannot go on")
                    break
        with self._wake:
            self._closing = "now"
        gone = EngineClosedError("the engine was closed before the request ended")
        for request in self._waiting.remove_if(lambda request: True) + self._starting + self._running:
            self._end(request, error=gone)
        self._starting, self._running = [], []

    def _has_work(self):
        return bool(len(self._waiting) or self._starting or self._running or self._calls or self._closing)

    def _tick(self):
        self._working = []
        self._drop()
        self._admit()
        self._fill()
        if self._running:
            self._steps()
        elif not self._starting and len(self._waiting):
            time.sleep(0.002)  # all that wait lack a slot that is about to become free, or an adapter that is being read

    def _fill(self):
        """Compute pieces of the prompts of the starting requests, and let those run whose prompt is complete."""
        spent = 0
        while self._starting and spent < self._prompt_chunk:
            self._working = recovery.cohort(self._starting)
            tokens = self._prompts.advance(self._working)
            for request in self._working:
                recovery.clear(request)
            self._running += [r for r in self._starting if r.prompt_done]
            self._starting = [r for r in self._starting if not r.prompt_done]
            if not tokens:
                break
            spent += tokens

    def _drop(self):
        """End the requests that were cancelled or are too late."""
        now = time.monotonic()

        def over(request):
            return request.cancelled or request.deadline is not None and now >= request.deadline

        gone = [r for r in self._starting + self._running if over(r)]
        if gone:
            self._starting = [r for r in self._starting if r not in gone]
            self._running = [r for r in self._running if r not in gone]
        for request in gone + self._waiting.remove_if(over):
            request.finish_reason = "cancelled" if request.cancelled else "timeout"
            self._end(request)

    def _admit(self):
        free = self.rows - sum(r.settings.rows for r in self._starting + self._running)
        if free < 1 or not len(self._waiting):
            return
        failed = []
        for request in self._waiting.admit(free, lambda request: self._place(request, failed)):
            request.handle.timing.admitted = time.monotonic()
            self._starting.append(request)
            self._counts["prompt_tokens"] += len(request.ids)
        for request, error in failed:
            self._waiting.remove_if(lambda one, request=request: one is request)
            self._end(request, error=error)

    def _place(self, request, failed):
        """Get a request its slot; False if it has to wait."""
        if not request.digest or request.lease is not None:
            return True
        self._working = [request]
        try:
            try:
                request.lease = self.bank.lease(request.digest)
            except KeyError:  # its content was pushed out of host memory while it waited
                request.digest = request.rows[0].key = self.bank.resolve(request.adapter)
                request.lease = self.bank.lease(request.digest)
        except ColoraError as error:
            failed.append((request, error))
        except KeyError:
            pass  # pushed out again by another thread; there is a next time
        return request.lease is not None

    def _steps(self):
        """A chunk of steps for all that run, and what comes of it."""
        self._working = recovery.cohort(self._running)
        used = sum(r.settings.rows for r in self._working)
        batch = Batch(self._working, next(b for b in self._buckets if b >= used), self.eos)
        steps = 1 if batch.one_step else self.chunk
        if self._starting:
            steps = min(steps, max(1, self.chunk // 2))  # half the wait for those whose prompts are being computed
        if len(self._waiting):
            steps = min(steps, min(r.left for r in self._working))  # a row that becomes free goes on at once
        ints, floats, counts = self._graphs.steps(batch, self.chunk, steps)
        self._counts["chunks"] += 1
        self._counts["steps"] += int(counts.max(initial=0))
        now = time.monotonic()
        for i, request in enumerate(batch.requests):
            self._counts["row_steps"] += int(counts[i]) * request.settings.rows
            try:
                self._take(request, ints[:, i], floats[:, i], counts[i], now)
            except Exception as error:  # its text, its listener: nobody else's
                _log.exception("request %s failed", request.handle.id)
                self._end(request, error=recovery.failure(error))
        self._running = [r for r in self._running if not r.handle.done]

    def _take(self, request, ints, floats, count, now):
        """Give a request its new tokens, and end it if it ended."""
        if not request.take(ints, floats, count):
            self._end(request, error=recovery.not_finite(request))
            return
        recovery.clear(request)
        if request.handle.timing.first_token is None:
            request.handle.timing.first_token = now
        piece = request.settle()
        if piece.text or piece.tokens:
            self._counts["generated_tokens"] += len(piece.tokens)
            request.handle.usage.generated += len(piece.tokens)
            request.handle.push(piece)
        if request.finish_reason is not None:
            self._end(request)

    def _end(self, request, error=None):
        """Give back what a request holds and tell its handle."""
        self._prompts.release(request, keep=error is None)
        if request.lease is not None:
            self.bank.release(request.lease)
            request.lease = None
        request.handle.timing.finished = time.monotonic()
        if error is not None:
            self._counts["failed"] += 1
            request.handle.push(error=error)
            return
        self._counts[{"cancelled": "cancelled", "timeout": "timeouts"}.get(request.finish_reason, "finished")] += 1
        request.handle.push(completion=request.completion())

    def _recover(self, error):
        """A graph failed: MindSpore does not run it again, and what it wrote is unknown. All requests begin anew with
        their prompts on new graphs, which gives the same tokens again; see :mod:`colora_ms.serving.recovery`."""
        _log.exception("the engine's graphs failed and are made anew")
        self._counts["failures"] += 1
        requests, self._starting, self._running = self._starting + self._running, [], []
        guilty, self._working = [r for r in self._working or requests if not r.handle.done], []
        for request in recovery.blame(guilty, self.chunk):
            self._waiting.remove_if(lambda one, request=request: one is request)
            self._end(request, error=recovery.failure(error))
        for request in requests:
            if not request.handle.done:
                self._prompts.release(request, keep=False)
                request.restart()
                self._starting.append(request)
        self._graphs.renew()
        self._prompts.clear()

