"""Files that are whole or absent: atomic writes, checksums, manifests, and the lock of a folder."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
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


def write_file(path: Path, parts: str | Iterable[bytes]) -> None:
    """Write a file atomically. If that fails, as on a full disk, no part of it is left."""
    if path.exists():
        check_regular(path)  # replacing a device such as /dev/stdout would break it
    temporary = path.with_name(path.name + ".tmp")
    with name_in_errors(path):
        try:
            with open(temporary, "wb") as file:
                for part in [parts.encode()] if isinstance(parts, str) else parts:
                    file.write(part)
            atomic_rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a file. If that fails, as on a full disk, the file is unchanged."""
    with name_in_errors(path), open(path, "a+b", buffering=0) as file:
        size, data = file.tell(), line.encode() + b"\n"
        if size:
            file.seek(-1, os.SEEK_END)
            data = data if file.read() == b"\n" else b"\n" + data  # the last line may be incomplete
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def name_in_errors(path: Path) -> Iterator[None]:
    """Set the file name of an `OSError` from a `with` block; Python sets it only if opening fails."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises `UserError` if the file is missing, not a regular file, or corrupt."""
    check_regular(path)
    try:
        value = json.loads(path.read_bytes(), parse_int=parse_int)
    except (ValueError, RecursionError) as error:  # invalid JSON, invalid UTF-8, nested too deep
        raise UserError(f"{path} is corrupt: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is corrupt: it does not contain a JSON object")
    return value


def check_regular(path: Path) -> None:
    """Raise `UserError` unless a path is a regular file: reading a pipe or a device could block."""
    if not path.is_file():
        raise UserError(f"{path} is {'not a regular file' if path.exists() else 'missing'}")


def parse_int(digits: str) -> int:
    """Return an integer of a JSON file. Raises `ValueError` for one that does not fit in 64 bits."""
    if len(digits) > 19 or abs(int(digits)) >= 2**63:
        raise ValueError(f"the number {digits[:19]}... is too large")
    return int(digits)


def write_manifest(path: Path, value: dict) -> None:
    """Write a JSON object with a checksum of its content."""
    write_json(path, value | {"checksum": checksum_json(value)})


def check_manifest(path: Path, value: dict, shape: dict) -> dict:
    """Return the content of a manifest, the JSON object in `path`, without its checksum.

    Manifests of earlier versions have no checksum. Raises `UserError` if the checksum is wrong, or a field is missing
    or has another `shape`.
    """
    value = dict(value)
    if value.pop("checksum", None) not in (None, checksum_json(value)):
        raise UserError(f"{path} is corrupt: its own checksum is wrong")
    for name, kind in shape.items():
        if not has_shape(value.get(name), kind):
            raise UserError(f"{path} is corrupt: {name} is {str(value.get(name))[:60]!r}")
    return value


def checksum_json(value: dict) -> str:
    """Return the SHA-256 of a JSON value, which does not depend on spaces or on the order of names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def has_shape(value: Any, shape: Any) -> bool:
    """Return whether a JSON value has a shape.

    Shapes are: a type; `int`, which stands for a count and excludes negative numbers; [shape], a list; {"name": shape},
    an object with these fields at least; {str: shape}, an object with any fields; and a tuple of alternatives.
    """
    if isinstance(shape, tuple):
        return any(has_shape(value, alternative) for alternative in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        fields = dict.fromkeys(value, shape[str]) if str in shape else shape
        return all(has_shape(value.get(name), field) for name, field in fields.items())
    if shape is None:
        return value is None
    if isinstance(value, bool):
        return shape is bool
    if shape is int:
        return isinstance(value, int) and value >= 0
    return isinstance(value, (int, float) if shape is float else shape)


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
