"""A text dataset that several jobs or machines prepare in parts.

data/large/part_003_of_064/    every 64th input file, from the third on: itself a dataset folder
data/large/meta.json           written when all parts are complete: it lists the files of all parts
"""

import re
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from minigpt.cli import UserError
from minigpt.files import check_manifest, read_json, write_manifest
from minigpt.shards import MIN_SPLIT_TOKENS, SHAPES, SPLITS
from minigpt.tokenizer import Tokenizer

LOCK_TIMEOUT = 60  # in seconds; writing the list takes a moment
PART = SHAPES["text"] | {"kind": str, "version": int, "text_field": str, "shard_tokens": int, "skipped_empty": int}


@dataclass(frozen=True)
class Part:
    """Part `index`, from 1, of `count`."""

    index: int
    count: int

    @property
    def folder_name(self) -> str:
        return f"part_{self.index:03d}_of_{self.count:03d}"


def parse_part(text: str) -> Part:
    """Parse "3/64". Raises `UserError` for another form."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part {text}: expected INDEX/COUNT, from 1/64 to 64/64 for 64 parts")
    return Part(int(match[1]), int(match[2]))


def merge_parts(folder: Path, count: int, tokenizer: Tokenizer) -> dict | None:
    """Write the metadata of the whole dataset if all parts are complete; return it, or None if some are not.

    Their vocabulary is that of `tokenizer`. Raises `UserError` if the parts are of different datasets, or have too
    little text together.
    """
    parts = [folder / Part(i + 1, count).folder_name for i in range(count)]
    if not all((part / "meta.json").is_file() for part in parts):
        return None
    lock = FileLock(folder / ".lock")  # of two parts that end at the same time, the second finds all complete
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout:
        raise UserError(f"{folder} is locked by another process: run the same command again") from None
    with lock:
        metas = [check_manifest(part / "meta.json", read_json(part / "meta.json"), PART) for part in parts]
        first = metas[0]
        for part, meta in zip(parts, metas, strict=True):
            for key in ("kind", "version", "tokenizer", "text_field", "shard_tokens", "val_fraction"):
                if meta[key] != first[key]:
                    fix = "prepare all parts with the same flags"
                    raise UserError(f"{part} has {key} {meta[key]}, {parts[0]} has {first[key]}: {fix}")
            if {**meta["source"], "files": None} != {**first["source"], "files": None}:
                raise UserError(f"{part} has another source or revision than {parts[0]}: delete and prepare it again")
        merged = {key: value for key, value in first.items() if key != "part"}
        merged["source"] = first["source"] | merge_files(metas)
        merged["skipped_empty"] = sum(meta["skipped_empty"] for meta in metas)
        merged |= {split: merge_split(split, parts, metas) for split in SPLITS}
        for split in SPLITS:
            if merged[split]["tokens"] < MIN_SPLIT_TOKENS:
                raise UserError(
                    f"the {split} split of all parts has {merged[split]['tokens']} tokens, expected at least"
                    f" {MIN_SPLIT_TOKENS}: give more text or another --val_fraction"
                )
        tokenizer.save(folder)
        write_manifest(folder / "meta.json", merged)
    return merged


def merge_files(metas: list[dict]) -> dict:
    """Return the local files of all parts in their original order, if the source is files."""
    lists = [meta["source"].get("files") for meta in metas]
    if lists[0] is None:
        return {}
    return {"files": [files[row] for row in range(len(lists[0])) for files in lists if row < len(files)]}


def merge_split(split: str, parts: list[Path], metas: list[dict]) -> dict:
    """Return a split's entry: the sums of the parts, and their files by their paths."""

    pairs = [(part, entry) for part, meta in zip(parts, metas, strict=True) for entry in meta[split]["files"]]
    counts = {name: sum(meta[split][name] for meta in metas) for name in ("documents", "tokens")}
    return counts | {"files": [entry | {"file": f"{part.name}/{entry['file']}"} for part, entry in pairs]}
