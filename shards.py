"""Token datasets on disk: how a folder of `.npy` arrays is written, completed and opened.

A dataset folder holds one-dimensional `.npy` arrays that `numpy.load(mmap_mode="r")` opens, and `meta.json`, written
last, which makes the folder complete: what the data is, where it came from, and the size and SHA-256 of every file.

    text:  train_000000.npy, ..., val_000000.npy   uint16 tokens; every document starts with end-of-text
    chat:  train_tokens.npy    uint16, the conversations one after the other
           train_learned.npy   bool, whether the token is one that the assistant learns to say
           train_offsets.npy   int64, n + 1 of them: conversation i is tokens[offsets[i] : offsets[i + 1]]
           and the same for val

    python shards.py data/fineweb_edu                               # compare every file with its checksum
"""

import contextlib
import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import cli
from cli import Progress, UserError, check
from files import lock, publish, read_json, sha256, write_json

FORMAT_VERSION = 1
SPLITS = ("train", "val")
INCOMPLETE = "incomplete.json"  # in a folder that is being written; holds what meta.json will begin with


# ---- writing -------------------------------------------------------------------------------------------------------


def is_validation(document: bytes, val_fraction: float) -> bool:
    """Whether a document belongs to the validation split: its own hash decides, so added data never moves it across."""
    return is_chosen(document, val_fraction)


def is_chosen(document: bytes, fraction: float, salt: bytes = b"") -> bool:
    """Whether a document is among a fraction of all, by its own hash; another salt chooses independently."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=8, salt=salt).digest(), "big") < fraction * 2**64


def open_output(folder: Path, description: dict) -> dict | None:
    """Make `folder` ready for a dataset that `description` describes, and keep it for this process.

    Returns the progress that an interrupted run of the same description saved, {} where there is none, and None where
    the folder already holds the complete dataset.  Raises `UserError` where it holds anything else, or another process
    is writing to it.
    """
    complete, progress = (folder / "meta.json").exists(), {}
    if complete or (folder / INCOMPLETE).exists():
        held = read_json(folder / ("meta.json" if complete else INCOMPLETE))
        changed = [key for key in description if held.get(key) != description[key]]
        differences = "; ".join(
            "the source is another" if key == "source" else f"{key} is {held.get(key)}, not {description[key]}"
            for key in changed
        )
        check(
            not changed or not any(folder.glob("*.npy")),  # without a finished array there is nothing to lose
            f"{folder} already holds another{'' if complete else ', half-written'} dataset ({differences}):"
            " choose another --out or delete it",
        )
        if complete and not changed:
            return None
        progress = held.get("progress", {}) if not changed else {}
    elif folder.exists():
        foreign = any(item.name not in (f"{INCOMPLETE}.tmp", ".lock") for item in folder.iterdir())
        check(not foreign, f"{folder} already holds something else: choose another --out")
    lock(folder)
    remove_arrays(folder, keep=progress)
    (folder / "meta.json").unlink(missing_ok=True)
    write_json(folder / INCOMPLETE, description | {"progress": progress})
    return progress


def save_progress(folder: Path, description: dict, progress: dict) -> None:
    """Remember how far the work is; `progress` has the writers' states by split, and whatever else is needed."""
    write_json(folder / INCOMPLETE, description | {"progress": progress})
    remove_arrays(folder, keep=progress)


def close_output(folder: Path, meta: dict) -> None:
    """Write `meta.json`: the dataset is complete."""
    write_json(folder / "meta.json", meta)
    (folder / INCOMPLETE).unlink()
    remove_arrays(folder, keep=meta)


def remove_arrays(folder: Path, keep: dict) -> None:
    """Delete the arrays that neither split of a manifest or of a saved progress names."""
    states = [keep.get(split, {}) for split in SPLITS]
    entries = [entry for state in states for entry in [*state.get("files", []), state.get("partial", {})]]
    names = {entry.get("file") for entry in entries}
    for file in [*folder.glob("*.npy"), *folder.glob("*.npy.tmp")]:
        if file.name not in names:
            file.unlink()


