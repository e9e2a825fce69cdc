"""Packing: several examples in a row of a batch, which do not see each other.

A row's segments stand one after another; ``kernels.causal_attention`` takes their lengths and treats each as if it
stood alone, with positions from 0. Nothing of one example reaches another, so their losses and gradients are those of
each example by itself, and a row has no padding but what no example fits into.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy as np

#: Examples that are packed together: more fill the rows better, fewer mix the order of the data better.
WINDOW = 2048

#: Share of a row's tokens that should be real; shorter rows are preferred only down to this.
WELL_FILLED = 0.98

#: Stands in a checkpoint in the place of ``packing: true``, so that a run that packed otherwise is not continued.
METHOD = f"best fit of {WINDOW}"


def fed_tokens(item: Sized) -> int:
    """Tokens of an example that are fed to the model: all but the last, which is only a label."""
    return len(item) - 1


def pack_examples(items: Sequence, length: int, order: Any, size: Callable[[Any], int] = len,
                  window: int = WINDOW) -> list[list[int]]:
    """Join examples to rows of at most ``length`` tokens: best fit of the longest first, window by window of the order.

    Args:
        items: a list; the longest must fit into a row.
        length: tokens of a row.
        order: positions in ``items``, in the order in which they are wanted.
        size: function of an item, the tokens that it takes.
        window: so many of them are packed together.

    Returns:
        List of lists of positions in ``items``: rows in the order of their longest examples, which, as in a shuffled
        order, says nothing about their lengths.
    """
    rows = []
    for begin in range(0, len(order), window):
        part = [int(position) for position in order[begin:begin + window]]
        rows += _pack(part, [size(items[position]) for position in part], length)
    return rows


def _pack(part: Sequence[int], sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of one window; sizes: those of the positions ``part``."""
    rows, room = [], []  # places in part of each row; (tokens left, row), in rising order
    for place in sorted(range(len(part)), key=lambda place: -sizes[place]):
        at = bisect_left(room, (sizes[place],))
        if at == len(room):
            row, left = len(rows), length
            rows.append([])
        else:
            left, row = room.pop(at)
        rows[row].append(place)
        insort(room, (left - sizes[place], row))
    # The first of a row is its longest.
    return [[part[place] for place in sorted(row)] for row in sorted(rows)]


def packed_shape(items: Sequence[Sized], rows: int, multiple: int = 16) -> tuple[int, int]:
    """Rows and tokens of a packed batch with room for ``rows`` rows of the longest example.

    Rows are as long as the longest example if that fills them well; otherwise there are fewer and longer ones, since
    examples of more than half a row cannot share one.

    Args:
        items: a list of ``EncodedExample``.
        rows: rows of the longest example that a batch has room for.
        multiple: the length is a multiple of this.

    Returns:
        (rows, tokens of a row), both int.
    """
    sizes = [fed_tokens(item) for item in items]
    room = rows * -(-max(sizes) // multiple) * multiple
    while True:
        length = room // rows // multiple * multiple
        filled = sorted(sum(sizes[k] for k in row) for row in pack_examples(sizes, length, range(len(sizes)), int))
        # The emptiest row holds what was left over, whatever the length.
        if rows == 1 or len(filled) == 1 or sum(filled[1:]) >= WELL_FILLED * length * (len(filled) - 1):
            return rows, length
        rows = rows // 2


def most_segments(items: Sequence[Sized], length: int) -> int:
    """The largest number of examples that fit into a row of ``length`` tokens, at least 1."""
    return max(1, int((np.cumsum(sorted(fed_tokens(item) for item in items)) <= length).sum()))
