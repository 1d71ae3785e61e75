"""Records from datasets on the Hugging Face Hub and from local files.

Every source iterates over (location, record): a dict, and its location for error messages, "notes.jsonl line 7".
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.cli import UserError, check_range, plural
from minigpt.files import read_json, sha256
from minigpt.readers import MAX_RECORD_MB, RECORD_SUFFIXES, Record, check_column, data_suffix, read_files

TEXT_SOURCE_SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
BATCH_CHARS = 4_000_000
SOURCE = {  # the shape of a source's `metadata()`, see `has_shape`
    **dict.fromkeys(("dataset", "name", "revision", "split"), (str, None)),
    "files": ([{"file": str}], None),
}
SOURCE |= {"mix": ([SOURCE | {"weight": float}], None), "val": (SOURCE, None)}


class NetworkError(UserError):
    """A dataset on the hub cannot be read; running the same command again may succeed."""


@dataclass(frozen=True)
class SourceConfig:
    """The flags of scripts that read texts or conversations; their defaults are in the scripts."""

    dataset: str
    """A dataset on the Hugging Face Hub."""
    out: Path
    """The folder to write."""
    name: str | None = None
    """Configuration of the dataset; default: sample-10BT for FineWeb-Edu, else the dataset's default."""
    split: str = "train"
    """Split of the dataset, or of a folder with several splits saved by datasets.save_to_disk."""
    files: tuple[str, ...] = ()
    """Local files instead of a dataset: paths, folders or globs; all but Parquet also with .gz or .zst."""
    max_record_mb: int = MAX_RECORD_MB
    """Longest line of .jsonl files and longest value of .csv files, in MB."""

    def check(self, *others: str) -> None:
        """Raise `UserError` if more than one of --files, --dataset and `others` is given, or for invalid values."""
        check_range("max_record_mb", self.max_record_mb, 1, 1_000_000)
        names = ("dataset", "name") if self.files else ("dataset", "name", "split")
        hub_flags = any(getattr(self, name) != getattr(type(self), name) for name in names)
        if hub_flags + sum(bool(getattr(self, name)) for name in ("files", *others)) > 1:
            names = ", ".join(f"--{name}" for name in ("files", *others))
            raise UserError(f"{names} and --dataset with --name and --split cannot be combined: give one of them")


@dataclass(frozen=True)
class TextSourceConfig(SourceConfig):
    """The flags of scripts that read texts."""

    text_field: str = "text"
    """The field or column with the text."""
    text_suffixes: tuple[str, ...] = ()
    """Suffixes of other files to read as text, such as .py .c"""

    def check(self, *others: str) -> None:
        super().check(*others)
        for suffix in self.text_suffixes:
            if not suffix.startswith(".") or suffix in RECORD_SUFFIXES:
                rule = f"other than {', '.join(RECORD_SUFFIXES)}, which hold records"
                raise UserError(f"--text_suffixes {suffix}: expected suffixes with their dot, as in .py, {rule}")


@dataclass(frozen=True)
class DatasetConfig(SourceConfig):
    """The flags that prepare_fineweb.py and prepare_dolly.py share."""

    val_fraction: float = 0.005
    """Fraction of the documents or conversations for the validation split."""
    tokenizer: str = "gpt2"
    """gpt2; bytes, which needs no download; or a folder that prepare_tokenizer.py wrote."""

    def check(self, *others: str) -> None:
        super().check(*others)
        check_range("val_fraction", self.val_fraction, 0, 0.5, open_low=True)


