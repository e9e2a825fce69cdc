"""Log-probabilities of given tokens, under the base model or an adapter: prompts whose own are asked for, answers after
they were made.

A sequence is computed whole by the graph of Cells, without the cache, in the engine's thread between two calls; running
requests wait meanwhile. Widths are powers of two, so that few graphs are compiled, each when it is first needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Optional, Sequence

import numpy as np

import mindspore as ms
from mindspore import Tensor, nn, ops

from colora_ms import runtime
from colora_ms.errors import AdapterError, DecodingError
from colora_ms.kernels import bind
from colora_ms.models.head import capped, logit_cap
from colora_ms.serving.engine import Engine

#: Most likely tokens that are kept at each place, positions that the head is computed for at once, and the least width.
MOST_TOP, _PIECE, _LEAST = 20, 64, 32


@dataclass(frozen=True)
class Scores:
    """Of each token of a sequence what the model gave it where it stands; nothing is known of the first.

    Attributes:
        logprobs: (tokens,) float32, natural logarithms; the first is NaN.
        top_ids, top_logprobs: (tokens, up to 20) int32 and float32, the most likely tokens, the best first.
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


class _Hidden(nn.Cell):
    """Hidden states of one sequence."""

    def __init__(self, decoder: Any) -> None:
        super().__init__(auto_prefix=False)
        self.decoder = decoder

    def construct(self, ids: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """ids (1, width), lengths (1,), slots (1,) int32 -> (1, width, hidden) float32."""
        return self.decoder.hidden(ids, lengths, slots)


class _Head(nn.Cell):
    """Log-probabilities behind hidden states."""

    def __init__(self, decoder: Any, count: int) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.decoder, self.cap = decoder, logit_cap(decoder)
        self.count = count

    def construct(self, hidden: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> tuple:
        """hidden (1, n, hidden), labels (1, n) int32, lengths (1,), slots (1,) -> (1, n) float32, the labels' own;
        (1, n, count) float32 and int32, the best."""
        logits = capped(self.decoder.lm_head(hidden, (slots, lengths)).astype(ms.float32), self.cap)
        logprobs = ops.log_softmax(logits, -1)
        own = ops.gather_elements(logprobs, 2, ops.expand_dims(labels, 2))
        best, ids = ops.topk(logprobs, self.count)
        return own.squeeze(2), best, ids


class Scorer:
    """Scores sequences with an engine's model.

    Args:
        engine: :class:`colora_ms.serving.Engine`.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cells: Optional[tuple] = None

    def score(self, ids: Sequence[int], adapter: Optional[str] = None, timeout: float = 600.0) -> Scores:
        """The scores of a sequence; any thread may call this.

        Args:
            ids: at least one token; adapter: its name in the bank, None: the base model.
            timeout: seconds to wait for a free adapter slot.

        Raises:
            DecodingError: the sequence is longer than the model's context, or the model is split over workers.
            UnknownAdapterError, AdapterError: there is no such adapter, it cannot be loaded, or no slot became free.
        """
        if self._engine.split:
            raise DecodingError("log-probabilities of given tokens (echo with logprobs) are not there where the model "
                                "is split over workers")
        most = self._engine.decoder.max_positions
        if len(ids) - 1 > most:
            raise DecodingError(f"log-probabilities of {len(ids)} tokens were asked for; the model's context is {most}")
        digest = "" if adapter is None or self._engine.bank is None else self._engine.bank.resolve(adapter)
        end = time.monotonic() + timeout
        while True:
            found = self._engine.call(lambda: self._leased(ids, digest))
            if found is not None:
                return found
            if time.monotonic() > end:
                raise AdapterError(f"no slot became free for adapter {adapter!r} within {timeout:g} s")
            time.sleep(0.01)

    def _leased(self, ids: Sequence[int], digest: str) -> Optional[Scores]:
        """The scores, with the adapter's content in a slot; None where all slots are in use."""
        bank = self._engine.bank
        if not digest or bank is None:
            return self._run(ids, -1)
        lease = bank.lease(digest)
        if lease is None:
            return None
        try:
            return self._run(ids, lease.slot)
        finally:
            bank.release(lease)

    def _run(self, ids: Sequence[int], slot: int) -> Scores:
        decoder = self._engine.decoder
        count = min(MOST_TOP, decoder.config.vocab_size)
        if self._cells is None:
            self._cells = _Hidden(decoder).set_train(False), _Head(decoder, count).set_train(False)
        states, head = self._cells
        read = len(ids) - 1  # the last token predicts nothing that is asked for
        width = _LEAST
        while width < read:
            width *= 2
        width = min(width, decoder.max_positions)
        padded = np.zeros((1, width), np.int32)
        padded[0, :read] = ids[:-1]
        slots = Tensor(np.array([slot], np.int32))
        own = np.full(len(ids), np.nan, np.float32)
        best, places = np.zeros((len(ids), count), np.float32), np.zeros((len(ids), count), np.int32)
        if not read:
            return Scores(own, places, best)
        hidden = runtime.run(states, Tensor(padded), Tensor(np.array([read], np.int32)), slots).asnumpy()
        for begin in range(0, read, _PIECE):
            piece = min(_PIECE, read - begin)
            part = np.zeros((1, _PIECE, hidden.shape[-1]), hidden.dtype)
            part[0, :piece] = hidden[0, begin:begin + piece]
            labels = np.zeros((1, _PIECE), np.int32)
            labels[0, :piece] = ids[begin + 1:begin + 1 + piece]
            found = runtime.run(head, Tensor(part), Tensor(labels), Tensor(np.array([piece], np.int32)), slots)
            goal = slice(begin + 1, begin + 1 + piece)
            own[goal], best[goal], places[goal] = (one.asnumpy()[0, :piece] for one in found)
        if not np.isfinite(own[1:]).all():
            raise DecodingError("the model's log-probabilities of these tokens are not finite numbers")
        return Scores(own, places, best)
