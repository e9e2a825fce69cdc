"""Files and folders that are written whole or not at all, and JSON files that are read with a limit to their size."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Union

from colora_ms.errors import CheckpointError, ColoraError

PathLike = Union[str, "os.PathLike[str]"]

#: Bytes of a JSON file, at most, if nothing else is said: the index of a model with a hundred thousand tensors.
JSON_BYTES = 64 << 20


def read_json(path: PathLike, error: type[ColoraError] = CheckpointError, limit: int = JSON_BYTES) -> object:
    """A JSON file as a Python value.

    Args:
        path: the file.
        error: the class of the error to raise.
        limit: bytes that the file may have.

    Raises:
        CheckpointError (or ``error``): missing, unreadable, too large, or not JSON.
    """
    try:
        size = os.path.getsize(path)
        if size > limit:
            raise error(f"{path} has {size} bytes, expected a JSON file of at most {limit}")
        with open(path, encoding="utf-8") as file:
            text = file.read(limit + 1)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not valid JSON: {reason}") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise error(f"{path} is not valid JSON: {reason}") from None


@contextlib.contextmanager
def replacing(path: PathLike, refusal: Callable[[str], Exception], flush: bool = False) -> Iterator[Path]:
    """A temporary file name that becomes ``path`` when the block ends without an error.

    Args:
        path: the file to write; an existing one stays as it was if the block fails.
        refusal: the error to raise, made from the reason (a text), if the file cannot be written.
        flush: flush the file to the disk before it takes its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: PathLike, refusal: Callable[[str], Exception], keep: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``path``, flushed to the disk, when the block ends without an error.

    Args:
        path: the folder to write, its parents are made; what stands there is replaced, or stays as it was if the block
            fails.
        refusal: the error to raise, made from the reason (a text), if the folder cannot be written.
        keep: take over what the old folder holds beside the new files, as hard links where the file system has them.
    """
    path, work = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=path.parent))
        os.chmod(work, 0o777 & ~_umask())  # mkdtemp makes private folders
        yield work
        for item in sorted(work.rglob("*")):
            if not item.is_symlink():
                flush_to_disk(item)
        if keep and path.is_dir():
            _link_others(path, work)
        flush_to_disk(work)
        _swap(work, path)
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def flush_to_disk(path: PathLike) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link_others(old, new):
    """Take over the entries of a folder that a new one lacks."""
    for entry in old.iterdir():
        if os.path.lexists(new / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source, target):
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new, path):
    """Put the folder ``new`` in the place of ``path``; what stood there is put back if that fails, else removed."""
    if not os.path.lexists(path):
        os.rename(new, path)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        old = aside if path.is_dir() and not path.is_symlink() else aside / path.name
        try:
            os.rename(path, old)  # a folder takes the place of the empty one
            try:
                os.rename(new, path)
            except OSError:
                os.rename(old, path)
                raise
        finally:
            if os.path.lexists(path):
                shutil.rmtree(aside, ignore_errors=True)
    flush_to_disk(path.parent)


def _umask():
    current = os.umask(0)
    os.umask(current)
    return current
