"""Reads the rows of a file of training data: recognises their layout (see ``layouts``) and holds all rows to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from colora_ms.errors import DataError, near
from colora_ms.models.messages import short
from colora_ms.training.examples import Example, Preference
from colora_ms.training.layouts import LAYOUTS, Layout, layout_named


class RowReader:
    """Reads the rows of one file: recognises their layout, holds all rows to it, and notes which columns it leaves.

    Args:
        file: what the warning calls the file.
        layout: name of the layout; recognised from the first row if left out.
        columns: the columns to read, a list of names, or ``{name in the layout: name in the file}``; all others are
            left out without a warning. All that the layout knows if left out.
        prompt_key, completion_key, messages_key: names in the file of these three columns.

    Raises:
        DataError: an unknown layout, or columns of a wrong form.
    """

    def __init__(self, file: str, layout: str | None = None, columns: Sequence[str] | dict[str, str] | None = None,
                 prompt_key: str = "prompt", completion_key: str = "completion",
                 messages_key: str = "messages") -> None:
        self.file = file
        self._chosen = None if layout is None else layout_named(layout)
        self._first: Layout | None = None
        self._only, self._names = _columns(columns)
        keys = {"prompt": prompt_key, "completion": completion_key, "messages": messages_key}
        keys = {name: key for name, key in keys.items() if key != name}
        both = [name for name in keys if name in self._names]
        if both:
            raise DataError(f"{file}: columns and {both[0]}_key both say where {both[0]} is, expected one of them")
        # Whoever names these columns says that the rows have a question and an answer.
        self._family = "answers" if keys else None
        self._names.update(keys)
        if self._only is not None:  # a list may call these columns as the file does
            self._only = {next((name for name in keys if keys[name] == one), one) for one in self._only}
        self._left: dict[str, None] = {}

    def read(self, row: object, name: str) -> Example | Preference:
        """A row as an ``Example`` or a ``Preference``.

        Args:
            row: a dictionary.
            name: ``file:line``; the id if the row has none.

        Raises:
            DataError: the row cannot be used; says where it is and what is wrong.
        """
        if not isinstance(row, dict):
            raise DataError(f"{name}: found {short(row)}, expected a JSON object")
        view = self._view(row)
        layout = self._layout(row, view, name)
        read = {self._names.get(column, column) for column in layout.columns if column in view}
        self._check_columns(layout, name)
        meta = {key: value for key, value in row.items() if key not in read and key != "id"}
        if self._only is None:
            self._left.update({key: None for key, value in meta.items() if value not in (None, "", [])})
        identity = name if row.get("id") is None else str(row["id"])
        try:
            fields = layout.read(view)
            return (Preference if "chosen" in fields else Example)(id=identity, meta=meta, **fields)
        except DataError as error:
            # With an id from the file, the line is still what the reader needs to find it.
            text = str(error).removeprefix(f"example {identity}: ").removeprefix(f"pair {identity}: ")
            raise DataError(f"{name}: {text}") from None

    def warn(self) -> None:
        """Say once which columns were not read, if there are any."""
        if self._left and self._first is not None:
            read = [self._names.get(name, name) for name in self._first.columns]
            which = f"s {', '.join(self._left)} are" if len(self._left) > 1 else f" {next(iter(self._left))} is"
            warnings.warn(f"{self.file}: the column{which} not read (layout {self._first.name} reads "
                          f"{', '.join(read)}); name what is read with columns to say that this is meant", stacklevel=2)
            self._left = {}

    def _view(self, row: dict) -> dict:
        """The row under the layout's names, without nulls and without columns that are not to be read."""
        moved = set(self._names.values())
        view = {key: value for key, value in row.items()
                if value is not None and key not in self._names and key not in moved
                and (self._only is None or key in self._only)}
        view.update({name: row[key] for name, key in self._names.items() if row.get(key) is not None})
        return view

    def _layout(self, row: dict, view: dict, name: str) -> Layout:
        """The row's layout; the first row's, or one of its family."""
        if self._chosen is not None:
            if all(column in view for column in self._chosen.needs):
                self._first = self._first or self._chosen
                return self._chosen
            raise self._missing(row, view, name, [self._chosen])
        layouts = [one for one in LAYOUTS if self._family in (None, one.family)]
        found = next((one for one in layouts if one.fits(view)), None)
        if found is None:
            raise self._missing(row, view, name, layouts)
        if self._first is None:
            self._first = found
        if found is not self._first and found.family != (self._first.family or None):
            raise DataError(f"{name}: the layout is {found.name}, but that of the lines before it {self._first.name}; "
                            "the lines of a file must have one layout (name it with layout, or give several files)")
        return found

    def _missing(self, row: dict, view: dict, name: str, layouts: Sequence[Layout]) -> DataError:
        """The error for a row that has no layout: the columns that the nearest layout lacks."""
        nearest = max(layouts, key=lambda one: (sum(column in self._names for column in one.needs),
                                                sum(column in view for column in one.needs),
                                                sum(column in view for column in one.takes), one.name == "completion"))
        missing = [self._names.get(column, column) for column in nearest.needs if column not in view]
        null = [key for key in missing if key in row and row[key] is None]
        if null:
            return DataError(f"{name}: {' and '.join(map(repr, null))} is null, which counts as absent; a line needs a "
                             "value there")
        absent = sorted(key for key in {*(self._only or ()), *self._names.values()}
                        if self._names.get(key, key) not in row and key not in row)
        if self._only is not None and absent:
            return DataError(f"{name}: {' and '.join(map(repr, absent))} is missing, which columns names; the line has "
                             f"{short(sorted(map(str, row)))}.{near(absent[0], row)}")
        hint = "".join(near(key, row) for key in missing[:1])
        forms = [" and ".join(repr(self._names.get(column, column)) for column in one.needs) for one in layouts]
        return DataError(f"{name}: the key {' and '.join(map(repr, missing))} is missing; a line needs "
                         f"{', or '.join(dict.fromkeys(forms))}; found {short(sorted(map(str, row)))}.{hint}")

    def _check_columns(self, layout: Layout, name: str) -> None:
        """Columns that were asked for must be such as the layout reads."""
        for column in self._only or ():
            if column not in layout.columns and column != "id":
                raise DataError(f"{name}: columns has {column!r}, which the layout {layout.name} does not read; it "
                                f"reads {', '.join(layout.columns)}.{near(column, layout.columns)}")


def example_from_record(record: object, name: str, **options: Any) -> Example | Preference:
    """One parsed JSON object as an ``Example`` or a ``Preference``.

    Args:
        record: the dictionary.
        name: id of the example if the record has no ``"id"``.
        **options: ``layout``, ``columns``, ``prompt_key``, ``completion_key``, ``messages_key`` of ``RowReader``.

    Raises:
        DataError: columns are missing or values cannot be used; the message names them.
    """
    return RowReader(name, **options).read(record, name)


def _columns(columns: Sequence[str] | dict[str, str] | None) -> tuple[set[str] | None, dict[str, str]]:
    """(names that are read or None for all, ``{name in the layout: name in the file}`` where they differ)."""
    if columns is None:
        return None, {}
    if isinstance(columns, (list, tuple)):
        columns = {name: name for name in columns if isinstance(name, str)} if \
            all(isinstance(name, str) for name in columns) else None
    if not isinstance(columns, dict) or not columns or not all(isinstance(name, str) for name in columns.values()):
        raise DataError(f"columns is {short(columns)}, expected a list of names, or "
                        "{name in the layout: name in the file}")
    return set(columns), {name: key for name, key in columns.items() if name != key}
