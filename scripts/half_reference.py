"""A decoder in NumPy that rounds to a half type where Ascend's operators do: what the rehearsal is compared with.

Written from the operators' descriptions, not from the graph: every operator's result is rounded once to the compute
type, sums inside of one are float32. It reads names and values as a checkpoint and a PEFT folder have them.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np

#: An adapter: module's name -> (down (r, in), up (out, r), scale).
Adapter = Mapping[str, Tuple[np.ndarray, np.ndarray, float]]

#: Relative distance of neighbouring numbers of a type, halved: how far one rounding is off.
UNIT = {"float16": 2.0 ** -11, "bfloat16": 2.0 ** -8}

#: How near two experts' logits may be, in roundings of the largest of the row, for a rounding to choose between them.
NEAR = 4.0


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the type holds, to nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).view(np.float32)


def _chooses(name: str) -> bool:
    """Whether a weight is a router's, or the gate's of a shared expert: they stay float32."""
    return name.rpartition(".")[0].endswith((".gate", ".shared_expert_gate"))


class HalfReference:
    """The logits of a decoder of the Llama family, or of its kin with routed experts, in a half type.

    Args:
        config: a ``DecoderConfig``.
        weights: {Hugging Face name: float32 array}.
        rope: (cos, sin), each (positions, head_dim / 2) float32.
        adapters: one a slot.
        dtype: "float16" or "bfloat16".
    """

    def __init__(self, config: Any, weights: Mapping[str, np.ndarray], rope: Tuple[np.ndarray, np.ndarray],
                 adapters: Sequence[Adapter], dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.weights = {name: np.float32(value) if _chooses(name) else self._half(value)
                        for name, value in weights.items()}
        self.cos, self.sin = (self._half(one) for one in rope)
        self.adapters = [{name: (self._half(down), self._half(up), np.float32(scale))
                          for name, (down, up, scale) in one.items()} for one in adapters]
        self._kept: Dict[Tuple[int, bytes], Tuple[np.ndarray, np.ndarray]] = {}

    def _half(self, values: np.ndarray) -> np.ndarray:
        return rounded(values, self.dtype)

    def logits(self, ids: Sequence[int], slot: int) -> np.ndarray:
        """(tokens, vocab) float32: the logits behind every token of a sequence."""
        return self._found(ids, slot)[0]

    def settled(self, ids: Sequence[int], slot: int) -> np.ndarray:
        """(tokens,) bool: whether no router's choice so far hangs on a rounding, see :data:`NEAR`."""
        return self._found(ids, slot)[1]

    def _found(self, ids: Sequence[int], slot: int) -> Tuple[np.ndarray, np.ndarray]:
        key = (slot, np.asarray(ids, np.int32).tobytes())
        if key not in self._kept:
            self._clear = np.ones(len(ids), bool)
            logits = self._forward(np.asarray(ids), None if slot < 0 else self.adapters[slot])
            self._kept[key] = logits, np.logical_and.accumulate(self._clear)
        return self._kept[key]

    def _forward(self, ids: np.ndarray, adapter: Optional[Adapter]) -> np.ndarray:
        config, eps = self.config, np.float32(self.config.rms_norm_eps)
        x = self.weights["model.embed_tokens.weight"][ids]  # (tokens, hidden)
        residual = np.zeros_like(x)
        for i in range(config.num_hidden_layers):
            name = f"model.layers.{i}"
            residual = self._half(residual + x)
            h = self._norm(residual, f"{name}.input_layernorm", eps)
            h = self._attention(h, f"{name}.self_attn", adapter)
            residual = self._half(residual + h)
            h = self._norm(residual, f"{name}.post_attention_layernorm", eps)
            routed = next((one for one in ("mlp", "block_sparse_moe") if f"{name}.{one}.gate.weight" in self.weights),
                          None)
            x = self._experts(h, f"{name}.{routed}", adapter) if routed else self._mlp(h, f"{name}.mlp", adapter)
        h = self._norm(self._half(residual + x), "model.norm", eps)
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        return self._linear(h, head, adapter, "lm_head")

    def _mlp(self, h: np.ndarray, name: str, adapter: Optional[Adapter]) -> np.ndarray:
        w1, w3, w2 = (("gate_proj", "up_proj", "down_proj") if f"{name}.gate_proj.weight" in self.weights
                      else ("w1", "w3", "w2"))
        gate, up = (self._linear(h, f"{name}.{part}", adapter) for part in (w1, w3))
        with np.errstate(over="ignore"):
            h = self._half(gate / (1 + np.exp(-gate)) * up)
        return self._linear(h, f"{name}.{w2}", adapter)

    def _experts(self, h: np.ndarray, name: str, adapter: Optional[Adapter]) -> np.ndarray:
        """The router and its shares are float32; the shares are rounded when they multiply."""
        config = self.config
        logits = h @ self.weights[f"{name}.gate.weight"].T
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        chosen = np.argsort(-shares, -1, kind="stable")[:, :config.experts_per_token]  # (tokens, k)
        if config.experts_per_token < config.experts:
            last, first_out = np.sort(logits, -1)[:, ::-1][:, config.experts_per_token - 1:][:, :2].T
            self._clear &= last - first_out > NEAR * UNIT[self.dtype] * np.abs(logits).max(-1)
        taken = np.take_along_axis(shares, chosen, 1)
        if config.normalised_experts:
            taken = taken / taken.sum(-1, keepdims=True)
        out = np.zeros_like(h)
        for expert in np.unique(chosen):
            tokens, place = np.nonzero(chosen == expert)
            made = self._mlp(h[tokens], f"{name}.experts.{expert}", None)
            out[tokens] += made * self._half(taken)[tokens, place][:, None]
        out = self._half(out)
        if not config.shared_size:
            return out
        share = 1 / (1 + np.exp(-(h @ self.weights[f"{name}.shared_expert_gate.weight"].T)))
        shared = self._mlp(h, f"{name}.shared_expert", adapter)
        return self._half(out + self._half(shared * self._half(share)))

    def _linear(self, x: np.ndarray, name: str, adapter: Optional[Adapter], called: str = "") -> np.ndarray:
        y = self._half(x @ self.weights[f"{name}.weight"].T)
        if f"{name}.bias" in self.weights:
            y = self._half(y + self.weights[f"{name}.bias"])
        pair = (adapter or {}).get(called or name)
        if pair is None:
            return y
        down, up, scale = pair
        return self._half(y + x @ down.T * scale @ up.T)

    def _norm(self, x: np.ndarray, name: str, eps: np.float32) -> np.ndarray:
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        return self._half(x / np.sqrt(mean + eps) * self.weights[f"{name}.weight"])

    def _attention(self, h: np.ndarray, name: str, adapter: Optional[Adapter]) -> np.ndarray:
        config, tokens, dim = self.config, len(h), self.config.head_dim
        q, k, v = (self._linear(h, f"{name}.{part}", adapter).reshape(tokens, -1, dim)
                   for part in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm:
            eps = np.float32(config.rms_norm_eps)
            q, k = self._norm(q, f"{name}.q_norm", eps), self._norm(k, f"{name}.k_norm", eps)
        q, k = self._turned(q), self._turned(k)
        group = config.num_attention_heads // config.num_key_value_heads
        k, v = (np.repeat(one, group, axis=1) for one in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(dim ** -0.5)
        scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
        chances = np.exp(scores - scores.max(axis=-1, keepdims=True))
        chances /= chances.sum(axis=-1, keepdims=True)
        out = self._half(np.einsum("hqk,khd->qhd", chances, v)).reshape(tokens, -1)
        return self._linear(out, f"{name}.o_proj", adapter)

    def _turned(self, x: np.ndarray) -> np.ndarray:
        cos, sin = (one[:len(x), None] for one in (self.cos, self.sin))  # (tokens, 1, dim / 2)
        first, second = np.split(x, 2, axis=-1)
        return self._half(np.concatenate((first * cos - second * sin, second * cos + first * sin), -1))
