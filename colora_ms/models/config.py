"""The configuration of a decoder of the Llama family, with Hugging Face's names.

``DecoderConfig.from_hf`` reads a ``config.json`` of Llama (also SmolLM2), Qwen2/2.5 or Qwen3,
``to_hf`` writes one.  What this package does not implement is refused, never ignored.
Pure Python.
"""

import dataclasses
import math

from colora_ms.errors import ConfigError, near
from colora_ms.models.rope import normalize_scaling

# model_type -> the architecture name in config.json
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Settings that change a model's mathematics, and the only values that are implemented.
_NEUTRAL = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None, 0, 0.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
}

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

    model_type: str               # "llama" | "qwen2" | "qwen3"
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
    rope_scaling: dict = dataclasses.field(default=None, hash=False)  # normalized, or None
    tie_word_embeddings: bool = False
    attention_bias: bool = False      # bias of q_proj, k_proj, v_proj
    attention_out_bias: bool = False  # bias of o_proj
    mlp_bias: bool = False            # bias of gate_proj, up_proj, down_proj
    qk_norm: bool = False             # RMS norm of each query and key head (Qwen3)
    bos_token_id: int = None
    eos_token_ids: tuple = ()
    pad_token_id: int = None
    torch_dtype: str = "float32"      # information only: how the weights are stored

    def __post_init__(self):
        scaling, problems = normalize_scaling(self.rope_scaling)
        if not problems:
            object.__setattr__(self, "rope_scaling", scaling)
        if isinstance(self.eos_token_ids, list):
            object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        self.validate()

    def validate(self):
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
        if self.model_type not in ARCHITECTURES:
            problems.append(_unsupported("model_type", self.model_type, ARCHITECTURES))
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= limit:
                problems.append(f"{name} is {_short(value)}, expected an integer from 1 to {limit}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) \
                    or not math.isfinite(value) or value <= 0:
                problems.append(f"{name} is {_short(value)}, expected a positive finite number")
        for field in dataclasses.fields(self):
            if field.type in (bool, "bool") and not isinstance(getattr(self, field.name), bool):
                problems.append(f"{field.name} is {_short(getattr(self, field.name))}, expected "
                                "true or false")
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not _is_int(value):
                problems.append(f"{name} is {_short(value)}, expected an integer or null")
        if not isinstance(self.eos_token_ids, tuple) \
                or not all(_is_int(item) for item in self.eos_token_ids):
            problems.append(f"eos_token_id is {_short(self.eos_token_ids)}, expected integers")
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
        want = {"llama": (self.attention_bias, self.attention_bias, self.mlp_bias, False),
                "qwen2": (True, False, False, False),
                "qwen3": (self.attention_bias, self.attention_bias, False, True)}
        names = ("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm")
        for name, expected in zip(names, want[self.model_type]):
            if getattr(self, name) != expected:
                problems.append(f"{name} is {getattr(self, name)}, but {self.model_type} with "
                                f"attention_bias={self.attention_bias} has {expected}")
        return problems

    @classmethod
    def from_hf(cls, values):
        """Read the dictionary of a Hugging Face ``config.json``.

        Both spellings of the rotary settings are read: ``rope_theta`` with ``rope_scaling``, and
        the newer ``rope_parameters``.  Keys that do not change the model's output are skipped.

        Args:
            values: the parsed JSON object.

        Returns:
            DecoderConfig.

        Raises:
            ConfigError: lists all problems: an architecture or setting that is not implemented
                (sliding-window attention that is really used, unknown rotary scaling, quantized
                weights, ...), missing sizes, impossible values.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"config.json holds {_short(values)}, expected a JSON object")
        model_type = _architecture(values)
        problems = _refused_settings(values)
        missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size",
                                     "num_hidden_layers", "num_attention_heads")
                   if values.get(name) is None]
        if missing:
            problems.append("missing " + ", ".join(missing))
        theta, scaling, rope_problems = _read_rope(values)
        problems += rope_problems
        if problems:
            raise ConfigError("the model config cannot be used: " + "; ".join(problems))

        heads = values["num_attention_heads"]
        head_dim = values.get("head_dim")
        if head_dim is None:
            head_dim = _default_head_dim(model_type, values["hidden_size"], heads)
        groups = values.get("num_key_value_heads")
        bias = model_type == "qwen2" or values.get("attention_bias", False) is True
        eos = values.get("eos_token_id")
        eos = () if eos is None else eos if isinstance(eos, (list, tuple)) else (eos,)
        length = values.get("max_position_embeddings")
        return cls(
            model_type=model_type, vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"], intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=heads if groups is None else groups, head_dim=head_dim,
            # transformers' own defaults where a config leaves a value out
            max_position_embeddings=(2048 if model_type == "llama" else 32768)
            if length is None else length,
            rms_norm_eps=_default(values.get("rms_norm_eps"), 1e-6), rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_default(values.get("tie_word_embeddings"), False),
            attention_bias=bias, attention_out_bias=bias and model_type != "qwen2",
            mlp_bias=_default(values.get("mlp_bias"), False) if model_type == "llama" else False,
            qk_norm=model_type == "qwen3", bos_token_id=values.get("bos_token_id"),
            eos_token_ids=tuple(eos), pad_token_id=values.get("pad_token_id"),
            torch_dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"))

    def to_hf(self):
        """The dictionary for a Hugging Face ``config.json``; ``from_hf`` reads it back equal."""
        eos = list(self.eos_token_ids)
        values = {
            "architectures": [ARCHITECTURES[self.model_type]], "model_type": self.model_type,
            "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads, "head_dim": self.head_dim,
            "hidden_act": "silu", "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta,
            "rope_scaling": dict(self.rope_scaling) if self.rope_scaling else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": self.pad_token_id, "torch_dtype": self.torch_dtype,
        }
        if self.model_type == "llama":
            values["mlp_bias"] = self.mlp_bias
        if self.model_type in ("llama", "qwen3"):
            values["attention_bias"] = self.attention_bias
        if self.model_type in ("qwen2", "qwen3"):
            values["use_sliding_window"] = False
        return values

    def parameter_shapes(self):
        """All tensors of a checkpoint of this config.

        Returns:
            ``{Hugging Face tensor name: shape}`` in the order of the forward pass; linear weights
            are ``(out, in)``; no ``lm_head.weight`` when the head is tied to the embedding.
        """
        hidden, inner = self.hidden_size, self.intermediate_size
        query = self.num_attention_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        shapes = {"model.embed_tokens.weight": (self.vocab_size, hidden)}

        def linear(name, rows, columns, bias):
            shapes[name + ".weight"] = (rows, columns)
            if bias:
                shapes[name + ".bias"] = (rows,)

        for index in range(self.num_hidden_layers):
            layer = f"model.layers.{index}."
            attention = layer + "self_attn."
            shapes[layer + "input_layernorm.weight"] = (hidden,)
            linear(attention + "q_proj", query, hidden, self.attention_bias)
            linear(attention + "k_proj", key, hidden, self.attention_bias)
            linear(attention + "v_proj", key, hidden, self.attention_bias)
            if self.qk_norm:
                shapes[attention + "q_norm.weight"] = (self.head_dim,)
                shapes[attention + "k_norm.weight"] = (self.head_dim,)
            linear(attention + "o_proj", hidden, query, self.attention_out_bias)
            shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
            linear(layer + "mlp.gate_proj", inner, hidden, self.mlp_bias)
            linear(layer + "mlp.up_proj", inner, hidden, self.mlp_bias)
            linear(layer + "mlp.down_proj", hidden, inner, self.mlp_bias)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def parameter_count(self):
        """Number of weights of the model (a tied head counts once)."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def _architecture(values):
    """The model_type of a config.json, or ConfigError naming what is supported."""
    model_type = values.get("model_type")
    names = values.get("architectures")
    if isinstance(names, str):
        names = [names]
    known = {name: kind for kind, name in ARCHITECTURES.items()}
    if model_type is None and isinstance(names, list) and len(names) == 1 and names[0] in known:
        model_type = known[names[0]]
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ConfigError(_unsupported("model_type", model_type, ARCHITECTURES))
    if names and (not isinstance(names, list) or ARCHITECTURES[model_type] not in names):
        raise ConfigError(
            f"config.json names the architecture {_short(names)} for model_type {model_type!r}; "
            f"only {ARCHITECTURES[model_type]} (a decoder with a language-model head) is supported")
    return model_type


def _refused_settings(values):
    """Settings that are present and would change the output in a way not implemented here."""
    problems = []
    for name, allowed in _NEUTRAL.items():
        value = values.get(name)
        if not any(value is item or (not isinstance(value, bool) and value == item)
                   for item in allowed):
            reason = ("quantized Hugging Face weights are not read; use the unquantized model or "
                      "a GGUF file" if name == "quantization_config"
                      else f"only {allowed[0]!r} is implemented")
            problems.append(f"{name} is {_short(value)}: {reason}")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if values.get(name) is not None and not isinstance(values[name], bool):
            problems.append(f"{name} is {_short(values[name])}, expected true or false")
    if values.get("model_type") == "qwen2" and values.get("attention_bias") is False:
        problems.append("attention_bias is false, but qwen2 always has a bias on q, k and v")
    if values.get("model_type") != "llama" and values.get("mlp_bias"):
        problems.append(f"mlp_bias is true, but {values.get('model_type')} has none")
    return problems + _sliding_problems(values)


def _sliding_problems(values):
    """A sliding window matters only if some layer uses it and it is shorter than the context."""
    window = values.get("sliding_window")
    layers = values.get("num_hidden_layers")
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(
            kind in ("full_attention", "sliding_attention") for kind in kinds)):
        return [f"layer_types is {_short(kinds)}: only 'full_attention' is implemented"]
    if window is None:
        return []
    if not _is_int(window) or window < 1:
        return [f"sliding_window is {_short(window)}, expected a positive integer or null"]
    if values.get("model_type") in ("qwen2", "qwen3"):
        if not values.get("use_sliding_window", False):
            return []
        if kinds is not None:
            used = "sliding_attention" in kinds
        else:
            first = _default(values.get("max_window_layers"), 28)
            used = not (_is_int(first) and _is_int(layers) and first >= layers)
    else:
        used = values.get("use_sliding_window", True) is not False
    length = values.get("max_position_embeddings")
    if used and not (_is_int(length) and window >= length):
        return [f"sliding_window={window} is used by some layers: sliding-window attention is not "
                "implemented"]
    return []


