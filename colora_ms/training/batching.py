"""Batches of few static shapes, in an order that depends only on the seed.

Every batch has one of a few lengths (a graph is compiled per shape), rows are padded on the right,
and the labels are shifted so that ``labels[:, t]`` is what position ``t`` should predict:

    ids     (rows, tokens) int32     padding 0
    labels  (rows, tokens) int32     IGNORE on the prompt and the padding
    lengths (rows,)        int32     real tokens of a row

The last batch of a bucket is filled up with rows of length 1 that carry no label: nothing is left
out and no further shape arises.
"""

import dataclasses

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError, DataError
from colora_ms.training.encoding import IGNORE, fingerprint


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's arrays (see the head of this module)."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    @property
    def answer_tokens(self):
        """Number of labels that count for the loss."""
        return int((self.labels != IGNORE).sum())

    @property
    def tokens(self):
        """Number of real (not padding) tokens."""
        return int(self.lengths.sum())


def choose_buckets(lengths, max_buckets=3, multiple=16, limit=None):
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
    best = [(0 if j == 0 else np.inf) for j in range(len(values) + 1)]
    choice = []
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


def pack_examples(items, length, order):
    """Join examples to rows of at most ``length`` tokens (first fit over the open rows).

    The tokens of one example see those of the examples before it in the row, as is usual in
    packing; use buckets where that matters.

    Returns:
        List of lists of positions in ``items``.
    """
    rows, room = [], []
    open_rows = []  # only the newest rows are searched: linear time, and near-full rows are closed
    for position in order:
        need = len(items[position])
        for row in open_rows:
            if room[row] >= need:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(length)
            open_rows = open_rows[-15:] + [row]
        rows[row].append(position)
        room[row] -= need
    return rows


def collate(rows, size, bucket):
    """The ``Batch`` of some rows, each a list of ``EncodedExample`` that stand one after the other in it.

    Args:
        size: rows of the batch; missing ones are filled up, see the head of this module.
        bucket: tokens of a row, at least those of the longest less one.
    """
    ids = np.zeros((size, bucket), np.int32)
    labels = np.full((size, bucket), IGNORE, np.int32)
    lengths = np.ones(size, np.int32)
    for number, row in enumerate(rows):
        tokens = np.concatenate([item.ids for item in row])
        wanted = np.concatenate([item.labels for item in row])
        length = len(tokens) - 1
        ids[number, :length] = tokens[:-1]
        labels[number, :length] = wanted[1:]
        lengths[number] = length
    return Batch(ids, labels, lengths)


class BatchLoader:
    """An endless, restorable sequence of batches.

    Args:
        data: an ``EncodedSet`` (or a list of ``EncodedExample``).
        batch_size: rows of a batch on this rank.
        seed: order of the examples; every epoch has its own.
        buckets: lengths of the batches; ``None`` chooses at most ``max_buckets`` of them.
        max_buckets, multiple: see ``choose_buckets``.
        packing: join short examples into rows of the longest bucket (see ``pack_examples``).
        rank, world: this process and the number of processes. All ranks together see exactly the
            batches of one process with ``batch_size * world`` rows, each row once.
        shuffle: ``False`` keeps the order of the data (evaluation).

    Raises:
        ConfigError, DataError: bad arguments, no data, an example longer than every bucket.
    """

    def __init__(self, data, batch_size, seed=0, buckets=None, max_buckets=3, multiple=16,
                 packing=False, rank=0, world=1, shuffle=True):
        items = getattr(data, "items", data)
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
        lengths = [len(item) - 1 for item in items]
        if buckets is None:
            buckets = choose_buckets(lengths, 1 if packing else max_buckets, multiple)
        self.buckets = sorted({int(bucket) for bucket in buckets})
        if self.buckets[0] < 1 or max(lengths) > self.buckets[-1]:
            raise ConfigError(f"an example has {max(lengths)} tokens (without its last), the "
                              f"buckets are {self.buckets}: the largest must fit every example")
        self._epoch, self._position = 0, 0
        self._plan = self._make_plan(0)

    # -- order ---------------------------------------------------------------------------------

    def _make_plan(self, epoch):
        """The batches of an epoch for all ranks: list of (bucket, rows), a row = positions."""
        count = len(self._items)
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(count) if self._shuffle else np.arange(count)
        if self._packing:
            rows = pack_examples(self._items, self.buckets[-1], order)
        else:
            rows = [[int(position)] for position in order]
        size = self._batch_size * self._world
        waiting = {bucket: [] for bucket in self.buckets}
        plan = []
        for row in rows:
            bucket = self._bucket_of(sum(len(self._items[k]) for k in row) - 1)
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

    def _bucket_of(self, length):
        return next(bucket for bucket in self.buckets if bucket >= length)

    @property
    def batches_per_epoch(self):
        """Number of batches in the current epoch (with packing it may differ between epochs)."""
        return len(self._plan)

    @property
    def epoch(self):
        """Number of whole epochs that have been handed out."""
        return self._epoch

    # -- batches -------------------------------------------------------------------------------

    def next(self):
        """The next batch; after the last one of an epoch a new epoch begins."""
        if self._position >= len(self._plan):
            self._epoch += 1
            self._position = 0
            self._plan = self._make_plan(self._epoch)
        bucket, rows = self._plan[self._position]
        self._position += 1
        return self._collate(bucket, rows[self._rank::self._world])

    def epoch_batches(self):
        """Iterate over all batches of the current epoch from its start; the state stays."""
        for bucket, rows in self._plan:
            yield self._collate(bucket, rows[self._rank::self._world])

    def _collate(self, bucket, rows):
        return collate([[self._items[k] for k in row] for row in rows], self._batch_size, bucket)

    # -- state ---------------------------------------------------------------------------------

    def state(self):
        """A dictionary (JSON values) from which ``restore`` continues with the very next batch."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed,
                "settings": self._settings(), "data": self._fingerprint}

    def _settings(self):
        return {"rows": self._batch_size * self._world, "buckets": self.buckets,
                "packing": bool(self._packing), "shuffle": bool(self._shuffle),
                "examples": len(self._items)}

    def restore(self, state):
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
        epoch, position = state.get("epoch"), state.get("position")
        for name, value in (("epoch", epoch), ("position", position)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise CheckpointError(f"the checkpoint's data {name} is {value!r}, expected an "
                                      "integer of at least 0")
        plan = self._make_plan(epoch)
        if position > len(plan):
            raise CheckpointError(f"the checkpoint's data position is {position}, but epoch "
                                  f"{epoch} has {len(plan)} batches")
        self._epoch, self._position, self._plan = epoch, position, plan
