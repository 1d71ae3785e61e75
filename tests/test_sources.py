"""Which files a pattern names, and what comes out of each kind of file and of the hub."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import error_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sources
from cli import UserError
from sources import TXT_DOCUMENT, FileSource, HubSource, expand, read_files

SUFFIXES = (".txt", ".jsonl", ".parquet")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, which the test runs in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes = "x") -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def expand_names(*patterns: str) -> list[str]:
    return [str(file) for file in expand(patterns, SUFFIXES)]


def records(*files: Path, **options) -> list[dict]:
    return [record for _, record in read_files(files, **options)]


# ---- names ---------------------------------------------------------------------------------------------------------


def test_globs_are_sorted_and_arguments_keep_their_order(folder):
    for name in ("b.txt", "c.txt", "a.txt", "deep/er/d.txt", "z.jsonl"):
        write(name)
    assert expand_names("*.txt") == ["a.txt", "b.txt", "c.txt"]
    assert expand_names("z.jsonl", "c.txt", "a.txt") == ["z.jsonl", "c.txt", "a.txt"]
    assert expand_names("deep/**/*.txt") == ["deep/er/d.txt"]


def test_a_name_with_brackets_is_a_name_where_it_exists(folder):
    write("notes[1].txt")
    write("notes1.txt")
    assert expand_names("notes[1].txt") == ["notes[1].txt"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["missing.txt"], "--files missing.txt: no such file"),
        (["a.txt", "*.parquet"], "--files *.parquet: no such file"),
        (["notes.md"], "--files notes.md: a file must end in .txt or .jsonl or .parquet"),
        (["deep.txt"], "--files deep.txt: not a file; name the files in it, as in 'deep.txt/*.jsonl'"),
        (["a.txt", "./a.txt"], "--files a.txt: named more than once"),
        (["a.txt", "*.txt"], "--files a.txt: named more than once"),
    ],
)
def test_a_pattern_that_cannot_be_used(folder, patterns, message):
    write("a.txt")
    write("notes.md")
    if "deep.txt" in patterns:
        write("deep.txt/b.txt")
    with pytest.raises(UserError) as error:
        expand(patterns, SUFFIXES)
    assert str(error.value) == message


# ---- jsonl ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text()), escape=st.booleans())
def test_jsonl_gives_every_object(tmp_path_factory, texts, escape):
    expected = [{"text": text, "id": i} for i, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=escape) for record in expected]
    file = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    file.write_bytes("\n".join(lines).encode())  # "\u2028" and the like end no line
    assert records(file) == expected


def test_jsonl_passes_over_blank_lines_and_counts_them(folder):
    file = write("a.jsonl", '\n{"text": "one"}\r\n  \n\n{"text": "two"}')
    assert list(read_files([file])) == [("a.jsonl line 2", {"text": "one"}), ("a.jsonl line 5", {"text": "two"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "malformed JSON: "),
        (b"plain words", "malformed JSON: "),
        (b'{"text": "a"} {"text": "b"}', "malformed JSON: Extra data"),
        (b'{"text": "caf\xe9"}', "malformed JSON: 'utf-8' codec can't decode"),
        (b'["text"]', "a line must hold a JSON object"),
        (b"null", "a line must hold a JSON object"),
    ],
)
def test_jsonl_mistakes_name_the_line(folder, line, message):
    file = write("a.jsonl", b'{"text": "fine"}\n\n' + line + b'\n{"text": "after"}\n')
    found = read_files([file])
    assert next(found) == ("a.jsonl line 1", {"text": "fine"})
    with pytest.raises(UserError, match=rf"^a\.jsonl line 3: {message}"):
        next(found)


# ---- parquet -------------------------------------------------------------------------------------------------------


def write_parquet(name: str, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), name, row_group_size=700)
    return Path(name)


def test_parquet_gives_the_text_of_every_row(folder):
    texts = [f"row {i} é👍" for i in range(2500)]
    file = write_parquet("a.parquet", score=list(range(2500)), body=texts)
    found = list(read_files([file], text_field="body"))
    assert [record for _, record in found] == [{"body": text} for text in texts]
    assert [found[0][0], found[-1][0]] == ["a.parquet row 1", "a.parquet row 2500"]


def test_parquet_without_the_column_lists_the_columns(folder):
    file = write_parquet("a.parquet", score=[1], body=["x"])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text'; --text_field can be score, body"):
        records(file)


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: b"no parquet" * 9, lambda whole: whole[:-40]])
def test_parquet_that_is_damaged(folder, damage):
    file = write_parquet("a.parquet", text=["some text"] * 1000)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        records(file)


# ---- txt -----------------------------------------------------------------------------------------------------------

SHORT = 8  # instead of TXT_DOCUMENT, so that short texts have many pieces


@settings(deadline=None, max_examples=150)
@given(text=st.text(alphabet="ab é👍 \r\n\t\u2028", max_size=200) | st.text())
@example(text="a" * 7 + "\r\n\r\n" + "b" * 7 + "\r\r\n\n")
@example(text="x" * 200)
def test_txt_pieces_joined_are_the_file(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("txt") / "a.txt"
    file.write_bytes(text.encode())
    with mock.patch.object(sources, "TXT_DOCUMENT", SHORT):
        pieces = [record["text"] for record in records(file)]
    assert "".join(pieces) == text
    assert all(0 < len(piece) < 5 * SHORT for piece in pieces)  # four times, and a line of at most one more
    assert all(len(piece) >= SHORT for piece in pieces[:-1])


def test_txt_is_cut_at_blank_lines(folder):
    paragraphs = [f"Paragraph {i}\n" + "words and words\n" * (TXT_DOCUMENT // 32) + "\n" for i in range(8)]
    pieces = [record["text"] for record in records(write("a.txt", "".join(paragraphs)))]
    assert pieces == ["".join(paragraphs[i : i + 2]) for i in range(0, 8, 2)]


def test_txt_of_one_huge_line(folder):
    text = "no end " * 60_000
    pieces = [record["text"] for record in records(write("a.txt", text))]
    assert "".join(pieces) == text and max(map(len, pieces)) == 4 * TXT_DOCUMENT


def test_txt_short_files_are_one_document_each(folder):
    one, empty, two = write("b.txt", "one\n\nstill one"), write("e.txt", ""), write("a.txt", "two")
    assert records(one, empty, two, text_field="body") == [{"body": "one\n\nstill one"}, {"body": "two"}]


def test_txt_in_another_encoding(folder):
    file = write("a.txt", b"first line\nsecond caf\xe9 line\n")
    with pytest.raises(UserError, match=r"a\.txt near line \d: not UTF-8 text"):
        records(file)


def test_all_kinds_one_after_the_other(folder):
    files = write("a.txt", "one"), write_parquet("c.parquet", text=["two"]), write("b.jsonl", '{"text": "three"}')
    assert [record["text"] for record in records(*files)] == ["one", "two", "three"]


# ---- the hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["prepare_fineweb.py", "prepare_dolly.py"])
def test_hub_out_of_reach_is_one_line(run_script, tmp_path, script):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    done = run_script(script, "--dataset", "some/one", "--tokenizer", "bytes", "--out", "out", env=env, expect=2)
    assert error_of(done).startswith("dataset some/one")
    assert "cannot be opened: " in done.stderr
    assert not (tmp_path / "out").exists()


def hub_source(generate, column: str | None = None) -> HubSource:
    """A source whose stream is a real one of `datasets`, without a hub."""
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


def test_hub_dataset_streams_the_revision_that_it_names():
    source = hub_source(ten_rows)
    assert source.describe() == {"dataset": "some/one", "name": "small", "revision": "c0ffee"}
    records = list(source.records())
    assert records[1] == ("some/one/small row 2", {"text": "1"}) and len(records) == 10


def test_a_hub_dataset_without_the_column():
    source = hub_source(ten_rows, column="body")
    with pytest.raises(UserError, match="some/one/small: no column 'body'; --text_field can be text"):
        next(source.records())


@pytest.mark.parametrize("n", [0, 1, 4, 999, 1000, 1001, 2500])
def test_a_source_goes_on_where_it_was(tmp_path, n):
    """After a position that went through JSON, as in a file, the same records follow with the same names."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    for make in (lambda: hub_source(rows), lambda: FileSource([tmp_path / "a.jsonl"])):
        first, whole = make(), list(make().records())
        assert list(itertools.islice(first.records(), n)) == whole[:n]
        position = json.loads(json.dumps(first.position))
        assert list(make().records(position)) == whole[n:]


