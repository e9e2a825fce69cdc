"""The tensors of one chunk of steps."""

import numpy as np

from mindspore import Tensor

from colora_ms.decoding.contrast import operands


class Batch:
    """Running requests in the rows of one bucket, grouped by adapter.

    Expert rows come first, in the order of their slots, so that rows of one adapter stand together; the amateur rows,
    all of the base model, stand behind them.

    Args:
        requests: :class:`colora_ms.serving.request.Request` that run.
        bucket: rows of the graph; a request takes one or two of them.
        eos: ids that end an answer.
    """

    def __init__(self, requests, bucket, eos):
        self.requests = sorted(requests, key=lambda r: (r.slot, r.handle.id))
        self.bucket = bucket
        count = len(self.requests)
        # Rows that only fill the bucket belong to its last request, which is inactive then.
        row_request = np.full(bucket, bucket - 1, np.int32)
        slots = np.full(bucket, -1, np.int32)
        cache_rows = np.zeros(bucket, np.int32)
        expert = np.zeros(bucket, np.int32)
        amateur = np.full(bucket, -1, np.int32)
        next_amateur = count
        for i, request in enumerate(self.requests):
            expert[i] = i
            slots[i] = request.slot
            for one in request.rows:
                row = i
                if one.amateur:
                    row = amateur[i] = next_amateur
                    next_amateur += 1
                row_request[row] = i
                cache_rows[row] = one.row.index
        self.rows = next_amateur
        self.layout = tuple(Tensor(a) for a in (row_request, slots, cache_rows))
        self.options = operands([(r.settings.contrast, r.settings.sampling) for r in self.requests], bucket)
        self.options.put(slice(None), "expert_rows", expert)
        self.options.put(slice(None), "amateur_rows", amateur)
        self.eos = Tensor(np.array(sorted(eos) or [-1], np.int32))  # -1 is no token id

    @property
    def one_step(self):
        """Whether this chunk must have one step: a first token whose contrast asks what was generated before."""
        return any(not r.tokens and r.settings.contrast and r.settings.contrast.skip_copies for r in self.requests)

    def arguments(self, capacity, steps, width):
        """The arguments of :class:`colora_ms.serving.graphs.ServingLoop`.

        Args:
            capacity: the graph's steps; steps: how many to make now, at most.
            width: tokens that a prompt may have.
        """
        requests = self.requests
        last = [r.last for r in requests]
        state = (self._array([token for token, _ in last], 0, np.int32),
                 self._array([position for _, position in last], 0, np.int32),
                 self._array([True] * len(requests), False, bool))
        uniforms = np.zeros((self.bucket, capacity), np.float32)
        for i, request in enumerate(requests):
            uniforms[i] = request.uniforms(capacity)
        self.options.put(slice(0, len(requests)), "budget", [r.left for r in requests])
        # Adaptive contrasts look for copies in the prompt.
        ids = np.zeros((self.bucket, width), np.int32)
        for i, request in enumerate(requests):
            ids[i, :len(request.ids)] = request.ids
        adapt = (Tensor(ids), self._array([len(r.ids) for r in requests], 0, np.int32),
                 self._array([not r.tokens for r in requests], False, bool))
        return (*state, *self.layout, Tensor(self.options.whole), Tensor(self.options.real), Tensor(uniforms), self.eos,
                Tensor(np.array(steps, np.int32)), *adapt)

    def _array(self, values, filler, dtype):
        return Tensor(np.array(list(values) + [filler] * (self.bucket - len(values)), dtype))
