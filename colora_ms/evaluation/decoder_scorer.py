"""Log-probabilities of given tokens under a decoder: the model side of ``likelihood``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mindspore import Tensor, nn

from colora_ms import runtime
from colora_ms.errors import DataError
from colora_ms.kernels import bind, linear_token_losses, token_losses_of_logits
from colora_ms.models.head import capped, logit_cap, plain_head

if TYPE_CHECKING:
    from colora_ms.models.decoder import Decoder

_IGNORED = -100


class TokenLosses(nn.Cell):
    """-log p of each label after its position.

    Args:
        decoder: has ``hidden(ids, lengths, slots)`` and ``lm_head``.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(auto_prefix=False)
        bind()
        self.decoder = decoder
        # A decomposed or adapted head is not one matrix: go through its logits.
        self.fused, self.cap = plain_head(decoder), logit_cap(decoder)

    def construct(self, ids: Tensor, labels: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """ids, labels: (rows, tokens) int32, label -100 = none; lengths, slots: (rows,) int32.

        Returns:
            (rows, tokens) float32, 0 where there is no label.
        """
        hidden = self.decoder.hidden(ids, lengths, slots)
        flat = labels.reshape((-1,))
        if self.fused:
            losses = linear_token_losses(hidden.reshape((-1, hidden.shape[-1])),
                                         self.decoder.lm_head.base(), flat)
        else:
            logits = capped(self.decoder.lm_head(hidden, (slots, lengths)), self.cap)
            losses = token_losses_of_logits(logits.reshape((-1, logits.shape[-1])), flat)
        return losses.reshape(labels.shape)


class DecoderScorer:
    """Gives ``perplexity`` and ``multiple_choice`` the log-probabilities of a decoder.

    Args:
        decoder: ``colora_ms.models.Decoder``.
        slot: the adapter slot of all rows; -1 is the base model.
        rows: sequences of one graph call (a shorter batch is filled up: no new shape).
        multiple: sequences are padded to a multiple of this many tokens.
    """

    def __init__(self, decoder: Decoder, slot: int = -1, rows: int = 8, multiple: int = 32) -> None:
        runtime.configure()
        self.decoder, self.slot, self.rows, self.multiple = decoder, slot, rows, multiple
        self.losses = TokenLosses(decoder)
        self.losses.set_train(False)

    def token_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities of all tokens but the first of each sequence.

        Args:
            sequences: list of lists of token ids, each of at least two tokens.

        Returns:
            List of float32 arrays; array k has ``len(sequences[k]) - 1`` numbers.

        Raises:
            DataError: a sequence is shorter than two tokens, longer than the context, or holds an
                id that the model has no row for.
        """
        vocabulary = self.decoder.config.vocab_size
        for number, ids in enumerate(sequences):
            if not 2 <= len(ids) <= self.decoder.max_positions + 1:
                raise DataError(f"sequence {number} has {len(ids)} tokens, expected from 2 to "
                                f"{self.decoder.max_positions + 1} (the model's context)")
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise DataError(f"sequence {number} holds the id {max(ids) if min(ids) >= 0 else min(ids)}, "
                                f"the model has the ids 0 to {vocabulary - 1}")
        results = []
        for start in range(0, len(sequences), self.rows):
            results += self._batch(sequences[start:start + self.rows])
        return results

    def _batch(self, chunk: Sequence[Sequence[int]]) -> list[np.ndarray]:
        longest = max(len(ids) for ids in chunk) - 1
        width = min(-(-longest // self.multiple) * self.multiple, self.decoder.max_positions)
        ids = np.zeros((self.rows, width), np.int32)
        labels = np.full((self.rows, width), _IGNORED, np.int32)
        lengths = np.ones(self.rows, np.int32)
        for row, sequence in enumerate(chunk):
            length = len(sequence) - 1
            ids[row, :length] = sequence[:-1]
            labels[row, :length] = sequence[1:]
            lengths[row] = length
        slots = np.full(self.rows, self.slot, np.int32)
        losses = runtime.run(self.losses, Tensor(ids), Tensor(labels), Tensor(lengths),
                             Tensor(slots)).asnumpy()
        return [-losses[row, :len(sequence) - 1] for row, sequence in enumerate(chunk)]
