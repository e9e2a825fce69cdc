"""The numbers of a plain text, in order, in linear time; what counts as one stands in the table of ``numbers``.

``number_markup.plain`` prepares the text: ASCII digits, "-" for every dash, U+2009 for every blank that joins, one
character of ``VALUES`` for each fraction that LaTeX or one Unicode character wrote.
"""

from __future__ import annotations

import re
from fractions import Fraction

#: First and last of the characters that stand for a value that was read already.
VALUES = ("\U000f0000", "\U000ffffd")
#: Stands for what is there but is no rational number: a root, a fraction of names.
OPAQUE = "\u221a"

#: Digits that count of a part of a number; a model may repeat one for ever.
MOST_DIGITS = 1000
#: Largest exponent, of ten or of a power.
MOST_EXPONENT = 1000
#: Bits of a numerator or denominator: below the 4300 digits that Python writes out.
MOST_BITS = 14000

_START = re.compile(f"[0-9{VALUES[0]}-{VALUES[1]}]")
_LETTERS = "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u04ff"  # no "×" and no "÷"
_LETTER = re.compile(f"[{_LETTERS}]")
# A date, a time or ratio, a version: digits that are no number.
_NO_NUMBER = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9])|[0-9]+(?::[0-9]+)+(?:\.[0-9]+)?")
_VERSION = re.compile(r"[0-9]+(?:\.[0-9]+){2,}")
_GROUPS = {mark: re.compile(rf"[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+(?![0-9])") for mark in ",'_ \u2009"}
# 1,50,000: two digits a group up to the last. A group that begins with 0 is no entry of a list.
_INDIAN = re.compile(r"[1-9][0-9]?(?:,[0-9]{2}){1,8},[0-9]{3}(?![0-9]|,[0-9])")
_DOTS = re.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,}(?:,[0-9]+(?!,?[0-9]))?(?!\.?[0-9])"
                   r"|[1-9][0-9]{0,2}\.[0-9]{3},(?:[0-9]{1,2}|[0-9]{4,})(?!,?[0-9])")
_DIGITS = re.compile("[0-9]+")
_DECIMALS = re.compile(r"\.([0-9]+)")
_COMMA_DECIMALS = re.compile(r",([0-9]+)(?!,?[0-9])")
_MORE_DECIMALS = re.compile("(?:\u2009[0-9]{3})*\u2009[0-9]{1,3}(?![0-9])")
_NAME = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_EXPONENT = re.compile(r"[eE]([-+]?[0-9]+)")
_TIMES_TEN = re.compile("[ \u2009]{0,2}[\u00d7*\u00b7xX][ \u2009]{0,2}10 ?(?:\\^|\\*\\*) ?\\(?([-+]?[0-9]+)\\)?")
_POWER = re.compile(r" ?\^ ?(?:\(([-+]?[0-9]+)\)|([-+]?[0-9]+))|\*\*([-+]?[0-9]+)")
_NO_POWER = re.compile(r" ?\^ ?(?:\([^()\n]{0,80}\)?)?")
_SLASH = re.compile("[ \u2009]?/[ \u2009]?(?=[0-9" + VALUES[0] + "-" + VALUES[1] + "])")
_MIXED = re.compile("[ \u2009]([0-9]{1,9})/([0-9]{1,9})(?![0-9]|[/.][0-9])")
_MIXED_VALUE = re.compile(f"[ \u2009]?([{VALUES[0]}-{VALUES[1]}])")
_ROOT = re.compile(f"[.]?[{OPAQUE}\u03c0]|[ \u2009][{OPAQUE}\u03c0]")
_CLOSED_POWER = re.compile(r"\) ?(?:\^|\*\*[0-9])")  # (-2)^2
_CURRENCY = "[$\u20ac\u00a3\u00a5\u20b9\u20a9\u20bd\u20ba\u20ab\u20b4\u20a6\u20b1\u20aa\u20a1\u00a2\u0e3f]"
_CODES = f"(?<![{_LETTERS}])(?:USD|EUR|GBP|INR|JPY|CNY|RMB|CHF|AUD|CAD|SGD|HKD|KRW|Rs|RM)"
# Characters at which one of the patterns can begin, so that most are tried where they may fit only.
_BEGINS_NO_NUMBER, _MAGNIFIES, _FOLLOWS = ":-", "eE \u2009\u00d7*\u00b7xX^", " \u2009/).\u03c0" + OPAQUE
_NO_NAME = " ,;:=/\n$\u2009\u00d7"
_NO_PREFIX = ",;:([{=<>/\n\u00d7"
# Sign, currency, sign again; of the text right in front of the digits.
_PREFIX = re.compile(f"(?P<sign>[-+][ \u2009]?)?(?:(?:(?:[A-Z]{{1,3}})?{_CURRENCY}|{_CODES}\\.?)[ \u2009]?"
                     "(?P<inner>[-+])?)?\\Z")


