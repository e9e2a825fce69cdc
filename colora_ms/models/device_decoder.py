"""A decoder as a graph of Ascend's built-in operators and our own: what :mod:`colora_ms.decoding.device_step` runs.

Launches of a layer with adapters on all linears: AddRmsNorm, MatMul, MultiLora, SplitWithSize, ApplyRotaryPosEmb,
ReshapeAndCache, attention, MatMul, MultiLora, AddRmsNorm, MatMul, MultiLora, Swiglu, MatMul, MultiLora; in a prefill
each MultiLora is the pair of :mod:`colora_ms.models.device_prompts`, of three or four launches; with
projection biases (Qwen2) one more for each, with norms of the heads (Qwen3) two; routed experts have those of
:mod:`colora_ms.models.device_feed_forward` behind the second AddRmsNorm. The residual stream is kept in the compute
type, as AddRmsNorm returns it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from colora_ms.kernels import ascend_builtin, bind
from colora_ms.models.changes import changes
from colora_ms.models.device_feed_forward import DeviceExperts, device_feed_forward
from colora_ms.models.device_prompts import owners_of, prepared
from colora_ms.models.device_weights import Heads, PackedLinear, Watch, constant, device_tensor, plain
from colora_ms.models.paged_cache import device_dim
from colora_ms.models.replacing import replacements
from colora_ms.models.rope import rope_tables


class DeviceNorm(nn.Cell):
    """RmsNorm, alone or behind the addition of the residual."""

    def __init__(self, name: str, cell: nn.Cell, dtype: Any) -> None:
        super().__init__()
        self._sources, self._watch = [cell], Watch([cell])  # a list: no child of this Cell
        self.gamma = constant(cell.base_values()["weight"], dtype, f"{name}.weight")
        self.eps = float(cell.eps.asnumpy())

    def refresh(self, trained: bool) -> None:
        """As :meth:`PackedLinear.refresh`."""
        if self._watch.changed(trained):
            values = self._sources[0].base_values()["weight"]
            self.gamma.set_data(device_tensor(values, self.gamma.dtype, self.gamma.name))

    def construct(self, x: Tensor) -> Tensor:
        """x: (tokens, ..., width) -> the same shape."""
        return ascend_builtin.rms_norm(x, self.gamma, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple:
        """(the norm of x + residual, that sum)."""
        return ascend_builtin.add_rms_norm(x, residual, self.gamma, self.eps)


class DeviceLayer(nn.Cell):
    """One layer; see the head of this module."""

    def __init__(self, name: str, config: Any, layer: nn.Cell, dtype: Any) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads, self.kv_heads, self.dim = (config.num_attention_heads, config.num_key_value_heads,
                                               device_dim(config.head_dim))
        self.widths = (self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim)
        self.scale = float(config.head_dim ** -0.5)
        query, key = (Heads(count, config.head_dim, self.dim) for count in (self.heads, self.kv_heads))
        self.before = DeviceNorm(f"{name}.input_layernorm", layer.input_layernorm, dtype)
        self.after = DeviceNorm(f"{name}.post_attention_layernorm", layer.post_attention_layernorm, dtype)
        self.qkv = PackedLinear(f"{name}.qkv", (attention.q_proj, attention.k_proj, attention.v_proj), dtype,
                                (query, key, key))
        self.out = PackedLinear(f"{name}.o_proj", (attention.o_proj,), dtype, inputs=query)
        self.mlp = device_feed_forward(name, layer.feed_forward, dtype)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = DeviceNorm(f"{name}.q_norm", attention.q_norm, dtype)
            self.k_norm = DeviceNorm(f"{name}.k_norm", attention.k_norm, dtype)

    @property
    def linears(self) -> list[PackedLinear]:
        """All linears but routed experts."""
        return [self.qkv, self.out, *self.mlp.linears]

    def heads_of(self, h: Tensor, slots: tuple, turn: tuple) -> tuple:
        """h: (tokens, hidden); turn: (cos, sin) of the tokens, and the graph's batch_valid_length -> rotated q, k, and
        v, each (tokens, heads * dim)."""
        q, k, v = ascend_builtin.split(self.qkv(h, slots), self.widths)
        if self.qk_norm:
            tokens = h.shape[0]
            q = self.q_norm(ascend_builtin.reshape(q, (tokens, self.heads, self.dim)))
            k = self.k_norm(ascend_builtin.reshape(k, (tokens, self.kv_heads, self.dim)))
            q = ascend_builtin.reshape(q, (tokens, self.widths[0]))
            k = ascend_builtin.reshape(k, (tokens, self.widths[1]))
        q, k = ascend_builtin.rotary(q, k, turn[0], turn[1], turn[2])
        return q, k, v

    def append(self, k: Tensor, v: Tensor, keys: Parameter, values: Parameter, slot_mapping: Tensor) -> Tensor:
        """Write keys and values into the cache; what reads it must depend on the result."""
        shape = (1, k.shape[0], k.shape[1])
        k, v = ascend_builtin.reshape(k, shape), ascend_builtin.reshape(v, shape)
        return ascend_builtin.reshape_and_cache(k, v, keys, values, slot_mapping)

    def increment(self, h: Tensor, slots: tuple, turn: tuple, keys: Parameter, values: Parameter,
                  places: tuple) -> Tensor:
        """Attention of tokens that are a row each; places: (slot mapping, block tables, lengths, query lengths)."""
        q, k, v = self.heads_of(h, slots, turn)
        q = ops.depend(q, self.append(k, v, keys, values, places[0]))
        return ascend_builtin.paged_attention(q, keys, values, places[1], places[2], places[3], None, self.heads,
                                              self.scale, self.kv_heads)

    def prefill(self, h: Tensor, slots: tuple, turn: tuple, keys: Parameter, values: Parameter,
                places: tuple) -> Tensor:
        """Attention of beginnings of rows; places: (slot mapping, mask); their lengths are the graph's, by name."""
        q, k, v = self.heads_of(h, slots, turn)
        q = ops.depend(q, self.append(k, v, keys, values, places[0]))
        return ascend_builtin.flash_attention(q, k, v, places[1], self.heads, self.scale)

    def behind(self, h: Tensor, residual: Tensor, slots: tuple) -> tuple:
        """What comes behind the attention -> (the block's output, the residual)."""
        h, residual = self.after.add(self.out(h, slots), residual)
        return self.mlp(h, slots), residual


