"""Files that are whole or absent."""

import hashlib

import pytest

import files
from cli import UserError


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 9999  # more than the piece that is read at once
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_json_comes_back_and_leaves_no_temporary_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": [1, None, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"b": [1, None, "é"]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"old": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "a.json", {"new": 2})
    assert files.read_json(tmp_path / "a.json") == {"old": 1}


@pytest.mark.parametrize("text", ["", "{", "[1]", "7"])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is damaged"):
        files.read_json(tmp_path / "a.json")


def test_publish_replaces_in_one_step(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "place").write_text("old")
    files.publish(tmp_path / "new", tmp_path / "place")
    assert (tmp_path / "place").read_text() == "new" and not (tmp_path / "new").exists()
