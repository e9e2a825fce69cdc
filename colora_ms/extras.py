"""Packages that only some parts need, by the extra of the installation that brings them.

The plain installation decodes and trains. What needs more says which extra that is; setup.py reads this file's table,
so that what is asked for and what is installed cannot differ.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

from colora_ms.errors import ColoraError, ConfigError

#: extra -> {module that is imported: requirement that brings it}
EXTRAS = {
    "serve": {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"},
    "plots": {"matplotlib": "matplotlib"},
    "mindformers": {"mindformers": "mindformers==1.9.*"},
    "constraints": {"llguidance": "llguidance"},
    "data": {"reasoning_gym": "reasoning-gym", "datasets": "datasets"},
}


@contextlib.contextmanager
def needed(extra: str, what: str, kind: type[ColoraError] = ConfigError) -> Iterator[None]:
    """Around imports of an extra's packages: one that is missing becomes an error that names the extra.

    Args:
        extra: key of ``EXTRAS``.
        what: what needs the packages, the subject of the sentence: "the HTTP server".
        kind: class of the error.

    Raises:
        ColoraError: of ``kind``; a package of the extra is not installed. Other failures of an import stay as they are.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS[extra]:
            raise
        raise kind(f"{what} needs the package {EXTRAS[extra][missing]}, which is not installed; run "
                   f"pip install 'colora-ms[{extra}]'") from None


def load(module: str, extra: str, what: str, kind: type[ColoraError] = ConfigError) -> ModuleType:
    """Import a module of an extra; see :func:`needed`."""
    with needed(extra, what, kind):
        return importlib.import_module(module)
