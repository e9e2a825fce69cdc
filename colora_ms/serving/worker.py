"""The engine's graphs and their calls."""

import numpy as np

from mindspore import Tensor

from colora_ms import runtime
from colora_ms.serving.batch import Batch
from colora_ms.serving.graphs import CopyRow, Prefill, ServingLoop


class Graphs:
    """The three graphs over one cache; only the thread that owns MindSpore calls them.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`; cache: :class:`colora_ms.models.cache.KeyValueCache`.
    """

    def __init__(self, decoder, cache):
        self.decoder = decoder
        self.cache = cache
        self._former = 0
        self._make()

    def _make(self):
        self._prefill = Prefill(self.decoder, self.cache).set_train(False)
        self._loop = ServingLoop(self.decoder, self.cache).set_train(False)
        self._copy = CopyRow(self.cache).set_train(False)

    def renew(self):
        """Make the graphs anew after one of them has failed."""
        self._former = self.compilations()
        self._make()

    def compilations(self):
        """How many graphs have been compiled."""
        return self._former + sum(runtime.compilations(cell) for cell in (self._prefill, self._loop, self._copy))

    def prefill(self, ids, slots, cache_rows, start, length):
        """Put prompt tokens into the cache; ids (rows, tokens), the others (rows,), all int32 NumPy arrays."""
        done = runtime.run(self._prefill, *(Tensor(a) for a in (ids, slots, cache_rows, start, length)))
        done.asnumpy()  # waits for the graph, so that its errors appear here

    def steps(self, batch, capacity, steps):
        """Make steps for a :class:`colora_ms.serving.batch.Batch`.

        Returns:
            NumPy arrays: ints (capacity, bucket, 3), floats (capacity, bucket, 4), counts (bucket,).
        """
        ints, floats, counts, _ = runtime.run(self._loop, *batch.arguments(capacity, steps, self.cache.max_length))
        return ints.asnumpy(), floats.asnumpy(), counts.asnumpy()

    def copy(self, source, target):
        """Copy one row of the cache to another one."""
        runtime.run(self._copy, Tensor(np.array([source], np.int32)), Tensor(np.array([target], np.int32))).asnumpy()

    def warm_up(self, buckets, shapes, capacity):
        """Compile the graphs of these buckets of rows and shapes of prompts, with rows that do nothing."""
        for bucket in buckets:
            self.steps(Batch([], bucket, ()), capacity, 1)
        for rows, tokens in shapes:
            nothing = np.zeros(rows, np.int32)
            self.prefill(np.zeros((rows, tokens), np.int32), nothing - 1, nothing, nothing, nothing)
        self.copy(self.cache.rows - 1, self.cache.rows - 1)
