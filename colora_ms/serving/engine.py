"""``Engine``: continuous batching over one decoder, its adapters, and one key/value cache.

One thread owns MindSpore; it goes round after round through what :mod:`colora_ms.serving.rounds` says. Everything else
(tokenizing, reading and checking adapters) happens in the threads that call :meth:`Engine.submit`.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import threading
import time
from typing import Any, Callable, Dict, List, Optional

from colora_ms import runtime
from colora_ms.decoding.core import AHEAD, Core, cache_blocks
from colora_ms.decoding.options import Options
from colora_ms.decoding.prompt import ending_ids
from colora_ms.decoding.request import Limits, Request, refuse_strengths
from colora_ms.decoding.step import StepGraph
from colora_ms.decoding.values import shown
from colora_ms.distributed.workers import Workers
from colora_ms.errors import ColoraError, ConfigError, DecodingError, EngineClosedError, UnknownAdapterError
from colora_ms.models.device_form import cache_form
from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.handle import RequestHandle, Timing, Usage
from colora_ms.serving.job import Job
from colora_ms.serving.rounds import Rounds
from colora_ms.serving.scheduler import WaitingQueue
from colora_ms.serving.split import LeadingGraph

_log = logging.getLogger(__name__)

#: Bytes of the engine thread's stack: MindSpore parses deep graphs by recursion.
_STACK = 256 << 20

#: Seconds after which an idle engine tells its graph that it is.
_REST = 2.0


class Engine:
    """Serves requests with different adapters, or none, in one running batch.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`.
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        bank: :class:`colora_ms.serving.AdapterBank` of the decoder; None serves the base model alone.
        rows: rows of the running batch; a contrastive request takes two.
        cache_bytes: memory for keys and values; None: as much as ``rows`` sequences of 1,024 tokens need. Requests that
            find it full wait, the youngest first; see ``preemptions`` of :meth:`stats`.
        max_length: tokens that a prompt and its answer may have together; None: as many as model and cache take.
        chunk: steps between which requests may join and leave; fewer give shorter waits and smoother streams, more give
            less overhead. While prompts are computed, it is one.
        queue: requests that may wait; a further one is refused with QueueFullError.
        prompt_chunk: tokens of prompts that are computed in a step in which other requests make tokens, so that the
            time between their tokens stays even.
        cache_dtype: ``mindspore.float32``, ``bfloat16`` or ``int8`` for keys and values; None: the device's own, on a
            CPU float32.
        ahead: tokens of every running request for which blocks are kept free when a further one is let in; with fewer,
            more run at a time and more have to wait again, see ``preemptions``.
        team: the workers over which the decoder is split (:mod:`colora_ms.serving.split`); this is the first of them.

    Raises:
        ConfigError: a number is out of range, or the bank is another model's.
    """

    def __init__(self, decoder: Any, tokenizer: Any, bank: Optional[AdapterBank] = None, rows: int = 16,
                 cache_bytes: Optional[int] = None, max_length: Optional[int] = None, chunk: int = 8, queue: int = 256,
                 prompt_chunk: int = 128, cache_dtype: Any = None, ahead: int = AHEAD,
                 team: Optional[Workers] = None) -> None:
        limit = min(decoder.max_positions, decoder.config.max_position_embeddings)
        max_length = limit if max_length is None else max_length
        for label, value, least in (("rows", rows, 2), ("max_length", max_length, 2), ("chunk", chunk, 1),
                                    ("queue", queue, 1), ("prompt_chunk", prompt_chunk, 2), ("ahead", ahead, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{label}={value!r} is not a whole number >= {least}")
        if bank is not None and bank.decoder is not decoder:
            raise ConfigError("the bank was made for another decoder than the engine's; make it with this one")
        runtime.configure(inference=True)
        decoder.set_train(False)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.bank = bank
        self.rows = rows
        self.max_length = min(max_length, limit)
        self.chunk = chunk
        self.eos = ending_ids(decoder, tokenizer)
        blocks = cache_blocks(decoder, cache_bytes, rows * min(self.max_length, 1024), cache_dtype)
        self.max_length = min(self.max_length, blocks * cache_form(decoder).block)
        self._limits = Limits(decoder.config.vocab_size, self.max_length, "the engine's cache",
                              ": shorten it, or make the engine with a larger max_length or cache_bytes", blocks,
                              cache_form(decoder).block)
        self._core = Core.of(decoder, blocks, cache_dtype, rows, chunk, prompt_chunk, self.max_length, self.eos)
        self._core.ahead = ahead
        self.split = team is not None and team.world > 1
        if team is not None and team.world > 1:
            if not team.first:
                return  # its graph is all that is wanted, see :meth:`follower`
            self._core.graph = LeadingGraph(self._core.graph, team)
        self._waiting = WaitingQueue(queue)
        self._rounds = Rounds(self._core, self._waiting, bank)
        self._numbers = itertools.count()
        self._calls: List[Callable[[], None]] = []  # functions that the thread runs between two calls of the core
        self._wake = threading.Condition()
        self._closing: Optional[str] = None  # "drain" or "now"
        self._started = time.monotonic()
        self._counts = {"submitted": 0, "refused": 0}
        before = threading.stack_size(_STACK)
        try:
            self._thread = threading.Thread(target=self._work, name="colora-engine", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # MindSpore must not be torn down under a running graph
        finally:
            threading.stack_size(before)

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(self, prompt: Any, adapter: Optional[str] = None, **options: Any) -> RequestHandle:
        """Hand in a request; any thread may.

        Args:
            prompt: a string, token ids, or chat messages (``{"role": …, "content": …}``).
            adapter: an adapter's name in the bank; None: the base model.
            options: ``contrast``, ``sampling``, ``max_new_tokens``, ``stop``, ``stop_token_ids``, ``seed``,
                ``records``, ``ignore_eos``, ``priority``, ``timeout``: the attributes of
                :class:`colora_ms.decoding.options.Options`.

        Returns:
            :class:`RequestHandle`.

        Raises:
            DecodingError: an option or the prompt cannot be used.
            UnknownAdapterError, AdapterError: there is no such adapter, or it cannot be loaded.
            QueueFullError: too many requests wait.
            EngineClosedError: the engine was closed.
        """
        try:
            return self._submit(prompt, adapter, options)
        except ColoraError:
            with self._wake:
                self._counts["refused"] += 1
            raise

    def _submit(self, prompt: Any, adapter: Optional[str], wanted: Dict[str, Any]) -> RequestHandle:
        self._check_open()
        self._waiting.check()  # before the work, so that a flood costs little
        request = Request.of(self.tokenizer, prompt, adapter, Options.asked(**wanted), self._limits)
        if len(request.rows) > self.rows:
            raise DecodingError(f"the request takes {len(request.rows)} rows, the engine has {self.rows}")
        self._check_mix(request)
        contents = {row.adapter: self._digest(row.adapter) for row in request.rows if row.adapter is not None}
        job = Job(request, contents, self.tokenizer, self.eos)
        now = time.monotonic()
        handle = job.handle = RequestHandle(next(self._numbers), adapter, Timing(submitted=now),
                                            Usage(prompt=len(request.ids)), lambda handle: self._cancel(job))
        job.deadline = None if request.options.timeout is None else now + request.options.timeout
        with self._wake:
            self._check_open()
            self._waiting.add(job)
            self._counts["submitted"] += 1
            self._wake.notify_all()
        return handle

    def _check_mix(self, request: Request) -> None:
        """Refuse what this engine can never run."""
        names = {row.adapter for row in request.rows if isinstance(row.adapter, str)}
        if self.bank is not None and len(names) > self.bank.max_loaded:
            raise DecodingError(f"the request mixes {len(names)} adapters, the engine's bank has "
                                f"{self.bank.max_loaded} slots")
        if not self._core.graph.fused:
            refuse_strengths(request.rows)

    def _digest(self, adapter: str) -> str:
        """The content that an adapter's name stands for."""
        if not isinstance(adapter, str):
            raise UnknownAdapterError(f"adapter={shown(adapter)} is not an adapter's name")
        if self.bank is None:
            raise UnknownAdapterError(f"adapter {adapter!r:.80} was asked for, but this engine has no adapter bank")
        return self.bank.resolve(adapter)

    def _cancel(self, job: Job) -> None:
        with self._wake:
            job.cancelled = True
            self._wake.notify_all()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise EngineClosedError("the engine was closed")

    def follower(self) -> StepGraph:
        """The graph of a worker that is not the first one: it follows, and this engine takes no requests."""
        return self._core.graph

    # -- life --------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile the graph now (or take it from the graph cache), so that no request waits for it."""
        self.call(self._core.warm_up)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine's thread between two calls of the core, and return what it returns."""
        done = threading.Event()
        outcome: Dict[str, Any] = {}

        def task() -> None:
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

    def close(self, drain: bool = False, timeout: Optional[float] = None) -> None:
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

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *reason: Any) -> None:
        self.close()

    def stats(self) -> Dict[str, Any]:
        """Counters since the start and the present state.

        Returns:
            dict of numbers: ``waiting``, ``starting`` and ``running`` requests, ``rows`` and ``rows_used``, counts of
            requests ``submitted``, ``refused``, ``finished``, ``cancelled``, ``timeouts``, ``failed``;
            ``prompt_tokens``, ``prompt_rows_tokens`` (computed, all rows, those of requests that are computed again
            among them), ``cached_tokens`` (found in the cache), ``copied_blocks``, ``generated_tokens``; ``steps``,
            ``row_steps`` (rows in use summed over the steps), ``chunks`` (calls), ``failures`` (of calls), ``graphs``
            (compiled); ``blocks`` of the cache, ``blocks_used`` (by requests), ``evicted_blocks`` (whose content was
            given up), ``preemptions`` (requests that gave their blocks back and waited), ``cache_bytes``; ``seconds``;
            ``bank``: :meth:`AdapterBank.info` or None.
        """
        return {**self._rounds.stats(), "rows": self.rows, **self._counts, "graphs": self._core.graph.compilations(),
                "cache_bytes": self._core.graph.cache.nbytes, "seconds": time.monotonic() - self._started,
                "bank": None if self.bank is None else self.bank.info()}

    # -- the thread --------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        rounds = self._rounds
        while True:
            with self._wake:
                if not self._wake.wait_for(lambda: rounds.busy or self._calls or self._closing, _REST):
                    self._core.graph.rest()
                    continue
                closing, calls = self._closing, list(self._calls)
                self._calls.clear()
            for task in calls:
                task()
            if closing == "now" or closing == "drain" and not rounds.busy:
                break
            try:
                rounds.round()
            except Exception as error:  # the engine must outlive anything that a request can do
                try:
                    rounds.recover(error)
                except Exception:
                    _log.exception("the engine cannot go on")
                    break
        with self._wake:
            self._closing = "now"
        rounds.abandon(EngineClosedError("the engine was closed before the request ended"))
        self._core.graph.end()
