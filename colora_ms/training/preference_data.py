"""Preference pairs as token ids and as batches; ``training.layouts`` reads them, ``training.examples`` holds them.

Each of the two answers of a ``Preference`` becomes an ``Example`` with the same prompt, called ``<id>#chosen`` or
``<id>#rejected``, and is encoded like all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colora_ms.errors import DataError
from colora_ms.training.batching import Batch, BatchLoader, collate
from colora_ms.training.encoding import EncodedExample, EncodedSet, encode_examples

if TYPE_CHECKING:
    from colora_ms.models.tokenizer import Tokenizer
    from colora_ms.training.examples import Preference
    from colora_ms.training.templates import ChatTemplate, TextTemplate

_REPORTED = 5  # pairs named in one error; the rest are counted


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids; ``index``: position among the pairs."""

    chosen: EncodedExample
    rejected: EncodedExample
    index: int = 0

    def __len__(self) -> int:
        """Tokens of the longer of the two rows."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def ids(self) -> np.ndarray:
        """The ids of both, one after the other (what a fingerprint is made of)."""
        return np.concatenate([self.chosen.ids, self.rejected.ids])

    @property
    def labels(self) -> np.ndarray:
        """The labels of both."""
        return np.concatenate([self.chosen.labels, self.rejected.labels])


class EncodedPairs(EncodedSet):
    """The result of :func:`encode_preferences`: ``items`` are ``EncodedPair``, ``skipped`` and ``unlearned`` name
    pairs."""

    def summary(self) -> str:
        """One line for the log."""
        return super().summary().replace(" examples,", " pairs of answers,", 1)


def encode_preferences(preferences: Sequence[Preference], tokenizer: Tokenizer, template: TextTemplate | ChatTemplate,
                       max_length: int, on_long: str = "skip", vocab_size: int | None = None) -> EncodedPairs:
    """Encode pairs for training; arguments and errors as for ``encode_examples``.

    A pair of which one answer is longer than ``max_length``, or carries no loss, is left out whole.

    Args:
        preferences: list of ``Preference``.

    Returns:
        EncodedPairs.

    Raises:
        DataError: also if the two answers of a pair are equal or become the same tokens, or if an answer of several
            turns becomes several rows; the message says how many such pairs there are and names the first ones.
    """
    _refuse([f"pair {pair.id}: the chosen and the rejected answer are equal" for pair in preferences
             if pair.chosen == pair.rejected], len(preferences))
    halves = [half for pair in preferences for half in (pair.chosen_example, pair.rejected_example)]
    encoded = encode_examples(halves, tokenizer, template, max_length, on_long, vocab_size)
    rows: list[list[EncodedExample]] = [[] for _ in halves]
    for item in encoded.items:
        rows[item.index].append(item)
    too_long, without_loss = set(encoded.skipped), set(encoded.unlearned)
    items: list[Any] = []
    skipped, unlearned, problems = [], [], []
    for index, pair in enumerate(preferences):
        names = {pair.chosen_example.id, pair.rejected_example.id}
        if names & too_long:
            skipped.append(pair.id)
        elif names & without_loss:
            unlearned.append(pair.id)
        elif len(rows[2 * index]) + len(rows[2 * index + 1]) > 2:
            problems.append(f"pair {pair.id}: an answer has several turns, which the chat template does not write one "
                            "after another, so that it is no single row; give its last turn alone")
        else:
            pair_of = EncodedPair(rows[2 * index][0], rows[2 * index + 1][0], index)
            items.append(pair_of)
            if np.array_equal(pair_of.chosen.ids, pair_of.rejected.ids):
                problems.append(f"pair {pair.id}: the chosen and the rejected answer have the same tokens")
    _refuse(problems, len(preferences))
    if not items:
        raise DataError(f"none of the {len(preferences)} pairs can be used: in {len(skipped)} an answer with its "
                        f"prompt is longer than max_length={max_length} tokens (longest: {encoded.longest_skipped}), "
                        f"in {len(unlearned)} one carries no loss")
    return EncodedPairs(items, skipped, encoded.longest_skipped, max_length, unlearned, 0, encoded.spanning,
                        encoded.notes)


def _refuse(problems: list[str], total: int) -> None:
    if problems:
        more = f" (and {len(problems) - _REPORTED} more)" if len(problems) > _REPORTED else ""
        raise DataError(f"{len(problems)} of {total} preference pairs cannot be used: "
                        + "; ".join(problems[:_REPORTED]) + more)


class PairLoader(BatchLoader):
    """A ``BatchLoader`` over ``EncodedPair``: ``batch_size`` pairs are twice as many rows, the chosen answer of a pair
    before its rejected one. Both rows of a pair are always in the same batch; the pairs that fill up a last batch carry
    no label."""

    def summary(self) -> str:
        """One line for the log."""
        lengths = ", ".join(str(bucket) for bucket in self.buckets)
        return (f"{self.batches_per_epoch} an epoch, of {self._batch_size} pairs each: {2 * self._batch_size} rows of "
                f"{lengths} tokens with the adapter, and the same without it")

    def _collate(self, bucket: int, rows: list[list[int]]) -> Batch:
        pairs: list[Any] = [self._items[position] for row in rows for position in row]
        halves = [[half] for pair in pairs for half in (pair.chosen, pair.rejected)]
        return collate(halves, 2 * self._batch_size, bucket)
