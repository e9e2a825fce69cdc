"""``SlotTable``: what each slot of a model holds. The handle and a bank on the same model account for slots here alone.

A slot is free, or it has a *name* (an adapter of the handle), or it holds a *content* (an adapter of a bank, known by
its digest), which is leased as long as somebody pins it. Contents that nobody pins may give way to others; names never
do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Optional

from colora_ms.errors import AdapterError, near


@dataclass
class Held:
    """What a bank put into a slot: the slot's number, the rank of the adapter, and how many leases pin it."""

    number: int
    rank: int
    pins: int = 0


class SlotTable:
    """The account of a model's slots; its methods may be called from any thread.

    Args:
        capacity: number of slots.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lock = threading.RLock()
        self._names: dict[str, int] = {}
        self._contents: OrderedDict[str, Held] = OrderedDict()  # the least recently used first

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of their slots."""
        with self._lock:
            return tuple(sorted(self._names, key=self._names.get))

    @property
    def free(self) -> list[int]:
        """Numbers of the slots that hold nothing."""
        with self._lock:
            taken = {*self._names.values(), *(one.number for one in self._contents.values())}
            return [number for number in range(self.capacity) if number not in taken]

    # -- names ---------------------------------------------------------------------------------------------------------

    def number(self, name: str) -> int:
        """The slot of a name; AdapterError lists the names there are."""
        with self._lock:
            if name not in self._names:
                have = f"there are: {', '.join(self.names)}" if self._names else "there is none"
                raise AdapterError(f"there is no adapter {name!r:.80}; {have}." + near(name, self._names))
            return self._names[name]

    def check_free(self) -> None:
        """Refuse where no slot is free; the sentence says what all of them hold."""
        with self._lock:
            if self.free:
                return
            held = [*self.names, *(f"slot {one.number} for a bank ({'leased' if one.pins else 'not leased'}, content "
                                   f"{digest:.12})" for digest, one in self._contents.items())]
        more = " (a bank's adapter goes with its unload)" if self._contents else ""
        raise AdapterError(f"no slot is free: the model has {self.capacity} and holds {', '.join(held)}; delete an "
                           f"adapter{more}, or inject with slots=... large enough")

    def take(self, name: str) -> int:
        """Give a name a free slot, or the one that it has; returns its number."""
        with self._lock:
            if name not in self._names:
                self.check_free()
                self._names[name] = self.free[0]
            return self._names[name]

    def drop(self, name: str) -> None:
        """Free the slot of a name."""
        with self._lock:
            del self._names[name]

    def clear(self) -> None:
        """Free all slots."""
        with self._lock:
            self._names.clear()
            self._contents.clear()

    # -- contents ------------------------------------------------------------------------------------------------------

    @property
    def contents(self) -> dict[str, Held]:
        """{digest: Held}, a copy, the least recently used first."""
        with self._lock:
            return dict(self._contents)

    def content(self, digest: Optional[str]) -> Optional[Held]:
        """What a digest holds, or None."""
        with self._lock:
            return self._contents.get(digest)

    def place(self, digest: str, rank: int) -> Optional[tuple[int, bool]]:
        """Give a content a slot, that of the least recently used one that nobody pins if none is free.

        Returns:
            (number, whether another content gave way); None where every slot has a name or is leased.
        """
        with self._lock:
            free = self.free
            gone = None
            if not free:
                gone = next((other for other, one in self._contents.items() if not one.pins), None)
                if gone is None:
                    return None
                free = [self._contents.pop(gone).number]
            self._contents[digest] = Held(free[0], rank)
            return free[0], gone is not None

    def mirror(self, number: int, digest: str, rank: int) -> None:
        """Let a slot hold a content, as another worker's table says; what it held is forgotten."""
        with self._lock:
            for other in [other for other, one in self._contents.items() if one.number == number or other == digest]:
                del self._contents[other]
            self._contents[digest] = Held(number, rank)

    def pin(self, digest: str) -> int:
        """Lease the slot of a content; returns its number."""
        with self._lock:
            self._contents.move_to_end(digest)
            self._contents[digest].pins += 1
            return self._contents[digest].number

    def unpin(self, digest: str) -> bool:
        """Give a lease back; returns whether nobody pins the content any more."""
        with self._lock:
            self._contents[digest].pins -= 1
            return not self._contents[digest].pins

    def forget(self, digest: str) -> None:
        """Free the slot of a content, unless it is leased."""
        with self._lock:
            if digest in self._contents and not self._contents[digest].pins:
                del self._contents[digest]

    def check_unleased(self, what: str) -> None:
        """Refuse to do ``what`` to the whole model while somebody leases a slot of it."""
        leased = [str(one.number) for one in self.contents.values() if one.pins]
        if leased:
            raise AdapterError(f"slot {', '.join(leased)} of this model is leased by a bank, whose requests would be "
                               f"changed: you cannot {what} now; release the leases first (stop the engine)")

    def check_placed(self, number: int) -> None:
        """Refuse to write a slot that :meth:`place` did not give away, or that is leased already."""
        for name in self.names:
            if self.number(name) == number:
                raise AdapterError(f"slot {number} holds the adapter {name!r}; load with replace=True writes it")
        own = [one for one in self.contents.values() if one.number == number]
        if not own:
            raise AdapterError(f"slot {number} was given to nobody; ask the handle's slot_table.place for one")
        if own[0].pins:
            raise AdapterError(f"slot {number} is leased; what it holds cannot be changed before the lease ends")
