"""Where texts and conversations come from: datasets on the Hugging Face Hub, and people's own files.

Every source is an iterator of (place, record): a dict, and the words that name it in an error, "notes.jsonl line 7".
"""

import contextlib
import glob
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cli import UserError, check
from files import sha256

Record = tuple[str, dict]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PACKED = (".txt", ".jsonl", ".json")  # kinds that may be compressed as a whole
TXT_DOCUMENT = 16_384  # characters: a long .txt file becomes documents of about this length


def expand(patterns: Sequence[str], kinds: Sequence[str], flag: str = "--files") -> list[Path]:
    """The files of these kinds that some paths, folders and globs name, each glob's in alphabetical order.

    Raises `UserError`: a pattern that matches nothing, a file of another kind, a file named twice.
    """
    known = f"{' or '.join(kinds)} (text also with .gz or .zst)"
    files: list[Path] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        check(bool(found), f"{flag} {pattern}: no such file")
        for path in map(Path, found):
            inside = files_below(path, kinds) if path.is_dir() else [path]
            check(bool(inside), f"{flag} {path}: no file in this folder ends in {known}")
            if path.is_dir():
                print(f"{path}: {len(inside):,} file{'s' if len(inside) > 1 else ''}")
            files += inside
    times = Counter(file.resolve() for file in files)  # a link can name a file, or the folder that it is in, once more
    for file in files:
        check(file.is_file(), f"{flag} {file}: not a file")
        check(kind_of(file) in kinds, f"{flag} {file}: a file must end in {known}")
        check(times[file.resolve()] == 1, f"{flag} {file}: named more than once")
    return files


def files_below(folder: Path, kinds: Sequence[str]) -> list[Path]:
    """All files of these kinds in a folder and its folders, hidden ones left out, in alphabetical order."""
    paths = sorted(map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True)))
    return [path for path in paths if kind_of(path) in kinds and not path.is_dir()]


def kind_of(file: Path) -> str:
    """How its name ends, compression aside: ".jsonl" of notes.jsonl.gz; Parquet is compressed within."""
    inner = Path(file.stem).suffix
    return inner if file.suffix in COMPRESSIONS and inner in PACKED else file.suffix


@contextlib.contextmanager
def open_stream(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed as they are read where its name ends in .gz or .zst.

    Archives of several members or frames are read to their ends.  Raises `UserError` for one that is damaged or cut
    off, which must never pass for a shorter one.
    """
    if file.suffix not in COMPRESSIONS:
        with open(file, "rb") as stream:
            yield stream
        return
    import pyarrow

    with not_readable(file, f"{file.suffix} archive"):
        check(file.stat().st_size > 0, f"{file}: not a readable {file.suffix} archive: it has no bytes")
        with io.BufferedReader(pyarrow.input_stream(file, compression=COMPRESSIONS[file.suffix])) as stream:
            yield stream


@contextlib.contextmanager
def not_readable(file: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a `UserError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; pyarrow's own have no errno
        raise UserError(f"{file}: not a readable {kind}: {error}") from None


def read_files(files: Sequence[Path], text_field: str | None = "text") -> Iterator[Record]:
    """The records of files of all kinds, one file after the other; none but `.json` is ever whole in memory.

    A `.txt` file's text comes as {text_field: text}; of `.parquet` files only that column is read, or all with None.
    Raises `UserError` for a file that is damaged.
    """
    for file in files:
        kind = kind_of(file)
        if kind == ".txt":
            yield from read_txt(file, text_field or "text")
        elif kind == ".parquet":
            yield from read_parquet(file, text_field)
        else:
            yield from (read_json if kind == ".json" else read_jsonl)(file)


def read_jsonl(file: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over."""
    with open_stream(file) as lines:
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


def read_json(file: Path) -> Iterator[Record]:
    """The objects of one JSON list, as Alpaca and ShareGPT are handed about: the only kind that is read whole."""
    with open_stream(file) as stream:
        data = stream.read()
    try:
        records = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: malformed JSON: {error}; a file with a record on each line is a .jsonl") from None
    check(isinstance(records, list), f"{file}: a .json file must hold a list of records")
    for number, record in enumerate(records, start=1):
        check(isinstance(record, dict), f'{file} record {number}: it must be a JSON object, as in {{"text": ...}}')
        yield f"{file} record {number}", record


def read_parquet(file: Path, column: str | None) -> Iterator[Record]:
    """The rows of a Parquet file, of one of its columns or of all."""
    import pyarrow.parquet

    with not_readable(file, "Parquet file"), pyarrow.parquet.ParquetFile(file) as parquet:
        if column is not None:
            check_column(column, parquet.schema_arrow.names, str(file))
        row = 0
        for batch in parquet.iter_batches(batch_size=1024, columns=None if column is None else [column]):
            for record in batch.to_pylist():
                row += 1
                yield f"{file} row {row}", record


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
    with open_stream(file) as stream:
        lines = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        try:
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

    def __init__(self, files: Sequence[Path], text_field: str | None = "text"):
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

        self.dataset, self.name, self.column, self.split = dataset, name, column, split
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
        split = {} if self.split == "train" else {"split": self.split}
        return {"dataset": self.dataset, "name": self.name, "revision": self.revision} | split

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
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
