"""A Cell tree as adapters see it: the table of its modules."""

from __future__ import annotations

from typing import Optional

from mindspore import nn

from colora_ms.adapters.matching import DEFAULT_TARGETS, Module
from colora_ms.adapters.outside import leaf
from colora_ms.models.config import DecoderConfig

#: Last part of the names of output heads, which "all-linear" leaves out.
HEADS = ("lm_head",)


def cells_by_name(net: nn.Cell) -> dict[str, nn.Cell]:
    """{name: Cell} of all Cells under ``net``, in its order."""
    found = {}

    def walk(cell, prefix):
        for name, child in cell._cells.items():  # pylint: disable=protected-access
            if child is None:
                continue
            path = f"{prefix}{name}"
            found[path] = child
            walk(child, path + ".")

    walk(net, "")
    return found


def tied_to(cells: dict[str, nn.Cell]) -> dict[str, str]:
    """{name: name of the first Cell that holds the same weight} of the Cells with a tied weight.

    Args:
        cells: {name: Cell} in the order of the model.
    """
    owners, found = {}, {}
    for name, cell in cells.items():
        face = leaf(cell)
        weight = face.leaf_parameters().get("weight") if face is not None else None
        if weight is not None and owners.setdefault(id(weight), name) != name:
            found[name] = owners[id(weight)]
    return found


def module_of(name: str, cell: nn.Cell) -> Module:
    """The :class:`Module` of one (unwrapped) Cell."""
    face = leaf(cell)
    if face is None:
        return Module("other")
    is_head = face.kind == "linear" and name.rsplit(".", 1)[-1] in HEADS + face.heads
    return Module(face.kind, *face.sizes(), face.leaf_shapes(), is_head, face.refusal, face.whole)


def default_targets(net: nn.Cell) -> Optional[list[str]]:
    """What target_modules=None means for this model, or None."""
    known = isinstance(getattr(net, "config", None), DecoderConfig)
    return list(DEFAULT_TARGETS) if known else None


def shared_parameters(net: nn.Cell) -> set[int]:
    """ids of the Parameters that more than one Cell holds (tied weights)."""
    seen, shared = set(), set()
    for _, cell in net.cells_and_names():
        for parameter in cell._params.values():  # pylint: disable=protected-access
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
