"""Which tensors of a model were written from outside of its graphs, for those who keep copies of them elsewhere.

Whoever writes the slot of a stacked Parameter, or a base weight, says so here; whoever keeps a copy (the packed weights
of a device, :mod:`colora_ms.models.device_weights`) asks before it runs a graph. An optimizer writes inside graphs and
says nothing: what has gradients is read again at every new call of a generator.
"""

from __future__ import annotations

import numpy as np

from mindspore import Parameter

_changes = 0


def note_slot(parameter: Parameter, slot: int) -> None:
    """One slot of a stacked Parameter has got another value."""
    global _changes
    _changes += 1
    versions = slot_versions(parameter)
    versions[slot] += 1
    parameter.slot_versions = versions


def note_whole(parameter: Parameter) -> None:
    """A Parameter has got, or is about to get, another value."""
    global _changes
    _changes += 1
    parameter.whole_version = whole_version(parameter) + 1


def changes() -> int:
    """How often something was said here in this process."""
    return _changes


def slot_versions(parameter: Parameter) -> np.ndarray:
    """(slots,) int64, how often each slot was written."""
    found = getattr(parameter, "slot_versions", None)
    return np.zeros(parameter.shape[0], np.int64) if found is None else found


def whole_version(parameter: Parameter) -> int:
    """How often the whole Parameter was written."""
    return getattr(parameter, "whole_version", 0)
