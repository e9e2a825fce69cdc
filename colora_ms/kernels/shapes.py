"""Compile-time checks that the shape functions of the operators share.

A shape function runs while a graph is compiled, so that what it raises reaches the caller as a Python exception that
names operator, argument and value, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colora_ms.kernels.aot import KernelError


def require(condition: bool, operator: str, argument: str, value: Any, expected: Any) -> None:
    """Raise :class:`KernelError` unless ``condition`` holds.

    Args:
        condition: what must be true.
        operator: name of the operator, for the message.
        argument: name of the argument that is wrong.
        value: its value or shape (a list is shown as a tuple).
        expected: what is right, in words.
    """
    if condition:
        return
    if isinstance(value, (list, tuple)):
        raise KernelError(f"{operator}: {argument} has shape {tuple(value)}, expected {expected}")
    raise KernelError(f"{operator}: {argument} is {value}, expected {expected}")


def agree(a: int, b: int) -> bool:
    """Whether two dimensions can be one: they are equal, or one is not known while the graph is compiled (-1)."""
    return a == b or a == -1 or b == -1


def require_shape(operator: str, argument: str, shape: Sequence, expected: Sequence) -> None:
    """Raise :class:`KernelError` unless ``shape`` agrees with ``expected`` (both lists or tuples of int)."""
    fits = len(shape) == len(expected) and all(agree(a, b) for a, b in zip(shape, expected))
    require(fits, operator, argument, shape, str(tuple(expected)))


def require_dtype(operator: str, argument: str, dtype: Any, allowed: Sequence) -> None:
    """Raise :class:`KernelError` unless ``dtype`` is one of ``allowed`` (MindSpore dtypes)."""
    if dtype not in allowed:
        names = " or ".join(str(one) for one in allowed)
        raise KernelError(f"{operator}: {argument} has dtype {dtype}, expected {names}")


def element_type(dtype: Any) -> Any:
    """The element dtype of what a dtype function is given (a dtype, or a tensor type that holds one)."""
    inner = getattr(dtype, "element_type", None)
    return inner() if inner is not None else dtype
