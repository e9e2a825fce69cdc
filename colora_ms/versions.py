"""What is installed here: the versions that stand beside results.

The standard library only, so that a benchmark's child process without MindSpore can import it too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform

#: What decides the numbers of a run of this package.
DISTRIBUTIONS = ("colora-ms", "mindspore", "numpy", "tokenizers", "reasoning-gym")


def versions(*names: str) -> dict[str, str]:
    """Versions of Python and of distributions.

    Args:
        names: of distributions; without any, :data:`DISTRIBUTIONS`.

    Returns:
        {name: version}: "python" first, then those that are installed, in the order of ``names``.
    """
    found = {"python": platform.python_version()}
    for name in names or DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
