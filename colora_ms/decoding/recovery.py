"""Who is to blame when a call of the step fails.

A call that fails leaves what the requests have in the cache as it was: it writes only at positions that no row has
filled, and into blocks to be copied, and both are written again. The requests that were in it are *doubtful*: they run
alone, one after the other, until they are past the place. One that fails alone ends; the others were its neighbours.
"""

from __future__ import annotations

from typing import List, Sequence

from colora_ms.decoding.seat import Seat

#: Failures around a request that it is not cleared between; then it ends, so that nothing is tried for ever.
MOST_DOUBTS = 4


def cohort(seats: Sequence[Seat]) -> List[Seat]:
    """Who may share the next call: all, or one doubtful request alone."""
    return next(([seat] for seat in seats if seat.doubtful is not None), list(seats))


def blame(seats: Sequence[Seat], steps: int) -> List[Seat]:
    """Mark the requests that were in a failed call as doubtful; returns those that are to end.

    Args:
        steps: that the call was to make.
    """
    for seat in seats:
        seat.doubts += 1
        seat.doubtful = len(seat.job.tokens) + (steps if seat.ready else 0)
    return [seat for seat in seats if len(seats) == 1 or seat.doubts > MOST_DOUBTS]


def clear(seat: Seat) -> None:
    """Take the doubt from a request that is past the place where a call failed: it was a neighbour's, and whatever
    comes later is another matter."""
    if seat.doubtful is not None and seat.ready and len(seat.job.tokens) >= seat.doubtful:
        seat.doubtful, seat.doubts = None, 0
