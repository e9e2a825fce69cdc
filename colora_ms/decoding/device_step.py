"""The step of a device that has no operator for it: one graph run an iteration, of the device's built-in operators.

Two kinds of graph, each with and without adapters, so that four are compiled at most whatever the load (on Ascend their
token and row dimensions are dynamic; on a CPU, in the rehearsal, each bucket of shapes is one):

* *prefill*: every row begins in this batch. Its tokens see each other through FlashAttentionScore and are written into
  the cache for those to come.
* *increment*: every token stands as a row of its own before PagedAttention, with its row's block table and as many
  positions as it may see. So one graph serves new tokens, prompts behind a shared prefix, and pieces of prompts beside
  new tokens: ReshapeAndCache has written all of a batch's keys before any of them is read. A piece of n tokens reads
  its row's past n times; that is what is paid for having no further graph and no (tokens, positions) mask.

PagedAttention and FlashAttentionScore take their lengths from the graph's inputs *named* ``batch_valid_length`` and
``q_seq_lens``, which MindSpore copies to the host when the graph starts; hence one run an iteration, and the names of
the arguments below. A batch whose requests are greedy (alone, in a contrast or in a mix by logarithms) takes its tokens
from the same graph (ContrastiveSelect); for everything else a second graph of built-in operators goes over the logits.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import numpy as np

import mindspore as ms
from mindspore import JitConfig, Parameter, Tensor, nn, ops

from colora_ms import ascend_settings, runtime
from colora_ms.decoding.device_choice import Choice
from colora_ms.decoding.selection import select
from colora_ms.kernels import ascend, ascend_builtin, backend, bind
from colora_ms.kernels.options import MOST_ROWS
from colora_ms.models.device_decoder import DeviceDecoder

#: Names of the phases, by which MindSpore's internal kernels choose their fusions and the fast path of a step.
PREFILL, INCREMENT = "prefill", "increment"


class IncrementStep(nn.Cell):
    """Every token a row of its own; the names of the lengths are read by PagedAttention."""

    def __init__(self, model: DeviceDecoder, cache: Any, adapters: bool) -> None:
        super().__init__()
        self.model, self.cache, self.adapters = model, cache, adapters

    def construct(self, tokens: Tensor, positions: Tensor, slots: Tensor, slot_mapping: Tensor, block_tables: Tensor,
                  batch_valid_length: Tensor, q_seq_lens: Tensor, read: Tensor, mix_rows: Tensor, weights: Tensor,
                  log_alpha: Tensor) -> tuple:
        """tokens, positions, slots, slot_mapping, batch_valid_length, q_seq_lens: (T,); block_tables: (T, blocks of a
        row); read: (R,); all int32; mix_rows, weights, log_alpha: see :class:`Choice` -> logits (R, vocab) float32,
        and the two tensors that :func:`colora_ms.kernels.ascend.contrastive_token` returns of them."""
        used = (slots,) if self.adapters else ()
        places = (slot_mapping, block_tables, batch_valid_length, q_seq_lens)
        logits = self.model(tokens, positions, used, batch_valid_length, self.cache.keys, self.cache.values, places,
                            read)
        ints, floats = ascend.contrastive_token(logits, mix_rows, weights, log_alpha)
        return logits, ints, floats


class PrefillStep(nn.Cell):
    """Beginnings of rows, one behind another; the names of the lengths are read by FlashAttentionScore."""

    def __init__(self, model: DeviceDecoder, cache: Any, adapters: bool) -> None:
        super().__init__()
        self.model, self.cache, self.adapters = model, cache, adapters
        self.mask = Parameter(ascend_builtin.prompt_mask(cache.dtype), name="prompt_mask", requires_grad=False)

    def construct(self, tokens: Tensor, positions: Tensor, slots: Tensor, slot_mapping: Tensor, groups: Tensor,
                  batch_valid_length: Tensor, q_seq_lens: Tensor, read: Tensor, mix_rows: Tensor, weights: Tensor,
                  log_alpha: Tensor) -> tuple:
        """As :class:`IncrementStep`, but batch_valid_length, q_seq_lens: (rows,), tokens of each row; groups: (1 +
        slots,) int64, where the base's tokens end and those of each slot, which stand in this order."""
        used = (slots, groups) if self.adapters else ()
        logits = self.model(tokens, positions, used, batch_valid_length, self.cache.keys, self.cache.values,
                            (slot_mapping, self.mask), read)
        ints, floats = ascend.contrastive_token(logits, mix_rows, weights, log_alpha)
        return logits, ints, floats


