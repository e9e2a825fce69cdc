r"""The answer of a worked solution as an exact number: the one reader of numbers that every scorer uses.

Where the answer stands, the higher rank first; of the same rank:

    \boxed{...}        the last one that holds a number
    ####               the first one with a number behind it on its line (GSM8K): models go on with further questions
    answer is, answer: the last one with a number in its sentence; also "final answer" as a heading, "is the answer",
      答案
    no marker          the last number of the text; but in "x = 5 (see step 2)" the one behind "=", not the remark's

A marker with nothing behind it counts as absent. If a ``\boxed`` or ``####`` states something that is no number and no
other marker states one, there is no answer. What follows a new "Question:" behind a marker belongs to another question.
Behind a marker the first number counts, "3 + 4 = 7" gives 7; behind "answer is" it has to follow at once (maybe behind
"about"), else the last number of the sentence outside parentheses counts, if a verb, "=" or "of" stands in front of it:
"the answer is that she has 5". "Answer:" as the first word is no marker if a calculation or a longer sentence follows,
nor is "find the answer:".

What a number is (``tests/unit/test_numbers.py`` holds this table):

    1,234,567  1 234 567  1'234'567  1_234_567      groups of three with one mark, also U+00A0, U+2009, U+202F, LaTeX's
                                                    \, and {,}: 1234567; "1 234 56" and "1,2,3" are lists
    1,50,000                                        150000, if one of the groups begins with 0; else a list
    1.234.567,89  1.234,56  1 234,56                a comma is a decimal mark only if other marks make the groups:
                                                    1234567.89, 1234.56, 1234.56; "1.234" and "1.234,567" have a point
    1,5  0,5                                        lists; the last number is 5
    3, 4 and 5                                      a list; the last number is 5
    .5  5.  5...  1.50                              1/2, 5, 5, 3/2
    1.5e3  1E-3  1.5 x 10^3  1.5 \times 10^{-3}     1500, 1/1000, 1500, 3/2000
    10^3  2^{10}  10³                               1000, 1024, 1000; 2^x is no number
    1e999999  10^{999999}                           no number: exponents beyond 1000
    3/4  3 / 4  \frac{3}{4}  \frac34  ¾             3/4; \frac may be nested, and hold 1{,}000; 1/0 gives 1
    2 1/2  2\frac{1}{2}  2½                         5/2, if the fraction is less than 1
    12/31/2024                                      12, 31, 2024
    12:30  3:4  2024-05-01  1.2.3                   no numbers: time, ratio, date, version
    -5  −5  –5  -$5  $-5  (-5)                      -5; "x-3", "5-7", "5 - 7", "COVID-19": a dash between; a line that
                                                    begins with "- 5 apples" is a list's
    $5  5 €  US$5  Rs. 5  USD 5  50%  90°  5 km     5, 5, 5, 5, 5, 50, 90, 5: currency, percent and units are left out
    5th  2x                                         5, 2
    x2  H2O  x_1  m^2  log_2                        no numbers: part of a name
    3{,}14  1{,}234{,}5                             157/50, 2469/2: LaTeX's {,} is no comma of a list
    3\sqrt{2}  2π  \frac{x}{2}  0.\overline{3}      no numbers
    ５  ٥  𝟓                                         5: decimal digits of every script
    five, a dozen, 5 million                        words are not read: none, none, 5

Of more than 1000 digits the first 1000 count. Everything takes time linear in the length of the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

from colora_ms.evaluation.number_markup import plain
from colora_ms.evaluation.number_scan import Number, scan

_BOX = re.compile(r"(?:\\f?b|\x08)ox(?:ed)?(?![A-Za-z])\s*")  # \x08: "\b" that a string literal swallowed
_BARE = re.compile(r"[^\s$]*")  # \boxed 5
_LINE = re.compile(r"[^\n]*")
_MARK = re.compile(r"(?<!#)####(?!#)\s*([^\n]*)")
# "#### Step 2: ..." is a heading of Markdown.
_HEADING = re.compile(r"[*_\s]*(?:step|part|section|case|problem|question|example|exercise|method|option)\b", re.I)
_VERBS = "is|are|be|equals|becomes"
# "points/answer" is a unit, "the third answer is" a step.
_NOT_OURS = "".join(f"(?<!{word})" for word in ("/", "/ ", "first ", "second ", "third ", "fourth ", "next ",
                                                "previous ", "other ", "wrong ", "incorrect "))
_ANSWER = re.compile(
    rf"\b(?P<final>final[ ]{{1,3}})?{_NOT_OURS}(?:answer|ans)\b[*_\"')\]]{{0,4}}(?:"
    rf"[^.!?\n:=]{{0,60}}?(?<![A-Za-z])(?:{_VERBS})(?![A-Za-z])(?:[ ]equal[ ]to(?![A-Za-z]))?[ ]?:?"
    r"|(?P<colon>(?:[ ]?\([^()\n]{0,40}\))?[*_]{0,3}[ ]{0,3}(?::|=|->|\u2192|\u21d2|\u21fe))"
    r"|'s(?=[ ])|(?<=[sS])\.(?=[ ]{0,3}[-$0-9])"
    r"|>)"  # <answer>
    r"|(?:\A|(?<=\n))[#*_ ]{0,8}(?:the[ ])?(?:final[ ])?answer[*_ ]{0,5}(?=\n)"  # a heading
    "|\u7b54\u6848[ ]?(?:\u662f|\u4e3a|\u70ba|\u7b49\u4e8e)?:?", re.I)
# "To find the answer: ..." begins a calculation.
_SEARCHED = re.compile(r"\b(?:find|finding|get|getting|calculate|compute|determine|obtain|reach|verify|check)"
                       r"[ ]{1,2}(?:(?:out|the|our|your|this|its|an)[ ]{1,2}){0,2}(?:final |correct |right )?\Z", re.I)
_IS_THE_ANSWER = re.compile(r"\bis[ ](?:the|our|my)[ ](?:final[ ]|correct[ ]|right[ ])?answer\b", re.I)
_LEAD = re.compile(r"[\s*_:`>]*")
_END = re.compile(r"\n|[\u3002\uff01\uff1f\uff1b]|"
                  r"(?<!approx)(?<!Rs)(?<!No)(?<!\b[A-H])[.!?;](?=[\s*_)\]\"'$]|\Z)")
_NEARLY = ("about|approximately|approx|around|roughly|nearly|exactly|just|only|simply|therefore|thus|hence|equal|to|a|"
           "total|of|then|now|indeed|actually|clearly|the|number|value")
# What may stand between a marker and the number that it states; the letter of an option, too.
_DIRECT = re.compile(rf"[\W_]*(?:[A-H](?:\)|[.:](?=[ ]))[\W_]*)?(?:(?:{_NEARLY})\b[\W_]*)*\Z", re.I)
# What stands in front of a number that a longer sentence states: a verb, "=", "a profit of"; not "half of", "after
# eating".
_GIVES = re.compile(r"(?:[=\u2248:]|\b(?:[a-z]{1,20}(?:s|ed)|are|be|have|had|but|sold|paid|got|made|bought|spent)"
                    r"|(?<!half )(?<!third )(?<!quarter )(?<!% )(?<!percent )(?<!sum )(?<!number )(?<!product )\bof)"
                    r"[\s*$(]*\Z", re.I)
_NOT = re.compile(r"(?:\bnot|n't)[ ]{1,3}\Z")
# What may stand between the numbers of a calculation: operators, and units in front of them.
_OPERATORS = re.compile("(?:(?:[ \u2009]?[A-Za-z]{1,20}(?:[ ][A-Za-z]{1,20})?)?"
                        "[ \u2009]?[-+*/\u00d7\u00f7\u00b7()^$%=\u2248])+[ \u2009]*\\Z")
_NEXT_QUESTION = re.compile(r"^[ \t*]*(?:question|problem|q)\b[ ]?[0-9]{0,4}[ ]?:", re.I | re.M)


def extract_number(text: str) -> Fraction | None:
    """The number that a text gives as its answer; the head of this module says which one.

    Args:
        text: any text.

    Returns:
        ``fractions.Fraction``, exact, or ``None`` if there is no number. Never raises.
    """
    text, values = plain(text)
    text = _before_the_next_question(text)
    stated = False
    for rank in (_boxed, _marked, _answered):
        value, said = rank(text, values)
        if value is not None:
            return value
        stated = stated or said
    return None if stated else _last(text, values)


def format_number(value: Fraction | None) -> str:
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


def _before_the_next_question(text: str) -> str:
    """The text up to a question that begins behind the first marker: a model that did not stop."""
    found = [mark.search(text) for mark in (_BOX, _MARK, _ANSWER)]
    places = [one.start() for one in found if one]
    following = _NEXT_QUESTION.search(text, min(places)) if places else None
    return text if following is None else text[:following.start()]


def _boxed(text: str, values: dict[str, Fraction]) -> tuple[Fraction | None, bool]:
    """(number of the last box that has one, whether a box states anything)."""
    if not _BOX.search(text):
        return None, False
    closes = _closing_braces(text)
    contents, place = [], 0
    for found in _BOX.finditer(text):
        if found.start() < place:
            continue  # inside the box before it
        if text[found.end():found.end() + 1] != "{":
            place = _BARE.match(text, found.end()).end()
            contents.append(text[found.end():place])
        else:
            # Without its closing brace, the answer was cut: its line counts.
            place = closes.get(found.end()) or _LINE.match(text, found.end()).end()
            contents.append(text[found.end() + 1:place])
    for content in reversed(contents):
        value = _first(content, values)
        if value is not None:
            return value, True
    return None, any(map(_says, contents))


def _marked(text: str, values: dict[str, Fraction]) -> tuple[Fraction | None, bool]:
    """(number of the first #### with one on its line, whether one states anything)."""
    stated = False
    for found in _MARK.finditer(text):
        if _HEADING.match(found[1]):
            continue
        value = _first(found[1], values)
        if value is not None:
            return value, True
        stated = stated or _says(found[1])
    return None, stated


def _answered(text: str, values: dict[str, Fraction]) -> tuple[Fraction | None, bool]:
    """(number of the last "answer is" or "is the answer" with one, False)."""
    marks: list[tuple] = [(found.start(), found.end(), found) for found in _ANSWER.finditer(text)]
    marks += [(found.start(), found.end(), None) for found in _IS_THE_ANSWER.finditer(text)]
    marks.sort(key=lambda mark: mark[:2])
    for number in range(len(marks) - 1, -1, -1):
        start, end, found = marks[number]
        if found is None:
            since = marks[number - 1][1] if number else 0
            value = _in_front(text[max(since, start - 400):start], values)
        else:
            until = max(end, marks[number + 1][0]) if number + 1 < len(marks) else len(text)
            opening = bool(found["colon"] and not found["final"] and not text[:start].strip())
            searched = found["colon"] and _SEARCHED.search(text, max(start - 40, 0), start)
            value = None if searched else _behind(text, end, until, values, opening)
        if value is not None:
            return value, False
    return None, False


def _behind(text: str, begin: int, until: int, values: dict[str, Fraction], opening: bool) -> Fraction | None:
    """What the sentence between ``begin`` and ``until`` gives as the answer."""
    begin = _LEAD.match(text, begin, until).end()
    end = _END.search(text, begin, until)
    clause = text[begin:end.start() if end else until]
    numbers = [one for one in scan(clause, values) if not _NOT.search(clause, max(one.begin - 8, 0), one.begin)]
    if not numbers:
        return None
    if _DIRECT.match(clause[:numbers[0].begin]):
        found = _calculated(clause, numbers)
        return None if opening and found is not numbers[0] else found.value()
    found = _outside(clause, numbers)
    return found.value() if not opening and _GIVES.search(clause, max(found.begin - 40, 0), found.begin) else None


def _in_front(text: str, values: dict[str, Fraction]) -> Fraction | None:
    """The last number of the last sentence of a text that ends with "... is the answer"."""
    begin = max((found.end() for found in _END.finditer(text)), default=0)
    numbers = scan(text[begin:], values)
    return numbers[-1].value() if numbers else None


def _first(text: str, values: dict[str, Fraction]) -> Fraction | None:
    """The first number of a statement, or the result of the calculation that begins there."""
    numbers = scan(text, values)
    for number, one in enumerate(numbers):
        value = one.value()
        if value is not None:
            result = _calculated(text, numbers[number:]).value()
            return value if result is None else result
    return None


def _calculated(text: str, numbers: list[Number]) -> Number:
    """The number behind the last "=" of the calculation that the first number begins; that number without a "="."""
    found = numbers[0]
    for last, one in zip(numbers, numbers[1:]):
        between = text[last.end:one.begin]
        if len(between) > 80 or not _OPERATORS.match(between):
            break
        if "=" in between or "\u2248" in between:
            found = one
    return found


def _last(text: str, values: dict[str, Fraction]) -> Fraction | None:
    """The last number; but not one of a remark in parentheses behind the number that follows "="."""
    numbers = scan(text, values)
    if not numbers:
        return None
    plainly = _outside(text, numbers)
    remark = text[plainly.end:numbers[-1].begin]
    before = text[max(plainly.begin - 20, 0):plainly.begin].rstrip(" \u2009*_$(")
    if before[-1:] in ("=", "\u2248") and not re.search(r"=|\n|[.!?] ", remark):
        value = plainly.value()
        if value is not None:
            return value
    for one in reversed(numbers):
        value = one.value()
        if value is not None:
            return value
    return None


def _outside(text: str, numbers: list[Number]) -> Number:
    """The last of the numbers that stands outside parentheses; the last one if all are inside."""
    found, depth, place = numbers[-1], 0, 0
    outside = None
    for one in numbers:
        for c in text[place:one.begin]:
            depth = depth + 1 if c in "([" else max(depth - 1, 0) if c in ")]" else depth
        place = one.begin
        if depth == 0:
            outside = one
    return outside or found


def _says(text: str) -> bool:
    """Whether a text holds more than blanks and marks."""
    return any(c.isalnum() for c in text)


def _closing_braces(text: str) -> dict[int, int]:
    """{place of "{": place of its "}"}."""
    closes, open_ones = {}, []
    for found in re.finditer("[{}]", text):
        if found[0] == "{":
            open_ones.append(found.start())
        elif open_ones:
            closes[open_ones.pop()] = found.start()
    return closes
