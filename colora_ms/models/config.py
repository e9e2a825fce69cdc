"""The configuration of a decoder, with Hugging Face's names.

``DecoderConfig.from_hf`` reads a ``config.json`` of a family that ``families`` has a record of, ``to_hf`` writes one
(:mod:`colora_ms.models.config_json`). What this package does not implement is refused, never ignored. Pure Python.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

from colora_ms.errors import ConfigError, short
from colora_ms.models import config_json
from colora_ms.models.families import family, find_family, unsupported
from colora_ms.models.rope import normalize_scaling

# Upper bounds far above every released model, so that a damaged config cannot ask for terabytes.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
    "max_position_embeddings": 1 << 27,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of one decoder-only model; checked when it is built.

    Raises:
        ConfigError: from the constructor, ``from_hf`` and ``validate``; lists every problem.
    """

    model_type: str               # a family of ``families.FAMILIES``
    vocab_size: int               # rows of the embedding (may exceed the tokenizer's ids)
    hidden_size: int
    intermediate_size: int        # rows of gate_proj and up_proj
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int      # grouped-query attention; divides num_attention_heads
    head_dim: int                 # even; need not be hidden_size / num_attention_heads
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Optional[dict] = dataclasses.field(default=None, hash=False)  # normalized, or None
    tie_word_embeddings: bool = False
    attention_bias: bool = False      # bias of q_proj, k_proj, v_proj
    attention_out_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False            # bias of gate_proj, up_proj, down_proj
    qk_norm: bool = False             # RMS norm of each query and key head (Qwen3)
    bos_token_id: Optional[int] = None
    eos_token_ids: tuple = ()
    pad_token_id: Optional[int] = None
    torch_dtype: str = "float32"      # information only: how the weights are stored
    # What a family other than Llama may have; its record says which of it.
    window: Optional[int] = None      # positions that a query of a sliding layer sees, itself counted
    sliding_layers: tuple = ()        # bool a layer: whether it has the window; (): none has
    rotary_layers: tuple = ()         # bool a layer: whether it turns queries and keys; (): all do
    partial_rotary: float = 1.0       # share of a head's channels that turn
    rope_local_theta: Optional[float] = None  # base of the sliding layers' own rotary table, which is never scaled
    query_scalar: Optional[float] = None      # scores are multiplied by its root's inverse ...
    score_factor: Optional[float] = None      # ... or by this; without both by head_dim ** -0.5
    attention_cap: Optional[float] = None     # c of c * tanh(score / c)
    logit_cap: Optional[float] = None         # c of c * tanh(logit / c)
    embedding_factor: float = 1.0             # on rows of the embedding
    branch_factor: float = 1.0                # on what attention and MLP add to the residual
    logits_factor: float = 1.0                # logits are multiplied by this ...
    logits_divisor: float = 1.0               # ... and divided by this
    experts: int = 0                  # routed experts of a sparse layer; 0: none
    experts_per_token: int = 0
    expert_size: int = 0              # an expert's width
    shared_size: int = 0              # width of the expert that every token has; 0: none
    normalised_experts: bool = False  # the chosen experts' shares are divided by their sum
    dense_layers: tuple = ()          # numbers of the layers with an MLP of intermediate_size in the experts' place

    def __post_init__(self) -> None:
        scaling, problems = normalize_scaling(self.rope_scaling)
        if not problems:
            object.__setattr__(self, "rope_scaling", scaling)
        if isinstance(self.eos_token_ids, list):
            object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        self.validate()

    def validate(self) -> DecoderConfig:
        """Check all values against each other; returns the config itself.

        Raises:
            ConfigError: one message that lists everything that is wrong.
        """
        problems = self._size_problems()
        if not problems:
            problems += self._relation_problems()
        problems += normalize_scaling(self.rope_scaling)[1]
        if problems:
            raise ConfigError("the model config cannot be used: " + "; ".join(problems))
        return self

    def _size_problems(self):
        problems = []
        if find_family(self.model_type) is None:
            problems.append(unsupported(self.model_type))
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= limit:
                problems.append(f"{name} is {short(value)}, expected an integer from 1 to {limit}")
        for name in ("rms_norm_eps", "rope_theta", "partial_rotary", "rope_local_theta", "query_scalar", "score_factor",
                     "attention_cap", "logit_cap", "embedding_factor", "branch_factor", "logits_factor",
                     "logits_divisor"):
            value = getattr(self, name)
            if value is None and name not in ("rms_norm_eps", "rope_theta"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) \
                    or not math.isfinite(value) or value <= 0:
                problems.append(f"{name} is {short(value)}, expected a positive finite number")
        for name, limit in (("experts", 4096), ("experts_per_token", 4096), ("expert_size", 1 << 20),
                            ("shared_size", 1 << 20)):
            value = getattr(self, name)
            if not _is_int(value) or not 0 <= value <= limit:
                problems.append(f"{name} is {short(value)}, expected an integer from 0 to {limit}")
        for field in dataclasses.fields(self):
            if field.type in (bool, "bool") and not isinstance(getattr(self, field.name), bool):
                problems.append(f"{field.name} is {short(getattr(self, field.name))}, expected "
                                "true or false")
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not _is_int(value):
                problems.append(f"{name} is {short(value)}, expected an integer or null")
        if not isinstance(self.eos_token_ids, tuple) \
                or not all(_is_int(item) for item in self.eos_token_ids):
            problems.append(f"eos_token_id is {short(self.eos_token_ids)}, expected integers")
        return problems

    def _relation_problems(self):
        problems = []
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            problems.append(f"num_attention_heads={heads} is not a multiple of "
                            f"num_key_value_heads={groups}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim} is odd, rotary positions need an even one")
        if self.rope_theta <= 1:
            problems.append(f"rope_theta={self.rope_theta} must be larger than 1")
        problems += self._layer_problems()
        record = family(self.model_type)
        for name, option in record.options().items():
            expected = getattr(self, record.keys()[option]) if isinstance(option, str) else option
            if getattr(self, name) != expected:
                problems.append(f"{name} is {getattr(self, name)}, but {self.model_type} with "
                                f"attention_bias={self.attention_bias} has {expected}")
        return problems

    def _layer_problems(self):
        problems, count = [], self.num_hidden_layers
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            problems.append(f"partial_rotary_factor={self.partial_rotary} of head_dim={self.head_dim} gives "
                            f"{self.rotary_dim} channels, expected an even number from 2 to head_dim")
        for name in ("sliding_layers", "rotary_layers"):
            value = getattr(self, name)
            if value and (len(value) != count or not all(isinstance(one, bool) for one in value)):
                problems.append(f"{name} is {short(value)}, expected true or false for each of {count} layers")
        if any(self.sliding_layers) and (not _is_int(self.window) or self.window < 1):
            problems.append(f"sliding_window is {short(self.window)}, but layer {self.sliding_layers.index(True)} "
                            "slides: expected at least 1 position")
        if self.experts:
            if not 1 <= self.experts_per_token <= self.experts:
                problems.append(f"num_experts_per_tok is {self.experts_per_token}, expected 1 to {self.experts}, the "
                                "experts")
            if self.expert_size < 1:
                problems.append(f"an expert's width is {self.expert_size}, expected at least 1")
        return problems

    # -- what its layers do -------------------------------------------------------------------------------------------

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that turn."""
        return int(self.head_dim * self.partial_rotary)

    @property
    def score_scale(self) -> float:
        """Factor on attention scores."""
        if self.score_factor is not None:
            return float(self.score_factor)
        return float(self.head_dim if self.query_scalar is None else self.query_scalar) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """Factor on rows of the embedding."""
        root = math.sqrt(self.hidden_size) if family(self.model_type).embedding_root else 1.0
        return root * self.embedding_factor

    @property
    def hidden_scale(self) -> float:
        """Factor on what the head reads: that of the logits."""
        return self.logits_factor / self.logits_divisor

    def slides(self, layer: int) -> bool:
        """Whether a layer has the window."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    def turns(self, layer: int) -> bool:
        """Whether a layer turns queries and keys."""
        return not self.rotary_layers or self.rotary_layers[layer]

    def sparse(self, layer: int) -> bool:
        """Whether a layer has routed experts."""
        return self.experts > 0 and layer not in self.dense_layers

    # -- config.json --------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, values: object) -> DecoderConfig:
        """Read the dictionary of a Hugging Face ``config.json``.

        Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``, and
        the newer ``rope_parameters``. A config that wraps one (``text_config``) is read as that. Keys that do not
        change the model's output are skipped.

        Args:
            values: the parsed JSON object.

        Returns:
            DecoderConfig.

        Raises:
            ConfigError: lists all problems: an architecture or setting that is not implemented, missing sizes,
                impossible values.
        """
        return cls(**config_json.read_config_json(values))

    def to_hf(self) -> dict:
        """The dictionary for a Hugging Face ``config.json``; ``from_hf`` reads it back equal."""
        return config_json.write_config_json(self)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors of a checkpoint of this config.

        Returns:
            ``{Hugging Face tensor name: shape}`` in the order of the forward pass; linear weights
            are ``(out, in)``; no ``lm_head.weight`` when the head is tied to the embedding. Linears that the family's
            folders keep as one (``families``) stand apart here.
        """
        record, hidden = family(self.model_type), self.hidden_size
        query, key = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes = {"model.embed_tokens.weight": (self.vocab_size, hidden)}

        def linear(name, rows, columns, bias=False):
            shapes[name + ".weight"] = (rows, columns)
            if bias:
                shapes[name + ".bias"] = (rows,)

        def norm(name, size=hidden):
            if name:
                shapes[name + ".weight"] = (size,)

        def gated(name, inner, parts=("gate_proj", "up_proj", "down_proj"), bias=False):
            for part in parts[:2]:
                linear(f"{name}.{part}", inner, hidden, bias)
            linear(f"{name}.{parts[2]}", hidden, inner, bias)

        places = record.norms
        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}."
            attention, mlp = layer + "self_attn.", layer + record.mlp
            norm(places.before_attention and layer + places.before_attention)
            for part, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
                linear(attention + part, rows, hidden, self.attention_bias)
            if self.qk_norm:
                norm(attention + "q_norm", query if record.whole_qk_norm else self.head_dim)
                norm(attention + "k_norm", key if record.whole_qk_norm else self.head_dim)
            linear(attention + "o_proj", hidden, query, self.attention_out_bias)
            norm(places.after_attention and layer + places.after_attention)
            norm(places.before_mlp and layer + places.before_mlp)
            if self.sparse(index):
                linear(f"{mlp}.gate", self.experts, hidden)
                for number in range(self.experts):
                    gated(f"{mlp}.experts.{number}", self.expert_size, record.routing.parts)
                if self.shared_size:
                    gated(f"{mlp}.shared_expert", self.shared_size)
                    linear(f"{mlp}.shared_expert_gate", 1, hidden)
            else:
                gated(mlp, self.intermediate_size, bias=self.mlp_bias)
            norm(places.after_mlp and layer + places.after_mlp)
        norm("model.norm")
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameter_count(self) -> int:
        """Number of weights of the model (a tied head counts once)."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)
