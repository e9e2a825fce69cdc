"""Is an answer right? Numbers as in GSM8K, and exact match after normalisation.

A scorer is a function ``(text, example) -> Score``; ``example.completion`` holds the gold answer.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colora_ms.errors import ConfigError, near
from colora_ms.evaluation.numbers import extract_number, format_number

if TYPE_CHECKING:
    from colora_ms.evaluation.interfaces import Question


@dataclasses.dataclass(frozen=True)
class Score:
    """Outcome of one item: ``correct``, and what was read from the answer and from the gold."""

    correct: bool
    predicted: str
    expected: str


def normalise(text: str) -> str:
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


def score_number(text: str, example: Question) -> Score:
    """Right if the final numbers are equal as numbers (``extract_number``)."""
    predicted, expected = extract_number(text), extract_number(example.completion)
    return Score(predicted is not None and predicted == expected,
                 format_number(predicted), format_number(expected))


def score_exact(text: str, example: Question) -> Score:
    """Right if the whole answer equals the gold answer apart from blanks at the ends."""
    predicted, expected = text.strip(), example.completion.strip()
    return Score(predicted == expected, predicted, expected)


def score_normalised(text: str, example: Question) -> Score:
    """Right if answer and gold are equal after ``normalise``."""
    predicted, expected = normalise(text), normalise(example.completion)
    return Score(bool(predicted) and predicted == expected, predicted, expected)


SCORERS = {"number": score_number, "exact": score_exact, "normalised": score_normalised}


def scorer(name: str | Callable[[str, Any], Score]) -> Callable[[str, Any], Score]:
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
