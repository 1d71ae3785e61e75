"""prepare_fineweb.py as a subprocess: text files in, shards out."""

import functools
import gzip
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tyro
from conftest import ROOT, error_of

import prepare_fineweb
import pretrain
from minigpt import files, shards, sources
from minigpt.cli import UserError
from minigpt.dataset import TokenDataset
from minigpt.shards import PROGRESS_FILE, hash_document
from minigpt.sources import FileSource, NetworkError
from minigpt.tokenizer import load_tokenizer
from prepare_fineweb import Config, suggest_training

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
    in_val = [hash_document(text.encode()) < fraction for text in texts]
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
    command = f"next: python {ROOT}/pretrain.py --data out --out runs/out --model "
    assert command in done.stdout and done.stderr == ""


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
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i} says {i * i}.\n\n" for i in range(60_000)))
    prepare("a.txt", "texts.jsonl", shard_tokens=150_000)
    files = contents(tmp_path / "out")
    meta = {name: value for name, value in json.loads(files["meta.json"]).items() if name != "checksum"}  # is newer
    files["meta.json"] = (json.dumps(meta, indent=2) + "\n").encode()
    whole = b"".join(data for name, data in sorted(files.items()) if name != ".lock")
    assert hashlib.sha256(whole).hexdigest() == "8a03bd219157a38fe73c384001d6304b933d6128f1f4ea3678f58dff9d1489c7"


