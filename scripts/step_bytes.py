"""The launches of a decode step of any size, from shapes alone: what each reads of weights, banks and caches, and what
else it moves.

A list in the order of the graph, held to the compiled graph of a small model by ``rehearse_ascend.py`` (operator by
operator, byte by byte); evaluated for a 7B model, of which nothing is allocated.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Sequence

HALF, FULL = 2, 4  # bytes of a half type; of float32 and int32


class Size(NamedTuple):
    """A model, and a decode step of it.

    Attributes:
        hidden, inner, layers, heads, kv_heads, dim, vocab: of the model; dim as the device has it.
        positions: rows of the rotary tables.
        rows: tokens, a row each; asked: rows of logits; width: blocks of a row's table; length: positions of each row.
        blocks, block: of the cache.
        slots, rank, used: adapters in the bank, their rank, those in use; slots 0: no adapters.
        requests, voices: of the choice of tokens; 0: it is not in this graph.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    positions: int
    rows: int
    asked: int
    width: int
    length: int
    blocks: int
    block: int
    slots: int = 0
    rank: int = 0
    used: int = 0
    requests: int = 0
    voices: int = 0


#: A decode step of Llama-2-7B's shape: 8 rows of 1,024 positions, 4 adapters of rank 16 in a bank of 8.
SEVEN_B = Size(4096, 11008, 32, 32, 32, 128, 32000, 4096, 8, 8, 32, 1024, 1024, 128, 8, 16, 4, 8, 8)


class Launch(NamedTuple):
    """One kernel: its operator, the whole size of the weights, banks and caches that it is given, what it reads (or
    ReshapeAndCache writes) of them, and what it reads and writes beside them; in bytes."""

    name: str
    held: float
    read: float
    moved: float


def launches(size: Size) -> List[Launch]:
    """The launches of a step."""
    rows, hidden = size.rows, size.hidden
    wide, narrow = size.heads * size.dim, size.kv_heads * size.dim
    x, index = rows * hidden * HALF, rows * FULL
    cache = 2 * size.blocks * size.block * narrow * HALF
    found = [_gather("Gather", size.vocab * hidden * HALF, x, index)]
    turn = rows * size.dim * HALF
    tables = [_gather("Gather", size.positions * size.dim * HALF, turn, index)] * 2
    for i in range(size.layers):
        norm = hidden * HALF
        found.append(Launch("AddRmsNorm", norm, norm, 4 * x) if i else Launch("RmsNorm", norm, norm, 2 * x))
        found += _linear(size, hidden, wide + 2 * narrow, 3)
        found.append(Launch("SplitWithSize", 0, 0, 2 * rows * (wide + 2 * narrow) * HALF))
        if not i:
            found += tables
        found += [Launch("ApplyRotaryPosEmb", 0, 0, 2 * rows * (wide + narrow) * HALF + 2 * turn + index),
                  Launch("ReshapeAndCache", cache, rows * narrow * HALF, 3 * rows * narrow * HALF + index),
                  Launch("PagedAttention", cache, 2 * rows * size.length * narrow * HALF,
                         2 * rows * wide * HALF + rows * size.width * FULL + 2 * index)]
        found += _linear(size, wide, hidden, 1)
        found.append(Launch("AddRmsNorm", norm, norm, 4 * x))
        found += _linear(size, hidden, 2 * size.inner, 2)
        found.append(Launch("Swiglu", 0, 0, 3 * rows * size.inner * HALF))
        found += _linear(size, size.inner, hidden, 1)
    found.append(Launch("AddRmsNorm", hidden * HALF, hidden * HALF, 3 * x))  # nobody reads its sum
    last = size._replace(rows=size.asked, slots=0)  # the head has no adapters here
    found += [Launch("Gather", 0, 0, 2 * size.asked * hidden * HALF + size.asked * FULL),
              *_linear(last, hidden, size.vocab, 1),
              Launch("Cast", 0, 0, size.asked * size.vocab * (HALF + FULL))]
    if size.requests:
        found.append(Launch("ContrastiveSelect", 0, 0, size.asked * size.vocab * FULL
                            + size.requests * (2 * size.voices + 1) * FULL + size.requests * (5 + size.voices) * FULL))
    return found


def _gather(name: str, table: float, rows: float, index: float) -> Launch:
    return Launch(name, table, rows, rows + index)


def _linear(size: Size, width: int, out: int, slices: int) -> List[Launch]:
    weight = width * out * HALF
    x, y = size.rows * width * HALF, size.rows * out * HALF
    found = [Launch("MatMul", weight, weight, x + y)]
    if size.slots:
        slot = slices * size.rank * width * HALF + size.rank * out * HALF + slices * FULL
        ends = slices * FULL
        found.append(Launch("MultiLora", size.slots * slot + ends, min(size.used, size.rows) * slot + ends,
                            x + 2 * y + size.rows * FULL))
    return found


def over_minimum(size: Size) -> float:
    """Bytes moved in a step / (weights + adapters in use + keys and values read); what multi_lora moves is counted by
    the emulator."""
    from pair_bytes import moved

    found = launches(size)
    least = sum(one.read for one in found if one.name not in ("Gather", "ReshapeAndCache"))
    wide, narrow = size.heads * size.dim, size.kv_heads * size.dim
    used = min(size.used, size.rows)
    pairs = size.layers * sum(moved(size.rows, used, size.rank, *shape) for shape in (
        (size.hidden, wide + 2 * narrow, 3), (wide, size.hidden, 1), (size.hidden, 2 * size.inner, 2),
        (size.inner, size.hidden, 1))) if size.slots else 0
    return (pairs + sum(one.read + one.moved for one in found if one.name != "MultiLora")) / least


def difference(size: Size, graph: Sequence[Any]) -> str:
    """Where the list is not the compiled graph, "" where it is.

    Args:
        graph: :class:`colora_ms.kernels.launches.Launch` of a Cell that was compiled for this size.
    """
    mine = sorted((one.name, one.held, one.moved) for one in launches(size))
    theirs = sorted((one.name, sum(n for name, n in one.reads if name), sum(n for name, n in one.reads if not name)
                     + one.writes) for one in graph)
    for one, other in zip(mine, theirs):
        if one != other:
            return f"{one} in the list, {other} in the graph"
    return "" if len(mine) == len(theirs) else f"{len(mine)} launches in the list, {len(theirs)} in the graph"
