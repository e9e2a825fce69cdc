"""Rotary position embedding tables (RoFormer, arXiv 2104.09864) and their context extensions.

The frequencies are computed in float32 in the same order of operations as transformers does, so
that logits agree with it; a float64 table would differ from the models' training by more than
float32 rounding at large positions.

Supported ``rope_scaling`` types: ``default``, ``linear`` (position interpolation), ``dynamic``
(NTK-aware; within the original length), ``llama3`` (Llama 3.1's frequency bands), ``yarn``
(arXiv 2309.00071) and ``longrope`` (arXiv 2402.13753). Pure NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional, Protocol

import numpy as np

from colora_ms.errors import ConfigError, near


class RotarySettings(Protocol):
    """What is read of a ``DecoderConfig``."""

    @property
    def head_dim(self) -> int:
        """Channels of a head."""

    @property
    def rotary_dim(self) -> int:
        """How many of them turn."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence."""

    @property
    def rope_theta(self) -> float:
        """The base of the frequencies."""

    @property
    def rope_scaling(self) -> Optional[dict]:
        """As :func:`normalize_scaling` makes it."""


# type -> (required keys, optional keys) of a rope_scaling dictionary
SCALING_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ("original_max_position_embeddings",)),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings"), ()),
    "yarn": (("factor",), ("attention_factor", "beta_fast", "beta_slow", "mscale",
                           "mscale_all_dim", "original_max_position_embeddings", "truncate")),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings"), ("attention_factor", "factor")),
}

# Keys that carry no mathematics: seen in released configs beside the ones above.
_HARMLESS_KEYS = ("rope_type", "type", "finetuned")


def normalize_scaling(scaling: object) -> tuple[Optional[dict], list[str]]:
    """Bring a ``rope_scaling`` dictionary into one form, or refuse it.

    Args:
        scaling: ``None`` or a dictionary with ``rope_type`` (or the older ``type``) and the
            numbers of that type.

    Returns:
        ``(normalized, problems)``: ``normalized`` is ``None`` for plain rotary, else a dictionary
        with ``rope_type`` first and only the keys that mean something (optional keys that are
        null are dropped); ``problems`` lists what is wrong, one sentence each.
    """
    if scaling is None:
        return None, []
    if not isinstance(scaling, dict):
        return None, [f"rope_scaling is {scaling!r}, expected a dictionary or null"]
    if not scaling:
        return None, []
    kind = scaling.get("rope_type", scaling.get("type"))
    if scaling.get("type", kind) != kind:
        return None, [f"rope_scaling names two types, rope_type={kind!r} and "
                      f"type={scaling['type']!r}"]
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
        return None, [f"rope_scaling type {kind!r} is not supported; supported: "
                      f"{', '.join(SCALING_KEYS)}.{near(kind, SCALING_KEYS)}"]
    required, optional = SCALING_KEYS[kind]
    problems = []
    kept = {"rope_type": kind}
    for key in required:
        if scaling.get(key) is None:
            problems.append(f"rope_scaling of type {kind!r} lacks {key!r}")
    for key, value in scaling.items():
        if key in _HARMLESS_KEYS:
            continue
        if key not in required and key not in optional:
            problems.append(f"rope_scaling of type {kind!r} has the unknown key {key!r}="
                            f"{value!r}.{near(key, required + optional)}")
        elif value is None:
            continue  # optional and null means absent; required and null was reported above
        elif key == "truncate":
            if not isinstance(value, bool):
                problems.append(f"rope_scaling['truncate'] is {value!r}, expected true or false")
            kept[key] = value
        elif key in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or not value or not all(map(_is_number, value)) or min(value) <= 0:
                problems.append(f"rope_scaling[{key!r}] is {value!r:.80}, expected a list of positive numbers")
            else:
                kept[key] = [float(one) for one in value]
        elif not _is_number(value) or value < 0:
            problems.append(f"rope_scaling[{key!r}] is {value!r}, expected a finite number >= 0")
        else:
            kept[key] = value
    if not problems:
        problems += _range_problems(kind, kept)
    return (None if kind == "default" else kept), problems


