"""An engine whose decoder is split over the workers of a job (msrun).

Worker 0 is the engine: it takes requests, schedules, and keeps the books of blocks and slots. The others *follow*: what
worker 0 runs, they run, each on its share of the model, of the adapters and of the cache, so that the sums inside a
layer meet. Worker 0 says before each call what it is.
"""

from __future__ import annotations

import logging
import signal
import tempfile
from pathlib import Path
from typing import Any, Optional

from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.decoding.step import FlatBatch, StepGraph, StepResult
from colora_ms.distributed.adapter_files import shard_adapter
from colora_ms.distributed.workers import Workers
from colora_ms.errors import AdapterError, ColoraError
from colora_ms.serving.bank import AdapterBank
from colora_ms.serving.content import Content

_log = logging.getLogger(__name__)

# What worker 0 says; the rest of a message follows.
_STEP, _RENEW, _WRITE, _REST, _END = "step", "renew", "write", "rest", "end"


class LeadingGraph:
    """Worker 0's graph: tells the others what it runs. The face is :class:`colora_ms.decoding.step.StepGraph`'s.

    Args:
        graph: this worker's own; team: ``Workers``.
    """

    def __init__(self, graph: StepGraph, team: Workers) -> None:
        self.graph, self.team = graph, team

    def run(self, batch: FlatBatch) -> StepResult:
        """As of the graph, by all workers."""
        self.team.share((_STEP, batch))
        return self.graph.run(batch)

    def renew(self) -> None:
        """As of the graph, by all workers."""
        self.team.share((_RENEW,))
        self.graph.renew()

    def rest(self) -> None:
        """Keep the others from waiting for too long."""
        self.team.share((_REST,))

    def end(self) -> None:
        """Let the others go."""
        self.team.share((_END,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.graph, name)


class SplitBank(AdapterBank):
    """The adapters of a split decoder: every worker holds its share of what is in a slot.

    Args:
        team: ``Workers``; the others as of :class:`AdapterBank`. Worker 0 decides, the others write what it says.
    """

    def __init__(self, decoder: Any, folder: Any = None, team: Optional[Workers] = None, **options: Any) -> None:
        super().__init__(decoder, folder, **options)
        self.team = team or Workers()
        self._sources: dict[str, tuple[str, str]] = {}  # digest of a share -> folder, digest of the whole

    def read(self, path: Path) -> Content:
        """This worker's share of a folder, checked."""
        whole = StoredAdapter(path, self.allow_pickle).digest()
        with tempfile.TemporaryDirectory(prefix="colora-share-") as place:
            content = super().read(shard_adapter(path, Path(place) / path.name, self.team))
        self._sources[content.digest] = str(path), whole
        return content

    def write(self, number: int, content: Content) -> None:
        """Put a content into a slot, on all workers.

        Raises:
            AdapterError: another worker could not; the slot holds nothing then.
        """
        self.team.share((_WRITE, number, *self._sources[content.digest]))
        try:
            super().write(number, content)
        finally:  # the others wait for this, also where the own share failed
            problems = [one for one in self.team.gather(None) if one]
        if problems:
            raise AdapterError(problems[0])

    def follow(self, number: int, path: str, whole: str) -> None:
        """What :meth:`write` is on the other workers."""
        problem = None
        try:
            content = self.read(Path(path))
            if self._sources.pop(content.digest)[1] != whole:
                raise AdapterError(f"the adapter in {path} changed while the workers read it; ask for it again")
            self._slots.mirror(number, content.digest, content.rank)
            AdapterBank.write(self, number, content)
        except ColoraError as error:
            problem = f"worker {self.team.rank}: {error}"
        self.team.gather(problem)


def follow(graph: StepGraph, bank: Optional[SplitBank], team: Workers) -> None:
    """Run what worker 0 runs, until it ends. Its signals are not this process's.

    Args:
        graph: over this worker's share, of the sizes of worker 0's; bank: with its share of the slots.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        what, *rest = team.share(None) or (_END,)
        if what == _END:
            return
        if what == _STEP:
            try:
                graph.run(*rest)
            except (ColoraError, RuntimeError):  # worker 0 had the same and deals with it
                _log.info("a step of worker 0 was refused", exc_info=True)
        elif what == _RENEW:
            graph.renew()
        elif what == _WRITE and bank is not None:
            bank.follow(*rest)
