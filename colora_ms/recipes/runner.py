"""``run``: train as a recipe says, evaluate the decoders that it names, write the table; each part is done once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.distributed.workers import Workers
from colora_ms.errors import ConfigError
from colora_ms.recipes import report
from colora_ms.recipes.decoders import Subject, choices, read_items
from colora_ms.recipes.settings import evaluation_settings, expand, quantizes, shorten
from colora_ms.recipes.training import train_once
from colora_ms.versions import versions

if TYPE_CHECKING:
    from colora_ms.training.config import TrainingConfig


def run(config: TrainingConfig, *, fast: bool = False, limit: int | None = None, name: str = "recipe",
        team: Workers = Workers(), say: Callable[[str], Any] = print) -> dict:
    """Train, evaluate, and write ``result.json`` and ``table.md`` into the recipe's output folder.

    All that can be checked is checked before the training: the recipe, the test's data, the decoders, the model's
    files. Called again, it goes on where it stopped: a finished training and evaluated items are not repeated.

    Args:
        config: what ``settings.read_config`` gave.
        fast: few updates and items, in a folder of its own; limit: only the first items.
        name: title of the table.
        team: ``Workers``, if msrun started several; all have to call.
        say: called with each line about the progress.

    Returns:
        The dictionary of ``result.json``.

    Raises:
        ColoraError: in one of its kinds.
    """
    from colora_ms.models.checkpoint import resolve_model

    config, settings = shorten(config, evaluation_settings(config), fast, limit)
    quantised = quantizes(config)
    if quantised and team.world > 1:
        raise ConfigError("quantisation runs in one process; start the recipe without msrun")
    wanted = choices(expand(settings.decoders), kind_of(config), settings.task == "problems")
    items = read_items(settings)
    resolve_model(config.model)
    folder = Path(config.output)
    unit = "characters" if settings.task == "perplexity" else "items"
    say(f"{name}: {config.model}, {len(wanted)} decoders, {len(items)} {unit}; folder {folder}")

    trained = train_once(config, quantised, team)
    say(f"{'trained' if trained.anew else 'trained before'}: {trained.summary()}; {trained.folder}")

    subject = Subject(config, trained.folder, settings.rows, quantised)
    place = folder / "evaluation" / report.setup_hash(settings, subject.hashes)
    speeds = report.earlier_speeds(folder / "result.json", str(place))
    result: dict[str, Any] = {
        "recipe": name, "model": config.model, "task": settings.task, "output": str(folder), "seed": config.loop.seed,
        "adapter": config.adapter, "training": trained.to_json(), "training_summary": trained.summary(),
        "answers": str(place), "evaluate": {**vars(settings)}, unit: len(items), "decoders": [], "complete": False,
        "hashes": {**subject.hashes, "recipe": report.recipe_hash(config)},
        "versions": versions(), "processors": os.cpu_count(), "workers": team.world}
    outcomes = {}
    for chosen in wanted:
        found = subject.measure(chosen, items, settings, place, team)
        result["decoders"].append(report.row_of(chosen, found, speeds.get(chosen.key)))
        if hasattr(found, "outcomes"):
            outcomes[chosen.key] = found.outcomes
        report.pair(result["decoders"], outcomes)
        result["complete"] = len(result["decoders"]) == len(wanted)
        if team.first:
            report.write(folder, result)
        say(f"{chosen.label}: {line_of(result['decoders'][-1])}")
    return result


def kind_of(config: TrainingConfig) -> str:
    """What the trained model is called in the table."""
    if quantizes(config):
        made = config.quantization()
        kinds = {"lrqat": "LR-QAT", "rtn": "rounded", "scales": "scales", "full": "full QAT"}
        return f"{kinds[made.method]} W{made.bits}"
    adapter: Any = config.adapter_config()
    if adapter.peft_type == "LILY":
        return "Lily"
    return "DoRA" if getattr(adapter, "use_dora", False) else "LoRA"


def line_of(row: dict) -> str:
    """One row as a line of text."""
    if "perplexity" in row:
        return f"perplexity {row['perplexity']:.3f} of {row['tokens']} tokens"
    low, high = row["interval"]
    text = f"{100 * row['accuracy']:.1f} % of {row['items']} [{100 * low:.1f}, {100 * high:.1f}]"
    if "tokens_per_second" in row:
        text += f", {row['tokens_per_second']:.1f} tokens/s"
    return text + (f", {row['refused']} refused" if row.get("refused") else "")
