"""Figures that are drawn into PNG files, without a global backend of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from colora_ms.errors import ConfigError
from colora_ms.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of ``size`` (width, height) in inches.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib; run `pip install matplotlib`") from None
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
