"""The picture of a sweep: accuracy (or perplexity) against size and against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from colora_ms.evaluation.lrd_sweep import pareto, recommend
from colora_ms.pictures import new_figure, save_figure


def plot(rows: Sequence[dict], path: str | Path, tolerance: float) -> None:
    """Draw the rows of a sweep into a PNG: one panel for size and, where it is measured, one for latency.

    Args:
        rows: the sweep's rows, the model itself first; path: the file to write; tolerance: as in ``recommend``.
    """
    by_accuracy = sum(row["accuracy"] is not None for row in rows) > 1
    quality = "accuracy" if by_accuracy else "perplexity"
    usable = [row for row in rows if row[quality] is not None]
    panels = [("parameters", "parameters, millions", 1e-6)]
    if usable and all(row["step_ms"] is not None for row in usable):
        panels.append(("step_ms", "decoding step, ms", 1))
    figure = new_figure((7 * len(panels), 5))
    front, best = pareto(rows), recommend(rows, tolerance)
    colours = {"-": "black", "all": "tab:blue", "attn": "tab:green", "mlp": "tab:orange", "drop": "tab:red"}
    shapes = {"early": "v", "middle": "s", "late": "^", "spread": "o"}
    for axes, (key, label, scale) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for row in usable:
            x, y = row[key] * scale, row[quality] * (100 if by_accuracy else 1)
            axes.scatter(x, y, s=70, color=colours.get(row["tensors"], "tab:purple"),
                         marker=shapes.get(row["placement"], "*"),
                         edgecolors="black" if row["name"] in front else "none", linewidths=1.5)
            axes.annotate(row["name"] + (" (recommended)" if row["name"] == best else ""), (x, y), fontsize=7,
                          xytext=(5, 4), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy, %" if by_accuracy else "perplexity (log)")
        if not by_accuracy:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.set_title("black edge: Pareto front", fontsize=9)
    save_figure(figure, path)
