"""Checkpoints of a training run: written whole or not at all, restored to the last bit.

A checkpoint is a folder ``checkpoint-000120`` with

    state.safetensors   trained parameters, both moments of the optimizer, random generators, the streams of dropout
    state.json          update, position in the data, best result, digest of the tensors, recipe

It is written under a temporary name, flushed to disk and renamed, so that a folder with that name
is complete even if the machine stops in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mindspore as ms
from mindspore import Parameter, Tensor

from colora_ms.adapters.patterns import in_order
from colora_ms.errors import CheckpointError
from colora_ms.files import replacing, replacing_folder

if TYPE_CHECKING:
    from colora_ms.training.optimizer import AdamW

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{6,})")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` updates."""
    return f"checkpoint-{step:06d}"


def atomic_folder(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    """A temporary folder that becomes ``path``, flushed to the disk, when the block ends without an error.

    An existing folder is replaced; on an error it stays as it was and the temporary one is removed.

    Raises:
        CheckpointError: the folder cannot be written (names the reason, for example a full disk).
    """
    return replacing_folder(path, lambda reason: CheckpointError(f"cannot write {path}: {reason}"))


def writing(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    """A temporary file name that becomes ``path``, flushed to the disk, when the block ends without an error.

    Raises:
        CheckpointError: the file cannot be written.
    """
    return replacing(path, lambda reason: CheckpointError(f"cannot write {path}: {reason}"), flush=True)


def check_writable(folder: str | Path) -> None:
    """Create ``folder`` if needed and write a test file into it, before anything long begins.

    Raises:
        CheckpointError: it is a file, or cannot be created or written.
    """
    folder = Path(folder)
    probe = folder / f".write-test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(f"the output folder {folder} cannot be written "
                              f"({error.strerror or error}); choose another one") from None


def tensors_of(optimizer: AdamW, streams: Iterable[Parameter] = ()) -> dict[str, np.ndarray]:
    """{name: array} of what a checkpoint keeps: the parameters and moments of an optimizer, and streams, Parameters of
    the model that are not trained but change in training (``dropout_streams``)."""
    return {name: np.ascontiguousarray(item.asnumpy()) for name, item in _named(optimizer, streams)}


def write_checkpoint(folder: str | Path, step: int, tensors: Mapping[str, np.ndarray], state: dict, keep: int = 2,
                     more: Callable[[Path], None] | None = None) -> Path:
    """Write ``checkpoint-<step>`` with any tensors and the states of the random generators.

    Args:
        folder: the run's folder; step: number of updates made.
        tensors: ``{name: array}``, see :func:`tensors_of`.
        state: dictionary of JSON values (position in the data, best result, recipe ...).
        keep: number of newest checkpoints to leave, at least 1.
        more: ``function(temporary folder)`` that writes further files into the checkpoint.

    Returns:
        Path of the new checkpoint.

    Raises:
        CheckpointError: it cannot be written; older checkpoints stay.
    """
    from safetensors.numpy import save
    blob = save({**tensors, **_random_state()})
    values = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(blob).hexdigest(),
              "mindspore": ms.__version__, **state}
    path = Path(folder) / checkpoint_name(step)
    with atomic_folder(path) as temporary:
        (temporary / "state.safetensors").write_bytes(blob)
        (temporary / "state.json").write_text(json.dumps(values, indent=1) + "\n",
                                              encoding="utf-8")
        if more is not None:
            more(temporary)
    for _, old in list_checkpoints(folder)[:-max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def list_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """``[(step, path)]`` of the complete checkpoints below ``folder``, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for item in folder.iterdir():
        match = _NAME.fullmatch(item.name)
        if match and (item / "state.json").is_file():
            found.append((int(match.group(1)), item))
    return sorted(found)


def read_checkpoint(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read and check a checkpoint.

    Args:
        path: a checkpoint folder, or a run's folder (then its newest checkpoint).

    Returns:
        ``(values, tensors)``: the dictionary of state.json, and ``{name: array}``.

    Raises:
        CheckpointError: there is none, or it is damaged or of another format; names an older one
            that could be used.
    """
    path = Path(path)
    if not _NAME.fullmatch(path.name):
        found = list_checkpoints(path)
        if not found:
            raise CheckpointError(f"there is no checkpoint below {path}; start without resuming")
        path = found[-1][1]
    try:
        values = json.loads((path / "state.json").read_text(encoding="utf-8"))
        blob = (path / "state.safetensors").read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error})"
                              f"{_older(path)}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT \
            or not isinstance(values.get("step"), int):
        raise CheckpointError(f"{path}/state.json is not a checkpoint of this version (format "
                              f"{FORMAT}){_older(path)}")
    if hashlib.sha256(blob).hexdigest() != values.get("sha256"):
        raise CheckpointError(f"{path}/state.safetensors is damaged: its digest differs from the "
                              f"one in state.json{_older(path)}")
    from safetensors.numpy import load
    return values, load(blob)


