"""Records from local files: JSON lines, JSON, CSV, Parquet, Arrow and text, also compressed.

Every reader yields (location, record): a dict, and its location for error messages, "notes.jsonl line 7".
"""

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from minigpt.cli import UserError, plural

Record = tuple[str, dict]
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")  # all other files are text
MAX_RECORD_MB = 100  # a line of JSON or a CSV field; a small archive can hold a line that fills the memory
MAX_JSON_BYTES = 2_000_000_000  # of a .json file, which is read into memory whole
BATCH_ROWS = 16  # of a Parquet file, decoded at a time: a small file can hold rows of megabytes
DOCUMENT_CHARS = (1024, 16_384)  # shortest and longest target length when text files are cut into documents


def read_files(
    files: Sequence[Path], text_field: str | None = "text", max_record_mb: int = MAX_RECORD_MB
) -> Iterator[Record]:
    """Yield the records of files, one file after the other. Only `.json` files are read into memory whole.

    A text file is cut into documents, {text_field: text} each. Of Parquet, Arrow and CSV files this column is required;
    None accepts any. Raises `UserError` for a corrupt file, or a line of JSON or a CSV field of more than
    `max_record_mb`.
    """
    total_bytes = sum(file.stat().st_size for file in files)
    shortest, longest = DOCUMENT_CHARS
    document_chars = min(max(shortest, total_bytes // 100), longest)  # about a hundred documents of a small corpus
    for file in files:
        suffix = data_suffix(file)
        if suffix == ".jsonl":
            yield from read_jsonl(file, max_record_mb)
        elif suffix == ".json":
            yield from read_json_list(file)
        elif suffix == ".csv":
            yield from read_csv(file, text_field, max_record_mb)
        elif suffix == ".parquet":
            yield from read_parquet(file, text_field)
        elif suffix == ".arrow":
            yield from read_arrow(file, text_field)
        else:
            yield from read_text(file, text_field or "text", document_chars)


def data_suffix(file: Path) -> str:
    """Return a file's suffix without the compression: ".jsonl" for notes.jsonl.gz."""
    inner = Path(file.stem).suffix
    return inner if file.suffix in COMPRESSIONS and inner not in ("", ".parquet", ".arrow") else file.suffix


def read_jsonl(file: Path, max_record_mb: int) -> Iterator[Record]:
    """Yield one record per line; blank lines are skipped."""
    max_bytes = max_record_mb * 1_000_000
    with open_stream(file) as stream:
        lines = iter(lambda: stream.readline(max_bytes + 1), b"")
        for number, line in enumerate(lines, start=1):
            location = f"{file} line {number}"
            if len(line) > max_bytes:
                raise UserError(f"{location}: longer than {max_record_mb} MB: split it, or raise --max_record_mb")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # invalid JSON, invalid UTF-8, nested too deep
                raise UserError(f"{location}: malformed JSON: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f'{location}: a line must be a JSON object, as in {{"text": ...}}')
            yield location, record


def read_json_list(file: Path) -> Iterator[Record]:
    """Yield the objects of one JSON list, the format in which Alpaca and ShareGPT are published."""
    with open_stream(file) as stream:
        data = stream.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{file}: more than {MAX_JSON_BYTES:,} bytes: a large file must be .jsonl, one record per line")
    try:
        records = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: malformed JSON: {error}; a file with one record per line must end in .jsonl"
        ) from None
    if not isinstance(records, list):
        raise UserError(f"{file}: a .json file must be a list of records")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(f'{file} record {number}: it must be a JSON object, as in {{"text": ...}}')
        yield f"{file} record {number}", record


def read_csv(file: Path, column: str | None, max_record_mb: int) -> Iterator[Record]:
    """Yield the rows of a CSV file by the names in its first line. A quoted value may hold commas and line breaks."""
    csv.field_size_limit(max_record_mb * 1_000_000)  # a missing quote makes the rest of the file one field
    row = 0
    with open_stream(file) as stream:
        rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), strict=True)
        try:
            names = next(rows, [])
            if column is not None and names:
                check_column(column, names, str(file))
            for values in filter(None, rows):  # without blank lines
                row += 1
                if len(values) != len(names):
                    sizes = f"{plural(len(values), 'value')} for {plural(len(names), 'column')}"
                    raise UserError(f"{file} row {row}: {sizes}; a value with a comma must be in double quotes")
                yield f"{file} row {row}", dict(zip(names, values, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} near row {row + 1}: malformed CSV: {error}") from None


def read_parquet(file: Path, column: str | None) -> Iterator[Record]:
    """Yield the rows of a Parquet file, with one column or with all."""
    import pyarrow.parquet

    with report_corrupt(file, "Parquet file"), pyarrow.parquet.ParquetFile(file) as parquet:
        if column is not None:
            check_column(column, parquet.schema_arrow.names, str(file))
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=None if column is None else [column])
        yield from number_rows(file, batches)


