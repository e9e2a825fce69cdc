"""What a record of a family consists of: the words in which ``families`` says how a decoder is built and read. Pure
Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Optional, Union

#: An option that a family always has (True), never has (False), or has where this key of config.json says true.
Option = Union[bool, str]

#: Keys of config.json that change a model's mathematics, and the only values that are implemented (None: not there) in
#: families whose record does not read them.
NEUTRAL: Mapping[str, tuple] = {
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None, 0, 0.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "query_pre_attn_scalar": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "use_bidirectional_attention": (None, False),
}

#: Modules of a layer under llama.cpp's names (behind ``blk.N.``) and Hugging Face's (behind ``model.layers.N.``).
GGUF_LINEARS: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
GGUF_LAYER: Mapping[str, str] = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", **GGUF_LINEARS}

#: Linears that a folder keeps as one: {its name: the parts, whose rows follow one another}.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclasses.dataclass(frozen=True)
class Norms:
    """Names of a layer's norms, "" where there is none: what attention and MLP read, and what their outputs are before
    they are added to the residual."""

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    def names(self) -> tuple[str, ...]:
        """Those that there are, in the order of the forward pass."""
        found = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in found if name)


@dataclasses.dataclass(frozen=True)
class Sliding:
    """A window over the positions that a query sees.

    Attributes:
        default: its size where config.json has no ``sliding_window`` (null there: none); None: none.
        full_every: every layer of this number sees all positions; 0: none does.
        pattern: the key of config.json that says another number, or "". ``layer_types`` is read before it.
    """

    default: Optional[int] = None
    full_every: int = 0
    pattern: str = ""


@dataclasses.dataclass(frozen=True)
class Routing:
    """Routed experts in the place of the MLP: the keys of config.json, and names below the MLP's.

    Attributes:
        count, per_token: keys.
        size: key of an expert's width ("intermediate_size": there are no other layers).
        shared: key of the shared expert's width, or "".
        normalised: whether the chosen experts' shares are divided by their sum.
        dense: whether ``mlp_only_layers`` and ``decoder_sparse_step`` are read.
        parts: an expert's gate, up and down.
    """

    count: str
    per_token: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    shared: str = ""
    normalised: Option = "norm_topk_prob"
    dense: bool = True
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        found = (self.count, self.per_token, self.size, self.shared,
                 self.normalised if isinstance(self.normalised, str) else "",
                 *(("mlp_only_layers", "decoder_sparse_step") if self.dense else ()))
        return tuple(key for key in found if key and key != "intermediate_size")


def nothing_more(values: dict, metadata: Mapping) -> None:
    """A GGUF file says all."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: ``model_type`` of config.json.
        architecture: the class in its ``architectures``, of a decoder with a language-model head.
        gguf: ``general.architecture`` of its GGUF files, and what their keys begin with.
        tokenizer: transformers' tokenizer class of a folder that does not name one.
        defaults: what transformers takes for keys that config.json leaves out. A ``head_dim`` that is in neither is
            ``hidden_size / num_attention_heads``.
        attention_bias: bias of q_proj, k_proj and v_proj.
        attention_out_bias: bias of o_proj.
        mlp_bias: bias of gate_proj, up_proj and down_proj.
        qk_norm: norm of queries and keys; whole_qk_norm: of all heads as one, else of each head.
        norm: kind of all norms: "rms", "rms_plus_one" (times 1 + weight) or "layer" (the mean subtracted, no bias).
        norms: their names and places. parallel: attention and MLP read the same norm, and both are added.
        activation: of the gate, "silu" or "gelu_tanh"; activation_key: of config.json.
        embedding_root: rows of the embedding are multiplied by the root of hidden_size.
        settings: {field of ``DecoderConfig``: (key of config.json, what transformers takes without it)} of numbers.
        rotary_pairs: neighbouring channels turn together, else those of a head's two halves.
        partial_rotary: ``partial_rotary_factor`` is read.
        rotary_layers: which layers turn queries and keys: "all", "listed" (``no_rope_layers``) or "sliding".
        local_rotary: sliding layers have a table of their own, of ``rope_local_base_freq`` and never scaled.
        longrope: names under which old configs mean longrope.
        eps: key of the norms' epsilon. head_dim_key: whether ``head_dim`` is read.
        sliding: the window, for families that have one; else a window that is used is refused.
        window: what ``use_sliding_window`` means where config.json leaves it out.
        window_layers: the default of ``max_window_layers``, from which on layers have the window; None: all layers have
            it, and config.json has no such key.
        fused: linears that folders keep as one.
        mlp: name of the MLP in a layer. routing: of families with experts.
        neutral: keys that are refused unless they have one of these values.
        gguf_layer: names of a layer's modules in a GGUF file, and in a folder.
        gguf_interleaved: whether q's and k's rows are stored interleaved for llama.cpp's rotary kernel.
        gguf_biases: whether llama.cpp reads the biases that are a matter of config.json.
        gguf_rope_factors: whether llama.cpp reads a tensor of factors of the rotary frequencies (Llama 3.1).
        gguf_keys: {key of config.json: key of a GGUF, behind the architecture} beyond those of all families.
        gguf_fused: further linears that GGUF files keep as one, under llama.cpp's name.
        gguf_rest: (values of config.json, metadata) -> None: puts in what GGUF files leave out.
        gguf_writes: whether GGUF files can be written.
    """

    name: str
    architecture: str
    gguf: str
    tokenizer: str
    defaults: Mapping[str, object]
    attention_bias: Option = False
    attention_out_bias: Option = False
    mlp_bias: Option = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    norm: str = "rms"
    norms: Norms = Norms()
    parallel: bool = False
    activation: str = "silu"
    activation_key: str = "hidden_act"
    embedding_root: bool = False
    settings: Mapping[str, tuple[str, object]] = dataclasses.field(default_factory=dict)
    rotary_pairs: bool = False
    partial_rotary: bool = False
    rotary_layers: str = "all"
    local_rotary: bool = False
    longrope: tuple[str, ...] = ()
    eps: str = "rms_norm_eps"
    head_dim_key: bool = True
    sliding: Optional[Sliding] = None
    window: bool = False
    window_layers: Optional[int] = None
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    mlp: str = "mlp"
    routing: Optional[Routing] = None
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: NEUTRAL)
    gguf_layer: Mapping[str, str] = dataclasses.field(default_factory=lambda: GGUF_LAYER)
    gguf_interleaved: bool = False
    gguf_biases: bool = True
    gguf_rope_factors: bool = False
    gguf_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    gguf_rest: Callable[[dict, Mapping], None] = nothing_more
    gguf_writes: bool = False

    def options(self) -> dict[str, Option]:
        """The options that are fields of ``DecoderConfig``, by the field's name."""
        return {name: getattr(self, name) for name in ("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm")}

    def keys(self) -> dict[str, str]:
        """The keys of config.json that decide an option: {key: the first field that it decides}."""
        found: dict[str, str] = {}
        for name, option in self.options().items():
            if isinstance(option, str):
                found.setdefault(option, name)
        return found

    def refused(self) -> dict[str, tuple]:
        """The keys of config.json that are refused unless they have one of these values."""
        read = {key for key, _ in self.settings.values()} | set(self.routing.keys() if self.routing else ())
        if self.partial_rotary:
            read.add("partial_rotary_factor")
        found = {key: allowed for key, allowed in self.neutral.items() if key not in read}
        if self.activation == "gelu_tanh":
            found.pop("hidden_act", None)
            found[self.activation_key] = ("gelu_pytorch_tanh", None)
        return found


#: What transformers takes for a key that neither config.json nor the family's record has.
DEFAULTS: Mapping[str, object] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
