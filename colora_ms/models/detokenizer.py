"""Ids into text: the one place, incremental and linear in the number of ids.

The text of ids depends on what stands before them: SentencePiece's blank in front of the first word of a text is no
text, the same blank behind a prompt is, and a character whose bytes are two tokens may begin in the prompt. So
everybody asks for the text of ids *behind* others::

    decode(tokenizer, ids, before=prompt)     the text that appears when ids follow the prompt
    stream = StreamDecoder(tokenizer, before=prompt)
    stream.push(id) ... stream.flush()        the same text in pieces, never half a character

Joined, the pieces are always the whole text. The decoder that a tokenizer file names (``ByteLevel``, SentencePiece's
chain, ``Metaspace``, ``WordPiece``, ``BPEDecoder`` or none) is carried out step by step as the ``tokenizers`` library
does, with one exception: bytes of SentencePiece's byte tokens that are no character become a U+FFFD each, and
characters among them stay, as the SentencePiece library decodes them (``tokenizers`` gives up the whole run of byte
tokens, so that a character that is cut by the end of an answer would take the good ones before it along).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Protocol, Union

import numpy as np

from colora_ms.errors import TokenizerError
from colora_ms.models.detokenizer_steps import steps_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class HasBackend(Protocol):
    """What decoding asks of a :class:`colora_ms.models.tokenizer.Tokenizer`."""

    backend: Backend


def decode(tokenizer: HasBackend, ids: Iterable[int], before: Iterable[int] = (),
           skip_special_tokens: bool = True) -> str:
    """The text that appears when ``ids`` stand behind ``before``.

    Args:
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        ids, before: integers, lists or one-dimensional arrays; ids without a token (rows that only pad a model's
            embedding) give no text.
        skip_special_tokens: leave out begin, end and other control tokens.

    Raises:
        TokenizerError: something that is not a token id, or a decoder that is not implemented.
    """
    stream = StreamDecoder(tokenizer, skip_special_tokens, before)
    return "".join([stream.push(one) for one in ids]) + stream.flush()


def stream_of(tokenizer: object, before: Iterable[int] = (),
              shown: Collection[str] = ()) -> Union[StreamDecoder, WholeDecoder]:
    """A decoder with ``push``, ``flush`` and ``peek`` for any tokenizer: its own ``stream``, or, of one that only has
    ``decode`` (a foreign one), a decoder that asks it for the whole text each time; ``shown``: special tokens whose
    text is given."""
    if not hasattr(tokenizer, "stream"):
        return WholeDecoder(tokenizer)
    return tokenizer.stream(before=before, shown=shown) if shown else tokenizer.stream(before=before)


class StreamDecoder:
    """Text of ids that arrive one at a time; never emits half a character.

    Args:
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        skip_special_tokens: leave out begin, end and other control tokens.
        before: ids that stand before; their text is not given, but a character that they begin is.
        shown: special tokens that are given all the same.

    Raises:
        TokenizerError: the tokenizer's decoder is not implemented.
    """

    def __init__(self, tokenizer: HasBackend, skip_special_tokens: bool = True, before: Iterable[int] = (),
                 shown: Collection[str] = ()) -> None:
        self._backend = tokenizer.backend
        self._skip = special_texts(tokenizer).difference(shown) if skip_special_tokens else frozenset()
        self._steps = steps_of(self._backend)
        for one in before:
            self.push(one)

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain (often ``""``)."""
        token = self._backend.id_to_token(checked_id(token_id))
        if token is None or token in self._skip:
            return ""
        return self._through(self._steps, [token], ends=False)

    def flush(self) -> str:
        """End of the text: an unfinished character becomes U+FFFD. The decoder starts anew, with nothing before."""
        text = self._through(self._steps, [], ends=True)
        for step in self._steps:
            step.reset()
        return text

    def peek(self, token_id: int) -> str:
        """The text that an id would bring here, without taking it; U+FFFD if that is not yet a character."""
        steps = [step.copy() for step in self._steps]
        token = self._backend.id_to_token(checked_id(token_id))
        if token is None or token in self._skip:
            return ""
        return self._through(steps, [token], ends=False) or self._through(steps, [], ends=True)[-1:]

    @staticmethod
    def _through(steps, parts, ends) -> str:
        for step in steps:
            out = []
            for part in parts:
                out += step.take(part)
            parts = out + step.end() if ends else out
        return "".join(parts)


def special_texts(tokenizer: HasBackend) -> frozenset[str]:
    """The texts of a tokenizer's special tokens."""
    return frozenset(token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special)


class WholeDecoder:
    """``StreamDecoder`` of a tokenizer without ``stream``: it has only ``decode(ids)``, which gives the whole text."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self._ids, self._given = [], ""

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is now certain."""
        self._ids.append(token_id)
        return self._new(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        """End of the text. The decoder starts anew."""
        rest = self._new(self._tokenizer.decode(self._ids))
        self._ids, self._given = [], ""
        return rest

    def peek(self, token_id: int) -> str:
        """The text of an id alone."""
        return self._tokenizer.decode([token_id])

    def _new(self, text):
        new = text[len(self._given):]
        self._given += new
        return new


def checked_id(value: object) -> int:
    """A token id as ``int``.

    Raises:
        TokenizerError: it is none.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or not 0 <= value < 1 << 32:
        raise TokenizerError(f"{value!r:.60} is not a token id; expected integers from 0")
    return int(value)
