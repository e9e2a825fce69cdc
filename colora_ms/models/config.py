"""The configuration of a decoder, with Hugging Face's names.

``DecoderConfig.from_hf`` reads a ``config.json`` of a family that ``families`` has a record of, ``to_hf`` writes one.
What this package does not implement is refused, never ignored.  Pure Python.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

from colora_ms.errors import ConfigError, short
from colora_ms.models.families import DEFAULTS, Family, family, family_of_class, find_family, unsupported
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
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) \
                    or not math.isfinite(value) or value <= 0:
                problems.append(f"{name} is {short(value)}, expected a positive finite number")
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
        record = family(self.model_type)
        for name, option in record.options().items():
            expected = getattr(self, record.keys()[option]) if isinstance(option, str) else option
            if getattr(self, name) != expected:
                problems.append(f"{name} is {getattr(self, name)}, but {self.model_type} with "
                                f"attention_bias={self.attention_bias} has {expected}")
        return problems

    @classmethod
    def from_hf(cls, values: object) -> DecoderConfig:
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
            raise ConfigError(f"config.json holds {short(values)}, expected a JSON object")
        record = _family_of(values)
        problems = _refused_settings(values, record)
        missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size",
                                     "num_hidden_layers", "num_attention_heads")
                   if values.get(name) is None]
        if missing:
            problems.append("missing " + ", ".join(missing))
        theta, scaling, rope_problems = _read_rope(values)
        problems += rope_problems
        if problems:
            raise ConfigError("the model config cannot be used: " + "; ".join(problems))

        def read(key, otherwise=None):
            """The key's value, else what transformers takes in its place."""
            value = values.get(key)
            return record.defaults.get(key, DEFAULTS.get(key, otherwise)) if value is None else value

        heads = values["num_attention_heads"]
        head_dim = read("head_dim")
        eos = values.get("eos_token_id")
        eos = () if eos is None else eos if isinstance(eos, (list, tuple)) else (eos,)
        options = {name: option if isinstance(option, bool) else read(option, False)
                   for name, option in record.options().items()}
        return cls(
            model_type=record.name, vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"], intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"], num_attention_heads=heads,
            num_key_value_heads=read("num_key_value_heads", heads),
            head_dim=_equal_heads(values["hidden_size"], heads) if head_dim is None else head_dim,
            max_position_embeddings=read("max_position_embeddings"), rms_norm_eps=read("rms_norm_eps"),
            rope_theta=record.defaults.get("rope_theta", DEFAULTS["rope_theta"]) if theta is None else theta,
            rope_scaling=scaling, tie_word_embeddings=read("tie_word_embeddings"), **options,
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=tuple(eos), pad_token_id=values.get("pad_token_id"),
            torch_dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"))

    def to_hf(self) -> dict:
        """The dictionary for a Hugging Face ``config.json``; ``from_hf`` reads it back equal."""
        record, eos = family(self.model_type), list(self.eos_token_ids)
        values = {
            "architectures": [record.architecture], "model_type": self.model_type,
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
        for key, name in reversed(list(record.keys().items())):
            values[key] = getattr(self, name)
        if record.window_layers is not None:
            values["use_sliding_window"] = False
        return values

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
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

    def parameter_count(self) -> int:
        """Number of weights of the model (a tied head counts once)."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())


def _family_of(values) -> Family:
    """The record of a config.json's family, or ConfigError naming what is supported."""
    model_type = values.get("model_type")
    names = values.get("architectures")
    if isinstance(names, str):
        names = [names]
    record = find_family(model_type)
    if model_type is None and isinstance(names, list) and len(names) == 1:
        record = family_of_class(names[0])
    if record is None:
        raise ConfigError(unsupported(model_type))
    if names and (not isinstance(names, list) or record.architecture not in names):
        raise ConfigError(
            f"config.json names the architecture {short(names)} for model_type {record.name!r}; "
            f"only {record.architecture} (a decoder with a language-model head) is supported")
    return record


def _refused_settings(values, record):
    """Settings that are present and would change the output in a way not implemented here."""
    problems = []
    for name, allowed in record.neutral.items():
        value = values.get(name)
        if not any(value is item or (not isinstance(value, bool) and value == item)
                   for item in allowed):
            reason = ("quantized Hugging Face weights are not read; use the unquantized model or "
                      "a GGUF file" if name == "quantization_config"
                      else f"only {allowed[0]!r} is implemented")
            problems.append(f"{name} is {short(value)}: {reason}")
    for name in dict.fromkeys(["attention_bias", "mlp_bias", "tie_word_embeddings", *record.keys()]):
        if values.get(name) is not None and not isinstance(values[name], bool):
            problems.append(f"{name} is {short(values[name])}, expected true or false")
    for name, where in (("attention_bias", "q, k and v"), ("mlp_bias", "gate, up and down")):
        option, said = getattr(record, name), values.get(name)
        if option is True and said is False:
            problems.append(f"{name} is false, but {record.name} always has a bias on {where}")
        if option is False and said:
            problems.append(f"{name} is true, but {record.name} has none")
    return problems + _sliding_problems(values, record)


def _sliding_problems(values, record):
    """A sliding window matters only if some layer uses it and it is shorter than the context."""
    window = values.get("sliding_window")
    layers = values.get("num_hidden_layers")
    kinds = values.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(
            kind in ("full_attention", "sliding_attention") for kind in kinds)):
        return [f"layer_types is {short(kinds)}: only 'full_attention' is implemented"]
    if window is None:
        return []
    if not _is_int(window) or window < 1:
        return [f"sliding_window is {short(window)}, expected a positive integer or null"]
    switch = values.get("use_sliding_window")
    used = record.window if switch is None else bool(switch)
    if used and record.window_layers is not None:
        first = _default(values.get("max_window_layers"), record.window_layers)
        used = "sliding_attention" in kinds if kinds is not None else \
            not (_is_int(first) and _is_int(layers) and first >= layers)
    length = values.get("max_position_embeddings")
    if used and not (_is_int(length) and window >= length):
        return [f"sliding_window={window} is used by some layers: sliding-window attention is not "
                "implemented"]
    return []


