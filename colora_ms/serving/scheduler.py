"""Who goes next: the bounded queue of waiting requests."""

from __future__ import annotations

import bisect
import threading
from typing import Callable, List, Tuple

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

    def remove(self, job: Job) -> None:
        """Take out one job, if it is there."""
        self.remove_if(lambda one: one is job)

    def admit(self, fits: Callable[[Job], bool], place: Callable[[Job], bool]) -> List[Job]:
        """Take out the jobs that can start.

        Args:
            fits: function (job), whether there is room for it now; all rows of a request start together or not at all.
            place: function (job) that gives it a slot and its room; False if it has to wait for a slot.

        Returns:
            list of jobs. The first one that does not fit ends the search, so that small requests cannot keep a large
            one waiting for ever; one that waits for a slot is passed over, up to PATIENCE times.
        """
        with self._lock:
            waiting = [job for _, _, job in self._items]
        taken: List[Job] = []
        for job in waiting:
            if not fits(job):
                break
            if place(job):
                taken.append(job)
            else:
                job.passed_over += 1
                if job.passed_over > PATIENCE:
                    break
        if taken:
            ids = {id(job) for job in taken}
            self.remove_if(lambda job: id(job) in ids)
        return taken
