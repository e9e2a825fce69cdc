"""Examples as token ids, with labels only on the answer.

``labels[t]`` is ``ids[t]`` where token ``t`` belongs to the answer (its end-of-text token included)
and ``IGNORE`` elsewhere, as in Hugging Face's convention; the shift by one happens in the batches.
"""

import dataclasses
import hashlib

import numpy as np

from colora_ms.errors import ConfigError, DataError

#: Label of a token that carries no loss.
IGNORE = -100


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """``ids`` and ``labels``: int32 arrays (tokens,); ``index``: position among the examples."""

    ids: np.ndarray
    labels: np.ndarray
    index: int = 0

    def __len__(self):
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """The result of ``encode_examples``.

    Attributes:
        items: list of ``EncodedExample``.
        skipped: ids of the examples that were longer than ``max_length``.
        longest_skipped: tokens of the longest of them, 0 if none.
        max_length: the limit.
    """

    items: list
    skipped: list
    longest_skipped: int
    max_length: int

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    @property
    def fingerprint(self):
        """``fingerprint`` of the items."""
        return fingerprint(self.items)

    def summary(self):
        """One line for the log: how many, how long, how many were skipped and why."""
        lengths = [len(item) for item in self.items]
        answers = sum(int((item.labels != IGNORE).sum()) for item in self.items)
        text = (f"{len(lengths)} examples, {min(lengths)} to {max(lengths)} tokens "
                f"(mean {sum(lengths) / len(lengths):.0f}), {answers} answer tokens")
        if self.skipped:
            text += (f"; skipped {len(self.skipped)} longer than {self.max_length} tokens "
                     f"(longest {self.longest_skipped})")
        return text


def encode_examples(examples, tokenizer, template, max_length, on_long="skip", vocab_size=None):
    """Encode examples for training.

    The prompt and the answer are encoded apart and joined, so that the prompt's tokens are exactly
    those that generation sees.

    Args:
        examples: list of ``Example``.
        tokenizer: has ``encode(text, add_special_tokens=...) -> list of int`` and
            ``eos_token_ids`` (or ``eos_token_id``).
        template: a ``TextTemplate`` or ``ChatTemplate``.
        max_length: the largest number of tokens of prompt and answer together.
        on_long: ``"skip"`` leaves longer examples out and counts them; ``"error"`` raises.
        vocab_size: if given, ids outside ``[0, vocab_size)`` are an error (a tokenizer of
            another model).

    Returns:
        EncodedSet.

    Raises:
        DataError: an example is too long (with ``on_long="error"``), all are, or ids do not fit.
        ConfigError: bad ``on_long`` or ``max_length``.
    """
    if on_long not in ("skip", "error"):
        raise ConfigError(f"on_long is {on_long!r}, expected 'skip' or 'error'")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ConfigError(f"max_length is {max_length!r}, expected an integer of at least 2")
    end = end_token(tokenizer)
    items, skipped, longest = [], [], 0
    for index, example in enumerate(examples):
        prompt = prompt_ids(example, tokenizer, template)
        answer = list(tokenizer.encode(template.answer(example), add_special_tokens=False)) + [end]
        length = len(prompt) + len(answer)
        if length > max_length:
            if on_long == "error":
                raise DataError(f"example {example.id} has {length} tokens, more than max_length="
                                f"{max_length}; raise max_length or use on_long: skip")
            skipped.append(example.id)
            longest = max(longest, length)
            continue
        ids = np.array(prompt + answer, np.int32)
        if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
            raise DataError(f"example {example.id}: the tokenizer gave the id {ids.max()}, but the "
                            f"model has {vocab_size} rows; do the two belong together?")
        labels = np.array([IGNORE] * len(prompt) + answer, np.int32)
        items.append(EncodedExample(ids, labels, index))
    if not examples:
        raise DataError("there are no examples to encode")
    if not items:
        raise DataError(f"all {len(skipped)} examples are longer than max_length={max_length} "
                        f"tokens (longest: {longest}); raise max_length")
    return EncodedSet(items, skipped, longest, max_length)


def fingerprint(items):
    """A digest of all tokens and labels: a resumed run checks that its data is the same."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(np.int64(len(item)).tobytes() + item.ids.tobytes() + item.labels.tobytes())
    return digest.hexdigest()[:32]


def prompt_ids(example, tokenizer, template):
    """The token ids that stand in front of the answer, as a list of int.

    Raises:
        DataError: the prompt has no token at all.
    """
    ids = list(tokenizer.encode(template.prompt(example),
                                add_special_tokens=template.adds_special_tokens))
    if not ids:
        raise DataError(f"example {example.id}: the prompt has no tokens")
    return ids


def end_token(tokenizer):
    """The id that ends an answer: the tokenizer's first end-of-text token.

    Raises:
        DataError: the tokenizer has none.
    """
    many = getattr(tokenizer, "eos_token_ids", None)
    if many:
        return int(sorted(many)[0] if isinstance(many, (set, frozenset)) else many[0])
    one = getattr(tokenizer, "eos_token_id", None)
    if one is None:
        raise DataError("the tokenizer names no end-of-text token, so the model could not learn "
                        "where an answer ends")
    return int(one)
