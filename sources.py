"""Where texts and conversations come from: datasets on the Hugging Face Hub, and people's own files.

Every source is an iterator of (place, record): a dict, and the words that name it in an error, "notes.jsonl line 7".
"""

import glob
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cli import UserError, check
from files import sha256

Record = tuple[str, dict]

TXT_DOCUMENT = 16_384  # characters: a long .txt file becomes documents of about this length


def expand(patterns: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """The files that some paths and globs name, each glob's in alphabetical order.

    Raises `UserError`: a pattern that matches nothing, a file of another kind, a file named twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        check(bool(found), f"--files {pattern}: no such file")
        files += map(Path, found)
    times = Counter(files)
    for file in files:
        check(file.is_file(), f"--files {file}: not a file; name the files in it, as in '{file}/*.jsonl'")
        check(file.suffix in suffixes, f"--files {file}: a file must end in {' or '.join(suffixes)}")
        check(times[file] == 1, f"--files {file}: named more than once")
    return files


def read_files(files: Sequence[Path], text_field: str = "text") -> Iterator[Record]:
    """The records of `.jsonl`, `.parquet` and `.txt` files, one file after the other, never a whole one in memory.

    A `.txt` file's text comes as {text_field: text}.  Raises `UserError` for a file that is damaged.
    """
    for file in files:
        if file.suffix == ".jsonl":
            yield from read_jsonl(file)
        elif file.suffix == ".parquet":
            yield from read_parquet(file, text_field)
        else:
            yield from read_txt(file, text_field)


def read_jsonl(file: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nested without end
                raise UserError(f"{place}: malformed JSON: {error}") from None
            check(isinstance(record, dict), f'{place}: a line must hold a JSON object, as in {{"text": ...}}')
            yield place, record


def read_parquet(file: Path, text_field: str) -> Iterator[Record]:
    """The rows of a Parquet file; of its columns only the text is read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            check_column(text_field, parquet.schema_arrow.names, str(file))
            row = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=[text_field]):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{file} row {row}", record
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; pyarrow's own have no errno
        raise UserError(f"{file}: not a readable Parquet file: {error}") from None


def check_column(name: str, names: Sequence[str], place: str) -> None:
    check(name in names, f"{place}: no column {name!r}; --text_field can be {', '.join(names)}")


def read_txt(file: Path, text_field: str) -> Iterator[Record]:
    """A text file, cut into documents at the first blank line after every `TXT_DOCUMENT` characters.

    So a book becomes many documents: some of them can serve for validation, and a file of any size fits in memory.
    """
    piece: list[str] = []
    length = 0

    def document() -> Record:
        return f"{file} before line {number}", {text_field: "".join(piece)}

    number = 1
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            while line := lines.readline(TXT_DOCUMENT):
                number += line.endswith("\n")
                piece.append(line)
                length += len(line)
                if length >= 4 * TXT_DOCUMENT or (length >= TXT_DOCUMENT and not line.strip()):
                    yield document()
                    piece, length = [], 0
    except UnicodeDecodeError as error:
        raise UserError(f"{file} near line {number}: not UTF-8 text ({error.reason})") from None
    if piece:
        yield document()


class FileSource:
    """Local files as a source that can be taken up where it was left."""

    def __init__(self, files: Sequence[Path], text_field: str = "text"):
        self.files, self.text_field, self.position = files, text_field, 0

    def describe(self) -> dict:
        """What a manifest says of the files: names, sizes and checksums."""
        return {"files": [{"file": str(f), "bytes": f.stat().st_size, "sha256": sha256(f)} for f in self.files]}

    def records(self, position: int | None = None) -> Iterator[Record]:
        """All records, or those after a `position` that this source once had: a plain number of records."""
        for number, record in enumerate(read_files(self.files, self.text_field), start=1):
            self.position = number
            if number > (position or 0):
                yield record


class HubSource:
    """A dataset on the hub, streamed and not kept on disk, as a source that can be taken up where it was left.

    It is read in Arrow tables, which `datasets` hands on several times faster than single rows.

    Args:
        column: the only one that records have; None gives all.

    Raises:
        UserError: no such dataset, or no network.
    """

    def __init__(self, dataset: str, name: str | None, column: str | None = None, split: str = "train"):
        from datasets import load_dataset
        from huggingface_hub import HfApi

        self.dataset, self.name, self.column = dataset, name, column
        self.label = f"{dataset}/{name}" if name else dataset
        self.position = {"row": 0, "table": None, "done": 0}  # rows so far; where their last table begins; rows of it
        try:
            self.revision = HfApi().dataset_info(dataset).sha
            stream = load_dataset(dataset, name=name, split=split, streaming=True, revision=self.revision)
            self.stream = stream.with_format("arrow")
        except Exception as error:  # no such name, no network, a private dataset: the client has a class for each
            raise UserError(
                f"dataset {self.label} cannot be opened: {first_line(error)}; check the name and the network, or use"
                " --files"
            ) from None

    def describe(self) -> dict:
        """What a manifest says of the dataset."""
        return {"dataset": self.dataset, "name": self.name, "revision": self.revision}

    def records(self, position: dict | None = None) -> Iterator[Record]:
        """All records, or those after a `position` that this source once had, without reading the files before.

        Raises `UserError` where the network fails beyond the client's retries.
        """
        self.position = position or self.position
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
                raise UserError(
                    f"dataset {self.label} broke off after row {row:,}: {first_line(error)}; run it again to go on"
                ) from None
            if self.column is not None:
                check_column(self.column, table.column_names, self.label)
                table = table.select([self.column])
            for record in table.slice(done).to_pylist():
                row, done = row + 1, done + 1
                self.position = {"row": row, "table": begin, "done": done}
                yield f"{self.label} row {row}", record
            begin, done = self.stream.state_dict(), 0


def batched_texts(
    source: FileSource | HubSource, position: Any, text_field: str, characters: int = 4_000_000
) -> Iterator[tuple[list[str], Any]]:
    """The source's texts after a position, in lists of about so many characters, each with the position after it.

    Raises `UserError` for a record without a text.
    """
    texts: list[str] = []
    size = 0
    for place, record in source.records(position):
        text = record.get(text_field)
        if not isinstance(text, str):
            fields = ", ".join(map(str, record))
            raise UserError(f"{place}: no text in field {text_field!r}; --text_field can be one of: {fields}")
        texts.append(text)
        size += len(text)
        if size >= characters:
            yield texts, source.position
            texts, size = [], 0
    if texts:
        yield texts, source.position


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