def test_running_again_changes_nothing(prepare, tmp_path):
    done = prepare()
    before = contents(tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    again = prepare().stdout.splitlines()
    assert again[0] == "out is already complete"
    assert again[1:3] == done.stdout.splitlines()[:2] and again[-1] == done.stdout.splitlines()[-1]
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
    (tmp_path / "books" / "notes.rst").write_text("not text data")
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


# ---- small corpora ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(prepare_in_process):
    """Run the script in this process, without a GPU, on files in the working directory."""
    return functools.partial(prepare_in_process, prepare_fineweb)


def paragraphs(n_chars: int) -> str:
    return "".join(f"Paragraph {i} says that {i} squared is {i * i}.\n\n" for i in range(n_chars // 50))


@pytest.mark.parametrize(("n_chars", "least"), [(4_000, 300), (20_000, 1025), (1_100_000, 1025)])
def test_a_small_text_file_has_a_validation_split(here, tmp_path, capsys, n_chars, least):
    """The documents with the lowest hashes are its validation split."""
    (tmp_path / "a.txt").write_text(paragraphs(n_chars))
    here("a.txt", val_fraction=1e-9)
    found, meta = documents(tmp_path / "out"), json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sorted("".join(found["train"] + found["val"])) == sorted(paragraphs(n_chars))
    hashes = {split: [hash_document(text.encode()) for text in found[split]] for split in SPLITS}
    assert max(hashes["val"]) < meta["val_fraction_used"] <= min(hashes["train"])
    assert least <= meta["val"]["tokens"] < meta["train"]["tokens"] and meta["val_fraction"] == 1e-9
    n = meta["val"]["documents"]
    lowest = "1 document with the lowest hash" if n == 1 else f"{n} documents with the lowest hashes"
    expected = f"validation: the {lowest}, because too few fell below --val_fraction 1e-09\n"
    assert expected in capsys.readouterr().out
    here("a.txt", val_fraction=1e-9)
    again = capsys.readouterr().out
    assert again.startswith("out is already complete\n") and expected in again


def test_one_document_is_left_for_training(here, tmp_path, capsys):
    texts = [text for text in TEXTS if hash_document(text.encode()) < 0.5]
    write_jsonl(tmp_path / "a.jsonl", texts)
    here("a.jsonl", val_fraction=0.5)
    assert documents(tmp_path / "out")["train"] == [max(texts, key=lambda text: hash_document(text.encode()))]
    assert "with the lowest hashes, because all fell below --val_fraction 0.5\n" in capsys.readouterr().out


def test_an_interrupted_second_pass_writes_the_same_bytes(here, tmp_path, monkeypatch):
    """Interrupted after each save of the progress, in both passes."""
    write_jsonl(tmp_path / "a.jsonl", [f"Document {i} " + "of words " * (i % 9) for i in range(300)])
    monkeypatch.setattr(sources, "BATCH_CHARS", 2000)
    monkeypatch.setattr(files, "fsync", lambda path: None)  # slow
    save_progress, saved = shards.save_progress, []

    def interrupt(folder, meta, progress):
        save_progress(folder, meta, progress)
        saved.append(progress)
        if len(saved) == interrupt_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_progress", interrupt)
    interrupt_at = 0
    flags = {"val_fraction": 0.002, "shard_tokens": 3000}
    here("a.jsonl", **flags, out="whole")
    fractions = [progress.get("val_fraction_used") for progress in saved]
    second_pass = json.loads((tmp_path / "whole" / "meta.json").read_text())["val_fraction_used"]
    assert set(fractions) == {None, 0.002, second_pass} and fractions.count(second_pass) > 3 and len(fractions) > 8
    for interrupt_at in range(1, len(fractions) + 1):
        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            here("a.jsonl", **flags, out=f"out{interrupt_at}")
        interrupt_at, out = 0, f"out{interrupt_at}"
        here("a.jsonl", **flags, out=out)
        assert contents(tmp_path / out) == contents(tmp_path / "whole")


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
            r"the source has 1 usable document \(0 empty ones skipped\), but each split needs one",
        ),
        ('{"text": "one"}\n' * 3, "all 3 documents are equal, but each split needs its own: give more data"),
        (
            '{"text": "a text"}\n{"text": "another"}\n',
            "the train split has 8 tokens, expected at least 17: give more text",
        ),
    ],
)
def test_a_source_that_cannot_be_used(prepare, tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text(lines)
    assert re.match(message, error_of(prepare("bad.jsonl", expect=2)))
    assert not (tmp_path / "out").exists()
    prepare()
    assert documents(tmp_path / "out") == expected_splits(TEXTS, 0.2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_fraction": 0}, "--val_fraction is 0.0: it must be above 0 and at most 0.5"),
        ({"val_fraction": 0.6}, "--val_fraction is 0.6: it must be above 0 and at most 0.5"),
        ({"val_fraction": "nan"}, "--val_fraction is nan: it must be"),
        ({"shard_tokens": 0}, "--shard_tokens is 0: it must be at least 1"),
        ({"max_tokens": 0}, "--max_tokens is 0: it must be at least 1"),
        ({"split": "test"}, "--split test: --files has no folder of several splits saved by datasets.save_to_disk"),
        (
            {"dataset": "some/texts"},
            "--files and --dataset with --name and --split cannot be combined: give one of them",
        ),
        (
            {"text_suffixes": ".csv"},
            "--text_suffixes .csv: expected suffixes with their dot, as in .py, other than .jsonl",
        ),
        ({"text_suffixes": "py"}, "--text_suffixes py: expected suffixes with their dot, as in .py"),
        ({"tokenizer": "gpt3"}, "there is no tokenizer 'gpt3': choose gpt2, bytes or a folder"),
    ],
)
def test_a_value_that_cannot_be_used(prepare, tmp_path, flags, message):
    assert error_of(prepare(expect=2, **flags)).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.jsonl", "*.parquet"])
def test_missing_files(prepare, tmp_path, name):
    assert error_of(prepare(name, expect=2)) == f"--files {name}: no such file in {tmp_path}"
    assert not (tmp_path / "out").exists()


def test_files_are_checked_before_the_vocabulary_is_downloaded(here, monkeypatch):
    monkeypatch.setattr(prepare_fineweb, "load_tokenizer", mock.Mock(side_effect=UserError("no network")))
    with pytest.raises(UserError, match=r"--files books/a\.txt: no such file in /"):
        here("books/a.txt", tokenizer="gpt2")


