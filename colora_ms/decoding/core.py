"""The core under ``Generator`` and ``Engine``: requests, the blocks that their rows hold, and one call after the other.

A driver adds requests as long as there are rows for them (:meth:`Core.fits`), calls :meth:`Core.step`, looks at what
came of it, and removes what it gives up. One thread does all this.

Blocks for everything that a call may write are there before it. Where they are not, the request that came last gives
its blocks back and waits; it is computed again, its own tokens among its prompt, as soon as there is room, and makes
the same tokens: keys and values do not depend on how a sequence was cut into calls.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from colora_ms.decoding import recovery
from colora_ms.decoding.batch import flat_batch
from colora_ms.decoding.blocks import BlockPool
from colora_ms.decoding.request import Running
from colora_ms.decoding.schedule import Part, prompt_parts, ready_parts, waits_for
from colora_ms.decoding.seat import Line, Seat
from colora_ms.decoding.step import FlatBatch, StepGraph
from colora_ms.errors import ConfigError, ServingError
from colora_ms.kernels.options import OptionRows
from colora_ms.models.device_form import cache_form

_log = logging.getLogger(__name__)

#: Tokens of every running request for which blocks are kept free when a further one is let in: letting in too many
#: means that some are computed twice.
AHEAD = 128

#: Tokens of a flat batch: as many as make the reading of the weights cheap, and as few as keep a call short.
TOKENS = 256

#: The same of a device step, whose graph begins prompts by an attention of their own: a whole prompt had better be in
#: one call, because every token of a second piece reads what the first one left.
DEVICE_TOKENS = 4096


def cache_blocks(decoder: Any, cache_bytes: Optional[int], positions: int, dtype: Any) -> int:
    """Blocks of a cache.

    Args:
        cache_bytes: how large it may be; None: as large as ``positions`` need.

    Raises:
        ConfigError: it is no number of bytes that holds two blocks.
    """
    form = cache_form(decoder)
    if cache_bytes is None:
        return max(2, -(-positions // form.block))
    one = form.block_bytes(decoder.config, dtype)
    if not isinstance(cache_bytes, int) or isinstance(cache_bytes, bool) or cache_bytes < 2 * one:
        raise ConfigError(f"cache_bytes={cache_bytes!r} is not a whole number >= {2 * one}, two blocks of {form.block} "
                          "positions of this model")
    return cache_bytes // one


@dataclass(frozen=True)
class Outcome:
    """What a call brought a request.

    Attributes:
        job: the request; tokens: how many the call made; error: what ended it, None while all is well.
    """

    job: Running
    tokens: int = 0
    error: Optional[Exception] = None


class Core:
    """The requests that are computed.

    Args:
        graph: :class:`colora_ms.decoding.step.StepGraph`, or anything with ``run(batch)``, ``renew()`` and
            ``fused``.
        pool: the blocks of its cache.
        rows: rows (and requests) that a call may have; tokens: tokens that its flat batch may have, at least as many.
        chunk: steps of a call at most.
        budget: tokens of prompts in a call in which other requests make tokens.
        length: tokens that a sequence may have.
        eos: ids that end answers.

    Attributes:
        ahead: see :data:`AHEAD`; may be set.
    """

    def __init__(self, graph: Any, pool: BlockPool, rows: int, tokens: int, chunk: int, budget: int, length: int,
                 eos: Sequence[int]) -> None:
        self.graph = graph
        self.pool = pool
        self.rows = rows
        self.tokens = tokens
        self.chunk = chunk
        self.budget = budget
        self.table_blocks = pool.count(length)
        self.eos = tuple(eos)
        self.ahead = AHEAD
        self.seats: List[Seat] = []  # those that hold rows, in the order of coming
        self.preempted: List[Seat] = []  # those that gave their blocks back, in the same order
        self.counts = dict.fromkeys(("prompt_rows_tokens", "cached_tokens", "copied_blocks", "preemptions", "steps",
                                     "row_steps", "chunks", "failures"), 0)
        self._age = 0
        self._outcomes: List[Outcome] = []  # of the present call, for the case that it does not return

    @classmethod
    def of(cls, decoder: Any, blocks: int, dtype: Any, rows: int, chunk: int, budget: int, length: int,
           eos: Sequence[int], graph: Optional[StepGraph] = None) -> Core:
        """The core of a decoder, with a cache of its own: ``blocks`` of type ``dtype``; the others as of the class.

        ``graph``: of a former core; if it has these sizes, it goes on over the new cache and is not compiled again.
        """
        form = cache_form(decoder)
        tokens = max(DEVICE_TOKENS if form.on_device else TOKENS, rows + budget)
        if graph is None or (graph.tokens, graph.rows, graph.capacity) != (tokens, rows, chunk):
            graph = StepGraph(decoder, form.make(decoder.config, blocks, dtype), tokens, rows, rows, chunk)
        else:
            graph.over(lambda: form.make(decoder.config, blocks, dtype))
        pool = BlockPool(blocks, form.block, kind=str(form.dtype(dtype)))
        return cls(graph, pool, rows, tokens, chunk, budget, length, eos)

    def warm_up(self) -> None:
        """Compile the graph now; there must be no requests."""
        block, = self.pool.take()
        row = np.zeros(1, np.int32)
        options = OptionRows(0)
        self.graph.run(FlatBatch(
            tokens=row, rows=row, positions=row, slots=row - 1, tables=np.full((1, 1), block, np.int32),
            copies=np.zeros((0, 2), np.int32), whole=options.whole, real=options.real,
            mix_rows=options.mix_rows, mix_weights=options.mix_weights, previous=row[:0],
            uniforms=np.zeros((0, self.chunk), np.float32), eos=row[:0]))
        self.pool.release([block])

    # -- requests ------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether there are requests."""
        return bool(self.seats or self.preempted)

    @property
    def jobs(self) -> List[Running]:
        """All requests."""
        return [seat.job for seat in [*self.seats, *self.preempted]]

    @property
    def free_rows(self) -> int:
        """Rows that a further request may have; 0 while one waits that gave its blocks back."""
        return 0 if self.preempted else self.rows - self.rows_used

    @property
    def rows_used(self) -> int:
        """Rows of the requests that are not waiting."""
        return sum(len(seat.lines) for seat in self.seats)

    def stats(self) -> Dict[str, int]:
        """The counters and the present state, as numbers; any thread may ask."""
        seats = list(self.seats)
        ready = sum(bool(seat.job.tokens) for seat in seats)
        return {"starting": len(seats) - ready + len(self.preempted), "running": ready,
                "rows_used": sum(len(seat.lines) for seat in seats), "blocks": self.pool.blocks,
                "blocks_used": self.pool.used, "evicted_blocks": self.pool.evictions, **self.counts}

    def fits(self, job: Running) -> bool:
        """Whether a further request may be added now: rows are free, and blocks for its prompt and for what those that
        run will want soon."""
        return len(job.keys) <= self.free_rows and self._has_blocks(Seat(job, 0, self.pool))

    def add(self, job: Running) -> None:
        """Take a request; there must be rows for it."""
        if len(job.keys) > self.rows - self.rows_used:
            raise RuntimeError(f"a request of {len(job.keys)} rows is added where {self.free_rows} are free")
        self._age += 1
        self.seats.append(Seat(job, self._age, self.pool))

    def remove(self, job: Running, keep: bool = True) -> None:
        """Take a request away, if it is there; ``keep``: what it has in the cache may be found later."""
        for seats in (self.seats, self.preempted):
            for seat in seats:
                if seat.job is job:
                    seat.release(self.pool, keep)
                    seats.remove(seat)
                    return

    def clear(self) -> None:
        """Forget what can be found in the cache; requests go on."""
        self.pool.forget()

    def restart(self) -> List[Outcome]:
        """After a failure that nobody foresaw: all requests are computed again, alone until they are past the place.

        Returns:
            what the call brought before it failed; then, without an error, which is the caller's to know, those that
            failed too often, which are no longer here.
        """
        brought, self._outcomes = self._outcomes, []
        self.counts["failures"] += 1
        seats = self.seats + self.preempted
        ended = recovery.blame(seats, self.chunk)
        for seat in seats:
            seat.release(self.pool, keep=False)
            seat.resumed = True
        self.pool.forget()
        self.seats = [seat for seat in self.seats if seat not in ended]
        self.preempted = [seat for seat in self.preempted if seat not in ended]
        return brought + [Outcome(seat.job) for seat in ended]

    # -- one call ------------------------------------------------------------------------------------------------------

    def step(self, waiting: bool = False) -> List[Outcome]:
        """Make one call.

        Args:
            waiting: whether requests wait for rows, so that the call had better end with the first request that ends.

        Returns:
            an :class:`Outcome` for each request that took tokens or failed; those whose answers ended, or that failed,
            are no longer here.
        """
        self._resume()
        members = recovery.cohort(self.seats)
        ready = [seat for seat in members if seat.ready]
        starting = [seat for seat in members if not seat.ready]
        parts = ready_parts(ready)
        room = self.tokens - sum(len(seat.lines) for seat in ready)
        # What is begun already is to be waited for, also where it belongs to a request that is served later.
        lines = [line for seat in starting for line in seat.lines]
        parts += prompt_parts(starting, room, min(self.budget, room) if ready else room,
                              lambda seat, line: self._begin(seat, line, lines))
        steps = self._steps(ready, starting, waiting)
        while steps > 1 and self._wanted(parts, steps) > self.pool.available:
            steps //= 2
        parts = self._with_blocks(parts, steps)
        if not parts:
            return []
        try:
            batch, takers = flat_batch(parts, self.table_blocks, self.chunk, self.eos, steps)
            result = self.graph.run(batch)
        except Exception as error:  # the requests' own; what interrupts the process is not
            return self._failed(parts, steps, error)
        self._taken(parts, takers, result)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _steps(self, ready: Sequence[Seat], starting: Sequence[Seat], waiting: bool) -> int:
        """How many steps the next call makes."""
        if starting or not self.graph.fused or any(seat.job.one_step for seat in ready):
            return 1
        left = [seat.job.left for seat in ready] or [1]
        return max(1, min(self.chunk, min(left) if waiting else max(left)))

    def _begin(self, seat: Seat, line: Line, others: Sequence[Line]) -> bool:
        """Begin a row, unless it had better wait for what another one is computing."""
        found = self.pool.find(line.root, line.ids(0, line.length - 1))
        if waits_for(line, len(found.blocks) * self.pool.size + found.more, others):
            return False
        # The block that is copied from is held as long: where it is the last one that this request needs, it would wait
        # for ever.
        partial = self.pool.available > sum(self.pool.count(one.length + seat.job.left) for one in seat.lines)
        self.counts["cached_tokens"] += seat.begin(line, self.pool, partial)
        return True

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _wanted(self, parts: Sequence[Part], steps: int) -> int:
        """Blocks that a call takes beyond those that its rows hold."""
        return sum(max(0, self.pool.count(positions) - len(line.table))
                   for part in parts for line, positions in zip(part.seat.lines, part.positions(steps)))

    def _with_blocks(self, parts: List[Part], steps: int) -> List[Part]:
        """Give the rows of a call their blocks; returns the parts of those that still take part."""
        for part in parts:
            while part.seat in self.seats and self._wanted([part], steps) > self.pool.available:
                self._preempt(self.seats[-1])
            if part.seat in self.seats:
                for line, positions in zip(part.seat.lines, part.positions(steps)):
                    line.table += self.pool.take(max(0, self.pool.count(positions) - len(line.table)))
        return [part for part in parts if part.seat in self.seats]

    def _preempt(self, seat: Seat) -> None:
        seat.release(self.pool, keep=True)
        seat.resumed = True
        self.seats.remove(seat)
        self.preempted.append(seat)
        self.preempted.sort(key=lambda one: one.age)
        self.counts["preemptions"] += 1

    def _resume(self) -> None:
        """Let those go on that gave their blocks back, as far as there is room."""
        while self.preempted and len(self.preempted[0].lines) <= self.rows - self.rows_used \
                and self._has_blocks(self.preempted[0]):
            self.seats.append(self.preempted.pop(0))
            self.seats.sort(key=lambda one: one.age)

    def _has_blocks(self, seat: Seat) -> bool:
        """Whether there are blocks for a request and for those that are here, each with its next
        :data:`AHEAD` tokens."""
        if not self.seats:
            return True  # it is alone: what it may ask for was checked against the whole cache
        return sum(map(self._lacking, (*self.seats, seat))) <= self.pool.available

    def _lacking(self, seat: Seat) -> int:
        """Blocks that a request will want before long, beyond those that it holds or others hold for it."""
        wanted = 0
        for line in seat.lines:
            held = len(line.table) if line.begun else sum(
                self.pool.holders(block) > 0
                for block in self.pool.find(line.root, line.ids(0, line.length - 1), partial=False).blocks)
            wanted += max(0, self.pool.count(line.length + min(max(seat.job.left, 1), self.ahead)) - held)
        return wanted

    # -- what comes of a call ------------------------------------------------------------------------------------------

    def _taken(self, parts: Sequence[Part], takers: Sequence[Part], result: Any) -> None:
        for part in parts:
            for line, count in zip(part.seat.lines, part.counts):
                if count:
                    self.counts["copied_blocks"] += line.copy is not None
                    line.copied(self.pool)
                    line.filled += count
            # A prompt's last token makes a token, like those that come behind it.
            self.counts["prompt_rows_tokens"] += sum(part.counts) - part.takes * len(part.counts)
        for place, part in enumerate(takers):
            count = int(result.counts[place])
            self._outcomes.append(self._take(part.seat, count, result.ints[:, place], result.floats[:, place],
                                             result.tops[:, place], result.details[:, place]))
            self.counts["row_steps"] += count * len(part.seat.lines)
        self.counts["chunks"] += 1
        self.counts["steps"] += int(result.counts[:len(takers)].max(initial=0))
        for part in parts:
            if part.seat in self.seats:
                recovery.clear(part.seat)
                for line in part.seat.lines:
                    if line.begun:
                        line.publish(self.pool, end=not part.takes or max(part.counts) > 1)

    def _take(self, seat: Seat, count: int, ints: Any, floats: Any, tops: Any, details: Any) -> Outcome:
        """Give a request its tokens; what fails there (its logits, its text) ends it and nobody else."""
        for line in seat.lines:
            line.filled += count - 1  # the last one is not in the cache
        try:
            if count < 1:
                raise ServingError("the step made no token for a request that had to get one")
            seat.job.take(ints, floats, count, tops, details)
        except Exception as error:
            self.remove(seat.job, keep=False)
            return Outcome(seat.job, count, error)
        if seat.job.answer.finish_reason is not None or seat.job.left < 1:
            self.remove(seat.job)
        return Outcome(seat.job, count)

    def _failed(self, parts: Sequence[Part], steps: int, error: Exception) -> List[Outcome]:
        """A call failed: find the guilty among those that were in it; see :mod:`colora_ms.decoding.recovery`."""
        _log.warning("a call of the step failed: %s", error)
        self.counts["failures"] += 1
        self.graph.renew()
        ended = recovery.blame([part.seat for part in parts], steps)
        for seat in ended:
            self.remove(seat.job, keep=False)
        return [Outcome(seat.job, 0, error) for seat in ended]
