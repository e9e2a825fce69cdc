"""Who is to blame when the engine fails, and what a request is told.

When a graph fails, all requests begin anew on new graphs; those that were in the failed call are *doubtful* and run
alone, one after the other, until they are past the place. One that fails alone ends; the others were its neighbours.
"""

from __future__ import annotations

from typing import List, Sequence

from colora_ms.errors import ServingError
from colora_ms.serving.job import Job

#: Graphs that may fail around a request that does not fail alone; then it ends, so that nothing is tried for ever.
MOST_DOUBTS = 4


def cohort(jobs: Sequence[Job]) -> List[Job]:
    """Who may share the next graph call: all, or one doubtful request alone."""
    return next(([job] for job in jobs if job.doubtful is not None), list(jobs))


def blame(jobs: Sequence[Job], chunk: int) -> List[Job]:
    """Mark the requests that were in a failed call as doubtful; returns those that are to end.

    Args:
        chunk: steps that the call made at most.
    """
    for job in jobs:
        job.doubts += 1
        job.doubtful = len(job.tokens) + chunk if job.prompt_done else 0
    return [job for job in jobs if len(jobs) == 1 or job.doubts > MOST_DOUBTS]


def clear(job: Job) -> None:
    """Take the doubt from a request that is past the place where a graph failed."""
    if job.doubtful is not None and job.prompt_done and len(job.tokens) >= job.doubtful:
        job.doubtful = None


def failure(error: BaseException) -> ServingError:
    """What a request is told when the engine failed at it."""
    reason = ServingError(f"the engine failed while the request ran: {error}")
    reason.__cause__ = error
    return reason