def test_finished_shards_survive_a_network_error_but_not_unusable_data(here, tmp_path, monkeypatch):
    class FailingSource(FileSource):
        def records(self, position=None):
            for number, record in enumerate(super().records(position)):
                if number == 30:
                    raise error
                yield record

    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    flags = {"val_fraction": 0.2, "shard_tokens": 500}
    monkeypatch.setattr(sources, "BATCH_CHARS", 500)
    here("texts.jsonl", **flags, out="whole")
    monkeypatch.setattr(sources, "FileSource", FailingSource)
    error = UserError("row 31 is unusable")
    with pytest.raises(UserError, match="unusable"):
        here("texts.jsonl", **flags)
    assert not (tmp_path / "out").exists()
    error = NetworkError("reset by peer; run the same command again to resume")
    with pytest.raises(UserError, match="reset by peer"):
        here("texts.jsonl", **flags)
    assert len(list((tmp_path / "out").glob("train_*.npy"))) > 1 and (tmp_path / "out" / PROGRESS_FILE).exists()
    here("texts.jsonl", **flags)  # resumes fewer than 30 records before the end
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_dataset_without_an_array_is_not_complete(here, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    here("texts.jsonl")
    (tmp_path / "out" / "val_000000.npy").unlink()
    with pytest.raises(UserError, match=r"val_000000\.npy is missing: delete out and prepare it again"):
        here("texts.jsonl")


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


# ---- the next command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "n_val_tokens", "on_gpu", "flags"),
    [
        (10_000_000_000, 50_000_000, True, ""),
        (1_000_000_000, 5_000_000, True, ""),
        (999_999_999, 5_000_000, True, "--batch_tokens 131072 --steps 61036"),
        (199_999_999, 1_000_000, True, "--model small --batch_tokens 16384 --lr 4e-3 --steps 97657"),
        (250_000, 2_750, True, "--model small --batch_tokens 16384 --lr 4e-3 --steps 123"),
        (10_000_000_000, 50_000_000, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 2500"),
        (250_000, 2_750, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 489"),
        (3_000, 257, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 50"),
        (3_000, 256, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 50 --block_size 128"),
        (3_000, 17, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 50 --block_size 16"),
        (100, 257, False, "--model demo --batch_tokens 4096 --lr 1e-2 --steps 50 --block_size 64"),
    ],
)
def test_suggested_flags_fit_the_corpus_and_the_device(n_tokens, n_val_tokens, on_gpu, flags):
    assert suggest_training(n_tokens, n_val_tokens, on_gpu) == flags


def test_the_next_command_can_be_pasted(here, tmp_path, capsys, monkeypatch):
    """From a folder other than the script's, with a space in the names."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    monkeypatch.setattr(sys, "argv", [str(ROOT / SCRIPT)])
    here("a.jsonl", out="my data/text")
    command = re.search("next: (.*)\n", capsys.readouterr().out)[1]
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", str(ROOT / "pretrain.py"))
    assert flags[:4] == ["--data", "my data/text", "--out", "runs/text"] and "--block_size" in flags
    config = tyro.cli(pretrain.Config, args=flags, use_underscores=True)
    assert config.batch_tokens % config.block_size == 0 and config.model == "demo" and config.steps == 50
    TokenDataset(config.data, config.block_size)  # both splits have a row


def test_the_next_command_after_fineweb_edu_has_no_flags(capsys):
    split = {"documents": 9_672_101, "files": [{}]}
    meta = {"train": split | {"tokens": 9_900_000_000}, "val": split | {"tokens": 50_000_000}}
    prepare_fineweb.print_summary(Config(), meta | {"val_fraction": 0.005, "skipped_empty": 1})
    assert re.search(r"1 empty document skipped\nnext: python \S*pretrain\.py\n$", capsys.readouterr().out)


# ---- file formats ----------------------------------------------------------------------------------------------------


def test_markdown_source_files_and_csv_become_documents(here, tmp_path, capsys):
    texts = {"notes/a.md": "# Title\n\nSome text.\n", "notes/b.py": "def f():\n    return 1\n", "notes/c.css": "no"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c.csv").write_text('id,review\n1,"First, a line\nand another"\n2,"She said ""yes"""\n')
    here("notes", "c.csv", text_suffixes=(".py",), text_field="review", val_fraction=0.5)
    expected = {texts["notes/a.md"], texts["notes/b.py"], "First, a line\nand another", 'She said "yes"'}
    assert set().union(*documents(tmp_path / "out").values()) == expected
    assert "notes: 2 files\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"c\.csv: no column 'text'; --text_field can be one of: id, review"):
        here("c.csv", out="other")
