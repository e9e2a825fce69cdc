"""Rotary tables against transformers' (goldens) and against float64."""

import json
import os

import numpy as np
import pytest

from colora_ms.errors import ConfigError
from colora_ms.models.config import DecoderConfig
from colora_ms.models.rope import rope_frequencies, rope_tables

GOLDENS = os.path.join(os.path.dirname(__file__), "..", "goldens")
with open(os.path.join(GOLDENS, "rope.json"), encoding="utf-8") as _file:
    CASES = json.load(_file)


def build(settings):
    return DecoderConfig.from_hf(dict(settings, model_type="llama"))


@pytest.fixture(scope="module")
def golden():
    with np.load(os.path.join(GOLDENS, "rope.npz")) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", sorted(CASES))
def test_equal_to_transformers(name, golden):
    config = build(CASES[name])
    positions = golden["positions"]
    cos, sin = rope_tables(config, int(positions.max()) + 1)
    assert cos.dtype == sin.dtype == np.float32
    assert cos.shape == sin.shape == (int(positions.max()) + 1, config.head_dim // 2)
    # Angles grow to 4095 radians, where one unit in the last place of a frequency is 2.4e-4:
    # only equal frequencies pass.
    np.testing.assert_allclose(cos[positions], golden[name + ".cos"], atol=2e-6, rtol=0)
    np.testing.assert_allclose(sin[positions], golden[name + ".sin"], atol=2e-6, rtol=0)


def test_goldens_tell_the_scalings_apart(golden):
    """Otherwise the test above could pass with the scaling left out."""
    plain, _ = rope_tables(build(CASES["default"]), 4096)
    for name in ("linear", "yarn_no_original", "yarn_mscale", "yarn_attention_factor"):
        assert np.abs(plain[golden["positions"]] - golden[name + ".cos"]).max() > 0.1


@pytest.mark.parametrize("theta, dim", [(1e4, 64), (5e5, 128), (1e6, 8)])
def test_default_against_float64(theta, dim):
    config = build(dict(CASES["default"], rope_theta=theta, head_dim=dim))
    frequencies, factor = rope_frequencies(config)
    exact = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    np.testing.assert_allclose(frequencies, exact, rtol=1e-6)
    assert factor == 1.0
    cos, sin = rope_tables(config, 64)
    angles = np.arange(64, dtype=np.float64)[:, None] * exact
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-5)


def test_tables_of_different_lengths_agree():
    for settings in CASES.values():
        config = build(settings)
        long, short = rope_tables(config, 200), rope_tables(config, 7)
        np.testing.assert_array_equal(long[0][:7], short[0])
        np.testing.assert_array_equal(long[1][:7], short[1])


def test_dynamic_beyond_the_original_length_is_refused():
    config = build(CASES["dynamic"])
    assert rope_tables(config, config.max_position_embeddings)[0].shape[0] == 4096
    with pytest.raises(ConfigError, match="4097 were asked for"):
        rope_tables(config, 4097)


@pytest.mark.parametrize("length", [0, -1, 2.5, True, None, "8"])
def test_impossible_lengths(length):
    with pytest.raises(ConfigError, match="max_len"):
        rope_tables(build(CASES["default"]), length)
