"""Who goes next: the bounded queue of waiting requests, and the choice of shapes for prompts."""

from __future__ import annotations

import bisect
import threading
from typing import Callable, List, Sequence, Tuple

from colora_ms.errors import QueueFullError
from colora_ms.serving.job import Job

#: Times that a request whose adapter finds no slot may be passed over by later ones before everybody waits for it.
PATIENCE = 64


class WaitingQueue:
    """Waiting requests, those of higher priority first, equal ones in the order of their coming.

    Args:
        limit: requests that may wait; a further one is refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._items: List[Tuple[int, int, Job]] = []  # (-priority, number, job)

    def __len__(self) -> int:
        return len(self._items)

    def check(self) -> None:
        """Raise QueueFullError if no further request may wait."""
        if len(self._items) >= self.limit:
            raise QueueFullError(f"{len(self._items)} requests wait, which is all that the queue takes; try again "
                                 "later")

    def add(self, job: Job) -> None:
        """Add a job; QueueFullError if the queue is full."""
        with self._lock:
            self.check()
            bisect.insort(self._items, (-job.request.options.priority, job.handle.id, job))

    def remove_if(self, test: Callable[[Job], bool]) -> List[Job]:
        """Take out the jobs for which ``test`` holds, and return them."""
        with self._lock:
            found = [item for item in self._items if test(item[2])]  # once for each: its answer may change meanwhile
            numbers = {number for _, number, _ in found}
            if found:
                self._items = [item for item in self._items if item[1] not in numbers]
        return [job for _, _, job in found]

    def admit(self, rows: int, place: Callable[[Job], bool]) -> List[Job]:
        """Take out the jobs that can start.

        Args:
            rows: rows of the batch that are free; all rows of a request start together or not at all.
            place: function (job) that gives it a slot; False if it has to wait for one.

        Returns:
            list of jobs. The first one that does not fit the rows ends the search, so that small requests cannot
            keep a large one waiting for ever; one that waits for a slot is passed over, up to PATIENCE times.
        """
        with self._lock:
            waiting = [job for _, _, job in self._items]
        taken: List[Job] = []
        for job in waiting:
            if len(job.rows) > rows:
                break
            if place(job):
                rows -= len(job.rows)
                taken.append(job)
            else:
                job.passed_over += 1
                if job.passed_over > PATIENCE:
                    break
        if taken:
            ids = {id(job) for job in taken}
            self.remove_if(lambda job: id(job) in ids)
        return taken


def row_buckets(rows: int) -> List[int]:
    """Numbers of rows that a chunk of steps is compiled for: powers of two, and ``rows`` itself."""
    return sorted({1 << k for k in range(rows.bit_length()) if 1 << k <= rows} | {rows})


def prompt_shapes(rows: int, chunk: int) -> List[Tuple[int, int]]:
    """(rows, tokens) that prompts are computed in: short ones together, long ones in chunks.

    Args:
        rows: rows of the batch; chunk: tokens of a prompt that one call takes at most.
    """
    wanted = [(2, 16), (8, 16), (1, 64), (1, chunk), (2, chunk)]
    return sorted({(min(r, rows), min(t, chunk)) for r, t in wanted})


def best_shape(shapes: Sequence[Tuple[int, int]], lengths: Sequence[int]) -> Tuple[int, int]:
    """The shape with the most real tokens for its cost.

    Args:
        shapes: as :func:`prompt_shapes` gives them.
        lengths: tokens that each waiting row lacks, the rows in their order.
    """
    def worth(shape: Tuple[int, int]) -> float:
        rows, tokens = shape
        # The weights are read once a call, which costs about as much as some tens of tokens.
        return sum(min(n, tokens) for n in lengths[:rows]) / (rows * tokens + 32)

    return max(shapes, key=worth)
