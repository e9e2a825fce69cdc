"""Perplexity and multiple choice, both from the log-probabilities of given tokens.

The model comes in as anything with

    token_logprobs(sequences) -> list of arrays

For a sequence of n ids the array has n - 1 numbers: number t is log p(ids[t + 1] | ids[0..t]).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.errors import ConfigError, DataError, near
from colora_ms.evaluation.significance import wilson_interval
from colora_ms.models.joint import encode_joint

if TYPE_CHECKING:
    from colora_ms.evaluation.interfaces import TokenScorer
    from colora_ms.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """``perplexity`` = exp(``loss``), ``loss`` = mean negative log-likelihood of ``tokens``."""

    perplexity: float
    loss: float
    tokens: int


def perplexity(model: TokenScorer, ids: Sequence[int], window: int, stride: int | None = None, batch_size: int = 1,
               known: Mapping[int, float] | None = None,
               on_window: Callable[[int, float, int], Any] | None = None) -> Perplexity:
    """Perplexity of a long text, in windows that overlap.

    A window of ``window`` tokens moves on by ``stride``; only the tokens that no earlier window
    has scored count, so every token but the very first counts exactly once, each with at least
    ``window - stride`` tokens in front of it (apart from the beginning).

    Args:
        model: see the head of this module.
        ids: token ids of the whole text.
        window: tokens of a window, at most the model's context.
        stride: tokens between the beginnings of windows; default ``window // 2``.
        batch_size: windows in one call of ``token_logprobs``.
        known: ``{begin of a window: its summed negative log-likelihood}`` of windows that need not
            be run again.
        on_window: called with (begin, summed negative log-likelihood, tokens) of each window run.

    Raises:
        ConfigError: not ``1 <= stride < window``, or ``batch_size < 1``.
        DataError: fewer than two tokens, or the model gave wrong shapes or non-finite numbers.
    """
    stride = window // 2 if stride is None else stride
    if window < 2 or not 1 <= stride < window or batch_size < 1:
        raise ConfigError(f"window={window}, stride={stride}, batch_size={batch_size}: expected "
                          "1 <= stride < window and batch_size >= 1")
    ids = [int(token) for token in ids]
    if len(ids) < 2:
        raise DataError(f"perplexity needs at least two tokens, the text has {len(ids)}")
    spans, scored = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        spans.append((begin, end, scored))
        scored = end
        if end == len(ids):
            break
    sums = dict(known or {})
    waiting = [span for span in spans if span[0] not in sums]
    for start in range(0, len(waiting), batch_size):
        chunk = waiting[start:start + batch_size]
        rows = logprobs_of(model, [ids[begin:end] for begin, end, _ in chunk])
        for (begin, end, first), row in zip(chunk, rows):
            # row[t] belongs to position begin + t + 1
            sums[begin] = -math.fsum(row[first - begin - 1:])
            if on_window is not None:
                on_window(begin, sums[begin], end - first)
    count = sum(end - first for _, end, first in spans)
    loss = math.fsum(sums[begin] for begin, _, _ in spans) / count
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, count)


@dataclasses.dataclass(frozen=True)
class ChoiceItem:
    """A question with given answers; ``answer`` is the index of the right one."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class ChoiceResult:
    """``items``: list of ``{"id", "correct", "chosen", "answer", "scores"}``."""

    items: list[dict]
    accuracy: float
    interval: tuple[float, float]

    @property
    def outcomes(self) -> dict[str, bool]:
        """``{id: correct}``, the input of ``mcnemar``."""
        return {item["id"]: item["correct"] for item in self.items}


_NORMALISATIONS = ("none", "token", "byte")


def multiple_choice(model: TokenScorer, tokenizer: Tokenizer, items: Sequence[ChoiceItem], normalise: str = "token",
                    batch_size: int = 8) -> ChoiceResult:
    """Take the choice with the highest log-likelihood after the context.

    Context and choice are encoded as one text (see ``colora_ms.models.joint``); what is scored are
    the tokens behind the context, and a token with text of both belongs to the choice.  So it does
    not matter on which side of the border a blank is written.

    Args:
        model: see the head of this module.
        tokenizer: ``Tokenizer``, or what ``encode_joint`` takes.
        items: list of ``ChoiceItem``.
        normalise: divide the sum by the number of tokens, of UTF-8 bytes, or by nothing.
        batch_size: sequences in one call of ``token_logprobs``.

    Returns:
        ChoiceResult; between equal scores the first choice wins.

    Raises:
        ConfigError: unknown ``normalise``.
        DataError: no items, an item without two choices, an empty text, an impossible answer, a
            context without a token of its own in front of the choice.
    """
    if normalise not in _NORMALISATIONS:
        raise ConfigError(f"normalise is {normalise!r}, expected one of "
                          f"{', '.join(_NORMALISATIONS)}.{near(normalise, _NORMALISATIONS)}")
    items = list(items)
    if not items:
        raise DataError("there are no multiple-choice items")
    work = []  # (item number, sequence, tokens of the choice, divisor)
    for number, item in enumerate(items):
        if len(item.choices) < 2 or isinstance(item.answer, bool) \
                or not isinstance(item.answer, int) or not 0 <= item.answer < len(item.choices):
            raise DataError(f"item {item.id}: {len(item.choices)} choices and the answer "
                            f"{item.answer!r}; expected at least two choices and an index of one")
        for choice in item.choices:
            joint = encode_joint(tokenizer, item.context, choice)
            count = len(joint.ids) - joint.boundary
            if joint.boundary == 0 or count == 0:
                raise DataError(f"item {item.id}: context {item.context!r} and choice {choice!r} "
                                "must both have tokens")
            divisor = {"none": 1, "token": count, "byte": len(choice.encode())}[normalise]
            work.append((number, joint.ids, count, divisor))
    scores: list[list[float]] = [[] for _ in items]
    # Similar lengths together: less padding in the model.
    order = sorted(range(len(work)), key=lambda k: len(work[k][1]))
    found = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start:start + batch_size]
        for k, row in zip(chunk, logprobs_of(model, [work[k][1] for k in chunk])):
            found[k] = math.fsum(row[-work[k][2]:]) / work[k][3]
    for k, (number, *_) in enumerate(work):
        scores[number].append(found[k])
    results: list[dict] = []
    for item, values in zip(items, scores):
        chosen = int(np.argmax(values))
        results.append({"id": item.id, "correct": chosen == item.answer, "chosen": chosen,
                        "answer": item.answer, "scores": values})
    correct = sum(result["correct"] for result in results)
    return ChoiceResult(results, correct / len(results), wilson_interval(correct, len(results)))


def logprobs_of(model: TokenScorer, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """``model.token_logprobs(sequences)`` as float64 arrays, checked for count, length, finiteness.

    Raises:
        DataError: names the sequence that is wrong.
    """
    rows = [np.asarray(row, np.float64) for row in model.token_logprobs(sequences)]
    if len(rows) != len(sequences):
        raise DataError(f"the model gave {len(rows)} rows for {len(sequences)} sequences")
    for number, (row, sequence) in enumerate(zip(rows, sequences)):
        if row.shape != (len(sequence) - 1,):
            raise DataError(f"sequence {number} has {len(sequence)} tokens, so {len(sequence) - 1} "
                            f"log-probabilities are expected; the model gave shape {row.shape}")
        if np.isnan(row).any():
            raise DataError(f"the model gave NaN log-probabilities for sequence {number}")
    return rows