def _older(path: Path) -> str:
    """A hint at a checkpoint before ``path``."""
    earlier = [item for _, item in list_checkpoints(path.parent) if item.name < path.name]
    return f"; resume from {earlier[-1]} instead" if earlier else ""


def changes(old: dict, new: dict) -> list[str]:
    """Texts that say which settings of two recipes differ."""
    texts = []
    for key in new:
        before, now = old.get(key), new[key]
        if isinstance(now, dict) and isinstance(before, dict):
            before, now = in_order(before), in_order(now)
            texts += [f"{key}.{name} was {before.get(name)!r}, is {now.get(name)!r}"
                      for name in {**before, **now} if before.get(name) != now.get(name)]
        elif before != now:
            texts.append(f"{key} was {before!r}, is {now!r}")
    return texts


def restore(optimizer: AdamW, tensors: Mapping[str, np.ndarray], random_state: bool = True,
            streams: Iterable[Parameter] = ()) -> None:
    """Put the tensors of ``read_checkpoint`` back; ``streams`` as for ``tensors_of``.

    Raises:
        CheckpointError: lists every missing, unexpected or mis-shaped tensor; nothing is changed
            then.
    """
    restore_parameters(dict(_named(optimizer, streams)), tensors, random_state)


def restore_parameters(named: Mapping[str, Parameter], tensors: Mapping[str, np.ndarray],
                       random_state: bool = True) -> None:
    """Put the tensors of ``read_checkpoint`` into Parameters.

    Args:
        named: ``{name: Parameter}``, all that the checkpoint must hold.
        tensors: ``{name: array}``; bfloat16 Parameters are kept as float32.
        random_state: whether to put the random generators back, too.

    Raises:
        CheckpointError: lists every missing, unexpected or mis-shaped tensor; nothing is changed
            then.
    """
    problems = [f"{name} is missing" for name in named if name not in tensors]
    for name, value in tensors.items():
        if name.startswith("random."):
            continue
        if name not in named:
            problems.append(f"{name} is not a parameter of this run")
            continue
        dtype = named[name].dtype
        expected = np.dtype(np.float32 if dtype == ms.bfloat16 else ms.dtype_to_nptype(dtype))
        if tuple(value.shape) != tuple(named[name].shape) or value.dtype != expected:
            problems.append(f"{name} has shape {value.shape} {value.dtype}, expected "
                            f"{tuple(named[name].shape)} {expected}")
    if problems:
        shown = "; ".join(problems[:8])
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError("the checkpoint does not fit this model and adapter: " + shown + more)
    for name, item in named.items():
        item.set_data(Tensor(np.array(tensors[name])).astype(item.dtype))
    if random_state:
        _restore_random(tensors)


def _named(optimizer: AdamW, streams: Iterable[Parameter]) -> Iterator[tuple[str, Parameter]]:
    for parameter in optimizer.trained:
        yield f"parameter.{parameter.name}", parameter
    for parameter in (*optimizer.mean, *optimizer.square, *streams):
        yield parameter.name, parameter


def _random_state() -> dict[str, np.ndarray]:
    """The states of Python's, NumPy's and MindSpore's generators as arrays."""
    python = random.getstate()
    numpy: Any = np.random.get_state()
    return {
        "random.python": np.array(python[1], np.int64),
        "random.python_gauss": np.array([] if python[2] is None else [python[2]], np.float64),
        "random.numpy": np.asarray(numpy[1]).astype(np.int64),
        "random.numpy_rest": np.array(numpy[2:], np.float64),
        "random.mindspore": np.ascontiguousarray(ms.get_rng_state().asnumpy()),
    }


def _restore_random(tensors: Mapping[str, np.ndarray]) -> None:
    names = ("python", "python_gauss", "numpy", "numpy_rest", "mindspore")
    if any(f"random.{name}" not in tensors for name in names):
        raise CheckpointError("the checkpoint holds no random states, so the run cannot continue "
                              "exactly")
    python, gauss, numpy, rest, mindspore = (tensors[f"random.{name}"] for name in names)
    random.setstate((3, tuple(int(item) for item in python), float(gauss[0]) if gauss.size else None))
    np.random.set_state(("MT19937", numpy.astype(np.uint32), int(rest[0]), int(rest[1]),
                         float(rest[2])))
    ms.set_rng_state(Tensor(mindspore))
