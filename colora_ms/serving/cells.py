"""The Cells of the engine's graphs: prompts into the cache, chunks of steps, and copies of a row's prefix.

All of them work on the same cache; which rows, slots, settings and how many steps are tensors, so that a graph is
compiled once for each bucket of shapes.
"""

from typing import Any

from mindspore import Tensor, nn, ops

from colora_ms.decoding.loop import ContinueLoop
from colora_ms.kernels import bind


class Prefill(nn.Cell):
    """Puts prompt tokens into the cache. No logits: a prompt's last token goes through the loop like any later one."""

    def __init__(self, decoder: Any, cache: Any) -> None:
        super().__init__()
        bind()
        self.decoder = decoder
        self.cache = cache

    def construct(self, ids: Tensor, slots: Tensor, cache_rows: Tensor, start: Tensor, length: Tensor) -> Tensor:
        """Arguments as :meth:`colora_ms.models.decoder.Decoder.step`; returns (rows,) float32 without meaning."""
        return self.decoder.model.cached(ids, slots, self.cache, cache_rows, start, length)[:, 0, 0]


class ServingLoop(ContinueLoop):
    """A chunk of steps of the running requests, see :meth:`colora_ms.decoding.loop.ContinueLoop.construct`."""

    def previous(self, token: Tensor, adapt: Any) -> Tensor:
        """As the base class; -1 in a chunk that makes a request's first token."""
        return ops.where(adapt[2], -self.one, token)

    def construct(self, token, position, active, row_request, slots, cache_rows, whole, real, uniforms, eos, steps, ids,
                  lengths, fresh) -> Any:
        """As the base class; fresh: (requests,) bool, whether a request has no token of its own yet. Chunks in which
        that matters (``Contrast.skip_copies``) have one step."""
        return self.run((token, position, active), (row_request, slots, cache_rows), (whole, real), uniforms, eos,
                        steps, (ids, lengths, fresh))


class CopyRow(nn.Cell):
    """One row of the cache becomes a copy of another one."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def construct(self, source: Tensor, target: Tensor) -> Tensor:
        """source, target: (1,) int32."""
        done = source
        for tensor in self.cache.keys + self.cache.values:
            done = ops.depend(done, ops.scatter_update(tensor, target, ops.gather(tensor, source, 0)))
        return done
