"""Who takes part in the next call, and with how many tokens.

A call has a number of tokens at most. Requests that are ready come first, with one token a row. Then come prompts, in
the order of coming, in pieces: beside ready requests up to a budget, so that the time between their tokens stays even;
alone, as many as the call holds. The last tokens of all rows of a request stand in one call, which makes its next
token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Sequence

import numpy as np

from colora_ms.decoding.seat import Line, Seat

#: A row that has not begun waits for another one if they share as many tokens.
WORTH_WAITING = 8


@dataclass
class Part:
    """What a request has in a call.

    Attributes:
        seat: the request; counts: tokens of each of its rows; takes: whether it makes tokens.
    """

    seat: Seat
    counts: List[int]
    takes: bool

    def positions(self, steps: int) -> List[int]:
        """Positions that each row must have blocks for, if the call makes this many steps."""
        more = min(steps, max(self.seat.job.left, 1)) - 1 if self.takes else 0
        return [line.filled + count + more if count else 0 for line, count in zip(self.seat.lines, self.counts)]


def ready_parts(seats: Sequence[Seat]) -> List[Part]:
    """The parts of requests that are ready."""
    return [Part(seat, [1] * len(seat.lines), True) for seat in seats]


def prompt_parts(seats: Sequence[Seat], room: int, budget: int, begin: Callable[[Seat, Line], bool]) -> List[Part]:
    """The parts of requests that are being computed.

    Args:
        seats: in the order in which they are served.
        room: tokens that the call still holds, at least one for each row of these.
        budget: tokens that pieces may have; the last tokens of a request may go beyond it.
        begin: begins a row that was not; False if it had better wait.
    """
    parts = []
    for seat in seats:
        counts = [0] * len(seat.lines)
        for place, line in enumerate(seat.lines):
            if not line.begun and (min(budget, room) < 1 or not begin(seat, line)):
                continue
            counts[place] = min(line.lacking - 1, max(budget, 0), room)
            budget, room = budget - counts[place], room - counts[place]
        takes = room >= len(counts) and all(
            line.begun and line.lacking == count + 1 for line, count in zip(seat.lines, counts))
        if takes:
            counts = [count + 1 for count in counts]
            budget, room = budget - len(counts), room - len(counts)
        if any(counts):
            parts.append(Part(seat, counts, takes))
    return parts


def waits_for(line: Line, there: int, others: Sequence[Line]) -> bool:
    """Whether another row is just computing what this one can use, more than is there already.

    Args:
        line: a row that was not begun; there: positions of it that the cache has; others: rows that are being computed.
    """
    wanted = line.ids(0, line.length - 1)
    for other in others:
        # An other row's last token waits for all rows of its request, which may be this one.
        if other is not line and other.root == line.root and other.begun and other.lacking > 1:
            coming = common(other.ids(0, other.length - 1), wanted)
            if coming >= WORTH_WAITING and coming > max(there, other.filled):
                return True
    return False


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two id arrays have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
