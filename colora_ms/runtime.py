"""Process-wide settings of MindSpore that the package relies on, and the one way to call a compiled Cell."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from colora_ms import ascend_settings
from colora_ms.graph_cache import GraphCache, source_fingerprint, unsupported
from colora_ms.kernels.aot import KernelError, last_error, library_path
from colora_ms.kernels.registry import bind

_log = logging.getLogger(__name__)
_configured = False
_graphs: GraphCache | None = None
_compiled: weakref.WeakKeyDictionary[nn.Cell, set] = weakref.WeakKeyDictionary()
_compilations = 0
_running = threading.RLock()


def cache_folder() -> Path:
    """The package's cache: ``COLORA_CACHE``, else ``$XDG_CACHE_HOME/colora_ms``, else ``~/.cache/colora_ms``."""
    override = os.environ.get("COLORA_CACHE")
    if override:
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colora_ms"


def settle(inference: bool | None = None) -> None:
    """On Ascend: the settings of ``ascend_settings``, which must stand before the first tensor and before a job is
    joined; with ``inference``, for graphs that decode or graphs that train. Nothing on other devices."""
    if ms.get_context("device_target") == "Ascend":
        ascend_settings.apply(cache_folder())
        if inference is not None:
            ascend_settings.boost(inference)


def configure(inference: bool | None = None) -> None:
    """Prepare MindSpore once a process: deep graphs may be parsed, compiled graphs are kept for the next start. With
    ``inference``, also for graphs that decode or graphs that train (see :func:`settle`); that may change again.

    ``COLORA_COMPILE_CACHE=0`` switches the graph cache off. A MindSpore that it cannot work with is named in a logged
    warning, and graphs are compiled without it.
    """
    global _configured, _graphs
    settle(inference)
    if _configured:
        return
    _configured = True
    bind()
    ms.set_recursion_limit(10000)
    if os.environ.get("COLORA_COMPILE_CACHE", "1") == "0":
        return
    missing = unsupported()
    if missing:
        _log.warning("%s: compiled graphs are not kept, and every start of a process compiles them anew", missing)
    else:
        _graphs = GraphCache(cache_folder(), source_fingerprint(library_path()))


def graph_cache() -> GraphCache | None:
    """The :class:`GraphCache` in use, or None."""
    return _graphs


@contextlib.contextmanager
def graph_mode() -> Iterator[None]:
    """GRAPH_MODE for the block, whatever the caller's mode is; ``COLORA_MODE=pynative`` keeps PyNative for
    debugging."""
    before = ms.get_context("mode")
    if before == ms.GRAPH_MODE or os.environ.get("COLORA_MODE", "").lower() == "pynative":
        yield
        return
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)


def run(cell: nn.Cell, *args: Any) -> Any:
    """Call a Cell with tensors in graph mode, through the graph cache where it has to be compiled. Any thread may;
    MindSpore runs one graph at a time.

    Raises:
        KernelError: a custom operator refused an argument; the message names operator, argument and value.
    """
    with _running:
        return _run(cell, args)


def _run(cell: nn.Cell, args: tuple) -> Any:
    global _compilations
    known = _compiled.setdefault(cell, set())
    # A Cell that was compiled for unknown dimensions (set_inputs) says so: another shape is no other graph.
    any_shape = getattr(cell, "any_shape", False)
    shapes = () if any_shape else tuple((str(a.dtype), a.shape) if isinstance(a, Tensor) else repr(a) for a in args)
    new = shapes not in known
    try:
        with graph_mode():
            if new and _graphs is not None and ms.get_context("mode") == ms.GRAPH_MODE:
                result = _graphs.call(cell, args)
            else:
                result = cell(*args)
    except RuntimeError as error:
        reason = last_error()
        if "AOT kernel" in str(error) and reason:
            raise KernelError(reason) from error
        raise
    known.add(shapes)
    _compilations += new
    return result


def compilations(cell: nn.Cell) -> int:
    """How many graphs have been compiled for a Cell that was called through :func:`run`."""
    return len(_compiled.get(cell, ()))


def all_compilations() -> int:
    """How many graphs :func:`run` has compiled, or read from the graph cache, in this process: a call that changes this
    number says nothing of speed."""
    return _compilations
