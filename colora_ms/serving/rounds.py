"""What the engine's thread does, round after round, with the requests that it has taken.

One round: take away what was cancelled or is too late, let waiting requests in, compute a piece of prompts, make a
chunk of steps for all that run, hand out the new text.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from colora_ms.errors import ColoraError
from colora_ms.serving import recovery
from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.graphs import Graphs, batch_of
from colora_ms.serving.job import Job
from colora_ms.serving.prompts import Prompts
from colora_ms.serving.scheduler import WaitingQueue

_log = logging.getLogger(__name__)


class Rounds:
    """The requests between the queue and their ends. Only the engine's thread calls this, but for :attr:`busy` and
    :meth:`stats`.

    Args:
        graphs, prompts, waiting, bank: the engine's.
        buckets: numbers of rows that a chunk of steps may have, ascending; the last one is the batch's.
        chunk: steps between which requests may join and leave.
        prompt_chunk: tokens of prompts that are computed between two chunks, about.
        eos: ids that end answers.
    """

    def __init__(self, graphs: Graphs, prompts: Prompts, waiting: WaitingQueue, bank: Optional[AdapterBank],
                 buckets: Sequence[int], chunk: int, prompt_chunk: int, eos: Sequence[int]) -> None:
        self._graphs = graphs
        self._prompts = prompts
        self._waiting = waiting
        self._bank = bank
        self._buckets = buckets
        self._chunk = chunk
        self._prompt_chunk = prompt_chunk
        self._eos = eos
        self.starting: List[Job] = []  # admitted; their prompts are being computed
        self.running: List[Job] = []
        self._working: List[Job] = []  # those that the thread is busy with, for the case that it fails
        self._counts = dict.fromkeys(("finished", "cancelled", "timeouts", "failed", "prompt_tokens",
                                      "generated_tokens", "steps", "row_steps", "chunks", "failures"), 0)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(len(self._waiting) or self.starting or self.running)

    def stats(self) -> Dict[str, int]:
        """The counters, and the requests that there are; see ``Engine.stats``."""
        starting, running = list(self.starting), list(self.running)
        return {"waiting": len(self._waiting), "starting": len(starting), "running": len(running),
                "rows_used": _rows(starting + running), **self._counts}

    def round(self) -> None:
        """One round."""
        self._working = []
        self._drop()
        self._admit()
        self._fill()
        if self.running:
            self._steps()
        elif not self.starting and len(self._waiting):
            time.sleep(0.002)  # all that wait lack a slot that is about to become free, or an adapter being read

    def _drop(self) -> None:
        """End the requests that were cancelled or are too late."""
        now = time.monotonic()

        def over(job: Job) -> bool:
            return job.cancelled or job.deadline is not None and now >= job.deadline

        gone = [job for job in self.starting + self.running if over(job)]
        if gone:
            self.starting = [job for job in self.starting if job not in gone]
            self.running = [job for job in self.running if job not in gone]
        for job in gone + self._waiting.remove_if(over):
            self._guarded(job, lambda job=job: self._settle(job, "cancelled" if job.cancelled else "timeout"))

    def _admit(self) -> None:
        free = self._buckets[-1] - _rows(self.starting + self.running)
        if free < 1 or not len(self._waiting):
            return
        failed: List[Tuple[Job, ColoraError]] = []
        for job in self._waiting.admit(free, lambda job: self._place(job, failed)):
            job.handle.timing.admitted = time.monotonic()
            self.starting.append(job)
            self._counts["prompt_tokens"] += len(job.request.ids)
        for job, error in failed:
            self._waiting.remove_if(lambda one, job=job: one is job)
            self._end(job, error)

    def _place(self, job: Job, failed: List[Tuple[Job, ColoraError]]) -> bool:
        """Get a request its slot; False if it has to wait."""
        if self._bank is None or not job.digest or job.lease is not None:
            return True
        self._working = [job]
        lease = None
        try:
            try:
                lease = self._bank.lease(job.digest)
            except KeyError:  # its content was pushed out of host memory while it waited
                job.use(self._bank.resolve(job.adapter))
                lease = self._bank.lease(job.digest)
        except ColoraError as error:
            failed.append((job, error))
        except KeyError:
            pass  # pushed out again by another thread; there is a next time
        if lease is not None:
            job.place(lease)
        return lease is not None

    def _fill(self) -> None:
        """Compute pieces of the prompts of the starting requests, and let those run whose prompt is complete."""
        spent = 0
        while self.starting and spent < self._prompt_chunk:
            self._working = recovery.cohort(self.starting)
            tokens = self._prompts.advance(self._working)
            for job in self._working:
                recovery.clear(job)
            self.running += [job for job in self.starting if job.prompt_done]
            self.starting = [job for job in self.starting if not job.prompt_done]
            if not tokens:
                break
            spent += tokens

    def _steps(self) -> None:
        """A chunk of steps for all that run, and what comes of it."""
        self._working = recovery.cohort(self.running)
        used = _rows(self._working)
        batch = batch_of(self._working, next(bucket for bucket in self._buckets if bucket >= used), self._eos)
        steps = 1 if batch.one_step else self._chunk
        if self.starting:
            steps = min(steps, max(1, self._chunk // 2))  # half the wait for those whose prompts are being computed
        if len(self._waiting):
            steps = min(steps, min(job.left for job in self._working))  # a row that becomes free goes on at once
        ints, floats, counts = self._graphs.steps(batch, self._chunk, steps)
        self._counts["chunks"] += 1
        self._counts["steps"] += int(counts.max(initial=0))
        now = time.monotonic()
        for place, job in enumerate(batch.requests):
            count = int(counts[place])
            self._counts["row_steps"] += count * len(job.rows)
            chosen = ints[:, place], floats[:, place], count
            self._guarded(job, lambda job=job, chosen=chosen: self._take(job, *chosen, now))
        self.running = [job for job in self.running if not job.handle.done]

    def _take(self, job: Job, ints: np.ndarray, floats: np.ndarray, count: int, now: float) -> None:
        """Give a request its new tokens, and end it if it ended."""
        job.take(ints, floats, count)
        recovery.clear(job)
        if job.handle.timing.first_token is None:
            job.handle.timing.first_token = now
        self._settle(job)

    def _settle(self, job: Job, reason: Optional[str] = None) -> None:
        """Hand out what is new of a request; end it where its answer ended, or for this reason."""
        if reason is not None:
            job.answer.end(reason)
        piece = job.piece()
        if piece.text or piece.tokens:
            self._counts["generated_tokens"] += len(piece.tokens)
            job.handle.usage.generated += len(piece.tokens)
            job.handle.push(piece)
        if job.answer.finish_reason is not None:
            self._end(job)

    def _guarded(self, job: Job, work: Any) -> None:
        """Do something for a request; what fails there (its logits, its text, its listener) ends it and nobody else."""
        try:
            work()
        except ColoraError as error:
            self._end(job, error)
        except Exception as error:
            _log.exception("request %s failed", job.handle.id)
            self._end(job, recovery.failure(error))

    def _end(self, job: Job, error: Optional[Exception] = None) -> None:
        """Give back what a request holds and tell its handle."""
        self._prompts.release(job, keep=error is None)
        if job.lease is not None:
            assert self._bank is not None
            self._bank.release(job.lease)
            job.lease = None
        job.handle.timing.finished = time.monotonic()
        if error is not None:
            self._counts["failed"] += 1
            job.handle.push(error=error)
            return
        reason = job.answer.finish_reason or ""
        self._counts[{"cancelled": "cancelled", "timeout": "timeouts"}.get(reason, "finished")] += 1
        job.handle.push(completion=job.completion())

    # -- what ends all of them -----------------------------------------------------------------------------------------

    def abandon(self, error: Exception) -> None:
        """End all requests, those that wait among them."""
        for job in self._waiting.remove_if(lambda job: True) + self.starting + self.running:
            self._end(job, error)
        self.starting, self.running = [], []

    def recover(self, error: Exception) -> None:
        """A graph failed: MindSpore does not run it again, and what it wrote is unknown. All requests begin anew with
        their prompts on new graphs, which gives the same tokens again; see :mod:`colora_ms.serving.recovery`."""
        _log.exception("the engine's graphs failed and are made anew")
        self._counts["failures"] += 1
        jobs, self.starting, self.running = self.starting + self.running, [], []
        guilty, self._working = [job for job in self._working or jobs if not job.handle.done], []
        for job in recovery.blame(guilty, self._chunk):
            self._waiting.remove_if(lambda one, job=job: one is job)
            self._end(job, recovery.failure(error))
        for job in jobs:
            if not job.handle.done:
                self._prompts.release(job, keep=False)
                job.restart()
                self.starting.append(job)
        self._graphs.renew()
        self._prompts.clear()


def _rows(jobs: Sequence[Job]) -> int:
    """Rows of the batch that these take."""
    return sum(len(job.rows) for job in jobs)
