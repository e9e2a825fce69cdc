"""What a run leaves to read: JSON lines of every update, and the loss curve as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colora_ms.errors import CheckpointError, ConfigError
from colora_ms.files import replacing
from colora_ms.pictures import new_figure


class RunLog:
    """A file of JSON lines, one record a line; each has ``"kind"`` and ``"step"``.

    Args:
        path: the file; appended to.
        keep_until: drop the records after this update (those that a resumed run makes again);
            0 begins anew.
    """

    def __init__(self, path: str | Path, keep_until: int = 0) -> None:
        self.path = Path(path)
        kept = [row for row in read_log(self.path) if row["step"] <= keep_until] \
            if keep_until and self.path.exists() else []
        try:
            self._handle = open(self.path, "w", encoding="utf-8")
            for row in kept:
                self._handle.write(json.dumps(row) + "\n")
            self._handle.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror or error}") from None

    def add(self, kind: str, step: int, **values: Any) -> dict:
        """Append one record and flush it; returns it."""
        row = {"kind": kind, "step": step, **values}
        self._handle.write(json.dumps(row) + "\n")
        self._handle.flush()
        return row

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def read_log(path: str | Path) -> list[dict]:
    """The records of a log, as a list of dictionaries; half-written or foreign lines are left out.

    Raises:
        CheckpointError: the file cannot be read.
    """
    rows = []
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            for line in handle:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    except OSError as error:
        raise CheckpointError(f"cannot read the log {path}: {error.strerror or error}") from None
    return rows


def smooth(values: Sequence[float], span: int = 20) -> list[float]:
    """Running mean over at most the last ``span`` values; a list of the same length."""
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= span:
            total -= values[index - span]
        result.append(total / min(index + 1, span))
    return result


def draw_loss_curve(log_path: str | Path, picture_path: str | Path,
                    label: str = "loss per answer token (nats)") -> bool:
    """Draw training loss, its running mean and the validation losses of a log as PNG; ``label``: of the loss's axis.

    Returns:
        True; False if matplotlib is not installed or the log has no loss (nothing is written).
    """
    try:
        figure = new_figure((7, 4))
    except ConfigError:
        return False
    rows = read_log(log_path)
    train = [(row["step"], row["loss"]) for row in rows if row.get("kind") == "step"]
    valid = [(row["step"], row["loss"]) for row in rows if row.get("kind") == "evaluation"]
    if not train:
        return False
    axes = figure.add_subplot()
    steps, losses = zip(*train)
    axes.plot(steps, losses, color="#9db4d0", linewidth=0.8, label="training loss")
    axes.plot(steps, smooth(losses), color="#1f4e8c", linewidth=1.8, label="mean of 20 updates")
    if valid:
        axes.plot(*zip(*valid), "o-", color="#c8553d", markersize=4, label="validation loss")
    axes.set_xlabel("update")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    with replacing(picture_path, lambda reason: CheckpointError(f"cannot write {picture_path}: {reason}")) as temporary:
        figure.savefig(temporary, format="png")
    return True
