"""Process-wide settings of MindSpore that the package relies on, in one place."""

import os
from pathlib import Path

import mindspore as ms

_configured = False


def cache_folder():
    """The folder of compiled graphs: ``COLORA_CACHE``, else ``$XDG_CACHE_HOME/colora_ms``, else ``~/.cache/colora_ms``."""
    override = os.environ.get("COLORA_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colora_ms"


def configure():
    """Prepare MindSpore once a process: deep graphs may be parsed, compiled graphs are kept for the next start.

    A mode or device that the caller has set stays. ``COLORA_COMPILE_CACHE=0`` switches the graph cache off.
    """
    global _configured
    if _configured:
        return
    _configured = True
    ms.set_recursion_limit(10000)


def run(cell, *args):
    """Call a compiled Cell; a refusal by a custom operator becomes a KernelError that names argument and value."""
    from colora_ms.kernels.aot import KernelError, last_error

    try:
        return cell(*args)
    except RuntimeError as error:
        reason = last_error()
        if "AOT kernel" in str(error) and reason:
            raise KernelError(reason) from error
        raise
