"""Checks of a request's numbers in the types in which the graph takes them: float32 and int32.

A number that is fine in Python may overflow, round to 0 or leave its range when it is cast. Whoever takes options of a
request (Generator, engine, HTTP, command line, recipes) hands them to the records of :mod:`colora_ms.decoding.options`,
and these use what is here; :class:`colora_ms.kernels.options.OptionRows` casts.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, List, Optional

import numpy as np

from colora_ms.errors import DecodingError

#: The largest float32, the smallest one above 0 that is held in full, and the largest int32.
LARGEST, SMALLEST, LARGEST_WHOLE = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny), 2**31 - 1


def shown(value: Any, length: int = 80) -> str:
    """A short text of any value, for messages; integers may be too long to be written."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # a message must not fail at what it complains about
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[:length - 3] + "..."


def is_real(value: Any) -> bool:
    """Whether a value is a number; bool is none, NaN is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_)) and bool(value == value)


def is_whole(value: Any) -> bool:
    """Whether a value is an integer; bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def sequence(value: Any) -> Optional[List[Any]]:
    """The entries of a list, tuple, array or the like, as a list; None of anything else."""
    if isinstance(value, (str, bytes, dict)):
        return None
    try:
        return list(value)
    except TypeError:
        return None


def real(name: str, value: Any) -> float:
    """A finite number of float32's range as a Python float; a positive one that float32 does not hold in full is 0.0.

    These are below :data:`SMALLEST`; whether a thread computes with them or with 0 depends on the processor's mode.

    Raises:
        DecodingError: it is no number, not finite, or too large for float32.
    """
    if not is_real(value):
        raise DecodingError(f"{name}={shown(value)} is not a finite number")
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction
        number = 2 * LARGEST if value > 0 else -2 * LARGEST
    if math.isinf(number):
        raise DecodingError(f"{name}={shown(value)} is not a finite number")
    if abs(number) > LARGEST:
        raise DecodingError(f"{name}={shown(value)} is more than float32 holds, {LARGEST:.2g}")
    return 0.0 if 0.0 <= number < SMALLEST else number


def flag(name: str, value: Any) -> bool:
    """A bool.

    Raises:
        DecodingError: it is something else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise DecodingError(f"{name}={shown(value)} is not True or False")
    return bool(value)


def whole(name: str, value: Any, least: Optional[float] = None, hint: str = "") -> int:
    """An integer of at least ``least`` as a Python int, of any size; ``hint`` ends the message.

    Raises:
        DecodingError: it is something else.
    """
    if not is_whole(value) or least is not None and value < least:
        range_ = "" if least is None else f" >= {least}"
        raise DecodingError(f"{name}={shown(value)} is not a whole number{range_}{hint}")
    return int(value)
