"""Running requests side by side, as the tensors that a graph takes.

A graph's shapes hold a number of *places*, one a request, and of rows. The leading rows stand first, row i being that
of place i; the rows behind the leading ones follow. Places and rows that only fill the shapes do nothing.
"""

from __future__ import annotations

from typing import Any, Iterable, List, Sequence, Tuple

import numpy as np

from mindspore import Tensor

from colora_ms.decoding.request import AMATEUR, Running
from colora_ms.kernels.options import OptionRows


class Batch:
    """The tensors of some requests.

    Attributes:
        requests: :class:`colora_ms.decoding.request.Running`, in the order of their places; size: places.
        rows: rows that are used.
        layout: int32 Tensors: row_request (rows,), slots (rows,), cache_rows (rows,).
        eos: (ends,) int32 Tensor, ids that end answers.

    Args:
        requests: those that run; a request without ``cache_rows`` uses the rows of the cache with its rows' own
            numbers.
        places, rows: numbers of the graph's shapes.
        following: the first row behind the leading ones.
        eos: ids that end answers.
    """

    def __init__(self, requests: Sequence[Running], places: int, rows: int, following: int, eos: Iterable[int]) -> None:
        self.requests = list(requests)
        self.size = places
        # A row that only fills belongs to a place that is inactive, or follows the first one in a row of its own.
        row_request = np.full(rows, places - 1 if len(self.requests) < places else 0, np.int32)
        row_request[:places] = np.arange(places)
        slots = np.full(rows, -1, np.int32)
        cache_rows = np.arange(rows, dtype=np.int32)
        amateur = np.full(places, -1, np.int32)
        for place, one in enumerate(self.requests):
            for number, row in enumerate(one.request.rows):
                at = place
                if number:
                    at, following = following, following + 1
                if row.role == AMATEUR:
                    amateur[place] = at
                row_request[at], slots[at] = place, one.slots[number]
                if one.cache_rows:
                    cache_rows[at] = one.cache_rows[number]
        self.rows = following
        self.layout = tuple(Tensor(a) for a in (row_request, slots, cache_rows))
        self._options = OptionRows(places)
        self._options.put(slice(None), "expert_rows", np.arange(places))
        self._options.put(slice(None), "amateur_rows", amateur)
        for place, one in enumerate(self.requests):
            asked = one.request.options
            if asked.contrast is not None:
                self._options.take(place, "contrast", asked.contrast)
            if not asked.sampling.greedy:
                self._options.take(place, "sampling", asked.sampling)
        self.eos = Tensor(np.array(sorted(eos) or [-1], np.int32))  # -1 is no token id: there is none

    @property
    def one_step(self) -> bool:
        """Whether the next call must have one step: a first token whose contrast asks what was generated before."""
        return any(one.request.copies and not one.tokens for one in self.requests)

    def state(self) -> Tuple[Tensor, Tensor, Tensor]:
        """(last token, its position, whether the request goes on), each (places,)."""
        last = [one.last for one in self.requests]
        return (self.array([token for token, _ in last], 0, np.int32),
                self.array([place for _, place in last], 0, np.int32), self.array([True] * len(last), False, bool))

    def options(self) -> Tuple[Tensor, Tensor]:
        """The requests' options as they are now, the budget among them: (places, columns) int32 and float32, see
        :mod:`colora_ms.kernels.options`."""
        self._options.put(slice(0, len(self.requests)), "budget", [one.left for one in self.requests])
        return Tensor(self._options.whole), Tensor(self._options.real)

    def fresh(self) -> Tensor:
        """(places,) bool: whether a request has no token of its own yet."""
        return self.array([not one.tokens for one in self.requests], False, bool)

    def uniforms(self, count: int) -> Tensor:
        """(places, count) float32: the random numbers of the next tokens; zeros for greedy requests."""
        values = np.zeros((self.size, count), np.float32)
        for place, one in enumerate(self.requests):
            values[place] = one.uniforms(count)
        return Tensor(values)

    def prompts(self, width: int, wanted: Sequence[bool] = ()) -> Tuple[Tensor, Tensor]:
        """(ids (places, width) int32, padded at the right, lengths (places,) int32) of the prompts.

        Args:
            wanted: whose ids are needed, the others' length is 0; empty: everybody's.
        """
        ids, lengths = np.zeros((self.size, width), np.int32), np.zeros(self.size, np.int32)
        for place, one in enumerate(self.requests):
            if not wanted or wanted[place]:
                lengths[place] = len(one.request.ids)
                ids[place, :lengths[place]] = one.request.ids
        return Tensor(ids), Tensor(lengths)

    def array(self, values: List[Any], filler: Any, dtype: Any) -> Tensor:
        """(places,) Tensor of one value a request."""
        return Tensor(np.array(values + [filler] * (self.size - len(values)), dtype))
