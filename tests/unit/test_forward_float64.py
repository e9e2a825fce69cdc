"""A decoder in plain NumPy float64, from the files read by colora_ms to transformers' logits.

It ties together what the other tests check one by one: config, tensor names and orientation,
rotary tables, and the goldens themselves.  Needs neither MindSpore nor torch.
"""

import os

import numpy as np
import pytest

from colora_ms.errors import CheckpointError
from colora_ms.models.checkpoint import default_model_path, open_checkpoint
from colora_ms.models.rope import rope_tables

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
TINY = ["llama", "llama_bias", "llama_linear", "llama_yarn", "qwen2", "qwen3"]


def forward(config, tensors, ids):
    """Logits (rows, length, vocab) of ids (rows, length), float64, the textbook formulas."""
    rows, length = ids.shape
    heads, groups, dim = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    cos, sin = (table.astype(np.float64)[None, :, None] for table in rope_tables(config, length))

    def get(name):
        return tensors[name].astype(np.float64)

    def norm(x, name):
        scale = np.sqrt(np.mean(x * x, -1, keepdims=True) + config.rms_norm_eps)
        return x / scale * get(name + ".weight")

    def linear(x, name):
        y = x @ get(name + ".weight").T
        return y + get(name + ".bias") if name + ".bias" in tensors else y

    def rotate(x):  # (rows, length, heads, dim)
        first, second = x[..., :dim // 2], x[..., dim // 2:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = get("model.embed_tokens.weight")[ids]
    future = np.triu(np.ones((length, length), bool), 1)
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (linear(h, f"{layer}self_attn.{part}_proj").reshape(rows, length, -1, dim)
                   for part in "qkv")
        if config.qk_norm:
            q, k = norm(q, layer + "self_attn.q_norm"), norm(k, layer + "self_attn.k_norm")
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(part, heads // groups, axis=2) for part in (k, v))
        scores = np.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(dim)
        scores[:, :, future] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("bhlm,bmhd->blhd", scores, v).reshape(rows, length, heads * dim)
        x = x + linear(mixed, layer + "self_attn.o_proj")
        h = norm(x, layer + "post_attention_layernorm")
        gate = linear(h, layer + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, layer + "mlp.up_proj"),
                       layer + "mlp.down_proj")
    x = norm(x, "model.norm")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return x @ get(head + ".weight").T


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name):
    folder = os.path.join(GOLDENS, "tiny", name)
    opened = open_checkpoint(folder)
    with np.load(os.path.join(folder, "logits.npz")) as golden:
        logits = forward(opened.config, opened.tensors, golden["ids"])
        np.testing.assert_allclose(logits[:, golden["positions"]], golden["logits"], atol=5e-5,
                                   rtol=0)
        np.testing.assert_array_equal(logits.argmax(-1), golden["argmax"])


def test_smollm2():
    try:
        opened = open_checkpoint(default_model_path("smollm2-135m"))
    except CheckpointError as error:
        pytest.skip(str(error))
    with np.load(os.path.join(GOLDENS, "smollm2.npz")) as golden:
        logits = forward(opened.config, opened.tensors, golden["ids0"][None])[0]
        kept = logits[golden["positions0"]][:, golden["columns"]]
        np.testing.assert_allclose(kept, golden["logits0"], atol=2e-4, rtol=0)
        np.testing.assert_array_equal(logits.argmax(-1), golden["argmax0"])
