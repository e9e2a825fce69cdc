"""Calls of tools in what a model writes: the common formats, read as the text comes.

A :class:`CallReader` takes the text of one answer in pieces and gives plain text and :class:`Call`: text at once, as
far as it cannot be the beginning of a call, and a call when it is whole. Whole and streamed answers go through the
same reader, so that they hold the same. What looks like a call and is none (broken JSON, an answer that was cut) is
text, as the model wrote it. Blanks between text and a call are dropped.

| format | what the model writes |
|---|---|
| hermes | ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, any number (Hermes, Qwen) |
| llama3 | ``{"name": …, "parameters": {…}}`` as the whole answer, or behind ``<|python_tag|>``; ``;`` between |
| mistral | ``[TOOL_CALLS][{"name": …, "arguments": {…}}, …]``, or ``[TOOL_CALLS]name[ARGS]{…}`` a call |
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import string
from typing import Any, Collection, Dict, List, Optional, Tuple, Union

_DECODER = json.JSONDecoder()
_ALPHANUMERIC = string.ascii_letters + string.digits
#: A call of the mistral format without a list: name, perhaps an id, and its arguments; and the beginning of one.
_NAMED = re.compile(r"([\w.-]{1,128})(?:\[CALL_ID\]([\w-]{1,64}))?(?:\[ARGS\])?\s*(?=\{)")
_NAME_BEGUN = re.compile(r"[\w.-]{1,128}(\[[\w\[\]-]{0,80})?\s*(\{.*)?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        id: made here, or the model's own where its format has ids; name: the tool's; arguments: a JSON text.
    """

    id: str
    name: str
    arguments: str


Part = Union[str, Call]


@dataclasses.dataclass(frozen=True)
class CallFormat:
    """How models write calls.

    Attributes:
        name: the format's.
        opening: what stands before calls; closing: what stands behind one, "" where nothing does.
        marks: texts of which a chat template of this format has one.
        bare: whether the whole answer may be a call without the opening.
        short_ids: ids of nine letters and digits, which these templates ask for.
    """

    name: str
    opening: str
    closing: str
    marks: Tuple[str, ...]
    bare: bool = False
    short_ids: bool = False

    @property
    def specials(self) -> Tuple[str, ...]:
        """Tokens whose text the reader must see, though they may be special ones."""
        return tuple(one for one in (self.opening, self.closing, *(("[ARGS]", "[CALL_ID]") if self.short_ids else ()))
                     if one)

    def new_id(self) -> str:
        """An id for a call."""
        if self.short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return "call_" + secrets.token_hex(12)


#: {name: format}; a template's is the first of which it has a mark.
FORMATS: Dict[str, CallFormat] = {one.name: one for one in (
    CallFormat("hermes", "<tool_call>", "</tool_call>", ("<tool_call>",)),
    CallFormat("mistral", "[TOOL_CALLS]", "", ("[TOOL_CALLS]",), short_ids=True),
    CallFormat("llama3", "<|python_tag|>", "", ("<|python_tag|>", '"parameters": '), bare=True),
)}


def format_of(template: str) -> Optional[CallFormat]:
    """The format that a chat template writes; None: none of those that are known."""
    return next((one for one in FORMATS.values() if any(mark in template for mark in one.marks)), None)


