"""Prompts into the cache: what other rows hold already is taken from them, the rest is computed in chunks."""

from __future__ import annotations

from typing import Iterable, List, Sequence, Tuple

import numpy as np

from colora_ms.serving.graphs import Graphs
from colora_ms.serving.job import Job, PromptRow
from colora_ms.serving.prefix_cache import PrefixCache, common
from colora_ms.serving.scheduler import best_shape

#: A row is taken over for a prefix of it if what is lost with it is no longer than this many tokens.
SMALL_LOSS = 64


class Prompts:
    """Fills the rows of jobs that have been admitted.

    Args:
        graphs: :class:`colora_ms.serving.graphs.Graphs`.
        rows: rows of the cache.
        shapes: (rows, tokens) that may be computed at a time.
    """

    def __init__(self, graphs: Graphs, rows: int, shapes: Sequence[Tuple[int, int]]) -> None:
        self.graphs = graphs
        self.shapes = shapes
        self.prefixes = PrefixCache(rows)
        self.counts = {"prompt_rows_tokens": 0, "cached_tokens": 0, "copied_rows": 0}

    def advance(self, jobs: Iterable[Job]) -> int:
        """Compute one piece of the prompts of these jobs, the first ones first.

        Returns:
            the tokens of the graph call, those that only fill its shape included; 0 if nothing was left to compute.
        """
        lacking: List[Tuple[PromptRow, Job]] = []
        for job in jobs:
            for one in job.rows:
                if one.row is None and not self._waits_for_prefix(one, job, lacking):
                    self._begin(one, job)
                if one.row is not None and one.filled < job.to_fill:
                    lacking.append((one, job))
        if not lacking:
            return 0
        rows, tokens = best_shape(self.shapes, [job.to_fill - one.filled for one, job in lacking])
        ids = np.zeros((rows, tokens), np.int32)
        slots, cache_rows = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
        start, length = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for i, (one, job) in enumerate(lacking[:rows]):
            count = min(tokens, job.to_fill - one.filled)
            ids[i, :count] = job.request.ids[one.filled:one.filled + count]
            slots[i] = job.slots[one.number]
            cache_rows[i], start[i], length[i] = one.row.index, one.filled, count
        self.graphs.prefill(ids, slots, cache_rows, start, length)
        for (one, job), count in zip(lacking, length.tolist()):
            one.filled += count
            one.row.tokens = job.request.ids[:one.filled]
            self.counts["prompt_rows_tokens"] += count
        return rows * tokens

    def _waits_for_prefix(self, one: PromptRow, job: Job, lacking: List[Tuple[PromptRow, Job]]) -> bool:
        """Whether another row is just computing a prefix that this one can use, more than is there already."""
        wanted = job.request.ids[:job.to_fill]
        there = self.prefixes.best(one.key, wanted)[1]
        for other, owner in lacking:
            if other.key == one.key:
                coming = common(owner.request.ids[:owner.to_fill], wanted)
                if coming >= self.prefixes.smallest and coming > max(there, other.filled):
                    return True
        return False

    def _begin(self, one: PromptRow, job: Job) -> None:
        """Find a row of the cache, with as much of the prompt in it as there is anywhere."""
        wanted = job.request.ids[:job.to_fill]
        source, length = self.prefixes.best(one.key, wanted)
        if source is not None and not source.used and (
                len(source.tokens) - length <= SMALL_LOSS or self.prefixes.free == 1):
            one.row = source
        else:
            one.row = self.prefixes.take(avoid=source)
            if source is not None:
                self.graphs.copy(source.index, one.row.index)
                self.counts["copied_rows"] += 1
        one.filled = length
        self.prefixes.occupy(one.row, one.key, wanted[:length])
        self.counts["cached_tokens"] += length
        job.handle.usage.cached += length

    def release(self, job: Job, keep: bool = True) -> None:
        """Give back the rows of a job; ``keep=False`` forgets what they hold."""
        for one in job.rows:
            if one.row is not None:
                self.prefixes.release(one.row, keep)
                one.row = None

    def clear(self) -> None:
        """Forget what is in the cache; no job may hold a row."""
        self.prefixes.clear()
