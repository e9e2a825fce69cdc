"""Batches of few static shapes, in an order that depends only on the seed.

Every batch has one of a few lengths (a graph is compiled per shape), rows are padded on the right,
and the labels are shifted so that ``labels[:, t]`` is what position ``t`` should predict:

    ids      (rows, tokens)   int32   padding 0
    labels   (rows, tokens)   int32   IGNORE on the prompt and the padding
    lengths  (rows,)          int32   real tokens of a row
    segments (rows, segments) int32   with packing: real tokens of each example in a row, 0 behind the last

The last batch of a bucket is filled up with rows of length 0: nothing is left out and no further
shape arises.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError, DataError
from colora_ms.training.encoding import IGNORE, EncodedExample, EncodedSet, fingerprint
from colora_ms.training.packing import METHOD, fed_tokens, most_segments, pack_examples


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's arrays (see the head of this module)."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    segments: np.ndarray | None = None

    @property
    def parts(self) -> np.ndarray:
        """What the graphs take as lengths: ``segments`` of a packed batch, ``lengths`` of another."""
        return self.lengths if self.segments is None else self.segments

    @property
    def answer_tokens(self) -> int:
        """Number of labels that count for the loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self) -> int:
        """Number of real (not padding) tokens."""
        return int(self.lengths.sum())


