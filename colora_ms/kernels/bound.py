"""The forms of the operations that this process runs, filled by :func:`colora_ms.kernels.registry.bind`.

A graph of MindSpore reads names out of a module's dictionary while it is parsed and runs no code to find them: so the
chosen forms and primitives stand here by name, and the faces say ``bound.rms_norm(x, weight, eps)``. Outside of graphs
the first look binds.
"""

from typing import Any

from colora_ms.kernels import registry as _registry

_registry.fills(globals())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    _registry.bind()
    if name not in globals():
        raise AttributeError(f"there is no operation {name!r} on this device ({_registry.backend()})")
    return globals()[name]
