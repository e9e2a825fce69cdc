"""Grouped-query self-attention of a decoder's layer."""

from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import bind, causal_attention, causal_attention_reference, multi_lora_linear, paged_attention
from colora_ms.kernels.layer_form import channel_order
from colora_ms.models.families import family


class Attention(nn.Cell):
    """Grouped-query self-attention with rotary position embedding; the config says how.

    The operators take channels that turn together half a head apart. Where a family has them elsewhere, or turns only
    some, q and k are brought into that order, which changes no score.
    """

    def __init__(self, config, build, layer):
        super().__init__()
        bind()
        prefix, record = f"model.layers.{layer}.self_attn", family(config.model_type)
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = build.linear(f"{prefix}.q_proj")
        self.k_proj = build.linear(f"{prefix}.k_proj")
        self.v_proj = build.linear(f"{prefix}.v_proj")
        self.o_proj = build.linear(f"{prefix}.o_proj")
        self.qk_norm, self.whole_norm = config.qk_norm, record.whole_qk_norm
        if config.qk_norm:
            self.q_norm = build.norm(f"{prefix}.q_norm")
            self.k_norm = build.norm(f"{prefix}.k_norm")
        usual = config.head_dim ** -0.5
        self.window = config.window if config.slides(layer) else 0
        self.cap = float(config.attention_cap or 0)
        self.factor = 0.0 if config.score_scale == usual else config.score_scale  # 0: the usual one
        self.balance = config.score_scale / usual  # for operators that know the usual one only
        self.form = Tensor([float(self.window), self.cap, self.factor])
        self.rotary_width, self.rotary_pairs = config.rotary_dim, record.rotary_pairs
        order = channel_order(config.head_dim, config.rotary_dim, record.rotary_pairs) if config.turns(layer) else []
        self.reorders = bool(order)
        self.order = Tensor(order or [0])

    def project(self, x: Tensor, rows: tuple) -> tuple:
        """x: (rows, tokens, hidden) -> q (rows, tokens, heads * head_dim), k, v (rows, tokens, kv_heads * head_dim)."""
        if self.q_proj.fusible and self.k_proj.fusible and self.v_proj.fusible:
            linears = (self.q_proj.operands(), self.k_proj.operands(), self.v_proj.operands())
            q, k, v = multi_lora_linear(x, rows[0], *linears)
        else:
            q, k, v = self.q_proj(x, rows), self.k_proj(x, rows), self.v_proj(x, rows)
        if self.qk_norm and self.whole_norm:
            q, k = self.q_norm(q, rows), self.k_norm(k, rows)
        elif self.qk_norm:
            q = self.norm_heads(q, self.q_norm, self.num_heads, rows)
            k = self.norm_heads(k, self.k_norm, self.num_kv_heads, rows)
        if self.reorders:
            q, k = self.in_order(q, self.num_heads), self.in_order(k, self.num_kv_heads)
        return q, k, v

    def norm_heads(self, x: Tensor, norm: nn.Cell, heads: int, rows: tuple) -> Tensor:
        """Norm of each head of x (rows, tokens, heads * head_dim)."""
        shape = x.shape
        return norm(x.reshape(shape[0], shape[1], heads, self.head_dim), rows).reshape(shape)

    def in_order(self, x: Tensor, heads: int) -> Tensor:
        """The channels of each head of x in the operators' order."""
        shape = x.shape
        return ops.gather(x.reshape(shape[0], shape[1], heads, self.head_dim), self.order, 3).reshape(shape)

    def construct(self, x: Tensor, rows: tuple, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention without a cache (training). A cap, or a window shorter than the rows, leaves the operator
        for built-in ones, whose memory grows with the square of the tokens."""
        q, k, v = self.project(x, rows)
        if self.cap > 0 or 0 < self.window < x.shape[1]:
            out = causal_attention_reference(q, k, v, cos, sin, rows[1], self.window, self.cap, self.factor)
        else:
            if self.factor > 0:
                q = q * self.balance
            out = causal_attention(q, k, v, cos, sin, rows[1])
        return self.o_proj(out, rows)

    def paged(self, x: Tensor, rows: tuple, cos: Tensor, sin: Tensor, keys: Parameter, values: Parameter,
              places: tuple) -> Tensor:
        """x: (tokens, 1, hidden), a flat batch; see ``kernels.paged_attention``. places: (rows, positions, tables)."""
        q, k, v = self.project(x, rows)
        tokens = x.shape[0]
        out = paged_attention(q.reshape(tokens, -1), k.reshape(tokens, -1), v.reshape(tokens, -1), cos, sin, keys,
                              values, places[0], places[1], places[2], self.window, self.cap, self.factor, self.form)
        return self.o_proj(out.expand_dims(1), rows)

    def cells(self) -> list:
        """The Cells that :meth:`parts` names the tensors of."""
        found = [self.q_proj, self.k_proj, self.v_proj, self.o_proj]
        return found + [self.q_norm, self.k_norm] if self.qk_norm else found

    def parts(self, keys: Parameter, values: Parameter) -> dict:
        """Its parts of a layer, see ``kernels.operands.flat_layer``."""
        found = {name: getattr(self, name).operands() for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        found.update(k_cache=(keys,), v_cache=(values,))
        if self.qk_norm:
            found.update({name: (getattr(self, name).weight, getattr(self, name).eps) for name in ("q_norm", "k_norm")})
        return found

    def numbers(self) -> dict:
        """Its numbers of a layer's form, see ``kernels.layer_form``."""
        return {"whole_qk_norm": int(self.whole_norm), "window": self.window, "rotary_width": self.rotary_width,
                "rotary_pairs": int(self.rotary_pairs), "query_factor": self.factor,
                "score_cap": self.cap}
