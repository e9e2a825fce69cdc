"""The options of a request in the generation loop: one record each, in the order in which they travel.

All requests' options are two tensors, ``whole`` (requests, columns) int32 and ``real`` (requests, columns) float32, a
column an option. Who makes them, reads them in a graph or checks them finds the columns here; the C++ operators have
the same names in the same order (``ops/cpu/select.h``, compared by ``tests/kernels/test_operands.py``). A further
option is a record here, the field of the request that ``source`` names, and its use in the two selections
(``select.h`` and ``select.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels.aot import KernelError


class Option(NamedTuple):
    """One option.

    Attributes:
        name: of its column, and of the attribute of ``source`` that holds it.
        dtype: "whole" (int32) or "real" (float32).
        default: what a request has that asks for nothing; also of the places that only fill a batch.
        low, high: its range, both included (as float32 holds them).
        source: whose attribute it is: "sampling", "contrast", or None: the batch's, which places the request.
    """

    name: str
    dtype: str
    default: float
    low: float
    high: float
    source: Optional[str] = None


_WHOLE, _LARGEST = 2**31 - 1, float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).smallest_subnormal)  # above 0

OPTIONS = (
    Option("expert_rows", "whole", -1, -1, _WHOLE),  # row of the logits; -1: the request is inactive
    Option("amateur_rows", "whole", -1, -1, _WHOLE),  # -1: no contrast
    Option("top_k", "whole", 0, 0, _WHOLE, "sampling"),  # 0: off
    Option("budget", "whole", 0, 0, _WHOLE),  # tokens that it may still take
    Option("mode", "whole", 0, 0, 11, "contrast"),  # the contrast's form, see ``strength.FORMS``
    Option("alpha", "real", 1.0, _LEAST, 1.0, "contrast"),
    Option("beta", "real", 0.0, 0.0, _LARGEST, "contrast"),
    Option("temperature", "real", 0.0, 0.0, _LARGEST, "sampling"),  # 0: argmax
    Option("top_p", "real", 1.0, _LEAST, 1.0, "sampling"),  # 1: off
    Option("min_p", "real", 0.0, 0.0, 1.0, "sampling"),  # 0: off
)

#: Names of the columns of the two tensors, in order.
WHOLE = tuple(option.name for option in OPTIONS if option.dtype == "whole")
REAL = tuple(option.name for option in OPTIONS if option.dtype == "real")

#: Columns by name; graphs read ``whole[:, TOP_K]`` with ``TOP_K = COLUMN["top_k"]``.
COLUMN = {name: place for names in (WHOLE, REAL) for place, name in enumerate(names)}

_BY_NAME = {option.name: option for option in OPTIONS}


def replaced(options: Tensor, column: int, values: Tensor) -> Tensor:
    """Options (requests, columns) with other values (requests,) in one column; for graphs."""
    place = ops.arange(options.shape[1]).astype(ms.int32).reshape((1, -1))
    return ops.where(place == column, values.reshape((-1, 1)), options)  # (requests, columns)


class OptionRows:
    """The options of a batch's requests, as NumPy arrays that become the two tensors.

    Args:
        size: places of the batch; all begin with the defaults.

    Attributes:
        whole: (size, columns) int32; real: (size, columns) float32.
    """

    def __init__(self, size: int) -> None:
        self.whole = np.tile(np.array([_BY_NAME[name].default for name in WHOLE], np.int32), (size, 1))
        self.real = np.tile(np.array([_BY_NAME[name].default for name in REAL], np.float32), (size, 1))

    def put(self, row: Any, name: str, value: Any) -> None:
        """Set an option of one request, or of several (``row``: an index of NumPy).

        Raises:
            KernelError: there is no such option, or a value is out of its range.
        """
        option = _BY_NAME.get(name)
        if option is None:
            raise KernelError(f"there is no option {name!r} of a request; there are {', '.join(_BY_NAME)}")
        # A wider type than the column's, so that what does not fit is seen here and not cut off.
        values = np.asarray(value, np.int64) if option.dtype == "whole" else np.asarray(value, np.float32)
        if not np.all((values >= option.low) & (values <= option.high)):
            raise KernelError(f"option {name} is {value}, expected {option.low:g} to {option.high:g}")
        (self.whole if option.dtype == "whole" else self.real)[row, COLUMN[name]] = values

    def take(self, row: int, source: str, record: Any) -> None:
        """Set the options of one request whose values are attributes of ``record``; those of ``source`` in the table.

        A whole number above the range of int32 becomes its end: such options mean "no limit" long before.
        """
        for option in OPTIONS:
            if option.source == source:
                value = getattr(record, option.name)
                self.put(row, option.name, min(value, _WHOLE) if option.dtype == "whole" else value)
