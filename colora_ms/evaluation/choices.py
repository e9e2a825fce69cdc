"""Multiple-choice sets from files: rows of ``{"question", "choices", "answer"}``, or LLM-Adapters' instruction rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from colora_ms.errors import DataError
from colora_ms.evaluation.benchmarks import choice_item
from colora_ms.evaluation.likelihood import ChoiceItem


def load_choices(path: str | Path, limit: int | None = None) -> list[ChoiceItem]:
    """Read a multiple-choice set.

    Args:
        path: a JSON list or JSON lines. A row is ``{"question": text, "choices": [text, ...], "answer": index}``, or a
            row of LLM-Adapters' ARC-Easy or BoolQ files (``instruction`` with the choices in it, ``answer`` by name).
        limit: only the first items.

    Returns:
        list of :class:`ChoiceItem`: context "Question: ...\\nAnswer:", choices with a leading blank.

    Raises:
        DataError: the file cannot be read, is empty, or a row is of neither kind.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else \
            [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
    if not rows:
        raise DataError(f"{path} holds no items")
    return [_item(path, number, row) for number, row in enumerate(rows[:limit], 1)]


def _item(path: str | Path, number: int, row: Any) -> ChoiceItem:
    try:
        if "choices" not in row:
            return choice_item(row, str(number))
        question, choices, answer = row["question"], [str(one) for one in row["choices"]], row["answer"]
        if isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise ValueError(f"the answer is {answer!r}")
        return ChoiceItem(str(number), f"Question: {question.strip()}\nAnswer:", tuple(" " + one for one in choices),
                          answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: row {number} is no multiple-choice item ({error}); expected question, choices and "
                        "answer (an index)") from None