def _read_rope(values):
    """(theta, rope_scaling, problems) from either spelling of the rotary settings."""
    theta, scaling = values.get("rope_theta"), values.get("rope_scaling")
    newer = values.get("rope_parameters")
    if newer is not None:
        if not isinstance(newer, dict) or any(isinstance(item, dict) for item in newer.values()):
            return 1e4, None, [f"rope_parameters is {_short(newer)}: only one set of rotary "
                               "settings for all layers is implemented"]
        newer = dict(newer)
        inner_theta = newer.pop("rope_theta", None)
        if theta is not None and inner_theta is not None and theta != inner_theta:
            return 1e4, None, [f"rope_theta={theta!r} contradicts rope_parameters' {inner_theta!r}"]
        theta = inner_theta if inner_theta is not None else theta
        if newer.get("partial_rotary_factor") in (None, 1, 1.0):
            newer.pop("partial_rotary_factor", None)
        if newer and newer.get("rope_type", newer.get("type")) is None:
            newer["rope_type"] = "default"
        read, problems = normalize_scaling(newer)
        if scaling is not None and not problems and normalize_scaling(scaling)[0] != read:
            problems = [f"rope_scaling={_short(scaling)} contradicts rope_parameters="
                        f"{_short(newer)}"]
        return _default(theta, 10000.0), newer or None, problems
    return _default(theta, 10000.0), scaling, normalize_scaling(scaling)[1]


def _default_head_dim(model_type, hidden, heads):
    """transformers' default of a head_dim that config.json leaves out."""
    if model_type == "qwen3":
        return 128
    if not _is_int(hidden) or not _is_int(heads) or heads < 1:
        return 2  # the sizes themselves are reported by validate()
    if hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                          "and head_dim is not given")
    return hidden // heads


def _unsupported(what, value, known):
    return (f"{what} {_short(value)} is not supported; supported: "
            f"{', '.join(f'{kind} ({name})' for kind, name in ARCHITECTURES.items())}."
            f"{near(value, known)}")


def _default(value, default):
    return default if value is None else value


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value):
    """repr cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
