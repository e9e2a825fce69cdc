"""The choice of tokens inside the graph of a device step: what ContrastiveSelect can do alone.

Requests that are greedy, of one row, a contrast, or a mix by logarithms with no cut or the leading row's, need no more
than the weighted sum of their rows' logits over the leading row's valid tokens. A batch that has others goes through
the graph of built-in operators behind the logits.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence

import numpy as np

from colora_ms.kernels.options import COLUMN, CUTS, DETAILS, MIXINGS, MOST_ROWS, MOST_TOP

#: log(alpha) of no cut.
NO_CUT = np.float32(-np.inf)


class Choice(NamedTuple):
    """ContrastiveSelect's inputs for Q requests.

    Attributes:
        rows: (Q, 8) int32, rows of logits, the leading one first, -1 behind the last one.
        weights: (Q, 8) float32. log_alpha: (Q,) float32, :data:`NO_CUT` for none.
    """

    rows: np.ndarray
    weights: np.ndarray
    log_alpha: np.ndarray

    @classmethod
    def of_none(cls) -> Choice:
        """Of no request."""
        return cls(np.zeros((0, MOST_ROWS), np.int32), np.zeros((0, MOST_ROWS), np.float32), np.zeros(0, np.float32))

    def filled(self, size: int) -> Choice:
        """The same with further requests, which are inactive."""
        rows = np.full((size, MOST_ROWS), -1, np.int32)
        weights = np.zeros((size, MOST_ROWS), np.float32)
        log_alpha = np.full(size, NO_CUT, np.float32)
        count = len(self.rows)
        rows[:count], weights[:count], log_alpha[:count] = self
        return Choice(rows, weights, log_alpha)


def choice_of(batch: Any, takes: np.ndarray) -> Optional[Choice]:
    """The inputs for a batch, or None where a request wants more.

    Args:
        batch: :class:`colora_ms.decoding.step.FlatBatch`; takes: (Q,) bool, the requests that take a token.
    """
    whole, real = batch.whole, batch.real
    mixing, several = whole[:, COLUMN["mixing"]], batch.mix_rows[:, 1] >= 0
    contrast = mixing == MIXINGS["contrast"]
    cut = np.where(contrast, CUTS["leading"], whole[:, COLUMN["cut"]])
    plain = (real[:, COLUMN["temperature"]] == 0) & (whole[:, COLUMN["logprobs"]] < 0) \
        & (whole[:, COLUMN["voices"]] == 0) & (whole[:, COLUMN["masked"]] == 0) \
        & (~several | (mixing != MIXINGS["probability"]) & (cut != CUTS["mixture"]) & (whole[:, COLUMN["mode"]] == 0))
    if batch.adjustments or np.any(takes & ~plain):
        return None
    beta = real[:, COLUMN["beta"]]
    weights = np.where(contrast[:, None], 0, batch.mix_weights).astype(np.float32)
    weights[contrast, 0], weights[contrast, 1] = 1 + beta[contrast], -beta[contrast]
    weights[~several] = 0
    weights[~several, 0] = 1
    log_alpha = np.where(several & (cut == CUTS["leading"]), np.log(real[:, COLUMN["alpha"]]), NO_CUT)
    rows = np.where(takes[:, None], batch.mix_rows, -1).astype(np.int32)
    weights[rows < 0] = 0
    return Choice(rows, weights, log_alpha.astype(np.float32))


def plain_records(chosen: Sequence[Any], count: int) -> List[np.ndarray]:
    """What ``kernels.contrastive_select`` and ``kernels.token_details`` give: ints (Q, 3), floats (Q, 4), tops (Q, 20),
    details (Q, 29).

    Args:
        chosen: (ints, floats) of :func:`colora_ms.kernels.ascend.contrastive_token`, of at least ``count`` requests.
            Log-probabilities, for which nobody asked, are no numbers.
    """
    ints, floats = (one.asnumpy()[:count] for one in chosen)
    return [ints, np.ascontiguousarray(floats[:, (2, 3, 0, 1)]), np.full((count, MOST_TOP), -1, np.int32),
            np.full((count, DETAILS), np.nan, np.float32)]
