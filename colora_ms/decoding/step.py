"""The graph of a step: a flat batch of tokens in, the next tokens of some requests out.

Where the device has the operator and the model's Cells allow it, a step is ``kernels.step``: one graph with one shape,
whatever the load, and several iterations a call. On Ascend it is a graph of the device's operators, one iteration a
call (:mod:`colora_ms.decoding.device_step`). Elsewhere it is a graph of the Cells, one iteration a call, compiled for
buckets of tokens, rows and requests. On a CPU both make the same tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from mindspore import Tensor, nn, ops

from colora_ms import runtime
from colora_ms.decoding.device_choice import choice_of, plain_records
from colora_ms.decoding.device_step import DeviceGraphs, Selection
from colora_ms.decoding.selection import select
from colora_ms.errors import DecodingError
from colora_ms.kernels import bind, step
from colora_ms.kernels.flat_step import EXTRAS
from colora_ms.kernels.options import COLUMN, SELECTION, OptionRows
from colora_ms.kernels.weight_table import NOTHING, ArrayTable, WeightTable
from colora_ms.models.device_decoder import DeviceDecoder
from colora_ms.models.paged_cache import DeviceCache
from colora_ms.models.replacing import replacements

_BUDGET = COLUMN["budget"]


@dataclasses.dataclass
class FlatBatch:
    """What one call computes; R rows, Q requests.

    Attributes:
        tokens, rows, positions: (n,) int32; the tokens of a row stand together, their positions ascend by one.
        slots: (R,) int32, adapter slot of each row, -1: the base model.
        tables: (R, blocks of a row) int32, see ``kernels.paged_attention``.
        copies: (c, 2) int32, blocks (source, target) that are copied first.
        whole, real, mix_rows, mix_weights: of Q requests, see :mod:`colora_ms.kernels.options`. No rows: the request
            takes no token.
        previous: (Q,) int32, the token that each generated last, -1: none.
        uniforms: (Q, capacity) float32.
        eos: (ends,) int32.
        steps: iterations, 1 to ``capacity``.
        prompts: Q arrays of the ids that a contrast with ``skip_copies`` looks at, or None.
        adjustments: the other extras (``kernels.flat_step.EXTRAS``) by name, "entries", "bias" and "mask": Q arrays or
            None each.
        strengths: (R,) float32, factors on the adapters' scales; None: 1. Only where steps are one operator.
    """

    tokens: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    copies: np.ndarray
    whole: np.ndarray
    real: np.ndarray
    mix_rows: np.ndarray
    mix_weights: np.ndarray
    previous: np.ndarray
    uniforms: np.ndarray
    eos: np.ndarray
    steps: int = 1
    prompts: Optional[Sequence[Optional[np.ndarray]]] = None
    adjustments: Mapping[str, Sequence[Optional[np.ndarray]]] = dataclasses.field(default_factory=dict)
    strengths: Optional[np.ndarray] = None


@dataclasses.dataclass
class StepResult:
    """ints (iterations, Q, 3) int32 and floats (iterations, Q, 4) float32 as of ``kernels.step``; counts (Q,) int32,
    the tokens that each request took; tops (iterations, Q, 20) int32 and details (iterations, Q, 29) float32, see
    ``kernels.token_details``."""

    ints: np.ndarray
    floats: np.ndarray
    counts: np.ndarray
    tops: np.ndarray
    details: np.ndarray


class FusedStep(nn.Cell):
    """``kernels.step``; the model's tensors come by the handle of their table."""

    def __init__(self) -> None:
        super().__init__()
        bind()

    def construct(self, table: Tensor, tokens: Tensor, rows: Tensor, positions: Tensor, counts: Tensor, slots: Tensor,
                  strengths: Tensor, tables: Tensor, copies: Tensor, previous: Tensor, whole: Tensor, real: Tensor,
                  mix_rows: Tensor, mix_weights: Tensor, uniforms: Tensor, eos: Tensor, extras: Tensor) -> tuple:
        """Arguments and results as of :func:`colora_ms.kernels.step`."""
        return step(table, tokens, rows, positions, counts, slots, strengths, tables, copies, previous, whole, real,
                    mix_rows, mix_weights, uniforms, eos, extras)