def choose_buckets(lengths: Sequence[int], max_buckets: int = 3, multiple: int = 16,
                   limit: int | None = None) -> list[int]:
    """Bucket lengths that waste the least padding.

    Args:
        lengths: tokens of each example.
        max_buckets: at most this many lengths.
        multiple: every length is a multiple of this (the largest may be cut to ``limit``).
        limit: no bucket is longer than this.

    Returns:
        Increasing list of int; the last one fits every example.

    Raises:
        ConfigError: no lengths, or an argument below 1.
    """
    if max_buckets < 1 or multiple < 1 or not len(lengths):
        raise ConfigError(f"buckets need lengths, max_buckets >= 1 and multiple >= 1; got "
                          f"{len(lengths)} lengths, {max_buckets}, {multiple}")
    rounded = -(-np.asarray(lengths, np.int64) // multiple) * multiple
    if limit is not None:
        if max(lengths) > limit:
            raise ConfigError(f"an example has {max(lengths)} tokens, more than the limit {limit}")
        rounded = np.minimum(rounded, limit)
    values, counts = np.unique(rounded, return_counts=True)
    total = np.concatenate([[0], np.cumsum(counts)])
    # cost[b][j]: tokens after padding when b buckets cover the first j distinct lengths.
    best: list = [(0 if j == 0 else np.inf) for j in range(len(values) + 1)]
    choice: list[list[int]] = []
    for _ in range(min(max_buckets, len(values))):
        now, back = [0], [0]
        for j in range(1, len(values) + 1):
            costs = [best[i] + values[j - 1] * (total[j] - total[i]) for i in range(j)]
            back.append(int(np.argmin(costs)))
            now.append(costs[back[-1]])
        choice.append(back)
        best = now
    # After b rounds best[-1] uses exactly b buckets, which never waste more than fewer do.
    buckets, j = [], len(values)
    for back in reversed(choice):
        if j == 0:
            break
        buckets.append(int(values[j - 1]))
        j = back[j]
    return sorted(buckets)


def collate(rows: Sequence[Sequence[EncodedExample]], size: int, bucket: int, segments: int | None = None) -> Batch:
    """The ``Batch`` of some rows, each a list of ``EncodedExample`` that stand one after the other in it.

    Args:
        rows: at most ``size`` of them; missing ones are filled up.
        size, bucket: rows of the batch, tokens of a row.
        segments: with packing, the largest number of examples in a row.
    """
    ids = np.zeros((size, bucket), np.int32)
    labels = np.full((size, bucket), IGNORE, np.int32)
    parts = np.zeros((size, segments or 1), np.int32)
    for number, row in enumerate(rows):
        begin = 0
        for place, item in enumerate(row):
            end = begin + fed_tokens(item)
            # The last token of one example never has to predict the first one of the next.
            ids[number, begin:end] = item.ids[:-1]
            labels[number, begin:end] = item.labels[1:]
            parts[number, place] = end - begin
            begin = end
    return Batch(ids, labels, parts.sum(1, dtype=np.int32), parts if segments else None)


class BatchLoader:
    """An endless, restorable sequence of batches.

    Args:
        data: an ``EncodedSet`` (or a list of ``EncodedExample``).
        batch_size: rows of a batch on this rank.
        seed: order of the examples; every epoch has its own.
        buckets: lengths of the batches; ``None`` chooses at most ``max_buckets`` of them.
        max_buckets, multiple: see ``choose_buckets``.
        packing: put several examples into a row of the longest bucket (see ``packing``); they do
            not see each other.
        rank, world: this process and the number of processes. All ranks together see exactly the
            batches of one process with ``batch_size * world`` rows, each row once.
        shuffle: ``False`` keeps the order of the data (evaluation).

    Raises:
        ConfigError, DataError: bad arguments, no data, an example longer than every bucket.
    """

    def __init__(self, data: EncodedSet | Sequence[EncodedExample], batch_size: int, seed: int = 0,
                 buckets: Sequence[int] | None = None, max_buckets: int = 3, multiple: int = 16, packing: bool = False,
                 rank: int = 0, world: int = 1, shuffle: bool = True) -> None:
        items: Any = getattr(data, "items", data)
        if not len(items):
            raise DataError("the data set is empty: there is nothing to train on")
        for name, value, least in (("batch_size", batch_size, 1), ("world", world, 1),
                                   ("rank", rank, 0), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ConfigError(f"{name} is {value!r}, expected an integer of at least {least}")
        if rank >= world:
            raise ConfigError(f"rank is {rank}, expected less than world={world}")
        self._items = items
        self._batch_size, self._seed, self._shuffle = int(batch_size), int(seed), shuffle
        self._rank, self._world, self._packing = rank, world, packing
        self._fingerprint = fingerprint(items)
        # A row feeds all tokens but the last, which is only a label.
        lengths = [fed_tokens(item) for item in items]
        if buckets is None:
            buckets = choose_buckets(lengths, 1 if packing else max_buckets, multiple)
        self.buckets = sorted({int(bucket) for bucket in buckets})
        if self.buckets[0] < 1 or max(lengths) > self.buckets[-1]:
            raise ConfigError(f"an example has {max(lengths)} tokens (without its last), the "
                              f"buckets are {self.buckets}: the largest must fit every example")
        # One width for all batches: it is part of a graph's shape.
        self._segments = most_segments(items, self.buckets[-1]) if packing else None
        self._epoch, self._position = 0, 0
        self._plan = self._make_plan(0)

    # -- order ---------------------------------------------------------------------------------

    def _make_plan(self, epoch: int) -> list[tuple[int, list[list[int]]]]:
        """The batches of an epoch for all ranks: list of (bucket, rows), a row = positions."""
        count = len(self._items)
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(count) if self._shuffle else np.arange(count)
        if self._packing:
            rows = pack_examples(self._items, self.buckets[-1], order, fed_tokens)
        else:
            rows = [[int(position)] for position in order]
        size = self._batch_size * self._world
        waiting = {bucket: [] for bucket in self.buckets}
        plan = []
        for row in rows:
            bucket = self._bucket_of(sum(fed_tokens(self._items[k]) for k in row))
            waiting[bucket].append(row)
            if len(waiting[bucket]) == size:
                plan.append((bucket, waiting[bucket]))
                waiting[bucket] = []
        # What is left over moves up to the next longer bucket, so that few batches are partial.
        rest = []
        for bucket in self.buckets:
            rest += waiting[bucket]
            while len(rest) >= size or (rest and bucket == self.buckets[-1]):
                plan.append((bucket, rest[:size]))
                rest = rest[size:]
        return plan

    def _bucket_of(self, length: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= length)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in the current epoch (with packing it may differ between epochs)."""
        return len(self._plan)

    def summary(self) -> str:
        """One line for the log: how many batches of which shapes, and how much of them is real."""
        tokens = sum(fed_tokens(item) for item in self._items)
        counts = {bucket: sum(one == bucket for one, _ in self._plan) for bucket in self.buckets}
        area = self._batch_size * self._world * sum(bucket * count for bucket, count in counts.items())
        shapes = ", ".join(f"{count} of {self._batch_size} x {bucket}" for bucket, count in counts.items() if count)
        return f"{len(self._plan)} an epoch ({shapes} tokens), {100 * tokens / area:.0f} % of them real tokens"

    @property
    def epoch(self) -> int:
        """Number of whole epochs that have been handed out."""
        return self._epoch

    @property
    def rows(self) -> int:
        """Rows of a batch on this rank."""
        return self._batch_size

    # -- updates -------------------------------------------------------------------------------

    def updates(self, epochs: float, accumulation: int = 1) -> tuple[int, tuple[int, int]]:
        """How many updates so many passes over the data make.

        A window of ``accumulation`` batches ends with its epoch, so the last update of an epoch
        may be of fewer batches.

        Args:
            epochs: passes, a number above 0; a part of one is rounded up to whole batches.
            accumulation: batches of an update.

        Returns:
            ``(updates, end)``; ``end`` is for ``window``: (epoch, batches of it) where the last
            pass ends.
        """
        def count(epoch: int) -> int:
            # Packing may make another number of rows of every order of the examples.
            return len(self._make_plan(epoch) if self._packing else self._plan)

        whole = math.floor(epochs)
        if self._packing:
            updates = sum(-(-count(epoch) // accumulation) for epoch in range(whole))
        else:
            updates = whole * -(-count(0) // accumulation)
        # 0.1 + 0.2 of ten batches are 3, not 4.
        part = math.ceil((epochs - whole) * count(whole) - 1e-6) if epochs > whole else 0
        end = (whole, part) if part else (whole - 1, count(whole - 1))
        return updates + -(-part // accumulation), end

    def window(self, count: int, end: tuple[int, int] | None = None) -> list[Batch]:
        """The next batches, those of one update: at most ``count``, fewer at the end of an epoch.

        Args:
            count: batches of a whole window.
            end: where the run ends, from ``updates``; ``None`` for a run that ends with a window.

        Returns:
            List of ``Batch``, at least one.
        """
        batches = [self.next()]
        limit = len(self._plan)
        if end is not None and end[0] == self._epoch:
            limit = min(limit, end[1])
        while len(batches) < count and self._position < limit:
            batches.append(self.next())
        return batches

    # -- batches -------------------------------------------------------------------------------

    def next(self) -> Batch:
        """The next batch; after the last one of an epoch a new epoch begins."""
        if self._position >= len(self._plan):
            self._epoch += 1
            self._position = 0
            self._plan = self._make_plan(self._epoch)
        bucket, rows = self._plan[self._position]
        self._position += 1
        return self._collate(bucket, rows[self._rank::self._world])

    def epoch_batches(self) -> Iterator[Batch]:
        """Iterate over all batches of the current epoch from its start; the state stays."""
        for bucket, rows in self._plan:
            yield self._collate(bucket, rows[self._rank::self._world])

    def _collate(self, bucket: int, rows: list[list[int]]) -> Batch:
        examples = [[self._items[k] for k in row] for row in rows]
        return collate(examples, self._batch_size, bucket, self._segments)

    # -- state ---------------------------------------------------------------------------------

    def state(self) -> dict:
        """A dictionary (JSON values) from which ``restore`` continues with the very next batch."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed,
                "settings": self._settings(), "data": self._fingerprint}

    def _settings(self) -> dict:
        return {"rows": self._batch_size * self._world, "buckets": self.buckets,
                "packing": METHOD if self._packing else False, "shuffle": bool(self._shuffle),
                "examples": len(self._items)}

    def restore(self, state: dict) -> None:
        """Continue where ``state`` was taken.

        Raises:
            CheckpointError: the state is of other data, another seed, batch size or buckets;
                the message lists every difference.
        """
        mine = self.state()
        wrong = []
        for key in ("seed", "data"):
            if state.get(key) != mine[key]:
                wrong.append(f"{key} is {mine[key]}, was {state.get(key)}")
        theirs = state.get("settings") or {}
        for key, value in mine["settings"].items():
            if theirs.get(key) != value:
                wrong.append(f"{key} is {value}, was {theirs.get(key)}")
        if wrong:
            raise CheckpointError("the checkpoint was made with other training data or settings, "
                                  "so the run cannot continue exactly: " + "; ".join(wrong))
        epoch: Any = state.get("epoch")
        position: Any = state.get("position")
        for name, value in (("epoch", epoch), ("position", position)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise CheckpointError(f"the checkpoint's data {name} is {value!r}, expected an "
                                      "integer of at least 0")
        plan = self._make_plan(epoch)
        if position > len(plan):
            raise CheckpointError(f"the checkpoint's data position is {position}, but epoch "
                                  f"{epoch} has {len(plan)} batches")
        self._epoch, self._position, self._plan = epoch, position, plan
