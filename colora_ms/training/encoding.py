"""Examples as token ids, with labels only on the answer.

``labels[t]`` is ``ids[t]`` where token ``t`` belongs to the answer (what ends it included: the end-of-text token behind
a plain text, what the chat template writes behind the assistant's turn) and ``IGNORE`` elsewhere, as in Hugging Face's
convention; the shift by one happens in the batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from colora_ms.errors import ConfigError, DataError, TokenizerError
from colora_ms.models.joint import encode_joint, encode_spans

if TYPE_CHECKING:
    from colora_ms.models.tokenizer import Tokenizer
    from colora_ms.training.examples import Example
    from colora_ms.training.templates import ChatTemplate, Rendering, TextTemplate

#: Label of a token that carries no loss.
IGNORE = -100

#: What ``on_long`` and ``loss`` may say.
ON_LONG = ("skip", "error", "windows")
LOSSES = ("last", "all")

#: Share of the examples in which a token may span the border of prompt and answer before it is said.
SPANNING_SHARE = 0.01

_LISTED = 20  # ids of left-out examples in a run's log; the rest are counted


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """``ids`` and ``labels``: int32 arrays (tokens,); ``index``: position among the examples."""

    ids: np.ndarray
    labels: np.ndarray
    index: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class EncodedSet:
    """The result of ``encode_examples``.

    Attributes:
        items: list of ``EncodedExample``.
        skipped: ids of the examples that were longer than ``max_length``.
        longest_skipped: tokens of the longest of them, 0 if none.
        max_length: the limit.
        unlearned: ids of the examples that were left out because none of their tokens carries a loss.
        left_tokens: tokens at the end of a running text that fill no window.
        spanning: how many items have a token that holds the end of the prompt and the beginning of the answer.
        notes: further sentences that the user should read.
    """

    items: list[EncodedExample]
    skipped: list[str]
    longest_skipped: int
    max_length: int
    unlearned: Sequence[str] = ()
    left_tokens: int = 0
    spanning: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> EncodedExample:
        return self.items[index]

    @property
    def fingerprint(self) -> str:
        """``fingerprint`` of the items."""
        return fingerprint(self.items)

    def summary(self) -> str:
        """One line for the log: how many, how long, how many were skipped and why."""
        lengths = [len(item) for item in self.items]
        answers = sum(int((item.labels != IGNORE).sum()) for item in self.items)
        text = (f"{len(lengths)} examples, {min(lengths)} to {max(lengths)} tokens "
                f"(mean {sum(lengths) / len(lengths):.0f}), {answers} answer tokens")
        return "; ".join([text, *self._left_out()])

    def warnings(self) -> list[str]:
        """Sentences of all that was left out, and of what the user should know of the data; ``[]`` if all is well."""
        return [*self._left_out(), *self.notes]

    def report(self) -> dict:
        """What was used and what was left out, as JSON values for a run's log."""
        return {"examples": len(self.items), "tokens": sum(len(item) for item in self.items),
                "max_length": self.max_length, "skipped": len(self.skipped),
                "skipped_ids": list(self.skipped[:_LISTED]), "longest_skipped": self.longest_skipped,
                "unlearned": len(self.unlearned),
                "unlearned_ids": list(self.unlearned[:_LISTED]), "left_tokens": self.left_tokens,
                "spanning": self.spanning, "notes": list(self.notes)}

    def _left_out(self) -> list[str]:
        found = []
        if self.skipped:
            found.append(f"skipped {len(self.skipped)} longer than {self.max_length} tokens "
                         f"(longest {self.longest_skipped})")
        if self.unlearned:
            found.append(f"left out {len(self.unlearned)} without a loss (weight 0, or an answer without a token; the "
                         f"first is {self.unlearned[0]})")
        if self.left_tokens:
            found.append(f"left out the last {self.left_tokens} tokens, which fill no window of {self.max_length}")
        return found


