"""Figures that are drawn into PNG files, without a global backend of matplotlib."""

import os
from pathlib import Path

from colora_ms.errors import ConfigError


def new_figure(size):
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


def save_figure(figure, picture):
    """Write a figure as a PNG, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    picture = Path(picture)
    temporary = picture.with_name(f".{picture.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, picture)
    except OSError as error:
        raise ConfigError(f"the picture {picture} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
