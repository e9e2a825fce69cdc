"""Pictures of adapters: the experts of a Lily adapter, the sizes of a LoRA adapter's updates."""

import os
from typing import Union

import numpy as np

from colora_ms.pictures import new_figure, save_figure


def draw_expert_use(uses: list, picture: Union[str, os.PathLike]) -> None:
    """One panel for each group of modules that share experts: layers against experts, the mean weight as colour.

    Args:
        uses: list of :class:`colora_ms.adapters.lily_usage.ExpertUse`; picture: path of the PNG.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    groups = {}
    for use in uses:
        groups.setdefault(use.group, []).append(use)
    experts = len(uses[0].mean)
    tallest = max(len(members) for members in groups.values())
    figure = new_figure((1.2 + len(groups) * (1.3 + 0.35 * experts), 1.2 + 0.22 * tallest))
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for panel, (label, members) in zip(panels, groups.items()):
        image = panel.imshow(np.stack([use.mean for use in members]), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(label, fontsize=9)
        panel.set_xlabel("expert")
        panel.set_xticks(range(experts))
        panel.set_yticks(range(len(members)), [_layer(use.path) for use in members], fontsize=6)
        for row, use in enumerate(members):
            if row and use.block != members[row - 1].block:
                panel.axhline(row - 0.5, color="white", linewidth=1)  # another A begins
    panels[0].set_ylabel("layer (lines part the blocks that share an A)")
    figure.colorbar(image, ax=list(panels), label="mean router weight")
    save_figure(figure, picture)


def draw_update_sizes(sizes: dict, picture: Union[str, os.PathLike]) -> None:
    """The norms of a LoRA adapter's updates, a line for each type of module over the layers.

    Args:
        sizes: {module name: Frobenius norm of its update}; picture: path of the PNG.
    """
    lines = {}
    for path, size in sizes.items():
        lines.setdefault(path.rsplit(".", 1)[-1], []).append(size)
    figure = new_figure((7, 4))
    axes = figure.add_subplot()
    for label, values in lines.items():
        axes.plot(range(len(values)), values, "o-", markersize=3, label=label)
    axes.set_xlabel("adapted module of its type, in the order of the layers")
    axes.set_ylabel("norm of scaling * up @ down")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save_figure(figure, picture)


def _layer(path):
    """The layer's number in a module's name, or the name."""
    return next((part for part in path.split(".") if part.isdigit()), path)
