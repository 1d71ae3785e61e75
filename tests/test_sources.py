"""Finding files, and the records of every file format and of the hub."""

import csv
import functools
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, error_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

import prepare_dolly
import prepare_fineweb
from minigpt import readers
from minigpt.cli import UserError
from minigpt.readers import read_files
from minigpt.sources import FileSource, HubSource, find_files

SUFFIXES = (".txt", ".jsonl", ".parquet")
SUPPORTED = ".txt or .jsonl or .parquet (also with .gz or .zst, except .parquet)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes = "x") -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def found_names(*patterns: str) -> list[str]:
    return [str(file) for file in find_files(patterns, SUFFIXES)]


def records(*files: Path, **options) -> list[dict]:
    return [record for _, record in read_files(files, **options)]


# ---- finding files ---------------------------------------------------------------------------------------------------


def test_globs_are_sorted_and_arguments_keep_their_order(folder):
    for name in ("b.txt", "c.txt", "a.txt", "deep/er/d.txt", "z.jsonl"):
        write(name)
    assert found_names("*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert found_names("z.jsonl", "c.txt", "a.txt") == ["z.jsonl", "c.txt", "a.txt"]
    assert found_names("deep/**/*.txt") == ["deep/er/d.txt"]


def test_a_folder_names_all_its_files_with_known_suffixes(folder, capsys):
    names = ["books/a.txt", "books/b/c.jsonl.zst", "books/b/d.txt.gz", "books/e.parquet"]
    for name in [*reversed(names), "books/f.md", "books/.hidden.txt", "books/.git/g.txt", "books/h.txt/i.md"]:
        write(name)
    write("elsewhere/j.txt")
    Path("books/k").symlink_to("../elsewhere")
    assert found_names("books/") == [*names, "books/k/j.txt"]
    assert capsys.readouterr().out == "books: 5 files\n"
    assert found_names("book*") == [*names, "books/k/j.txt"]


def test_a_symbolic_link_cannot_name_a_file_twice(folder):
    write("books/a.txt")
    Path("books/up").symlink_to("..")
    with pytest.raises(UserError, match="named more than once"):
        found_names("books/")


def test_an_existing_name_with_brackets_is_not_a_glob(folder):
    write("notes[1].txt")
    write("notes1.txt")
    assert found_names("notes[1].txt") == ["notes[1].txt"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["missing.txt"], "--files missing.txt: no such file in {folder}"),
        (["/missing.txt"], "--files /missing.txt: no such file"),
        (["a.txt", "*.parquet"], "--files *.parquet: no such file in {folder}"),
        (["notes.md"], f"--files notes.md: a file must end in {SUPPORTED}"),
        (["c.parquet.gz"], f"--files c.parquet.gz: a file must end in {SUPPORTED}"),
        (["x.gz"], f"--files x.gz: a file must end in {SUPPORTED}"),
        (["deep/"], f"--files deep: no file in this folder ends in {SUPPORTED}"),
        (["a.txt", "dangling"], "--files dangling/gone.txt: not a file"),
        (["loop.txt"], "--files loop.txt: not a file"),
        (["loops"], "--files loops/loop.txt: not a file"),
        (["a.txt", "./a.txt"], "--files a.txt: named more than once"),
        (["a.txt", "*.txt"], "--files a.txt: named more than once"),
        (["both/b.txt", "both"], "--files both/b.txt: named more than once"),
    ],
)
def test_a_pattern_that_cannot_be_used(folder, patterns, message):
    for name in ("a.txt", "notes.md", "c.parquet.gz", "x.gz", "deep/notes.md", "both/b.txt"):
        write(name)
    Path("dangling").mkdir()
    Path("dangling/gone.txt").symlink_to("nowhere")
    Path("loops").mkdir()
    for name in ("loop.txt", "loops/loop.txt"):
        Path(name).symlink_to("loop.txt")
    with pytest.raises(UserError) as error:
        find_files(patterns, SUFFIXES)
    assert str(error.value) == message.format(folder=folder)


# ---- jsonl -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text()), escape=st.booleans())
def test_jsonl_yields_every_object(tmp_path_factory, texts, escape):
    expected = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=escape) for record in expected]
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    file.write_bytes("\n".join(lines).encode())  # unlike str.splitlines(), "\u2028" ends no line
    assert records(file) == expected


