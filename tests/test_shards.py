"""A dataset folder is written whole, opened as it was written, and refused in any other state."""

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from cli import UserError
from shards import (
    FORMAT_VERSION,
    INCOMPLETE,
    ShardWriter,
    close_output,
    is_chosen,
    is_validation,
    open_array,
    open_arrays,
    open_output,
    read_ahead,
    read_meta,
    write_array,
)

DESCRIPTION = {"version": FORMAT_VERSION, "kind": "text", "tokenizer": "bytes", "source": {"files": [{"bytes": 3}]}}


@pytest.fixture(autouse=True)
def several_writers_in_one_process(monkeypatch):
    """A writer locks its folder until the process ends; this process goes on to the next test."""
    monkeypatch.setattr(shards, "lock", lambda folder: folder.mkdir(parents=True, exist_ok=True))


def make_dataset(folder: Path, description: dict = DESCRIPTION) -> Path:
    """A small complete dataset."""
    assert open_output(folder, description) is not None
    splits = {}
    for split, tokens in {"train": [256, 1, 2, 3, 4], "val": [256, 5, 6]}.items():
        writer = ShardWriter(folder, split, 2)
        writer.add(np.array(tokens, dtype=np.uint16))
        splits[split] = writer.close()
    close_output(folder, description | splits)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | changes))


# ---- writing -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), max_size=8), shard_tokens=st.integers(1, 15))
def test_shards_joined_are_the_documents_joined(tmp_path_factory, lengths, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    starts = np.cumsum([0, *lengths])
    documents = [np.arange(start, start + n, dtype=np.uint16) for start, n in zip(starts, lengths, strict=False)]
    writer = ShardWriter(folder, "train", shard_tokens)
    for document in documents:
        writer.add(document)
    entry = writer.close()

    assert [shard["file"] for shard in entry["files"]] == [f"train_{i:06d}.npy" for i in range(len(entry["files"]))]
    assert sorted(file.name for file in folder.iterdir()) == [shard["file"] for shard in entry["files"]]
    shards = [np.load(folder / shard["file"], mmap_mode="r") for shard in entry["files"]]
    assert all(shard.dtype == np.uint16 for shard in shards)
    assert np.concatenate([np.array([], int), *shards]).tolist() == list(range(sum(lengths)))
    assert all(len(shard) == shard_tokens for shard in shards[:-1]) and all(len(shard) > 0 for shard in shards)

    assert (entry["documents"], entry["tokens"]) == (len(lengths), sum(lengths))
    for i, shard in enumerate(entry["files"]):
        begin = i * shard_tokens
        assert shard["length"] == len(shards[i])
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
        assert shard["documents"] == sum(begin <= start < begin + shard_tokens for start in starts[:-1])


def test_an_array_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(stream, header):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_array(tmp_path / "train_000000.npy", np.arange(3))
    assert error.value.filename == str(tmp_path / "train_000000.npy")
    assert not list(tmp_path.iterdir())


def test_validation_is_a_matter_of_the_document_alone():
    documents = [f"document {i}".encode() for i in range(20_000)]
    chosen = {fraction: {d for d in documents if is_validation(d, fraction)} for fraction in (0.01, 0.1, 0.5)}
    assert chosen[0.01] < chosen[0.1] < chosen[0.5]  # a larger fraction only adds
    for fraction, chosen_at in chosen.items():
        assert len(chosen_at) / len(documents) == pytest.approx(fraction, abs=4 * (fraction / len(documents)) ** 0.5)
    # the same on every machine and in every version: a document that moved would have been trained on
    assert [i for i in range(20) if is_validation(documents[i], 0.5)] == [0, 1, 2, 6, 7, 9, 11, 15]
    salted = {document for document in chosen[0.5] if is_chosen(document, 0.5, salt=b"mix")}
    assert len(salted) / len(chosen[0.5]) == pytest.approx(0.5, abs=0.1)  # independent of the choice without


# ---- the folder ----------------------------------------------------------------------------------------------------


def test_a_fresh_folder_is_made_and_marked(tmp_path):
    folder = tmp_path / "deep" / "data"
    assert open_output(folder, DESCRIPTION) is not None
    assert [file.name for file in folder.iterdir()] == [INCOMPLETE]
    assert json.loads((folder / INCOMPLETE).read_text()) == DESCRIPTION | {"progress": {}}


def test_a_complete_folder_is_left_alone(tmp_path):
    folder = make_dataset(tmp_path / "data")
    before = contents(folder)
    assert INCOMPLETE not in before and "meta.json" in before
    assert open_output(folder, DESCRIPTION) is None
    assert contents(folder) == before


def test_a_complete_folder_of_other_data_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "data")
    before = contents(folder)
    with pytest.raises(UserError, match=r"another dataset \(tokenizer is bytes, not gpt2\): choose another --out"):
        open_output(folder, DESCRIPTION | {"tokenizer": "gpt2"})
    with pytest.raises(UserError, match="max_tokens is None, not 5; seed is None, not 1"):
        open_output(folder, DESCRIPTION | {"max_tokens": 5, "seed": 1})
    assert contents(folder) == before


