"""Reading of ``adapter_model.bin``: PyTorch's zip of a pickle and raw storages, without running what it says.

A pickle is a program. This reader knows the four names that a dictionary of plain tensors needs and refuses every other
one, so that nothing of the file's choosing is imported or called; sizes are checked before memory is taken. It is still
asked for by name only (``allow_pickle=True``): safetensors is the better format.
"""

import collections
import math
import os
import pickle
import zipfile
from typing import Union

import numpy as np

from colora_ms.errors import AdapterError
from colora_ms.models.safetensors_file import FLOAT_DTYPES, bfloat16_to_float32

WEIGHTS_FILE = "adapter_model.bin"

#: Bytes of the pickle (names and shapes, not the values), at most.
MAX_PICKLE_BYTES = 16 << 20

_STORAGES = {"FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16"}


class PickleFile:
    """One ``.bin`` file, with the face of :class:`colora_ms.models.safetensors_file.SafetensorsFile`.

    Attributes:
        path: as given; entries: ``{name: (dtype, shape, 0, bytes)}``.

    Raises:
        AdapterError: it is no such file, is damaged, or holds anything but a dictionary of floating-point tensors.
    """

    def __init__(self, path: Union[str, os.PathLike]) -> None:
        self.path = os.fspath(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._tensors = self._load(archive)
        except zipfile.BadZipFile:
            raise self._refused("it is no zip archive; files from before PyTorch 1.6 are not read") from None
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError,
                NotImplementedError, RecursionError) as error:
            raise self._refused(str(error) or type(error).__name__) from None
        self.entries = {name: (dtype, array.shape, 0, array.nbytes) for name, (dtype, array) in self._tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, a tuple of ints."""
        return self.entries[name][1]

    def read(self, name: str) -> np.ndarray:
        """One tensor as float32."""
        dtype, array = self._tensors[name]
        if dtype == "BF16":
            return bfloat16_to_float32(array)
        with np.errstate(over="ignore"):
            return array.astype(np.float32)

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor, as a safetensors file would hold them."""
        return np.ascontiguousarray(self._tensors[name][1]).tobytes()

    def _load(self, archive):
        members = {}
        for info in archive.infolist():
            if info.filename in members:
                raise ValueError(f"the member {info.filename!r:.80} occurs twice")
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"the member {info.filename!r:.80} is compressed, which PyTorch does not do")
            members[info.filename] = info
        programs = [name for name in members if name.rsplit("/", 1)[-1] == "data.pkl"]
        if len(programs) != 1:
            raise ValueError(f"it has {len(programs)} members data.pkl, expected one")
        if members[programs[0]].file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {members[programs[0]].file_size} bytes, at most {MAX_PICKLE_BYTES} are "
                             "read")
        folder = programs[0][:-len("data.pkl")]
        order = archive.read(folder + "byteorder") if folder + "byteorder" in members else b"little"
        if order.strip() != b"little":
            raise ValueError(f"its byte order is {order[:20]!r}, only little-endian files are read")

        def storage(kind, key, count):
            name = f"{folder}data/{key}"
            if name not in members:
                raise ValueError(f"the storage {key!r:.80} is missing")
            array = np.frombuffer(archive.read(name), FLOAT_DTYPES[kind])
            if array.size != count:
                raise ValueError(f"the storage {key!r:.80} has {array.size} values, {count} are claimed")
            return array

        with archive.open(programs[0]) as file:
            found = _Reader(file, storage).load()
        if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(value, _Tensor)
                                                  for name, value in found.items()):
            raise ValueError("it holds something else than a dictionary of tensors")
        return {name: (value.kind, value.array) for name, value in found.items()}

    def _refused(self, what):
        return AdapterError(f"{self.path} is not read: {what}. Save the adapter as safetensors (PEFT: "
                            "save_pretrained(..., safe_serialization=True))")


class _Tensor:
    """A rebuilt tensor; no dict or list of the file can pass for one."""

    def __init__(self, kind, array):
        self.kind, self.array = kind, array


class _Storage:
    def __init__(self, kind, array):
        self.kind, self.array = kind, array


def _rebuild(storage, offset, size, stride, *_):
    """``torch._utils._rebuild_tensor_v2`` for contiguous tensors."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise ValueError("a tensor is described in an unknown way")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (offset, *size, *stride)) \
            or len(size) != len(stride) or len(size) > 8:
        raise ValueError(f"a tensor has the impossible size {size!r:.80}")
    step = 1
    for n, s in zip(reversed(size), reversed(stride)):
        if n > 1 and s != step:
            raise ValueError(f"a tensor of size {size!r:.80} is not contiguous")
        step *= n
    count = math.prod(size)
    if offset + count > storage.array.size:
        raise ValueError(f"a tensor of size {size!r:.80} lies outside of its storage of {storage.array.size} values")
    return _Tensor(storage.kind, storage.array[offset:offset + count].reshape(size))


class _Reader(pickle.Unpickler):
    """An unpickler that finds only what plain tensors need."""

    def __init__(self, file, storage):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no dictionary of floating-point tensors "
                                     "needs")

    def persistent_load(self, pid):
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or pid[1] not in _STORAGES.values() \
                or not isinstance(pid[2], str) or not isinstance(pid[4], int):
            raise pickle.UnpicklingError("a storage is described in an unknown way")
        return _Storage(pid[1], self._storage(pid[1], pid[2], pid[4]))
