"""A request inside the engine: what :class:`colora_ms.decoding.request.Running` has, and the rows and the slot that it
holds."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable, Optional, Sequence

from colora_ms.decoding.completion import Completion
from colora_ms.decoding.request import Request, Running
from colora_ms.serving.bank import Lease
from colora_ms.serving.handle import Piece, RequestHandle
from colora_ms.serving.prefix_cache import CacheRow


@dataclasses.dataclass(eq=False)
class PromptRow:
    """Where one row of a request stands with its prompt.

    Attributes:
        number: of the row in its request.
        key: whose keys and values it computes (the adapter content's digest, "" for the base model).
        row: its row of the cache, None before its prompt was begun.
        filled: prompt tokens whose keys and values are in the cache.
    """

    number: int
    key: str
    row: Optional[CacheRow] = None
    filled: int = 0


class Job(Running):
    """One request, from the queue to its end. The engine's thread owns it.

    Attributes:
        digest: its adapter's content, "" for none.
        rows: :class:`PromptRow` of each of its rows.
        handle: the caller's; deadline: when it is too late, in ``time.monotonic()``.
        cancelled: whether the caller gave it up; passed_over: how often later ones found a slot before it.
        lease: of its adapter's slot.
        doubtful: None, or, after a graph failed that it was in: tokens it has to reach alone to be cleared.
        doubts: how many graphs failed that it was in.
    """

    def __init__(self, request: Request, digest: str, tokenizer: Any, eos: Iterable[int]) -> None:
        super().__init__(request, tokenizer, eos, [-1] * len(request.rows))
        self.handle: RequestHandle = None  # type: ignore[assignment]  # it needs the job to be made
        self.deadline: Optional[float] = None
        self.digest = digest
        self.cancelled = False
        self.passed_over = 0
        self.lease: Optional[Lease] = None
        self.rows = [PromptRow(i, "" if row.adapter is None else digest) for i, row in enumerate(request.rows)]
        self.doubtful: Optional[int] = None
        self.doubts = 0

    @property
    def adapter(self) -> Optional[str]:
        """The adapter's name."""
        return self.request.adapter

    @property
    def cache_rows(self) -> Sequence[int]:
        """The row of the cache that each row uses."""
        return [one.row.index for one in self.rows if one.row is not None]

    @property
    def to_fill(self) -> int:
        """Prompt tokens that must be in the cache before the loop; the last one goes through the loop itself."""
        return len(self.request.ids) - 1

    @property
    def prompt_done(self) -> bool:
        """Whether all rows have their prompt in the cache."""
        return all(one.row is not None and one.filled == self.to_fill for one in self.rows)

    def place(self, lease: Lease) -> None:
        """Take a slot: from now on its rows may run."""
        self.lease = lease
        self.slots = [-1 if row.adapter is None else lease.slot for row in self.request.rows]

    def use(self, digest: str) -> None:
        """Take another content for the adapter's name, before any row was begun."""
        self.digest = digest
        for one, row in zip(self.rows, self.request.rows):
            one.key = "" if row.adapter is None else digest

    def piece(self) -> Piece:
        """What is new of the answer."""
        return Piece(*self.answer.news())

    def restart(self) -> None:
        """Begin anew with the prompt; the answer stays, and what it holds is not given again."""
        self.tokens = []
        self.handle.usage.cached = 0
        for one in self.rows:
            one.filled = 0

    def completion(self) -> Completion:
        """The :class:`Completion` of a request that ended."""
        return self.answer.completion(len(self.request.ids), self.adapter)