class DeviceDecoder(nn.Cell):
    """A decoder's packed weights, and its graph for flat batches.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder` for which ``device_form.why_not`` has no reason.
        dtype: ``mindspore.float16`` or ``bfloat16``, in which everything is computed; logits are float32.
    """

    def __init__(self, decoder: Any, dtype: Any) -> None:
        super().__init__()
        bind()
        model = decoder.model
        self.vocab = decoder.config.vocab_size
        self._embed = [plain(model.embed_tokens)]
        self._watch = Watch(self._embed)
        self.layers = nn.CellList([DeviceLayer(f"device.layers.{i}", decoder.config, layer, dtype)
                                   for i, layer in enumerate(model.layers)])
        self.norm = DeviceNorm("device.norm", model.norm, dtype)
        self.head = PackedLinear("device.lm_head", (decoder.lm_head,), dtype, prompts=False)
        owners, self.zero = owners_of(self.packed[:-1], dtype)
        self.owners, self.masked = ParameterTuple(owners), bool(owners)
        tied = decoder.config.tie_word_embeddings and not self.head.integer  # rows of integers cannot be gathered
        self.table = self.head.weight if tied else constant(self._embed[0].base_values()["weight"], dtype,
                                                                "device.embed_tokens")
        head = Heads(1, decoder.config.head_dim, device_dim(decoder.config.head_dim))
        self.cos, self.sin = (
            constant(head.spread(np.concatenate((half, half), 1), 1), dtype, f"device.rope.{name}")
            for name, half in zip(("cos", "sin"), rope_tables(decoder.config, decoder.max_positions)))
        self._seen, self.made_at = changes(), replacements()

    @property
    def packed(self) -> list[PackedLinear]:
        """All linears but routed experts."""
        return [one for layer in self.layers for one in layer.linears] + [self.head]

    @property
    def adapted(self) -> bool:
        """Whether any linear has adapters."""
        return any(one.adapted for one in self.packed)

    @property
    def slots(self) -> int:
        """Slots of the bank of adapters; 0: there is none."""
        return max((one.slots for one in self.packed), default=0)

    def refresh(self, trained: bool = False) -> None:
        """Read again what was written in the decoder since the last time; trained: also what has gradients."""
        if trained or changes() != self._seen:
            self._seen = changes()
            for one in self.packed:
                one.refresh(trained)
            for _, cell in self.cells_and_names():
                if isinstance(cell, (DeviceNorm, DeviceExperts)):
                    cell.refresh(trained)
            if self._watch.changed(trained) and self.table is not self.head.weight:
                values = self._embed[0].base_values()["weight"]
                self.table.set_data(device_tensor(values, self.table.dtype, self.table.name))

    def construct(self, tokens: Tensor, positions: Tensor, slots: tuple, lengths: Tensor, keys: tuple, values: tuple,
                  places: tuple, read: Tensor) -> Tensor:
        """Logits (R, vocab) float32 behind some tokens of a flat batch.

        Args:
            tokens, positions: (T,) int32; slots: (), ((T,) int32,), or for prompts what ``device_prompts.prepared``
                takes.
            lengths: the graph's batch_valid_length; keys, values: the cache's Parameters, one a layer.
            places: see :meth:`DeviceLayer.increment` (four) and :meth:`DeviceLayer.prefill` (two).
            read: (R,) int32, the tokens whose logits are wanted.
        """
        x = ascend_builtin.embedding(self.table, tokens)
        turn = (ascend_builtin.embedding(self.cos, positions), ascend_builtin.embedding(self.sin, positions), lengths)
        if len(slots) == 2:
            slots = prepared(slots, self.owners if self.masked else (), self.zero)
        residual = x
        for i, layer in enumerate(self.layers):
            if i == 0:
                h = layer.before(x)
            else:
                h, residual = layer.before.add(x, residual)
            if len(places) == 2:
                h = layer.prefill(h, slots, turn, keys[i], values[i], places)
            else:
                h = layer.increment(h, slots, turn, keys[i], values[i], places)
            x, residual = layer.behind(h, residual, slots)
        return self.logits(x, residual, slots, read)

    def logits(self, x: Tensor, residual: Tensor, slots: tuple, read: Tensor) -> Tensor:
        """The head over the tokens that are wanted."""
        h, residual = self.norm.add(x, residual)
        if len(slots) > 0:
            slots = (ascend_builtin.embedding(slots[0], read),)
        return self.head(ascend_builtin.embedding(h, read), slots).astype(ms.float32)
