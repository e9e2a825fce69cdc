"""GGUF files of the tiny models, written with the gguf package's own writer: what the tests read back."""

import os

import gguf
import numpy as np

from colora_ms.models.checkpoint import open_checkpoint

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")


def tiny(name):
    return os.path.join(GOLDENS, "tiny", name)


GGUF_LAYER = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
              "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
              "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    for plain, other in (("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
                         ("lm_head", "output")):
        if name.startswith(plain + "."):
            return name.replace(plain, other)
    _, _, index, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{index}.{GGUF_LAYER[part]}.{kind}"


def interleave(rows, heads):
    """llama.cpp's row order, written out row by row: channel i of the first half is followed by
    channel i of the second half."""
    dim = rows.shape[0] // heads
    order = [head * dim + half * (dim // 2) + i
             for head in range(heads) for i in range(dim // 2) for half in (0, 1)]
    return rows[order]


def write_gguf(path, name, change=None, quantize=None, extra=(), **writer_arguments):
    """A GGUF of a tiny model with the gguf package's own writer.

    Args:
        change: function that may change the tensors, {llama.cpp's name: array}.
        quantize: type for all matrices, or {llama.cpp's name: type} for some tensors.
        extra: further (key, number) of the metadata; writer_arguments: such as split_max_tensors.
    """
    source = open_checkpoint(tiny(name))
    config = source.config
    writer = gguf.GGUFWriter(str(path), config.model_type, **writer_arguments)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if config.rope_scaling and config.rope_scaling["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling["rope_type"]))
        writer.add_rope_scaling_factor(config.rope_scaling["factor"])
        if "original_max_position_embeddings" in config.rope_scaling:
            writer.add_rope_scaling_orig_ctx_len(
                config.rope_scaling["original_max_position_embeddings"])
    for key, value in extra:
        writer.add_key_value(key, value, gguf.GGUFValueType.UINT32)
    tensors = {}
    for key, value in source.tensors.items():
        heads = {"q_proj": config.num_attention_heads,
                 "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if config.model_type == "llama" and heads:
            value = interleave(value, heads)
        tensors[gguf_name(key)] = np.array(value)
    if change:
        change(tensors)
    for key, value in tensors.items():
        kind = quantize.get(key) if isinstance(quantize, dict) else quantize if value.ndim == 2 else None
        if kind is not None:
            writer.add_tensor(key, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source
