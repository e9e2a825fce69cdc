"""What the logits of a decoder go through behind its head."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

from colora_ms.kernels import soft_cap
from colora_ms.models.formats import is_matrix


def logit_cap(decoder: Any) -> float:
    """c of c * tanh(logit / c), which whoever calls ``decoder.lm_head`` applies by :func:`capped`; 0: none."""
    return float(getattr(decoder, "logit_cap", 0.0))


def plain_head(decoder: Any) -> bool:
    """Whether the logits are the product with one matrix and nothing else, so that operators may fuse it."""
    return is_matrix(decoder.lm_head) and logit_cap(decoder) == 0


def capped(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), or the logits where cap is 0; in graphs."""
    if cap > 0:
        return soft_cap(logits, cap)
    return logits
