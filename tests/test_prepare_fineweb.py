"""prepare_fineweb.py as a subprocess: text files in, shards out."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import error_of

from minigpt.shards import PROGRESS_FILE, is_validation
from minigpt.tokenizer import load_tokenizer

SCRIPT = "prepare_fineweb.py"
SPLITS = ("train", "val")
END_OF_TEXT = load_tokenizer("bytes").end_of_text
TEXTS = [f"Document {i}: " + "äö 👍 words, <|endoftext|> and more. " * (i % 4) for i in range(40)]


def write_jsonl(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture
def prepare(run_script, tmp_path):
    """Run the script with the bytes tokenizer; by default it writes to the folder "out"."""
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)

    def run(*files: str, expect: int = 0, **flags):
        flags = {"tokenizer": "bytes", "out": "out", "val_fraction": 0.2} | flags
        arguments = [word for name, value in flags.items() for word in (f"--{name}", value)]
        return run_script(SCRIPT, "--files", *(files or ["texts.jsonl"]), *arguments, expect=expect)

    return run


def documents(folder: Path) -> dict[str, list[str]]:
    """Return the documents of a dataset folder by split, in the order of its meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    found = {}
    for split in ("train", "val"):
        tokens = np.concatenate([np.load(folder / shard["file"]) for shard in meta[split]["files"]])
        assert tokens.dtype == np.uint16 and tokens[0] == END_OF_TEXT
        pieces = np.split(tokens, np.flatnonzero(tokens == END_OF_TEXT)[1:])
        found[split] = [piece[1:].astype(np.uint8).tobytes().decode() for piece in pieces]
        assert meta[split]["documents"] == len(pieces) and meta[split]["tokens"] == len(tokens)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def expected_splits(texts: list[str], fraction: float) -> dict[str, list[str]]:
    in_val = [is_validation(text.encode(), fraction) for text in texts]
    return {split: [t for t, val in zip(texts, in_val, strict=True) if val == (split == "val")] for split in SPLITS}


# ---- the dataset -----------------------------------------------------------------------------------------------------


