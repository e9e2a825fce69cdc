"""One record a family of decoders: what its config.json and its GGUF say, and how they are to be read.

A family is what transformers calls a ``model_type``. All of them are decoders with grouped-query attention, rotary
positions and gated MLPs; the records say where they differ from Llama, in the words of ``family``. A family that needs
no new word is one entry of ``FAMILIES``: config, Cells, the fused step, folders, GGUF files, LoRA files and tokenizers
ask the record. Pure Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

from colora_ms.errors import ConfigError, near, short
from colora_ms.models.family import (
    DEFAULTS,
    GATE_UP,
    GGUF_LAYER,
    GGUF_LINEARS,
    NEUTRAL,
    QKV,
    Family,
    Norms,
    Option,
    Routing,
    Sliding,
)

__all__ = ["DEFAULTS", "FAMILIES", "GGUF_LAYER", "NEUTRAL", "Family", "Option", "family", "family_of_class",
           "find_family", "find_gguf_family", "unsupported"]

# Both branches of a layer are normed before they are added, beside what they read.
_SANDWICH = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                  "post_feedforward_layernorm")
_GGUF_SANDWICH = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
                  "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
                  **GGUF_LINEARS}


def _query_scalar(layers: int):
    """Google's largest model of a family, told by its layers, divides scores by the root of hidden_size / heads."""
    def rest(values: dict, metadata: Mapping) -> None:
        largest = values["num_hidden_layers"] == layers
        values["query_pre_attn_scalar"] = (values["hidden_size"] / values["num_attention_heads"] if largest
                                           else values["head_dim"])
    return rest


def _gemma3_rest(values: dict, metadata: Mapping) -> None:
    _query_scalar(62)(values, metadata)
    values.setdefault("sliding_window_pattern", 6)
    values.setdefault("rope_local_base_freq", 10000.0)


def _scaled_logits(architecture: str, key: str):
    """llama.cpp refuses a file of these without the factor of the logits."""
    def rest(values: dict, metadata: Mapping) -> None:
        if key not in values:
            raise ConfigError(f"the GGUF value '{architecture}.logit_scale' is missing, which a {architecture} model "
                              "must have")
    return rest


def _granite_rest(values: dict, metadata: Mapping) -> None:
    _scaled_logits("granite", "logits_scaling")(values, metadata)
    turned = metadata.get("granite.rope.scaling.finetuned", True)
    if not turned:
        raise ConfigError(f"the GGUF value 'granite.rope.scaling.finetuned' is {turned!r}, a model without rotary "
                          "positions, which is not implemented")
    values.setdefault("attention_multiplier", values["head_dim"] ** -0.5)


def _mistral_rest(values: dict, metadata: Mapping) -> None:
    values.setdefault("sliding_window", None)  # no key is written: a file without it attends fully


def _no_window_of_0(values: dict, metadata: Mapping) -> None:
    values["sliding_window"] = values.get("sliding_window") or None


def _normalised(values: dict, metadata: Mapping) -> None:
    values["norm_topk_prob"] = True