def read_arrow(file: Path, column: str | None) -> Iterator[Record]:
    """Yield the rows of an Arrow file that `datasets.save_to_disk` wrote, with one column or with all."""
    import pyarrow.ipc

    with report_corrupt(file, "Arrow file"), pyarrow.memory_map(str(file)) as stream:
        batches = pyarrow.ipc.open_stream(stream)
        if column is not None:
            check_column(column, batches.schema.names, str(file))
        yield from number_rows(file, (batch if column is None else batch.select([column]) for batch in batches))


def number_rows(file: Path, batches: Iterable) -> Iterator[Record]:
    """Yield the rows of Arrow record batches."""
    row = 0
    for batch in batches:
        for record in batch.to_pylist():
            row += 1
            yield f"{file} row {row}", record


def read_text(file: Path, text_field: str, document_chars: int) -> Iterator[Record]:
    """Yield a text file as documents.

    Each ends at the first blank line after `document_chars` characters, or after four times as many.

    A book becomes many documents: some of them serve for validation, and a file of any size fits in memory.
    """
    lines: list[str] = []
    n_chars = 0
    number = 1
    with open_stream(file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        try:
            while line := text.readline(document_chars):
                number += line.endswith("\n")
                lines.append(line)
                n_chars += len(line)
                if n_chars >= 4 * document_chars or (n_chars >= document_chars and not line.strip()):
                    yield f"{file} before line {number}", {text_field: "".join(lines)}
                    lines, n_chars = [], 0
        except UnicodeDecodeError as error:
            raise UserError(f"{file} near line {number}: not UTF-8 text ({error.reason})") from None
    if lines:
        yield f"{file} before line {number}", {text_field: "".join(lines)}


@contextlib.contextmanager
def open_stream(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes; .gz and .zst files are decompressed.

    Archives of several members or frames are read to the end. Raises `UserError` for an archive that is corrupt or
    truncated, which must not pass for a shorter one.
    """
    if file.suffix not in COMPRESSIONS:
        with open(file, "rb") as stream:
            yield stream
        return
    import pyarrow

    if file.stat().st_size == 0:
        raise UserError(f"{file}: not a readable {file.suffix} archive: it is empty")
    with (
        report_corrupt(file, f"{file.suffix} archive"),
        io.BufferedReader(pyarrow.input_stream(file, compression=COMPRESSIONS[file.suffix])) as stream,
    ):
        yield stream


@contextlib.contextmanager
def report_corrupt(file: Path, format_name: str) -> Iterator[None]:
    """Raise `UserError` in place of pyarrow's exceptions for a corrupt file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk; pyarrow's own have no errno
        raise UserError(f"{file}: not a readable {format_name}: {error}") from None


def check_column(name: str, names: Sequence[str], location: str) -> None:
    """Raise `UserError` if the column does not exist."""
    if name not in names:
        raise UserError(f"{location}: no column {name!r}; --text_field can be one of: {', '.join(names)}")