class FileSource:
    """Local files as a source that can be resumed."""

    def __init__(self, files: Sequence[Path], text_field: str | None = "text", max_record_mb: int = MAX_RECORD_MB):
        self.files, self.text_field, self.max_record_mb, self.position = files, text_field, max_record_mb, 0

    def take_part(self, index: int, count: int) -> None:
        """Keep every `count`-th file, from file `index` on, which is at least 1. Raises `UserError` for fewer files."""
        check_part_count(count, len(self.files))
        self.files = self.files[index - 1 :: count]

    def metadata(self) -> dict:
        """Return the names, sizes and checksums of the files, for meta.json."""
        return {"files": [{"file": str(f), "bytes": f.stat().st_size, "sha256": sha256(f)} for f in self.files]}

    def records(self, position: int | None = None) -> Iterator[Record]:
        """Yield all records, or those after an earlier value of `self.position`, which counts records."""
        records = read_files(self.files, self.text_field, self.max_record_mb)
        for number, record in enumerate(records, start=1):
            self.position = number
            if number > (position or 0):
                yield record


class HubSource:
    """A dataset on the hub as a source that can be resumed. It is streamed and not kept on disk.

    Records are read in Arrow tables, which `datasets` returns several times faster than single rows.

    Args:
        column: read only this column; None reads all.

    Raises:
        UserError: the dataset does not exist, or the network fails.
    """

    def __init__(self, dataset: str, name: str | None, column: str | None = None, split: str = "train"):
        self.dataset, self.name, self.column, self.split = dataset, name, column, split
        self.label = f"{dataset}/{name}" if name else dataset
        # rows so far; state of the stream before the last table; rows of that table
        self.position = self.start = {"row": 0, "table": None, "done": 0}
        self.revision: str | None = None
        self.part = (1, 1)
        self.open()

    def open(self) -> None:
        """Open the dataset, in its newest revision the first time, at the first row."""
        from datasets import load_dataset
        from huggingface_hub import HfApi

        try:
            self.revision = self.revision or HfApi().dataset_info(self.dataset).sha
            options = {"name": self.name, "split": self.split, "streaming": True, "revision": self.revision}
            stream = load_dataset(self.dataset, **options).with_format("arrow")
        except Exception as error:  # the client raises many types: unknown name, no network, a private dataset
            raise NetworkError(
                f"dataset {self.label} cannot be opened: {first_line(error)}; check the name and the network, or use"
                " --files"
            ) from None
        index, count = self.part
        if count > 1:
            check_part_count(count, stream.num_shards)
            stream = stream.shard(count, index - 1, contiguous=False)
        self.stream = stream

    def take_part(self, index: int, count: int) -> None:
        """Keep every `count`-th file, from file `index` on, which is at least 1. Raises `UserError` for fewer files."""
        self.part = (index, count)
        self.open()

    def metadata(self) -> dict:
        """Return the name and revision of the dataset, for meta.json."""
        split = {} if self.split == "train" else {"split": self.split}
        return {"dataset": self.dataset, "name": self.name, "revision": self.revision} | split

    def records(self, position: dict | None = None) -> Iterator[Record]:
        """Yield all records, or those after an earlier value of `self.position`, without reading earlier files.

        Raises `NetworkError` if the network fails beyond the client's retries.
        """
        if self.position is not self.start:  # a second pass
            self.open()
        self.position = position or self.start
        row, begin, done = (self.position[key] for key in ("row", "table", "done"))
        if begin is not None:
            self.stream.load_state_dict(begin)
        tables = self.stream.iter(batch_size=1000)
        while True:
            try:
                table = next(tables)
            except StopIteration:
                return
            except Exception as error:
                raise NetworkError(
                    f"dataset {self.label} failed after row {row:,}: {first_line(error)}; run the same command again"
                ) from None
            if self.column is not None:
                check_column(self.column, table.column_names, self.label)
                table = table.select([self.column])
            for record in table.slice(done).to_pylist():
                row, done = row + 1, done + 1
                self.position = {"row": row, "table": begin, "done": done}
                yield f"{self.label} row {row}", record
            begin, done = self.stream.state_dict(), 0


def check_part_count(count: int, n_files: int) -> None:
    """Raise `UserError` if there are fewer files than parts."""
    if count > n_files:
        raise UserError(f"--part: {count} parts of {plural(n_files, 'file')}: use at most one part for each file")