_RECORDS = (
    # Llama 1 to 3.3, SmolLM and SmolLM2, and what else is Llama-shaped
    Family("llama", "LlamaForCausalLM", gguf="llama", tokenizer="LlamaTokenizer",
           defaults={"max_position_embeddings": 2048},
           attention_bias="attention_bias", attention_out_bias="attention_bias", mlp_bias="mlp_bias", window=True,
           gguf_interleaved=True, gguf_rope_factors=True, gguf_writes=True),
    # Qwen2 and Qwen2.5
    Family("qwen2", "Qwen2ForCausalLM", gguf="qwen2", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768}, attention_bias=True, window_layers=28, gguf_writes=True),
    Family("qwen3", "Qwen3ForCausalLM", gguf="qwen3", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768, "head_dim": 128},
           attention_bias="attention_bias", attention_out_bias="attention_bias", qk_norm=True, window_layers=28,
           gguf_biases=False, gguf_writes=True),
    # Mistral 7B to Large, Nemo, Small 2501; a GGUF of them says "llama"
    Family("mistral", "MistralForCausalLM", gguf="llama", tokenizer="LlamaTokenizer",
           defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8}, sliding=Sliding(4096),
           gguf_interleaved=True, gguf_rest=_mistral_rest),
    Family("gemma2", "Gemma2ForCausalLM", gguf="gemma2", tokenizer="GemmaTokenizer",
           defaults={"max_position_embeddings": 8192, "num_key_value_heads": 4, "head_dim": 256,
                     "tie_word_embeddings": True},
           attention_bias="attention_bias", attention_out_bias="attention_bias", norm="rms_plus_one", norms=_SANDWICH,
           activation="gelu_tanh", activation_key="hidden_activation", embedding_root=True,
           settings={"query_scalar": ("query_pre_attn_scalar", 256), "attention_cap": ("attn_logit_softcapping", 50.0),
                     "logit_cap": ("final_logit_softcapping", 30.0)},
           sliding=Sliding(4096, full_every=2), gguf_layer=_GGUF_SANDWICH,
           gguf_keys={"sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
                      "final_logit_softcapping": "final_logit_softcapping"}, gguf_rest=_query_scalar(46)),
    # the 1B and 270M, and the text part of the larger ones
    Family("gemma3_text", "Gemma3ForCausalLM", gguf="gemma3", tokenizer="GemmaTokenizer",
           defaults={"max_position_embeddings": 131072, "num_attention_heads": 8, "num_key_value_heads": 4,
                     "head_dim": 256, "vocab_size": 262208, "rope_theta": 1e6, "tie_word_embeddings": True},
           attention_bias="attention_bias", attention_out_bias="attention_bias", qk_norm=True, norm="rms_plus_one",
           norms=_SANDWICH, activation="gelu_tanh", activation_key="hidden_activation", embedding_root=True,
           settings={"query_scalar": ("query_pre_attn_scalar", 256), "logit_cap": ("final_logit_softcapping", None),
                     "rope_local_theta": ("rope_local_base_freq", 10000.0)},
           local_rotary=True, sliding=Sliding(4096, full_every=6, pattern="sliding_window_pattern"),
           gguf_layer=_GGUF_SANDWICH,
           gguf_keys={"sliding_window": "attention.sliding_window",
                      "sliding_window_pattern": "attention.sliding_window_pattern",
                      "rope_local_base_freq": "rope.freq_base_swa",
                      "final_logit_softcapping": "final_logit_softcapping"}, gguf_rest=_gemma3_rest),
    # Phi-3, 3.5, 4 and 4-mini
    Family("phi3", "Phi3ForCausalLM", gguf="phi3", tokenizer="LlamaTokenizer",
           defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                     "original_max_position_embeddings": 4096},
           partial_rotary=True, longrope=("su", "yarn"), sliding=Sliding(None),
           fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": GATE_UP},
           gguf_keys={"sliding_window": "attention.sliding_window"}, gguf_fused={"ffn_up": GATE_UP},
           gguf_rest=_no_window_of_0),
    # Granite 3 and 4 without experts and state spaces
    Family("granite", "GraniteForCausalLM", gguf="granite", tokenizer="GPT2Tokenizer",
           defaults={"max_position_embeddings": 2048},
           attention_bias="attention_bias", attention_out_bias="attention_bias", mlp_bias="mlp_bias",
           settings={"embedding_factor": ("embedding_multiplier", 1.0), "score_factor": ("attention_multiplier", 1.0),
                     "branch_factor": ("residual_multiplier", 1.0), "logits_divisor": ("logits_scaling", 1.0)},
           gguf_interleaved=True, gguf_rope_factors=True,
           gguf_keys={"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
                      "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"},
           gguf_rest=_granite_rest),
    Family("smollm3", "SmolLM3ForCausalLM", gguf="smollm3", tokenizer="GPT2Tokenizer",
           defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6,
                     "tie_word_embeddings": True},
           attention_bias="attention_bias", attention_out_bias="attention_bias", mlp_bias="mlp_bias",
           rotary_layers="listed", gguf_interleaved=True),
    # GLM-4-0414 and GLM-Z1
    Family("glm4", "Glm4ForCausalLM", gguf="glm4", tokenizer="GPT2Tokenizer",
           defaults={"max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128,
                     "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5, "attention_bias": True},
           attention_bias="attention_bias",
           norms=Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
           rotary_pairs=True, partial_rotary=True, fused={"mlp.gate_up_proj": GATE_UP},
           gguf_layer={"attn_norm": "input_layernorm", "post_attention_norm": "post_self_attn_layernorm",
                       "ffn_norm": "post_attention_layernorm", "post_ffw_norm": "post_mlp_layernorm", **GGUF_LINEARS},
           gguf_fused={"ffn_up": GATE_UP}),
    # Command R7B and Command A
    Family("cohere2", "Cohere2ForCausalLM", gguf="cohere2", tokenizer="CohereTokenizer",
           defaults={"max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "tie_word_embeddings": True},
           attention_bias="attention_bias", attention_out_bias="attention_bias", norm="layer",
           norms=Norms(before_mlp=""), parallel=True, settings={"logits_factor": ("logit_scale", 0.0625)},
           rotary_pairs=True, rotary_layers="sliding", eps="layer_norm_eps", head_dim_key=False,
           sliding=Sliding(4096, full_every=4, pattern="sliding_window_pattern"),
           gguf_keys={"logit_scale": "logit_scale", "sliding_window": "attention.sliding_window"},
           gguf_rest=_scaled_logits("cohere2", "logit_scale")),
    # OLMo-2; a GGUF of OLMo-3 says "olmo2", too, with a window
    Family("olmo2", "Olmo2ForCausalLM", gguf="olmo2", tokenizer="GPTNeoXTokenizer",
           defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
           attention_bias="attention_bias", attention_out_bias="attention_bias", qk_norm=True, whole_qk_norm=True,
           norms=Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
           gguf_layer={"post_attention_norm": "post_attention_layernorm",
                       "post_ffw_norm": "post_feedforward_layernorm", **GGUF_LINEARS}),
    # Mixtral 8x7B and 8x22B; a GGUF of them says "llama", with experts
    Family("mixtral", "MixtralForCausalLM", gguf="llama", tokenizer="LlamaTokenizer",
           defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                     "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
           sliding=Sliding(None), mlp="block_sparse_moe",
           routing=Routing("num_local_experts", size="intermediate_size", normalised=True, dense=False,
                           parts=("w1", "w3", "w2")),
           gguf_interleaved=True, gguf_rest=_mistral_rest),
    # Qwen1.5-MoE and Qwen2-57B-A14B
    Family("qwen2_moe", "Qwen2MoeForCausalLM", gguf="qwen2moe", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768, "num_key_value_heads": 16, "qkv_bias": True,
                     "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
                     "shared_expert_intermediate_size": 5632},
           attention_bias="qkv_bias",  # releases differ in which layers use_sliding_window means: it is refused
           routing=Routing("num_experts", shared="shared_expert_intermediate_size")),
    # Qwen3-30B-A3B and 235B-A22B
    Family("qwen3_moe", "Qwen3MoeForCausalLM", gguf="qwen3moe", tokenizer="Qwen2Tokenizer",
           defaults={"max_position_embeddings": 32768, "num_key_value_heads": 4, "num_experts": 128,
                     "num_experts_per_tok": 8, "moe_intermediate_size": 768},
           attention_bias="attention_bias", attention_out_bias="attention_bias", qk_norm=True,
           routing=Routing("num_experts"), gguf_biases=False, gguf_rest=_normalised),
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


def find_gguf_family(architecture: object, experts: bool = False) -> Optional[Family]:
    """The record of a GGUF's ``general.architecture`` (of several the first in the table), or None.

    Args:
        experts: whether the file has routed experts; where only one of a family's records has them, they decide.
    """
    found = [one for one in FAMILIES.values() if one.gguf == architecture]
    return next((one for one in found if (one.routing is not None) == experts), found[0] if found else None)


def family_of_class(name: object) -> Optional[Family]:
    """The record of a class such as "LlamaForCausalLM", or None."""
    return next((one for one in FAMILIES.values() if one.architecture == name), None)


def unsupported(model_type: object) -> str:
    """A sentence that a family is not known, and which are."""
    return (f"model_type {short(model_type)} is not supported; supported: "
            f"{', '.join(f'{one.name} ({one.architecture})' for one in FAMILIES.values())}."
            f"{near(model_type, FAMILIES)}")
