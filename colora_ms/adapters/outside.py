"""Cells of other libraries as adapters see them: the table of their classes, and their :class:`Leaf` face."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Callable, Optional, Union

from mindspore import Parameter, mint, nn

from colora_ms.models.leaf import Leaf

#: Names on disk of MindSpore's parameter names.
DISK_NAMES = {"embedding_table": "weight", "embedding_weight": "weight", "gamma": "weight", "beta": "bias"}

#: Cells that can be adapted or saved whole: [(type, kind)]; the first match counts. Integrations put theirs in front.
KINDS = [
    (nn.Dense, "linear"),
    (mint.nn.Linear, "linear"),
    (nn.Embedding, "embedding"),
    (mint.nn.Embedding, "embedding"),
    (nn.LayerNorm, "norm"),
    (mint.nn.LayerNorm, "norm"),
]

#: {package: module} of libraries whose Cells have an integration here: it is imported when such a Cell is met first.
INTEGRATIONS = {"mindformers": "colora_ms.integrations.mindformers.cells"}


@dataclass(frozen=True)
class Traits:
    """How the Cells of a class differ from ``nn.Dense`` or ``nn.Embedding``; integrations put theirs into ``TRAITS``.

    Attributes:
        sizes: function (Cell) -> (in_features, out_features), or (vocabulary, hidden size); by default from the weight.
        transposed: function (Cell) -> whether the weight is stored (in, out).
        adapted: function (class of adapter Cell, Cell) -> the class to use in its place: one that is called as the base
            Cell is called, and returns what that returns.
        refusal: function (Cell) -> why no adapter can be put on it, or "".
        whole: whether ``modules_to_save`` may copy it.
        heads: names of output heads of this class, beside the usual ones.
    """

    sizes: Optional[Callable] = None
    transposed: Callable = lambda cell: False
    adapted: Callable = lambda kind, cell: kind
    refusal: Callable = lambda cell: ""
    whole: bool = True
    heads: tuple = ()


#: {class: Traits}, looked up along a Cell's classes.
TRAITS = {}


class Outside(Leaf):
    """The face of a Cell of another library, which takes x alone: one adapter holds for the whole batch.

    Args:
        cell: the Cell; kind: "linear", "embedding" or "norm".
    """

    takes_rows = False

    def __init__(self, cell: nn.Cell, kind: str) -> None:
        own = next((TRAITS[cls] for cls in type(cell).__mro__ if cls in TRAITS), None)
        self.cell, self.kind = cell, kind
        self.traits = own or Traits()
        self.plain = kind == "linear" and own is None
        self.whole, self.heads = self.traits.whole, self.traits.heads
        self.refusal, self.transposed = self.traits.refusal(cell), self.traits.transposed(cell)

    def sizes(self) -> tuple[int, int]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        if self.traits.sizes is not None:
            return self.traits.sizes(self.cell)
        if self.kind == "norm":
            return 0, 0
        first, second = self.leaf_shapes()["weight"]
        return (second, first) if self.kind == "linear" else (first, second)

    def leaf_parameters(self) -> dict[str, Parameter]:
        """As :class:`colora_ms.models.leaf.Leaf` says."""
        return {DISK_NAMES.get(name, name): value
                for name, value in self.cell._params.items() if value is not None}  # pylint: disable=protected-access

    def adapted(self, kind: type) -> type:
        """The class to use in the place of the class ``kind`` of adapter Cells: called as this Cell is called."""
        return self.traits.adapted(kind, self.cell)


def leaf(cell: nn.Cell) -> Optional[Union[Leaf, Outside]]:
    """The :class:`Leaf` face of a Cell: the Cell itself if it has it, or one on a known Cell of another library, or
    None."""
    if isinstance(cell, Leaf):
        return cell
    kind = next((kind for cls, kind in KINDS if isinstance(cell, cls)), "other")
    return Outside(cell, kind) if kind != "other" else None


def load_integrations(net: nn.Cell) -> None:
    """Import the integrations of the libraries that the Cells of a model come from."""
    found = {type(cell).__module__.partition(".")[0] for _, cell in net.cells_and_names()}
    for package in found & set(INTEGRATIONS):
        importlib.import_module(INTEGRATIONS[package])