def test_a_stream_that_breaks_off_says_where():
    def stream():
        yield from ({"text": str(i)} for i in range(1500))
        raise ConnectionError("reset by peer\nand much more")

    found, records = hub_source(stream).records(), []
    with pytest.raises(UserError) as error:
        records.extend(found)
    assert records[-1] == ("some/one/small row 1000", {"text": "999"})  # it is read a thousand rows at a time
    message = "dataset some/one/small broke off after row 1,000: reset by peer; run it again to go on"
    assert str(error.value) == message


def test_an_error_without_words_is_named_by_its_class():
    def stream():
        raise TimeoutError
        yield

    with pytest.raises(UserError, match="broke off after row 0: TimeoutError; run it again"):
        next(hub_source(stream).records())


@pytest.mark.parametrize("spot", ["footer", "page"])
def test_parquet_with_flipped_bytes(tmp_path, spot):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text", "b"] * 500}), file)
    whole = bytearray(file.read_bytes())
    begin = 4 if spot == "page" else len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for i in range(begin, begin + 8):
        whole[i] ^= 0xFF
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        list(read_files([file]))


def test_parquet_text_that_is_no_utf8(tmp_path):
    file = tmp_path / "a.parquet"
    column = pyarrow.array([b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(read_files([file]))


def test_jsonl_nested_without_end(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 2: malformed JSON"):
        list(read_files([file]))
