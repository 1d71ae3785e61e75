"""Files on disk that are whole or absent: written beside their place, flushed, renamed; described by checksums; and the
lock that keeps a folder for one process."""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from cli import UserError


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself: a power cut no longer takes them away."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file or folder its real name in one step."""
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that a reader sees whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    publish(temporary, path)


def read_json(path: Path) -> dict:
    """Read a JSON object.  Raises `UserError` where the file is damaged."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nested without end
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value


def lock(folder: Path) -> int:
    """Keep a folder for this process until it ends, however it ends: the kernel frees what a dead process held.

    Returns an open file descriptor, which holds the lock.  Raises `UserError` where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another folder") from None
    return handle
