"""How a new adapter begins: its first values, and what PiSSA and OLoRA do to the base weights for them."""

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspore import Tensor

from colora_ms.adapters.config import INITIALISATIONS
from colora_ms.adapters.fused_writing import check_fusible
from colora_ms.adapters.matching import Matched, places_of
from colora_ms.adapters.merging import check_changeable
from colora_ms.adapters.outside import leaf
from colora_ms.adapters.principal import check_splittable
from colora_ms.adapters.registry import method
from colora_ms.adapters.slots import add_in_float32
from colora_ms.errors import AdapterError

if TYPE_CHECKING:
    from colora_ms.adapters.handle import Adapters


def check_start(handle: 'Adapters', config: Any, matched: Matched) -> None:
    """Refuse a config that a new adapter cannot begin with on this model."""
    start = getattr(config, "init_lora_weights", True)
    changes_base = getattr(config, "changes_base", False)
    if not any(start is one for one in (True, False)) and start not in INITIALISATIONS and not changes_base:
        raise AdapterError(f"init_lora_weights={start!r} is not implemented for a new adapter; "
                           "use one of " + ", ".join(map(repr, INITIALISATIONS)))
    if handle.trainable and config.peft_type == "LORA":
        check_fusible(matched, getattr(handle.net, "config", None))
    if changes_base:
        what = f"an adapter with init_lora_weights={config.init_lora_weights!r} cannot start"
        check_splittable(config, matched, handle.modules, handle.cells)
        check_changeable(handle.net, handle.cells, places_of(matched), what, "leave that module out")
        if handle.names:
            raise AdapterError(f"{what}: it changes the base weights, on which {', '.join(handle.names)} rely; delete "
                               "those first")


def first_values(handle: 'Adapters', config: Any, matched: Matched) -> tuple[dict, dict]:
    """(values of a new adapter, {module name: what its start adds to the base weight})."""
    method_, values, changes = method(config.peft_type), {}, {}
    for path, target in matched.targets.items():
        # A stream for each module: the values do not depend on which other modules are adapted.
        random = np.random.default_rng([handle.seed, zlib.crc32(path.encode())])
        own = method_.initial_values(config, target, handle.modules[path], random)
        if method_.start_from_base:
            own, change = method_.start_from_base(config, target, own, partial(base_weight, handle, path), random)
            if change is not None:
                changes[path] = change
        values[path, "lora"] = own
    for path in matched.biases:
        values.setdefault((path, "lora"), {})["bias"] = leaf(handle.cells[path]).base_values()["bias"]
    for path in matched.saved:
        values[path, "saved"] = leaf(handle.cells[path]).base_values()
    for path, ids in matched.tokens.items():
        values[path, "tokens"] = {"rows": base_weight(handle, path)[list(ids)]}
    return values, changes


def base_weight(handle: 'Adapters', path: str) -> np.ndarray:
    """The weight that a module had before injection, as a float32 array."""
    return leaf(handle.cells[path]).base_values()["weight"]


class ChangedBase:
    """Base weights that the start of an adapter changed, in float32 and rounded once.

    Attributes:
        name: of the adapter; starts: {module name: its first values}.
    """

    def __init__(self, handle: 'Adapters', name: str, changes: dict[str, np.ndarray],
                 values: dict[tuple[str, str], dict[str, np.ndarray]]) -> None:
        self.name = name
        self.starts = {path: values[path, "lora"] for path in changes}
        self._kept = []
        for path, change in changes.items():
            parameter = leaf(handle.cells[path]).leaf_parameters()["weight"]
            self._kept.append((parameter, parameter.asnumpy().copy()))
            add_in_float32(parameter, change)

    def undo(self) -> None:
        """Restore the weights, bit for bit."""
        for parameter, value in self._kept:
            parameter.set_data(Tensor(value))
