"""Numbers as people and models type them (LaTeX, other scripts' digits, typographic blanks) into one plain form.

``number_scan`` reads that form, so that a number is recognised in one place whatever it was written in.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from colora_ms.evaluation.number_scan import OPAQUE, VALUES, single

#: How deep braces of LaTeX are undone; what is deeper stays as it is.
DEPTH = 8

_OURS = re.compile(f"[{VALUES[0]}-{VALUES[1]}]")
_FOREIGN = re.compile("[^\x00-\x7f]")
_RAISED = dict(zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_CHARACTERS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63", "-"),
    # Blanks that do not break a line stand inside a number, unlike those between words.
    **dict.fromkeys("\u00a0\u2007\u2008\u2009\u200a\u202f", "\u2009"),
    **dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff\u00ad", ""),
    **dict.fromkeys("\u2018\u2019\u02bc", "'"),
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u22c5\u2219\u2217", "\u00d7"),
    "\u066b": ".", "\u066c": ",", "\u3000": " ", "\u2236": ":",
}

_NEW_LINE = re.compile(r"\\\\(?![A-Za-z])")
_COMMANDS = (
    (re.compile(r"\\(?:[,;:> ]|(?:thinspace|enspace|nobreakspace)(?![A-Za-z]))|~"), "\u2009"),
    (re.compile(r"\\!"), ""),
    # Braces say that the comma belongs to the number: it makes groups, or else it is the decimal mark.
    (re.compile(r"\{,\}(?=[0-9]{3}(?![0-9]))"), ","), (re.compile(r"\{[,.]\}(?=[0-9])"), "."),
    (re.compile(r"\{(\u2009?)\}(?=[0-9])"), r"\1"),
    (re.compile(r"\\\{"), "("), (re.compile(r"\\\}"), ")"),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"\\([$%#&_*-])"), r"\1"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])"), ""),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "\u00d7"),
    (re.compile(r"\\div(?![A-Za-z])"), "\u00f7"),
    (re.compile(r"\\(?:approx|equiv|simeq|sim)(?![A-Za-z])"), "\u2248"),
    (re.compile(r"\\(?:circ|degree)(?![A-Za-z])"), "\u00b0"),
    (re.compile(r"\\(?:pounds|textsterling)(?![A-Za-z])"), "\u00a3"),
    (re.compile(r"\\(?:text)?euro(?![A-Za-z])"), "\u20ac"),
    (re.compile(r"\\textdollar(?![A-Za-z])"), "$"),
    (re.compile(r"\\pi(?![A-Za-z])"), "\u03c0"),
    (re.compile(r"\\(?:[dtc]frac|sfrac|nicefrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}"), ""),
)
_UNKNOWN = re.compile(r"\\(?!f?box(?:ed)?(?![A-Za-z]))[A-Za-z]+(?:_[0-9A-Za-z])?")

_WRAPPED = re.compile(
    r"\\(?:text[a-z]*|math[a-z]+|[mh]box|operatorname|emph|num|underline|boldsymbol|bm)\*?\s*\{([^{}]*)\}")
_ROOT = re.compile(r"\\(?:sqrt\s*(?:\[[^\[\]{}]*\])?|over(?:line|brace))\s*(?:\{[^{}]*\}|[0-9])")
_ABOVE = re.compile(r"\^\s*\{([^{}]*)\}|\^\s*(?:\u00b0|(?:st|nd|rd|th)(?![A-Za-z]))")
_UNDER = re.compile(r"_\s*\{[^{}]*\}")
_PART = r"\s*(?:\{([^{}]*)\}|([^{}\s\\]))"
_FRACTION = re.compile(rf"\\frac{_PART}{_PART}")
_ORDINAL = re.compile(r"(?:st|nd|rd|th|o|'*|\u00b0)\Z")
_WHOLE = re.compile(r"[-+]?[0-9]+\Z")
_MARKUP = frozenset("\\{~^")
_TIMES = re.compile(r"(?<=[0-9]) ?[xX] ?(?=[0-9])")


def plain(text: str) -> tuple[str, dict[str, Fraction]]:
    """A text with its numbers in one form.

    Args:
        text: any text.

    Returns:
        (text, values): ASCII digits, "-" for dashes, U+2009 for thin and unbreakable blanks, LaTeX's commands undone
        (``\\boxed`` stays); ``values`` maps a character to the ``Fraction`` that ``\\frac`` or one character like "½"
        wrote. What is no rational number, such as a root, is ``number_scan.OPAQUE``. Linear in the length of the text.
    """
    table = _Values()
    if not text.isascii():
        text = _OURS.sub("\ufffd", text)
        text = _RAISED_RUN.sub(lambda found: "^" + "".join(_RAISED[c] for c in found[0]), text)
        text = _FOREIGN.sub(lambda found: table.character(found[0]), text)
    if not _MARKUP.isdisjoint(text):
        text = _latex(text, table)
    return _TIMES.sub("\u00d7", text), table.values


class _Values:
    """Characters for values: the same one for the same value."""

    def __init__(self) -> None:
        self.values = {}
        self._characters = {}
        self._seen = {}

    def character_of(self, value: Fraction | None) -> str:
        """The character that stands for a Fraction; ``OPAQUE`` for None, or if there are no more."""
        if value is None:
            return OPAQUE
        if value not in self._characters:
            code = ord(VALUES[0]) + len(self.values)
            if code > ord(VALUES[1]):
                return OPAQUE
            self._characters[value] = chr(code)
            self.values[chr(code)] = value
        return self._characters[value]

    def character(self, c: str) -> str:
        """The plain form of a character outside ASCII."""
        if c not in self._seen:
            self._seen[c] = self._plain(c)
        return self._seen[c]

    def _plain(self, c: str) -> str:
        if c in _CHARACTERS:
            return _CHARACTERS[c]
        digit = unicodedata.decimal(c, None)
        if digit is not None:
            return str(digit)
        if "\uff01" <= c <= "\uff5e":  # full-width ASCII
            return chr(ord(c) - 0xfee0)
        if unicodedata.decomposition(c).startswith("<fraction>"):
            above, _, below = unicodedata.normalize("NFKC", c).partition("\u2044")
            return self.character_of(Fraction(int(above), int(below))) if below else OPAQUE
        return c


def _latex(text: str, table: _Values) -> str:
    text = _NEW_LINE.sub("\n", text)
    for pattern, plainly in _COMMANDS:
        text = pattern.sub(plainly, text)
    for _ in range(DEPTH):
        before = text
        text = _WRAPPED.sub(r"\1", text)
        text = _ROOT.sub(OPAQUE, text)
        text = _ABOVE.sub(_above, text)
        text = _UNDER.sub("_ ", text)
        text = _FRACTION.sub(lambda found: table.character_of(_fraction(found, table.values)), text)
        if text == before:
            break
    return _UNKNOWN.sub(" ", text)


def _above(found: re.Match) -> str:
    """An exponent without braces; ordinals and degrees go, others than whole numbers make the base no number."""
    content = (found[1] or "").strip(" \u2009")
    if _ORDINAL.match(content):
        return ""
    return "^" + (content if _WHOLE.match(content) else OPAQUE)


def _fraction(found: re.Match, values: dict[str, Fraction]) -> Fraction | None:
    """The value of ``\\frac``, None if a part is no number or the lower one is zero."""
    above, below = (found[1] or found[2] or ""), (found[3] or found[4] or "")
    above, below = single(above, values), single(below, values)
    return above / below if above is not None and below else None
