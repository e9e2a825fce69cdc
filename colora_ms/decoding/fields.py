"""Options as fields of frozen dataclasses: an option's name, type, range, default and meaning stand in one place.

:func:`option` makes the field, :class:`Record` checks all of them when one is built, and :meth:`Record.known` tells
them to whoever offers them to a user: the HTTP schema, the command line, ``Generator`` and the engine. Nothing here,
nor in :mod:`colora_ms.decoding.options`, imports MindSpore, so that a command line is read without it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Dict, Iterable, Optional

from colora_ms.decoding.values import flag, real, shown, whole
from colora_ms.errors import DecodingError, near


@dataclasses.dataclass(frozen=True)
class Option:
    """What is known of one option beside its name.

    Attributes:
        kind: float, int, bool or str, or a form of ``typing`` for what a caller may give.
        default: the value of one that is not given.
        meaning: a sentence for help texts.
        least, most: the range of a number; None: no end. above: whether ``least`` itself is outside.
        choices: function that gives the names that a str may have.
        hint: ends the message about a number that cannot be used.
        check: function (name, value) -> value that replaces the check by kind and range.
        engine: whether only the serving engine has a use for it.
    """

    kind: Any
    default: Any
    meaning: str
    least: Optional[float] = None
    most: Optional[float] = None
    above: bool = False
    choices: Optional[Callable[[], Iterable[str]]] = None
    hint: str = ""
    check: Optional[Callable[[str, Any], Any]] = None
    engine: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value as it is kept: numbers as Python's own, see :mod:`colora_ms.decoding.values`.

        Raises:
            DecodingError: it cannot be used; says the name, the value and what was expected.
        """
        if self.check is not None:
            return self.check(name, value)
        if self.kind is bool:
            return flag(name, value)
        if self.kind is int:
            return whole(name, value, self.least, f" ({self.hint})" if self.hint else "")
        if self.kind is str:
            return self._chosen(name, value)
        return self._in_range(name, value)

    def _chosen(self, name: str, value: Any) -> str:
        known = list(self.choices()) if self.choices is not None else []
        if not isinstance(value, str) or known and value not in known:
            if not known:
                raise DecodingError(f"{name}={shown(value)} is not a text")
            hint = near(value, known) if isinstance(value, str) else ""
            raise DecodingError(f"{name}={shown(value)} is none of {', '.join(known)}.{hint}")
        return value

    def _in_range(self, name: str, value: Any) -> float:
        number = real(name, value)
        hint = f"; {self.hint}" if self.hint else ""
        low = self.least is not None and (number <= self.least if self.above else number < self.least)
        if low and self.least == 0 and self.most is None:
            raise DecodingError(f"{name}={shown(value)} is negative{hint}")
        if low or self.most is not None and number > self.most:
            ends = f"{'(' if self.above else '['}{self.least:g}, {self.most:g}]"
            rounds = "rounds to 0 in float32, which is" if number == 0 and value > 0 else "is"
            raise DecodingError(f"{name}={shown(value)} {rounds} outside {ends}{hint}")
        return number


def option(kind: Any, default: Any, meaning: str, **more: Any) -> Any:
    """A dataclass field that is an option; the arguments are :class:`Option`'s."""
    return dataclasses.field(default=default, metadata={"option": Option(kind, default, meaning, **more)})


class Record:
    """Base of the frozen dataclasses of options: checks each when one is built, and keeps the checked values.

    Raises:
        DecodingError: a value cannot be used.
    """

    def __post_init__(self) -> None:
        for name, one in self.known().items():
            object.__setattr__(self, name, one.checked(name, getattr(self, name)))

    @classmethod
    def known(cls) -> Dict[str, Option]:
        """{name: :class:`Option`} of the record, in the order in which they are declared."""
        return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
