"""The choice of tokens inside the graph of a device step: what ContrastiveSelect can do alone.

Requests that are greedy, of one row, a contrast, or a mix by logarithms with no cut or the leading row's, need no more
than the weighted sum of their rows' logits over the leading row's valid tokens. A batch that has others goes through
the graph of built-in operators behind the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import numpy as np

from colora_ms.kernels.options import COLUMN, CUTS, MIXINGS, MOST_ROWS

#: log(alpha) of no cut: below every finite difference of logits, and finite.
NO_CUT = np.float32(-3.0e38)


class Choice(NamedTuple):
    """ContrastiveSelect's inputs for Q requests.

    Attributes:
        rows: (Q, 8) int32, rows of logits, the leading one first, -1 behind the last one.
        weights: (Q, 8) float32. log_alpha: (Q,) float32, :data:`NO_CUT` for none.
    """

    rows: np.ndarray
    weights: np.ndarray
    log_alpha: np.ndarray

    def filled(self, size: int) -> Choice:
        """The same with further requests of one row, whose tokens nobody takes."""
        rows = np.full((size, MOST_ROWS), -1, np.int32)
        weights = np.zeros((size, MOST_ROWS), np.float32)
        log_alpha = np.full(size, NO_CUT, np.float32)
        rows[:, 0], weights[:, 0] = 0, 1
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
    if batch.records or batch.adjustments or np.any(takes & ~plain):
        return None
    beta = real[:, COLUMN["beta"]]
    weights = np.where(contrast[:, None], 0, batch.mix_weights).astype(np.float32)
    weights[contrast, 0], weights[contrast, 1] = 1 + beta[contrast], -beta[contrast]
    weights[~several] = 0
    weights[~several, 0] = 1
    log_alpha = np.where(several & (cut == CUTS["leading"]), np.log(real[:, COLUMN["alpha"]]), NO_CUT)
    rows = np.where(takes[:, None], batch.mix_rows, -1).astype(np.int32)
    rows[~takes, 0] = 0  # nobody reads what comes of it
    weights[rows < 0] = 0
    return Choice(rows, weights, log_alpha.astype(np.float32))
