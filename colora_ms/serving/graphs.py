"""The engine's graphs and their calls."""

from __future__ import annotations

from typing import Any, Iterable, Sequence, Tuple

import numpy as np

from mindspore import Tensor

from colora_ms import runtime
from colora_ms.decoding.batch import Batch
from colora_ms.serving.cells import CopyRow, Prefill, ServingLoop
from colora_ms.serving.job import Job


class Graphs:
    """The three graphs over one cache; only the thread that owns MindSpore calls them.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`; cache: :class:`colora_ms.models.cache.KeyValueCache`.
    """

    def __init__(self, decoder: Any, cache: Any) -> None:
        self.decoder = decoder
        self.cache = cache
        self._former = 0
        self._looked_at: Tuple[Any, Any] = (None, None)
        self._make()

    def _make(self) -> None:
        self._prefill = Prefill(self.decoder, self.cache).set_train(False)
        self._loop = ServingLoop(self.decoder, self.cache).set_train(False)
        self._copy = CopyRow(self.cache).set_train(False)

    def renew(self) -> None:
        """Make the graphs anew after one of them has failed."""
        self._former = self.compilations()
        self._make()

    def compilations(self) -> int:
        """How many graphs have been compiled."""
        return self._former + sum(runtime.compilations(cell) for cell in (self._prefill, self._loop, self._copy))

    def prefill(self, ids: np.ndarray, slots: np.ndarray, cache_rows: np.ndarray, start: np.ndarray,
                length: np.ndarray) -> None:
        """Put prompt tokens into the cache; ids (rows, tokens), the others (rows,), all int32 NumPy arrays."""
        done = runtime.run(self._prefill, *(Tensor(a) for a in (ids, slots, cache_rows, start, length)))
        done.asnumpy()  # waits for the graph, so that its errors appear here

    def steps(self, batch: Batch, capacity: int, steps: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Make steps for a batch.

        Args:
            capacity: the graph's steps; steps: how many to make now, at most.

        Returns:
            ints (capacity, places, 3) int32, floats (capacity, places, 4) float32, counts (places,) int32.
        """
        ints, floats, counts, _ = runtime.run(
            self._loop, *batch.state(), *batch.layout, *batch.options(), batch.uniforms(capacity), batch.eos,
            Tensor(np.array(steps, np.int32)), *self._prompts(batch), batch.fresh())
        return ints.asnumpy(), floats.asnumpy(), counts.asnumpy()

    def _prompts(self, batch: Batch) -> Tuple[Tensor, Tensor]:
        """The ids that steps look at, those of contrasts that leave copies alone; made when these requests change, not
        for every chunk."""
        wanted = [one.request.copies for one in batch.requests]
        key = batch.size, [(place, one.request) for place, one in enumerate(batch.requests) if wanted[place]]
        if self._looked_at[0] != key:
            self._looked_at = key, batch.prompts(self.cache.max_length, wanted)
        return self._looked_at[1]

    def copy(self, source: int, target: int) -> None:
        """Copy one row of the cache to another one."""
        runtime.run(self._copy, Tensor(np.array([source], np.int32)), Tensor(np.array([target], np.int32))).asnumpy()

    def warm_up(self, buckets: Iterable[int], shapes: Iterable[Tuple[int, int]], capacity: int) -> None:
        """Compile the graphs of these buckets of rows and shapes of prompts, with rows that do nothing."""
        for bucket in buckets:
            self.steps(batch_of([], bucket, ()), capacity, 1)
        for rows, tokens in shapes:
            nothing = np.zeros(rows, np.int32)
            self.prefill(np.zeros((rows, tokens), np.int32), nothing - 1, nothing, nothing, nothing)
        self.copy(self.cache.rows - 1, self.cache.rows - 1)


def batch_of(requests: Sequence[Job], bucket: int, eos: Iterable[int]) -> Batch:
    """The batch of running requests in a bucket of rows, grouped by adapter.

    Leading rows come first, in the order of their slots, so that rows of one adapter stand together; the amateur rows,
    all of the base model, stand right behind them.
    """
    ordered = sorted(requests, key=lambda job: (job.slots[0], job.handle.id))
    return Batch(ordered, bucket, bucket, len(ordered), eos)