class Number:
    """One number of a text.

    Attributes:
        begin, end: where it stands, sign and currency included.
    """

    __slots__ = ("begin", "end", "_negative", "_above", "_below", "_more")

    def __init__(self, begin: int, end: int, negative: bool, above: tuple, below: tuple | None = None,
                 more: Fraction | None = None) -> None:
        self.begin, self.end = begin, end
        self._negative, self._above, self._below, self._more = negative, above, below, more

    def value(self) -> Fraction | None:
        """The ``Fraction``; None if its size is beyond ``MOST_EXPONENT`` or ``MOST_BITS``."""
        value = _value(self._above)
        if self._below is not None:
            below = _value(self._below)
            if value is None or below is None:
                return None
            value = value / below if below else value
        if value is None:
            return None
        value += self._more or 0
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
            return None
        return -value if self._negative else value


def scan(text: str, values: dict[str, Fraction]) -> list[Number]:
    """The numbers of a text.

    Args:
        text: what ``number_markup.plain`` gave, or a part of it.
        values: ``{character: Fraction}``, from there too.

    Returns:
        list of :class:`Number`, in order, not overlapping.
    """
    found, place, reader = [], 0, _Reader(text, values)
    while True:
        start = _START.search(text, place)
        if start is None:
            return found
        number, place = reader.number(start.start(), place)
        if number is not None:
            found.append(number)


def single(text: str, values: dict[str, Fraction]) -> Fraction | None:
    """The value of a text that is one number (maybe in parentheses, with signs of currency or percent), or None."""
    numbers = scan(text, values)
    if len(numbers) != 1:
        return None
    around = text[:numbers[0].begin] + text[numbers[0].end:]
    return None if around.strip(" \u2009$%()\n") else numbers[0].value()


