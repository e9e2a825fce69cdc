"""Figures that are drawn into PNG files, without a global backend of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from colora_ms.errors import ConfigError
from colora_ms.extras import needed
from colora_ms.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_drawing() -> None:
    """Refuse before long work what could not be drawn after it.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with needed("plots", "drawing"):
        import matplotlib.figure  # noqa: F401


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` (width, height) in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    with needed("plots", "drawing"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no global backend is touched: the caller may have its own
    return figure


def save_figure(figure: Figure, picture: str | Path) -> None:
    """Write a figure as a PNG, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    def refusal(reason: str) -> ConfigError:
        return ConfigError(f"the picture {picture} cannot be written: {reason}")

    with replacing(picture, refusal) as temporary:
        figure.savefig(temporary, format="png")