def encode_examples(examples: Sequence[Example], tokenizer: Tokenizer, template: TextTemplate | ChatTemplate,
                    max_length: int, on_long: str = "skip", vocab_size: int | None = None,
                    loss: str = "last") -> EncodedSet:
    """Encode examples for training.

    Prompt and answer are one text, encoded once; the answer's tokens are those behind the prompt's. A document
    (``Example.text``) is closed with the end-of-text token, and all of it carries a loss.

    Args:
        examples: list of ``Example``.
        tokenizer: has ``encode(text, add_special_tokens=...) -> list of int`` and
            ``eos_token_ids`` (or ``eos_token_id``); see ``models.joint`` for what else it may need.
        template: a ``TextTemplate`` or ``ChatTemplate``.
        max_length: the largest number of tokens of prompt and answer together.
        on_long: ``"skip"`` leaves longer examples out and counts them; ``"error"`` raises; ``"windows"`` cuts longer
            documents into windows of ``max_length`` tokens (neighbours share one, so that each is predicted once), and
            skips other examples.
        vocab_size: if given, ids outside ``[0, vocab_size)`` are an error (a tokenizer of
            another model).
        loss: ``"last"`` or ``"all"``, see ``ChatTemplate.renderings``.

    Returns:
        EncodedSet.

    Raises:
        DataError: an example is too long (with ``on_long="error"``), all are, or ids do not fit.
        ConfigError: bad ``on_long``, ``loss`` or ``max_length``.
    """
    if on_long not in ON_LONG:
        raise ConfigError(f"on_long is {on_long!r}, expected one of {', '.join(ON_LONG)}")
    if loss not in LOSSES:
        raise ConfigError(f"loss is {loss!r}, expected one of {', '.join(LOSSES)}")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 2:
        raise ConfigError(f"max_length is {max_length!r}, expected an integer of at least 2")
    items, skipped, longest, unlearned, spanned = [], [], 0, [], []
    parted = template.parted
    for index, example in enumerate(examples):
        try:
            made = encode_example(example, tokenizer, template, loss)
        except TokenizerError as error:
            raise DataError(f"example {example.id}: {error}") from None
        if not made:
            unlearned.append(example.id)
        for one in made:
            ids, labels = one.ids, one.labels
            if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
                raise DataError(f"example {example.id}: the tokenizer gave the id {ids.max()}, but the "
                                f"model has {vocab_size} rows; do the two belong together?")
            if len(ids) <= max_length:
                items.append(EncodedExample(ids, labels, index))
                spanned += [one.spanning] if one.spanning else []
            elif on_long == "windows" and example.text is not None:
                items += [EncodedExample(ids[begin:end], labels[begin:end], index)
                          for begin, end in windows(len(ids), max_length)]
            elif on_long == "error":
                raise DataError(f"example {example.id} has {len(ids)} tokens, more than max_length="
                                f"{max_length}; raise max_length or use on_long: skip")
            else:
                skipped.append(example.id)
                longest = max(longest, len(ids))
    if not examples:
        raise DataError("there are no examples to encode")
    if not items and not skipped:
        raise DataError(f"none of the {len(unlearned)} examples carries a loss: their answers have weight 0, or no "
                        "token")
    if not items:
        raise DataError(f"all {len(skipped)} examples are longer than max_length={max_length} "
                        f"tokens (longest: {longest}); raise max_length")
    notes = template_notes(spanned, len(items), template, template.parted - parted)
    if not template.adds_special_tokens:
        notes += _open_end(tokenizer, [item for item in items if examples[item.index].text is None])
    return EncodedSet(items, skipped, longest, max_length, unlearned, 0, len(spanned), tuple(notes))


def _open_end(tokenizer: Tokenizer, items: Sequence[EncodedExample]) -> list[str]:
    """A sentence if an assistant's turn does not end with a special token, at which generation could stop."""
    backend = getattr(tokenizer, "backend", None)
    if backend is None or not items:
        return []
    added = backend.get_added_tokens_decoder()
    last = int(items[0].labels[items[0].labels != IGNORE][-1])
    if last in added or last == getattr(tokenizer, "eos_token_id", None):
        return []
    return [f"what is learned of an assistant's turn ends with {tokenizer.decode([last])!r}, which is no special "
            "token: the chat template writes none there, or none inside its {% generation %} block, so that answers "
            "will end at a stop text or at the length, not by themselves"]


