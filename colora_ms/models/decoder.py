"""One decoder-only model for the Llama family: Llama, SmolLM2, Qwen2/2.5 and Qwen3, told apart by their config.

The Cell tree has Hugging Face's names, so a parameter's name is its name in the checkpoint
(``model.layers.0.self_attn.q_proj.weight``). Rows carry an adapter slot each; a plain model ignores it.
"""

from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import (
    bind,
    causal_attention,
    fuses_step,
    multi_lora_linear,
    paged_attention,
    swiglu,
)
from colora_ms.kernels.operands import flat_layer, flat_linears, linear_of
from colora_ms.models.builder import Builder
from colora_ms.models.layers import Linear
from colora_ms.models.rope import rope_tables


class Attention(nn.Cell):
    """Grouped-query self-attention with rotary position embedding; q/k norm where the config has it (Qwen3)."""

    def __init__(self, config, build, layer):
        super().__init__()
        bind()
        prefix = f"model.layers.{layer}.self_attn"
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = build.linear(f"{prefix}.q_proj")
        self.k_proj = build.linear(f"{prefix}.k_proj")
        self.v_proj = build.linear(f"{prefix}.v_proj")
        self.o_proj = build.linear(f"{prefix}.o_proj")
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = build.norm(f"{prefix}.q_norm")
            self.k_norm = build.norm(f"{prefix}.k_norm")

    def project(self, x: Tensor, rows: tuple) -> tuple:
        """x: (rows, tokens, hidden) -> q (rows, tokens, heads * head_dim), k, v (rows, tokens, kv_heads * head_dim)."""
        if self.q_proj.fusible and self.k_proj.fusible and self.v_proj.fusible:
            linears = (self.q_proj.operands(), self.k_proj.operands(), self.v_proj.operands())
            q, k, v = multi_lora_linear(x, rows[0], *linears)
        else:
            q, k, v = self.q_proj(x, rows), self.k_proj(x, rows), self.v_proj(x, rows)
        if self.qk_norm:
            q = self.norm_heads(q, self.q_norm, self.num_heads, rows)
            k = self.norm_heads(k, self.k_norm, self.num_kv_heads, rows)
        return q, k, v

    def norm_heads(self, x: Tensor, norm: nn.Cell, heads: int, rows: tuple) -> Tensor:
        """RMS norm of each head of x (rows, tokens, heads * head_dim)."""
        shape = x.shape
        return norm(x.reshape(shape[0], shape[1], heads, self.head_dim), rows).reshape(shape)

    def construct(self, x: Tensor, rows: tuple, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention without a cache (training)."""
        q, k, v = self.project(x, rows)
        return self.o_proj(causal_attention(q, k, v, cos, sin, rows[1]), rows)

    def paged(self, x: Tensor, rows: tuple, cos: Tensor, sin: Tensor, keys: Parameter, values: Parameter,
              places: tuple) -> Tensor:
        """x: (tokens, 1, hidden), a flat batch; see ``kernels.paged_attention``. places: (rows, positions, tables)."""
        q, k, v = self.project(x, rows)
        tokens = x.shape[0]
        out = paged_attention(q.reshape(tokens, -1), k.reshape(tokens, -1), v.reshape(tokens, -1), cos, sin, keys,
                              values, places[0], places[1], places[2])
        return self.o_proj(out.expand_dims(1), rows)


class Mlp(nn.Cell):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, build, layer):
        super().__init__()
        prefix = f"model.layers.{layer}.mlp"
        self.gate_proj = build.linear(f"{prefix}.gate_proj")
        self.up_proj = build.linear(f"{prefix}.up_proj")
        self.down_proj = build.linear(f"{prefix}.down_proj")

    def construct(self, x: Tensor, rows: tuple) -> Tensor:
        """x: (rows, tokens, hidden) float32 -> the same shape."""
        if self.gate_proj.fusible and self.up_proj.fusible:
            gate, up = multi_lora_linear(x, rows[0], self.gate_proj.operands(), self.up_proj.operands())
        else:
            gate, up = self.gate_proj(x, rows), self.up_proj(x, rows)
        return self.down_proj(swiglu(gate, up), rows)


class DecoderLayer(nn.Cell):
    """Pre-norm attention and MLP; carries the residual stream beside the last block's output."""

    def __init__(self, config, build, layer):
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.self_attn = Attention(config, build, layer)
        self.mlp = Mlp(build, layer)
        self.input_layernorm = build.norm(f"{prefix}.input_layernorm")
        self.post_attention_layernorm = build.norm(f"{prefix}.post_attention_layernorm")

    def construct(self, x: Tensor, residual: Tensor, rows: tuple, cos: Tensor, sin: Tensor) -> tuple:
        """x, residual: (rows, tokens, hidden) float32 -> the block's output and the residual, without a cache."""
        h, residual = self.input_layernorm.add(x, residual, rows)
        h = self.self_attn(h, rows, cos, sin)
        h, residual = self.post_attention_layernorm.add(h, residual, rows)
        return self.mlp(h, rows), residual

    def paged(self, x: Tensor, residual: Tensor, rows: tuple, cos: Tensor, sin: Tensor, keys: Parameter,
              values: Parameter, places: tuple) -> tuple:
        """As :meth:`construct`, over the paged cache; see :meth:`Attention.paged`."""
        h, residual = self.input_layernorm.add(x, residual, rows)
        h = self.self_attn.paged(h, rows, cos, sin, keys, values, places)
        h, residual = self.post_attention_layernorm.add(h, residual, rows)
        return self.mlp(h, rows), residual

    @property
    def fusible(self) -> bool:
        """Whether ``layer_operands()`` tells all that the layer computes, so that layers can share one kernel call."""
        attention, mlp = self.self_attn, self.mlp
        cells = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj,
                 mlp.down_proj, self.input_layernorm, self.post_attention_layernorm]
        cells += [attention.q_norm, attention.k_norm] if attention.qk_norm else []
        return all(cell.fusible for cell in cells)

    def layer_operands(self, keys: Parameter, values: Parameter) -> tuple:
        """The layer's tensors in the table of weights of :func:`colora_ms.kernels.step`."""
        attention, mlp = self.self_attn, self.mlp
        before, after = self.input_layernorm, self.post_attention_layernorm
        q_norm, k_norm = (), ()
        if attention.qk_norm:
            q_norm = (attention.q_norm.weight, attention.q_norm.eps)
            k_norm = (attention.k_norm.weight, attention.k_norm.eps)
        return flat_layer((before.weight, before.eps), attention.q_proj.operands(), attention.k_proj.operands(),
                          attention.v_proj.operands(), q_norm, k_norm, (keys, values), attention.o_proj.operands(),
                          (after.weight, after.eps), mlp.gate_proj.operands(), mlp.up_proj.operands(),
                          mlp.down_proj.operands())


