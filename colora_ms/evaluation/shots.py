"""Worked examples in front of a question: the same ones for all, except that none shows the question's own answer."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from colora_ms.errors import ConfigError, DataError

if TYPE_CHECKING:
    from colora_ms.evaluation.likelihood import ChoiceItem

# Blanks, and characters that are not seen.
_UNSEEN = re.compile(r"[\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]+")


def question_key(text: str) -> str:
    """What two copies of a question share: blanks, case, width of characters and the last point do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return _UNSEEN.sub("", text).rstrip(".?!:;,")


class Shots:
    """``count`` worked examples out of a list, for a question that may stand in the list itself.

    The first ``count`` of the list are shown. Copies of the question that is asked (``question_key``) are left out, and
    the next ones of the list take their place.

    Args:
        pool: list of (question, its text with question and answer, as it is shown).
        count: how many are shown; all of them if None.

    Attributes:
        count: how many are shown.
        digest: changes when the text in front of any question would change.

    Raises:
        ConfigError: nothing to show, or fewer examples than are to be shown.
    """

    def __init__(self, pool: Sequence[tuple[str, str]], count: int | None = None) -> None:
        pool = list(pool)
        self.count = len(pool) if count is None else count
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1 or not pool:
            raise ConfigError(f"a few-shot prompt needs at least one worked example; {self.count!r} of {len(pool)} are "
                              "to be shown")
        if self.count > len(pool):
            raise ConfigError(f"{self.count} worked examples are to be shown, there are {len(pool)}; give a file with "
                              "more, or show fewer")
        self._pool = [(question_key(question), text) for question, text in pool]
        self._keys = {key for key, _ in self._pool}
        digest = hashlib.sha256(f"shots without the question itself\0{self.count}".encode())
        for pair in self._pool:
            for part in pair:
                digest.update(b"\0" + part.encode("utf-8", "replace"))
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pool)

    def head(self, question: str, name: str) -> str:
        """The worked examples in front of a question, joined.

        Raises:
            DataError: without the question's own copies too few are left; ``name`` says which question it is.
        """
        key = question_key(question)
        if key not in self._keys:
            return "".join(text for _, text in self._pool[:self.count])
        others = [text for own, text in self._pool if own != key]
        if len(others) < self.count:
            raise DataError(f"{name} stands itself among the {len(self._pool)} worked examples, {self.count} are to be "
                            f"shown, and {len(others)} are other questions: give more worked examples, or show fewer")
        return "".join(others[:self.count])

    def check(self, questions: Sequence[tuple[str, str]]) -> int:
        """Find out before anything is generated whether there are enough for all; returns how many stand in the list.

        Args:
            questions: list of (question, name).

        Raises:
            DataError: as :meth:`head`.
        """
        own = [(question, name) for question, name in questions if question_key(question) in self._keys]
        for question, name in own:
            self.head(question, name)
        return len(own)


def few_shot_choices(items: Sequence[ChoiceItem], worked: Sequence[ChoiceItem], count: int,
                     separator: str = "\n\n") -> tuple[list[ChoiceItem], int]:
    """Multiple-choice items with worked ones in front of their contexts.

    Args:
        items: list of ``likelihood.ChoiceItem``.
        worked: list of ``ChoiceItem`` to show, with their right answers.
        count: how many are shown.
        separator: behind each of them.

    Returns:
        (list of ``ChoiceItem``, how many of the items stand among ``worked``; others are shown in their place).

    Raises:
        ConfigError: ``count`` is not possible. DataError: too few are left for an item that is among them.
    """
    shots = Shots([(one.context, one.context + one.choices[one.answer] + separator) for one in worked], count)
    own = shots.check([(item.context, f"item {item.id}") for item in items])
    return [dataclasses.replace(item, context=shots.head(item.context, f"item {item.id}") + item.context)
            for item in items], own