def write_array(file: Path, array: np.ndarray) -> dict:
    """Write one `.npy` file whole; returns its entry in the manifest."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "wb") as stream:
            np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
            stream.write(array.data)  # np.save would do, but says nothing of a full disk
        digest = sha256(temporary)
        publish(temporary, file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = error.filename or str(file)
        raise
    return {"file": file.name, "length": len(array), "sha256": digest}


class ShardWriter:
    """One split's documents as shards of `shard_tokens` tokens; the last may be shorter, a document may span two."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, state: dict | None = None):
        self.folder, self.split = folder, split
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = self.documents = self.tokens = 0
        self.shards: list[dict] = []
        if state:
            self.documents, self.tokens, self.shards = state["documents"], state["tokens"], state["files"]
            partial = open_array(folder / Path(state["partial"]["file"]).name, state["partial"]["length"])
            self.filled = len(partial)
            self.buffer[: self.filled] = partial

    def state(self) -> dict:
        """What a writer needs to go on from here; the tokens that fill no shard yet go into a file."""
        partial = write_array(self.folder / f"partial_{self.split}_{self.tokens}.npy", self.buffer[: self.filled])
        return {"documents": self.documents, "tokens": self.tokens, "files": self.shards, "partial": partial}

    def add(self, document: np.ndarray) -> None:
        """Append a document's tokens, its end-of-text included."""
        self.documents += 1
        self.tokens += len(document)
        while len(document):
            piece = document[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(piece)] = piece
            self.filled += len(piece)
            document = document[len(piece) :]
            if self.filled == len(self.buffer):
                self.write()

    def write(self) -> None:
        file = self.folder / f"{self.split}_{len(self.shards):06d}.npy"
        entry = write_array(file, self.buffer[: self.filled])
        self.shards.append(entry | {"documents": self.documents - sum(shard["documents"] for shard in self.shards)})
        self.filled = 0

    def close(self) -> dict:
        """Write what is left; returns the split's entry in the manifest."""
        if self.filled:
            self.write()
        return {"documents": self.documents, "tokens": self.tokens, "files": self.shards}


# ---- reading -------------------------------------------------------------------------------------------------------


def read_meta(folder: Path, kind: str) -> dict:
    """The manifest of a complete dataset folder; one is made up for a folder of bare GPT-2 shards.

    Raises `UserError`: no such folder, half-written, or of another kind or version.
    """
    script = {"text": "prepare_fineweb.py", "chat": "prepare_dolly.py"}.get(kind, "the preparation")
    check(folder.is_dir(), f"{folder}: no such dataset folder; make it with {script}, or name another with --data")
    check(
        not (folder / INCOMPLETE).exists() or (folder / "meta.json").exists(),
        f"{folder} is half-written: run {script} again to complete it",
    )
    if not (folder / "meta.json").exists():
        return bare_meta(folder, kind)
    meta = read_json(folder / "meta.json")
    version = meta.get("version")
    check(version == FORMAT_VERSION, f"{folder} has format version {version}, expected {FORMAT_VERSION}: run {script}")
    check(meta.get("kind") == kind, f"{folder} holds {meta.get('kind')} data, not {kind}: {script} makes that")
    listed = all(isinstance(meta.get(split), dict) and meta[split].get("files") for split in SPLITS)
    check(listed, f"{folder}/meta.json lists no files: run {script}")
    return meta


def bare_meta(folder: Path, kind: str) -> dict:
    """A manifest for shards without one, as other GPT-2 repositories write them: `*_train_*.npy`, `*_val_*.npy`."""
    shards = {split: sorted(folder.glob(f"*{split}_*.npy")) for split in SPLITS}
    check(
        kind == "text" and all(shards.values()),
        f"{folder} is half-written or no dataset: it has no meta.json, and no *train_*.npy and *val_*.npy",
    )
    meta: dict = {"kind": "text", "tokenizer": "gpt2"}
    for split, files in shards.items():
        arrays = [open_array(file) for file in files]
        entries = [
            {"file": file.name, "length": len(array), "ends_sha256": ends_sha256(array)}
            for file, array in zip(files, arrays, strict=True)
        ]
        meta[split] = {"tokens": sum(map(len, arrays)), "files": entries}
    return meta


