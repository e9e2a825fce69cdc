"""Rules that the maker of the goldens and the tests share.  NumPy only."""

import zlib

import numpy as np

# A prompt for the logits of SmolLM2 (positions and columns are subsets, to keep the file small).
LOGIT_PROMPTS = ["The capital of France is Paris, and the capital of Italy is",
                 "Natalia sold clips to 48 of her friends in April, and then she sold half as many"
                 " clips in May. How many clips did she sell altogether?"]
GREEDY_PROMPTS = ["The capital of France is", "Once upon a time, there was a little",
                  "def fibonacci(n):\n", "12 + 30 ="]

# LoRA settings of the two SmolLM2 adapters; their tensors follow from ``adapter_tensor``.
SMOLLM2_ADAPTERS = {
    "qv_r8": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all_rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear",
                   "rank_pattern": {"q_proj": 6, "layers.3.mlp.down_proj": 2},
                   "alpha_pattern": {"layers.1.self_attn.v_proj": 3, "gate_proj": 9}},
}


def adapter_tensor(key, shape):
    """The tensor of an adapter, from its name alone.

    Uniform, with standard deviation 0.5/sqrt(in) for lora_A and 0.02 for lora_B, made from the
    raw bits of PCG64, which NumPy keeps the same in all versions (its distributions it does not).

    Args:
        key: PEFT's name of the tensor, ``base_model.model....lora_A.weight``.
        shape: its shape.

    Returns:
        float32 array.
    """
    raw = np.random.PCG64(zlib.crc32(key.encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    spread = 0.5 / np.sqrt(shape[-1]) if ".lora_A." in key else 0.02
    return (unit * np.float32(spread * np.sqrt(12.0))).reshape(shape)


# Strings that tokenizers get wrong: blanks, digits, contractions, scripts, emoji, specials.
AWKWARD_STRINGS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\n \n", "\t\n", " \r\n ", "Hello world",
    " Hello world", "Hello  world   ", "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "3", "33", "333", "3333 33333", "1,234.56e-7", "x=1;y=22", "can't won't I'LL he'd we've",
    "'''''' ``````` \"\"\"\"", "ied 4 ½ months", "Führer", "Äpfel über Öfen", "ﬁ ligature Å Å",
    "нещо на Български", "កាន់តែពិសេសអាចខលចេញ", "🚀 (normal) 😶‍🌫️ (multiple emojis) ✅ (its own token)",
    "<|im_start|>user\nhi<|im_end|>", "<s>not</s> <unk>", "\u200b\ufeff\x00\x7f", "a\u0301 e\u0308",
    "    def f(x):\n        return x ** 2\n", "C:\\path\\to\\file", "https://example.org/?q=a%20b&c=d",
    "＝＝＝", "!!!???...", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "١٢٣ ४५६ Ⅷ ²³",
]

# Adapters on tiny/llama that are combined: name -> LoRA settings.
COMBINED = {
    "a": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "b": {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "c": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "wide": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj"]},
}

# case -> (names, weights, options of add_weighted_adapter)
COMBINATIONS = {
    "cat": (["a", "c", "wide"], [0.7, -0.4, 1.5], {"combination_type": "cat"}),
    "svd": (["a", "c", "wide"], [0.7, -0.4, 1.5], {"combination_type": "svd"}),
    "svd_rank": (["a", "c"], [1.0, 2.0], {"combination_type": "svd", "svd_rank": 2}),
    "linear": (["a", "c"], [0.7, -0.4], {"combination_type": "linear"}),
    "single": (["c"], [-0.5], {"combination_type": "svd"}),
    "ties": (["a", "c"], [1.0, 0.6], {"combination_type": "ties", "density": 0.4}),
    "ties_frequency": (["a", "c"], [1.0, 0.6], {"combination_type": "ties", "density": 0.7,
                                                "majority_sign_method": "frequency"}),
    "ties_svd": (["a", "c", "wide"], [1.0, 0.6, 0.9], {"combination_type": "ties_svd", "density": 0.5}),
    "magnitude_prune": (["a", "c"], [1.0, -0.6], {"combination_type": "magnitude_prune", "density": 0.3}),
    "magnitude_prune_svd": (["a", "wide"], [1.0, -0.6], {"combination_type": "magnitude_prune_svd", "density": 0.3,
                                                         "svd_rank": 5}),
    "dare_linear_all": (["a", "c"], [1.0, 0.5], {"combination_type": "dare_linear", "density": 1.0}),
    "dare_ties_svd_all": (["a", "wide"], [1.0, 0.5], {"combination_type": "dare_ties_svd", "density": 1.0}),
    "cat_rslora": (["a", "b"], [0.7, -0.4], {"combination_type": "cat"}),
}

COMBINED_MODULES = {"q": "model.layers.0.self_attn.q_proj", "up": "model.layers.0.mlp.up_proj",
                    "down": "model.layers.1.mlp.down_proj", "embed": "model.embed_tokens"}


def combined_tensor(name, key, shape):
    """A factor of the adapter ``name`` of ``COMBINED``: uniform, unlike for every name and key."""
    path = key.split("lora_", 1)[0].removeprefix("base_model.model.").rstrip(".")
    half = "B" if "_B" in key else "A"
    raw = np.random.PCG64(zlib.crc32(f"{name} {path} {half}".encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    return unit.reshape(shape)
