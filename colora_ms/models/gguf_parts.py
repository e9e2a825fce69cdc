"""GGUF models in several files, ``NAME-00001-of-00003.gguf``: opened from any of them, seen as one file.

The form is that of llama.cpp's ``gguf-split``: every file says its place (``split.no``, from 0), how many there are
(``split.count``) and the number of tensors of all together (``split.tensors.count``); the metadata stand in the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Sequence
from typing import Union

import numpy as np

from colora_ms.errors import CheckpointError
from colora_ms.files import PathLike
from colora_ms.models.formats import StoredWeight
from colora_ms.models.gguf_reader import GgufFile

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def open_gguf(path: PathLike) -> Union[GgufFile, GgufParts]:
    """A GGUF file, or the whole model that it is a part of.

    Args:
        path: a file; of a model in several files any one of them.

    Returns:
        ``GgufFile`` or ``GgufParts``: both have ``path``, ``metadata``, ``value_types``, ``tensors``, ``stored``
        and ``read``.

    Raises:
        CheckpointError: a file is damaged or missing, or the files do not belong together.
    """
    # The tokenizer's reader opens what the checkpoint's has open: a vocabulary takes long to read.
    with contextlib.suppress(OSError):
        state = os.stat(path)
        key = (os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns)
        found = _open_files.get(key)
        if found is None:
            found = _open_files[key] = _opened(path)
        return found
    return _opened(path)


_open_files: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def _opened(path: PathLike) -> Union[GgufFile, GgufParts]:
    file = GgufFile(path)
    count = _whole(file, _COUNT, 1)
    return file if count <= 1 else GgufParts(file, count)


def only_model(folder: str, names: Sequence[str]) -> str:
    """The one GGUF model among the files of a folder: its path.

    Args:
        folder: path; names: of its GGUF files, sorted, not empty.

    Raises:
        CheckpointError: there are several models.
    """
    stems = {match.group(1, 3) if match else name for name in names for match in [_NAME.fullmatch(name)]}
    if len(stems) > 1:
        raise CheckpointError(f"{folder} holds {len(names)} GGUF files ({', '.join(names[:4])}); name the one to open")
    return os.path.join(folder, names[0])


class GgufParts:
    """A GGUF model in several files; see :func:`open_gguf`."""

    def __init__(self, file: GgufFile, count: int) -> None:
        match = _NAME.fullmatch(os.path.basename(file.path))
        number = _whole(file, _NUMBER, None)
        if match is None:
            raise CheckpointError(f"{file.path} is part {number + 1} of a model in {count} files, which are found by "
                                  f"their names; give it back its name, NAME-{number + 1:05d}-of-{count:05d}.gguf")
        if int(match.group(3)) != count:
            raise CheckpointError(f"{file.path} is called one of {int(match.group(3))} parts, but says that there are "
                                  f"{count}; give it back its name")
        folder = os.path.dirname(file.path)
        parts = []
        for index in range(count):
            path = os.path.join(folder, f"{match.group(1)}-{index + 1:05d}-of-{count:05d}.gguf")
            parts.append(file if index + 1 == int(match.group(2)) else self._open(path, index, count, file.path))
        self._check(parts, count)
        self.path, self.metadata, self.value_types = parts[0].path, parts[0].metadata, parts[0].value_types
        self._part_of, self.tensors = {}, {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self._part_of:
                    raise CheckpointError(f"the tensor {name!r} is in {self._part_of[name].path} and in {part.path}; "
                                          "the parts are of two models, or damaged: fetch them again")
                self._part_of[name], self.tensors[name] = part, tensor
        total = _whole(parts[0], _TENSORS, len(self.tensors))
        if total != len(self.tensors):
            raise CheckpointError(f"{self.path} says that its {count} parts hold {total} tensors, but they hold "
                                  f"{len(self.tensors)}; fetch them again")

    @staticmethod
    def _open(path, index, count, given) -> GgufFile:
        if not os.path.isfile(path):
            raise CheckpointError(f"{given} is one of {count} parts, but part {index + 1}, {os.path.basename(path)}, "
                                  "is missing beside it; fetch it too")
        return GgufFile(path)

    @staticmethod
    def _check(parts, count) -> None:
        first = parts[0]
        for index, part in enumerate(parts):
            number, own = _whole(part, _NUMBER, None), _whole(part, _COUNT, 1)
            if (number, own) != (index, count):
                says = f"part {number + 1} of {own}" if number is not None else f"one of {own} file(s)"
                raise CheckpointError(f"{part.path} is called part {index + 1} of {count}, but its content says that "
                                      f"it is {says}; give the parts back their names")
            for key, value in part.metadata.items():
                if key in (_NUMBER, "general.alignment"):
                    continue
                if key not in first.metadata or not _equal(first.metadata[key], value):
                    raise CheckpointError(f"{part.path} has {key}={value!r:.60}, which its first part, {first.path}, "
                                          f"{'does not have' if key not in first.metadata else 'has otherwise'}; the "
                                          "parts are of two models")

    def stored(self, name: str) -> StoredWeight:
        """One tensor as it is stored; see ``GgufFile.stored``."""
        return self._part_of[name].stored(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor dequantized to float32; see ``GgufFile.read``."""
        return self._part_of[name].read(name)


def _whole(file, key, default):
    """A whole number of the metadata, from 0 on."""
    value = file.metadata.get(key, default)
    if value is None or isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{file.path}: the GGUF value {key!r} is {value!r:.60}, expected a whole number: the "
                              "file calls itself a part of a model in several files")
    return value


def _equal(one, other):
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one == other
