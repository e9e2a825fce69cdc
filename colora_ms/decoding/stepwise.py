"""Decoders that leave the graph at every token: the naive two-forward contrast and beam search.

The naive contrast is what CoLD argues against (two separate evaluations a token, arXiv 2505.14620, abstract). It is
kept as the checked baseline: it must produce the same tokens as the one-graph loop.

They work on the model's Cells over a paged cache of their own; beams share the blocks of what they have in common.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import numpy as np

from mindspore import Tensor, nn

from colora_ms import runtime
from colora_ms.decoding.blocks import BlockPool
from colora_ms.decoding.contrast import contrast_strength, contrastive_scores
from colora_ms.decoding.options import Contrast
from colora_ms.decoding.step import CopyBlocks, bucket
from colora_ms.errors import DecodingError
from colora_ms.kernels import bind
from colora_ms.models.paged_cache import BLOCK, PagedCache


class LogitsGraph(nn.Cell):
    """One call of ``Decoder.paged`` as a graph of its own."""

    def __init__(self, decoder: Any, cache: PagedCache) -> None:
        super().__init__()
        bind()
        self.decoder = decoder
        self.cache = cache

    def construct(self, tokens: Tensor, slots: Tensor, rows: Tensor, positions: Tensor, tables: Tensor, read: Tensor,
                  read_slots: Tensor) -> Tensor:
        """Arguments and result as :meth:`colora_ms.models.decoder.Decoder.paged`."""
        return self.decoder.paged(tokens, slots, self.cache, rows, positions, tables, read, read_slots)


class Stepper:
    """A decoder with a cache of its own, whose logits Python sees at every token.

    Args:
        decoder: :class:`colora_ms.models.decoder.Decoder`.
        rows: sequences side by side; length: positions of each of them.
    """

    def __init__(self, decoder: Any, rows: int, length: int) -> None:
        runtime.configure()
        decoder.set_train(False)
        self.rows = rows
        width = -(-length // BLOCK)
        self.length = width * BLOCK
        self.pool = BlockPool(rows * (width + 1))  # beams that part copy a block before the old one is given back
        self.cache = PagedCache(decoder.config, self.pool.blocks)
        self._graph = LogitsGraph(decoder, self.cache).set_train(False)
        self._copy = CopyBlocks(self.cache).set_train(False)
        self._tables: List[List[int]] = [[] for _ in range(rows)]
        self._positions = [0] * rows
        self._slots = np.full(rows, -1, np.int32)

    def use(self, slots: Sequence[int]) -> Stepper:
        """Start anew with these adapter slots, one a row; returns the stepper."""
        for table in self._tables:
            self.pool.release(table)
        self._tables, self._positions = [[] for _ in range(self.rows)], [0] * self.rows
        self._slots = np.array(slots, np.int32)
        return self

    def append(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Append tokens to each row -> logits (rows, vocab) float32 behind the last one of each.

        Args:
            ids: token ids of each row; a row without any keeps what it has, and its logits have no meaning.

        Raises:
            DecodingError: a row gets longer than there is room for.
        """
        counts = [len(one) for one in ids]
        for row, count in enumerate(counts):
            if count:
                self._make_room(row, count)
        rows = np.repeat(np.arange(self.rows, dtype=np.int32), counts)
        positions = np.concatenate([np.arange(start, start + count) for start, count in zip(self._positions, counts)])
        tokens = np.concatenate([np.asarray(one, np.int32) for one in ids])
        size = bucket(len(rows))
        tables = np.full((self.rows, self.length // BLOCK), -1, np.int32)
        for row, table in enumerate(self._tables):
            tables[row, :len(table)] = table

        def filled(array: np.ndarray, fill: int) -> Tensor:
            return Tensor(np.concatenate([array, np.full(size - len(array), fill)]).astype(np.int32))

        logits = runtime.run(self._graph, filled(tokens, 0), filled(self._slots[rows], -1), filled(rows, -1),
                             filled(positions, 0), Tensor(tables),
                             Tensor(np.maximum(np.cumsum(counts) - 1, 0).astype(np.int32)),
                             Tensor(self._slots)).asnumpy()
        self._positions = [start + count for start, count in zip(self._positions, counts)]
        return logits

    def choose(self, parents: Sequence[int]) -> None:
        """Row r goes on with what row parents[r] has; nothing is copied until the rows part."""
        tables = [list(self._tables[parent]) for parent in parents]
        for table in tables:
            self.pool.hold(table)
        for table in self._tables:
            self.pool.release(table)
        self._tables = tables
        self._positions = [self._positions[parent] for parent in parents]

    def _make_room(self, row: int, count: int) -> None:
        """Blocks for further positions of a row, which it alone holds."""
        table, start = self._tables[row], self._positions[row]
        if start + count > self.length:
            raise DecodingError(f"row {row} has {start + count} tokens, there is room for {self.length}")
        if start % BLOCK:
            copied = self.pool.own(table, start // BLOCK)
            if copied is not None:
                runtime.run(self._copy, *(Tensor(np.array([block], np.int32)) for block in copied)).asnumpy()
        table += self.pool.take(max(0, self.pool.count(start + count) - len(table)))


def _steppers(generator: Any, count: int, rows: int, tokens: int) -> List[Stepper]:
    """``count`` steppers with room for ``tokens``; the generator keeps them, since each one is a compiled graph."""
    length = min(max(128, 1 << (tokens - 1).bit_length()), generator.max_length)
    kept = generator.steppers.setdefault((rows, length), [])
    while len(kept) < count:
        kept.append(Stepper(generator.decoder, rows, length))
    return kept[:count]


def naive_contrastive(generator: Any, prompt: Any, adapter: str, contrast: Contrast, max_new_tokens: int = 64,
                      ignore_eos: bool = False) -> List[int]:
    """Greedy CoLD with two forwards a token, one for the expert and one for the amateur, contrasted in NumPy.

    Args:
        generator: :class:`colora_ms.decoding.Generator`; its decoder, tokenizer and adapters are used.
        prompt: as in ``Generator.generate``.
        adapter: the expert's adapter.
        contrast: :class:`Contrast`.

    Returns:
        list of token ids, the end-of-sequence id included.
    """
    ids = generator.encode(prompt)
    if not ids:
        raise DecodingError("the prompt is empty; give at least one token")
    budget = min(max_new_tokens, generator.max_length - len(ids))
    expert, amateur = _steppers(generator, 2, 1, len(ids) + budget)
    expert.use([generator.adapters.slot(adapter)])
    amateur.use([-1])
    eos = () if ignore_eos else generator.eos_token_ids
    tokens = []
    expert_logits, amateur_logits = expert.append([ids]), amateur.append([ids])
    while True:
        beta = contrast_strength(expert_logits[0], amateur_logits[0], contrast, tokens[-1] if tokens else -1, ids)
        scores = contrastive_scores(expert_logits, amateur_logits, contrast.alpha, beta)
        tokens.append(int(scores[0].argmax()))
        if len(tokens) == budget or tokens[-1] in eos:
            return tokens
        expert_logits, amateur_logits = expert.append([tokens[-1:]]), amateur.append([tokens[-1:]])


def beam_search(generator: Any, prompt: Any, adapter: Optional[str] = None, beams: int = 4, max_new_tokens: int = 64,
                length_penalty: float = 1.0) -> Tuple[List[int], float]:
    """Beam search on the adapter alone.

    Args:
        beams: hypotheses kept, >= 1.
        length_penalty: a finished hypothesis is scored by its log-probability over (tokens ** length_penalty).

    Returns:
        (token ids, score) of the best hypothesis; ids without the prompt, an end-of-sequence id included.
    """
    if beams < 1:
        raise DecodingError(f"beams={beams!r} is not a whole number >= 1")
    ids = generator.encode(prompt)
    if not ids:
        raise DecodingError("the prompt is empty; give at least one token")
    budget = min(max_new_tokens, generator.max_length - len(ids))
    stepper, = _steppers(generator, 1, beams, len(ids) + budget)
    stepper.use([-1 if adapter is None else generator.adapters.slot(adapter)] * beams)
    eos = set(generator.eos_token_ids)
    totals = np.full(beams, -np.inf)
    totals[0] = 0.0  # all rows hold the same prompt, so only one may be expanded at first
    hypotheses = [[] for _ in range(beams)]
    finished = []
    logits = stepper.append([ids] + [[]] * (beams - 1))[[0] * beams]
    stepper.choose([0] * beams)
    for step in range(budget):
        candidates = totals[:, None] + _log_softmax(logits)
        width = candidates.shape[1]
        order = np.argsort(-candidates, axis=None, kind="stable")[:2 * beams]
        parents, kept, scores = [], [], []
        for flat in order:
            parent, token = divmod(int(flat), width)
            tokens = hypotheses[parent] + [token]
            if token in eos or step == budget - 1:
                finished.append((candidates[parent, token] / len(tokens) ** length_penalty, tokens))
            elif len(kept) < beams:
                parents.append(parent)
                kept.append(tokens)
                scores.append(candidates[parent, token])
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        if not kept:
            break
        best_possible = max(scores) / (step + 1) ** length_penalty
        if len(finished) == beams and finished[-1][0] >= best_possible:
            break
        while len(kept) < beams:
            parents.append(parents[0])
            kept.append(kept[0])
            scores.append(-np.inf)
        hypotheses, totals = kept, np.array(scores)
        stepper.choose(parents)
        logits = stepper.append([tokens[-1:] for tokens in hypotheses])
    score, tokens = finished[0]
    return tokens, float(score)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