def test_jsonl_skips_blank_lines_and_counts_them(folder):
    file = write("a.jsonl", '\n{"text": "one"}\r\n  \n\n{"text": "two"}')
    assert list(read_files([file])) == [("a.jsonl line 2", {"text": "one"}), ("a.jsonl line 5", {"text": "two"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "malformed JSON: "),
        (b"plain words", "malformed JSON: "),
        (b'{"text": "a"} {"text": "b"}', "malformed JSON: Extra data"),
        (b'{"text": "caf\xe9"}', "malformed JSON: 'utf-8' codec can't decode"),
        (b'["text"]', "a line must be a JSON object"),
        (b"null", "a line must be a JSON object"),
    ],
)
def test_jsonl_errors_name_the_line(folder, line, message):
    file = write("a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}\n')
    found = read_files([file])
    assert next(found) == ("a.jsonl line 1", {"text": "fine"})
    with pytest.raises(UserError, match=rf"^a\.jsonl line 3: {message}"):
        next(found)


def test_jsonl_nested_too_deep(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2: malformed JSON"):
        list(read_files([file]))


# ---- parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(name: str, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), name, row_group_size=700)
    return Path(name)


def test_parquet_yields_the_text_of_every_row(folder):
    texts = [f"row {i} é👍" for i in range(2500)]
    file = write_parquet("a.parquet", score=list(range(2500)), body=texts)
    found = list(read_files([file], text_field="body"))
    assert [record for _, record in found] == [{"body": text} for text in texts]
    assert [found[0][0], found[-1][0]] == ["a.parquet row 1", "a.parquet row 2500"]


def test_a_tiny_parquet_file_with_large_rows(tmp_path):
    """A dictionary holds one text of 10 MB, and each of 10,000 rows refers to it."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), ["a" * 10_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    tracemalloc.start()
    try:
        records = read_files([tmp_path / "a.parquet"], "text")
        assert all(len(next(records)[1]["text"]) == 10_000_000 for _ in range(20))
        assert tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() < 500_000_000
    finally:
        tracemalloc.stop()


def test_parquet_without_the_column_lists_the_columns(folder):
    file = write_parquet("a.parquet", score=[1], body=["x"])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; --text_field can be one of: score, body"):
        records(file)


@pytest.mark.parametrize("corrupt", [lambda whole: b"", lambda whole: b"no parquet" * 9, lambda whole: whole[:-40]])
def test_corrupt_parquet(folder, corrupt):
    file = write_parquet("a.parquet", text=["some text"] * 1000)
    file.write_bytes(corrupt(file.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        records(file)


@pytest.mark.parametrize("part", ["footer", "page"])
def test_parquet_with_flipped_bytes(tmp_path, part):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text", "b"] * 500}), file)
    whole = bytearray(file.read_bytes())
    begin = 4 if part == "page" else len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for i in range(begin, begin + 8):
        whole[i] ^= 0xFF
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        list(read_files([file]))


def test_parquet_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.parquet"
    column = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(read_files([file]))


# ---- csv -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))), line_end=st.sampled_from(["\n", "\r\n"]))
@example(texts=['a "quote", a comma\nand a line', "", "\r\n", "x" * 200_000], line_end="\n")
def test_csv_yields_every_row(tmp_path_factory, texts, line_end):
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator=line_end, quoting=csv.QUOTE_NONNUMERIC).writerows(
            [("id", "body"), *enumerate(texts)]
        )
    expected = [(f"{file} row {i + 1}", {"id": str(i), "body": text}) for i, text in enumerate(texts)]
    assert list(read_files([file], "body")) == expected


def test_csv_of_a_spreadsheet(folder):
    """With a byte order mark, and blank lines at the end."""
    file = write("a.csv", b"\xef\xbb\xbftext,n\r\none,1\r\n\r\ntwo,2\r\n\r\n")
    assert records(file) == [{"text": "one", "n": "1"}, {"text": "two", "n": "2"}]
    assert records(write("empty.csv", "")) == records(write("head.csv", "text,n\n")) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,body\n1,x\n", "a.csv: no column 'text'; --text_field can be one of: id, body"),
        (
            "text,n\nx,1\nHello, world,2\n",
            "a.csv row 2: 3 values for 2 columns; a value with a comma must be in double",
        ),
        ("text,n\nx\n", "a.csv row 1: 1 value for 2 columns"),
        ('text,n\nx,1\n"open,2\ny,3\n', "a.csv near row 2: malformed CSV: unexpected end of data"),
        (b"text\nx\ncaf\xe9\n", "a.csv near row 1: malformed CSV: 'utf-8' codec"),
    ],
)
def test_csv_that_cannot_be_used(folder, content, message):
    with pytest.raises(UserError) as error:
        records(write("a.csv", content))
    assert str(error.value).startswith(message)


# ---- folders saved by datasets.save_to_disk --------------------------------------------------------------------------

SAVED = {"train": ["one", "two", "three"], "test": ["four"]}


@pytest.fixture
def saved(folder):
    """Saved datasets: "plain" with two files and one left over, "splits" with train and test."""
    tables = {
        split: datasets.Dataset.from_dict({"id": [7] * len(texts), "text": texts}) for split, texts in SAVED.items()
    }
    tables["train"].save_to_disk("plain", num_shards=2)
    shutil.copy("plain/data-00000-of-00002.arrow", "plain/data-00000-of-00001.arrow")
    datasets.DatasetDict(tables).save_to_disk("splits")


def test_saved_datasets_are_read(saved, capsys):
    files = find_files(["plain", "splits"], SUFFIXES)
    names = ["plain/data-00000-of-00002.arrow", "plain/data-00001-of-00002.arrow"]
    assert list(map(str, files)) == [*names, "splits/train/data-00000-of-00001.arrow"]
    assert records(*files) == [{"text": text} for text in SAVED["train"]] * 2
    assert next(read_files(files, None)) == (f"{names[0]} row 1", {"id": 7, "text": "one"})
    assert capsys.readouterr().out == "plain: 2 files\nsplits/train: 1 file\n"
    assert records(*find_files(["splits"], SUFFIXES, split="test")) == [{"text": "four"}]
    assert len(FileSource(files).metadata()["files"][0]["sha256"]) == 64


def test_saved_datasets_that_cannot_be_used(saved):
    with pytest.raises(UserError, match="--files splits: no split 'val'; --split can be one of: train, test"):
        find_files(["splits"], SUFFIXES, split="val")
    with pytest.raises(UserError, match="--split test: --files has no folder of several splits"):
        find_files(["plain"], SUFFIXES, split="test")
    with pytest.raises(UserError, match=r"arrow: no column 'body'; --text_field can be one of: id, text"):
        records(*find_files(["plain"], SUFFIXES), text_field="body")
    file = Path("plain/data-00000-of-00002.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file}: not a readable Arrow file"):
        records(file)
    file.unlink()
    with pytest.raises(UserError, match=f"--files {file}: not a file"):
        find_files(["plain"], SUFFIXES)
    write("plain/state.json", "{}")
    with pytest.raises(UserError, match=r"plain/state.json is corrupt: it does not list the files"):
        find_files(["plain"], SUFFIXES)


# ---- txt -------------------------------------------------------------------------------------------------------------

SHORT = 8  # in place of DOCUMENT_CHARS, so that short texts have many documents


def document_chars(n: int):
    """Cut text files into documents of this length."""
    return mock.patch.object(readers, "DOCUMENT_CHARS", (n, n))


@settings(deadline=None, max_examples=150)
@given(text=st.text(alphabet="ab é👍 \r\n\t\u2028", max_size=200) | st.text())
@example(text="a" * 7 + "\r\n\r\n" + "b" * 7 + "\r\r\n\n")
@example(text="x" * 200)
def test_txt_documents_joined_are_the_file(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("txt") / "a.txt"
    file.write_bytes(text.encode())
    with document_chars(SHORT):
        pieces = [record["text"] for record in records(file)]
    assert "".join(pieces) == text
    assert all(0 < len(piece) < 5 * SHORT for piece in pieces)  # four times, and one line of at most one more
    assert all(len(piece) >= SHORT for piece in pieces[:-1])


def test_txt_is_split_at_blank_lines(folder):
    paragraphs = [f"Paragraph {i}\n" + "words and words\n" * 64 + "\n" for i in range(8)]
    with document_chars(2048):
        pieces = [record["text"] for record in records(write("a.txt", "".join(paragraphs)))]
    assert pieces == ["".join(paragraphs[i : i + 2]) for i in range(0, 8, 2)]


def test_txt_of_one_long_line(folder):
    text = "no end " * 60_000
    with document_chars(2048):
        pieces = [record["text"] for record in records(write("a.txt", text))]
    assert "".join(pieces) == text and max(map(len, pieces)) == 4 * 2048


@pytest.mark.parametrize(
    ("n_bytes", "shortest"), [(10_000, 1024), (200_000, 2000), (1_638_400, 16_384), (3_000_000, 16_384)]
)
def test_the_length_of_documents_depends_on_the_amount_of_text(folder, n_bytes, shortest):
    """About a hundred documents of a small corpus: some of them serve for validation."""
    paragraph = "Forty characters, of which one is a line.\n\n"
    files = [write(f"{i}.txt", (paragraph * n_bytes)[: n_bytes // 2]) for i in range(2)]
    lengths = [len(record["text"]) for record in records(files[0])]  # alone, half as much
    both = [len(record["text"]) for record in records(*files)]
    assert all(shortest <= length < shortest + 2 * len(paragraph) for length in [*both[: len(both) // 2 - 1]])
    assert len(lengths) >= len(both) // 2


def test_short_txt_files_are_one_document_each(folder):
    one, empty, two = write("b.txt", "one\n\nstill one"), write("e.txt", ""), write("a.txt", "two")
    assert records(one, empty, two, text_field="body") == [{"body": "one\n\nstill one"}, {"body": "two"}]


def test_txt_in_another_encoding(folder):
    file = write("a.txt", b"first line\nsecond caf\xe9 line\n")
    with pytest.raises(UserError, match=r"a\.txt near line \d: not UTF-8 text"):
        records(file)


# ---- compressed ------------------------------------------------------------------------------------------------------

COMPRESS = {".gz": gzip.compress, ".zst": functools.partial(pyarrow.compress, codec="zstd", asbytes=True)}
LINES = "".join(json.dumps({"text": f"line {i} é👍 " + "word " * (i % 7)}) + "\n" for i in range(400)).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("inner", [".txt", ".jsonl", ".md", ".csv"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_compressed_file_has_the_same_records(folder, suffix, inner, parts):
    """With one or several members or frames, which may split a line or a character."""
    lines = b"text\n" * (inner == ".csv") + LINES
    size = -(-len(lines) // parts)
    pieces = [COMPRESS[suffix](lines[i : i + size]) for i in range(0, len(lines), size)]
    compressed, plain = write(f"a{inner}{suffix}", b"".join(pieces)), write(f"a{inner}", lines)
    expected = [(location.replace(inner, inner + suffix), record) for location, record in read_files([plain])]
    assert len(pieces) == parts and list(read_files([compressed])) == expected


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("inner", [".txt", ".jsonl", ".json"])
def test_a_truncated_archive_never_passes_for_a_shorter_file(folder, suffix, inner):
    """Truncated at any byte: in a header, in the data, or in the checksum of either part."""
    line = b'{"text": "one"}\n'
    first, second = (COMPRESS[suffix](data) for data in ((b"[", line + b"]") if inner == ".json" else (line, line)))
    whole = first + second
    cuts = set(range(len(whole))) - {len(first)}  # between two members it is a whole archive of the first
    for cut in cuts:
        file = write(f"a{inner}{suffix}", whole[:cut])
        with pytest.raises(UserError, match=rf"^a{inner}{suffix}: not a readable {suffix} archive: "):
            records(file)
    assert len(cuts) > 30 and len(records(write(f"a{inner}{suffix}", whole))) > 0


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("corrupt", [lambda w: LINES, lambda w: w[:10] + b"?" * 9 + w[19:], lambda w: w + b"junk"])
def test_a_corrupt_archive_is_named(folder, suffix, corrupt):
    file = write(f"a.jsonl{suffix}", corrupt(COMPRESS[suffix](LINES)))
    with pytest.raises(UserError, match=rf"^a\.jsonl{suffix}: not a readable {suffix} archive: "):
        records(file)


def test_errors_in_a_compressed_file_name_the_line(folder):
    for name, message in (("a.txt.gz", "near line 1: not UTF-8"), ("a.jsonl.gz", "line 1: malformed JSON")):
        file = write(name, gzip.compress(b"caf\xe9 and more\n"))
        with pytest.raises(UserError, match=f"^{name} {message}"):
            records(file)


def test_a_compressed_file_is_not_read_into_memory_whole(folder):
    """Peak memory of a process that reads 60 MB, compared with one that reads a line."""
    for name, lines in (("small.jsonl.gz", 1), ("large.jsonl.gz", 600)):
        with gzip.open(name, "wb", compresslevel=1) as stream:
            for _ in range(lines):
                stream.write(json.dumps({"text": "word " * 20_000}).encode() + b"\n")
    code = (
        "import resource, sys; from pathlib import Path; from minigpt.readers import read_files\n"
        "print(sum(len(record['text']) for _, record in read_files([Path(sys.argv[1])])))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, check=True)
        for name in ("small.jsonl.gz", "large.jsonl.gz")
    ]
    (small, memory_of_small), (large, memory_of_large) = (map(int, run.stdout.split()) for run in runs)
    assert (small, large) == (100_000, 60_000_000)
    assert memory_of_large - memory_of_small < 20_000  # KiB


# ---- json ------------------------------------------------------------------------------------------------------------


def test_json_is_a_list_of_records(folder):
    file = write("a.json", '[\n {"text": "one"},\n {"text": "two"}\n]\n')
    assert list(read_files([file])) == [("a.json record 1", {"text": "one"}), ("a.json record 2", {"text": "two"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "one"}', "a.json: a .json file must be a list of records"),
        (
            '{"text": "one"}\n{"text": "two"}',
            "a.json: malformed JSON: .*; a file with one record per line must end in .jsonl",
        ),
        ('[{"text": "one"}, {"te', "a.json: malformed JSON"),
        ('[{"text": "one"}, "two"]', "a.json record 2: it must be a JSON object"),
    ],
)
def test_json_that_is_not_a_list_of_records(folder, content, message):
    with pytest.raises(UserError, match=message):
        records(write("a.json", content))


def test_files_of_several_formats_are_read_in_order(folder):
    files = write("a.txt", "one"), write_parquet("c.parquet", text=["two"]), write("b.jsonl", '{"text": "three"}')
    assert [record["text"] for record in records(*files)] == ["one", "two", "three"]


# ---- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["prepare_fineweb.py", "prepare_dolly.py"])
def test_an_unreachable_hub_is_one_line(run_script, tmp_path, script):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    done = run_script(script, "--dataset", "some/one", "--tokenizer", "bytes", "--out", "out", env=env, expect=2)
    assert error_of(done).startswith("dataset some/one")
    assert "cannot be opened: " in done.stderr
    assert not (tmp_path / "out").exists()


def hub_source(generate, column: str | None = None) -> HubSource:
    """Return a source with a real stream of `datasets`, without a hub."""
    stream = datasets.IterableDataset.from_generator(generate)
    with mock.patch("huggingface_hub.HfApi") as api, mock.patch("datasets.load_dataset", return_value=stream) as load:
        api.return_value.dataset_info.return_value = SimpleNamespace(sha="c0ffee")
        source = HubSource("some/one", "small", column)
    load.assert_called_once_with("some/one", name="small", split="train", streaming=True, revision="c0ffee")
    return source


def ten_rows():
    yield from ({"text": str(i)} for i in range(10))


def rows():
    yield from ({"text": str(i)} for i in range(2500))


def test_a_hub_dataset_streams_the_revision_in_its_metadata():
    source = hub_source(ten_rows)
    assert source.metadata() == {"dataset": "some/one", "name": "small", "revision": "c0ffee"}
    records = list(source.records())
    assert records[1] == ("some/one/small row 2", {"text": "1"}) and len(records) == 10


def test_a_hub_dataset_without_the_column():
    source = hub_source(ten_rows, column="body")
    with pytest.raises(UserError, match="some/one/small: no column 'body'; --text_field can be one of: text"):
        next(source.records())


@pytest.mark.parametrize("n", [0, 1, 4, 999, 1000, 1001, 2500])
def test_a_source_resumes_at_a_position(tmp_path, n):
    """After a position that was stored as JSON, the same records follow with the same locations."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for make in (lambda: hub_source(rows), lambda: FileSource([tmp_path / "a.jsonl"])):
        first, whole = make(), list(make().records())
        assert list(itertools.islice(first.records(), n)) == whole[:n]
        position = json.loads(json.dumps(first.position))
        assert list(make().records(position)) == whole[n:]


def test_a_second_pass_reads_the_same_revision_from_the_start():
    """Also after a resume; a small corpus is read twice if its validation split came out too small."""
    load = mock.Mock(side_effect=lambda *args, **options: datasets.IterableDataset.from_generator(rows))
    with mock.patch("huggingface_hub.HfApi") as api, mock.patch("datasets.load_dataset", load):
        api.return_value.dataset_info.side_effect = [SimpleNamespace(sha="c0ffee"), SimpleNamespace(sha="newer")]
        first = HubSource("some/one", None)
        whole = list(first.records())
        position = json.loads(json.dumps(first.position))
        assert list(first.records()) == whole and first.revision == "c0ffee"
        api.return_value.dataset_info.side_effect = [SimpleNamespace(sha="c0ffee")]
        resumed = HubSource("some/one", None)
        assert list(resumed.records(position | {"row": 2400, "done": 400})) == whole[2400:]
        assert list(resumed.records()) == whole
    assert {call.kwargs["revision"] for call in load.call_args_list} == {"c0ffee"}


def test_a_failed_stream_names_the_last_row():
    def stream():
        yield from ({"text": str(i)} for i in range(1500))
        raise ConnectionError("reset by peer\nand much more")

    found, records = hub_source(stream).records(), []
    with pytest.raises(UserError) as error:
        records.extend(found)
    assert records[-1] == ("some/one/small row 1000", {"text": "999"})  # rows are read in tables of 1,000
    message = "dataset some/one/small failed after row 1,000: reset by peer; run the same command again"
    assert str(error.value) == message


def test_an_error_without_a_message_is_named_by_its_type():
    def stream():
        raise TimeoutError
        yield

    with pytest.raises(UserError, match="failed after row 0: TimeoutError; run the same command again"):
        next(hub_source(stream).records())


@pytest.mark.parametrize(("name", "message"), [("a.jsonl.gz", "line 2: longer than"), ("a.json.gz", "more than")])
def test_a_small_archive_of_a_huge_record_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 1000)
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "short"}\n' + b"0" * 10_000_000))
    with pytest.raises(UserError, match=message) as error:
        list(read_files([tmp_path / name], max_record_mb=1))
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("flag", ["files", "mix", "val_files"])
def test_a_longer_record_needs_a_flag(prepare_in_process, tmp_path, flag):
    turns = [{"role": "user", "content": "a" * 1_500_000}, {"role": "assistant", "content": "b"}]
    lines = [json.dumps({"messages": turns}), *[json.dumps({"messages": [turns[1] | {"role": "user"}, turns[1]]})] * 2]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    (tmp_path / "short.jsonl").write_text("\n".join(lines[1:]))
    files, flags = ("long.jsonl",), {"val_fraction": 0.5}
    if flag == "mix":
        files, flags = (), flags | {"mix": ("long.jsonl=1",)}
    elif flag == "val_files":
        files, flags = ("short.jsonl",), {"val_files": ("long.jsonl",)}
    with pytest.raises(UserError, match=r"long\.jsonl line 1: longer than 1 MB: split it, or raise --max_record_mb"):
        prepare_in_process(prepare_dolly, *files, **flags, max_record_mb=1)
    prepare_in_process(prepare_dolly, *files, **flags, max_record_mb=2)


def test_a_longer_csv_value_needs_a_flag(prepare_in_process, tmp_path):
    (tmp_path / "long.csv").write_text("text\n" + f"{'a b ' * 300_000}\n{'b c ' * 300_000}\n")
    with pytest.raises(UserError, match=r"long\.csv near row 1: malformed CSV: field larger than field limit"):
        prepare_in_process(prepare_fineweb, "long.csv", val_fraction=0.5, max_record_mb=1)
    prepare_in_process(prepare_fineweb, "long.csv", val_fraction=0.5, max_record_mb=2)