def _read_rope(values):
    """(theta or None, rope_scaling, problems) from either spelling of the rotary settings."""
    theta, scaling = values.get("rope_theta"), values.get("rope_scaling")
    newer = values.get("rope_parameters")
    if newer is not None:
        if not isinstance(newer, dict) or any(isinstance(item, dict) for item in newer.values()):
            return None, None, [f"rope_parameters is {short(newer)}: only one set of rotary "
                               "settings for all layers is implemented"]
        newer = dict(newer)
        inner_theta = newer.pop("rope_theta", None)
        if theta is not None and inner_theta is not None and theta != inner_theta:
            return None, None, [f"rope_theta={theta!r} contradicts rope_parameters' {inner_theta!r}"]
        theta = inner_theta if inner_theta is not None else theta
        if newer.get("partial_rotary_factor") in (None, 1, 1.0):
            newer.pop("partial_rotary_factor", None)
        if newer and newer.get("rope_type", newer.get("type")) is None:
            newer["rope_type"] = "default"
        read, problems = normalize_scaling(newer)
        if scaling is not None and not problems and normalize_scaling(scaling)[0] != read:
            problems = [f"rope_scaling={short(scaling)} contradicts rope_parameters="
                        f"{short(newer)}"]
        return theta, newer or None, problems
    return theta, scaling, normalize_scaling(scaling)[1]


def _equal_heads(hidden, heads):
    """The size of a head where neither config.json nor the family says it."""
    if not _is_int(hidden) or not _is_int(heads) or heads < 1:
        return 2  # the sizes themselves are reported by validate()
    if hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} "
                          "and head_dim is not given")
    return hidden // heads


def _default(value, default):
    return default if value is None else value


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)