class CallReader:
    """Reads one answer.

    Args:
        form: the format.
        names: the tools' names; an answer that is one bare object is a call only if it names one of them.
        most: calls that are given at most; what stands behind the last of them is dropped.
    """

    def __init__(self, form: CallFormat, names: Collection[str], most: Optional[int] = None) -> None:
        self._form = form
        self._names = names
        self._left = most
        self._held = ""  # not yet read; of an open call from its opening on
        self._open = False
        self._first = form.bare  # nothing but blanks so far, so that the whole answer may be a call
        self._blank, self._behind = "", False  # blanks behind text, held back; whether a call was given last

    def push(self, text: str) -> List[Part]:
        """Take a piece of the answer; returns what is now certain."""
        self._held += text
        return self._given(self._read(False), False)

    def end(self) -> List[Part]:
        """The answer is over."""
        return self._given(self._read(True), True)

    def _read(self, ended: bool) -> List[Part]:
        parts: List[Part] = []
        while self._held:
            if self._first and not self._held.isspace():
                self._first, self._open = False, self._held.lstrip().startswith("{")
            if not self._open:
                parts.append(self._until_opening(ended))
                if not self._open:
                    break
            found = self._calls(ended)
            if found is None:
                break
            calls, end = found
            # What begins as a call and is none is text; what stands behind its first characters is read again.
            parts += calls or [self._held[:end]]
            self._held, self._open = self._held[end:], False
        return parts

    def _until_opening(self, ended: bool) -> str:
        """Take the text before the next opening, or before what may become one."""
        held, opening = self._held, self._form.opening
        at = held.find(opening)
        if at < 0 and not ended:
            at = next((len(held) - n for n in range(min(len(opening) - 1, len(held)), 0, -1)
                       if opening.startswith(held[-n:])), len(held))
        elif at < 0:
            at = len(held)
        else:
            self._open = True
        self._held = held[at:]
        return held[:at]

    def _calls(self, ended: bool) -> Optional[Tuple[List[Call], int]]:
        """(calls, how far they reach in the held text); no calls: how much of it is text; None: it needs more."""
        held, form = self._held, self._form
        bare = not held.startswith(form.opening)
        none: Tuple[List[Call], int] = ([], 1 if bare else len(form.opening))
        at = _past_blanks(held, 0 if bare else len(form.opening))
        calls: List[Call] = []
        while at < len(held):
            values, end = self._values(at)
            if end is None:
                return none if ended or not self._may_go_on(at) else None
            made = [self._call(value) for value in values]
            known = [one for one in made if one is not None and (not bare or one.name in self._names)]
            if len(known) < len(made) or not made:
                return none
            calls += known
            at = _past_blanks(held, end)
            if form.bare and held.startswith(";", at):
                at = _past_blanks(held, at + 1)
            elif not form.bare:
                break
            elif at < len(held):
                return none if bare else (calls, end)
        behind = held[at:]
        closes = behind != form.closing and form.closing.startswith(behind)  # may become the closing
        if not ended and (not calls or closes or form.bare):  # bare: another call may follow
            return None
        if behind.startswith(form.closing):
            at += len(form.closing)
        return (calls, at) if calls else none

    def _values(self, at: int) -> Tuple[List[Any], Optional[int]]:
        """(objects of calls, their end) of what stands at a place; the end is None where it is not (yet) valid."""
        held = self._held
        named = _NAMED.match(held, at) if self._form.short_ids else None
        try:
            if named is not None:
                value, end = _DECODER.raw_decode(held, named.end())
                return [{"name": named[1], "id": named[2], "arguments": value}], end
            value, end = _DECODER.raw_decode(held, at)
        except (ValueError, RecursionError):
            return [], None
        return (value if isinstance(value, list) and self._form.short_ids else [value]), end

    def _may_go_on(self, at: int) -> bool:
        """Whether what stands at a place may become a call."""
        return self._held[at] in ("[{" if self._form.short_ids else "{") or \
            self._form.short_ids and _NAME_BEGUN.fullmatch(self._held, at) is not None

    def _call(self, value: Any) -> Optional[Call]:
        """The call that an object says; None: it says none."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        own = value.get("id")
        name = own if isinstance(own, str) and own and self._form.short_ids else self._form.new_id()
        return Call(name, value["name"], json.dumps(arguments, ensure_ascii=False))

    def _given(self, parts: List[Part], ended: bool) -> List[Part]:
        """The parts without blanks beside calls, and without what stands behind the last call that is wanted."""
        given: List[Part] = []
        for part in parts:
            if self._left == 0:
                return given
            if isinstance(part, Call):
                self._left = None if self._left is None else self._left - 1
                self._blank, self._behind = "", True
                given.append(part)
                continue
            text = self._blank + part
            text = text.lstrip() if self._behind else text
            kept = text.rstrip()
            self._blank = text[len(kept):]
            if kept:
                self._behind = False
                given.append(kept)
        if ended and self._blank and self._left != 0:
            given.append(self._blank)
        return given


def _past_blanks(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at
