"""How the weights of the families' tiny models follow from their names, for the maker of the goldens and the tests."""

import zlib

import numpy as np


def _uniform(name, shape):
    """Numbers of -sqrt(3) to sqrt(3), standard deviation 1, from the raw bits of PCG64."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    unit = (raw >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)
    return (unit * np.float32(np.sqrt(12.0))).reshape(shape)


def tensor(name, shape, raised=False):
    """A tensor by its name in a folder: nothing is what an initialiser makes of it.

    Args:
        raised: the family's norms multiply by 1 + weight.
    """
    values = _uniform(name, shape)
    if "norm" in name:  # factors of 0.5 to 1.5
        return (values * np.float32(0.28) + np.float32(0.0 if raised else 1.0)).astype(np.float32)
    if name.endswith(".bias"):
        return values * np.float32(0.3)
    if ".lora_A." in name:
        return values * np.float32(0.7 / np.sqrt(shape[-1]))
    if ".lora_B." in name:
        return values * np.float32(0.2)
    if name.endswith("mlp.gate.weight") or name.endswith("moe.gate.weight"):
        return values * np.float32(3.0 / np.sqrt(shape[-1]))  # routers that decide
    if name == "model.embed_tokens.weight":
        return values * np.float32(0.4)
    return values * np.float32(1.3 / np.sqrt(shape[-1]))