class _Reader:
    """Reads the number that begins at a place of the text."""

    def __init__(self, text: str, values: dict[str, Fraction]) -> None:
        self.text, self.values = text, values
        self.follows = {*_FOLLOWS, *values}
        self.flat = 0  # up to here groups of three between blanks are known to be a list

    def number(self, at: int, least: int) -> tuple[Number | None, int]:
        """(:class:`Number` or None, where to go on) of the digits at ``at``; what is before ``least`` is not theirs."""
        text = self.text
        run = _DIGITS.match(text, at)
        if run and text[run.end():run.end() + 1] in _BEGINS_NO_NUMBER:
            junk = _NO_NUMBER.match(text, at)
            if junk:
                return None, junk.end()
        begin, negative, prefixed = self._prefix(at, least)
        if not prefixed and at > 0 and self._in_a_name(at):
            return None, (_NAME.match(text, at) or _START.match(text, at)).end()
        above, end = self._factor(at, least)
        if above is None:
            return None, end
        if text[end:end + 1] not in self.follows:
            return Number(begin, end, negative, above), end
        below = more = None
        slash = _SLASH.match(text, end)
        if slash and text[at - 1:at] != "/":
            below, after = self._factor(slash.end(), slash.end())
            # 12/31/2024 is a date.
            if below is None or text[after:after + 1] == "/" and text[after + 1:after + 2].isdigit():
                below = None
            else:
                end = after
        if below is None and _is_whole(above):
            more, end = self._mixed(end)
        if _ROOT.match(text, end) or _CLOSED_POWER.match(text, end):
            return None, end
        return Number(begin, end, negative, above, below, more), end

    def _in_a_name(self, at: int) -> bool:
        """Whether the digits belong to a name, a subscript, an exponent or a root: "H2O", "x_1", "m^2"."""
        text, before = self.text, self.text[at - 1]
        if before in _NO_NAME:
            return False
        if before in "_^" + OPAQUE:
            # "_5_" is emphasis, not a subscript.
            return before != "_" or at > 1 and (text[at - 2].isalnum() or text[at - 2] in ")}")
        if before in "-+(" and text[max(at - 3, 0):at].rstrip("-+(")[-1:] in ("^", OPAQUE):
            return True
        return _LETTER.match(before) is not None

    def _factor(self, at: int, least: int) -> tuple[tuple | None, int]:
        """((whole, decimals, exponent, power), end), a Fraction and None as the first two; (None, end) without one."""
        text = self.text
        if text[at] in self.values:
            parts: tuple = (self.values[text[at]], None)
            end = at + 1
        elif not "0" <= text[at] <= "9":
            return None, at + 1  # a character of ours that came with the text
        else:
            whole, decimals, end = self._digits(at, least)
            if whole is None:
                return None, end
            parts = (whole, decimals)
        exponent = power = None
        if text[end:end + 1] not in _MAGNIFIES:
            return (*parts, None, None), end
        found = _EXPONENT.match(text, end) if parts[1] is not None else None
        found = found or _TIMES_TEN.match(text, end)
        if found:
            exponent, end = found[1], found.end()
        found = _POWER.match(text, end)
        if found and not _DECIMALS.match(text, found.end()):
            power, end = found[1] or found[2] or found[3], found.end()
        else:
            found = _NO_POWER.match(text, end)
            if found:  # 2^x
                return None, found.end()
        return (*parts, exponent, power), end

    def _digits(self, at: int, least: int) -> tuple[str | None, str, int]:
        """(whole digits, decimals, end) of the number at ``at``; whole is None for a version."""
        text = self.text
        if text[at - 1:at] == "." and self._leading_dot(at, least):
            end = _DIGITS.match(text, at).end()
            return "", text[at:end], end
        plain = _DIGITS.match(text, at).end()
        follows = text[plain:plain + 1]
        if follows == ".":
            found = _DOTS.match(text, at)
            if found:
                whole, _, decimals = found[0].partition(",")
                return whole.replace(".", ""), decimals, found.end()
            found = _VERSION.match(text, at)
            if found:
                return None, "", found.end()
        elif follows not in _GROUPS:
            return text[at:plain], "", plain
        end, mark = self._groups(at, plain)
        whole = text[at:end] if mark is None else text[at:end].replace(mark, "")
        found = _DECIMALS.match(text, end)
        if found is None and mark not in (None, ","):
            found = _COMMA_DECIMALS.match(text, end)
        if found is None:
            return whole, "", end
        decimals, end = found[1], found.end()
        if len(decimals) % 3 == 0:
            found = _MORE_DECIMALS.match(text, end)
            if found:
                decimals, end = decimals + found[0].replace("\u2009", ""), found.end()
        return whole, decimals, end

    def _leading_dot(self, at: int, least: int) -> bool:
        """Whether the digits are decimals without a whole: ".5", but not the ones of "Rs.500" or "...5"."""
        before = self.text[max(at - 2, 0):at]
        return before[-1:] == "." and at - 1 >= least and not (before[:-1].isalnum() or before[:-1] == ".")

    def _groups(self, at: int, plain: int) -> tuple[int, str | None]:
        """(end, mark of its thousands or None) of the whole number at ``at``; ``plain``: where its first digits end."""
        text = self.text
        mark = text[plain:plain + 1]
        if plain - at > 3 or mark not in _GROUPS:
            return plain, None
        if mark == "," and text[plain + 3:plain + 4] == ",":
            found = _INDIAN.match(text, at)
            if found and ",0" in found[0]:
                return found.end(), mark
        if at < self.flat:
            return plain, None
        found = _GROUPS[mark].match(text, at)
        if found is None:
            return plain, None
        end = found.end()
        if mark in " \u2009" and text[end:end + 1] == mark and text[end + 1:end + 2].isdigit() \
                and not _MIXED.match(text, end):
            self.flat = end  # 1 234 56: a list
            return plain, None
        return end, mark

    def _mixed(self, end: int) -> tuple[Fraction | None, int]:
        """(the fraction behind a whole number or None, end): "2 1/2"."""
        found = _MIXED.match(self.text, end)
        if found:
            above, below = int(found[1]), int(found[2])
            if 0 < above < below:
                return Fraction(above, below), found.end()
        found = _MIXED_VALUE.match(self.text, end)
        if found and 0 < self.values.get(found[1], 0) < 1:
            return self.values[found[1]], found.end()
        return None, end

    def _prefix(self, at: int, least: int) -> tuple[int, bool, bool]:
        """(begin, negative, prefixed): sign and currency in front of the digits."""
        text = self.text
        if at == least or text[at - 1] in _NO_PREFIX:
            return at, False, False
        start = at - 1 if text[at] not in self.values and self._leading_dot(at, least) else at
        found = _PREFIX.search(text, max(least, start - 10, 0), start)
        begin = found.start()
        if found["inner"] == "-":
            return begin, True, True
        sign = found["sign"] or ""
        if sign.startswith("-") and self._is_minus(begin, sign, at):
            return begin, True, start - begin > len(sign)
        begin += len(sign)
        return begin, False, start > begin

    def _is_minus(self, begin: int, sign: str, at: int) -> bool:
        """Whether the dash is the number's minus: not in "16-3", "16 - 3", "x-3", nor a list's mark "- 3 apples"."""
        text = self.text
        before = text[max(begin - 50, 0):begin]
        last = before[-1:]
        if last.isdigit() or last in self.values or last and _LETTER.match(last):
            return False
        last = before.rstrip(" \u2009")[-1:]
        if sign != "-" and last in ("", "\n") and before:
            # A dash at the beginning of a line with words behind the number is a list's mark.
            return not _LETTER.search(text[at:at + 200].split("\n", 1)[0])
        last = before.rstrip()[-1:]
        # With a blank behind it ("- 3"), a dash after a word is punctuation.
        return not (last.isdigit() or last in self.values or last in tuple(")]%")
                    or sign != "-" and last and _LETTER.match(last))


