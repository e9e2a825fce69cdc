"""When an adapter can be merged into the base weights, and whether the result can be used."""

from typing import TYPE_CHECKING, Any, Optional

import numpy as np

from mindspore import nn

from colora_ms.adapters import tree
from colora_ms.adapters.matching import Matched, places_of
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.registry import method
from colora_ms.adapters.slots import to_float32
from colora_ms.errors import AdapterError
from colora_ms.models.formats import holds_floats

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters


def mergeable_places(handle: 'Adapters', name: str, slot: int, config: Any, matched: Matched) -> list[tuple[str, str]]:
    """The (module name, role) of a handle that merging an adapter changes.

    Args:
        handle: :class:`colora_ms.adapters.Adapters`; name, slot, config, matched: of the adapter.

    Raises:
        AdapterError: its method, or what it changes (integer weights, factors, weights that another module uses too),
            allows no merge.
    """
    what = f"adapter {name!r} cannot be merged"
    reason = method(config.peft_type).why_not_merge(config)
    if reason:
        raise AdapterError(f"{what}: {reason}")
    # A tied module's weight is that of the module that it is tied to, which is merged once.
    places = [place for place in handle.sites if place in set(places_of(matched)) and not
              (place[0] in matched.ties and place[1] in ("saved", "tokens"))]
    check_changeable(handle.net, handle.cells, places, what, "use the adapter unmerged", matched.ties)
    reason = next(filter(None, (handle.sites[place].why_not_merge(slot) for place in places)), "")
    if reason:
        raise AdapterError(f"{what}: {reason}; use it unmerged")
    return places


def check_changeable(net: nn.Cell, cells: dict[str, nn.Cell], places: list, what: str, instead: str,
                     ties: Optional[dict[str, str]] = None) -> None:
    """Refuse to change base weights that are integers, factors or tied; ``what`` begins the message, ``instead`` ends
    it. A weight may change if all that are tied to it are so in ``ties``, too."""
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
            if not holds_floats(cells[path], parameter):
                raise AdapterError(f"{what}: {path}.{field} is stored as integers, which would round the change away; "
                                   "load the model as float32 or bfloat16")
            if id(parameter) in shared:
                raise AdapterError(f"{what}: {path}.{field} is tied to another module, which would change too; "
                                   f"{instead}")


def not_finite(cells: dict[str, nn.Cell], places: list) -> list[str]:
    """Names of the modules whose weights hold a value that is not finite."""
    return [path for path, _ in places
            if not all(np.isfinite(to_float32(one)).all() for one in leaf(cells[path]).leaf_parameters().values())]