def test_what_an_interrupted_run_left_is_removed(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").rename(folder / INCOMPLETE)
    for name in ("train_000007.npy", "val_000000.npy.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / INCOMPLETE).write_text(json.dumps(DESCRIPTION))
    assert open_output(folder, DESCRIPTION) is not None
    assert [file.name for file in folder.iterdir()] == [INCOMPLETE]
    assert open_output(folder, DESCRIPTION | {"tokenizer": "gpt2"}) == {}  # nothing is lost: no shard was finished
    assert json.loads((folder / INCOMPLETE).read_text())["tokenizer"] == "gpt2"


def test_what_another_command_left_half_written_stays(tmp_path):
    """Its shards may be hours of work, or still growing."""
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").unlink()
    (folder / INCOMPLETE).write_text(json.dumps(DESCRIPTION | {"tokenizer": "gpt2"}))
    before = contents(folder)
    with pytest.raises(UserError, match="another, half-written dataset"):
        open_output(folder, DESCRIPTION)
    assert contents(folder) == before


def test_interrupted_after_the_manifest_is_complete(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / INCOMPLETE).write_text("{}")
    assert open_output(folder, DESCRIPTION) is None
    assert read_meta(folder, "text")["tokenizer"] == "bytes"


@pytest.mark.parametrize("name", ["thesis.txt", "train_000000.npy", ".hidden"])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, name):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match="already holds something else: choose another --out"):
        open_output(tmp_path, DESCRIPTION)
    assert contents(tmp_path) == {name: b"years of work"}


def test_an_empty_folder_is_used(tmp_path):
    assert open_output(tmp_path, DESCRIPTION) is not None


# ---- reading -------------------------------------------------------------------------------------------------------


def test_a_dataset_is_read_as_it_was_written(tmp_path):
    folder = make_dataset(tmp_path / "data")
    meta = read_meta(folder, "text")
    arrays = open_arrays(folder, meta)
    assert {split: [array.tolist() for array in arrays[split]] for split in arrays} == {
        "train": [[256, 1], [2, 3], [4]],
        "val": [[256, 5], [6]],
    }
    assert meta.items() >= DESCRIPTION.items()


def rename_to_incomplete(folder: Path) -> None:
    (folder / "meta.json").rename(folder / INCOMPLETE)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (rename_to_incomplete, "text", "half-written: run prepare_fineweb.py again"),
        (rename_to_incomplete, "chat", "half-written: run prepare_dolly.py again"),
        (lambda folder: None, "chat", "holds text data, not chat: prepare_dolly.py makes that"),
        (lambda folder: change_meta(folder, version=99), "text", "has format version 99, expected 1"),
        (lambda folder: change_meta(folder, version=None), "text", "has format version None, expected 1"),
        (lambda folder: change_meta(folder, val={}), "text", "lists no files"),
        (lambda folder: (folder / "meta.json").write_text('{"version": 1,'), "text", "meta.json is damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b'{"version": "\xff"}'), "text", "meta.json is damaged"),
        (lambda folder: (folder / "meta.json").write_text("[1]"), "text", "meta.json is damaged: it holds no JSON obj"),
        (lambda folder: (folder / "meta.json").unlink(), "chat", "half-written or no dataset: it has no meta.json"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path, damage, kind, message):
    damage(make_dataset(tmp_path / "data"))
    with pytest.raises(UserError, match=message):
        read_meta(tmp_path / "data", kind)


@pytest.mark.parametrize(("kind", "script"), [("text", "prepare_fineweb.py"), ("chat", "prepare_dolly.py")])
def test_a_missing_folder_names_the_script_that_makes_it(tmp_path, kind, script):
    with pytest.raises(UserError, match=rf"data: no such dataset folder; make it with {script}, or name another"):
        read_meta(tmp_path / "data", kind)


def test_a_folder_without_any_shards(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(3, dtype=np.uint16))  # and none for validation
    with pytest.raises(UserError, match=r"no meta.json, and no \*train_\*.npy and \*val_\*.npy"):
        read_meta(tmp_path, "text")


@pytest.mark.parametrize("files", [[{"file": "train_000000.npy"}], ["train_000000.npy"], [{"length": 3}]])
def test_a_manifest_with_damaged_entries(tmp_path, files):
    folder = make_dataset(tmp_path / "data")
    change_meta(folder, train={"files": files})
    with pytest.raises(UserError, match=r"meta.json is damaged: delete .* and prepare it again"):
        open_arrays(folder, read_meta(folder, "text"))


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "deep/train.npy", "./train_000000.npy"])
def test_a_manifest_names_files_in_its_own_folder_only(tmp_path, name):
    folder = make_dataset(tmp_path / "data")
    np.save(tmp_path / "outside.npy", np.arange(3, dtype=np.uint16))
    change_meta(folder, train={"files": [{"file": name, "length": 3}]})
    with pytest.raises(UserError, match="which is not a file in the folder"):
        open_arrays(folder, read_meta(folder, "text"))


