"""The dataset folder: how its `.npy` arrays are written, completed and opened.

A dataset folder holds one-dimensional `.npy` arrays, which `numpy.load(mmap_mode="r")` opens, and `meta.json`. The
latter is written last and makes the folder complete: contents, source, and the length and SHA-256 of every file.

    text:  train_000000.npy, ..., val_000000.npy   uint16 tokens; every document starts with end of text
    chat:  train_tokens.npy      uint16, all conversations in a row
           train_loss_mask.npy   bool, True for tokens that count in the loss
           train_offsets.npy     int64 (n + 1,): conversation i is tokens[offsets[i] : offsets[i + 1]]
           and the same for val
"""

import contextlib
import hashlib
import heapq
import io
import math
import re
import resource
from pathlib import Path

import numpy as np

from minigpt.cli import UserError, plural
from minigpt.files import check_manifest, lock_folder, read_json, write_file, write_manifest
from minigpt.sources import SOURCE
from minigpt.tokenizer import TOKENIZER_FILE

FORMAT_VERSIONS = {"text": 1, "chat": 2}
SCRIPTS = {"text": "prepare_fineweb.py", "chat": "prepare_dolly.py"}
SPLITS = ("train", "val")
MIN_SPLIT_TOKENS = 17  # a row of 16 tokens and its targets
PROGRESS_FILE = "incomplete.json"  # replaces meta.json while the folder is being written
ARRAY = {"file": str, "length": int, "sha256": str}
SPLIT = {"documents": int, "tokens": int, "files": [ARRAY]}
DATASET = {  # of meta.json; see `has_shape`
    "tokenizer": str,
    "vocab_size": int,
    "source": SOURCE,
    "val_fraction": float,
    "val_fraction_used": (float, None),
    "train": SPLIT,
    "val": SPLIT,
}
CHAT_SPLIT = SPLIT | {"loss_tokens": int}
CHAT_COUNTS = dict.fromkeys(("block_size", "records", "truncated", "dropped", "skipped_empty"), int)
SHAPES = {"text": DATASET, "chat": DATASET | CHAT_COUNTS | {"train": CHAT_SPLIT, "val": CHAT_SPLIT}}
DTYPES = {"<u2": np.uint16, "|b1": np.bool_, "<i8": np.int64}  # of the arrays, by their names in .npy headers
# Shards of other repositories, such as fineweb_train_000001.bin, edufineweb_val_000000.npy and train.bin.
BARE_SHARD = re.compile(r"(?:.*[_-])?(train|val)(?:[_-]?\d+)?\.(?:npy|bin)")
BIN_FORMAT = (20240520, 1)  # magic and version in the header of llm.c's GPT-2 shards


def hash_document(document: bytes, salt: bytes = b"") -> float:
    """Return a number from 0 to 1 that depends on the document alone; each salt gives independent numbers.

    Documents with a hash below `val_fraction` form the validation split, so adding data never moves a document.
    """
    return int.from_bytes(hashlib.blake2b(document, digest_size=8, salt=salt).digest(), "big") / 2**64