def _is_whole(factor: tuple) -> bool:
    whole, decimals, exponent, power = factor
    return decimals == "" and exponent is None and power is None and whole != ""


def _value(factor: tuple) -> Fraction | None:
    """The Fraction of a factor, None if it is too large."""
    whole, decimals, exponent, power = factor
    if decimals is None:
        value = whole
    else:
        decimals = decimals[:MOST_DIGITS]
        value = Fraction(int((whole[:MOST_DIGITS] or "0") + decimals), 10 ** len(decimals))
    if exponent is not None:
        exponent = _bounded(exponent)
        if exponent is None:
            return None
        value *= Fraction(10) ** exponent
    if power is not None:
        power = _bounded(power)
        if power is None or value == 0 and power < 0:
            return None
        if max(value.numerator.bit_length(), value.denominator.bit_length()) * abs(power) > MOST_BITS:
            return None
        value **= power
    return value


def _bounded(digits: str) -> int | None:
    """An exponent as int, None if it is beyond ``MOST_EXPONENT``."""
    sign, digits = digits[0] == "-", digits.lstrip("+-").lstrip("0")
    if len(digits) > len(str(MOST_EXPONENT)) or int(digits or "0") > MOST_EXPONENT:
        return None
    return -int(digits or "0") if sign else int(digits or "0")