class CopyDeviceBlocks(nn.Cell):
    """Blocks of the cache become copies of others: gathered, and written as if they were new."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def construct(self, source: Tensor, slot_mapping: Tensor) -> Tensor:
        """source: (1,) int32; slot_mapping: (block,) int32, the places of the target."""
        done = source
        for i in range(len(self.cache.keys)):
            _, block, heads, dim = self.cache.keys[i].shape
            shape = (1, block, heads * dim)
            key = ascend_builtin.reshape(ascend_builtin.embedding(self.cache.keys[i], source), shape)
            value = ascend_builtin.reshape(ascend_builtin.embedding(self.cache.values[i], source), shape)
            done = ops.depend(done, ascend_builtin.reshape_and_cache(key, value, self.cache.keys[i],
                                                                     self.cache.values[i], slot_mapping))
        return done


class Selection(nn.Cell):
    """The general choice of tokens, in built-in operators."""

    def construct(self, logits: Tensor, previous: Tensor, whole: Tensor, real: Tensor, mix_rows: Tensor,
                  mix_weights: Tensor, entries: Tensor, bias: Tensor, offsets: Tensor, mask: Tensor, uniform: Tensor,
                  prompt: Tensor, lengths: Tensor) -> tuple:
        """See :func:`colora_ms.decoding.selection.select`."""
        return select(logits, (whole, real, mix_rows, mix_weights), (entries, bias, offsets, mask), uniform, previous,
                      prompt, lengths)


class DeviceGraphs:
    """The graphs of a decoder's device step over one cache.

    Args:
        model: the packed decoder; cache: :class:`colora_ms.models.paged_cache.DeviceCache`.

    Attributes:
        steps: {(phase, whether with adapters, shapes of the inputs where they are static): the Cell of a step}.
        cells: these, and what copies blocks.
    """

    def __init__(self, model: DeviceDecoder, cache: Any) -> None:
        bind()
        self.model, self.cache = model, cache
        self._copy = CopyDeviceBlocks(cache).set_train(False)
        self.cells: List[nn.Cell] = [self._copy]
        self.steps: Dict[Tuple[Any, ...], nn.Cell] = {}

    def step(self, phase: str, adapters: bool, shapes: Tuple[Any, ...] = ()) -> nn.Cell:
        """The Cell of a phase, with or without adapters; made when it is first asked for.

        shapes: of the inputs, where they are static. A Cell of phase "prefill" or "increment" that MindSpore has
        compiled is run without looking at shapes again, so that each of them has its own Cell there.
        """
        key = (phase, adapters and self.model.adapted, shapes)
        if key not in self.steps:
            kind = PrefillStep if phase == PREFILL else IncrementStep
            self.steps[key] = self._prepared(kind(self.model, self.cache, key[1]), phase)
        return self.steps[key]

    def run(self, batch: Any, read: np.ndarray, choice: Optional[Choice]) -> Tuple[Tensor, ...]:
        """Run a batch.

        Args:
            batch: :class:`colora_ms.decoding.step.FlatBatch`; its copies of blocks are the caller's.
            read: (R,) int32, tokens of the batch.
            choice: the rows and weights of its requests; None: no token is wanted.

        Returns:
            logits (R, vocab) float32, on the device; the two tensors of ``contrastive_token`` for the requests.
        """
        chosen = Choice.of_none() if choice is None else choice
        self.model.refresh()
        static = backend() != "ascend"
        phase, inputs, moved = step_inputs(batch, self.cache.block, self.model.slots, padded=static)
        size = power(len(chosen.rows)) if static else max(1, len(chosen.rows))
        inputs += [moved[read].astype(np.int32), *chosen.filled(size)]
        used = bool(np.any(batch.slots[np.unique(batch.rows)] >= 0))
        cell = self.step(phase, used, tuple(one.shape for one in inputs) if static else ())
        return runtime.run(cell, *(Tensor(one) for one in inputs))

    def copy(self, source: int, target: int) -> None:
        """Copy one block of the cache."""
        block = self.cache.block
        runtime.run(self._copy, Tensor(np.array([source], np.int32)),
                    Tensor(np.arange(target * block, (target + 1) * block, dtype=np.int32))).asnumpy()

    def _prepared(self, cell: nn.Cell, phase: str) -> nn.Cell:
        cell.set_train(False)
        cell.phase = phase  # behind set_train, which sets one, too
        cell.set_jit_config(JitConfig(jit_level="O0", infer_boost="on"))
        if backend() == "ascend":
            ascend_settings.boost(True)
            vector = Tensor(shape=[None], dtype=ms.int32)
            groups = Tensor(shape=[1 + self.model.slots], dtype=ms.int64)
            fifth = Tensor(shape=[None, None], dtype=ms.int32) if phase == INCREMENT else groups
            choice = [Tensor(shape=shape, dtype=kind) for shape, kind in (
                ([None, MOST_ROWS], ms.int32), ([None, MOST_ROWS], ms.float32), ([None], ms.float32))]
            cell.set_inputs(*[vector] * 4, fifth, *[vector] * 3, *choice)
            cell.any_shape = True
        self.cells.append(cell)
        return cell


def step_inputs(batch: Any, block: int, slots: int, padded: bool) -> Tuple[str, List[np.ndarray], np.ndarray]:
    """What a batch is to the graph.

    Args:
        batch: :class:`colora_ms.decoding.step.FlatBatch`; block: positions of a block of the cache; slots: of the bank.
        padded: whether sizes are filled up to powers of four, so that there are few shapes. What fills comes behind, is
            written nowhere, and has no adapter that anybody sees.

    Returns:
        (phase, the graph's inputs but ``read``, (T,) the place among its tokens of each token of the batch).
    """
    rows, first, sizes = np.unique(batch.rows, return_index=True, return_counts=True)
    count = len(batch.tokens)
    fresh = count > len(rows) and not np.any(batch.positions[first])
    # Rows of one adapter stand together in a prefill; the batch has them so already, but nothing here relies on it.
    order = np.argsort(batch.slots[batch.rows], kind="stable") if fresh else np.arange(count)
    moved = np.empty(count, np.int64)
    moved[order] = np.arange(count)
    own, positions, adapters = batch.rows[order], batch.positions[order], batch.slots[batch.rows[order]]
    tables = np.maximum(batch.tables, 0)[own]  # (T, blocks of a row)
    place = np.take_along_axis(tables, (positions // block)[:, None], 1)[:, 0]
    columns = [batch.tokens[order], positions, adapters, place * block + positions % block]
    if fresh:
        lengths = sizes[np.argsort(moved[first])]
        ends = np.searchsorted(adapters, np.arange(-1, slots), side="right")
        if padded:
            # A row of one token each that fills, and the last one of them has what is left.
            size = power(len(rows) + 1)
            total = power(count + size - len(rows))
            more = np.ones(size - len(rows), np.int64)
            more[-1] += total - count - len(more)
            lengths, count, ends[-1] = np.concatenate((lengths, more)), total, total
        return PREFILL, [*_columns(columns, count), ends.astype(np.int64), *(lengths.astype(np.int32),) * 2], moved
    width = int(positions.max()) // block + 1
    if padded:
        count, width = power(count), power(width)
    tables = _filled(np.pad(tables[:, :width], ((0, 0), (0, max(0, width - tables.shape[1])))), count, 0)
    return INCREMENT, [*_columns(columns, count), tables, _filled(positions + 1, count, 1),
                       np.ones(count, np.int32)], moved


def _columns(columns: List[np.ndarray], count: int) -> List[np.ndarray]:
    """Tokens, positions, slots and places in the cache, filled up."""
    return [_filled(one, count, fill) for one, fill in zip(columns, (0, 0, -1, -1))]


def power(size: int) -> int:
    """The smallest power of four that holds ``size``, at least 4."""
    return 4 ** max(1, -(-max(size - 1, 0).bit_length() // 2))


def _filled(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    out = np.full((size, *array.shape[1:]), fill, np.int32)
    out[:len(array)] = array
    return out
