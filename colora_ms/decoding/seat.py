"""A request that has a place in the batch, and where its rows stand in the cache.

The sequence of a row is its prompt and the tokens that the request has made. ``filled`` of them have their keys and
values in the cache, from position 0 on. A row that lacks one token only is ready to make the next one; a row that lacks
more is being computed: a prompt, or a prompt and tokens of a request that had to give its blocks back.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import numpy as np

from colora_ms.decoding.blocks import BlockPool
from colora_ms.decoding.request import Running
from colora_ms.kernels.options import OptionRows


class Line:
    """One row of a request in the cache.

    Attributes:
        job: the request; number: of the row in it; root: the chain's first key, see :meth:`BlockPool.root`.
        begun: whether it was looked up what the cache has of it; from then on it holds blocks.
        table: its blocks; keys: the chain's keys behind those of them that can be found whole.
        filled: positions whose keys and values are there, those to be copied among them.
        copy: None, or (source, target) of a copy that the next call has to make; the source is held for it.
    """

    def __init__(self, job: Running, number: int, root: bytes) -> None:
        self.job = job
        self.number = number
        self.root = root
        self.prompt = job.prompt(number)
        self.begun = False
        self.table: List[int] = []
        self.keys: List[bytes] = []
        self.filled = 0
        self.copy: Optional[Tuple[int, int]] = None

    @property
    def length(self) -> int:
        """Tokens of its sequence."""
        return len(self.prompt) + len(self.job.tokens)

    @property
    def lacking(self) -> int:
        """Tokens of its sequence that are not in the cache."""
        return self.length - self.filled

    def ids(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) int32: a part of its sequence."""
        prompt, size = self.prompt, len(self.prompt)
        if stop <= size:
            return prompt[start:stop]
        made = np.array(self.job.tokens[max(start - size, 0):stop - size], np.int32)
        return np.concatenate((prompt[start:], made)) if start < size else made

    def begin(self, pool: BlockPool, partial: bool) -> None:
        """Take what the cache has of it. Its last token is computed in any case: what follows it is wanted.

        Args:
            partial: whether a block may be copied for its first positions.
        """
        found = pool.find(self.root, self.ids(0, self.length - 1), partial)
        self.begun, self.table, self.keys = True, found.blocks, found.keys
        self.filled = len(self.table) * pool.size
        pool.hold(found.blocks)
        if found.source is None:
            return
        pool.hold([found.source])
        if not pool.available:
            pool.release([found.source])
            return
        target, = pool.take()
        self.copy = found.source, target
        self.table.append(target)
        self.filled += found.more

    def copied(self, pool: BlockPool) -> None:
        """Its copy was made."""
        if self.copy is not None:
            pool.release(self.copy[:1])
            self.copy = None

    def publish(self, pool: BlockPool, end: bool = False) -> None:
        """Let its whole blocks be found, and with ``end`` the last one, too, which is filled in part."""
        if self.copy is not None:
            return  # not yet there
        filled = min(self.filled, self.length)  # behind a stop there may be more than its sequence
        for index in range(len(self.keys), filled // pool.size):
            self.keys.append(self._publish(pool, pool.size * index, pool.size * (index + 1)) or b"")
        if end and filled % pool.size:
            self._publish(pool, filled - filled % pool.size, filled)

    def _publish(self, pool: BlockPool, start: int, stop: int) -> Optional[bytes]:
        before = self.keys[-1] if self.keys else self.root
        return pool.publish(self.table, start // pool.size, before, self.ids(start, stop))

    def release(self, pool: BlockPool) -> None:
        """Give its blocks back; it has to begin anew."""
        self.copied(pool)
        pool.release(self.table)
        self.begun, self.table, self.keys, self.filled = False, [], [], 0


class Seat:
    """A request in the core.

    Attributes:
        job: :class:`colora_ms.decoding.request.Running`; age: its number in the order of coming.
        lines: its rows in the cache.
        options: (whole (1, columns) int32, real (1, columns) float32), its options without what places it in a batch.
        resumed: whether it was computed before and had to give its blocks back.
        doubtful: None, or, after a call failed that it was in: tokens it has to reach alone to be cleared.
        doubts: how many calls failed that it was in, since it was cleared.
    """

    def __init__(self, job: Running, age: int, pool: BlockPool) -> None:
        self.job = job
        self.age = age
        self.lines = [Line(job, number, pool.root(key, job.salt)) for number, key in enumerate(job.keys)]
        rows, asked = OptionRows(1), job.request.options
        if asked.mixture is not None:
            rows.take(0, "contrast", asked.mixture)
            rows.take(0, "mix", asked.mixture)
        if not asked.sampling.greedy:
            rows.take(0, "sampling", asked.sampling)
        rows.take(0, "options", asked)
        rows.put(0, "logprobs", -1 if asked.logprobs is None else asked.logprobs)
        rows.put(0, "voices", int(asked.rows_wanted))
        rows.put(0, "masked", int(asked.grammar is not None))
        self.options = rows.whole, rows.real
        self.resumed = False
        self.doubtful: Optional[int] = None
        self.doubts = 0

    @property
    def ready(self) -> bool:
        """Whether each row lacks one token only, so that the next call makes a token."""
        return all(line.begun and line.lacking == 1 for line in self.lines)

    @property
    def begun(self) -> bool:
        """Whether a row holds blocks."""
        return any(line.begun for line in self.lines)

    def begin(self, line: Line, pool: BlockPool, partial: bool) -> int:
        """Begin one of its rows; returns the prompt tokens that were there already, 0 for a resumed one."""
        line.begin(pool, partial)
        cached = 0 if self.resumed else line.filled
        self.job.cached += cached
        return cached

    def release(self, pool: BlockPool, keep: bool) -> None:
        """Give its blocks back; ``keep``: what stands in them may be found."""
        for line in self.lines:
            if line.begun and keep:
                line.publish(pool, end=True)
        for line in self.lines:
            line.release(pool)