def test_an_array_of_another_length_than_the_manifest_says(tmp_path):
    folder = make_dataset(tmp_path / "data")
    np.save(folder / "train_000001.npy", np.arange(1, dtype=np.uint16))
    with pytest.raises(UserError, match=r"train_000001\.npy has 1 entries, its manifest says 2"):
        open_arrays(folder, read_meta(folder, "text"))


def test_an_array_that_is_missing(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "val_000001.npy").unlink()
    with pytest.raises(UserError, match=r"val_000001\.npy is missing: delete .* and prepare it again"):
        open_arrays(folder, read_meta(folder, "text"))


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_an_array_cut_short_is_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("cut") / "train_000000.npy"
    np.save(file, np.arange(50, dtype=np.uint16))
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(UserError, match=r"train_000000\.npy is damaged or truncated"):
        open_array(file, 50)


def test_arrays_of_another_shape(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), dtype=np.uint16))
    with pytest.raises(UserError, match=r"a\.npy has 2 dimensions, expected 1"):
        open_array(tmp_path / "a.npy", 3)


class Trap:
    """Whoever unpickles it is caught."""

    sprung = False

    @staticmethod
    def spring():
        Trap.sprung = True
        return Trap()

    def __reduce__(self):
        return Trap.spring, ()


def test_pickled_objects_are_never_loaded(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(np.array([Trap()], dtype=object).dumps())
    for file in ("objects.npy", "pickle.npy"):
        with pytest.raises(UserError, match="is damaged or truncated"):
            open_array(tmp_path / file, 1)
    assert not Trap.sprung
    np.load(tmp_path / "objects.npy", allow_pickle=True)
    assert Trap.sprung  # so the trap works


def test_bare_shards_are_read(tmp_path):
    for name, tokens in {"train_000001": [50256, 1, 2], "train_000002": [3], "val_000000": [50256, 4]}.items():
        np.save(tmp_path / f"edufineweb_{name}.npy", np.array(tokens, dtype=np.uint16))
    meta = read_meta(tmp_path, "text")
    assert (meta["tokenizer"], meta["train"]["tokens"], meta["val"]["tokens"]) == ("gpt2", 4, 2)
    arrays = open_arrays(tmp_path, meta)
    assert [array.tolist() for array in arrays["train"]] == [[50256, 1, 2], [3]]
    assert [array.tolist() for array in arrays["val"]] == [[50256, 4]]


def test_bare_shards_are_no_conversations(tmp_path):
    for name in ("train_000001", "val_000000"):
        np.save(tmp_path / f"edufineweb_{name}.npy", np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match="half-written or no dataset"):
        read_meta(tmp_path, "chat")


def test_an_empty_file_is_no_array(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged or truncated"):
        open_array(tmp_path / "a.npy", 3)


def test_an_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UserError, match="is damaged or truncated"):
        open_array(tmp_path / "a.npy", 3)


def test_every_file_can_be_compared_with_its_checksum(run_script, fails, text_data, tmp_path):
    """A flipped bit changes no length: only the checksum finds it."""
    shutil.copytree(text_data, tmp_path / "data")
    assert "data is whole: " in run_script("shards.py", "data").stdout
    shard = tmp_path / "data" / "train_000001.npy"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    assert "train_000001.npy is damaged" in fails("shards.py", "data")
    assert "no checksums to compare" in fails("shards.py", "nowhere")


# ---- reading ahead -------------------------------------------------------------------------------------------------


def test_reading_ahead_changes_nothing():
    """The same items in the same order; an error comes where it would have come; one item is read in advance."""

    def items():
        for i in range(3):
            read.append(i)
            yield i
        raise UserError("the fourth is damaged")

    read: list[int] = []
    ahead = read_ahead(items())
    assert next(ahead) == 0 and next(ahead) == 1
    while len(read) < 3:  # the third is on its way before it is asked for
        time.sleep(0.01)
    assert next(ahead) == 2
    with pytest.raises(UserError, match="the fourth is damaged"):
        next(ahead)
    assert list(read_ahead(iter([]))) == []


def test_reading_ahead_does_not_hold_up_the_end(tmp_path):
    """A read that takes for ever keeps neither a loop from being left nor the process from ending."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from shards import read_ahead\n"
        "def items():\n"
        "    yield 1\n"
        "    time.sleep(1000)\n"
        "for item in read_ahead(items()): break\n"
    )
    subprocess.run([sys.executable, "-c", script, str(ROOT)], check=True, timeout=60)
