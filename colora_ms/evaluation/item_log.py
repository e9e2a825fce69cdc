"""The files of an evaluation: the JSON lines of its items, from which it goes on where it stopped, and its summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from colora_ms.distributed.workers import Workers
from colora_ms.errors import DataError
from colora_ms.files import replacing


class ItemLog:
    """The JSON lines of an evaluation: a head line with the setup, then one line an item.

    Of several workers the first one reads and writes the file, and all know the items.
    """

    def __init__(self, path: str | Path | None, setup: dict, resume: bool, team: Workers = Workers()) -> None:
        self.items: dict[str, dict] = {}
        self._handle: BinaryIO | None = None
        if path is not None and team.first:
            self._open(path, setup, resume)
        if path is not None:
            self.items = team.share(self.items)

    def _open(self, path: str | Path, setup: dict, resume: bool) -> None:
        path = Path(path)
        keep = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume and path.is_file():
                keep = self._read(path, setup)
            self._handle = handle = open(path, "r+b" if keep else "wb")
            if keep:
                # An interrupted run may end in half a line: cut it off, then append.
                handle.truncate(keep)
                handle.seek(keep)
            else:
                self._write({"setup": setup})
        except OSError as error:
            raise DataError(f"cannot write the evaluation to {path}: "
                            f"{error.strerror or error}") from None

    def _read(self, path: Path, setup: dict) -> int:
        """Take over the complete lines of an earlier run; returns how many bytes they fill."""
        keep = 0
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle):
                if not raw.endswith(b"\n"):
                    break
                try:
                    row = json.loads(raw)
                except (ValueError, RecursionError):
                    row = None
                if number == 0:
                    earlier = row.get("setup") if isinstance(row, dict) else None
                    if earlier != json.loads(json.dumps(setup)):
                        raise DataError(_other_setup(path, earlier, setup))
                elif isinstance(row, dict) and isinstance(row.get("correct", False), bool) \
                        and isinstance(row.get("tokens"), int) and isinstance(row.get("id"), str):
                    self.items[row["id"]] = row
                else:
                    raise DataError(f"{path}:{number + 1} is not an item of an evaluation; "
                                    "move the file away or use resume=False")
                keep += len(raw)
        return keep

    def add(self, rows: list[dict]) -> None:
        """Keep and write items: dicts with a string "id" and what the evaluation knows of each."""
        for row in rows:
            self.items[row["id"]] = row
            self._write(row)

    def _write(self, row: dict) -> None:
        if self._handle is not None:
            self._handle.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
                               + b"\n")
            self._handle.flush()

    def close(self) -> None:
        """Close the file, if this worker has it open."""
        if self._handle is not None:
            self._handle.close()


def _other_setup(path: Path, earlier: Any, setup: dict) -> str:
    if not isinstance(earlier, dict):
        return (f"{path} exists and is not an evaluation of this package; choose another path or "
                "use resume=False to overwrite it")
    differing = [key for key in setup
                 if earlier.get(key) != json.loads(json.dumps(setup[key]))]
    listing = "; ".join(f"{key} was {earlier.get(key)!r}, now {setup[key]!r}" for key in differing)
    return (f"{path} holds an evaluation of another setup ({listing}); choose another path or use "
            "resume=False to overwrite it")


def write_json(path: str | Path, value: Any) -> None:
    """Write through a temporary file, so that a summary is there whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    with replacing(path, lambda reason: DataError(f"cannot write {path}: {reason}")) as temporary:
        temporary.write_text(text, encoding="utf-8")
