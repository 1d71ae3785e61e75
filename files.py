"""Files on disk that are whole or absent: written beside their place, flushed, renamed; described by checksums."""

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
    except ValueError as error:  # covers broken JSON and broken UTF-8
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return value
