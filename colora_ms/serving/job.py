"""A request inside the engine: what :class:`colora_ms.decoding.request.Running` has, and the slots that it holds."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Mapping, Optional

from colora_ms.decoding.completion import Completion
from colora_ms.decoding.request import Request, Running, row_key
from colora_ms.serving.bank import Lease
from colora_ms.serving.handle import Piece, RequestHandle


class Job(Running):
    """One request, from the queue to its end. The engine's thread owns it.

    Attributes:
        contents: the digest of each adapter's content, by the adapter's name.
        handle: the caller's; deadline: when it is too late, in ``time.monotonic()``.
        cancelled: whether the caller gave it up; passed_over: how often later ones found a slot before it.
        leases: of its adapters' slots, by their names; empty while it waits for them.
    """

    def __init__(self, request: Request, contents: Mapping[str, str], tokenizer: Any, eos: Iterable[int]) -> None:
        super().__init__(request, tokenizer, eos, [-1] * len(request.rows), salt=request.options.cache_salt or "")
        self.handle: RequestHandle = None  # type: ignore[assignment]  # it needs the job to be made
        self.deadline: Optional[float] = None
        self.cancelled = False
        self.passed_over = 0
        self.leases: Dict[str, Lease] = {}
        self.contents: Dict[str, str] = {}
        self.use(contents)

    @property
    def adapter(self) -> Optional[str]:
        """The adapter's name."""
        return self.request.adapter

    def place(self, leases: Dict[str, Lease]) -> None:
        """Take slots for all its adapters: from now on its rows may run."""
        self.leases = leases
        self.slots = [-1 if row.adapter is None else leases[row.adapter].slot for row in self.request.rows]

    def use(self, contents: Mapping[str, str]) -> None:
        """Take contents for adapters' names, before any row was begun."""
        self.contents.update(contents)
        self.keys = [row_key("" if row.adapter is None else self.contents[row.adapter], row)
                     for row in self.request.rows]

    def piece(self) -> Piece:
        """What is new of the answer."""
        return Piece(*self.answer.news())

    def completion(self) -> Completion:
        """The :class:`Completion` of a request that ended."""
        return self.answer.completion(len(self.request.ids), self.adapter)
