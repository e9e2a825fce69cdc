"""The graphs of the engine: prompts into the cache, chunks of steps, and copies of a row's prefix.

All of them work on the same cache; which rows, slots, settings and how many steps are tensors, so that a graph is
compiled once for each bucket of shapes.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms.decoding.loop import ContinueLoop
from colora_ms.kernels import bind
from colora_ms.kernels.options import COLUMN, replaced

_EXPERT, _AMATEUR, _BETA = COLUMN["expert_rows"], COLUMN["amateur_rows"], COLUMN["beta"]


class Prefill(nn.Cell):
    """Puts prompt tokens into the cache. No logits: a prompt's last token goes through the loop like any later one."""

    def __init__(self, decoder, cache):
        super().__init__()
        bind()
        self.decoder = decoder
        self.cache = cache

    def construct(self, ids, slots, cache_rows, start, length):
        """Arguments as :meth:`colora_ms.models.decoder.Decoder.step`; returns (rows,) float32 without meaning."""
        return self.decoder.model.cached(ids, slots, self.cache, cache_rows, start, length)[:, 0, 0]


class ServingLoop(ContinueLoop):
    """A chunk of steps of the running requests, see :meth:`colora_ms.decoding.loop.ContinueLoop.construct`.

    A request whose logits are not finite (an adapter with values near the largest float), or whose contrast may not be (a
    huge beta), gets results of zeros, with 0 valid tokens, in place of an error of the operator, which would end all
    requests of the batch.
    """

    def __init__(self, decoder, cache):
        super().__init__(decoder, cache)
        self.forgiving = Tensor([1], ms.int32)

    def previous(self, token, adapt):
        return ops.where(adapt[2], -self.one, token)

    def construct(self, token, position, active, row_request, slots, cache_rows, whole, real, uniforms, eos, steps, ids,
                  lengths, fresh):
        """As the base class; fresh: (requests,) bool, whether a request has no token of its own yet. Chunks in which that
        matters (``Contrast.skip_copies``) have one step."""
        return self.run((token, position, active), (row_request, slots, cache_rows), (whole, real), uniforms, eos, steps,
                        (ids, lengths, fresh))

    def select(self, logits, options, uniform, active, adapt, previous):
        whole, real = options
        expert_rows, amateur_rows, beta = whole[:, _EXPERT], whole[:, _AMATEUR], real[:, _BETA]  # (requests,)
        contrast = amateur_rows >= 0
        finite = ops.isfinite(logits.sum(axis=1))  # (rows,)
        size = ops.abs(logits).max(axis=1)
        amateurs = ops.maximum(amateur_rows, 0)
        beta = ops.where(contrast, beta, ops.zeros_like(beta))
        reach = (1.0 + beta) * ops.gather(size, ops.maximum(expert_rows, 0), 0) + beta * ops.gather(size, amateurs, 0)
        fine = ops.logical_and(ops.gather(finite, ops.maximum(expert_rows, 0), 0), ops.logical_or(
            ops.logical_not(contrast), ops.logical_and(ops.gather(finite, amateurs, 0), ops.isfinite(reach))))
        options = (whole, replaced(real, _BETA, beta))
        return self.choose(logits, options, uniform, ops.logical_and(active, fine), adapt, self.previous(previous, adapt))


class CopyRow(nn.Cell):
    """One row of the cache becomes a copy of another one."""

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def construct(self, source, target):
        """source, target: (1,) int32."""
        done = source
        for tensor in self.cache.keys + self.cache.values:
            done = ops.depend(done, ops.scatter_update(tensor, target, ops.gather(tensor, source, 0)))
        return done
