"""What the engine's thread does, round after round, with the requests that it has taken.

One round: take away what was cancelled or is too late, let waiting requests in, make a call of the core, hand out the
new text.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Callable, Dict, List, Optional, cast

from colora_ms.decoding.core import Core
from colora_ms.errors import ColoraError, ServingError
from colora_ms.kernels.aot import KernelError
from colora_ms.serving.bank import AdapterBank, Lease
from colora_ms.serving.job import Job
from colora_ms.serving.scheduler import WaitingQueue

_log = logging.getLogger(__name__)


class Rounds:
    """The requests between the queue and their ends. Only the engine's thread calls this, but for :attr:`busy` and
    :meth:`stats`.

    Args:
        core, waiting, bank: the engine's.
    """

    def __init__(self, core: Core, waiting: WaitingQueue, bank: Optional[AdapterBank]) -> None:
        self._core = core
        self._waiting = waiting
        self._bank = bank
        self._counts = dict.fromkeys(("finished", "cancelled", "timeouts", "failed", "prompt_tokens",
                                      "generated_tokens"), 0)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(len(self._waiting) or self._core.busy)

    def stats(self) -> Dict[str, int]:
        """The counters, and the requests that there are; see ``Engine.stats``."""
        return {"waiting": len(self._waiting), **self._core.stats(), **self._counts}

    def round(self) -> None:
        """One round."""
        self._drop()
        self._admit()
        if not self._core.busy:
            if len(self._waiting):
                time.sleep(0.002)  # all that wait lack a slot that is about to become free, or an adapter being read
            return
        for outcome in self._core.step(waiting=True):  # whoever gets an answer may ask again
            job = cast(Job, outcome.job)
            if outcome.error is not None:
                self._end(job, _reason(outcome.error))
            else:
                self._guarded(job, self._settle, None, time.monotonic())

    def _drop(self) -> None:
        """End the requests that were cancelled or are too late."""
        now = time.monotonic()

        def over(job: Job) -> bool:
            return job.cancelled or job.deadline is not None and now >= job.deadline

        for job in [job for job in cast(List[Job], self._core.jobs) if over(job)] + self._waiting.remove_if(over):
            self._guarded(job, self._settle, "cancelled" if job.cancelled else "timeout")

    def _admit(self) -> None:
        if self._core.free_rows < 1 or not len(self._waiting):
            return
        failed: Dict[Job, Exception] = {}
        for job in self._waiting.admit(lambda job: self._fits(job, failed), lambda job: self._place(job, failed)):
            job.handle.timing.admitted = time.monotonic()
            self._counts["prompt_tokens"] += len(job.request.ids)
        for job, error in failed.items():
            self._waiting.remove(job)
            self._end(job, _reason(error))

    def _fits(self, job: Job, failed: Dict[Job, Exception]) -> bool:
        """Whether there is room for a request; one that cannot even be asked is for :meth:`_place` to pass over."""
        try:
            return self._core.fits(job)
        except Exception as error:
            failed[job] = error
            return True

    def _place(self, job: Job, failed: Dict[Job, Exception]) -> bool:
        """Get a request its slots and its rows; False if it has to wait."""
        if job in failed:
            return False
        if self._bank is not None and len(job.leases) < len(job.contents):
            leases: Dict[str, Lease] = {}
            for name in job.contents:
                lease = self._lease(self._bank, job, name, failed)
                if lease is None:  # one that is held would be missed by those that wait for it
                    for one in leases.values():
                        self._bank.release(one)
                    return False
                leases[name] = lease
            job.place(leases)
        self._core.add(job)
        return True

    def _lease(self, bank: AdapterBank, job: Job, name: str, failed: Dict[Job, Exception]) -> Optional[Lease]:
        """The lease of one of its adapters' slots; None if it has to wait, or failed."""
        try:
            try:
                return bank.lease(job.contents[name])
            except KeyError:  # its content was pushed out of host memory while it waited
                job.use({name: bank.resolve(name)})
                return bank.lease(job.contents[name])
        except ColoraError as error:
            failed[job] = error
        except KeyError:
            pass  # pushed out again by another thread; there is a next time
        return None

    def _settle(self, job: Job, reason: Optional[str] = None, now: Optional[float] = None) -> None:
        """Hand out what is new of a request; end it where its answer ended, or for this reason."""
        if now is not None and job.handle.timing.first_token is None:
            job.handle.timing.first_token = now
        job.handle.usage.cached = job.cached
        if reason is not None:
            job.answer.end(reason)
        piece = job.piece()
        if piece.text or piece.tokens:
            self._counts["generated_tokens"] += len(piece.tokens)
            job.handle.usage.generated += len(piece.tokens)
            job.handle.push(piece)
        if job.answer.finish_reason is not None:
            self._end(job)

    def _guarded(self, job: Job, work: Callable[..., None], *arguments: Any) -> None:
        """Do something for a request; what fails there (its text, its listener) ends it and nobody else."""
        try:
            work(job, *arguments)
        except Exception as error:
            if not isinstance(error, ColoraError):
                _log.exception("request %s failed", job.handle.id)
            self._end(job, _reason(error))

    def _end(self, job: Job, error: Optional[Exception] = None) -> None:
        """Give back what a request holds and tell its handle."""
        self._core.remove(job, keep=error is None)
        for lease in job.leases.values():
            assert self._bank is not None
            self._bank.release(lease)
        job.leases = {}
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
        for job in self._waiting.remove_if(lambda job: True) + cast(List[Job], self._core.jobs):
            self._end(job, error)

    def recover(self, error: Exception) -> None:
        """Something failed outside of a call of the core; see ``Core.restart``."""
        _log.exception("the engine failed, and its requests are computed again")
        for outcome in self._core.restart():
            job = cast(Job, outcome.job)
            if outcome.tokens and outcome.error is None:
                self._guarded(job, self._settle, None, time.monotonic())
            else:
                self._end(job, _reason(outcome.error or error))


def _reason(error: Exception) -> ColoraError:
    """What a request is told of an error that it met; a refusal of an operator is the engine's failure."""
    if isinstance(error, ColoraError) and not isinstance(error, KernelError):
        return error
    reason = ServingError(f"the engine failed while the request ran: {error}")
    reason.__cause__ = error
    return reason
