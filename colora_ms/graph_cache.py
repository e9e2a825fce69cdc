"""Compiled graphs kept on disk between processes, keyed by content.

MindSpore numbers the graphs that a process compiles and loads graph number n of its cache folder for the n-th compile,
whatever that graph is: a process that compiles in another order gets another graph's code without an error. So every
process gets a private cache folder here; before a compile the file with the right *content key* is put where MindSpore
will look for it, and afterwards a new file is taken into the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.communication import GlobalComm, get_rank
from mindspore.graph import api

from colora_ms.kernels.aot import library_path
from colora_ms.kernels.ascend import libraries_in_use
from colora_ms.kernels.registry import backend

_ENABLE, _PATH = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"
_WORK_PREFIX = "colora-process-"
_SIMPLE = (bool, int, float, str, type(None))
_DEPENDENCIES = "_get_compile_cache_dep_files"  # the function of mindspore.graph.api that says what a graph depends on


def unsupported() -> str:
    """Why graphs cannot be kept with the MindSpore that is installed, or ""."""
    if callable(getattr(api, _DEPENDENCIES, None)):
        return ""
    return f"MindSpore {ms.__version__} has no mindspore.graph.api.{_DEPENDENCIES}"


class GraphCache:
    """The store of compiled graphs in ``folder``.

    Args:
        folder: where the store lives; made when the first graph is kept.
        fingerprint: text that must be equal for a stored graph to be used (sources, libraries, versions).
    """

    def __init__(self, folder: str | Path, fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.hits = self.misses = 0
        self._work: tempfile.TemporaryDirectory | None = None
        self._count = 0
        # One graph at a time: MindSpore numbers the files of its cache by the order of compilation in the process.
        self._lock = threading.RLock()

    def call(self, cell: nn.Cell, args: tuple) -> Any:
        """Compile ``cell`` for ``args`` (from the store if it is there) and run it; one thread at a time."""
        with self._lock:
            return self._call(cell, args)

    def _call(self, cell: nn.Cell, args: tuple) -> Any:
        key = graph_key(cell, args, self.fingerprint)
        work = self._work_folder()
        if work is None:
            return cell(*args)
        number, self._count = self._count, self._count + 1
        wanted = work / f"compile_cache_{number}.mindir"
        kept = self.folder / "graphs" / key
        wanted.unlink(missing_ok=True)  # left by a compilation that failed
        hit = _copy(kept / "graph.mindir", wanted) and _copy(kept / "dependency.hash", work / "compile_dependency.hash")
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)
        with _caching_on():
            result = cell(*args)
        if not hit:
            self._keep(kept, wanted, work / "compile_dependency.hash")
        wanted.unlink(missing_ok=True)
        return result

    def _work_folder(self) -> Path | None:
        given = os.environ.get(_PATH)
        # A path that the user has set stays; one that a parent process of this package has set does not.
        if self._work is None and (given is None or Path(given).name.startswith(_WORK_PREFIX)):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                holder = tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=self.folder)
            except OSError:
                return None  # an unwritable home only costs the compile time
            self._work = holder
            os.environ[_PATH] = holder.name
        if self._work is None:
            return None
        path = Path(self._work.name) / f"rank_{_rank()}" / "graph_cache"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _keep(self, kept: Path, graph: Path, dependency: Path) -> None:
        if not (graph.is_file() and dependency.is_file()):
            return
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix="new-", dir=kept.parent))
            _copy(graph, staging / "graph.mindir")
            _copy(dependency, staging / "dependency.hash")
            try:
                staging.rename(kept)
            except OSError:
                shutil.rmtree(staging, ignore_errors=True)


def graph_key(cell: nn.Cell, args: tuple, fingerprint: str) -> str:
    """Digest of all that a compiled graph depends on: the kernels in use, the Cell tree's classes, constants and
    parameters, and the arguments' shapes and dtypes."""
    parts = [fingerprint, backend(), str(library_path()), str(ms.get_context("mode")),
             str(ms.get_context("device_target"))]
    parts.extend(f"{path}={digest}" for path, digest in libraries_in_use())
    for name, child in cell.cells_and_names():
        constants = {k: v for k, v in vars(child).items() if not k.startswith("_") and _constant(v)}
        parts.append(f"{name}|{type(child).__module__}.{type(child).__qualname__}|{child.training}")
        parts.extend(f"{k}={_describe(v)}" for k, v in sorted(constants.items()) if k not in _VOLATILE)
    for parameter in cell.get_parameters():
        parts.append(f"{parameter.name}:{parameter.dtype}:{parameter.shape}:{parameter.requires_grad}")
    parts.extend(f"{a.dtype}:{a.shape}" if isinstance(a, Tensor) else repr(a) for a in args)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


# Bookkeeping of MindSpore's own Cells that differs between equal graphs.
_VOLATILE = {"create_time", "instance_count", "total_instance_count", "compile_phase", "current_phase", "phase",
             "arguments_key", "param_prefix", "bprop_debug", "cls_name", "pynative"}


def _constant(value: Any) -> bool:
    if isinstance(value, Parameter):
        return False
    if isinstance(value, Tensor):
        return value.size <= 4096
    return isinstance(value, _SIMPLE) or (isinstance(value, (tuple, list)) and all(_constant(v) for v in value))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        array = value.asnumpy() if value.dtype != ms.bfloat16 else value.astype(ms.float32).asnumpy()
        return f"{value.dtype}{array.shape}{array.tobytes().hex()}"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_describe(v) for v in value) + "]"
    return repr(value)


def _rank() -> int:
    """This process's number in its job, by which MindSpore names the folder of its cache; 0 outside a job."""
    return get_rank() if GlobalComm.INITED else 0


@contextlib.contextmanager
def _caching_on() -> Iterator[None]:
    """MindSpore's cache for one compile; the dependency files are ours, since the entry script says nothing here."""
    before = os.environ.get(_ENABLE)
    dependencies = getattr(api, _DEPENDENCIES)
    os.environ[_ENABLE] = "1"
    setattr(api, _DEPENDENCIES, lambda: [__file__])
    try:
        yield
    finally:
        setattr(api, _DEPENDENCIES, dependencies)
        if before is None:
            del os.environ[_ENABLE]
        else:
            os.environ[_ENABLE] = before


def _copy(source: Path, target: Path) -> bool:
    """Copy a file by a hard link where possible; whether it was there."""
    if not source.is_file():
        return False
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return True


def source_fingerprint(library: str | Path) -> str:
    """Digest of the package's sources, the operators' library and MindSpore's version."""
    digest = hashlib.sha256(ms.__version__.encode())
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    if Path(library).is_file():
        digest.update(Path(library).read_bytes())
    digest.update(json.dumps(np.__version__).encode())
    return digest.hexdigest()
