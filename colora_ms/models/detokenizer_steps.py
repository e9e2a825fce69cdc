"""The steps of the decoder that a tokenizer file names, each for parts of text that arrive one at a time.

A step has ``take(part) -> parts``, ``end() -> parts``, ``copy()`` and ``reset()``; see ``detokenizer``.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING

from colora_ms.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


class _Step:
    """A step that changes each part for itself; ``started``: whether a part came before it."""

    def __init__(self):
        self.started = False

    def take(self, part):
        first, self.started = not self.started, True
        return [self.change(part, first)]

    def change(self, part, first):
        return part

    def end(self):
        return []

    def reset(self):
        self.__init__()

    def copy(self):
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin


class _Configured(_Step):
    """A step with settings that outlive a reset."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings
        self.__dict__.update(settings)

    def reset(self):
        self.__init__(**self.settings)


class _Joined(_Step):
    """No decoder at all: tokens are joined by blanks."""

    def change(self, part, first):
        return part if first else " " + part


class _Replace(_Configured):
    """``old`` becomes ``new`` in each part."""

    def change(self, part, first):
        return part.replace(self.old, self.new)


class _Pattern(_Configured):
    """A regular expression is replaced in each part, by the library's own engine."""

    def change(self, part, first):
        return self.decoder.decode([part])


class _Strip(_Configured):
    """Takes up to ``start`` of a character from a part's beginning and up to ``stop`` from its end."""

    def change(self, part, first):
        head = min(len(part) - len(part.lstrip(self.content)), self.start)
        part = part[head:]
        tail = min(len(part) - len(part.rstrip(self.content)), self.stop)
        return part[:len(part) - tail]


class _StripText(_Configured):
    """:class:`_Strip` of the whole text, behind ``Fuse``."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.left = self.start
        self.held = ""

    def take(self, part):
        while self.left and part:
            self.left -= 1
            if part[0] != self.content:
                self.left = 0
            else:
                part = part[1:]
        if not part or not self.stop:
            return [part] if part else []
        part = self.held + part
        tail = min(len(part) - len(part.rstrip(self.content)), self.stop)
        self.held = part[len(part) - tail:]
        return [part[:len(part) - tail]]

    def end(self):
        self.held = ""
        return []


class _Metaspace(_Configured):
    """Stand-ins of blanks become blanks, but for those of the first token where the encoder puts one in front."""

    def change(self, part, first):
        return part.replace(self.replacement, "" if first and self.prepends else " ")


#: What WordPiece's clean-up replaces within a token, in order.
_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


class _WordPiece(_Configured):
    """Words are joined by blanks, but for tokens that go on with one."""

    def change(self, part, first):
        if not first:
            part = part[len(self.prefix):] if part.startswith(self.prefix) else " " + part
        for old, new in _CLEANED if self.cleanup else ():
            part = part.replace(old, new)
        return part


class _Suffix(_Configured):
    """A suffix ends words: it becomes a blank, but in the last token nothing, so it waits for the next one."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.held = ""

    def take(self, part):
        text, at = self.held.replace(self.suffix, " "), part.find(self.suffix)
        self.held = part[at:] if at >= 0 else ""
        return [text + (part[:at] if at >= 0 else part)]

    def end(self):
        last, self.held = self.held, ""
        return [last.replace(self.suffix, "")]


class _ByteLevel(_Step):
    """GPT-2's byte alphabet; bytes that are no UTF-8 become U+FFFD as in any lossy decoding."""

    def __init__(self):
        super().__init__()
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, part):
        text = self.utf8.decode(byte_level_bytes(part))
        return [text] if text else []

    def end(self):
        text = self.utf8.decode(b"", final=True)
        return [text] if text else []

    def copy(self):
        twin = super().copy()
        twin.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        twin.utf8.setstate(self.utf8.getstate())
        return twin


class _ByteFallback(_Step):
    """SentencePiece's byte tokens: characters where they are some, else a U+FFFD a byte."""

    def __init__(self):
        super().__init__()
        self.bytes = b""

    def take(self, part):
        if _BYTE_TOKEN.fullmatch(part):
            return self._characters(bytes([int(part[3:5], 16)]))
        return self.end() + [part]

    def _characters(self, more):
        found, self.bytes = [], self.bytes + more
        while self.bytes:
            try:
                found.append(self.bytes.decode("utf-8"))
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":  # a beginning that may go on
                    return found
                found.append("\ufffd")
                self.bytes = self.bytes[1:]
            else:
                self.bytes = b""
        return found

    def end(self):
        rest, self.bytes = ["\ufffd"] * len(self.bytes), b""
        return rest


_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def steps_of(backend: Backend) -> list[_Step]:
    """Fresh steps of a backend's decoder.

    Args:
        backend: ``tokenizers.Tokenizer``.

    Raises:
        TokenizerError: one of its steps is not implemented.
    """
    if backend.decoder is None:
        return [_Joined()]
    decoder = json.loads(backend.decoder.__getstate__())
    found, fused = [], False
    for step in decoder.get("decoders", [decoder]):
        kind = step.get("type")
        if kind == "Fuse":
            fused = True
        elif kind == "ByteLevel":
            found.append(_ByteLevel())
            fused = True
        elif kind == "ByteFallback" and not fused:
            found.append(_ByteFallback())
        elif kind == "Replace" and (not fused or len(step["pattern"].get("String", "")) == 1):
            found.append(_replace(step))
        elif kind == "Strip":
            cut = _StripText if fused else _Strip
            found.append(cut(content=step["content"], start=step["start"], stop=step["stop"]))
        elif kind == "Metaspace" and not fused:
            found.append(_Metaspace(replacement=step["replacement"], prepends=step.get("prepend_scheme") != "never"))
        elif kind == "WordPiece" and not fused:
            found.append(_WordPiece(prefix=step["prefix"], cleanup=step["cleanup"]))
        elif kind == "BPEDecoder" and not fused:
            found.append(_Suffix(suffix=step["suffix"]))
        else:
            raise TokenizerError(f"decoding is not implemented for a tokenizer whose decoder has the step {kind!r:.40}"
                                 f"{' behind a joined text' if fused else ''}")
    return found


def _replace(step):
    from tokenizers import Regex, decoders

    pattern = step["pattern"]
    if "String" in pattern:
        return _Replace(old=pattern["String"], new=step["content"])
    return _Pattern(decoder=decoders.Replace(Regex(pattern["Regex"]), step["content"]))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins of the 256 bytes, as {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


_ALPHABET = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token outside the alphabet stands for itself."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
