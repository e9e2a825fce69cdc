"""The adapter methods: a new one is a file of its own and one ``register`` line in
``colora_ms/adapters/__init__.py``."""

from dataclasses import dataclass
from typing import Any, Callable, Optional

import numpy as np

from colora_ms.adapters import matching
from colora_ms.adapters.matching import Module
from colora_ms.errors import AdapterError, near

METHODS = {}


@dataclass(frozen=True)
class Method:
    """One adapter method; ``peft_type`` of its config names it on disk.

    Attributes:
        config: its config class, with ``peft_type``, ``parse_peft``, ``to_peft`` and the fields that matching reads.
        wrap: function (base Cell, name, :class:`Site`) that returns the adapter Cell to put in its place.
        initial_values: function (config, target, module, random) that gives the values a new adapter starts from: those
            fields that this module owns (a tensor that modules share is owned by one of them).
        entries: function (matched, modules) that lists its tensors on disk; None for PEFT's LoRA names.
        match: function (config, modules, defaults) -> Matched; by default :func:`colora_ms.adapters.matching.match`.
        value_shapes: function (matched, modules) that gives the shapes of its values as the Cells read and write them;
            by default :func:`colora_ms.adapters.matching.value_shapes`.
        start_from_base: function (config, target, values, weight, random) -> (values, change of the base weight or
            None), or None: the part of the initial values that depends on the base weight, which ``weight()`` returns.
        why_not_merge: function (config) that says why such an adapter cannot be merged, or "".
        peft_config: function (config, matched, modules) that gives the config to write in PEFT's own layout.
    """

    config: Any
    wrap: Callable
    initial_values: Callable
    entries: Optional[Callable] = None
    match: Callable = matching.match
    value_shapes: Callable = matching.value_shapes
    why_not_merge: Callable = lambda config: ""
    peft_config: Callable = lambda config, matched, modules: config
    start_from_base: Optional[Callable] = None


@dataclass(frozen=True)
class Site:
    """What an adapter Cell is built with.

    Attributes:
        slots: adapters that it holds; max_rank: the largest rank (0 for a bias alone).
        dropout: probability of dropping an input of the low-rank branch in training; seed: of the masks.
        bias, trainable: as the Cells take them.
        active_slot: the scalar Parameter for Cells without row slots.
        target: the module's Target with the largest rank of those that the Cell is made for; None for a bias alone.
        shared: a dict, the same one for all Cells of a model, for what they have in common.
        dtype: of the pair in Cells that can hold either, NumPy's float32 or ``mindspore.bfloat16``.
    """

    slots: int
    max_rank: int
    dropout: float
    bias: bool
    trainable: bool
    active_slot: Any
    target: Any = None
    shared: Optional[dict] = None
    seed: int = 0
    dtype: Any = np.float32


def register(method_: Method) -> None:
    """Add a method to the table."""
    METHODS[method_.config.peft_type] = method_


def method(peft_type: Any, where: str = "") -> Method:
    """The Method called ``peft_type``; AdapterError lists the known ones."""
    if not isinstance(peft_type, str) or peft_type not in METHODS:
        place = f" in {where}" if where else ""
        raise AdapterError(f"peft_type {peft_type!r:.60}{place} is not implemented; known: "
                           f"{', '.join(sorted(METHODS))}."
                           + near(peft_type, METHODS))
    return METHODS[peft_type]


def named(name: Any, where: str = "") -> Method:
    """The Method called ``name`` in a recipe, in any case: "lora" for "LORA"."""
    return method(name.upper() if isinstance(name, str) else name, where)


def match(config: Any, modules: dict[str, Module], defaults: Optional[list] = None) -> matching.Matched:
    """The Matched of any method's config on a model; see :func:`colora_ms.adapters.matching.match`."""
    return method(config.peft_type).match(config, modules, defaults)


def value_shapes(config: Any, matched: matching.Matched, modules: dict[str, Module]) -> dict[tuple[str, str], dict]:
    """Shapes of an adapter's values, see :func:`colora_ms.adapters.matching.value_shapes`."""
    return method(config.peft_type).value_shapes(matched, modules)