def _is_number(value):
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)


def _range_problems(kind, kept):
    """Values that are numbers but make the formulas meaningless."""
    problems = []
    if "factor" in kept and kept["factor"] < 1:
        problems.append(f"rope_scaling['factor'] is {kept['factor']!r}, expected a number >= 1")
    for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
        if key in kept and kept[key] <= 0:
            problems.append(f"rope_scaling[{key!r}] is {kept[key]!r}, expected a number > 0")
    if kind == "longrope" and len(kept["short_factor"]) != len(kept["long_factor"]):
        problems.append(f"rope_scaling has {len(kept['short_factor'])} short factors and {len(kept['long_factor'])} "
                        "long ones, expected as many")
    if kind == "llama3" and kept["high_freq_factor"] <= kept["low_freq_factor"]:
        problems.append(f"rope_scaling has high_freq_factor={kept['high_freq_factor']!r} <= "
                        f"low_freq_factor={kept['low_freq_factor']!r}, expected it to be larger")
    if kind == "yarn" and (kept.get("beta_fast") or 32) < (kept.get("beta_slow") or 1):
        problems.append(f"rope_scaling has beta_fast={kept.get('beta_fast')!r} below "
                        f"beta_slow={kept.get('beta_slow')!r}, expected it to be larger")
    return problems


