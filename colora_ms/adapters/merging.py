"""When an adapter can be merged into the base weights, and whether the result can be used."""

import numpy as np

import mindspore as ms

from colora_ms.adapters import tree
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.slots import to_float32
from colora_ms.errors import AdapterError


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
            shared.discard(id(leaf(cells[source]).leaf_parameters()["weight"]))
    for path, role in places:
        face = leaf(cells[path])
        if face.fixed:
            raise AdapterError(f"{what}: {path} {face.fixed}")
        if role == "lora" and "weight" not in face.leaf_parameters():
            raise AdapterError(f"{what}: {path} has no weight of its own, it is called with "
                               "another module's; use the adapter unmerged")
        for field, parameter in face.leaf_parameters().items():
            if parameter.dtype in (ms.int8, ms.uint8):
                raise AdapterError(f"{what}: {path}.{field} is stored as integers, which would round the change away; load "
                                   "the model as float32 or bfloat16")
            if id(parameter) in shared:
                raise AdapterError(f"{what}: {path}.{field} is tied to another module, which would change too; {instead}")


def not_finite(cells, places):
    """Names of the modules whose weights hold a value that is not finite."""
    return [path for path, _ in places
            if not all(np.isfinite(to_float32(one)).all() for one in leaf(cells[path]).leaf_parameters().values())]
