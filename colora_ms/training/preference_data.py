"""Preference pairs: a prompt with a chosen and a rejected answer, from records to batches.

    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}
    {"prompt": [{"role": "user", "content": "2 + 2 ="}], "chosen": [{"role": "assistant", "content": "4"}], "rejected": [...]}
    {"chosen": [user, assistant], "rejected": [user, assistant]}          the prompt is what both begin with

Each of the two answers becomes an ``Example`` with the same prompt, called ``<id>#chosen`` or ``<id>#rejected``, and is
encoded like all others.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from colora_ms.errors import DataError
from colora_ms.training.batching import BatchLoader, collate
from colora_ms.training.encoding import EncodedExample, EncodedSet, encode_examples
from colora_ms.training.examples import Example

_REPORTED = 5  # pairs named in one error; the rest are counted
_KEYS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Preference:
    """A question with a better and a worse answer.

    Exactly one of ``prompt`` and ``messages`` is set.

    Attributes:
        chosen, rejected: the better and the worse answer, texts.
        prompt, messages, id, meta: as in ``Example``.
        chosen_example, rejected_example: the question with one of the answers as ``Example``.
    """

    chosen: str
    rejected: str
    prompt: str = None
    messages: tuple = None
    id: str = ""
    meta: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for side in ("chosen", "rejected"):
            example = Example(getattr(self, side), self.prompt, self.messages, f"{self.id}#{side}", self.meta)
            object.__setattr__(self, f"{side}_example", example)

    @property
    def question(self):
        """As ``Example.question``."""
        return self.chosen_example.question


def preference_examples(records, name="pair"):
    """The pairs of parsed records (see the head of this module).

    Args:
        records: list of dictionaries.
        name: of the source; a record without ``"id"`` is called ``<name>:<number>``.

    Returns:
        List of ``Preference``.

    Raises:
        DataError: records that cannot be used; the message says how many there are and names the first ones.
    """
    pairs, problems = [], []
    for number, record in enumerate(records, 1):
        try:
            pairs.append(_from_record(record, f"{name}:{number}"))
        except DataError as error:
            problems.append(str(error))
    _refuse(problems, len(records))
    return pairs


def _from_record(record, name):
    if not isinstance(record, dict) or record.get("chosen") is None or record.get("rejected") is None:
        raise DataError(f"{name}: expected the keys prompt, chosen and rejected; found {_short(record)}")
    prompt, chosen, rejected = (record.get(key) for key in _KEYS)
    if prompt is None:
        if not all(isinstance(answer, list) for answer in (chosen, rejected)):
            raise DataError(f"{name}: without a prompt, chosen and rejected must be whole conversations (lists of messages)")
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError(f"{name}: the conversations chosen and rejected have different prompts")
    question = {"messages": tuple(prompt)} if isinstance(prompt, list) else {"prompt": prompt}
    identity = name if record.get("id") is None else str(record["id"])
    meta = {key: value for key, value in record.items() if key not in ("id", *_KEYS)}
    try:
        return Preference(_answer(chosen), _answer(rejected), id=identity, meta=meta, **question)
    except DataError as error:
        raise DataError(f"{name}: " + str(error).split(": ", 1)[-1]) from None


def _answer(value):
    if not isinstance(value, list):
        return value
    if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
        raise DataError(f": an answer must be a text or one message of the assistant; found {_short(value)}")
    return value[0].get("content")


def load_preferences(sources):
    """The pairs of one JSON lines file, or of several in a row.

    Args:
        sources: a path, ``{"kind": "jsonl", "path": ...}``, or a list of these.

    Raises:
        DataError: an unreadable file, or records that are no pairs.
    """
    pairs = []
    for source in sources if isinstance(sources, (list, tuple)) else [sources]:
        path = source.get("path") if isinstance(source, dict) else source
        if isinstance(source, dict) and (source.get("kind") != "jsonl" or set(source) - {"kind", "path"}):
            raise DataError(f"the preference source is {source!r}, expected a path or {{'kind': 'jsonl', 'path': ...}}")
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"cannot read the preference pairs of {path}: {error}") from None
        pairs += preference_examples(records, Path(path).name)
    return pairs


def _short(value):
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclasses.dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids; ``index``: position among the pairs."""

    chosen: EncodedExample
    rejected: EncodedExample
    index: int = 0

    def __len__(self):
        """Tokens of the longer of the two rows."""
        return max(len(self.chosen), len(self.rejected))

    @property
    def ids(self):
        """The ids of both, one after the other (what a fingerprint is made of)."""
        return np.concatenate([self.chosen.ids, self.rejected.ids])

    @property
    def labels(self):
        """The labels of both."""
        return np.concatenate([self.chosen.labels, self.rejected.labels])


class EncodedPairs(EncodedSet):
    """The result of :func:`encode_preferences`: ``items`` are ``EncodedPair``, ``skipped`` the ids of pairs."""

    def summary(self):
        """One line for the log."""
        text = super().summary().replace(" examples,", " pairs of answers,", 1)
        return text


def _refuse(problems, total):
    if problems:
        more = f" (and {len(problems) - _REPORTED} more)" if len(problems) > _REPORTED else ""
        raise DataError(f"{len(problems)} of {total} preference pairs cannot be used: " + "; ".join(problems[:_REPORTED]) + more)


def encode_preferences(preferences, tokenizer, template, max_length, on_long="skip", vocab_size=None):
    """Encode pairs for training; arguments and errors as for ``encode_examples``.

    A pair of which one answer is longer than ``max_length`` is left out whole.

    Returns:
        EncodedPairs.

    Raises:
        DataError: also if the two answers of a pair are equal, or become the same tokens.
    """
    _refuse([f"pair {pair.id}: the chosen and the rejected answer are equal" for pair in preferences
             if pair.chosen == pair.rejected], len(preferences))
    halves = [half for pair in preferences for half in (pair.chosen_example, pair.rejected_example)]
    encoded = encode_examples(halves, tokenizer, template, max_length, on_long, vocab_size)
    found = {item.index: item for item in encoded.items}
    items, skipped, equal = [], [], []
    for index, pair in enumerate(preferences):
        chosen, rejected = found.get(2 * index), found.get(2 * index + 1)
        if chosen is None or rejected is None:
            skipped.append(pair.id)
        elif np.array_equal(chosen.ids, rejected.ids):
            equal.append(f"pair {pair.id}: the chosen and the rejected answer have the same tokens")
        else:
            items.append(EncodedPair(chosen, rejected, index))
    _refuse(equal, len(preferences))
    if not items:
        raise DataError(f"each of the {len(preferences)} pairs has an answer that is longer than max_length={max_length} tokens "
                        f"with its prompt (longest: {encoded.longest_skipped}); raise max_length")
    return EncodedPairs(items, skipped, encoded.longest_skipped, max_length)


class PairLoader(BatchLoader):
    """A ``BatchLoader`` over ``EncodedPair``: ``batch_size`` pairs are twice as many rows, the chosen answer of a pair
    before its rejected one. Both rows of a pair are always in the same batch; the pairs that fill up a last batch carry no
    label."""

    def _collate(self, bucket, rows):
        pairs = [self._items[position] for row in rows for position in row]
        return collate([[half] for pair in pairs for half in (pair.chosen, pair.rejected)], 2 * self._batch_size, bucket)
