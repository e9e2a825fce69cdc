"""The reader of adapter_model.bin: torch's own files give torch's values, and nothing that a file says is run."""

import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from colora_ms.adapters.peft_format import StoredAdapter
from colora_ms.adapters.pickle_file import PickleFile
from colora_ms.errors import AdapterError
from colora_ms.models.safetensors_file import SafetensorsFile


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchs_file_has_torchs_values(goldens, dtype):
    folder = goldens / "pickle" / dtype
    ours, expected = PickleFile(folder / "adapter_model.bin"), SafetensorsFile(folder / "expected.safetensors")
    assert set(ours.entries) == set(expected.entries) and len(ours.entries) > 0
    for name in expected.entries:
        assert ours.shape(name) == expected.shape(name)
        assert np.array_equal(ours.read(name), expected.read(name))
        assert bytes(ours.raw(name)) == expected.raw(name).tobytes()


def test_refused_unless_asked_for_and_then_the_same_content(goldens, tmp_path):
    folder = goldens / "pickle" / "float32"
    with pytest.raises(AdapterError, match="pickle file"):
        StoredAdapter(folder)
    shutil.copy(folder / "adapter_config.json", tmp_path)
    shutil.copy(folder / "expected.safetensors", tmp_path / "adapter_model.safetensors")
    assert StoredAdapter(folder, allow_pickle=True).digest() == StoredAdapter(tmp_path).digest()


class Call:
    """Pickles as a call of ``os.system``."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def archive(path, program, data=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("a/data.pkl", program)
        for key, value in data:
            file.writestr(f"a/data/{key}", value)
    return path


def test_a_call_is_refused_and_not_made(tmp_path):
    mark = tmp_path / "mark"
    path = archive(tmp_path / "x.bin", pickle.dumps({"w": Call(f"touch {mark}")}))
    with pytest.raises(AdapterError, match="system"):
        PickleFile(path)
    assert not mark.exists()


def tensor_program(offset=0, size="(I2\nt", stride="(I1\nt", count=2):
    """A pickle, protocol 0 in its names, of {"w": tensor} on the storage "0" of float32 values."""
    return (b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" +
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" +
            f"I{count}\ntQI{offset}\n".encode() + size.encode() + stride.encode() + b"I00\nNtRs.")


def test_the_program_of_the_cases_is_readable(tmp_path):
    path = archive(tmp_path / "x.bin", tensor_program(), [("0", np.float32([1, 2]).tobytes())])
    assert PickleFile(path).read("w").tolist() == [1, 2]


@pytest.mark.parametrize("program, data, message", [
    (tensor_program(size="(I3\nt"), [("0", bytes(8))], "outside of its storage"),
    (tensor_program(offset=1), [("0", bytes(8))], "outside of its storage"),
    (tensor_program(size="(I-1\nt"), [("0", bytes(8))], "impossible size"),
    (tensor_program(size="(I1000000\nI1000000\nt", stride="(I1000000\nI1\nt"), [("0", bytes(8))], "outside"),
    (tensor_program(size="(I2\nI1\nt", stride="(I7\nI1\nt"), [("0", bytes(8))], "not contiguous"),
    (tensor_program(count=1 << 40), [("0", bytes(8))], "are claimed"),
    (tensor_program(), [], "is missing"),
    (pickle.dumps([1, 2]), [], "something else"),
    (pickle.dumps({"w": 3}), [], "something else"),
    (tensor_program()[:-9], [("0", bytes(8))], "is not read"),
    (b"", [], "is not read"),
])
def test_damaged_files_are_refused(tmp_path, program, data, message):
    with pytest.raises(AdapterError, match=message):
        PickleFile(archive(tmp_path / "x.bin", program, data))


def test_other_archives_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(AdapterError, match="no zip archive"):
        PickleFile(tmp_path / "x.bin")
    with pytest.raises(AdapterError, match="compressed"):
        PickleFile(archive(tmp_path / "y.bin", tensor_program(), [("0", bytes(8))], zipfile.ZIP_DEFLATED))
