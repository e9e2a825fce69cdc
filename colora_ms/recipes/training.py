"""The training of a recipe's run: made once, recognised when it is there already, and what its log says of its
speed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.adapters.patterns import in_order
from colora_ms.distributed.workers import Workers
from colora_ms.errors import CheckpointError
from colora_ms.training import checkpoint as checkpoints
from colora_ms.training.report import read_log
from colora_ms.training.settings import read_yaml, short

if TYPE_CHECKING:
    from colora_ms.training.config import TrainingConfig

#: Settings of the loop that change nothing about what is trained.
_HARMLESS = ("log_every", "save_every", "keep_checkpoints", "progress")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has trained.

    Attributes:
        folder: the adapter's folder, or the quantised model's.
        anew: whether this call made updates.
        steps: updates in all; 0 for rounding without training.
        loss: training loss of the last update that the log has, or None.
        seconds: time of the whole training, loading left out, or None.
        ms_per_step: median time of an update after the first, or None.
        compile_seconds: time of the first update less that median: compiling, or loading the compiled graph.
    """

    folder: Path
    anew: bool
    steps: int
    loss: float | None = None
    seconds: float | None = None
    ms_per_step: float | None = None
    compile_seconds: float | None = None

    def to_json(self) -> dict:
        """The numbers, without the folder."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in ("folder", "anew")}

    def summary(self) -> str:
        """One line for people."""
        if not self.steps:
            return "no training"
        text = f"{self.steps} updates"
        if self.seconds is not None:
            text += f" in {self.seconds:.0f} s"
        if self.ms_per_step is not None:
            text += f", {self.ms_per_step:.0f} ms an update"
        if self.compile_seconds is not None:
            text += f", {self.compile_seconds:.1f} s more for the first one (compiling)"
        return text + (f", last loss {self.loss:.4f}" if self.loss is not None else "")


def train_once(config: TrainingConfig, quantised: bool = False, team: Workers = Workers()) -> Trained:
    """Train what the recipe says, go on with an interrupted training, or find a finished one.

    Returns:
        Trained.

    Raises:
        CheckpointError: the output folder holds a run of another recipe. What the training raises.
    """
    before = team.share(finished(config, quantised) if team.first else None)
    if before is not None:
        return before
    if quantised:
        from colora_ms.training.quantize import quantize_model

        recipe: Any = config
        quantize_model(recipe, resume=True)
    else:
        from colora_ms.training.run import train

        train(config, resume=True, team=team)
    team.wait()
    made: Any = team.share(_described(config, quantised) if team.first else None)
    return dataclasses.replace(made, anew=True)


def finished(config: TrainingConfig, quantised: bool = False) -> Trained | None:
    """The :class:`Trained` of a finished training in the recipe's output folder, or None.

    Raises:
        CheckpointError: the folder holds a run of another recipe.
    """
    folder = Path(config.output)
    found = checkpoints.list_checkpoints(folder)
    if not found:
        return None
    different = differences(folder / "recipe.yaml", config)
    if different:
        raise CheckpointError(f"{folder} holds a run of another recipe: {'; '.join(different[:6])}; choose another "
                              "folder (--set output=FOLDER), or move this one away")
    state = _state(found[-1][1])
    if found[-1][0] < state.get("recipe", {}).get("steps", float("inf")):
        return None
    made = _described(config, quantised)
    expected = "config.json" if quantised else "adapter_config.json"
    return made if (made.folder / expected).is_file() else None


def differences(path: Path, config: TrainingConfig) -> list[str]:
    """Texts that say how the recipe at ``path``, which a run has written, differs in what is trained.

    The test may be another one than the run's only if its questions were left out of the training data, too.
    """
    try:
        before = read_yaml(path)
        old = _flat(_trained_part(before))
    except Exception as error:
        raise CheckpointError("the run's own recipe cannot be read, so that nobody can tell what it has trained: "
                              f"{error}") \
            from None
    now = json.loads(json.dumps(config.to_dict(), default=str))
    new = _flat(_trained_part(now))
    found = [f"{name} was {short(old.get(name))}, is {short(new.get(name))}" for name in {**old, **new}
             if old.get(name) != new.get(name)]
    left_out = [*_tested(before), *_sources((before.get("data") or {}).get("held_out"))]
    return found + [f"evaluate.data is {short(one)}, whose questions were not left out of the training data"
                    for one in _tested(now) if one not in left_out]


def _trained_part(recipe: dict) -> dict:
    part = {name: recipe.get(name) for name in ("model", "weight_format", "adapter", "data", "optimizer", "dpo")}
    part["adapter"] = in_order(part["adapter"] or {})
    part["train"] = recipe.get("train") or "sft"
    loop = recipe.get("loop") or {}
    return {**part, "loop": {name: value for name, value in loop.items() if name not in _HARMLESS}}


def _tested(recipe: dict) -> list:
    """The sources of the section ``evaluate`` whose questions leave the training data."""
    settings = recipe.get("evaluate") or {}
    return _sources(settings.get("data")) if settings.get("task", "problems") == "problems" else []


def _sources(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found.update(_flat(value, f"{prefix}{name}."))
        elif value is not None:
            found[prefix + name] = value
    return found


def _state(checkpoint: Path) -> dict:
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}  # resuming will say what is wrong with it


def _described(config: TrainingConfig, quantised: bool) -> Trained:
    """The :class:`Trained` of the output folder as its files tell it."""
    folder = Path(config.output)
    found = checkpoints.list_checkpoints(folder)
    state = _state(found[-1][1]) if found else {}
    name = "adapter" if state.get("best_step") is None else "best"
    log = folder / "log.jsonl"
    rows = [row for row in read_log(log) if row.get("kind") == "step"] if log.is_file() else []
    later = [row["seconds"] for row in rows if row["step"] > 1]
    median = statistics.median(later) if later else None
    first = next((row["seconds"] for row in rows if row["step"] == 1), None)
    return Trained(
        folder=folder / ("model" if quantised else name), anew=False, steps=found[-1][0] if found else 0,
        loss=rows[-1]["loss"] if rows else None, seconds=state.get("seconds"),
        ms_per_step=None if median is None else 1000 * median,
        compile_seconds=None if median is None or first is None else max(first - median, 0.0))