def open_text_source(config: TextSourceConfig) -> FileSource | HubSource:
    """Return the local files, or the dataset on the hub. Raises `UserError` if they do not exist."""
    if config.files:
        files = find_files(config.files, (*TEXT_SOURCE_SUFFIXES, *config.text_suffixes), split=config.split)
        return FileSource(files, config.text_field, config.max_record_mb)
    name = config.name or ("sample-10BT" if config.dataset == FINEWEB_EDU else None)
    return HubSource(config.dataset, name, config.text_field, config.split)


def text_batches(source: FileSource | HubSource, position: Any, text_field: str) -> Iterator[tuple[list[str], Any]]:
    """Yield the source's texts after a position, in lists of about `BATCH_CHARS` characters, with the next position.

    Raises `UserError` for a record without text.
    """
    texts: list[str] = []
    n_chars = 0
    for location, record in source.records(position):
        text = record.get(text_field)
        if not isinstance(text, str):
            fields = ", ".join(map(str, record))
            raise UserError(f"{location}: no text in field {text_field!r}; --text_field can be one of: {fields}")
        texts.append(text)
        n_chars += len(text)
        if n_chars >= BATCH_CHARS:
            yield texts, source.position
            texts, n_chars = [], 0
    if texts:
        yield texts, source.position


def find_files(
    patterns: Sequence[str], suffixes: Sequence[str], flag: str = "--files", split: str = SourceConfig.split
) -> list[Path]:
    """Return the files that paths, folders and globs name; those of a folder or glob in alphabetical order.

    A folder saved by `datasets.save_to_disk` stands for its Arrow files; `split` selects one of several splits.
    Raises `UserError`: a pattern that matches nothing, a file with another suffix, a file named twice.
    """
    supported = f"{' or '.join(suffixes)} (also with .gz or .zst, except .parquet)"
    files: list[Path] = []
    has_splits = False
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            where = "" if Path(pattern).is_absolute() else f" in {Path.cwd()}"
            raise UserError(f"{flag} {pattern}: no such file{where}")
        for path in map(Path, paths):
            if (path / "dataset_dict.json").is_file():
                path, has_splits = find_split(path, split, flag), True
            if path.is_dir():
                saved = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
                found = list_saved_dataset(path) if saved else list_folder(path, suffixes)
                if not found:
                    raise UserError(f"{flag} {path}: no file in this folder ends in {supported}")
                print(f"{path}: {plural(len(found), 'file')}")
                files += found
            else:
                files.append(path)
    if split != SourceConfig.split and not has_splits:
        raise UserError(f"--split {split}: {flag} has no folder of several splits saved by datasets.save_to_disk")
    counts = Counter(map(os.path.realpath, files))  # symbolic links can name a file twice
    for file in files:
        if not file.is_file():
            raise UserError(f"{flag} {file}: not a file")
        if data_suffix(file) not in (*suffixes, ".arrow"):
            raise UserError(f"{flag} {file}: a file must end in {supported}")
        if counts[os.path.realpath(file)] > 1:
            raise UserError(f"{flag} {file}: named more than once")
    return files


def find_split(folder: Path, split: str, flag: str) -> Path:
    """Return the folder of a split of a dataset saved by `datasets.save_to_disk`."""
    splits = read_json(folder / "dataset_dict.json").get("splits", [])
    if split not in splits:
        raise UserError(f"{flag} {folder}: no split {split!r}; --split can be one of: {', '.join(map(str, splits))}")
    return folder / split


def list_saved_dataset(folder: Path) -> list[Path]:
    """Return the Arrow files of a dataset saved by `datasets.save_to_disk`."""
    try:
        return [folder / Path(entry["filename"]).name for entry in read_json(folder / "state.json")["_data_files"]]
    except (KeyError, TypeError):
        raise UserError(f"{folder}/state.json is corrupt: it does not list the files of a dataset") from None


def list_folder(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return all files with these suffixes below a folder, hidden ones excluded, in alphabetical order."""
    paths = sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)))
    return [path for path in paths if data_suffix(path) in suffixes and not path.is_dir()]


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
