"""The base model of the Lily goldens: a random Llama of five layers, the same for both sides."""

import zlib

import numpy as np

SIZES = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=5, num_attention_heads=3,
             num_key_value_heads=1, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1,
             eos_token_id=2, tie_word_embeddings=False)


def weights(shapes):
    """{name: float32 array} for {name: shape}; each value depends on its name alone.

    Uniform, from the raw bits of PCG64, which NumPy keeps the same in all versions (its distributions it does not).
    """
    found = {}
    for name, shape in shapes.items():
        raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
        unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
        found[name] = (unit + np.float32("norm" in name)).reshape(shape)
    return found
