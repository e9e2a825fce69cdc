"""Weight names and row orders: Hugging Face <-> mindformers, for Llama, Qwen2/2.5 and Qwen3.

mindformers has three ways to name and store the same decoder:

| layout | example | query, key, value | gate and up |
|---|---|---|---|
| ``legacy`` | ``model.layers.0.attention.wq`` | three linears, or ``w_qkv`` | two, or ``w_gate_hidden`` |
| ``mcore`` | ``decoder.layers.0.self_attention.linear_qkv`` | one linear | one linear |
| ``mcore-separate`` | ``decoder.layers.0.self_attention.linear_q`` | three | two (``gating``, ``hidden``) |

A fused linear holds its rows in one of two orders: "grouped" (for each key/value head its query heads, its key, its
value; and gate and up alternating), which training uses, and "joined" (all of q, then k, then v; gate, then up), which
inference and ``use_contiguous_weight_layout_attention`` use. The row order is a permutation, so that weights, biases
and the up factors of LoRA follow the same rule. Pure NumPy: mindformers is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from colora_ms.errors import CheckpointError, ConfigError, near

if TYPE_CHECKING:
    from colora_ms.models.config import DecoderConfig

_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

#: Hugging Face's module names -> mindformers', outside and inside a layer.
_LEGACY = ({"model.embed_tokens": "model.tok_embeddings", "model.norm": "model.norm_out", "lm_head": "lm_head"},
           "model.layers",
           {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
            "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
            "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
            "post_attention_layernorm": "ffn_norm"})
_MCORE = ({"model.embed_tokens": "embedding.word_embeddings", "model.norm": "decoder.final_layernorm",
           "lm_head": "output_layer"},
          "decoder.layers",
          {"self_attn.q_proj": "self_attention.linear_q", "self_attn.k_proj": "self_attention.linear_k",
           "self_attn.v_proj": "self_attention.linear_v", "self_attn.o_proj": "self_attention.linear_proj",
           "self_attn.q_norm": "self_attention.q_layernorm", "self_attn.k_norm": "self_attention.k_layernorm",
           "mlp.gate_proj": "mlp.gating", "mlp.down_proj": "mlp.linear_fc2", "mlp.up_proj": "mlp.hidden",
           "input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"})

ORDERS = (None, "grouped", "joined")


@dataclass(frozen=True)
class Layout:
    """One way of mindformers to name and store a decoder.

    Attributes:
        family: "legacy" or "mcore".
        qkv: None (three linears), "grouped" or "joined"; mlp: the same for gate and up.
    """

    family: str
    qkv: str | None = None
    mlp: str | None = None

    def __post_init__(self) -> None:
        if self.family not in ("legacy", "mcore"):
            raise ConfigError(f"the layout's family is {self.family!r}, expected 'legacy' or 'mcore'")
        for name in ("qkv", "mlp"):
            if getattr(self, name) not in ORDERS:
                raise ConfigError(f"the layout's {name} is {getattr(self, name)!r}, expected one of {ORDERS}")

    @property
    def tables(self) -> tuple[dict[str, str], str, dict[str, str]]:
        """(names outside layers, the layers' prefix, names inside a layer)."""
        return _LEGACY if self.family == "legacy" else _MCORE

    def fused(self, kind: str) -> str:
        """The fused linear of a layer: kind "qkv" or "mlp"."""
        names = {"legacy": {"qkv": "attention.w_qkv", "mlp": "feed_forward.w_gate_hidden"},
                 "mcore": {"qkv": "self_attention.linear_qkv", "mlp": "mlp.linear_fc1"}}
        return names[self.family][kind]


#: The layouts by name; ``legacy-fused`` is LlamaConfig's ``qkv_concat``.
LAYOUTS = {
    "legacy": Layout("legacy"),
    "legacy-fused": Layout("legacy", "grouped", "grouped"),
    "mcore": Layout("mcore", "grouped", "grouped"),
    "mcore-joined": Layout("mcore", "joined", "joined"),
    "mcore-separate": Layout("mcore"),
}


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that a model's parameter names show; row orders as training stores them (pass a Layout to say else).

    Raises:
        CheckpointError: the names are none of mindformers' decoders.
    """
    names = list(names)
    family = "legacy" if any(".attention.w" in name for name in names) else "mcore"
    if family == "mcore" and not any(".self_attention.linear_" in name for name in names):
        raise CheckpointError(f"these are not the names of a mindformers decoder of the Llama family: {names[:3]}")
    plain = Layout(family)
    return Layout(family, *("grouped" if any(f".{plain.fused(kind)}." in name for name in names) else None
                            for kind in ("qkv", "mlp")))


def resolve(layout: Layout | str) -> Layout:
    """A Layout from its name, or as it is."""
    if isinstance(layout, Layout):
        return layout
    if layout not in LAYOUTS:
        raise ConfigError(f"the layout is {layout!r}, expected one of {', '.join(LAYOUTS)}.{near(layout, LAYOUTS)}")
    return LAYOUTS[layout]


def row_order(config: DecoderConfig, kind: str, order: str) -> np.ndarray:
    """For each row of a fused linear, its row in [q; k; v] or [gate; up].

    Args:
        config: DecoderConfig; kind: "qkv" or "mlp"; order: "grouped" or "joined".

    Returns:
        (rows,) int64, a permutation.
    """
    if kind == "mlp":
        count = config.intermediate_size
        rows = np.arange(2 * count)
        return rows if order == "joined" else rows.reshape(2, count).T.reshape(-1)
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = np.arange((heads + 2 * groups) * size)
    if order == "joined":
        return rows
    q, k, v = np.split(rows, [heads * size, (heads + groups) * size])
    return np.concatenate([part.reshape(groups, -1) for part in (q, k, v)], axis=1).reshape(-1)


def part_sizes(config: DecoderConfig, kind: str) -> list[int]:
    """Rows of q, k, v, or of gate, up."""
    if kind == "mlp":
        return [config.intermediate_size] * 2
    return [config.num_attention_heads * config.head_dim] + [config.num_key_value_heads * config.head_dim] * 2


def parts(kind: str) -> list[str]:
    """Hugging Face's names, inside a layer, of what a fused linear holds."""
    return [f"self_attn.{one}" for one in _QKV] if kind == "qkv" else [f"mlp.{one}" for one in _MLP]


class Names:
    """The mapping of module names for one layout.

    Args:
        layout: a Layout or its name.
    """

    def __init__(self, layout: Layout | str) -> None:
        self.layout = resolve(layout)
        self.outer, self.prefix, self.inner = self.layout.tables
        self.back_outer = {value: key for key, value in self.outer.items()}
        self.back_inner = {value: key for key, value in self.inner.items()}

    def to_mindformers(self, module: str) -> str | None:
        """mindformers' name of a Hugging Face module (q_proj becomes wq even where the layout fuses it), or None."""
        if module in self.outer:
            return self.outer[module]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        inner = self.inner.get(match[2]) if match else None
        return f"{self.prefix}.{match[1]}.{inner}" if match and inner else None

    def to_huggingface(self, module: str) -> str | None:
        """Hugging Face's name of a mindformers module that is not fused, or None."""
        if module in self.back_outer:
            return self.back_outer[module]
        match = re.fullmatch(re.escape(self.prefix) + r"\.(\d+)\.(.+)", module)
        inner = self.back_inner.get(match[2]) if match else None
        return f"model.layers.{match[1]}.{inner}" if match and inner else None

    def fused_part(self, module: str) -> tuple[int, str] | None:
        """(layer, kind) of a Hugging Face module that the layout fuses, or None."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
        for kind in ("qkv", "mlp"):
            if match and getattr(self.layout, kind) and match[2] in parts(kind):
                return int(match[1]), kind
        return None

    def fused_module(self, module: str) -> tuple[int, str] | None:
        """(layer, kind) of a fused mindformers module, or None."""
        match = re.fullmatch(re.escape(self.prefix) + r"\.(\d+)\.(.+)", module)
        for kind in ("qkv", "mlp"):
            if match and match[2] == self.layout.fused(kind):
                return int(match[1]), kind
        return None

    def fused_name(self, layer: int, kind: str) -> str:
        """mindformers' name of a fused linear."""
        return f"{self.prefix}.{layer}.{self.layout.fused(kind)}"

    def order(self, config: DecoderConfig, kind: str) -> np.ndarray:
        """The row order of a fused linear of this layout; see :func:`row_order`."""
        return row_order(config, kind, getattr(self.layout, kind) or "grouped")


def to_mindformers(tensors: Mapping[str, np.ndarray], config: DecoderConfig,
                   layout: Layout | str) -> dict[str, np.ndarray]:
    """Hugging Face's tensors under mindformers' names.

    Args:
        tensors: {name: array}; config: DecoderConfig; layout: a Layout or its name.

    Returns:
        {name: array}; arrays that are not rearranged are the same objects.

    Raises:
        CheckpointError: lists every name that is unknown, and every part that a fused linear lacks.
    """
    names = Names(layout)
    found, waiting, unknown = {}, {}, []
    for name, value in tensors.items():
        module, _, field = name.rpartition(".")
        fused = names.fused_part(module)
        if fused:
            waiting.setdefault((*fused, field), {})[module.split(".", 3)[3]] = value
            continue
        target = names.to_mindformers(module)
        if target is None:
            unknown.append(name)
            continue
        if names.layout.family == "legacy" and target.endswith("tok_embeddings"):
            field = "embedding_weight"
        found[f"{target}.{field}"] = value
    problems = [f"{name} has no name in mindformers" for name in unknown]
    for (layer, kind, field), have in waiting.items():
        missing = [one for one in parts(kind) if one not in have]
        if missing:
            problems.append(f"layer {layer} lacks {', '.join(missing)} ({field}) for {names.layout.fused(kind)}")
        else:
            joined = np.concatenate([np.asarray(have[one]) for one in parts(kind)])
            found[f"{names.fused_name(layer, kind)}.{field}"] = joined[names.order(config, kind)]
    _refuse(problems)
    return found


def to_huggingface(tensors: Mapping[str, np.ndarray], config: DecoderConfig,
                   layout: Layout | str | None = None) -> dict[str, np.ndarray]:
    """mindformers' tensors under Hugging Face's names; the inverse of :func:`to_mindformers`.

    Args:
        tensors: {name: array}; config: DecoderConfig.
        layout: a Layout or its name; by default what the names show, with the row orders of training.

    Returns:
        {name: array}; fused linears are split, arrays that are not rearranged are the same objects.

    Raises:
        CheckpointError: lists names that are unknown and fused linears whose rows are not as many as the config asks
            for.
    """
    names = Names(layout if layout is not None else layout_of(tensors))
    found, problems = {}, []
    for name, value in tensors.items():
        module, _, field = name.rpartition(".")
        fused = names.fused_module(module)
        if fused:
            layer, kind = fused
            order = names.order(config, kind)
            if len(value) != len(order):
                problems.append(f"{name} has {len(value)} rows, the config asks for {len(order)}")
                continue
            joined = np.empty_like(np.asarray(value))
            joined[order] = value
            cuts = np.cumsum(part_sizes(config, kind))[:-1]
            for part, rows in zip(parts(kind), np.split(joined, cuts)):
                found[f"model.layers.{layer}.{part}.{field}"] = rows
            continue
        source = names.to_huggingface(module)
        if source is None:
            problems.append(f"{name} has no name in Hugging Face's {config.model_type}")
        else:
            found[f"{source}.{'weight' if field == 'embedding_weight' else field}"] = value
    _refuse(problems)
    return found


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError("the weights cannot be renamed: " + "; ".join(problems[:8]) + more)
