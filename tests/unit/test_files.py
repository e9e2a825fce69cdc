"""Files and folders that are written whole or not at all."""

import os

import pytest

from colora_ms import files
from colora_ms.errors import AdapterError, CheckpointError, DataError
from colora_ms.files import read_json, replacing, replacing_folder


def refused(reason):
    return DataError(f"no: {reason}")


def content(folder):
    return {str(one.relative_to(folder)): one.read_text() for one in folder.rglob("*") if one.is_file()}


@pytest.mark.parametrize("text, limit, part", [
    ('{"a": 1}', 7, "8 bytes, expected a JSON file of at most 7"), ("{", 99, "not valid JSON"),
    ("[" * 100000, 1 << 20, "not valid JSON"), (b"\xff\xfe", 99, "not valid JSON"), (None, 99, "cannot be read")])
def test_json_that_is_refused(tmp_path, text, limit, part):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for error in (CheckpointError, AdapterError):
        with pytest.raises(error, match=part) as caught:
            read_json(path, error, limit)
        assert str(path) in str(caught.value)


def test_json(tmp_path):
    (tmp_path / "a.json").write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    assert read_json(tmp_path / "a.json", limit=17) == {"ä": [1, None]}


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a"
    with replacing(path, refused, flush=True) as temporary:
        temporary.write_text("one")
    with pytest.raises(KeyError):
        with replacing(path, refused) as temporary:
            temporary.write_text("two")
            raise KeyError
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a"]


def test_a_folder_takes_the_place_of_whatever_stands_there(tmp_path):
    target, outside = tmp_path / "deep" / "a", tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").write_text("theirs")

    def write(text):
        with replacing_folder(target, refused) as work:
            (work / "in").mkdir()
            (work / "in" / "x").write_text(text)
    write("new")
    assert os.stat(target).st_mode & 0o777 == 0o777 & ~files._umask()
    write("again")
    assert content(target) == {"in/x": "again"}
    for before in ("file", "link", "empty folder"):
        files.shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink()
        if before == "file":
            target.write_text("old")
        elif before == "link":
            target.symlink_to(outside)
        else:
            target.mkdir()
        write(before)
        assert content(target) == {"in/x": before} and not target.is_symlink()
    assert content(outside) == {"theirs": "theirs"} and os.listdir(target.parent) == ["a"]


def test_a_folder_keeps_what_is_not_written_anew(tmp_path):
    target = tmp_path / "a"
    (target / "sub").mkdir(parents=True)
    (target / "x").write_text("old")
    (target / "note").write_text("mine")
    (target / "sub" / "y").write_text("deep")
    (target / "link").symlink_to("nowhere")
    with replacing_folder(target, refused, keep=True) as work:
        (work / "x").write_text("new")
    assert content(target) == {"x": "new", "note": "mine", "sub/y": "deep"}
    assert os.readlink(target / "link") == "nowhere" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch, keep):
    target = tmp_path / "a"
    target.mkdir()
    (target / "x").write_text("old")
    for raised, expected in ((RuntimeError("in between"), RuntimeError), (OSError(28, "No space"), DataError)):
        with pytest.raises(expected, match="in between|no: No space"):
            with replacing_folder(target, refused, keep) as work:
                (work / "x").write_text("new")
                raise raised
    rename, calls = os.rename, []

    def second_fails(source, goal):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "broken disk")
        rename(source, goal)
    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(DataError, match="broken disk"):
        with replacing_folder(target, refused, keep) as work:
            (work / "x").write_text("new")
    assert len(calls) == 3 and content(target) == {"x": "old"} and os.listdir(tmp_path) == ["a"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="no: "):
        with replacing_folder(tmp_path / "file" / "a", refused):
            raise AssertionError("the block must not begin")