def template_notes(spanned: Sequence[str], count: int, template: TextTemplate | ChatTemplate,
                   parted: int = 0) -> list[str]:
    """Sentences about data and template that do not fit.

    Args:
        spanned: the ``EncodedText.spanning`` of the texts that have one.
        count: number of texts.
        template: the template that rendered them.
        parted: by how much its ``parted`` rose.
    """
    found = []
    if len(spanned) > SPANNING_SHARE * count:
        found.append(f"in {len(spanned)} of {count} examples one token holds the end of the prompt and the beginning "
                     f"of the answer (the first: {spanned[0]}). The model is asked with the prompt alone, which ends "
                     "with other tokens than it has learned from: let prompts end where a token ends, that is behind a "
                     "word, with the blank or line break behind it at the beginning of the answer")
    for name in template.unwritten:
        found.append(f"the chat template does not write {name}, which some examples have, so that it is not learned")
    found += [f"{name} is not learned" for name in template.unlearned]
    if parted:
        found.append(f"in {parted} examples the chat template opens the assistant's turn with more than it writes in "
                     "front of an answer, so that the model learns to answer behind another prompt than the one it is "
                     "asked with")
    return found


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """One text of an example: ``ids`` and ``labels`` as in ``EncodedExample``.

    ``spanning``: "" or, if a token holds the end of the prompt and the beginning of the answer, that place in words.
    """

    ids: np.ndarray
    labels: np.ndarray
    spanning: str = ""


def encode_example(example: Example, tokenizer: Tokenizer, template: TextTemplate | ChatTemplate,
                   loss: str = "last") -> list[EncodedText]:
    """The ids and labels of one example.

    Args:
        example, tokenizer, template, loss: as in ``encode_examples``.

    Returns:
        List of ``EncodedText``: one; none if no token carries a loss; several for a conversation that ``loss="all"``
        (or an answer of several messages) makes into one example a turn.

    Raises:
        DataError: the template cannot render it, the prompt has no token, or the tokenizer has no end-of-text token.
    """
    if example.text is not None:
        ids = list(tokenizer.encode(example.text, add_special_tokens=True))
        end = end_token(tokenizer)
        array = np.array(ids if ids[-1:] == [end] else ids + [end], np.int32)
        return [EncodedText(array, array)]
    made = []
    for rendering in template.renderings(example, loss):
        ids, mask, spanning = _encode(tokenizer, rendering, template.adds_special_tokens, example)
        if rendering.closed:
            ids, mask = [*ids, end_token(tokenizer)], np.append(mask, True)
        if mask.any():
            array = np.array(ids, np.int32)
            made.append(EncodedText(array, np.where(mask, array, IGNORE).astype(np.int32), spanning))
    return made


def _encode(tokenizer: Tokenizer, rendering: Rendering, special: bool,
            example: Example) -> tuple[list[int], np.ndarray, str]:
    """(ids, mask of the tokens that carry a loss, the place of a token that spans the first border or "")."""
    text, spans = rendering.text, rendering.spans
    begin, end = spans[0]
    first = encode_joint(tokenizer, text[:begin], text[begin:], special)
    if first.boundary == 0:
        raise DataError(f"example {example.id}: the prompt has no tokens")
    spanning = ""
    if first.spanning:
        token = tokenizer.decode([first.ids[first.boundary]], skip_special_tokens=False)
        spanning = f"{token!r} between {text[:begin][-12:]!r} and {text[begin:][:12]!r}"
    if len(spans) == 1 and end == len(text):
        return first.ids, np.arange(len(first.ids)) >= first.boundary, spanning
    if hasattr(tokenizer, "encode_offsets"):
        return *encode_spans(tokenizer, text, spans, special), spanning
    mask = np.zeros(len(first.ids), bool)
    for begin, end in spans:
        edges = [encode_joint(tokenizer, text[:edge], text[edge:], special) for edge in (begin, end)]
        mask[edges[0].boundary:edges[1].boundary + edges[1].spanning] = True
    return first.ids, mask, spanning


def windows(count: int, length: int) -> list[tuple[int, int]]:
    """Places (begin, end) of windows of at most ``length`` tokens in ``count``; neighbours share one token."""
    return [(begin, min(begin + length, count)) for begin in range(0, max(count - 1, 1), length - 1)]


def fingerprint(items: Sequence[EncodedExample]) -> str:
    """A digest of all tokens and labels: a resumed run checks that its data is the same."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(np.int64(len(item)).tobytes() + item.ids.tobytes() + item.labels.tobytes())
    return digest.hexdigest()[:32]


def prompt_ids(example: Example, tokenizer: Tokenizer, template: TextTemplate | ChatTemplate) -> list[int]:
    """The token ids that stand in front of the answer, as a list of int.

    Raises:
        DataError: the prompt has no token at all.
    """
    ids = list(tokenizer.encode(template.prompt(example),
                                add_special_tokens=template.adds_special_tokens))
    if not ids:
        raise DataError(f"example {example.id}: the prompt has no tokens")
    return ids


def end_token(tokenizer: Tokenizer) -> int:
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
