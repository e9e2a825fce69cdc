"""The rows of the key/value cache, and what each of them still holds.

A row that no request uses keeps its keys and values until it is needed: a later prompt that begins with the same tokens
takes the row over, or copies it, and computes only the rest. Rows are keyed by who computed them (the digest of the
adapter's content, or "" for the base model), so that nothing crosses from one content to another; the amateur rows of
all adapters are the base model's and share theirs.

Only prompt tokens are reused, and only such as were computed as a prompt: generated ones went through the graph one by
one, whose sums may round otherwise, and an answer must not depend on what happened to be in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import numpy as np


@dataclass
class CacheRow:
    """One row of the cache.

    Attributes:
        index: its number in the cache.
        key: whose keys and values it holds.
        tokens: (n,) int32, the prompt tokens whose keys and values are there, from position 0 on.
        used: whether a request holds it.
        stamp: when it was given back, for the order of eviction.
    """

    index: int
    key: str = ""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    used: bool = False
    stamp: int = 0


class PrefixCache:
    """Gives out rows of the cache.

    Args:
        rows: rows that there are; those beyond what runs at a time only hold prefixes.
        smallest: a shared prefix of fewer tokens is computed anew.
    """

    def __init__(self, rows: int, smallest: int = 8) -> None:
        self.rows: List[CacheRow] = [CacheRow(i) for i in range(rows)]
        self.smallest = smallest
        self._clock = 0

    @property
    def free(self) -> int:
        """Rows that no request holds."""
        return sum(not row.used for row in self.rows)

    def best(self, key: str, ids: np.ndarray) -> Tuple[Optional[CacheRow], int]:
        """The row with the longest common prefix.

        Args:
            key: who would compute it; ids: (n,) int32, the prompt tokens that are to be computed.

        Returns:
            (row, tokens in common); (None, 0) if there is none of ``smallest`` tokens. A free row wins over a used one.
        """
        found, length = None, self.smallest - 1
        for row in self.rows:
            if row.key != key:
                continue
            same = common(row.tokens, ids)
            if same > length or same == length and found is not None and found.used and not row.used:
                found, length = row, same
        return (found, length) if found is not None else (None, 0)

    def take(self, avoid: Optional[CacheRow] = None) -> CacheRow:
        """A free row for new content, the one that has not been used for longest; ``avoid`` only if there is no other.

        Its old content is forgotten.
        """
        free = [row for row in self.rows if not row.used]
        row = min(free, key=lambda one: (one is avoid, len(one.tokens) > 0, one.stamp))
        row.used, row.tokens = True, row.tokens[:0]
        return row

    def occupy(self, row: CacheRow, key: str, tokens: np.ndarray) -> None:
        """Mark a row as used with this content."""
        row.used, row.key, row.tokens = True, key, np.asarray(tokens, np.int32)

    def release(self, row: CacheRow, keep: bool = True) -> None:
        """Give a row back; ``keep=False`` forgets what it holds."""
        self._clock += 1
        row.used, row.stamp = False, self._clock
        if not keep:
            row.tokens = row.tokens[:0]

    def clear(self) -> None:
        """Forget the content of all rows; none may be in use."""
        self.rows = [CacheRow(row.index) for row in self.rows]


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two id arrays have in common at their beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
