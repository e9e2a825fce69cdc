"""Answers that keep to a form: JSON, a JSON schema, a regular expression, one of some texts, or a Lark grammar.

A :class:`Grammar` says which form; a :class:`Matcher` follows one answer and says before each step which tokens may come
(a mask, see :mod:`colora_ms.kernels.options`). The work is done by ``llguidance`` (the extra "constraints").
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

#: Kinds of a grammar; ``json`` takes no text.
KINDS = ("json", "json_schema", "regex", "choice", "lark")

#: Characters of a grammar's text at most.
LONGEST = 1 << 18

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
    raise DecodingError(f"{name}.{kind}={shown(what)} cannot be used: expected true, a schema, a text or a list of texts")


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
        self._matcher = self._library.LLMatcher(self._tokenizer(tokenizer, vocabulary, sorted(ends)), compiled, log_level=0)
        self._words = (vocabulary + 31) // 32
        self._check(f"the {grammar.kind} grammar cannot be used")

    def _compile(self, grammar: Grammar) -> str:
        if grammar.kind == "json":
            return self._library.grammar_from("json_schema", '{"type": "object"}')
        try:
            return self._library.grammar_from(grammar.kind, grammar.text)
        except (ValueError, TypeError) as error:
            raise DecodingError(f"the {grammar.kind} grammar cannot be read: {str(error)[:300]}") from None

    def _tokenizer(self, tokenizer: Any, vocabulary: int, ends: List[int]) -> Any:
        backend = getattr(tokenizer, "backend", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise DecodingError(f"a grammar needs a tokenizer of tokenizer.json, this one is a {type(tokenizer).__name__}")
        made = _tokenizers.setdefault(tokenizer, {})
        key = vocabulary, tuple(ends)
        if key not in made:
            made[key] = self._library.LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=ends)
        return made[key]

    def _check(self, what: str) -> None:
        if self._matcher.is_error():
            raise DecodingError(f"{what}: {self._matcher.get_error().splitlines()[0][:300]}")

    def mask(self) -> np.ndarray:
        """(words,) int32: the tokens that may come next.

        Raises:
            DecodingError: the grammar became too complex.
        """
        words = np.zeros((1, self._words), np.int32)
        self._library.numpy.fill_next_token_bitmask(self._matcher, words)
        self._check("the grammar cannot go on")
        return words[0]

    def take(self, tokens: Sequence[int]) -> None:
        """Follow tokens of the answer.

        Raises:
            DecodingError: one of them is none that might have come.
        """
        for token in tokens:
            if not self._matcher.consume_token(int(token)):
                self._check(f"the answer left its grammar at token {token}")
