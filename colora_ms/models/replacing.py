"""Putting Cells into the places of others in a model that exists already."""

from __future__ import annotations

from mindspore import nn

from colora_ms.errors import AdapterError


def replace_cells(net: nn.Cell, cells: dict[str, nn.Cell]) -> None:
    """Put Cells into the places of others, in place; what was compiled of the model is compiled anew.

    All Parameters, those of the model and those of the new Cells, keep the names that they have: MindSpore would put
    the place's name in front of them.

    Args:
        net: any Cell tree; cells: {name of the place: Cell to be there}; Cells in a CellList or CellDict, too.

    Raises:
        AdapterError: two parameters of the model have the same name; nothing is changed.
    """
    check_names(net)
    named = [(parameter, parameter.name) for cell in (net, *cells.values()) for parameter in cell.get_parameters()]
    for path, cell in cells.items():
        parent_path, _, last = path.rpartition(".")
        parent = cell_at(net, parent_path)
        if isinstance(parent, (nn.CellList, nn.SequentialCell)):
            parent[list(parent._cells).index(last)] = cell  # pylint: disable=protected-access
        elif isinstance(parent, nn.CellDict):
            parent[last] = cell
        else:
            setattr(parent, last, cell)
    for parameter, name in named:
        if parameter.name != name:
            parameter.name = name
    forget_graphs()


def cell_at(net: nn.Cell, path: str) -> nn.Cell:
    """The Cell called ``path`` under ``net``; ``net`` itself for ""."""
    for part in path.split(".") if path else ():
        net = net._cells[part]  # pylint: disable=protected-access
    return net


def check_names(net: nn.Cell) -> None:
    """Refuse a model of which two parameters have the same name: no graph could be compiled of it."""
    taken = {}
    for parameter in net.get_parameters():
        if taken.setdefault(parameter.name, parameter) is not parameter:
            raise AdapterError(f"two parameters of the model are called {parameter.name!r}; give them different names "
                               "first")


_replacements = 0


def replacements() -> int:
    """How often the tree under a Cell has changed in this process. Who keeps a list of a model's tensors outside of its
    Cells makes it anew when this has changed."""
    return _replacements


def forget_graphs() -> None:
    """Make every compiled Cell compile anew at its next call: the tree under one of them has changed.

    MindSpore asks only for the arguments' types before it runs a compiled graph; its counter of registered hooks is
    part of that question for all Cells, and registering one on an unused Cell raises it.
    """
    global _replacements
    _replacements += 1
    nn.ReLU().register_forward_pre_hook(_no_change).remove()


def _no_change(cell, inputs):
    return inputs
