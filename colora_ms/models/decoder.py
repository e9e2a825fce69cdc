"""One decoder-only model for all families, told apart by their config and their family's record.

The Cell tree has Hugging Face's names, so a parameter's name is its name in the checkpoint
(``model.layers.0.self_attn.q_proj.weight``). Rows carry an adapter slot each; a plain model ignores it.
"""

from mindspore import Parameter, Tensor, nn, ops

from colora_ms.kernels import fuses_step
from colora_ms.kernels.layer_form import ACTIVATIONS, MODEL_REAL, MODEL_WHOLE, NORM_KINDS, form_tensors
from colora_ms.kernels.operands import flat_layer, flat_linears, linear_of
from colora_ms.models.attention import Attention
from colora_ms.models.builder import Builder
from colora_ms.models.families import family
from colora_ms.models.feed_forward import Mlp, RoutedMlp
from colora_ms.models.head import capped
from colora_ms.models.layers import Linear
from colora_ms.models.rope import default_positions, local_rope_tables, rope_tables

#: Places of a layer's norms.
_PLACES = ("before_attention", "after_attention", "before_mlp", "after_mlp")


class DecoderLayer(nn.Cell):
    """Attention and MLP with their norms, where the family has them; carries the residual stream beside the last
    block's output."""

    def __init__(self, config, build, layer):
        super().__init__()
        prefix, record = f"model.layers.{layer}", family(config.model_type)
        parts = record.routing.parts if record.routing else ()
        self.self_attn = Attention(config, build, layer)
        self.mlp_name = record.mlp
        mlp = f"{prefix}.{record.mlp}"
        setattr(self, record.mlp, RoutedMlp(config, build, mlp, parts, record.activation) if config.sparse(layer)
                else Mlp(build, mlp, activation=record.activation))
        self.norm_names = {place: getattr(record.norms, place) for place in _PLACES}
        for name in self.norm_names.values():
            if name:
                setattr(self, name, build.norm(f"{prefix}.{name}"))
        self.norms_attention, self.norms_attended, self.norms_mlp, self.norms_output = (
            bool(self.norm_names[place]) for place in _PLACES)
        self.parallel, self.branch_factor = record.parallel, config.branch_factor
        # number of the model's rotary table, -1: none
        local = config.rope_local_theta is not None and config.slides(layer)
        self.rotary_table = -1 if not config.turns(layer) else 1 if local else 0
        self.norm_kind, self.activation = NORM_KINDS.index(record.norm), ACTIVATIONS.index(record.activation)

    @property
    def feed_forward(self) -> nn.Cell:
        """The MLP, whatever its name."""
        return getattr(self, self.mlp_name)

    @property
    def before_attention(self) -> nn.Cell:
        """The norm that attention reads."""
        return getattr(self, self.norm_names["before_attention"])

    @property
    def after_attention(self) -> nn.Cell:
        """The norm of attention's output."""
        return getattr(self, self.norm_names["after_attention"])

    @property
    def before_mlp(self) -> nn.Cell:
        """The norm that the MLP reads."""
        return getattr(self, self.norm_names["before_mlp"])

    @property
    def after_mlp(self) -> nn.Cell:
        """The norm of the MLP's output."""
        return getattr(self, self.norm_names["after_mlp"])

    def construct(self, x: Tensor, residual: Tensor, rows: tuple, cos: Tensor, sin: Tensor) -> tuple:
        """x, residual: (rows, tokens, hidden) float32 -> the block's output and the residual, without a cache."""
        h, residual = self.enter(x, residual, rows)
        return self.leave(h, self.self_attn(h, rows, cos, sin), residual, rows)

    def paged(self, x: Tensor, residual: Tensor, rows: tuple, cos: Tensor, sin: Tensor, keys: Parameter,
              values: Parameter, places: tuple) -> tuple:
        """As :meth:`construct`, over the paged cache; see :meth:`Attention.paged`."""
        h, residual = self.enter(x, residual, rows)
        return self.leave(h, self.self_attn.paged(h, rows, cos, sin, keys, values, places), residual, rows)

    def enter(self, x: Tensor, residual: Tensor, rows: tuple) -> tuple:
        """What attention reads, and the residual with x added."""
        if self.norms_attention:
            return self.before_attention.add(x, residual, rows)
        total = x + residual
        return total, total

    def leave(self, read: Tensor, attended: Tensor, residual: Tensor, rows: tuple) -> tuple:
        """The layer's output and the residual, from what attention has read and made."""
        if self.norms_attended:
            attended = self.after_attention(attended, rows)
        attended = self.branch(attended)
        if self.parallel:
            return attended + self.second_half(read, rows), residual
        if self.norms_mlp:
            read, residual = self.before_mlp.add(attended, residual, rows)
        else:
            residual = attended + residual
            read = residual
        return self.second_half(read, rows), residual

    def second_half(self, x: Tensor, rows: tuple) -> Tensor:
        """What the MLP adds."""
        x = self.feed_forward(x, rows)
        if self.norms_output:
            x = self.after_mlp(x, rows)
        return self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """x times the branches' factor."""
        if self.branch_factor != 1:
            return x * self.branch_factor
        return x

    @property
    def fusible(self) -> bool:
        """Whether ``layer_operands()`` tells all that the layer computes, so that layers can share one kernel call."""
        norms = [getattr(self, name) for name in self.norm_names.values() if name]
        return all(cell.fusible for cell in (*self.self_attn.cells(), *self.feed_forward.cells(), *norms))

    def layer_operands(self, keys: Parameter, values: Parameter) -> tuple:
        """The layer's tensors in the table of weights of :func:`colora_ms.kernels.step`."""
        parts = {place: getattr(self, name) for place, name in self.norm_names.items() if name}
        parts = {place: (norm.weight, norm.eps) for place, norm in parts.items()}
        form = {"norm": self.norm_kind, "parallel": int(self.parallel), "activation": self.activation,
                "rotary_table": self.rotary_table, "branch_factor": self.branch_factor,
                **self.self_attn.numbers(), **self.feed_forward.numbers()}
        return flat_layer(form, {**parts, **self.self_attn.parts(keys, values), **self.feed_forward.parts()})


