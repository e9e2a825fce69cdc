"""The families' golden models as GGUF files, by the rules of llama.cpp's converter, with the gguf package's writer."""

import gguf
import numpy as np

from family_rules import tensor
from gguf_files import interleave

#: case: (architecture, {Hugging Face's norm: llama.cpp's}, rows of q and k interleaved)
_PLAIN = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_GEMMA = {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
          "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
ARCHITECTURES = {
    "mistral": ("llama", _PLAIN, True), "gemma2": ("gemma2", _GEMMA, False), "gemma3_text": ("gemma3", _GEMMA, False),
    "phi3_long": ("phi3", _PLAIN, False), "phi3_short": ("phi3", _PLAIN, False),
    "phi3_window": ("phi3", _PLAIN, False), "granite": ("granite", _PLAIN, True), "smollm3": ("smollm3", _PLAIN, True),
    "glm4": ("glm4", {"input_layernorm": "attn_norm", "post_self_attn_layernorm": "post_attention_norm",
                      "post_attention_layernorm": "ffn_norm", "post_mlp_layernorm": "post_ffw_norm"}, False),
    "cohere2": ("cohere2", {"input_layernorm": "attn_norm"}, False),
    "olmo2": ("olmo2", {"post_attention_layernorm": "post_attention_norm",
                        "post_feedforward_layernorm": "post_ffw_norm"}, False),
    "mixtral": ("llama", _PLAIN, True), "qwen2_moe": ("qwen2moe", _PLAIN, False),
    "qwen2_moe_norm": ("qwen2moe", _PLAIN, False), "qwen3_moe": ("qwen3moe", _PLAIN, False),
}
_LINEARS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
            "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
            "block_sparse_moe.gate": "ffn_gate_inp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp"}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
           "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


def _tensors(golden, norms, interleaved):
    config, found, experts = golden.about["config"], {}, {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    for name, shape in golden.about["shapes"].items():
        value = tensor(name, tuple(shape), golden.raised)
        module, _, field = name.rpartition(".")
        if golden.raised and "norm" in module:
            value = value + np.float32(1)
        if module in _TOP:
            found[f"{_TOP[module]}.{field}"] = value
            continue
        _, _, layer, below = module.split(".", 3)
        if ".experts." in module:
            _, number, part = below.rsplit(".", 2)
            experts.setdefault(f"blk.{layer}.{_EXPERT[part]}.weight", {})[int(number)] = value
            continue
        last = below.rpartition(".")[2]
        if interleaved and heads.get(last):
            value = interleave(value, heads[last])
        if last == "shared_expert_gate":
            value = value[0]
        found[f"blk.{layer}.{({**norms, **_LINEARS})[below]}.{field}"] = value
    for name, parts in experts.items():
        found[name] = np.stack([parts[i] for i in range(len(parts))])
    return found


def write_family_gguf(path, case, golden, change=None, drop=()):
    """A golden model as a GGUF file.

    Args:
        change: further {key behind the architecture: value}; drop: such keys that are left out.
    """
    arch, norms, interleaved = ARCHITECTURES[case]
    config = golden.about["config"]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    dim = config.get("head_dim") or hidden // heads
    scaling = config.get("rope_scaling") or {}
    values = {
        "context_length": config["max_position_embeddings"], "embedding_length": hidden, "vocab_size": 47,
        "block_count": config["num_hidden_layers"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads, "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": dim, "attention.value_length": dim,
        "rope.dimension_count": int(dim * config.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(config["rope_theta"]),
        ("attention.layer_norm_epsilon" if arch == "cohere2" else "attention.layer_norm_rms_epsilon"):
            float(config.get("rms_norm_eps") or config.get("layer_norm_eps")),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if arch in ("llama", "olmo2", "granite", "smollm3", "glm4", "qwen2moe", "qwen3moe"):
        del values["attention.sliding_window"]
    for key, own in (("attn_logit_softcapping", "attn_logit_softcapping"), ("attention.scale", "attention_multiplier"),
                     ("final_logit_softcapping", "final_logit_softcapping"), ("logit_scale", "logit_scale"),
                     ("embedding_scale", "embedding_multiplier"), ("residual_scale", "residual_multiplier"),
                     ("logit_scale", "logits_scaling"), ("expert_used_count", "num_experts_per_tok"),
                     ("expert_feed_forward_length", "moe_intermediate_size"), ("expert_count", "num_experts"),
                     ("expert_count", "num_local_experts"), ("rope.freq_base_swa", "rope_local_base_freq"),
                     ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")):
        if config.get(own):
            values[key] = config[own]
    if scaling.get("rope_type") == "linear":
        values.update({"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])})
    tensors = _tensors(golden, norms, interleaved)
    if "long_factor" in scaling:
        values["rope.scaling.original_context_length"] = original = config["original_max_position_embeddings"]
        values["rope.scaling.attn_factor"] = float(np.sqrt(
            1 + np.log(config["max_position_embeddings"] / original) / np.log(original)))
        for kind in ("long", "short"):
            tensors[f"rope_factors_{kind}.weight"] = np.float32(scaling[f"{kind}_factor"])
    values.update(change or {})
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in values.items():
        if key in drop:
            continue
        kind = (gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.FLOAT32
                if isinstance(value, float) else gguf.GGUFValueType.UINT32)
        writer.add_key_value(f"{arch}.{key}", value, kind)
    writer.add_tokenizer_model("no_vocab")
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