def rope_frequencies(config: RotarySettings, max_len: int = 1) -> tuple[np.ndarray, float]:
    """The rotation per position of each pair of channels.

    Args:
        config: a ``DecoderConfig`` (``rotary_dim``, ``rope_theta``, ``rope_scaling``,
            ``max_position_embeddings`` are read).
        max_len: the longest sequence, which decides between longrope's two lists.

    Returns:
        ``(frequencies, attention_factor)``: float32 ``(rotary_dim // 2,)`` in radians per position,
        and the float that multiplies cos and sin (1.0 but for yarn and longrope).
    """
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    dim = config.rotary_dim
    exponents = np.arange(0, dim, 2).astype(np.float32) / np.float32(dim)
    # a float32 power, correctly rounded (torch's is; NumPy's own float32 power is not): one unit
    # in the last place would be 2e-4 radians at position 4000
    base = np.float64(np.float32(config.rope_theta))
    powers = np.power(base, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    if kind in ("default", "dynamic"):
        # dynamic: the base only grows beyond the original length, which rope_tables refuses.
        return frequencies, 1.0
    if kind == "longrope":
        return _longrope_frequencies(config, powers, scaling, max_len)
    factor = np.float32(scaling["factor"])
    if kind == "linear":
        return frequencies / factor, 1.0
    if kind == "llama3":
        return _llama3_frequencies(frequencies, scaling), 1.0
    return _yarn_frequencies(config, powers, scaling)


def longrope_list(config: RotarySettings, max_len: int) -> str:
    """Which of longrope's lists serves a model opened for sequences of ``max_len``: "short_factor" or "long_factor"; ""
    without longrope. It holds for all of its positions, so that cached keys stay right."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] != "longrope":
        return ""
    return "long_factor" if max_len > scaling["original_max_position_embeddings"] else "short_factor"


def _longrope_frequencies(config, powers, scaling, max_len):
    """LongRoPE (arXiv 2402.13753) as Phi-3 has it: a divisor for each frequency."""
    original, name = scaling["original_max_position_embeddings"], longrope_list(config, max_len)
    divisors = np.array(scaling[name], np.float32)
    if divisors.shape != powers.shape:
        raise ConfigError(f"rope_scaling[{name!r}] has {len(divisors)} numbers, expected {len(powers)}, one for each "
                          "two channels that turn")
    factor = scaling.get("attention_factor")
    if factor is None:
        grown = config.max_position_embeddings / original
        factor = 1.0 if grown <= 1 else math.sqrt(1 + math.log(grown) / math.log(original))
    return np.float32(1.0) / (divisors * powers), float(factor)


def _llama3_frequencies(frequencies, scaling):
    """Llama 3.1: keep short waves, divide long ones by the factor, blend those between."""
    factor = np.float32(scaling["factor"])
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    length = scaling["original_max_position_embeddings"]
    waves = np.float32(2 * math.pi) / frequencies
    long_wave, short_wave = np.float32(length / low), np.float32(length / high)
    scaled = np.where(waves > long_wave, frequencies / factor, frequencies)
    smooth = (np.float32(length) / waves - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    between = ~(waves < short_wave) & ~(waves > long_wave)
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn_frequencies(config, powers, scaling):
    """YaRN (arXiv 2309.00071, section 3.2): a ramp between interpolation and extrapolation."""
    dim, base = config.rotary_dim, config.rope_theta
    factor = scaling["factor"]
    length = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
        else:
            attention_factor = _yarn_scale(factor, 1)

    def channel(rotations):
        """The (fractional) channel pair that turns ``rotations`` times in the trained length."""
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    extrapolated = np.float32(1) / powers
    frequencies = interpolated * (np.float32(1) - keep) + extrapolated * keep
    return frequencies.astype(np.float32), float(attention_factor)


def _yarn_scale(factor, mscale):
    """The temperature of YaRN, ``0.1 m ln(s) + 1`` (equation 22 of the paper)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(config: RotarySettings, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the positions 0 .. max_len-1.

    Rotation of a head's vector x (head_dim,), with the halves x1 = x[:head_dim/2] and
    x2 = x[head_dim/2:]: ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (the layout of Hugging Face
    checkpoints). The attention factor of YaRN and longrope is already multiplied into both tables. Of channels that do
    not turn cosine is 1 and sine 0: their columns stand behind the others.

    Args:
        config: a ``DecoderConfig``.
        max_len: number of positions, an integer >= 1.

    Returns:
        ``(cos, sin)``, both float32 ``(max_len, head_dim // 2)``.

    Raises:
        ConfigError: ``max_len`` is not a positive integer, or a ``dynamic`` model is asked for
            more positions than ``max_position_embeddings`` (its frequencies then change with
            every length, so that cached keys would be wrong).
    """
    if isinstance(max_len, bool) or not isinstance(max_len, (int, np.integer)) or max_len < 1:
        raise ConfigError(f"rope_tables: max_len is {max_len!r}, expected an integer >= 1")
    kind = (config.rope_scaling or {}).get("rope_type")
    if kind == "dynamic" and max_len > config.max_position_embeddings:
        raise ConfigError(
            f"rope_scaling type 'dynamic' changes all frequencies beyond the original length of "
            f"{config.max_position_embeddings} positions, {max_len} were asked for; stay within "
            "that length or use a model with 'yarn' or 'llama3' scaling")
    frequencies, attention_factor = rope_frequencies(config, max_len)
    positions = np.arange(max_len, dtype=np.float32)
    angles = positions[:, None] * frequencies[None, :]  # (max_len, rotary_dim / 2)
    scale = np.float32(attention_factor)
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    still = (config.head_dim - config.rotary_dim) // 2
    if still:
        cos = np.concatenate([cos, np.ones((max_len, still), np.float32)], 1)
        sin = np.concatenate([sin, np.zeros((max_len, still), np.float32)], 1)
    return cos, sin


def local_rope_tables(config: RotarySettings, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`rope_tables`, of the sliding layers' own base (``rope_local_theta``) and without scaling."""
    return rope_tables(dataclasses.replace(config, rope_theta=config.rope_local_theta, rope_scaling=None), max_len)


def default_positions(config: RotarySettings) -> int:
    """The longest sequence of a model that is opened without one: the config's maximum; with longrope the original
    length, whose frequencies are the better ones for it."""
    if longrope_list(config, 1):
        return int(min(config.max_position_embeddings, config.rope_scaling["original_max_position_embeddings"]))
    return config.max_position_embeddings
