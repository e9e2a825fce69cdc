"""GGUF models in several files: any part opens the whole, and what is wrong with the parts is said."""

import os
import shutil
import struct

import numpy as np
import pytest

from colora_ms.errors import CheckpointError, ColoraError
from colora_ms.models.checkpoint import open_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_files import write_gguf  # noqa: E402


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(the tiny model, the paths of its parts)."""
    folder = tmp_path_factory.mktemp("parts")
    source = write_gguf(folder / "tiny.gguf", "qwen3", split_max_tensors=9)
    return source, sorted(folder.iterdir())


@pytest.fixture
def copies(parts, tmp_path):
    return [shutil.copy(path, tmp_path) for path in parts[1]]


def refused(path, *words):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 500


def test_any_part_opens_the_whole(parts):
    source, paths = parts
    assert len(paths) > 2 and paths[0].name == f"tiny-00001-of-0000{len(paths)}.gguf"
    for path in [*paths, paths[0].parent]:
        opened = open_checkpoint(str(path))
        assert list(opened.tensors) == list(source.tensors)
        for name, value in source.tensors.items():
            np.testing.assert_array_equal(opened.tensors[name], value, err_msg=name)
        assert opened.config.to_hf() == dict(source.config.to_hf(), torch_dtype="float32")


def test_from_another_working_folder(parts, monkeypatch):
    monkeypatch.chdir(parts[1][0].parent)
    assert len(open_checkpoint(parts[1][1].name).tensors) == len(parts[0].tensors)


def test_a_missing_part_is_named(copies):
    for index in range(len(copies)):
        os.rename(copies[index], copies[index] + ".away")
        for other in copies[:index] + copies[index + 1:]:
            refused(other, f"part {index + 1}", os.path.basename(copies[index]), "missing")
        os.rename(copies[index] + ".away", copies[index])


def test_parts_in_the_wrong_order(copies):
    os.rename(copies[0], copies[0] + ".away")
    os.rename(copies[1], copies[0])
    os.rename(copies[0] + ".away", copies[1])
    refused(copies[2], "is called part 1", "says that it is part 2")
    refused(copies[0], "is called part 1", "says that it is part 2")


def test_a_doubled_tensor(copies, tmp_path):
    data = open(copies[1], "rb").read()
    number = data.index(b"split.no") + len(b"split.no") + 4
    twin = bytearray(data)
    twin[number:number + 2] = struct.pack("<H", 2)
    with open(copies[2], "wb") as file:
        file.write(twin)
    refused(copies[0], "blk.", copies[1], copies[2])


def test_a_part_under_another_name(copies, tmp_path):
    other = tmp_path / "model.gguf"
    shutil.copy(copies[1], other)
    refused(other, "part 2", "NAME-00002-of-")
    wrong = tmp_path / "tiny-00002-of-00007.gguf"
    shutil.copy(copies[1], wrong)
    refused(wrong, "one of 7 parts", "says that there are")


def test_parts_of_two_models(copies, tmp_path):
    data = open(copies[1], "rb").read()
    at = data.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    changed = bytearray(data)
    changed[at:at + 4] = struct.pack("<i", 77)
    with open(copies[1], "wb") as file:
        file.write(changed)
    refused(copies[0], copies[1], "split.tensors.count=77")


def test_a_folder_with_two_models(copies, tmp_path):
    write_gguf(tmp_path / "another.gguf", "llama_linear")
    refused(tmp_path, "name the one to open")


@pytest.mark.parametrize("value", [0, 65535])
def test_counts_that_cannot_be(copies, value):
    data = bytearray(open(copies[0], "rb").read())
    at = data.index(b"split.count") + len(b"split.count") + 4
    data[at:at + 2] = struct.pack("<H", value)
    with open(copies[0], "wb") as file:
        file.write(data)
    with pytest.raises(ColoraError):
        open_checkpoint(copies[0])


def test_names_never_lead_out_of_the_folder(copies, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    shutil.copy(copies[0], inside)
    refused(inside / os.path.basename(copies[0]), "missing")
