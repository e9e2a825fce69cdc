"""Decoders that leave the graph at every token: the naive two-forward contrast and beam search.

The naive contrast is what CoLD argues against (two separate evaluations a token, arXiv 2505.14620, abstract). It is
kept as the checked baseline: it must produce the same tokens as the one-graph loop.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import numpy as np

from mindspore import Tensor, nn, ops

from colora_ms import runtime
from colora_ms.decoding.contrast import contrast_strength, contrastive_scores
from colora_ms.decoding.generator import bucket
from colora_ms.decoding.options import Contrast
from colora_ms.errors import DecodingError
from colora_ms.models.cache import KeyValueCache


class StepGraph(nn.Cell):
    """One call of ``Decoder.step`` as a graph of its own."""

    def __init__(self, decoder: Any, cache: Any) -> None:
        super().__init__()
        self.decoder = decoder
        self.cache = cache

    def construct(self, ids: Tensor, slots: Tensor, cache_rows: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return self.decoder.step(ids, slots, self.cache, cache_rows, start, length)


class ReorderCache(nn.Cell):
    """Row r of the cache becomes a copy of row parents[r]; beams do this after every step."""

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.cache = cache

    def construct(self, parents: Tensor) -> Tensor:
        """parents: (rows,) int32."""
        done = parents[0]
        for tensor in self.cache.keys + self.cache.values:
            done = ops.depend(done, ops.assign(tensor, ops.gather(tensor, parents, 0)))
        return done


class _Stepper:
    """A decoder with a cache of its own, fed token by token from Python."""

    def __init__(self, decoder: Any, rows: int, length: int) -> None:
        runtime.configure()
        decoder.set_train(False)
        self.rows = rows
        self.cache = KeyValueCache(decoder.config, rows, length)
        self.graph = StepGraph(decoder, self.cache).set_train(False)
        self.reorder = ReorderCache(self.cache).set_train(False)
        self.cache_rows = Tensor(np.arange(rows, dtype=np.int32))
        self.slots = None

    def use(self, slot: int) -> _Stepper:
        """Start anew with this adapter slot in all rows; returns the stepper."""
        self.slots = Tensor(np.full(self.rows, slot, np.int32))
        return self

    def prefill(self, ids: List[int]) -> np.ndarray:
        """ids: a list of prompt ids, the same for all rows -> logits (rows, vocab) after the last one."""
        width = min(bucket(len(ids)), self.cache.max_length)
        padded = np.zeros((self.rows, width), np.int32)
        padded[:, :len(ids)] = ids
        return self._call(padded, 0, len(ids))

    def step(self, tokens: List[int], position: int) -> np.ndarray:
        """tokens: (rows,) ids that stand at ``position`` -> logits (rows, vocab)."""
        return self._call(np.asarray(tokens, np.int32).reshape(self.rows, 1), position, 1)

    def _call(self, ids: np.ndarray, start: int, length: int) -> np.ndarray:
        full = np.full(self.rows, 1, np.int32)
        return runtime.run(self.graph, Tensor(ids), self.slots, self.cache_rows, Tensor(full * start),
                           Tensor(full * length)).asnumpy()


def _steppers(generator: Any, count: int, rows: int, tokens: int) -> List[_Stepper]:
    """``count`` steppers with room for ``tokens``; the generator keeps them, since each one is a compiled graph."""
    length = min(max(128, 1 << (tokens - 1).bit_length()), generator.max_length)
    kept = generator.steppers.setdefault((rows, length), [])
    while len(kept) < count:
        kept.append(_Stepper(generator.decoder, rows, length))
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
    expert.use(generator.adapters.slot(adapter))
    amateur.use(-1)
    eos = () if ignore_eos else generator.eos_token_ids
    tokens = []
    expert_logits, amateur_logits = expert.prefill(ids), amateur.prefill(ids)
    while True:
        beta = contrast_strength(expert_logits[0], amateur_logits[0], contrast, tokens[-1] if tokens else -1, ids)
        scores = contrastive_scores(expert_logits, amateur_logits, contrast.alpha, beta)
        tokens.append(int(scores[0].argmax()))
        if len(tokens) == budget or tokens[-1] in eos:
            return tokens
        position = len(ids) + len(tokens) - 1
        expert_logits = expert.step(tokens[-1:], position)
        amateur_logits = amateur.step(tokens[-1:], position)


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
    stepper.use(-1 if adapter is None else generator.adapters.slot(adapter))
    eos = set(generator.eos_token_ids)
    totals = np.full(beams, -np.inf)
    totals[0] = 0.0  # all rows hold the same prompt, so only one may be expanded at first
    hypotheses = [[] for _ in range(beams)]
    finished = []
    logits = stepper.prefill(ids)
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
        runtime.run(stepper.reorder, Tensor(np.array(parents, np.int32)))
        logits = stepper.step([tokens[-1] for tokens in hypotheses], len(ids) + step)
    score, tokens = finished[0]
    return tokens, float(score)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
