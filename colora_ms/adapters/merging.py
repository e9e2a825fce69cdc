"""When an adapter can be merged into the base weights, and whether the result can be used."""

import numpy as np

from colora_ms.adapters import tree
from colora_ms.adapters.slots import to_float32
from colora_ms.errors import AdapterError
from colora_ms.models.formats import holds_floats
from colora_ms.models.low_rank import LowRankLinear


def check_mergeable(net, cells, name, places, ties=None):
    """Refuse to merge into integer weights, into factors, and into weights that another module uses too.

    Args:
        net: the model; cells: {module name: base Cell}.
        name: the adapter's name, for the message; places: [(module name, role)] that it changes.
        ties: {module name: module whose values it shares in the adapter as it does in the base}.
    """
    check_changeable(net, cells, places, f"adapter {name!r} cannot be merged", "use the adapter unmerged", ties)


def check_changeable(net, cells, places, what, instead, ties=None):
    """Refuse to change base weights that are integers, factors or tied; ``what`` begins the message, ``instead`` ends it.
    A weight may change if all that are tied to it are so in ``ties``, too."""
    shared = tree.shared_parameters(net)
    tied = tree.tied_to(cells)
    for source in set((ties or {}).values()):
        if all(ties.get(head) == source for head in tied if tied[head] == source):
            shared.discard(id(tree.leaf_parameters(cells[source])["weight"]))
    for path, role in places:
        if isinstance(cells[path], LowRankLinear):
            raise AdapterError(f"{what}: {path} is decomposed into factors, whose product has too "
                               "low a rank for it; use the adapter unmerged, or recompose(model) before you load it")
        if role == "lora" and "weight" not in tree.leaf_parameters(cells[path]):
            raise AdapterError(f"{what}: {path} has no weight of its own, it is called with "
                               "another module's; use the adapter unmerged")
        for field, parameter in tree.leaf_parameters(cells[path]).items():
            if not holds_floats(cells[path], parameter):
                raise AdapterError(f"{what}: {path}.{field} is stored as integers, which would round the change away; load "
                                   "the model as float32 or bfloat16")
            if id(parameter) in shared:
                raise AdapterError(f"{what}: {path}.{field} is tied to another module, which would change too; {instead}")


def not_finite(cells, places):
    """Names of the modules whose weights hold a value that is not finite."""
    return [path for path, _ in places
            if not all(np.isfinite(to_float32(one)).all() for one in tree.leaf_parameters(cells[path]).values())]
