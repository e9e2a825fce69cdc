"""Integer grids of weights: scales by range search, rounding, and the downcast of LR-QAT (NumPy).

A weight (out, in) is cut into rows of one scale: whole output channels, or groups of neighbouring inputs (arXiv
2406.06385 views W as (-1, group)). On a grid of b bits

    W ~ s * q,    q in low .. low + 2^b - 1,    low = -2^(b-1) (symmetric) or -z (asymmetric, zero point z)

so the zero point needs no operation of its own: an asymmetric grid is a symmetric one whose bounds differ by row. The
largest positive value of a symmetric grid is 2^(b-1) - 1, hence s = range / 7 (not / 8) at four bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from colora_ms.errors import ConfigError
from colora_ms.models.formats import INT4, INT8, WeightFormat

#: Bits that a weight may have.
BITS = (8, 4, 3, 2)

#: Smallest scale; also the floor of a learned one.
SMALLEST_SCALE = np.float32(1e-8)

#: Downcasts of the frozen weight: how phi(W / s0) is stored.
DOWNCASTS = ("float", "fixed", "int")

_CHUNK = 1 << 16  # weights whose errors are measured at a time: the temporaries stay in a core's cache


@dataclass(frozen=True)
class Grid:
    """The integers that a weight may take.

    Attributes:
        bits: 8, 4, 3 or 2.
        group: inputs of one scale, or None for one scale an output channel.
        symmetric: False puts the range of each row where its values lie (2 and 3 bits only).
    """

    bits: int
    group: Optional[int] = None
    symmetric: bool = True

    def __post_init__(self):
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ConfigError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, BITS))}")
        whole = isinstance(self.group, int) and not isinstance(self.group, bool)
        if self.group is not None and (not whole or self.group < 1):
            raise ConfigError(f"group is {self.group!r}, expected a number of inputs from 1 on, or null for one scale "
                              "an output channel")
        if not self.symmetric and self.bits > 3:
            raise ConfigError(f"an asymmetric grid of {self.bits} bits does not fit its container; use symmetric, or 2 "
                              "or 3 bits")

    @property
    def levels(self) -> int:
        """2^bits - 1: the distance from the lowest to the highest integer."""
        return 2 ** self.bits - 1

    @property
    def lowest(self) -> int:
        """The lowest integer of a symmetric grid."""
        return -(2 ** (self.bits - 1))

    def container(self, in_features: int) -> WeightFormat:
        """The format that stores the integers. int4 packs pairs, so an odd number of inputs takes int8."""
        return INT4 if self.bits <= 4 and in_features % 2 == 0 else INT8

    def group_of(self, in_features: int, name: str = "the weight") -> int:
        """Inputs of one scale for a weight with that many inputs; ConfigError if the group does not divide them."""
        if self.group is None:
            return in_features
        if in_features % self.group:
            fits = [g for g in (256, 128, 96, 64, 48, 32, 16, 8) if in_features % g == 0]
            hint = f"; these would: {', '.join(map(str, fits))}" if fits else ""
            raise ConfigError(f"group {self.group} does not divide the {in_features} inputs of {name}{hint}, or leave "
                              "group out for one scale an output channel")
        return self.group

    def rows(self, weight: np.ndarray, name: str = "the weight") -> np.ndarray:
        """The weight (out, in) as a view (rows, inputs of one scale)."""
        return weight.reshape(-1, self.group_of(weight.shape[1], name))


def search_range(weight: np.ndarray, grid: Grid, norm: float = 4.0,
                 candidates: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Scale and lowest integer of each row, by the clipping threshold of least error.

    The threshold runs over ``candidates`` equal parts of the row's range; the one with the smallest
    sum |W - Q(W)|^norm is taken (the last one, no clipping, among equals).

    Args:
        weight: (rows, inputs) float32; see :meth:`Grid.rows`.
        norm: p of the error; 4 in the paper's code.
        candidates: thresholds to try; 1 takes the whole range.

    Returns:
        (scale, low): (rows,) float32 and (rows,) int32.
    """
    weight = np.asarray(weight, np.float32)
    scales, lows = np.empty(len(weight), np.float32), np.empty(len(weight), np.int32)
    step = max(1, _CHUNK // max(weight.shape[1], 1))
    for begin in range(0, len(weight), step):
        chunk = weight[begin:begin + step]
        below, above = np.minimum(chunk.min(1), 0), np.maximum(chunk.max(1), 0)
        best = np.full(len(chunk), np.inf, np.float64)
        scale, low = np.empty(len(chunk), np.float32), np.empty(len(chunk), np.int32)
        for number in range(candidates, 0, -1):
            part = np.float32(number / candidates)
            s, z = _scale_of(below * part, above * part, grid)
            error = _power_sum(chunk - round_to_grid(chunk, s, z, grid) * s[:, None], norm)
            better = error < best
            best[better], scale[better], low[better] = error[better], s[better], z[better]
        scales[begin:begin + step], lows[begin:begin + step] = scale, low
    return scales, lows


def _scale_of(below, above, grid):
    """Scale and lowest integer for rows whose clipped range is below .. above (below <= 0 <= above)."""
    if grid.symmetric:
        scale = np.maximum(-below, above) / np.float32(-grid.lowest - 1)
        low = np.full(len(scale), grid.lowest, np.int32)
    else:
        scale = (above - below) / np.float32(grid.levels)
        scale = np.maximum(scale, SMALLEST_SCALE)
        low = -np.clip(np.rint(-below / scale), 0, grid.levels).astype(np.int32)
    return np.maximum(scale, SMALLEST_SCALE).astype(np.float32), low


def _power_sum(error, norm):
    """Sum of |error|^norm over the last axis; even whole norms without a power function."""
    if norm in (2, 4):
        error = error * error
        return (error if norm == 2 else error * error).sum(1)
    return (np.abs(error) ** np.float32(norm)).sum(1)


def round_to_grid(weight: np.ndarray, scale: np.ndarray, low: np.ndarray, grid: Grid) -> np.ndarray:
    """Round-to-nearest integers (ties to even) as float32; weight (rows, inputs), scale and low (rows,)."""
    low = np.asarray(low, np.float32)[:, None]
    return np.clip(np.rint(weight / scale[:, None]), low, low + np.float32(grid.levels))


def downcast(weight: np.ndarray, scale: np.ndarray, low: np.ndarray, grid: Grid, how: str) -> np.ndarray:
    """phi(W / s0), the frozen weight of LR-QAT as it is stored.

    Args:
        weight: (rows, inputs) float32; scale, low: (rows,) of :func:`search_range`.
        how: "float": W / s0, float32, not clipped; "fixed": int8 fixed point Qb.(8-b), clipped to the grid, value
            ``stored * 2^(b-8)`` (+ the middle of the grid if it is asymmetric), 2 to 7 bits; "int": the int8 integers
            of round-to-nearest.

    Returns:
        (rows, inputs) float32 or int8.
    """
    if how not in DOWNCASTS:
        raise ConfigError(f"downcast is {how!r}, expected one of {', '.join(DOWNCASTS)}")
    if how == "int":
        return round_to_grid(weight, scale, low, grid).astype(np.int8)
    value = weight / scale[:, None]
    if how == "float":
        return value.astype(np.float32)
    if grid.bits > 7:
        raise ConfigError("a fixed-point downcast of 8 bits has no fractional bits; use downcast int or float")
    low = np.asarray(low, np.float32)[:, None]
    value = np.clip(value, low, low + np.float32(grid.levels)) - middle(low, grid)
    return np.clip(np.rint(value * np.float32(2 ** (8 - grid.bits))), -128, 127).astype(np.int8)


def middle(low: np.ndarray, grid: Grid) -> np.ndarray:
    """What the stored numbers of a fixed-point downcast are relative to: 0 on a symmetric grid."""
    return np.asarray(low, np.float32) - np.float32(grid.lowest)


def upcast(stored: np.ndarray, low: np.ndarray, grid: Grid, how: str) -> np.ndarray:
    """The inverse of :func:`downcast` up to its rounding: float32 on the integer grid."""
    value = stored.astype(np.float32)
    if how == "fixed":
        value = value * np.float32(2.0 ** (grid.bits - 8)) + middle(np.asarray(low)[:, None], grid)
    return value
