"""A request inside the engine: what :class:`colora_ms.decoding.request.Running` has, and the slot that it holds."""

from __future__ import annotations

from typing import Any, Iterable, Optional

from colora_ms.decoding.completion import Completion
from colora_ms.decoding.request import Request, Running
from colora_ms.serving.bank import Lease
from colora_ms.serving.handle import Piece, RequestHandle


class Job(Running):
    """One request, from the queue to its end. The engine's thread owns it.

    Attributes:
        digest: its adapter's content, "" for none.
        handle: the caller's; deadline: when it is too late, in ``time.monotonic()``.
        cancelled: whether the caller gave it up; passed_over: how often later ones found a slot before it.
        lease: of its adapter's slot.
    """

    def __init__(self, request: Request, digest: str, tokenizer: Any, eos: Iterable[int]) -> None:
        super().__init__(request, tokenizer, eos, [-1] * len(request.rows))
        self.handle: RequestHandle = None  # type: ignore[assignment]  # it needs the job to be made
        self.deadline: Optional[float] = None
        self.cancelled = False
        self.passed_over = 0
        self.lease: Optional[Lease] = None
        self.use(digest)

    @property
    def adapter(self) -> Optional[str]:
        """The adapter's name."""
        return self.request.adapter

    def place(self, lease: Lease) -> None:
        """Take a slot: from now on its rows may run."""
        self.lease = lease
        self.slots = [-1 if row.adapter is None else lease.slot for row in self.request.rows]

    def use(self, digest: str) -> None:
        """Take a content for the adapter's name, before any row was begun."""
        self.digest = digest
        self.keys = ["" if row.adapter is None else digest for row in self.request.rows]

    def piece(self) -> Piece:
        """What is new of the answer."""
        return Piece(*self.answer.news())

    def completion(self) -> Completion:
        """The :class:`Completion` of a request that ended."""
        return self.answer.completion(len(self.request.ids), self.adapter)
