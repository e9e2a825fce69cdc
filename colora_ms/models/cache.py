"""The key/value cache: one pair of Parameters a layer, written in place by ``kernels.cached_attention``."""

from __future__ import annotations

import numpy as np

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn

from colora_ms.errors import ConfigError
from colora_ms.models.config import DecoderConfig


class KeyValueCache(nn.Cell):
    """Keys and values of ``rows`` sequences of at most ``max_length`` tokens.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`.
        rows: sequences that it holds; a contrastive request needs two.
        max_length: tokens a sequence.
        dtype: ``mindspore.float32`` or ``mindspore.bfloat16``.

    Attributes:
        keys, values: a Parameter a layer, each (rows, kv_heads, max_length, head_dim).
    """

    def __init__(self, config: DecoderConfig, rows: int, max_length: int, dtype: ms.dtype.Type = ms.float32) -> None:
        super().__init__()
        if rows < 1 or max_length < 1:
            raise ConfigError("a cache needs at least one row and one position, got "
                              f"rows={rows}, max_length={max_length}")
        self.rows = rows
        self.max_length = max_length
        shape = (rows, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = self._parameters("keys", shape, config.num_hidden_layers, dtype)
        self.values = self._parameters("values", shape, config.num_hidden_layers, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(int(p.size) * p.itemsize for p in (*self.keys, *self.values))

    @staticmethod
    def _parameters(kind, shape, layers, dtype) -> ParameterTuple:
        return ParameterTuple([
            Parameter(Tensor(np.zeros(shape, np.float32), dtype), name=f"cache.{kind}.{i}", requires_grad=False)
            for i in range(layers)
        ])