class DecoderModel(nn.Cell):
    """Embedding, layers and last norm: token ids to hidden states."""

    def __init__(self, config, build, max_positions):
        super().__init__()
        self.embed_tokens = build.embedding("model.embed_tokens")
        self.layers = nn.CellList([DecoderLayer(config, build, i) for i in range(config.num_hidden_layers)])
        self.norm = build.norm("model.norm")
        cos, sin = rope_tables(config, max_positions)
        self.rope_cos = Parameter(Tensor(cos), requires_grad=False)
        self.rope_sin = Parameter(Tensor(sin), requires_grad=False)

    def construct(self, ids: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """See :meth:`Decoder.hidden`."""
        rows = (slots, lengths)
        x = self.embed_tokens(ids, rows)
        residual = ops.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, rows, self.rope_cos, self.rope_sin)
        x, residual = self.norm.add(x, residual, rows)
        return x

    def layer_operands(self, cache: nn.Cell) -> tuple:
        """The tensors of all layers in the table of weights of :func:`colora_ms.kernels.step`."""
        keys, values = cache.keys, cache.values
        operands = ()
        for i, layer in enumerate(self.layers):
            operands = operands + layer.layer_operands(keys[i], values[i])
        return operands

    def paged(self, tokens: Tensor, slots: Tensor, cache: nn.Cell, places: tuple) -> Tensor:
        """Hidden states of a flat batch, (tokens, 1, hidden) float32; arguments as for :meth:`Decoder.paged`."""
        lengths = ops.ones_like(tokens)
        rows = (slots, lengths)
        x = self.embed_tokens(tokens.reshape(-1, 1), rows)
        residual = ops.zeros_like(x)
        keys, values = cache.keys, cache.values
        for i, layer in enumerate(self.layers):
            x, residual = layer.paged(x, residual, rows, self.rope_cos, self.rope_sin, keys[i], values[i], places)
        x, residual = self.norm.add(x, residual, rows)
        return x

