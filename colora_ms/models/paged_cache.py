"""The paged key/value cache: blocks of positions that rows reach through block tables, written in place.

Which of the two forms a model has on the device in use, and how long a block is there, says
:mod:`colora_ms.models.device_form`.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import ParameterTuple, nn

from colora_ms.errors import ConfigError
from colora_ms.kernels.paged import BLOCK, block_numbers
from colora_ms.models.config import DecoderConfig
from colora_ms.models.mapped import array_dtype, zeros

#: Types of a cache by their names in options.
CACHE_DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "int8": ms.int8}


class PagedCache(nn.Cell):
    """Keys and values of blocks of :data:`BLOCK` positions; who uses which block stands elsewhere.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`.
        blocks: how many there are.
        dtype: ``mindspore.float32``, ``bfloat16`` or ``int8`` (with a float32 scale a position and head, so that no
            entry is rounded again when others come).

    Attributes:
        block: positions of a block.
        keys, values: a Parameter a layer, each (blocks, kv_heads, numbers of a block).

    Raises:
        ConfigError: no block, or an unknown type.
    """

    block = BLOCK

    def __init__(self, config: DecoderConfig, blocks: int, dtype: ms.dtype.Type = ms.float32) -> None:
        super().__init__()
        if blocks < 1:
            raise ConfigError(f"a cache needs at least one block of {BLOCK} positions, got blocks={blocks}")
        if dtype not in CACHE_DTYPES.values():
            raise ConfigError(f"a cache of {dtype} cannot be had; there are {', '.join(CACHE_DTYPES)}")
        self.blocks = blocks
        self.dtype = dtype
        self.block_bytes = block_bytes(config, dtype)
        shape = (blocks, config.num_key_value_heads, block_numbers(config.head_dim, dtype))
        self.keys = _parameters("keys", shape, config.num_hidden_layers, dtype)
        self.values = _parameters("values", shape, config.num_hidden_layers, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.blocks * self.block_bytes


class DeviceCache(nn.Cell):
    """Keys and values as Ascend's ReshapeAndCache and PagedAttention have them.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`; blocks: how many; block: positions of each.
        dtype: ``mindspore.float16`` or ``bfloat16``.

    Attributes:
        keys, values: a Parameter a layer, each (blocks, block, kv_heads, :func:`device_dim` of head_dim).

    Raises:
        ConfigError: no block.
    """

    def __init__(self, config: DecoderConfig, blocks: int, block: int, dtype: ms.dtype.Type) -> None:
        super().__init__()
        if blocks < 1:
            raise ConfigError(f"a cache needs at least one block of {block} positions, got blocks={blocks}")
        self.blocks, self.block, self.dtype = blocks, block, dtype
        self.block_bytes = device_block_bytes(config, block)
        shape = (blocks, block, config.num_key_value_heads, device_dim(config.head_dim))
        self.keys = _parameters("keys", shape, config.num_hidden_layers, dtype)
        self.values = _parameters("values", shape, config.num_hidden_layers, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.blocks * self.block_bytes


def device_dim(head_dim: int) -> int:
    """Numbers of a head on the device: the next multiple of 32, of which rotation and attention there are made."""
    return -(-head_dim // 32) * 32


def device_block_bytes(config: DecoderConfig, block: int) -> int:
    """Bytes of one block of ``block`` positions of half type: keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * block * device_dim(config.head_dim) * 2


def block_bytes(config: DecoderConfig, dtype: ms.dtype.Type = ms.float32) -> int:
    """Bytes of one block: keys and values of all layers and heads for :data:`BLOCK` positions."""
    width = {ms.float32: 4, ms.bfloat16: 2, ms.int8: 1}[dtype]
    return (2 * config.num_hidden_layers * config.num_key_value_heads * block_numbers(config.head_dim, dtype) * width)


def _parameters(kind: str, shape: tuple, layers: int, dtype: ms.dtype.Type) -> ParameterTuple:
    return ParameterTuple([zeros(shape, array_dtype(dtype), f"cache.{kind}.{i}") for i in range(layers)])
