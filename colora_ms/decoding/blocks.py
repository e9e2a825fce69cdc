"""Blocks of the paged cache: who holds them, what stands in them, and which of them can be found again.

A block has ``size`` positions of one sequence. Rows hold blocks by reference, each through its *table*: entry i is the
block of positions ``size * i`` and following. A block that nobody holds keeps its content until it is needed: a later
row that begins with the same tokens, computed by the same owner, finds it and computes only the rest.

Content is found by a *chain* of keys: the key behind a whole block is the SHA-256 of the key before it and the block's
tokens, the first key that of the owner (the digest of an adapter's content, or "" for the base model, so that the
base's rows are shared across adapters), of the tenant's salt, and of how the cache is computed and stored. A block that
is found whole is shared; one that is found in part (filled in part, or going on otherwise) is copied.

Nobody writes into a block that another one holds, nor over content that can be found: rows append, and what is shared
they copy first (:meth:`BlockPool.own`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from colora_ms.models.paged_cache import BLOCK


class OutOfBlocks(Exception):
    """More blocks were asked for than there are."""


class _Content(NamedTuple):
    """What can be found in a block: its tokens, the key before them, and behind them if it is whole."""

    before: bytes
    tokens: Tuple[int, ...]
    key: Optional[bytes]


@dataclass
class Found:
    """What the pool has of a sequence.

    Attributes:
        blocks: whole blocks, from position 0 on; keys: the chain's key behind each of them.
        source: a block whose first ``more`` positions go on from there; None: there is none.
        more: positions to be had by copying ``source``.
    """

    blocks: List[int] = field(default_factory=list)
    keys: List[bytes] = field(default_factory=list)
    source: Optional[int] = None
    more: int = 0


class BlockPool:
    """The blocks of one cache.

    Args:
        blocks: how many there are.
        size: positions of a block.
        kind: how keys and values are computed and stored; content of another kind is never found.
    """

    def __init__(self, blocks: int, size: int = BLOCK, kind: str = "") -> None:
        self.blocks = blocks
        self.size = size
        self.kind = kind
        self.evictions = 0  # blocks whose content was given up for another one's
        self._holders = [0] * blocks
        self._content: Dict[int, _Content] = {}
        self._whole: Dict[bytes, int] = {}  # the chain's key behind a whole block -> the block
        self._behind: Dict[bytes, List[Tuple[Tuple[int, ...], int]]] = {}  # key -> (tokens, block) that follow, sorted
        self._empty = list(range(blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # content, and no holder; the one to go first stands first

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that somebody holds."""
        return self.blocks - self.available

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def count(self, positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-positions // self.size)

    # -- holding -------------------------------------------------------------------------------------------------------

    def take(self, count: int = 1) -> List[int]:
        """Blocks for new content, each with one holder; content that was used longest ago goes first.

        Raises:
            OutOfBlocks: there are not as many; nothing was taken.
        """
        if count > self.available:
            raise OutOfBlocks(f"{count} blocks of the cache are wanted, {self.available} of {self.blocks} are free")
        found = []
        for _ in range(count):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._unpublish(block)
                self.evictions += 1
            self._holders[block] = 1
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """One more holder for each of these, which have holders or content."""
        for block in blocks:
            self._idle.pop(block, None)
            self._holders[block] += 1

    def release(self, table: Sequence[int]) -> None:
        """Give back blocks of one row, in the order of its table: the last ones will go first."""
        for block in reversed(table):
            if self._holders[block] < 1:
                raise RuntimeError(f"block {block} of the cache is given back, but nobody holds it")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._content:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def own(self, table: List[int], index: int) -> Optional[Tuple[int, int]]:
        """Make a row the only holder of a block of its table, before it writes there.

        Returns:
            (source, target) to be copied; None where the row was the only one. The source has a holder less; it must
            not be taken for anything before the copy was made.

        Raises:
            OutOfBlocks: there is no block for the copy.
        """
        block = table[index]
        if self._holders[block] == 1:
            return None
        table[index], = self.take()
        self._holders[block] -= 1  # others hold it
        return block, table[index]

    # -- content -------------------------------------------------------------------------------------------------------

    def root(self, owner: str, salt: str = "") -> bytes:
        """The key before all tokens.

        Args:
            owner: who computes them: the digest of an adapter's content, "" for the base model.
            salt: of the tenant; other salts share nothing.
        """
        parts = [one.encode() for one in (self.kind, owner, salt)]
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()

    @staticmethod
    def chain(before: bytes, tokens: np.ndarray) -> bytes:
        """The key behind a whole block; tokens: (size,) int32."""
        return hashlib.sha256(before + np.ascontiguousarray(tokens, np.int32).tobytes()).digest()

    def find(self, root: bytes, ids: np.ndarray, partial: bool = True) -> Found:
        """The most that the pool has of a sequence; nothing is held by this.

        Args:
            root: see :meth:`root`; ids: (n,) int32 from position 0 on; partial: whether a copy will do for the end.
        """
        found, key = Found(), root
        for at in range(0, len(ids) - self.size + 1, self.size):
            behind = self.chain(key, ids[at:at + self.size])
            block = self._whole.get(behind)
            if block is None:
                break
            found.blocks.append(block)
            found.keys.append(behind)
            key = behind
        if partial:
            at = self.size * len(found.blocks)
            found.source, found.more = self._longest(key, tuple(ids[at:at + self.size].tolist()))
        return found

    def _longest(self, key: bytes, tokens: Tuple[int, ...]) -> Tuple[Optional[int], int]:
        """(block behind a key that shares the most first tokens, how many); (None, 0) if none does."""
        there = self._behind.get(key, [])
        place = bisect_left(there, (tokens, -1))
        best: Tuple[Optional[int], int] = (None, 0)
        for others, block in there[max(place - 1, 0):place + 1]:  # in this order, the nearest ones share the most
            same = common(others, tokens)
            if same > best[1]:
                best = block, same
        return best

    def publish(self, table: List[int], index: int, before: bytes, tokens: np.ndarray) -> Optional[bytes]:
        """Let the content of a row's block be found. What was published of it before may only grow.

        Where another whole block holds the same, the row's table gets that one, and its own is given back.

        Args:
            before: the key before the block; tokens: (1 … size,) int32, those whose keys and values stand in it.

        Returns:
            the key behind it, if it is whole.
        """
        block, ids = table[index], tuple(np.asarray(tokens).tolist())
        self._unpublish(block)
        if len(ids) < self.size:
            if self._longest(before, ids)[1] < len(ids):  # else there is enough of it
                self._enter(block, _Content(before, ids, None))
            return None
        key = self.chain(before, tokens)
        other = self._whole.get(key)
        if other is None:
            self._enter(block, _Content(before, ids, key))
        else:
            self.hold([other])
            self.release([block])
            table[index] = other
        return key

    def _enter(self, block: int, content: _Content) -> None:
        self._content[block] = content
        insort(self._behind.setdefault(content.before, []), (content.tokens, block))
        if content.key is not None:
            self._whole[content.key] = block

    def _unpublish(self, block: int) -> None:
        content = self._content.pop(block, None)
        if content is None:
            return
        there = self._behind[content.before]
        del there[bisect_left(there, (content.tokens, block))]
        if not there:
            del self._behind[content.before]
        if content.key is not None:
            del self._whole[content.key]

    def forget(self) -> None:
        """Let nothing be found any more; who holds blocks goes on to hold them."""
        self._content.clear()
        self._whole.clear()
        self._behind.clear()
        self._empty += self._idle
        self._idle.clear()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two short sequences share from their beginning."""
    count = 0
    for one, other in zip(a, b):
        if one != other:
            break
        count += 1
    return count