class Decoder(nn.Cell):
    """A decoder-only language model.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`.
        weights: mapping from Hugging Face names to what is stored under them
            (:class:`colora_ms.models.formats.StoredWeight` or ``StoredFactors``) or to float arrays, read one at a
            time; or None for random weights (normal, standard deviation 0.02, seed 0).
        weight_format: "auto" or name of the format of the linears, the embedding and the head, see
            :mod:`colora_ms.models.formats`; weights that are stored as our own integers stay as they are.
        max_positions: rows of the rotary tables, the longest sequence; by default the config's
            maximum.

    Rows: every construct takes ``slots`` (rows,) int32, the adapter slot of each row, -1 for none.
    """

    def __init__(self, config, weights=None, weight_format="auto", max_positions=None):
        super().__init__()
        self.config = config
        self.weight_format = weight_format
        self.max_positions = max_positions or config.max_position_embeddings
        build = Builder(config, weights, weight_format)
        self.model = DecoderModel(config, build, self.max_positions)
        if config.tie_word_embeddings:
            embed = self.model.embed_tokens
            scale = embed.weight_scale if embed.format.scaled else None
            self.lm_head = Linear(embed.weight, config.hidden_size, config.vocab_size, weight_scale=scale,
                                  weight_format=embed.format)
        else:
            self.lm_head = build.linear("lm_head")
        # A Cell renames the parameters that are put into it; the names of the checkpoint are the ones that count.
        for parameter, name in build.names.values():
            parameter.name = name
        self.model.rope_cos.name, self.model.rope_sin.name = "rope.cos", "rope.sin"

    def hidden(self, ids: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Hidden states after the last norm, without a cache.

        Args:
            ids: (rows, tokens) int32, padded at the right.
            lengths: (rows,) int32, real tokens of each row; or (rows, segments) int32, the real tokens of the sequences
                that stand in each row one after another (0: none), each as if it had the row to itself.
            slots: (rows,) int32.

        Returns:
            (rows, tokens, hidden) float32; padding positions hold no meaning.
        """
        return self.model(ids, lengths, slots)

    def construct(self, ids: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """Logits of all positions, (rows, tokens, vocab) float32; arguments as :meth:`hidden`."""
        return self.lm_head(self.hidden(ids, lengths, slots), (slots, lengths))

    def paged(self, tokens: Tensor, slots: Tensor, cache: nn.Cell, rows: Tensor, positions: Tensor, tables: Tensor,
              read: Tensor, read_slots: Tensor) -> Tensor:
        """Append a flat batch to the paged cache and return the logits behind some of its tokens.

        Args:
            tokens: (T,) int32; slots: (T,) int32, each token's adapter slot.
            cache: :class:`colora_ms.models.paged_cache.PagedCache`, written in place.
            rows, positions, tables: as for :func:`colora_ms.kernels.paged_attention`.
            read: (R,) int32, the tokens whose logits are wanted; read_slots: (R,) int32, their slots.

        Returns:
            (R, vocab) float32.
        """
        x = ops.gather(self.model.paged(tokens, slots, cache, (rows, positions, tables)), read, 0)  # (R, 1, hidden)
        return self.lm_head(x, (read_slots, ops.ones_like(read_slots))).reshape(read.shape[0], -1)

    @property
    def fused_step(self) -> bool:
        """Whether flat batches go through one operator; see ``kernels.step`` and :meth:`step_operands`."""
        model = self.model
        cells = [model.embed_tokens, model.norm, self.lm_head, *model.layers]
        return fuses_step() and all(cell.fusible for cell in cells)

    def step_operands(self, cache: nn.Cell) -> tuple:
        """The model's tensors in the table of weights of :func:`colora_ms.kernels.step`."""
        model = self.model
        embed, norm = model.embed_tokens, model.norm
        ends = flat_linears((linear_of(embed.base()), self.lm_head.operands()))
        return (model.rope_cos, model.rope_sin, norm.weight, norm.eps) + ends + model.layer_operands(cache)
