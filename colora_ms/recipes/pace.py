"""How long the rest takes: the pace of a training, measured after the updates that compile."""

from __future__ import annotations

from collections.abc import Callable

from colora_ms.runtime import all_compilations
from colora_ms.training.trainer import Callback


def in_words(seconds: float) -> str:
    """A length of time for people: "8 s", "2.5 minutes"."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


class Pace(Callback):
    """Says now and then how far a training is, what an update takes, and how long the others will take.

    Updates in which a graph was compiled (the first one, and the first of each other batch shape) are left out of the
    pace.

    Args:
        steps: updates of the whole training.
        say: called with each line.
        first: updates after which the first forecast is made.
        lines: forecasts in all, about.
    """

    def __init__(self, steps: int, say: Callable[[str], None] = print, first: int = 5, lines: int = 8) -> None:
        self.steps, self.say = steps, say
        self.first, self.every = first, max(steps // lines, 1)
        self.compiling = self.running = 0.0
        self.timed = 0
        self._compiled = all_compilations()

    def on_step(self, trainer: object, record: dict) -> None:
        """Take the time of one update from its line of the log."""
        compiled, step = all_compilations(), record["step"]
        if step == 1 or compiled > self._compiled:
            self.compiling += record["seconds"]
            if step == 1:
                self.say(f"update 1 of {self.steps}: {record['seconds']:.0f} s with compiling; the others need none")
        else:
            self.running += record["seconds"]
            self.timed += 1
        self._compiled = compiled
        if self.timed and (step == self.first + 1 or step % self.every == 0) and step < self.steps:
            left = (self.steps - step) * self.seconds_per_update
            self.say(f"update {step} of {self.steps}: loss {record['loss']:.3f}, {self.seconds_per_update:.2f} s an "
                     f"update, {in_words(left)} to go")

    @property
    def seconds_per_update(self) -> float:
        """Mean seconds of the updates that compiled nothing; 0 before the first."""
        return self.running / self.timed if self.timed else 0.0
