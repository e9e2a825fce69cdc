"""How keys and values are kept for a model on the device in use, and whether its steps are a graph for that device.

Where steps are made of Ascend's built-in operators (the columns ``ascend`` and ``rehearsal`` of the table of
operations), the cache is (blocks, block, kv_heads, head_dim) in the compute type, and a block has as many positions as
the device likes. Elsewhere, and for models that have no such graph, it is that of :mod:`colora_ms.models.paged_cache`.
"""

from __future__ import annotations

import dataclasses
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
from colora_ms.models.device_feed_forward import is_sparse, why_not_experts
from colora_ms.models.device_lily import POOLS, is_routed
from colora_ms.models.device_quantized import INTEGERS, why_not_integers
from colora_ms.models.device_weights import FLOATS, plain
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

#: Families whose layers are those of Llama, or routed experts in an MLP's place, and the fields of a config that the
#: device step reads, or that mean nothing to it: whatever else a config may have must be at its default.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe")
FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
          "tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "qk_norm", "bos_token_id",
          "eos_token_ids", "pad_token_id", "torch_dtype", "experts", "experts_per_token", "expert_size", "shared_size",
          "normalised_experts", "dense_layers")

#: Largest rank of MultiLora, and rows of its down factor over all slices.
MOST_RANK, MOST_ROWS = 256, 512


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


def products(decoder: Any) -> Iterator[tuple[str, list[nn.Cell]]]:
    """(name, Cells) of the products of a device step but those of routed experts: linears that read the same input are
    one."""
    for i, layer in enumerate(decoder.model.layers):
        rooms = [(layer.self_attn, ("q_proj", "k_proj", "v_proj")), (layer.self_attn, ("o_proj",))]
        mlp = layer.feed_forward
        if is_sparse(mlp):
            mlp = mlp.shared_expert if mlp.shares else None
        if mlp is not None:
            rooms += [(mlp, mlp.parts_names[:2]), (mlp, mlp.parts_names[2:])]
        for room, names in rooms:
            yield f"layer {i}'s {', '.join(names)}", [getattr(room, name) for name in names]
    yield "lm_head", [decoder.lm_head]


def why_not(decoder: Any, block: int = BLOCKS[-1]) -> str:
    """Why a decoder's steps cannot be a device step, "" if they can; block: positions of a block."""
    config, model = decoder.config, decoder.model
    dim = device_dim(config.head_dim)
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type!r}; the device step has the layers of {', '.join(FAMILIES)}"
    for field in dataclasses.fields(config):
        if field.name not in FIELDS and getattr(config, field.name) != field.default:
            return f"{field.name}={getattr(config, field.name)!r}, which the device step does not compute"
    if config.head_dim % 2 or dim > 256:
        return f"head_dim={config.head_dim}; the device's rotation and attention take even ones up to 256"
    if dim != config.head_dim and config.qk_norm:
        return f"head_dim={config.head_dim} with norms of the heads; only multiples of 32 can be had with them"
    if block * dim > 128 * 128:
        return (f"a block of {block} positions with head_dim={dim} is larger than the 128 * 128 of PagedAttention; set "
                f"COLORA_ASCEND_BLOCK={64 if 64 * dim <= 128 * 128 else 32}")
    for name, cells in products(decoder):
        for cell in cells:
            if is_routed(cell) and not cell.fusible and cell.pool not in POOLS:
                return f"{name}: experts pooled over a {cell.pool}, which is no row of a step; the device has {POOLS}"
            if not cell.fusible and not is_routed(cell):
                return f"{name}: there is a {type(cell).__name__}, which computes more than its tensors tell"
        pairs = [cell.operands()[1] for cell in cells if cell.fusible]
        rank = max((pair[0].shape[1] for pair in pairs if pair), default=0)
        if rank > MOST_RANK or rank * len(cells) > MOST_ROWS:
            return (f"{name}: adapters of rank {rank} are more than MultiLora takes ({MOST_RANK}, and {MOST_ROWS} over "
                    f"{len(cells)} linears that are one product)")
        kinds = {FORMATS[plain(cell).operands()[0][0]][0] for cell in cells}
        if kinds <= set(FLOATS):
            continue
        if not kinds <= set(INTEGERS):
            return f"{name}: kept as {', '.join(sorted(kinds))}; the device step has {', '.join((*FLOATS, *INTEGERS))}"
        reason = why_not_integers([plain(cell) for cell in cells], dim != config.head_dim)
        if reason:
            return f"{name}: {reason}"
    for i, layer in enumerate(model.layers):
        reason = why_not_experts(layer.feed_forward) if is_sparse(layer.feed_forward) else ""
        if reason:
            return f"layer {i}'s {reason}"
    others = [("embed_tokens", model.embed_tokens), ("norm", model.norm)]
    for i, layer in enumerate(model.layers):
        others += [(f"layer {i}'s norm", layer.input_layernorm), (f"layer {i}'s norm", layer.post_attention_layernorm)]
        if config.qk_norm:
            others += [(f"layer {i}'s q_norm", layer.self_attn.q_norm), (f"layer {i}'s k_norm", layer.self_attn.k_norm)]
    for name, cell in others:
        if not cell.fusible:
            return f"{name} is a {type(cell).__name__}, which computes more than its tensors tell"
    return ""