def ends_sha256(array: np.ndarray, length: int = 500_000) -> str:
    """A checksum of an array's beginning and end: enough to tell datasets apart without reading them whole."""
    return hashlib.sha256(array[:length].tobytes() + array[-length:].tobytes()).hexdigest()


def open_array(file: Path, length: int | None = None) -> np.ndarray:
    """Map a one-dimensional array into memory.  Raises `UserError`: missing, damaged, or not of the expected length."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: delete {file.parent} and prepare it again") from None
    except (ValueError, EOFError) as error:  # a broken header, fewer bytes than the header says, none at all
        raise UserError(f"{file} is damaged or truncated: {error}; delete {file.parent} and prepare it again") from None
    check(isinstance(array, np.ndarray), f"{file} is damaged or truncated: it holds no array")  # but a .npz archive
    check(array.ndim == 1, f"{file} has {array.ndim} dimensions, expected 1")
    check(
        length in (None, len(array)),
        f"{file} has {len(array)} entries, its manifest says {length}: delete {file.parent} and prepare it again",
    )
    return array


def open_arrays(folder: Path, meta: dict) -> dict[str, list[np.ndarray]]:
    """The arrays of each split, in the manifest's order."""
    try:
        named = {split: [(entry["file"], entry["length"]) for entry in meta[split]["files"]] for split in SPLITS}
    except (KeyError, TypeError):
        raise UserError(f"{folder}/meta.json is damaged: delete {folder} and prepare it again") from None
    for name, _ in [entry for entries in named.values() for entry in entries]:
        check(Path(name).name == name, f"{folder}/meta.json names {name!r}, which is not a file in the folder")
    return {split: [open_array(folder / name, length) for name, length in named[split]] for split in SPLITS}


def read_ahead(items: Iterator) -> Iterator:
    """The same items; the next ones are read by a thread of its own while this one is worked on.

    Who leaves early waits some seconds for the item that is being read, as a thread that dies in the middle of C++ can
    take the process with it, but not for one that never comes.
    """
    ready: queue.Queue = queue.Queue(maxsize=1)
    left = threading.Event()

    def read() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if left.is_set():
                    return
            ready.put((None, StopIteration))
        except BaseException as error:
            ready.put((None, error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            item, error = ready.get()
            if error is StopIteration:
                return
            if error is not None:
                raise error
            yield item
    finally:
        left.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # which the reader may be waiting to hand over
        reader.join(timeout=5)


# ---- python shards.py FOLDER ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    folder: Annotated[Path, tyro.conf.Positional]
    """The dataset folder to verify."""


def main(config: Config) -> None:
    """Compare every file of a dataset folder with its length and checksum."""
    check(
        (config.folder / "meta.json").exists(), f"{config.folder} has no meta.json: there are no checksums to compare"
    )
    meta = read_meta(config.folder, read_json(config.folder / "meta.json").get("kind", "text"))
    arrays = open_arrays(config.folder, meta)
    entries = [entry for split in SPLITS for entry in meta[split]["files"]]
    progress = Progress(len(entries), "file")
    for entry in entries:
        whole = sha256(config.folder / entry["file"]) == entry.get("sha256")
        check(
            whole,
            f"{config.folder / entry['file']} is damaged: its checksum is wrong; delete {config.folder} and prepare it"
            " again",
        )
        progress.update(1)
    progress.close()
    size = sum(array.nbytes for split in SPLITS for array in arrays[split]) / 1e6
    print(f"{config.folder} is whole: {len(entries)} files, {size:,.1f} MB")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
