"""Contrastive LoRA Decoding in mindformers' generation: a logits processor with its ``process_ms`` / ``process_np``
pair.

    processors = LogitsProcessorList()
    processors.append(ContrastProcessor(BaseLogits(net, adapters, pad_token_id), Contrast(alpha=0.1, beta=0.5)))
    net.generate(ids, logits_processor=processors, do_sample=False, max_new_tokens=64)

The logits that come in are the expert's; the amateur's are computed by the same network with its adapter switched off,
over the whole sequence so far. That costs one full forward a token: it is for networks that run without a key/value
cache (``use_past: False``). With mindformers' paged cache a second forward would overwrite the expert's keys and
values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import mindspore as ms
from mindformers.generation import LogitsProcessor
from mindspore import Tensor, nn, ops

from colora_ms.decoding import Contrast, contrastive_scores
from colora_ms.errors import DecodingError

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters


class BaseLogits:
    """The base model's logits of the next token: a function of the padded ids.

    Args:
        net: a mindformers model without key/value cache, called with ids (rows, seq_length); a tuple's first part
            counts.
        adapters: handle of its adapters.
        pad_token_id: what follows a row's last token; the prompt must not end with it.

    Raises:
        DecodingError: the model has a key/value cache.
    """

    def __init__(self, net: nn.Cell, adapters: Adapters, pad_token_id: int) -> None:
        if getattr(getattr(net, "config", None), "use_past", False):
            raise DecodingError("the model has use_past: True, so that a second forward would write into the expert's "
                                "cache; build it with use_past: False, or decode with colora_ms.Generator")
        self.net, self.adapters, self.pad = net, adapters, pad_token_id
        self.lock = threading.Lock()

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """ids: (rows, seq_length) integers, padded at the right -> (rows, vocab) float32 array."""
        ids = np.asarray(ids)
        real = ids != self.pad
        last = ids.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
        if not real.any(axis=1).all():
            raise DecodingError(f"row {int(np.argmin(real.any(axis=1)))} has no token but the padding {self.pad}")
        # mindformers calls process_np from one thread a row, and the adapter is switched for all of them.
        with self.lock, self.adapters.disable_adapter():
            found = self.net(Tensor(ids.astype(np.int32)))
        logits = (found[0] if isinstance(found, tuple) else found).astype(ms.float32).asnumpy()
        if logits.ndim == 3:
            return logits[np.arange(len(ids)), last]
        return logits.reshape(len(ids), -1, logits.shape[-1])[np.arange(len(ids)), last]


class ContrastProcessor(LogitsProcessor):
    """The CoLD scores (arXiv 2505.14620) in place of the expert's logits; see :mod:`colora_ms.decoding.contrast`.

    Args:
        amateur: function (ids (rows, length) array) -> (rows, vocab) array of the amateur's logits.
        contrast: :class:`colora_ms.decoding.Contrast`.
    """

    def __init__(self, amateur: Callable[[np.ndarray], np.ndarray], contrast: Contrast = Contrast()) -> None:
        super().__init__()
        self.amateur, self.contrast = amateur, contrast

    def process_ms(self, logits: Tensor, sequence_ids: Tensor, **kwargs: Any) -> Tensor:
        """logits (rows, vocab) and ids (rows, length) Tensors -> (rows, vocab) float32, -inf outside the alpha-cut."""
        alpha, beta = self.contrast.alpha, self.contrast.beta
        expert = logits.astype(ms.float32)
        cut = float(np.log(np.float32(alpha))) + ops.max(expert, axis=1, keepdims=True)[0]
        scores = expert
        if beta > 0:
            amateur = Tensor(np.asarray(self.amateur(sequence_ids.asnumpy()), np.float32))
            scores = (1.0 + beta) * expert - beta * amateur
        return ops.where(expert >= cut, scores, ops.full_like(scores, float("-inf")))

    def process_np(self, logits: np.ndarray, sequence_ids: np.ndarray) -> np.ndarray:
        """The same with arrays."""
        beta = self.contrast.beta
        amateur = self.amateur(sequence_ids) if beta > 0 else np.zeros_like(logits, np.float32)
        return contrastive_scores(logits, amateur, self.contrast.alpha, beta)
