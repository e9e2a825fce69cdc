"""The options of a request in the generation loop: one record each, in the order in which they travel.

All requests' options are the tensors of :data:`TENSORS`. Most of them are a column of two tensors, ``whole`` (requests,
columns) int32 and ``real`` (requests, columns) float32. Who makes them, reads them in a graph or checks them finds the
columns here; the C++ operators have the same names in the same order (``ops/cpu/options.h``, compared by
``tests/kernels/test_operands.py``). A further option is a record here, the field of the request that ``source`` names,
and its use in the two selections (``select.h`` and ``select.py``).

The other tensors are ``mix_rows`` (requests, 8) int32, the rows of the logits of each request, the leading one first,
-1 behind the last one (and everywhere in a request that is inactive); ``mix_weights`` (requests, 8) float32, their
weights (a contrast's come from beta); and what :func:`colora_ms.kernels.adjust_logits` reads: ``entries`` (capacity, 3)
int32 (token, times in the answer, flags) with ``bias`` (capacity,) float32, of which request r has the part from
``offsets[r]`` to ``offsets[r + 1]``, its tokens ascending; and ``mask`` (requests, words) int32, whose bit i % 32 of
word i / 32 says whether token i may come. The last four are ABSENT where no request of a batch needs them and shapes
may vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np

import mindspore as ms
from mindspore import Tensor, ops

from colora_ms.kernels.aot import ABSENT, KernelError


class Option(NamedTuple):
    """One option.

    Attributes:
        name: of its column, and of the attribute of ``source`` that holds it.
        dtype: "whole" (int32) or "real" (float32).
        default: what a request has that asks for nothing; also of the places that only fill a batch.
        low, high: its range, both included (as float32 holds them).
        source: whose attribute it is: "sampling", "contrast", "mix", "options", or None: whoever places the request
            sets it.
    """

    name: str
    dtype: str
    default: float
    low: float
    high: float
    source: Optional[str] = None


_WHOLE, _LARGEST = 2**31 - 1, float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).smallest_subnormal)  # above 0

#: How rows become one distribution, by their numbers in ``mixing``; :func:`colora_ms.kernels.contrastive_select` says
#: what each is.
MIXINGS = {"contrast": 0, "log": 1, "probability": 2}

#: Whose best token the cut compares with, by their numbers in ``cut``.
CUTS = {"none": 0, "leading": 1, "mixture": 2}

#: Rows that a request has at most; tokens that are listed with their log-probabilities at most.
MOST_ROWS, MOST_TOP = 8, 20

#: Columns of the details of a token: its log-probability, those of the best tokens, those of the rows.
DETAILS = 1 + MOST_TOP + MOST_ROWS

#: Flags of an entry: the prompt has the token; it ends the answer, so that it may not come before ``min_tokens``.
IN_PROMPT, ENDS = 1, 2

OPTIONS = (
    Option("top_k", "whole", 0, 0, _WHOLE, "sampling"),  # 0: off
    Option("budget", "whole", 0, 0, _WHOLE),  # tokens that it may still take
    Option("mode", "whole", 0, 0, 11, "contrast"),  # the contrast's form, see ``strength.FORMS``
    Option("mixing", "whole", 0, 0, 2, "mix"),  # see MIXINGS
    Option("cut", "whole", 1, 0, 2, "mix"),  # see CUTS; a contrast has the leading row's
    Option("logprobs", "whole", -1, -1, MOST_TOP),  # -1: none, else the chosen token's and those of so many best ones
    Option("voices", "whole", 0, 0, 1),  # 1: the log-probability of the chosen token in each row
    Option("min_tokens", "whole", 0, 0, _WHOLE),  # tokens before the first one that may end the answer
    Option("masked", "whole", 0, 0, 1),  # 1: the mask counts
    Option("alpha", "real", 1.0, _LEAST, 1.0, "contrast"),
    Option("beta", "real", 0.0, 0.0, _LARGEST, "contrast"),
    Option("temperature", "real", 0.0, 0.0, _LARGEST, "sampling"),  # 0: argmax
    Option("top_p", "real", 1.0, _LEAST, 1.0, "sampling"),  # 1: off
    Option("min_p", "real", 0.0, 0.0, 1.0, "sampling"),  # 0: off
    Option("presence_penalty", "real", 0.0, -_LARGEST, _LARGEST, "options"),
    Option("frequency_penalty", "real", 0.0, -_LARGEST, _LARGEST, "options"),
    Option("repetition_penalty", "real", 1.0, _LEAST, _LARGEST, "options"),  # 1: off
)

#: Names of the columns of the two tensors, in order.
WHOLE = tuple(option.name for option in OPTIONS if option.dtype == "whole")
REAL = tuple(option.name for option in OPTIONS if option.dtype == "real")

#: All tensors of the options, in the order in which operators take them; SELECTION: those of the selection.
TENSORS = ("whole", "real", "mix_rows", "mix_weights", "entries", "bias", "offsets", "mask")
SELECTION = TENSORS[:4]

#: Columns by name; graphs read ``whole[:, TOP_K]`` with ``TOP_K = COLUMN["top_k"]``.
COLUMN = {name: place for names in (WHOLE, REAL) for place, name in enumerate(names)}

_BY_NAME = {option.name: option for option in OPTIONS}


def replaced(options: Tensor, column: int, values: Tensor) -> Tensor:
    """Options (requests, columns) with other values (requests,) in one column; for graphs."""
    place = ops.arange(options.shape[1]).astype(ms.int32).reshape((1, -1))
    return ops.where(place == column, values.reshape((-1, 1)), options)  # (requests, columns)


def words_of(vocabulary: int) -> int:
    """int32 words of a mask of allowed tokens."""
    return (vocabulary + 31) // 32


class OptionRows:
    """The options of a batch's requests, as NumPy arrays that become the tensors.

    Args:
        size: places of the batch; all begin with the defaults.
        vocabulary: tokens of the model; 0: no masks.
        capacity: entries that all requests may have together; 0: none.

    Attributes:
        whole, real, mix_rows, mix_weights: see the head of this module. entries, bias, offsets, mask: also; None where
            there is no place for them.
    """

    def __init__(self, size: int, vocabulary: int = 0, capacity: int = 0) -> None:
        self.whole = np.tile(np.array([_BY_NAME[name].default for name in WHOLE], np.int32), (size, 1))
        self.real = np.tile(np.array([_BY_NAME[name].default for name in REAL], np.float32), (size, 1))
        self.mix_rows = np.full((size, MOST_ROWS), -1, np.int32)
        self.mix_weights = np.zeros((size, MOST_ROWS), np.float32)
        self.entries = np.zeros((capacity, 3), np.int32) if capacity else None
        self.bias = np.zeros(capacity, np.float32) if capacity else None
        self.offsets = np.zeros(size + 1, np.int32) if capacity else None
        self.mask = np.full((size, words_of(vocabulary)), -1, np.int32) if vocabulary else None
        self._kept: dict[str, Tensor] = {}

    def arrays(self) -> dict[str, Optional[np.ndarray]]:
        """{name: array or None} of :data:`TENSORS`."""
        return {name: getattr(self, name) for name in TENSORS}

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of :data:`TENSORS` as they are now. Those of the adjustments are made again only where they
        changed."""
        found = []
        for name, array in self.arrays().items():
            kept = self._kept.get(name)
            if array is None:
                kept = ABSENT
            elif kept is None or name not in TENSORS[4:]:
                kept = self._kept[name] = Tensor(array)
            found.append(kept)
        return tuple(found)

    def put_rows(self, place: int, rows: Sequence[int], weights: Sequence[float] = ()) -> None:
        """Set the rows of one request, the leading one first, and their weights.

        Raises:
            KernelError: there are none, or too many.
        """
        if not 0 < len(rows) <= MOST_ROWS:
            raise KernelError(f"a request has {len(rows)} rows, expected 1 to {MOST_ROWS}")
        self.mix_rows[place] = -1
        self.mix_rows[place, :len(rows)] = rows
        self.mix_weights[place] = 0
        self.mix_weights[place, :len(weights)] = weights

    def put_entries(self, lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Set all requests' entries: one pair (entries (n, 3) int32, bias (n,) float32) a place, from the first one on.

        Raises:
            KernelError: they are more than there is room for.
        """
        total = sum(len(entries) for entries, _ in lists)
        if self.offsets is None or self.entries is None or self.bias is None or total > len(self.entries):
            room = 0 if self.entries is None else len(self.entries)
            if total:
                raise KernelError(f"the requests have {total} tokens with penalties or bias, there is room for {room}")
            return
        ends = np.cumsum([len(entries) for entries, _ in lists], dtype=np.int32)
        if not total and not self.offsets[-1]:
            return
        self.offsets[1:] = ends[-1] if len(ends) else 0
        self.offsets[1:1 + len(ends)] = ends
        if total:
            self.entries[:total] = np.concatenate([entries for entries, _ in lists])
            self.bias[:total] = np.concatenate([bias for _, bias in lists])
        for name in ("entries", "bias", "offsets"):
            self._kept.pop(name, None)

    def put_mask(self, place: int, words: Optional[np.ndarray]) -> None:
        """Set one request's mask of allowed tokens, (words,) int32, or take it away.

        Raises:
            KernelError: there is no place for masks, or its size is wrong.
        """
        if words is None and not self.whole[place, COLUMN["masked"]]:
            return
        if self.mask is None or words is not None and words.shape != self.mask[place].shape:
            shape = None if words is None else words.shape
            raise KernelError(f"a mask has shape {shape}, expected "
                              f"{None if self.mask is None else self.mask[place].shape}")
        self.mask[place] = -1 if words is None else words
        self.put(place, "masked", int(words is not None))
        self._kept.pop("mask", None)

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