class DecoderModel(nn.Cell):
    """Embedding, layers and last norm: token ids to hidden states."""

    def __init__(self, config, build, max_positions):
        super().__init__()
        self.embed_tokens = build.embedding("model.embed_tokens")
        self.layers = nn.CellList([DecoderLayer(config, build, i) for i in range(config.num_hidden_layers)])
        self.norm = build.norm("model.norm")
        self.embedding_scale, self.hidden_scale = config.embedding_scale, config.hidden_scale
        cos, sin = rope_tables(config, max_positions)
        self.rope_cos = Parameter(Tensor(cos), name="rope.cos", requires_grad=False)
        self.rope_sin = Parameter(Tensor(sin), name="rope.sin", requires_grad=False)
        self.local = config.rope_local_theta is not None
        if self.local:
            cos, sin = local_rope_tables(config, max_positions)
            self.local_cos = Parameter(Tensor(cos), name="rope.local_cos", requires_grad=False)
            self.local_sin = Parameter(Tensor(sin), name="rope.local_sin", requires_grad=False)

    def tables(self) -> tuple:
        """The pairs of rotary tables, one after another."""
        if self.local:
            return (self.rope_cos, self.rope_sin, self.local_cos, self.local_sin)
        return (self.rope_cos, self.rope_sin)

    def embedded(self, ids: Tensor, rows: tuple) -> Tensor:
        """Rows of the embedding as the first layer reads them."""
        x = self.embed_tokens(ids, rows)
        if self.embedding_scale != 1:
            x = x * self.embedding_scale
        return x

    def table_of(self, number: int) -> tuple:
        """Cosines and sines of a layer's rotary table; of none, ones and zeros."""
        if number == 1:
            return self.local_cos, self.local_sin
        if number == 0:
            return self.rope_cos, self.rope_sin
        return ops.ones_like(self.rope_cos), ops.zeros_like(self.rope_sin)

    def last(self, x: Tensor, residual: Tensor, rows: tuple) -> Tensor:
        """What the head reads."""
        x, residual = self.norm.add(x, residual, rows)
        if self.hidden_scale != 1:
            x = x * self.hidden_scale
        return x

    def construct(self, ids: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        """See :meth:`Decoder.hidden`."""
        rows = (slots, lengths)
        x = self.embedded(ids, rows)
        residual = ops.zeros_like(x)
        for layer in self.layers:
            cos, sin = self.table_of(layer.rotary_table)
            x, residual = layer(x, residual, rows, cos, sin)
        return self.last(x, residual, rows)

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
        x = self.embedded(tokens.reshape(-1, 1), rows)
        residual = ops.zeros_like(x)
        keys, values = cache.keys, cache.values
        for i, layer in enumerate(self.layers):
            cos, sin = self.table_of(layer.rotary_table)
            x, residual = layer.paged(x, residual, rows, cos, sin, keys[i], values[i], places)
        return self.last(x, residual, rows)


class Decoder(nn.Cell):
    """A decoder-only language model.

    Args:
        config: :class:`colora_ms.models.config.DecoderConfig`.
        weights: mapping from Hugging Face names to what is stored under them
            (:class:`colora_ms.models.formats.StoredWeight` or ``StoredFactors``) or to float arrays, read one at a
            time; or None for random weights (normal, standard deviation 0.02, seed 0).
        weight_format: "auto" or name of the format of the linears, the embedding and the head, see
            :mod:`colora_ms.models.formats`; weights that are stored as our own integers stay as they are.
        max_positions: rows of the rotary tables, the longest sequence; by default the config's maximum, of a model of
            longrope its original length. (Longer ones have other frequencies at all positions.)

    Attributes:
        logit_cap: c of c * tanh(logit / c), which every user of ``lm_head`` applies, see :mod:`colora_ms.models.head`;
            0: none.

    Rows: every construct takes ``slots`` (rows,) int32, the adapter slot of each row, -1 for none.
    """

    def __init__(self, config, weights=None, weight_format="auto", max_positions=None):
        super().__init__()
        self.config = config
        self.weight_format = weight_format
        self.max_positions = max_positions or default_positions(config)
        self.logit_cap = float(config.logit_cap or 0)
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
        for parameter, name in zip(self.model.tables(), ("cos", "sin", "local_cos", "local_sin")):
            parameter.name = f"rope.{name}"

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
        return capped(self.lm_head(self.hidden(ids, lengths, slots), (slots, lengths)), self.logit_cap)

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
        logits = self.lm_head(x, (read_slots, ops.ones_like(read_slots))).reshape(read.shape[0], -1)
        return capped(logits, self.logit_cap)

    @property
    def fused_step(self) -> bool:
        """Whether flat batches go through one operator; see ``kernels.step`` and :meth:`step_operands`."""
        model = self.model
        cells = [model.embed_tokens, model.norm, self.lm_head, *model.layers]
        return fuses_step() and all(cell.fusible for cell in cells)

    def step_operands(self, cache: nn.Cell) -> tuple:
        """The model's tensors in the table of weights of :func:`colora_ms.kernels.step`."""
        model = self.model
        embed, norm, tables = model.embed_tokens, model.norm, model.tables()
        form = {"norm": NORM_KINDS.index(family(self.config.model_type).norm), "rotary_tables": len(tables) // 2,
                "embedding_factor": model.embedding_scale, "hidden_factor": model.hidden_scale,
                "logit_cap": self.logit_cap}
        ends = flat_linears((linear_of(embed.base()), self.lm_head.operands()))
        return (form_tensors(MODEL_WHOLE, MODEL_REAL, form) + tables + (norm.weight, norm.eps) + ends
                + model.layer_operands(cache))
