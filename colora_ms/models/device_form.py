"""How keys and values are kept for a model on the device in use, and whether its steps are a graph for that device.

Where steps are made of Ascend's built-in operators (the columns ``ascend`` and ``rehearsal`` of the table of
operations), the cache is (blocks, block, kv_heads, head_dim) in the compute type, and a block has as many positions as
the device likes. Elsewhere, and for models that have no such graph, it is that of :mod:`colora_ms.models.paged_cache`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Union

import mindspore as ms
from mindspore import nn

from colora_ms.errors import ConfigError
from colora_ms.kernels import backend
from colora_ms.kernels.operands import FORMATS
from colora_ms.models.config import DecoderConfig
from colora_ms.models.paged_cache import (
    BLOCK,
    CACHE_DTYPES,
    DeviceCache,
    PagedCache,
    block_bytes,
    device_block_bytes,
    device_dim,
)

_log = logging.getLogger(__name__)

#: Columns whose steps are made of the device's built-in operators.
DEVICE_COLUMNS = ("ascend", "rehearsal")

#: Compute types of such a step, by their names in ``COLORA_ASCEND_DTYPE``; the first one is the default.
COMPUTE_DTYPES = {"bfloat16": ms.bfloat16, "float16": ms.float16}

#: Positions that a block may have there (``COLORA_ASCEND_BLOCK``); the last one is the default.
BLOCKS = (16, 32, 64, 128)

#: Formats of linears that the device step keeps, by their names in ``kernels.operands.FORMATS``.
LINEARS = ("float32", "bfloat16")


@dataclass(frozen=True)
class CacheForm:
    """The form of a cache.

    Attributes:
        block: positions of a block.
        dtypes: types that it may have, the default first.
        on_device: whether steps are a device step.
    """

    block: int
    dtypes: tuple[Any, ...]
    on_device: bool

    def dtype(self, wanted: Optional[Any]) -> Any:
        """The type of a cache; None: the default.

        Raises:
            ConfigError: the device has no attention over such a cache.
        """
        if wanted is None:
            return self.dtypes[0]
        if wanted not in self.dtypes:
            names = ", ".join(str(one) for one in self.dtypes)
            more = (" (the device's attention reads the compute type, which COLORA_ASCEND_DTYPE names)"
                    if self.on_device else "")
            raise ConfigError(f"a cache of {wanted} cannot be had here; there are: {names}{more}")
        return wanted

    def block_bytes(self, config: DecoderConfig, dtype: Optional[Any] = None) -> int:
        """Bytes of one block, keys and values of all layers."""
        dtype = self.dtype(dtype)
        return device_block_bytes(config, self.block) if self.on_device else block_bytes(config, dtype)

    def make(self, config: DecoderConfig, blocks: int, dtype: Optional[Any] = None) -> Union[PagedCache, DeviceCache]:
        """A cache of zeros."""
        dtype = self.dtype(dtype)
        return DeviceCache(config, blocks, self.block, dtype) if self.on_device else PagedCache(config, blocks, dtype)


_HOST = CacheForm(BLOCK, tuple(CACHE_DTYPES.values()), False)


def cache_form(decoder: Any) -> CacheForm:
    """The form of a decoder's cache on the device in use.

    Raises:
        ConfigError: ``COLORA_ASCEND_DTYPE`` or ``COLORA_ASCEND_BLOCK`` has a value that the device does not take.
    """
    if backend() not in DEVICE_COLUMNS:
        return _HOST
    block, dtype = device_block(), compute_dtype()
    reason = why_not(decoder, block)
    if reason:
        _log.warning("this model has no device step, its Cells make its steps: %s", reason)
        return _HOST
    return CacheForm(block, (dtype,), True)


def compute_dtype() -> Any:
    """The type in which a device step computes: ``COLORA_ASCEND_DTYPE``, else bfloat16."""
    name = os.environ.get("COLORA_ASCEND_DTYPE", "") or next(iter(COMPUTE_DTYPES))
    if name not in COMPUTE_DTYPES:
        raise ConfigError(f"COLORA_ASCEND_DTYPE={name!r} is not known; use one of {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[name]


def device_block() -> int:
    """Positions of a block of a device's cache: ``COLORA_ASCEND_BLOCK``, else 128."""
    text = os.environ.get("COLORA_ASCEND_BLOCK", "") or str(BLOCKS[-1])
    if text not in map(str, BLOCKS):
        raise ConfigError(f"COLORA_ASCEND_BLOCK={text!r} is not one of {', '.join(map(str, BLOCKS))}, the blocks that "
                          "PagedAttention takes")
    return int(text)


def linears(decoder: Any) -> Iterator[tuple[str, nn.Cell]]:
    """(name, Cell) of all linears of a decoder."""
    for i, layer in enumerate(decoder.model.layers):
        for room, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")),
                            (layer.mlp, ("gate_proj", "up_proj", "down_proj"))):
            for name in names:
                yield f"layer {i}'s {name}", getattr(room, name)
    yield "lm_head", decoder.lm_head


def why_not(decoder: Any, block: int = BLOCKS[-1]) -> str:
    """Why a decoder's steps cannot be a device step, "" if they can; block: positions of a block."""
    config, model = decoder.config, decoder.model
    dim = device_dim(config.head_dim)
    if config.head_dim % 2 or dim > 256:
        return f"head_dim={config.head_dim}; the device's rotation and attention take even ones up to 256"
    if dim != config.head_dim and config.qk_norm:
        return f"head_dim={config.head_dim} with norms of the heads; only multiples of 32 can be had with them"
    if block * dim > 128 * 128:
        return (f"a block of {block} positions with head_dim={dim} is larger than the 128 * 128 of PagedAttention; set "
                f"COLORA_ASCEND_BLOCK={64 if 64 * dim <= 128 * 128 else 32}")
    for name, cell in linears(decoder):
        if not cell.fusible:
            return f"{name} is a {type(cell).__name__}, which computes more than its tensors tell"
        kind = FORMATS[cell.operands()[0][0]][0]
        if kind not in LINEARS:
            return f"{name} is kept as {kind}; the device step has {', '.join(LINEARS)}"
    others = [("embed_tokens", model.embed_tokens), ("norm", model.norm)]
    for i, layer in enumerate(model.layers):
        others += [(f"layer {i}'s norm", layer.input_layernorm), (f"layer {i}'s norm", layer.post_attention_layernorm)]
        if layer.self_attn.qk_norm:
            others += [(f"layer {i}'s q_norm", layer.self_attn.q_norm), (f"layer {i}'s k_norm", layer.self_attn.k_norm)]
    for name, cell in others:
        if not cell.fusible:
            return f"{name} is a {type(cell).__name__}, which computes more than its tensors tell"
    return ""
