"""Placeholder until the step of the branch ``step`` is merged: the records of its face."""

from __future__ import annotations

import dataclasses
from typing import List, Optional

import numpy as np


@dataclasses.dataclass
class FlatBatch:
    """What one call takes."""

    tokens: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    copies: np.ndarray
    whole: np.ndarray
    real: np.ndarray
    previous: np.ndarray
    uniforms: np.ndarray
    eos: np.ndarray
    prompt: List[Optional[np.ndarray]]
    steps: int


@dataclasses.dataclass
class StepResult:
    """What it gives."""

    ints: np.ndarray
    floats: np.ndarray
    counts: np.ndarray
