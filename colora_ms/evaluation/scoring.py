"""Is an answer right? Numbers as in GSM8K, and exact match after normalisation.

A scorer is a function ``(text, example) -> Score``; ``example.completion`` holds the gold answer.
"""

import dataclasses
import re
import unicodedata
from fractions import Fraction

from colora_ms.errors import ConfigError, near

_DASHES = "\u2212\u2010\u2011\u2012\u2013\u2014"  # minus sign and hyphens that models write for "-"
# Digits with optional thousands commas and decimals.
_BODY = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A fraction of two numbers (not a part of a date like 12/31/2024), or one number.
_NUMBER = re.compile(
    r"(?P<sign>[-+]\s?)?(?:[$\u20ac\u00a3]\s?(?P<inner>[-+])?)?"
    rf"(?:(?<!/)(?P<above>{_BODY})\s?/\s?(?P<over>\d+)(?![\d/]|\.\d)|(?P<body>{_BODY}))")
_MARK = re.compile(r"####")


@dataclasses.dataclass(frozen=True)
class Score:
    """Outcome of one item: ``correct``, and what was read from the answer and from the gold."""

    correct: bool
    predicted: str
    expected: str


def extract_number(text):
    """The final number of a worked solution, as GSM8K's evaluation takes it.

    The first number after the first ``####`` counts; without that mark, the last number of the
    text. Thousands commas, currency signs, units, a percent sign and a final period are ignored;
    ``3/4`` is a fraction; a minus sign counts only in front of a number of its own.

    Returns:
        ``fractions.Fraction``, or ``None`` if there is no number.
    """
    for dash in _DASHES:
        text = text.replace(dash, "-")
    mark = _MARK.search(text)
    if mark:
        # Everything after the mark up to the end of its line is the stated answer.
        stated = text[mark.end():].lstrip().split("\n", 1)[0]
        found = _NUMBER.search(stated)
        return _value(found) if found else None
    last = None
    for last in _NUMBER.finditer(text):
        pass
    return _value(last) if last else None


def _value(found):
    """The number of a match of ``_NUMBER``, exactly."""
    value = _decimal((found.group("above") or found.group("body")).replace(",", ""))
    if found.group("over") is not None:
        below = _decimal(found.group("over"))
        if below:
            value /= below
    return -value if _is_negative(found) else value


def _is_negative(found):
    """Whether the match begins with a minus of its own: not "16-3", "16 - 3", "x-3"."""
    if found.group("inner") == "-":
        return True
    sign = found.group("sign") or ""
    if not sign.startswith("-"):
        return False
    before = found.string[:found.start()][-50:]
    if before[-1:].isalnum():
        return False
    last = before.rstrip()[-1:]
    # With a blank behind it ("- 3"), a dash after a word is punctuation.
    return not (last.isdigit() or last in tuple(")]%") or sign != "-" and last.isalnum())


def _decimal(digits):
    # int() refuses more than 4300 digits; a model that repeats "1" for ever must not crash this.
    whole, _, decimals = digits.partition(".")
    decimals = decimals[:2000]
    return Fraction(int((whole[:2000] or "0") + decimals), 10 ** len(decimals))


def format_number(value):
    """A Fraction (or None) as short text: "12", "-0.5", "1/3", or "" for None."""
    if value is None:
        return ""
    if value.denominator == 1:
        return str(value.numerator)
    # Finite decimals have only the factors 2 and 5 in the denominator.
    rest, places = value.denominator, 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest //= prime
            count += 1
        places = max(places, count)
    if rest != 1 or places > 12:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10 ** places // value.denominator).rjust(places + 1, "0")
    return ("-" if value < 0 else "") + digits[:-places] + "." + digits[-places:]


def normalise(text):
    """Text for comparison: Unicode NFKC, lower case, single blanks, no quotes around it and no
    period or comma at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    previous = None
    while previous != text:
        previous = text
        text = text.strip().rstrip(".,;!").strip()
        if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'`":
            text = text[1:-1]
    return text


def score_number(text, example):
    """Right if the final numbers are equal as numbers (``extract_number``)."""
    predicted, expected = extract_number(text), extract_number(example.completion)
    return Score(predicted is not None and predicted == expected,
                 format_number(predicted), format_number(expected))


def score_exact(text, example):
    """Right if the whole answer equals the gold answer apart from blanks at the ends."""
    predicted, expected = text.strip(), example.completion.strip()
    return Score(predicted == expected, predicted, expected)


def score_normalised(text, example):
    """Right if answer and gold are equal after ``normalise``."""
    predicted, expected = normalise(text), normalise(example.completion)
    return Score(bool(predicted) and predicted == expected, predicted, expected)


SCORERS = {"number": score_number, "exact": score_exact, "normalised": score_normalised}


def scorer(name):
    """The scorer called "number", "exact" or "normalised"; a function is handed back.

    Raises:
        ConfigError: unknown name.
    """
    if callable(name):
        return name
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}; known: {', '.join(SCORERS)}."
                          f"{near(name, SCORERS)}")
    return SCORERS[name]
