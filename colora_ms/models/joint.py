"""A prompt and its continuation as token ids: the one place where two texts become one sequence.

Two texts that are encoded apart and joined are not what a model has read: a SentencePiece tokenizer
puts a stray ``▁`` in front of the second, and byte-pair merges over the border are lost.  So the
whole text is encoded once and cut behind the prompt.  A token that holds text of both sides belongs
to the continuation.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable

import numpy as np

from colora_ms.errors import TokenizerError
from colora_ms.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class JointIds:
    """Ids of a prompt with its continuation.

    Attributes:
        ids: ids of the whole text, as ``tokenizer.encode(prompt + continuation)`` gives them.
        boundary: ``ids[boundary:]`` belong to the continuation; ``len(ids)`` if it has no token.
        spanning: whether the token at the boundary also holds text of the prompt.
    """

    ids: list
    boundary: int
    spanning: bool


def encode_joint(tokenizer: Tokenizer, prompt: str, continuation: str, add_special_tokens: bool = True) -> JointIds:
    """Encode a prompt together with what follows it.

    Args:
        tokenizer: ``Tokenizer``.  An object with nothing but ``encode(text, add_special_tokens=...)``
            will do as long as the prompt's own ids begin the joint text's.
        prompt, continuation: ``str``; each may be empty.
        add_special_tokens: put the begin token that the model was trained with; it belongs to the
            prompt.  There is never an end token.

    Returns:
        JointIds.

    Raises:
        TokenizerError: not strings, or a tokenizer that cannot say where its tokens lie.
    """
    for name, text in (("prompt", prompt), ("continuation", continuation)):
        if not isinstance(text, str):
            raise TokenizerError(f"the {name} is a {type(text).__name__}, expected str")
    text = prompt + continuation
    if not hasattr(tokenizer, "encode_offsets"):
        return _by_prefix(tokenizer, prompt, text, add_special_tokens)
    ids, offsets = tokenizer.encode_offsets(text, add_special_tokens)
    ends = offsets[:, 1] > _border(tokenizer, text, len(prompt))
    boundary = int(ends.argmax()) if ends.any() else len(ids)
    spanning = boundary < len(ids) and bool(offsets[boundary, 0] < len(prompt))
    return JointIds(ids, boundary, spanning)


def encode_spans(tokenizer: Tokenizer, text: str, spans: Iterable[tuple[int, int]],
                 add_special_tokens: bool = False) -> tuple[list[int], np.ndarray]:
    """Encode a text and find the tokens of some of its parts.

    Args:
        tokenizer: ``Tokenizer``.
        text: ``str``.
        spans: (begin, end) pairs in characters, in order and apart from each other.
        add_special_tokens: as in ``Tokenizer.encode``.

    Returns:
        ``(ids, mask)``: list of int and bool array ``(tokens,)``; ``mask[t]`` tells that token t
        holds text inside a span (also if it begins before the span or ends behind it).

    Raises:
        TokenizerError: not a string, or spans that overlap or leave the text.
    """
    ids, offsets = tokenizer.encode_offsets(text, add_special_tokens)
    mask, last = np.zeros(len(ids), bool), 0
    # neither is sure to rise without its running maximum: tokens of one character share its place
    begins, ends = (np.maximum.accumulate(column) for column in offsets.T)
    for begin, end in spans:
        if not last <= begin <= end <= len(text):
            raise TokenizerError(f"the span ({begin}, {end}) overlaps the one before it or leaves the text of "
                                 f"{len(text)} characters")
        last = end
        if begin < end:
            first = np.searchsorted(ends, _border(tokenizer, text, begin), side="right")
            mask[first:np.searchsorted(begins, end, side="left")] = True
    return ids, mask


def _border(tokenizer, text, position):
    """``position``, or where its character begins if the normaliser joins what the border cuts (e and an accent)."""
    if not 0 < position < len(text) or not _combines(text[position]):
        return position
    begin, end = position - 1, position + 1
    while begin > 0 and _combines(text[begin]):
        begin -= 1
    while end < len(text) and _combines(text[end]):
        end += 1
    whole, part = tokenizer.normalize(text[begin:end]), tokenizer.normalize(text[begin:position])
    return position if whole.startswith(part) else begin


def _combines(character):
    """Whether a normaliser may join a character with the one before it."""
    return unicodedata.category(character)[0] == "M" or "\u1160" <= character <= "\u11ff" or \
        character in "\uff9e\uff9f"


def _by_prefix(tokenizer, prompt, text, add_special_tokens):
    head = list(tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
    ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    if ids[:len(head)] != head:
        raise TokenizerError("the tokenizer changes the prompt's ids when text follows, and has no encode_offsets() "
                             "that says where its tokens lie; use colora_ms.models.tokenizer.Tokenizer")
    return JointIds(ids, len(head), False)
