"""What llama.cpp calls the tensors of a decoder, and how it orders their rows; both directions.

llama.cpp stores the query and key rows of some architectures (``llama``) interleaved for its rotary kernel: within a
head, channel i of the first half is followed by channel i of the second. Others (Qwen2 and Qwen3) are stored unchanged.
Names and orders are in the families' records.
"""

from __future__ import annotations

import re
from typing import Optional

import numpy as np

from colora_ms.models.config import DecoderConfig
from colora_ms.models.families import GGUF_LAYER, Family, family

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

#: Longrope's divisors of the frequencies, the long list and the short one.
LONGROPE = ("rope_factors_long.weight", "rope_factors_short.weight")

#: Llama 3.1's rule for the rotary factors, under this package's own keys: llama.cpp only knows the factors.
LLAMA3_KEYS = {"factor": "colora_ms.rope.factor", "low_freq_factor": "colora_ms.rope.low_freq_factor",
               "high_freq_factor": "colora_ms.rope.high_freq_factor",
               "original_max_position_embeddings": "colora_ms.rope.original_context_length"}

#: Modules of a model under llama.cpp's names, and under Hugging Face's.
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.([a-z_.]+)")


def hf_module(name: str, record: Optional[Family]) -> Optional[str]:
    """The Hugging Face name of a llama.cpp module such as ``blk.3.attn_q``, or None.

    Args:
        name: llama.cpp's; record: of the family, or None for the usual names (of an adapter for an unknown model).
    """
    if name in _TOP:
        return _TOP[name]
    layer = record.gguf_layer if record else GGUF_LAYER
    match = _GGUF_LAYER.fullmatch(name)
    if match is None or match.group(2) not in layer:
        return None
    return f"model.layers.{match.group(1)}.{layer[match.group(2)]}"


def gguf_module(name: str, record: Family) -> Optional[str]:
    """llama.cpp's name of a Hugging Face module such as ``model.layers.3.self_attn.q_proj``, or None.

    Args:
        name: Hugging Face's; record: of the family.
    """
    table, wanted, prefix, match = _TOP, name, "", _HF_LAYER.fullmatch(name)
    if match:
        table, wanted, prefix = record.gguf_layer, match.group(2), f"blk.{match.group(1)}."
    return next((prefix + own for own, other in table.items() if other == wanted), None)


#: Experts under llama.cpp's names, behind ``blk.N.``: (what stands below the MLP, the part of a routed expert or None).
_EXPERTS = {"ffn_gate_inp": ("gate", None), "ffn_gate_inp_shexp": ("shared_expert_gate", None),
            "ffn_gate_shexp": ("shared_expert.gate_proj", None), "ffn_up_shexp": ("shared_expert.up_proj", None),
            "ffn_down_shexp": ("shared_expert.down_proj", None), "ffn_gate_exps": ("experts", 0),
            "ffn_up_exps": ("experts", 1), "ffn_down_exps": ("experts", 2), "ffn_gate_up_exps": ("experts", 3),
            "ffn_gate": ("experts", 0), "ffn_up": ("experts", 1), "ffn_down": ("experts", 2)}
_EXPERT = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)(?:\.(\d+))?\.weight")


def expert_tensors(name: str, record: Family, shape: tuple[int, ...]) -> Optional[dict[str, tuple]]:
    """{Hugging Face's name: (index of the expert or None, rows or None)} of what a tensor of routed experts holds, or
    None where it is none.

    Args:
        name: llama.cpp's: all experts in one tensor (``blk.N.ffn_gate_exps``, with gate and up together
            ``ffn_gate_up_exps``), one each in old files (``blk.N.ffn_gate.E``), the router and the shared expert.
        record: of the family; shape: of the tensor.
    """
    match = _EXPERT.fullmatch(name)
    if match is None or record.routing is None or match.group(2) not in _EXPERTS:
        return None
    below, part = _EXPERTS[match.group(2)]
    prefix = f"model.layers.{match.group(1)}.{record.mlp}.{below}"
    single = match.group(2) in ("ffn_gate", "ffn_up", "ffn_down")
    if single != (match.group(3) is not None):
        return None
    if part is None:
        return {f"{prefix}.weight": (None, None)}
    if single:
        return {f"{prefix}.{match.group(3)}.{record.routing.parts[part]}.weight": (None, None)}
    if len(shape) != 3:
        return None
    middle = shape[1] // 2
    rows = {0: (0, middle), 1: (middle, shape[1])} if part == 3 else {part: None}
    return {f"{prefix}.{index}.{record.routing.parts[one]}.weight": (index, place)
            for index in range(shape[0]) for one, place in rows.items()}


def hf_name(name: str, record: Family) -> Optional[str]:
    """The Hugging Face name of a llama.cpp tensor such as ``blk.3.attn_q.weight``, or None; see :func:`hf_module`."""
    return _tensor(name, hf_module, record)


def gguf_name(name: str, record: Family) -> Optional[str]:
    """llama.cpp's name of a Hugging Face tensor, or None; see :func:`hf_module`."""
    return _tensor(name, gguf_module, record)


def _tensor(name, of_module, record):
    module, _, kind = name.rpartition(".")
    found = of_module(module, record) if kind in ("weight", "bias") else None
    return None if found is None else f"{found}.{kind}"


def interleaved_heads(config: DecoderConfig, module: str) -> int:
    """The number of heads whose rows llama.cpp stores interleaved, or 0 where it stores them as they are.

    Args:
        config: of the decoder; module: Hugging Face name.
    """
    if not family(config.model_type).gguf_interleaved:
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(module.rpartition(".")[2], 0)


def interleave_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's row order to llama.cpp's: in each head (0, 1, ...) to (0, d/2, 1, d/2 + 1, ...).

    Args:
        values: (heads * head_dim, ...) array; heads: 0 leaves it as it is.
    """
    if not heads:
        return values
    split = values.reshape((heads, 2, values.shape[0] // heads // 2) + values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))


def restore_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Undo :func:`interleave_rows`."""
    if not heads or values.shape[0] % (2 * heads):
        return values  # a wrong shape, reported by the checkpoint's own check
    split = values.reshape((heads, values.shape[0] // heads // 2, 2) + values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(values.shape))
