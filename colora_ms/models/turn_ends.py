"""Which tokens end an answer, and which file says so.

Files are often incomplete here: a chat model's ``eos_token`` is ``<|endoftext|>`` while its turns end
with ``<|im_end|>``, a GGUF names one end token of several.  So the union of all sources counts; a model
that has written any of these tokens has said what it had to say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Optional, Protocol

from colora_ms.errors import TokenizerError

# two words that no template uses, so that they are found again in what it renders
_USER, _ANSWER = "Zuerst", "Zweitens"


class EndIds(Protocol):
    """What is read of a ``DecoderConfig``."""

    eos_token_ids: tuple


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """A token that ends an answer.

    Attributes:
        id: its id.
        token: its text, such as "<|im_end|>"; None if the vocabulary has no such id.
        sources: who says so ("config.json", "the chat template", ...).
    """

    id: int
    token: Optional[str]
    sources: tuple


def turn_ends(config: EndIds, tokenizer: Any) -> tuple[TurnEnd, ...]:
    """The tokens that end an answer.

    Args:
        config: ``DecoderConfig``, for its ``eos_token_ids``.
        tokenizer: ``Tokenizer``; of another object with ``eos_token_id`` only that is used.

    Returns:
        tuple of :class:`TurnEnd`: the config's first, in its order.
    """
    found = {}

    def add(index, source):
        if source not in found.setdefault(int(index), []):
            found[int(index)].append(source)

    stored = getattr(tokenizer, "stored_ends", {})
    for index in config.eos_token_ids:
        names = [name for name, ids in stored.items() if index in ids]
        for name in names or ["the model's config"]:
            add(index, name)
    for name, ids in stored.items():
        for index in ids:
            add(index, name)
    if getattr(tokenizer, "eos_token_id", None) is not None:
        add(tokenizer.eos_token_id, "the tokenizer's eos_token")
    for index in getattr(tokenizer, "known_ends", ()):
        add(index, "its name in the vocabulary")
    for index in template_end(getattr(tokenizer, "closing_tokens", ((), ())), found):
        add(index, "the chat template")
    backend = getattr(tokenizer, "backend", None)
    return tuple(TurnEnd(index, None if backend is None else backend.id_to_token(index), tuple(sources))
                 for index, sources in found.items())


def template_end(closing: tuple[tuple[int, ...], tuple[int, ...]], known: Collection[int] = ()) -> tuple[int, ...]:
    """The id with which a chat template ends the assistant's turns, as a tuple of one, or of none.

    Args:
        closing: ``closing_tokens`` of the tokenizer.
        known: ids that end an answer for another reason; if one of them stands there, it is the end.
    """
    within, last = closing
    common = 0
    while common < min(len(within), len(last)) and within[common] == last[common]:
        common += 1
    ends = [index for index in within[:common] or last if index in known]
    if ends:
        return (ends[0],)
    if common:
        return (within[common - 1],)
    # nothing ends every turn: what opens the next one tells that this one is over
    return within[:1] or last[:1]


def closing_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a chat template writes right behind an assistant's text.

    Args:
        tokenizer: ``Tokenizer``.

    Returns:
        Two tuples of ids: behind a turn that another follows (what opens that one included), and behind the last one.
        Empty where there is no template, or where plain text stands behind the answer.
    """
    answer = {"role": "assistant", "content": _ANSWER}
    question = {"role": "user", "content": _USER}
    return tuple(_behind(tokenizer, messages) for messages in
                 ([question, answer, question], [question, answer]))


def _behind(tokenizer, messages):
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    except TokenizerError:  # no template, or it refuses such a conversation
        return ()
    if text.count(_ANSWER) != 1:
        return ()
    ids, offsets = tokenizer.encode_offsets(text, add_special_tokens=False)
    added = tokenizer.backend.get_added_tokens_decoder()
    begin, run = text.index(_ANSWER) + len(_ANSWER), []
    for index, (start, end) in zip(ids, offsets.tolist()):
        if start < begin or not text[start:end].strip() and index not in added:
            continue
        if index not in added:
            break
        run.append(index)
    return tuple(run)
