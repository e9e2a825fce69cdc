"""What llama.cpp calls the tensors of a decoder, and how it orders their rows; both directions.

llama.cpp stores the query and key rows of the ``llama`` architecture interleaved for its rotary kernel: within a head,
channel i of the first half is followed by channel i of the second. Qwen2 and Qwen3 are stored unchanged.
"""

import re

import numpy as np

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

#: Llama 3.1's rule for the rotary factors, under this package's own keys: llama.cpp only knows the factors.
LLAMA3_KEYS = {"factor": "colora_ms.rope.factor", "low_freq_factor": "colora_ms.rope.low_freq_factor",
               "high_freq_factor": "colora_ms.rope.high_freq_factor",
               "original_max_position_embeddings": "colora_ms.rope.original_context_length"}

#: Module names of llama.cpp and of Hugging Face.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
          "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
          "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FROM_TOP = {other: name for name, other in _TOP.items()}
_FROM_LAYER = {other: name for name, other in _LAYER.items()}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)")


def hf_module(name):
    """The Hugging Face name of a llama.cpp module such as ``blk.3.attn_q``, or None."""
    if name in _TOP:
        return _TOP[name]
    match = _GGUF_LAYER.fullmatch(name)
    if match is None or match.group(2) not in _LAYER:
        return None
    return f"model.layers.{match.group(1)}.{_LAYER[match.group(2)]}"


def gguf_module(name):
    """llama.cpp's name of a Hugging Face module such as ``model.layers.3.self_attn.q_proj``, or None."""
    if name in _FROM_TOP:
        return _FROM_TOP[name]
    match = _HF_LAYER.fullmatch(name)
    if match is None or match.group(2) not in _FROM_LAYER:
        return None
    return f"blk.{match.group(1)}.{_FROM_LAYER[match.group(2)]}"


def hf_name(name):
    """The Hugging Face name of a llama.cpp tensor such as ``blk.3.attn_q.weight``, or None."""
    return _tensor(name, hf_module)


def gguf_name(name):
    """llama.cpp's name of a Hugging Face tensor, or None."""
    return _tensor(name, gguf_module)


def _tensor(name, of_module):
    module, _, kind = name.rpartition(".")
    found = of_module(module) if kind in ("weight", "bias") else None
    return None if found is None else f"{found}.{kind}"


def interleaved_heads(model_type, module, heads, kv_heads):
    """The number of heads whose rows llama.cpp stores interleaved, or 0 where it stores them as they are.

    Args:
        model_type: of the decoder; module: Hugging Face name; heads, kv_heads: of queries, and of keys and values.
    """
    if model_type != "llama":
        return 0
    return {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2], 0)


def interleave_rows(values, heads):
    """Hugging Face's row order to llama.cpp's: in each head (0, 1, ...) to (0, d/2, 1, d/2 + 1, ...).

    Args:
        values: (heads * head_dim, ...) array; heads: 0 leaves it as it is.
    """
    if not heads:
        return values
    split = values.reshape((heads, 2, values.shape[0] // heads // 2) + values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def restore_rows(values, heads):
    """Undo :func:`interleave_rows`."""
    if not heads or values.shape[0] % (2 * heads):
        return values  # a wrong shape, reported by the checkpoint's own check
    split = values.reshape((heads, values.shape[0] // heads // 2, 2) + values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
