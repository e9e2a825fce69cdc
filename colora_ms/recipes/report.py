"""What a run leaves to read: rows of a results table, ``result.json`` and ``table.md``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colora_ms.adapters.patterns import in_order
from colora_ms.evaluation.item_log import write_json, write_text

if TYPE_CHECKING:
    from colora_ms.recipes.decoders import Choice
    from colora_ms.recipes.settings import EvaluationSettings
    from colora_ms.training.config import TrainingConfig


def row_of(chosen: Choice, result: Any, speed: float | None = None) -> dict:
    """The numbers of one decoder as JSON values.

    Args:
        chosen: ``decoders.Choice``.
        result: EvaluationResult, ChoiceResult or TextPerplexity.
        speed: tokens/s of an earlier call, for an evaluation that generated nothing in this one.
    """
    row: dict[str, Any] = {"key": chosen.key, "decoder": chosen.label}
    if chosen.contrast is not None:
        row["contrast"] = {name: getattr(chosen.contrast, name) for name in ("alpha", "beta", "adapt", "skip_copies")}
    if hasattr(result, "word_perplexity"):
        return {**row, "perplexity": result.perplexity, "word_perplexity": result.word_perplexity,
                "tokens": result.tokens, "words": result.words}
    row.update(accuracy=result.accuracy, correct=sum(item["correct"] for item in result.items), items=len(result.items),
               interval=list(result.interval))
    if hasattr(result, "tokens_per_second"):
        row.update(tokens_per_second=result.tokens_per_second or speed or 0.0,
                   changed_share=result.changed_share or 0.0,
                   refused=result.refused, mean_tokens=result.to_json()["mean_tokens"],
                   hashes={name: result.setup[name] for name in ("template", "examples")})
    return row


def pair(rows: Sequence[dict], outcomes: dict[str, dict[str, bool]]) -> None:
    """Give every row the paired test against greedy decoding, where there is one; ``outcomes`` {key: {id: right}}."""
    from colora_ms.evaluation.significance import mcnemar

    for row in rows:
        if row["key"] != "greedy" and "greedy" in outcomes and row["key"] in outcomes:
            test = mcnemar(outcomes["greedy"], outcomes[row["key"]])
            row["against_greedy"] = {"fixed": test.second_only, "broken": test.first_only, "p_value": test.p_value}


def table(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table; columns that no row has a value for are left out."""
    if any("perplexity" in row for row in rows):
        lines = ["| model | perplexity a token | a word | tokens |", "|---|---|---|---|"]
        return "\n".join(lines + [f"| {row['decoder']} | {row['perplexity']:.3f} | {row['word_perplexity']:.2f} | "
                                  f"{row['tokens']} |" for row in rows])
    head = ["decoder", "accuracy", "95 % interval"]
    decoded = any("tokens_per_second" in row for row in rows)
    paired = any("against_greedy" in row for row in rows)
    head += ["tokens/s", "tokens changed"] * decoded + ["fixed", "broken", "p"] * paired
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        low, high = row["interval"]
        cells = [row["decoder"], f"{100 * row['accuracy']:.1f} %", f"{100 * low:.1f} - {100 * high:.1f} %"]
        if decoded:
            cells += [f"{row['tokens_per_second']:.0f}", f"{100 * row['changed_share']:.1f} %"]
        if paired:
            test = row.get("against_greedy")
            cells += [str(test["fixed"]), str(test["broken"]), f"{test['p_value']:.2g}"] if test else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary_text(result: dict) -> str:
    """The table and what it takes to understand it, as Markdown."""
    lines = [f"# {result['recipe']}", "", table(result["decoders"]), ""]
    if any("against_greedy" in row for row in result["decoders"]):
        lines += ["fixed, broken, p: items against greedy decoding of the same adapter, exact McNemar test.", ""]
    lines += [f"{row['decoder']}: {row['refused']} items were refused (a prompt too long, say) and count as wrong."
              + "\n"
              for row in result["decoders"] if row.get("refused")]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(lines + [
        f"* Training: {result['training_summary']}; seed {result['seed']}.",
        f"* Model {result['model']} ({result['hashes']['model']}), trained {result['hashes']['trained'][:16]}, recipe "
        f"{result['hashes']['recipe']}.",
        f"* {versions}; {result['processors']} processors.", ""])


def recipe_hash(config: TrainingConfig) -> str:
    """Digest of all settings of a recipe."""
    values = config.to_dict()
    values["adapter"] = in_order(values["adapter"])
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def setup_hash(settings: EvaluationSettings, hashes: dict[str, str]) -> str:
    """Name of the folder of an evaluation's items: other settings or other weights have another one."""
    values = {name: value for name, value in vars(settings).items() if name != "decoders"}
    return hashlib.sha256(json.dumps([values, hashes], sort_keys=True, default=str).encode()).hexdigest()[:12]


def earlier_speeds(path: Path, answers: str) -> dict[str, float]:
    """{decoder's key: tokens/s} of the ``result.json`` of an earlier call with the same folder of answers, or
    nothing."""
    try:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
        if old["answers"] != str(answers):
            return {}
        return {row["key"]: row["tokens_per_second"] for row in old["decoders"] if "tokens_per_second" in row}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(folder: str | Path, result: dict) -> None:
    """Write ``result.json`` and ``table.md`` into ``folder``.

    Raises:
        DataError: a file cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "result.json", result)
    write_text(folder / "table.md", summary_text(result))
