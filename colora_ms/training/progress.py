"""What a person at the terminal sees of a training run, and how they stop it."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING

from tqdm import tqdm

from colora_ms import runtime

if TYPE_CHECKING:
    from types import FrameType

    from colora_ms.training.trainer import Trainer


class Progress:
    """A progress bar on standard error: loss, tokens a second, time left."""

    def __init__(self, steps: int, done: int, active: bool) -> None:
        self.bar, self.active = None, active
        self.tokens, self.seconds, self.loss = 0, 0.0, None
        self.compilations = runtime.all_compilations()
        if active and steps:
            # smoothing 0: what is left follows from the mean of all updates that count
            self.bar = tqdm(total=steps, initial=done, unit="update", dynamic_ncols=True, smoothing=0)

    def show(self, record: dict) -> None:
        """One update further."""
        if self.bar is None:
            return
        # An update that compiled a graph says nothing of speed; that of the others is what tells the time left.
        known, self.compilations = self.compilations, runtime.all_compilations()
        if known == self.compilations:
            self.tokens += record["tokens"]
            self.seconds += record["seconds"]
        else:
            self.bar.initial += 1
            self.bar.start_t += record["seconds"]
        self.loss = record["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * record["loss"]
        speed = f", {self.tokens / self.seconds:.0f} tokens/s" if self.seconds else ""
        self.bar.set_postfix_str(f"loss {self.loss:.3f}{pair_text(record)}{speed}", refresh=False)
        self.bar.update(1)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()


def pair_text(record: dict) -> str:
    """What a record of preference training says of its pairs beside the loss; "" for other records."""
    if "margin" not in record:
        return ""
    return f", {100 * record['accuracy']:.0f} % of the pairs right, margin {record['margin']:.3f}"


class StopSignals:
    """While active, the first SIGINT or SIGTERM asks the trainer to stop after the current update.

    A second one interrupts at once. Outside the main thread nothing is changed.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.old = trainer, {}

    def __enter__(self) -> StopSignals:
        self.trainer.stopped_by = ""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.trainer.stopped_by:
            raise KeyboardInterrupt
        self.trainer.stopped_by = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
