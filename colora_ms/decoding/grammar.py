"""Answers that keep to a form: JSON, a JSON schema, a regular expression, one of some texts, or a Lark grammar.

A :class:`Grammar` says which form; a :class:`Matcher` follows one answer and says before each step which tokens may
come (a mask, see :mod:`colora_ms.kernels.options`). The work is done by ``llguidance`` (the extra "constraints").
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from typing import Any, Dict, Iterable, List, Sequence

import numpy as np

from colora_ms import extras
from colora_ms.decoding.fields import Record, option
from colora_ms.decoding.values import sequence, shown
from colora_ms.errors import DecodingError, near
from colora_ms.models.detokenizer_steps import byte_level_bytes

#: Kinds of a grammar; ``json`` takes no text.
KINDS = ("json", "json_schema", "regex", "choice", "lark")

#: Characters of a grammar's text at most.
LONGEST = 1 << 18

#: Of JSON: blanks that may stand between its parts. Without a bound a model may write blanks for ever.
_JSON = {"whitespace_pattern": r"( |\n[ \t]{0,40})?"}

_tokenizers: weakref.WeakKeyDictionary[Any, Dict[Any, Any]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Grammar(Record):
    """What an answer keeps to.

    Attributes:
        kind: one of :data:`KINDS`.
        text: of the schema (JSON), the regular expression, the choices (a JSON list of strings) or the Lark grammar; of
            ``json`` empty.
    """

    kind: str = option(str, "json", "json, json_schema, regex, choice or lark", choices=lambda: KINDS)
    text: str = option(str, "", "the schema, the regular expression, the choices, or the grammar")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.text) > LONGEST:
            raise DecodingError(f"the grammar has {len(self.text)} characters, at most {LONGEST} are taken")
        if (self.kind == "json") != (not self.text):
            raise DecodingError("a grammar of the kind json takes no text" if self.text else
                                f"a grammar of the kind {self.kind} is empty")


def grammar_of(value: Any, name: str = "grammar") -> Grammar:
    """The grammar of a mapping with one of :data:`KINDS`: ``{"json": True}``, ``{"json_schema": {...}}`` (or its text),
    ``{"regex": "..."}``, ``{"choice": ["yes", "no"]}``, ``{"lark": "..."}``.

    Raises:
        DecodingError: it is something else.
    """
    if isinstance(value, Grammar):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise DecodingError(f"{name}={shown(value)}: expected a mapping with one of {', '.join(KINDS)}")
    kind, what = next(iter(value.items()))
    if kind == "json" and what is True:
        return Grammar("json")
    if kind == "json_schema" and isinstance(what, (dict, str)):
        return Grammar(kind, what if isinstance(what, str) else json.dumps(what))
    if kind == "choice":
        texts = sequence(what)
        if texts and all(isinstance(one, str) and one for one in texts):
            return Grammar(kind, json.dumps(texts))
    if kind in ("regex", "lark") and isinstance(what, str):
        return Grammar(kind, what)
    if kind not in KINDS:
        raise DecodingError(f"{name} has {shown(kind)}, which is none of {', '.join(KINDS)}."
                            f"{near(kind, KINDS) if isinstance(kind, str) else ''}")
    raise DecodingError(f"{name}.{kind}={shown(what)} cannot be used: expected true, a schema, a text or a list of "
                        "texts")


class Matcher:
    """A grammar along one answer.

    Args:
        grammar: :class:`Grammar`.
        tokenizer: :class:`colora_ms.models.tokenizer.Tokenizer`.
        vocabulary: tokens of the model.
        ends: ids that end the answer; they may come where the grammar is complete.

    Raises:
        DecodingError: llguidance is not installed, the grammar cannot be read, or the tokenizer is of another kind.
    """

    def __init__(self, grammar: Grammar, tokenizer: Any, vocabulary: int, ends: Iterable[int]) -> None:
        self._library = extras.load("llguidance", "constraints", "a grammar for the answer", DecodingError)
        if not ends:
            raise DecodingError("a grammar needs an id that ends the answer; this model has none")
        compiled = self._compile(grammar)
        known = self._tokenizer(tokenizer, vocabulary, sorted(ends))
        self._matcher = self._library.LLMatcher(known, compiled, log_level=0)
        self._words = (vocabulary + 31) // 32
        self._check(f"the {grammar.kind} grammar cannot be used")

    def _compile(self, grammar: Grammar) -> str:
        try:
            if grammar.kind in ("json", "json_schema"):
                return self._library.LLMatcher.grammar_from_json_schema(grammar.text or '{"type": "object"}',
                                                                        defaults=_JSON)
            return self._library.grammar_from(grammar.kind, grammar.text)
        except (ValueError, TypeError) as error:
            raise DecodingError(f"the {grammar.kind} grammar cannot be read: {str(error)[:300]}") from None

    def _tokenizer(self, tokenizer: Any, vocabulary: int, ends: List[int]) -> Any:
        backend = getattr(tokenizer, "backend", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise DecodingError("a grammar needs a tokenizer of tokenizer.json, this one is a "
                                f"{type(tokenizer).__name__}")
        made = _tokenizers.setdefault(tokenizer, {})
        key = vocabulary, tuple(ends)
        if key not in made:
            known = self._library.TokenizerWrapper(_Tokens(backend, vocabulary, ends[0]))
            made[key] = self._library.LLTokenizer(known, n_vocab=vocabulary, eos_token=ends)
        return made[key]

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise DecodingError(f"{what}: {self._matcher.get_error().splitlines()[0][:300]}")

    def mask(self) -> np.ndarray:
        """(words,) int32: the tokens that may come next.

        Raises:
            DecodingError: the grammar became too complex.
        """
        words = np.zeros(self._words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check("the grammar cannot go on")
        return words

    def take(self, tokens: Sequence[int]) -> None:
        """Follow tokens of the answer.

        Raises:
            DecodingError: one of them is none that might have come.
        """
        for token in tokens:
            if not self._matcher.consume_token(int(token)):
                self._check(f"the answer left its grammar at token {token}")


class _Tokens:
    """The bytes of a tokenizer's tokens, as ``llguidance.TokenizerWrapper`` takes them.

    (What llguidance makes of a tokenizer.json itself leaves SentencePiece's blanks as they are written there.)
    """

    bos_token_id = None

    def __init__(self, backend: Any, vocabulary: int, eos: int) -> None:
        self.eos_token_id = eos
        decoder = str((json.loads(backend.to_str()).get("decoder") or {}))
        level = "'ByteLevel'" in decoder
        if not level and not any(kind in decoder for kind in ("'Metaspace'", "'ByteFallback'", "'Replace'")):
            raise DecodingError("a grammar needs a tokenizer of bytes or of SentencePiece's kind; this one has the "
                                f"decoder {decoder[:80] or 'none'}")
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = [one for one, token in added.items() if token.special and one < vocabulary]
        self.tokens = [b""] * vocabulary
        for text, number in backend.get_vocab(with_added_tokens=True).items():
            if number < vocabulary:
                self.tokens[number] = text.encode() if number in added else _bytes_of(text, level)
        self._ids = {token: number for number, token in enumerate(self.tokens)
                     if token and number not in self.special_token_ids}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> List[int]:
        """Ids of bytes, the longest token at each place; bytes that no token begins with are left out."""
        found, at = [], 0
        while at < len(text):
            most = min(self._longest, len(text) - at)
            size = next((n for n in range(most, 0, -1) if text[at:at + n] in self._ids), 0)
            if size:
                found.append(self._ids[text[at:at + size]])
            at += max(size, 1)
        return found


def _bytes_of(token: str, level: bool) -> bytes:
    if level:
        return byte_level_bytes(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()
