"""Files that are whole or absent, checksums, and the lock of a folder."""

import hashlib
import subprocess
import sys

import pytest
from conftest import ROOT

from minigpt import files
from minigpt.cli import UserError


def test_sha256_equals_hashlib(tmp_path):
    data = bytes(range(256)) * 9999  # more than one read buffer
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_json_is_read_as_written_and_leaves_no_temporary_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": [1, None, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"b": [1, None, "é"]}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_json(tmp_path / "a.json", {"old": 1})

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(tmp_path / "a.json", {"new": 2})
    assert files.read_json(tmp_path / "a.json") == {"old": 1}


def test_lines_are_appended(tmp_path):
    """An incomplete last line is completed first."""
    for line in ("a", "é"):
        files.append_line(tmp_path / "log", line)
    assert (tmp_path / "log").read_text() == "a\né\n"
    (tmp_path / "log").write_text("a\nb")
    files.append_line(tmp_path / "log", "c")
    assert (tmp_path / "log").read_text() == "a\nb\nc\n"


@pytest.mark.parametrize("text", ["", "{", "[1]", "7"])
def test_corrupt_json_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is corrupt"):
        files.read_json(tmp_path / "a.json")


def test_atomic_rename_replaces_a_file(tmp_path):
    (tmp_path / "new").write_text("new")
    (tmp_path / "final").write_text("old")
    files.atomic_rename(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final").read_text() == "new" and not (tmp_path / "new").exists()


def test_a_folder_is_locked_until_the_lock_is_released(tmp_path):
    lock = files.lock_folder(tmp_path / "deep" / "data")
    with pytest.raises(UserError, match="data is in use by another process: wait for it, or choose another folder"):
        files.lock_folder(tmp_path / "deep" / "data")
    lock.release()
    files.lock_folder(tmp_path / "deep" / "data").release()


def test_a_killed_process_keeps_no_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from minigpt.files import lock_folder\n"
        "lock_folder(Path(sys.argv[1]))\n"  # kept although nothing refers to it here
        "print('locked', flush=True); time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="in use by another process"):
            files.lock_folder(tmp_path)
    finally:
        process.kill()
        process.wait()
    files.lock_folder(tmp_path).release()