class SplitChooser:
    """Chooses the fraction of the documents that is used for validation.

    That is the given one, unless a split would be empty or the validation split too small. Then the documents with the
    lowest hashes form the validation split. Only these are kept.

    Args:
        size: required size of the validation split, in the unit of `add`; of a small corpus, a tenth is enough.
        state: an earlier `state_dict()`, to resume.
    """

    def __init__(self, size: int, state: dict | None = None):
        state = state or {"documents": 0, "total": 0, "highest": 0.0, "lowest": []}
        self.size, self.documents, self.total, self.highest = size, state["documents"], state["total"], state["highest"]
        self.lowest = [(negated, n) for negated, n in state["lowest"]]  # a heap of (-hash, size)
        self.kept = sum(n for _, n in self.lowest)

    def state_dict(self) -> dict:
        """Return the state to resume from."""
        return {name: getattr(self, name) for name in ("documents", "total", "highest", "lowest")}

    def add(self, document_hash: float, size: int) -> None:
        """Count a document."""
        self.documents += 1
        self.total += size
        self.highest = max(self.highest, document_hash)
        if self.kept < self.size or document_hash < -self.lowest[0][0]:
            heapq.heappush(self.lowest, (-document_hash, size))
            self.kept += size
            while self.kept - self.lowest[0][1] >= self.size:
                self.kept -= heapq.heappop(self.lowest)[1]

    def choose(self, val_fraction: float, unit: str, skipped: str) -> float:
        """Return the fraction to use: `val_fraction`, or another one if it leaves a split empty or too small.

        Raises `UserError` if there are too few documents; `unit` and `skipped` describe them in the message.
        """
        if self.documents < 2:
            n_documents = plural(self.documents, f"usable {unit}")
            raise UserError(f"the source has {n_documents} ({skipped}), but each split needs one: give more data")
        if -max(self.lowest)[0] == self.highest:
            raise UserError(f"all {self.documents:,} {unit}s are equal, but each split needs its own: give more data")
        target = min(self.size, max(self.total // 10, MIN_SPLIT_TOKENS))
        selected, fraction = 0, 0.0
        for negated, size in sorted(self.lowest, reverse=True):
            if selected >= target or (selected and selected + size > self.total / 2):
                break
            selected += size
            fraction = math.nextafter(-negated, 1)
        return min(max(val_fraction, fraction), self.highest)


def begin_dataset(folder: Path, meta: dict) -> dict | None:
    """Prepare `folder` for writing the dataset that `meta` describes, and lock it for this process.

    Returns the progress that an interrupted run saved, {} if there is none, or None if the dataset is complete.
    Raises `UserError` if the folder holds anything else, or if another process is writing to it.
    """
    if inspect_folder(folder, meta) is None:
        return None
    lock_folder(folder)
    progress = inspect_folder(folder, meta)  # again, as another process can have completed the dataset
    if progress is not None:
        (folder / "meta.json").unlink(missing_ok=True)
        save_progress(folder, meta, progress)
    return progress


def inspect_folder(folder: Path, meta: dict) -> dict | None:
    """Return the saved progress of the dataset that `meta` describes, {} if there is none, None if it is complete.

    Raises `UserError` if the folder holds anything else.
    """
    complete = (folder / "meta.json").exists()
    if complete or (folder / PROGRESS_FILE).exists():
        file = folder / ("meta.json" if complete else PROGRESS_FILE)
        saved = read_json(file)
        if saved.get("kind") not in tuple(SCRIPTS):  # a checkpoint, a vocabulary, or a folder of another program
            raise UserError(f"{folder} already exists and is not a dataset folder: choose another --out")
        changed = [key for key in meta if saved.get(key) != meta[key]]
        if changed and any(folder.glob("*.npy")):  # without finished arrays nothing can be lost
            differences = "; ".join(
                "the source differs" if key == "source" else f"{key} is {saved.get(key)}, not {meta[key]}"
                for key in changed
            )
            raise UserError(
                f"{folder} already holds another{'' if complete else ', incomplete'} dataset ({differences}):"
                " choose another --out or delete it"
            )
        if not changed:
            saved = check_manifest(file, saved, SHAPES[meta["kind"]] if complete else {"progress": (dict, None)})
            return None if complete else saved.get("progress") or {}
    elif folder.exists() and any(item.name not in (f"{PROGRESS_FILE}.tmp", ".lock") for item in folder.iterdir()):
        raise UserError(f"{folder} already exists and is not a dataset folder: choose another --out")
    return {}


def save_progress(folder: Path, meta: dict, progress: dict) -> None:
    """Save the progress of an incomplete dataset: the writers' states by split, and anything else that is needed."""
    write_manifest(folder / PROGRESS_FILE, meta | {"progress": progress})
    remove_arrays(folder, keep=progress)


def finish_dataset(folder: Path, meta: dict) -> None:
    """Write `meta.json`, which completes the dataset."""
    write_manifest(folder / "meta.json", meta)
    (folder / PROGRESS_FILE).unlink()
    remove_arrays(folder, keep=meta)


def discard_dataset(folder: Path) -> None:
    """Delete an incomplete dataset that running the script again would not complete."""
    remove_arrays(folder, keep={})
    for name in (PROGRESS_FILE, TOKENIZER_FILE, ".lock"):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a mount point, or a symbolic link
        folder.rmdir()


def explain_val_fraction(meta: dict, unit: str) -> str | None:
    """Return a line about the documents used for validation if --val_fraction did not decide; else None."""
    given, used = meta["val_fraction"], meta.get("val_fraction_used", meta["val_fraction"])
    if used == given:
        return None
    n_documents = meta["val"]["documents"]
    lowest = f"{plural(n_documents, unit)} with the lowest hash{'es' * (n_documents > 1)}"
    reason = f"too few fell below --val_fraction {given}" if used > given else f"all fell below --val_fraction {given}"
    return f"validation: the {lowest}, because {reason}"


def remove_arrays(folder: Path, keep: dict) -> None:
    """Delete the arrays that are not named in the metadata or progress `keep`."""
    states = [keep.get(split, {}) for split in SPLITS]
    entries = [entry for state in states for entry in [*state.get("files", []), state.get("partial", {})]]
    names = {entry.get("file") for entry in entries}
    for file in [*folder.glob("*.npy"), *folder.glob("*.npy.tmp")]:
        if file.name not in names:
            file.unlink()


def write_array(file: Path, array: np.ndarray) -> dict:
    """Write one `.npy` file atomically; return its entry for meta.json."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_file(file, (header.getvalue(), array.data))  # np.save does not report a full disk
    digest = hashlib.sha256(header.getvalue())
    digest.update(array.data)
    return {"file": file.name, "length": len(array), "sha256": digest.hexdigest()}


class ShardWriter:
    """Writes one split's documents as shards of `shard_tokens` tokens. A document may span two shards."""

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

    def state_dict(self) -> dict:
        """Return the state to resume from; tokens that do not fill a shard yet are written to a file."""
        partial = write_array(self.folder / f"partial_{self.split}_{self.tokens}.npy", self.buffer[: self.filled])
        return {"documents": self.documents, "tokens": self.tokens, "files": self.shards, "partial": partial}

    def add(self, document: np.ndarray) -> None:
        """Append a document's tokens, including its end of text."""
        self.documents += 1
        self.tokens += len(document)
        while len(document):
            piece = document[: len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(piece)] = piece
            self.filled += len(piece)
            document = document[len(piece) :]
            if self.filled == len(self.buffer):
                self.flush()

    def flush(self) -> None:
        """Write the buffer as the next shard."""
        file = self.folder / f"{self.split}_{len(self.shards):06d}.npy"
        entry = write_array(file, self.buffer[: self.filled])
        self.shards.append(entry | {"documents": self.documents - sum(shard["documents"] for shard in self.shards)})
        self.filled = 0

    def close(self) -> dict:
        """Write the last shard; return the split's entry for meta.json."""
        if self.filled:
            self.flush()
        return {"documents": self.documents, "tokens": self.tokens, "files": self.shards}


def read_meta(folder: Path, kind: str | None = None) -> dict:
    """Return the metadata of a complete dataset folder of this kind; None accepts any kind.

    For bare GPT-2 shards, which have no meta.json, it is inferred. Raises `UserError` if the folder is missing,
    incomplete, or of another kind or format version.
    """
    script = SCRIPTS.get(kind, "prepare_fineweb.py or prepare_dolly.py")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such dataset folder; create it with {script}, or choose another with --data")
    if not (folder / "meta.json").exists():
        if (folder / PROGRESS_FILE).exists():
            raise UserError(f"{folder} is incomplete: run {script} again to complete it")
        return infer_meta(folder, kind)
    file = folder / "meta.json"
    meta = read_json(file)
    if meta.get("kind") not in tuple(SCRIPTS):
        raise UserError(f"{folder} is not a dataset folder: the kind in its meta.json is {meta.get('kind')!r}")
    if kind not in (None, meta.get("kind")):
        raise UserError(f"{folder} holds {meta.get('kind')} data, not {kind}: create one with {script}")
    expected = FORMAT_VERSIONS.get(meta.get("kind"))
    if meta.get("version") != expected:
        raise UserError(
            f"{folder} has format version {meta.get('version')}, expected {expected}: delete it and run {script} again"
        )
    meta = check_manifest(file, meta, SHAPES[meta["kind"]])
    if not all(meta[split]["files"] for split in SPLITS):
        raise UserError(f"{file} lists no files: delete {folder} and run {script} again")
    return meta


def infer_meta(folder: Path, kind: str | None) -> dict:
    """Return metadata for shards of other GPT-2 repositories: `.npy` or `.bin` files without meta.json."""
    shards: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in sorted(folder.iterdir()):
        if match := BARE_SHARD.fullmatch(file.name):
            shards[match[1]].append(file)
    if kind == "chat":
        raise UserError(f"{folder} is incomplete or not a dataset: it has no meta.json")
    if not all(shards.values()):
        raise UserError(
            f"{folder} is incomplete or not a dataset: it has no meta.json, and no shards of both splits, such as"
            " NAME_train_000001.bin (or .npy) and NAME_val_000000.bin"
        )
    if len({file.suffix for files in shards.values() for file in files}) > 1:
        raise UserError(f"{folder} holds shards in .npy and .bin files: keep one of the two formats")
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds nanoGPT's character tokens: their vocabulary, meta.pkl, is a pickle and is never loaded;"
            " prepare the text with prepare_fineweb.py --files input.txt --tokenizer bytes"
        )
    raise_file_limit()
    meta: dict = {"kind": "text", "tokenizer": "gpt2"}
    for split, files in shards.items():
        arrays = [open_array(file) for file in files]
        entries = [
            {"file": file.name, "length": len(array), "ends_sha256": sha256_of_ends(array)}
            for file, array in zip(files, arrays, strict=True)
        ]
        meta[split] = {"tokens": sum(map(len, arrays)), "files": entries}
    return meta


def sha256_of_ends(array: np.ndarray, length: int = 500_000) -> str:
    """Return a checksum of an array's start and end, to identify a dataset without reading it whole."""
    return hashlib.sha256(array[:length].tobytes() + array[-length:].tobytes()).hexdigest()


def open_arrays(folder: Path, meta: dict) -> dict[str, list[np.ndarray]]:
    """Map the arrays of each split into memory, in the order of meta.json."""
    entries = {split: [(entry["file"], entry["length"]) for entry in meta[split]["files"]] for split in SPLITS}
    raise_file_limit()
    for name, _ in [entry for split in SPLITS for entry in entries[split]]:
        if not re.fullmatch(r"(part_\d+_of_\d+/)?[^/\0]+", name) or Path(name).name in ("", ".", ".."):
            raise UserError(f"{folder}/meta.json names {name!r}, which is not a file in the folder or in a part of it")
    return {split: [open_array(folder / name, length) for name, length in entries[split]] for split in SPLITS}


def raise_file_limit() -> None:
    """Allow as many open files as the system does: each mapped array keeps its file open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def open_array(file: Path, length: int | None = None) -> np.ndarray:
    """Map a one-dimensional array into memory. Raises `UserError` if it is missing, corrupt or of another length."""
    is_bin = file.suffix == ".bin"
    fix = "download or write it again" if is_bin else f"delete {file.parent} and prepare it again"
    if not file.is_file():
        raise UserError(f"{file} is {'not a regular file' if file.exists() else 'missing'}: {fix}")
    try:
        array = open_bin(file) if is_bin else open_npy(file)
    except ValueError as error:
        raise UserError(f"{file} is corrupt or truncated: {error}; {fix}") from None
    if length not in (None, len(array)):
        raise UserError(f"{file} has {len(array)} entries, expected {length} from its meta.json: {fix}")
    return array


def open_npy(file: Path) -> np.ndarray:
    """Map a one-dimensional array into memory. Raises `ValueError` if the header is not exactly one that NumPy writes.

    `numpy.load` evaluates the header as Python, and raises many types for a corrupt one.
    """
    with open(file, "rb") as stream:
        start = stream.read(10)
        header = stream.read(int.from_bytes(start[8:], "little"))
    descr = "|".join(map(re.escape, DTYPES))
    pattern = rf"{{'descr': '({descr})', 'fortran_order': False, 'shape': \((\d{{1,18}}),\), }} *\n"
    found = re.fullmatch(pattern.encode(), header)
    if start[:8] != b"\x93NUMPY\x01\x00" or found is None:
        raise ValueError(f"it is not a one-dimensional .npy array of {', '.join(DTYPES)}")
    dtype, length, offset = np.dtype(DTYPES[found[1].decode()]), int(found[2]), len(start) + len(header)
    size, expected = file.stat().st_size, offset + length * dtype.itemsize
    if size != expected:
        raise ValueError(f"it has {size:,} bytes, expected {expected:,} for {length:,} entries")
    return np.memmap(file, dtype, mode="r", offset=offset, shape=(length,))


def open_bin(file: Path) -> np.ndarray:
    """Map the uint16 tokens of a `.bin` file: with llm.c's header of 256 int32, or nanoGPT's without one.

    Raises `ValueError` if the header is of another format or does not fit the size.
    """
    size, header = file.stat().st_size, np.fromfile(file, dtype="<i4", count=256)
    if len(header) and header[0] // 10_000 == 2024:  # llm.c's magics are dates; as a token, each is above 50,256
        magic, version, n_tokens = [*header[:3].tolist(), 0, 0][:3]
        if (magic, version) != BIN_FORMAT:
            raise UserError(
                f"{file} has magic {magic} and version {version} in its header, expected {BIN_FORMAT[0]} and"
                f" {BIN_FORMAT[1]}: only GPT-2 tokens in uint16 are supported, not other files of llm.c, such as"
                " Llama 3's tokens in uint32 (magic 20240801)"
            )
        expected = 1024 + 2 * n_tokens
        if size != expected:
            raise ValueError(f"it has {size:,} bytes, expected {expected:,} for the {n_tokens:,} tokens in its header")
        offset = 1024
    else:
        offset, n_tokens = 0, size // 2
        if size % 2:
            raise ValueError(f"it has an odd number of bytes, {size:,}, expected uint16 tokens")
    if n_tokens == 0:
        raise ValueError("it holds no tokens")
    return np.memmap(file, dtype=np.uint16, mode="r", offset=offset, shape=(n_tokens,))
