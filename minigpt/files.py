"""Files that are whole or absent: atomic writes, checksums, and the lock of a folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from minigpt.cli import UserError

LOCKS: list[FileLock] = []  # held until the process ends


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk, so that a power cut does not lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_rename(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file or folder and give it its final name in one step."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    atomic_rename(temporary, path)


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises `UserError` if the file is corrupt."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # invalid JSON, invalid UTF-8, nested too deep
        raise UserError(f"{path} is corrupt: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is corrupt: it does not contain a JSON object")
    return value


def lock_folder(folder: Path) -> FileLock:
    """Lock a folder for this process until it ends, however it ends, or until the returned lock is released.

    Raises `UserError` if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by another process: wait for it, or choose another folder") from None
    LOCKS.append(lock)
    return lock