class CellStep(nn.Cell):
    """One iteration through the Cells of a decoder."""

    def __init__(self, decoder: Any, cache: Any) -> None:
        super().__init__()
        bind()
        self.decoder = decoder
        self.cache = cache

    def construct(self, tokens: Tensor, rows: Tensor, positions: Tensor, token_slots: Tensor, tables: Tensor,
                  read: Tensor, slots: Tensor, previous: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor,
                  mix_weights: Tensor, entries: Tensor, bias: Tensor, offsets: Tensor, mask: Tensor, uniform: Tensor,
                  prompt: Tensor, lengths: Tensor) -> tuple:
        """tokens, rows, positions, token_slots: (T,); read, slots: (R,); previous, uniform, lengths: (Q,); prompt: (Q,
        width); the options of :mod:`colora_ms.kernels.options` -> ints (Q, 3), floats (Q, 4), tops (Q, 20), details (Q,
        29)."""
        logits = self.decoder.paged(tokens, token_slots, self.cache, rows, positions, tables, read, slots)
        return select(logits, (whole, real, mix_rows, mix_weights), (entries, bias, offsets, mask), uniform, previous,
                      prompt, lengths)


class CopyBlocks(nn.Cell):
    """Blocks of the cache become copies of others."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def construct(self, source: Tensor, target: Tensor) -> Tensor:
        """source, target: (1,) int32."""
        done = source
        for tensor in self.cache.keys + self.cache.values:
            done = ops.depend(done, ops.scatter_update(tensor, target, ops.gather(tensor, source, 0)))
        return done


class StepGraph:
    """Runs steps over one cache; who calls it is the only one that runs graphs over this cache.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`; cache: of the decoder's form, see
            :func:`colora_ms.models.device_form.cache_form`.
        tokens: tokens of a flat batch, at most; rows, requests: at most, too.
        capacity: iterations of a call, at most.

    Attributes:
        fused: whether steps are one operator. Elsewhere ``steps`` must be 1.
        device: the graphs of a device step, where there is one.
    """

    def __init__(self, decoder: Any, cache: Any, tokens: int, rows: int, requests: int, capacity: int) -> None:
        runtime.configure()
        bind()
        self.decoder, self.cache = decoder, cache
        self.tokens, self.rows, self.requests, self.capacity = tokens, rows, requests, capacity
        self.fused = decoder.fused_step
        self.width = -(-decoder.max_positions // cache.block)  # blocks of the longest row
        self._former = 0
        self._table: Optional[WeightTable] = None
        self._packed: Optional[DeviceDecoder] = None
        self.device: Optional[DeviceGraphs] = None
        self._make()

    def _make(self) -> None:
        self._cells: List[nn.Cell]
        if self.fused:
            self._read_weights()
            self._extras = ArrayTable()
            self._cells = [FusedStep().set_train(False)]
        elif isinstance(self.cache, DeviceCache):
            if self._packed is None or self._packed.made_at != replacements():
                self._packed = None  # its memory goes first
                self._packed = DeviceDecoder(self.decoder, self.cache.dtype)
            self.device = DeviceGraphs(self._packed, self.cache)
            self._cells = [Selection().set_train(False)]
        else:
            self._cells = [CellStep(self.decoder, self.cache).set_train(False),
                           CopyBlocks(self.cache).set_train(False)]

    def renew(self) -> None:
        """Make the graphs anew: after one has failed, or when the decoder's Cells were replaced."""
        self._former = self.compilations()
        self.fused = self.decoder.fused_step
        self._make()

    def over(self, make: Callable[[], Any]) -> StepGraph:
        """The same graph over another cache, which ``make`` makes when the present one is gone; an operator is not
        compiled again."""
        self.cache = None
        if not self.fused:
            self._former, self._cells, self.device = self.compilations(), [], None
        self._table = None
        self.cache = make()
        if self.fused:
            self._read_weights()
        else:
            self._make()
        return self

    def _read_weights(self) -> None:
        self._table = WeightTable(self.decoder.step_operands(self.cache))

    def reread(self) -> None:
        """Weights may have been trained since the last call; what keeps copies of them makes new ones."""
        if self._packed is not None:
            self._packed.refresh(trained=True)

    def rest(self) -> None:
        """Called now and then while there is nothing to run."""

    def end(self) -> None:
        """Called when nothing will be run any more."""

    def compilations(self) -> int:
        """How many graphs have been compiled."""
        own = self.device.cells if self.device is not None else []
        return self._former + sum(runtime.compilations(cell) for cell in (*self._cells, *own))

    def run(self, batch: FlatBatch) -> StepResult:
        """Compute a batch.

        Raises:
            DecodingError: it is larger than the graph.
            RuntimeError: the operator refused it; the cache is as it was, and :meth:`renew` must be called.
        """
        for what, count, most in (("tokens", len(batch.tokens), self.tokens), ("rows", len(batch.slots), self.rows),
                                  ("requests", len(batch.whole), self.requests),
                                  ("iterations", batch.steps, self.capacity if self.fused else 1),
                                  ("blocks of a row", batch.tables.shape[1], self.width)):
            if count > most:
                raise DecodingError(f"a step of {count} {what} is larger than its graph, which has {most}")
        if self.fused:
            return self._run_fused(batch)
        if np.any(_strengths(batch, len(batch.slots)) != 1):
            raise DecodingError("adapter_scale: this model's steps are no single operator, which alone scales adapters "
                                "by row; leave it out, or save the adapter with another scale")
        return self._run_device(batch, self.device) if self.device is not None else self._run_cells(batch)

    def _run_fused(self, batch: FlatBatch) -> StepResult:
        table = self._table
        assert table is not None
        counts = np.array([len(batch.tokens), len(batch.copies), batch.steps], np.int32)
        extras = NOTHING
        if batch.prompts is not None or batch.adjustments:
            extras = self._extras.put(_extras({"prompt": batch.prompts or (), **batch.adjustments}, self.requests))
        *found, taken, tops, details = runtime.run(
            self._cells[0], Tensor(np.array(table.handle(), np.int64)),
            *(Tensor(padded(one, self.tokens, -1)) for one in (batch.tokens, batch.rows, batch.positions)),
            Tensor(counts), Tensor(padded(batch.slots, self.rows, -1)), Tensor(_strengths(batch, self.rows)),
            Tensor(_padded_tables(batch.tables, self.rows, self.width)),
            Tensor(padded(batch.copies.reshape(-1, 2), self.rows, 0)),
            Tensor(padded(batch.previous, self.requests, -1)),
            *_options(batch, self.requests).tensors()[:len(SELECTION)],
            Tensor(_uniforms(batch.uniforms, self.requests, self.capacity)),
            Tensor(padded(batch.eos, MOST_ENDS, -1)), Tensor(np.array(extras, np.int64)))
        count = len(batch.whole)
        ints, floats, tops, details = (one.asnumpy()[:batch.steps, :count] for one in (*found, tops, details))
        return StepResult(ints, floats, taken.asnumpy()[:count], tops, details)

    def _run_device(self, batch: FlatBatch, device: DeviceGraphs) -> StepResult:
        for source, target in batch.copies.reshape(-1, 2).tolist():
            device.copy(source, target)
        rows, requests = bucket(len(batch.slots)), bucket(max(1, len(batch.whole)))
        takes = _takes(batch)
        choice = choice_of(batch, takes) if np.any(takes) else None
        logits, *chosen = device.run(batch, _last_tokens(batch, rows), choice)
        if choice is not None or not np.any(takes):
            return _result(batch, plain_records(chosen, len(batch.whole)))
        found = runtime.run(self._cells[0], logits, Tensor(padded(batch.previous, requests, -1)),
                            *_options(batch, requests).tensors(), *_selection(batch, requests))
        return _result(batch, [one.asnumpy() for one in found])

    def _run_cells(self, batch: FlatBatch) -> StepResult:
        for source, target in batch.copies.reshape(-1, 2):
            runtime.run(self._cells[1], Tensor(np.array([source], np.int32)),
                        Tensor(np.array([target], np.int32))).asnumpy()
        # Each shape is a graph to compile, so that there are few: one number for tokens, rows and requests.
        tokens = min(coarse(len(batch.tokens)), self.tokens)
        rows, requests = min(tokens, self.rows), min(tokens, self.requests)
        width = min(coarse(int(batch.positions.max(initial=0)) // self.cache.block + 1), self.width)
        found = runtime.run(
            self._cells[0], *(Tensor(padded(one, tokens, fill)) for one, fill in (
                (batch.tokens, 0), (batch.rows, -1), (batch.positions, 0), (batch.slots[batch.rows], -1))),
            Tensor(_padded_tables(batch.tables[:, :width], rows, width)), Tensor(_last_tokens(batch, rows)),
            Tensor(padded(batch.slots, rows, -1)), Tensor(padded(batch.previous, requests, -1)),
            *_options(batch, requests).tensors(), *_selection(batch, requests))
        return _result(batch, [one.asnumpy() for one in found])


#: Most ids that end answers in one call.
MOST_ENDS = 16


def bucket(size: int, smallest: int = 4) -> int:
    """The smallest static size that holds ``size``: 4, 8, 16, ..."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


def coarse(size: int) -> int:
    """The smallest power of four that holds ``size``, at least 4."""
    return 4 ** max(1, -(-max(size - 1, 0).bit_length() // 2))


def padded(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    """(size, ...): the array with ``fill`` behind it."""
    array = np.asarray(array, np.int32)
    out = np.full((size, *array.shape[1:]), fill, np.int32)
    out[:len(array)] = array
    return out


def _last_tokens(batch: FlatBatch, size: int) -> np.ndarray:
    """(size,) int32: the last token of each row."""
    read = np.zeros(size, np.int32)
    read[batch.rows] = np.arange(len(batch.rows))
    return read


def _selection(batch: FlatBatch, requests: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Random numbers of one iteration, and the prompts that contrasts look at with their lengths."""
    ids, lengths = _prompt_rows(batch.prompts, requests)
    return (Tensor(np.ascontiguousarray(_uniforms(batch.uniforms, requests, 1)[:, 0])), Tensor(ids), Tensor(lengths))


def _takes(batch: FlatBatch) -> np.ndarray:
    """(Q,) bool: which requests take a token."""
    return (batch.mix_rows[:, 0] >= 0) & (batch.whole[:, _BUDGET] > 0)


def _result(batch: FlatBatch, found: Sequence[np.ndarray]) -> StepResult:
    """The result of one iteration, from arrays of at least as many requests."""
    count, takes = len(batch.whole), _takes(batch)
    ints, floats, tops, details = (
        np.where(takes[:, None], one[None, :count], fill) for one, fill in zip(found, (0, 0, -1, 0)))
    return StepResult(ints, floats, takes.astype(np.int32), tops, details)


def _padded_tables(tables: np.ndarray, rows: int, width: int) -> np.ndarray:
    out = np.full((rows, width), -1, np.int32)
    out[:len(tables), :tables.shape[1]] = tables
    return out


def _options(batch: FlatBatch, size: int) -> OptionRows:
    """The options of ``size`` requests, the further ones without rows; with the adjustments in their tensors."""
    masks, entries = batch.adjustments.get("mask"), batch.adjustments.get("entries")
    capacity = sum(len(one) for one in entries or () if one is not None)
    words = max((len(one) for one in masks or () if one is not None), default=0)
    out = OptionRows(size, 32 * words, bucket(capacity, 256) if capacity else 0)
    count = len(batch.whole)
    for name in SELECTION:
        getattr(out, name)[:count] = getattr(batch, name)
    if capacity and entries:
        nothing = np.zeros((0, 3), np.int32), np.zeros(0, np.float32)
        out.put_entries([nothing if one is None or bias is None else (one, bias)
                         for one, bias in zip(entries, batch.adjustments["bias"])])
    for place, mask in enumerate(masks or ()) if words else ():
        out.put_mask(place, mask)
    return out


def _strengths(batch: FlatBatch, size: int) -> np.ndarray:
    out = np.ones(size, np.float32)
    if batch.strengths is not None:
        out[:len(batch.strengths)] = batch.strengths
    return out


def _uniforms(uniforms: np.ndarray, size: int, columns: int) -> np.ndarray:
    out = np.zeros((size, columns), np.float32)
    out[:len(uniforms), :uniforms.shape[1]] = uniforms[:, :columns]
    return out


def _extras(named: Dict[str, Sequence[Optional[np.ndarray]]], size: int) -> List[np.ndarray]:
    """The arrays of all requests in the order of ``EXTRAS``, one request after another."""
    columns = [_rows_of(named.get(name, ()), size) for name in EXTRAS]
    return [column[i] for i in range(size) for column in columns]


def _rows_of(arrays: Sequence[Optional[np.ndarray]], size: int) -> List[np.ndarray]:
    nothing = np.zeros(0, np.int32)
    found = [nothing if one is None else one for one in arrays]
    return found + [nothing] * (size - len(found))


def _prompt_rows(prompts: Optional[Sequence[Optional[np.ndarray]]], size: int) -> Tuple[np.ndarray, np.ndarray]:
    """ids (size, width) int32, padded at the right, and lengths (size,)."""
    rows = _rows_of(prompts or (), size)
    ids = np.zeros((size, bucket(max(len(one) for one in rows))), np.int32)
    for i, one in enumerate(rows):
        ids[i, :len(one)] = one
    return ids, np.array([len(one) for one in rows], np.int32)