def test_files_of_all_formats_are_read_back_as_documents(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("A text\r\n\r\nof two paragraphs.\n", newline="")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", "drei ß"]}), tmp_path / "c.parquet")
    done = prepare("*.txt", "texts.jsonl", "c.parquet", shard_tokens=500)
    expected = expected_splits(["A text\r\n\r\nof two paragraphs.\n", *TEXTS, "one", "two", "drei ß"], 0.2)
    assert documents(tmp_path / "out") == expected
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    names = [shard["file"] for split in SPLITS for shard in meta[split]["files"]]
    assert sorted(names) == sorted(contents(tmp_path / "out").keys() - {"meta.json", ".lock"}) and len(names) > 4
    assert (meta["kind"], meta["tokenizer"], meta["vocab_size"], meta["skipped_empty"]) == ("text", "bytes", 257, 0)
    assert [source["file"] for source in meta["source"]["files"]] == ["a.txt", "texts.jsonl", "c.parquet"]
    assert f"train: {meta['train']['tokens']:,} tokens in {len(expected['train'])} documents" in done.stdout
    assert "next: python pretrain.py --data out --out runs/out" in done.stdout and done.stderr == ""


def test_gpt2_tokens_are_those_of_the_documents(prepare, tmp_path, gpt2_tokenizer):
    prepare(tokenizer="gpt2")
    tokens = np.load(tmp_path / "out" / "train_000000.npy")
    expected = expected_splits(TEXTS, 0.2)["train"]
    assert tokens.tolist() == [token for text in expected for token in [50_256, *gpt2_tokenizer.encode(text)]]


def test_the_same_input_gives_the_same_bytes(prepare, tmp_path):
    for out in ("one", "two"):
        prepare(out=out, shard_tokens=700)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_prepared_folders_stay_valid(prepare, tmp_path):
    """The same bytes as earlier versions, meta.json included: a change would make everyone prepare their data again."""
    (tmp_path / "a.txt").write_text("A text\n\nof two paragraphs.\n" * 2000)
    prepare("a.txt", "texts.jsonl", shard_tokens=700)
    whole = b"".join(data for name, data in sorted(contents(tmp_path / "out").items()) if name != ".lock")
    assert hashlib.sha256(whole).hexdigest() == "b5d96e8f6142d41485e3d9cb24e0c9097fe26d29d1a0fad5be356f97364aacd4"


def test_running_again_changes_nothing(prepare, tmp_path):
    prepare()
    before = contents(tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prepare().stdout == "out is already complete\n"
    assert contents(tmp_path / "out") == before
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


def test_an_interrupted_run_is_completed(prepare, tmp_path):
    prepare(out="whole", shard_tokens=700)
    prepare(shard_tokens=700)
    out = tmp_path / "out"
    (out / "meta.json").rename(out / PROGRESS_FILE)
    (out / "train_000000.npy").write_bytes(b"half")
    (out / "train_000099.npy").write_bytes(b"from a longer run")
    (out / "val_000001.npy.tmp").write_bytes(b"half")
    prepare(shard_tokens=700)
    assert contents(out) == contents(tmp_path / "whole")


def test_adding_documents_moves_none_to_the_other_split(prepare, tmp_path):
    prepare(out="before")
    write_jsonl(tmp_path / "more.jsonl", [f"Another {i}" for i in range(40)])
    prepare("more.jsonl", "texts.jsonl", out="after")
    before, after = documents(tmp_path / "before"), documents(tmp_path / "after")
    assert all(set(before[split]) < set(after[split]) for split in SPLITS)


def test_val_fraction_is_the_fraction_of_documents(prepare, tmp_path):
    write_jsonl(tmp_path / "many.jsonl", [f"Document {i}" for i in range(2000)])
    for fraction in (0.05, 0.5):
        prepare("many.jsonl", val_fraction=fraction, out=f"out{fraction}")
        assert len(documents(tmp_path / f"out{fraction}")["val"]) / 2000 == pytest.approx(fraction, rel=0.25)


def test_max_tokens_stops_after_the_document_that_reaches_it(prepare, tmp_path):
    lengths = [len(text.encode()) + 1 for text in TEXTS]
    for tokens in (sum(lengths[:20]), sum(lengths[:19]) + 1):
        prepare(max_tokens=tokens, out=f"out{tokens}")
        assert documents(tmp_path / f"out{tokens}") == expected_splits(TEXTS[:20], 0.2)


def test_empty_documents_are_skipped_and_counted(prepare, tmp_path):
    write_jsonl(tmp_path / "gaps.jsonl", ["", *TEXTS[:20], " \n\t", *TEXTS[20:], "", "\u3000"])
    done = prepare("gaps.jsonl")
    assert documents(tmp_path / "out") == expected_splits(TEXTS, 0.2)
    assert "4 empty documents skipped" in done.stdout
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["skipped_empty"] == 4


def test_a_lone_surrogate_becomes_a_replacement_character(prepare, tmp_path):
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"text": "lone \\ud83d surrogate"}\n')
    prepare()
    found = documents(tmp_path / "out")
    assert "lone \ufffd surrogate" in found["train"] + found["val"]


def test_a_folder_with_compressed_files(prepare, tmp_path):
    """Documents in alphabetical order of the files, and the same bytes in a second run."""
    (tmp_path / "books" / "more").mkdir(parents=True)
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in TEXTS]
    (tmp_path / "books" / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:9])) + gzip.compress(lines[9]))
    (tmp_path / "books" / "more" / "b.jsonl.zst").write_bytes(pyarrow.compress(b"".join(lines[10:]), "zstd", True))
    (tmp_path / "books" / "notes.md").write_text("not text data")
    for out in ("one", "two"):
        assert prepare("books/", out=out).stdout.startswith("books: 2 files\n")
    assert documents(tmp_path / "one") == expected_splits(TEXTS, 0.2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "no file in this folder ends in .txt or" in error_of(prepare("one", expect=2))


def test_a_truncated_archive_completes_no_dataset(prepare, tmp_path):
    lines = b"".join((json.dumps({"text": text * 50}) + "\n").encode() for text in TEXTS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    message = error_of(prepare("a.jsonl.gz", shard_tokens=700, expect=2))
    assert message.startswith("a.jsonl.gz: not a readable .gz archive: ")
    assert not (tmp_path / "out" / "meta.json").exists()


def test_another_split_and_field_of_a_hub_dataset(run_script, tmp_path):
    (tmp_path / "files").mkdir()
    for split, texts in (("train", ["no"]), ("test", TEXTS)):
        write_jsonl(tmp_path / "files" / f"{split}.jsonl", texts)
    flags = ("--dataset", "some/texts", "--tokenizer", "bytes", "--val_fraction", 0.2, "--out", "out")
    with hub.serve(tmp_path / "files") as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        run_script(SCRIPT, *flags, "--split", "test", env=env)
        wrong = run_script(SCRIPT, *flags, "--split", "tset", env=env, expect=2)
    assert documents(tmp_path / "out") == expected_splits(TEXTS, 0.2)
    source = {"dataset": "some/texts", "name": None, "revision": hub.REVISION, "split": "test"}
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["source"] == source
    assert re.match("dataset some/texts cannot be opened: .*tset.*train", error_of(wrong))


def test_another_text_field(prepare, tmp_path):
    lines = [json.dumps({"body": text, "text": "no"}) for text in TEXTS]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    prepare("b.jsonl", text_field="body")
    assert documents(tmp_path / "out") == expected_splits(TEXTS, 0.2)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "fine"}\n{"body": "x", "id": 1}\n', "bad.jsonl line 2: no text in field 'text'; .*: body, id"),
        ('{"text": null}\n', "bad.jsonl line 1: no text in field 'text'"),
        ('{"text": ["a"]}\n', "bad.jsonl line 1: no text in field 'text'"),
        ('{"text": "fine"}\n\n{"text": \n', "bad.jsonl line 3: malformed JSON"),
        ("", r"the source has 0 usable documents \(0 empty ones skipped\), but each split needs one: give more data"),
        (
            '{"text": " "}\n{"text": ""}\n',
            r"the source has 0 usable documents \(2 empty ones skipped\), but each split needs one",
        ),
        (
            '{"text": "just one"}\n',
            r"the source has 1 usable documents \(0 empty ones skipped\), but each split needs one",
        ),
    ],
)
def test_a_source_that_cannot_be_used(prepare, tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    assert re.match(message, error_of(prepare("bad.jsonl", expect=2)))
    assert not (tmp_path / "out" / "meta.json").exists()
    prepare()  # the right file can use the same folder
    assert documents(tmp_path / "out") == expected_splits(TEXTS, 0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 0}, "--val_fraction is 0.0: it must be above 0 and at most 0.5"),
        ({"val_fraction": 0.6}, "--val_fraction is 0.6: it must be above 0 and at most 0.5"),
        ({"val_fraction": "nan"}, "--val_fraction is nan: it must be"),
        ({"shard_tokens": 0}, "--shard_tokens is 0: it must be at least 1"),
        ({"max_tokens": 0}, "--max_tokens is 0: it must be at least 1"),
        ({"split": "test"}, "--files and --dataset with --name and --split cannot be combined: give one of them"),
        ({"tokenizer": "gpt3"}, "there is no tokenizer 'gpt3': choose one of gpt2, bytes"),
    ],
)
def test_a_value_that_cannot_be_used(prepare, tmp_path, flags, message):
    assert error_of(prepare(expect=2, **flags)).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "*.parquet"])
def test_missing_files(prepare, tmp_path, name):
    assert error_of(prepare(name, expect=2)) == f"--files {name}: no such file"
    assert not (tmp_path / "out").exists()


def test_another_dataset_in_the_folder_is_kept(prepare, tmp_path):
    prepare()
    before = contents(tmp_path / "out")
    assert "val_fraction is 0.2, not 0.3" in error_of(prepare(val_fraction=0.3, expect=2))
    write_jsonl(tmp_path / "texts.jsonl", TEXTS[:-1])
    assert "out already holds another dataset (the source differs)" in error_of(prepare(expect=2))
    assert contents(tmp_path / "out") == before


def test_other_files_in_the_folder_are_kept(prepare, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000000.npy").write_text("precious")
    assert error_of(prepare(expect=2)).startswith("out already exists and is not a dataset folder")
    assert contents(tmp_path / "out") == {"train_000000.npy": b"precious"}


def test_a_folder_that_cannot_be_created(prepare):
    assert error_of(prepare(out="texts.jsonl/deeper", expect=2)).startswith("texts.jsonl/deeper: Not a directory")
