"""One record a family of decoders: what its config.json and its GGUF say, and how they are to be read.

A family is what transformers calls a ``model_type``. All of them here are pre-norm decoders with grouped-query
attention, rotary positions and a SwiGLU; the records say where they differ. Adding one of this form is one entry of
``FAMILIES``: config, folders, GGUF files (both directions), LoRA files and tokenizers ask the record. Pure Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Optional, Union

from colora_ms.errors import ConfigError, near, short

#: An option that a family always has (True), never has (False), or has where this key of config.json says true.
Option = Union[bool, str]

#: Keys of config.json that change a model's mathematics, and the only values that are implemented (None: not there).
NEUTRAL: Mapping[str, tuple] = {
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

#: Modules of a layer under llama.cpp's names (behind ``blk.N.``) and Hugging Face's (behind ``model.layers.N.``).
GGUF_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


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
        qk_norm: RMS norm of each query and key head.
        window: what ``use_sliding_window`` means where config.json leaves it out.
        window_layers: the default of ``max_window_layers``, from which on layers have the window; None: all layers have
            it, and config.json has no such key.
        neutral: keys that are refused unless they have one of these values.
        gguf_layer: names of a layer's modules in a GGUF file, and in a folder.
        gguf_interleaved: whether q's and k's rows are stored interleaved for llama.cpp's rotary kernel.
        gguf_biases: whether llama.cpp reads the biases that are a matter of config.json.
        gguf_rope_factors: whether llama.cpp reads a tensor of factors of the rotary frequencies (Llama 3.1).
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
    window: bool = False
    window_layers: Optional[int] = None
    neutral: Mapping[str, tuple] = dataclasses.field(default_factory=lambda: NEUTRAL)
    gguf_layer: Mapping[str, str] = dataclasses.field(default_factory=lambda: GGUF_LAYER)
    gguf_interleaved: bool = False
    gguf_biases: bool = True
    gguf_rope_factors: bool = False

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


#: What transformers takes for a key that neither config.json nor the family's record has.
DEFAULTS: Mapping[str, object] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}

_RECORDS = (
    # Llama 1 to 3.3, SmolLM and SmolLM2, and what else is Llama-shaped
    Family("llama", "LlamaForCausalLM", gguf="llama", tokenizer="LlamaTokenizer",
           defaults={"max_position_embeddings": 2048},
           attention_bias="attention_bias", attention_out_bias="attention_bias", mlp_bias="mlp_bias", window=True,
           gguf_interleaved=True, gguf_rope_factors=True),
    # Qwen2 and Qwen2.5
    Family("qwen2", "Qwen2ForCausalLM", gguf="qwen2", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768}, attention_bias=True, window_layers=28),
    Family("qwen3", "Qwen3ForCausalLM", gguf="qwen3", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768, "head_dim": 128},
           attention_bias="attention_bias", attention_out_bias="attention_bias", qk_norm=True, window_layers=28,
           gguf_biases=False),
)

#: {model_type: record}; a family that is put in here is known everywhere.
FAMILIES: dict[str, Family] = {record.name: record for record in _RECORDS}


def find_family(model_type: object) -> Optional[Family]:
    """The record of a ``model_type``, or None."""
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def family(model_type: object) -> Family:
    """The record of a ``model_type``.

    Raises:
        ConfigError: there is none; lists those that there are.
    """
    found = find_family(model_type)
    if found is None:
        raise ConfigError(unsupported(model_type))
    return found


def find_gguf_family(architecture: object) -> Optional[Family]:
    """The record of a GGUF's ``general.architecture`` (of several the first in the table), or None."""
    return next((one for one in FAMILIES.values() if one.gguf == architecture), None)


def family_of_class(name: object) -> Optional[Family]:
    """The record of a class such as "LlamaForCausalLM", or None."""
    return next((one for one in FAMILIES.values() if one.architecture == name), None)


def unsupported(model_type: object) -> str:
    """A sentence that a family is not known, and which are."""
    return (f"model_type {short(model_type)} is not supported; supported: "
            f"{', '.join(f'{one.name} ({one.architecture})' for one in FAMILIES.values())}."
            f"{near(model_type, FAMILIES)}")
