"""``LrQatConfig``: the settings of quantisation-aware training and of the round-to-nearest baseline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Optional

from colora_ms.errors import ConfigError, near
from colora_ms.models.activation_quant import ACTIVATIONS, activation_bits
from colora_ms.quantization.grids import DOWNCASTS, Grid

#: "lrqat": low-rank correction; "rtn": round to nearest, nothing is trained; "scales": only the scales are trained;
#: "full": the whole weight is trained (full quantisation-aware training, for comparison).
METHODS = ("lrqat", "rtn", "scales", "full")


@dataclass
class LrQatConfig:
    """Settings of LR-QAT (arXiv 2406.06385).

    Raises:
        ConfigError: one or more values cannot be used; the message lists all of them.
    """

    #: Bits of a weight: 8, 4, 3 or 2.
    bits: int = 4
    #: Inputs that share a scale; null: one scale an output channel. Smaller groups are more exact, with more scales.
    group: Optional[int] = None
    #: Symmetric grid; null: symmetric except at 2 bits, as in the paper.
    symmetric: Optional[bool] = None
    #: What is trained: lrqat, rtn (nothing), scales, or full (the whole weight; much more memory).
    method: str = "lrqat"
    #: Rank of the correction.
    r: int = 32
    #: Scale of the correction: alpha / r steps of the grid for one unit of up @ down. The paper's code has alpha 1 for
    #: 10,000 updates; short runs need more.
    lora_alpha: float = 1.0
    #: Storage of the frozen weight: float (4 bytes), fixed (fixed point in 8 bits), int (already rounded, 8 bits);
    #: null: fixed below 8 bits, int at 8.
    downcast: Optional[str] = None
    #: Whether the scales are trained (at optimizer.scale_ratio of the learning rate).
    learn_scale: bool = True
    #: Norm p of the range search, which minimises sum |W - Q(W)|^p.
    range_norm: float = 4.0
    #: Clipping thresholds that the range search tries; 1 takes the whole range.
    range_candidates: int = 100
    #: Rounding of activations: null, a8, a8kv4 or a4.
    activations: Optional[str] = None
    #: Linears to quantise, by endings of their names; null: all but the output head.
    target_modules: Optional[list] = None

    def __post_init__(self):
        problems = self.problems()
        if problems:
            raise ConfigError("this quantisation config cannot be used: " + "; ".join(problems))
        if self.symmetric is None:
            self.symmetric = self.bits != 2
        if self.downcast is None:
            self.downcast = "int" if self.bits == 8 else "fixed"
        self.grid = Grid(self.bits, self.group, self.symmetric)
        if self.downcast == "fixed" and self.bits == 8:
            raise ConfigError("downcast fixed leaves 8-bit weights no fractional bits; use int or float")

    def problems(self) -> list[str]:
        """All that is wrong with single values, as a list of sentences."""
        found = []
        try:
            Grid(self.bits, self.group, self.bits != 2 if self.symmetric is None else bool(self.symmetric))
        except ConfigError as error:
            found.append(str(error))
        if self.symmetric not in (None, True, False):
            found.append(f"symmetric is {self.symmetric!r}, expected true, false or null")
        if self.method not in METHODS:
            found.append(f"method is {self.method!r}, expected one of {', '.join(METHODS)}."
                         + near(self.method, METHODS))
        for name in ("r", "range_candidates"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 20:
                found.append(f"{name} is {value!r}, expected a whole number from 1 on")
        for name in ("lora_alpha", "range_norm"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
                found.append(f"{name} is {value!r}, expected a number above 0")
        if self.downcast is not None and self.downcast not in DOWNCASTS:
            found.append(f"downcast is {self.downcast!r}, expected null or one of {', '.join(DOWNCASTS)}."
                         f"{near(self.downcast, DOWNCASTS)}")
        if not isinstance(self.learn_scale, bool):
            found.append(f"learn_scale is {self.learn_scale!r}, expected true or false")
        if self.activations is not None and self.activations not in ACTIVATIONS:
            found.append(f"activations is {self.activations!r}, expected null or one of {', '.join(ACTIVATIONS)}."
                         f"{near(self.activations, ACTIVATIONS)}")
        if self.target_modules is not None and not (
                isinstance(self.target_modules, list) and self.target_modules
                and all(isinstance(name, str) and name for name in self.target_modules)):
            found.append(f"target_modules is {self.target_modules!r}, expected null or a list of names")
        return found

    @property
    def scaling(self) -> float:
        """alpha / r."""
        return self.lora_alpha / self.r

    def activation_bits(self, path: str) -> tuple[int, int]:
        """(bits of the input, bits of the output) of the linear called ``path``; 0 = float."""
        return activation_bits(self.activations, path)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary; :meth:`from_dict` reads it back equal."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LrQatConfig:
        """Build a config from a parsed file; ConfigError names unknown settings."""
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict):
            raise ConfigError(f"the quantisation settings are {values!r:.80}, expected name: value")
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ConfigError(f"quantisation has no setting {unknown[0]!r}; it has {', '.join(known)}."
                              + near(unknown[0], known))
        return cls(**values)
