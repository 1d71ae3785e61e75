"""Dataset folders: written completely, read back as written, refused in any other state."""

import hashlib
import json
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from conftest import edit_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt import shards
from minigpt.cli import UserError
from minigpt.files import checksum_json, write_manifest
from minigpt.shards import (
    FORMAT_VERSIONS,
    MIN_SPLIT_TOKENS,
    PROGRESS_FILE,
    SPLITS,
    ShardWriter,
    SplitChooser,
    begin_dataset,
    discard_dataset,
    finish_dataset,
    hash_document,
    open_array,
    open_arrays,
    read_meta,
    write_array,
)

META = {"version": FORMAT_VERSIONS["text"], "kind": "text", "tokenizer": "bytes", "vocab_size": 257}
META |= {"source": {"files": [{"file": "a.txt", "bytes": 3}]}, "val_fraction": 0.1}
CHAT_META = META | {"version": FORMAT_VERSIONS["chat"], "kind": "chat", "block_size": 8}
CHAT_META |= dict.fromkeys(("records", "truncated", "dropped", "skipped_empty"), 0)


@pytest.fixture(autouse=True)
def without_lock(monkeypatch):
    """A writer locks its folder until the process ends, and here one process runs many writers."""
    monkeypatch.setattr(shards, "lock_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))


def make_dataset(folder: Path, meta: dict = META) -> Path:
    """Write a small complete dataset."""
    assert begin_dataset(folder, meta) is not None
    splits = {}
    for split, tokens in {"train": [256, 1, 2, 3, 4], "val": [256, 5, 6]}.items():
        writer = ShardWriter(folder, split, 2)
        writer.add(np.array(tokens, dtype=np.uint16))
        splits[split] = writer.close() | ({"loss_tokens": 1} if meta["kind"] == "chat" else {})
    finish_dataset(folder, meta | splits)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def change_meta(folder: Path, **changes) -> None:
    edit_manifest(folder / "meta.json", **changes)


# ---- writing ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 12), max_size=8), shard_tokens=st.integers(1, 15))
def test_concatenated_shards_are_the_concatenated_documents(tmp_path_factory, lengths, shard_tokens):
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


def test_a_failed_write_of_an_array_leaves_no_file(tmp_path, monkeypatch):
    def full(path):
        assert path.read_bytes().startswith(b"\x93NUMPY")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minigpt.files.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_array(tmp_path / "train_000000.npy", np.arange(3))
    assert error.value.filename == str(tmp_path / "train_000000.npy")
    assert not list(tmp_path.iterdir())


def test_the_split_depends_on_the_document_only():
    documents = [f"document {i}".encode() for i in range(20_000)]
    selected = {fraction: {d for d in documents if hash_document(d) < fraction} for fraction in (0.01, 0.1, 0.5)}
    assert selected[0.01] < selected[0.1] < selected[0.5]  # a larger fraction only adds documents
    for fraction, subset in selected.items():
        assert len(subset) / len(documents) == pytest.approx(fraction, abs=4 * (fraction / len(documents)) ** 0.5)
    # fixed for all machines and versions: a document that moves to validation has been trained on before
    assert [i for i in range(20) if hash_document(documents[i]) < 0.5] == [0, 1, 2, 6, 7, 9, 11, 15]
    salted = {document for document in selected[0.5] if hash_document(document, salt=b"mix") < 0.5}
    assert len(salted) / len(selected[0.5]) == pytest.approx(0.5, abs=0.1)  # independent of the selection without salt


TARGET = 100  # required size of the validation split


def expected_validation(hashes: list[float], sizes: list[int], val_fraction: float) -> set[float]:
    """Return the hashes below `val_fraction`, or those of the lowest hashes that reach the required size."""
    target = min(TARGET, max(sum(sizes) // 10, MIN_SPLIT_TOKENS))
    lowest, filled = set(), 0
    for document_hash, size in sorted(zip(hashes, sizes, strict=True)):
        if filled >= target or (filled and filled + size > sum(sizes) / 2):
            break
        lowest, filled = lowest | {document_hash}, filled + size
    return (lowest | {h for h in hashes if h < val_fraction}) - {max(hashes)}  # one is left to train on


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(2, 60) | st.just(900), min_size=2, max_size=60),
    val_fraction=st.sampled_from([1e-6, 0.005, 0.2, 0.5]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_lowest_hashes_fill_the_validation_split(sizes, val_fraction, seed, data):
    """Also if the count of the documents was interrupted."""
    hashes = [hash_document(f"{seed} {i}".encode()) for i in range(len(sizes))]
    stop = data.draw(st.integers(0, len(sizes)))
    chooser = SplitChooser(TARGET)
    for i, document in enumerate(zip(hashes, sizes, strict=True)):
        if i == stop:
            chooser = SplitChooser(TARGET, json.loads(json.dumps(chooser.state_dict())))
        chooser.add(*document)
    chosen = chooser.choose(val_fraction, "document", "none skipped")
    assert {h for h in hashes if h < chosen} == expected_validation(hashes, sizes, val_fraction)


def test_few_documents_are_kept_of_a_large_corpus():
    chooser = SplitChooser(1025)
    for i in range(20_000):
        chooser.add(hash_document(b"%d" % i), 2 + i % 9)
    assert len(chooser.lowest) < 1025 / 2 and chooser.documents == 20_000
    assert chooser.choose(0.1, "document", "") == 0.1


def test_documents_that_cannot_be_split():
    chooser = SplitChooser(1)
    with pytest.raises(UserError, match=r"the source has 0 usable documents \(2 skipped\), but each split needs one"):
        chooser.choose(0.1, "document", "2 skipped")
    chooser.add(0.3, 5)
    with pytest.raises(UserError, match=r"the source has 1 usable document \(2 skipped\), but each split needs one"):
        chooser.choose(0.1, "document", "2 skipped")
    chooser.add(0.3, 5)
    with pytest.raises(UserError, match="all 2 documents are equal, but each split needs its own: give more data"):
        chooser.choose(0.1, "document", "")


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_new_folder_is_created_and_marked_incomplete(tmp_path):
    folder = tmp_path / "deep" / "data"
    assert begin_dataset(folder, META) is not None
    assert [file.name for file in folder.iterdir()] == [PROGRESS_FILE]
    saved = json.loads((folder / PROGRESS_FILE).read_text())
    assert saved.pop("checksum") == checksum_json(saved) and saved == META | {"progress": {}}


def test_a_complete_dataset_is_not_changed(tmp_path):
    folder = make_dataset(tmp_path / "data")
    before = contents(folder)
    assert PROGRESS_FILE not in before and "meta.json" in before
    assert begin_dataset(folder, META) is None
    assert contents(folder) == before


def test_another_complete_dataset_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "data")
    before = contents(folder)
    with pytest.raises(UserError, match=r"another dataset \(tokenizer is bytes, not gpt2\): choose another --out"):
        begin_dataset(folder, META | {"tokenizer": "gpt2"})
    with pytest.raises(UserError, match="max_tokens is None, not 5; seed is None, not 1"):
        begin_dataset(folder, META | {"max_tokens": 5, "seed": 1})
    assert contents(folder) == before


def test_leftovers_of_an_interrupted_run_are_removed(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").rename(folder / PROGRESS_FILE)
    for name in ("train_000007.npy", "val_000000.npy.tmp"):
        (folder / name).write_bytes(b"half")
    write_manifest(folder / PROGRESS_FILE, META | {"progress": {}})
    assert begin_dataset(folder, META) is not None
    assert [file.name for file in folder.iterdir()] == [PROGRESS_FILE]
    assert begin_dataset(folder, META | {"tokenizer": "gpt2"}) == {}  # no shard was finished, so nothing is lost
    write_manifest(folder / PROGRESS_FILE, META | {"progress": {"position": 3}})
    assert begin_dataset(folder, META) == {"position": 3}
    assert begin_dataset(folder, META | {"tokenizer": "gpt2"}) == {}  # progress of another dataset does not count
    assert json.loads((folder / PROGRESS_FILE).read_text())["tokenizer"] == "gpt2"


def test_another_incomplete_dataset_is_refused(tmp_path):
    """Its shards may be hours of work."""
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").unlink()
    (folder / PROGRESS_FILE).write_text(json.dumps(META | {"tokenizer": "gpt2"}))
    before = contents(folder)
    with pytest.raises(UserError, match="another, incomplete dataset"):
        begin_dataset(folder, META)
    assert contents(folder) == before


def test_a_dataset_with_meta_json_is_complete(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / PROGRESS_FILE).write_text("{}")  # as if interrupted between the two
    assert begin_dataset(folder, META) is None
    assert read_meta(folder, "text")["tokenizer"] == "bytes"


@pytest.mark.parametrize("name", ["thesis.txt", "train_000000.npy", ".hidden", "meta.json"])
def test_a_folder_with_other_files_is_refused_and_unchanged(tmp_path, name):
    text = '{"kind": "tokenizer"}' if name == "meta.json" else "years of work"
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="already exists and is not a dataset folder: choose another --out"):
        begin_dataset(tmp_path, META)
    assert contents(tmp_path) == {name: text.encode()}


def test_a_discarded_dataset_leaves_nothing(tmp_path):
    folder = make_dataset(tmp_path / "data")
    mark_incomplete(folder)
    (folder / ".lock").touch()
    (folder / "train_000000.npy.tmp").touch()
    discard_dataset(folder)
    assert not folder.exists()
    folder = make_dataset(tmp_path / "data")
    mark_incomplete(folder)
    (folder / "notes.txt").write_text("mine")
    discard_dataset(folder)
    assert contents(folder) == {"notes.txt": b"mine"}


def test_an_empty_folder_is_used(tmp_path):
    assert begin_dataset(tmp_path, META) is not None


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_a_dataset_is_read_back(tmp_path):
    folder = make_dataset(tmp_path / "data")
    meta = read_meta(folder, "text")
    arrays = open_arrays(folder, meta)
    assert {split: [array.tolist() for array in arrays[split]] for split in arrays} == {
        "train": [[256, 1], [2, 3], [4]],
        "val": [[256, 5], [6]],
    }
    assert meta.items() >= META.items()


def mark_incomplete(folder: Path) -> None:
    (folder / "meta.json").rename(folder / PROGRESS_FILE)


@pytest.mark.parametrize(
    ("corrupt", "kind", "message"),
    [
        (mark_incomplete, "text", "is incomplete: run prepare_fineweb.py again"),
        (mark_incomplete, "chat", "is incomplete: run prepare_dolly.py again"),
        (lambda folder: None, "chat", "holds text data, not chat: create one with prepare_dolly.py"),
        (
            lambda folder: change_meta(folder, version=99),
            "text",
            "has format version 99, expected 1: delete it and run",
        ),
        (lambda folder: change_meta(folder, version=None), "text", "has format version None, expected 1"),
        (
            lambda folder: change_meta(folder, kind="chat"),
            "chat",
            "has format version 1, expected 2: delete it and run",
        ),
        (
            lambda folder: change_meta(folder, kind=None),
            "text",
            "the kind in its meta.json is None",
        ),
        (lambda folder: change_meta(folder, kind=["text"]), None, "the kind in its meta.json is"),
        (lambda folder: change_meta(folder, val={}), "text", "meta.json is corrupt: val is"),
        (
            lambda folder: change_meta(folder, val={"documents": 1, "tokens": 1, "files": []}),
            "text",
            "lists no files",
        ),
        (lambda folder: (folder / "meta.json").write_text('{"version": 1,'), "text", "meta.json is corrupt"),
        (lambda folder: (folder / "meta.json").write_bytes(b'{"version": "\xff"}'), "text", "meta.json is corrupt"),
        (
            lambda folder: (folder / "meta.json").write_text("[1]"),
            "text",
            "meta.json is corrupt: it does not contain a JSON",
        ),
        (lambda folder: (folder / "meta.json").unlink(), "chat", "incomplete or not a dataset: it has no meta.json"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path, corrupt, kind, message):
    corrupt(make_dataset(tmp_path / "data"))
    with pytest.raises(UserError, match=message):
        read_meta(tmp_path / "data", kind)


def test_any_kind_is_read_without_an_expected_one(tmp_path):
    make_dataset(tmp_path / "text")
    make_dataset(tmp_path / "chat", CHAT_META)
    make_dataset(tmp_path / "old", CHAT_META | {"version": 1})  # its loss mask has another name
    assert [read_meta(tmp_path / kind)["kind"] for kind in ("text", "chat")] == ["text", "chat"]
    with pytest.raises(UserError, match=r"has format version 1, expected 2: delete it and run prepare_.* again"):
        read_meta(tmp_path / "old")
    with pytest.raises(UserError, match=r"missing: no such dataset folder; create it with prepare_fineweb.py or prep"):
        read_meta(tmp_path / "missing")


@pytest.mark.parametrize(("kind", "script"), [("text", "prepare_fineweb.py"), ("chat", "prepare_dolly.py")])
def test_a_missing_folder_names_the_script_that_creates_it(tmp_path, kind, script):
    with pytest.raises(UserError, match=rf"data: no such dataset folder; create it with {script}, or choose another"):
        read_meta(tmp_path / "data", kind)


def test_a_folder_without_validation_shards(tmp_path):
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(3, dtype=np.uint16))
    with pytest.raises(UserError, match=r"no meta.json, and no shards of both splits, such as NAME_train_000001\.bin"):
        read_meta(tmp_path, "text")


@pytest.mark.parametrize("files", [[{"file": "train_000000.npy"}], ["train_000000.npy"], [{"length": 3}]])
def test_meta_json_with_corrupt_entries(tmp_path, files):
    folder = make_dataset(tmp_path / "data")
    change_meta(folder, train={"files": files})
    with pytest.raises(UserError, match=r"meta.json is corrupt: train is"):
        open_arrays(folder, read_meta(folder, "text"))


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "deep/train.npy", "./train_000000.npy"])
def test_meta_json_names_files_in_its_own_folder_only(tmp_path, name):
    folder = make_dataset(tmp_path / "data")
    np.save(tmp_path / "outside.npy", np.arange(3, dtype=np.uint16))
    change_meta(folder, train={"documents": 1, "tokens": 3, "files": [{"file": name, "length": 3, "sha256": ""}]})
    with pytest.raises(UserError, match="which is not a file in the folder"):
        open_arrays(folder, read_meta(folder, "text"))


def test_an_array_of_another_length_than_in_meta_json(tmp_path):
    folder = make_dataset(tmp_path / "data")
    np.save(folder / "train_000001.npy", np.arange(1, dtype=np.uint16))
    with pytest.raises(UserError, match=r"train_000001\.npy has 1 entries, expected 2 from its meta.json"):
        open_arrays(folder, read_meta(folder, "text"))


def test_a_missing_array(tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "val_000001.npy").unlink()
    with pytest.raises(UserError, match=r"val_000001\.npy is missing: delete .* and prepare it again"):
        open_arrays(folder, read_meta(folder, "text"))


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_truncated_array_is_refused(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("truncated") / "train_000000.npy"
    np.save(file, np.arange(50, dtype=np.uint16))
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(UserError, match=r"train_000000\.npy is corrupt or truncated"):
        open_array(file, 50)


def test_an_array_of_two_dimensions_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), dtype=np.uint16))
    with pytest.raises(UserError, match=r"a\.npy is corrupt or truncated: it is not a one-dimensional .npy array"):
        open_array(tmp_path / "a.npy", 3)


class Trap:
    """An object whose unpickling is recorded."""

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
        with pytest.raises(UserError, match="is corrupt or truncated"):
            open_array(tmp_path / file, 1)
    assert not Trap.sprung
    np.load(tmp_path / "objects.npy", allow_pickle=True)
    assert Trap.sprung  # the trap works


def write_bin(file: Path, tokens, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    """Write a shard as llm.c and modded-nanogpt do: a header of 256 int32, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    file.write_bytes(header.tobytes() + np.asarray(tokens, dtype).tobytes())


def write_raw(file: Path, tokens) -> None:
    """Write a shard as nanoGPT does: the tokens alone."""
    np.asarray(tokens, "<u2").tofile(file)


def write_npy(file: Path, tokens) -> None:
    np.save(file, np.asarray(tokens, np.uint16))


BARE_FORMATS = {"npy": (write_npy, ".npy"), "llm.c": (write_bin, ".bin"), "nanoGPT": (write_raw, ".bin")}


@pytest.mark.parametrize("write, suffix", BARE_FORMATS.values(), ids=BARE_FORMATS)
def test_bare_shards_are_read(tmp_path, write, suffix):
    for name, tokens in {"train_000001": [50256, 1, 2], "train_000002": [3], "val_000000": [50256, 4]}.items():
        write(tmp_path / f"edufineweb_{name}{suffix}", tokens)
    for name in ("notes.bin", "train.txt", "retrain.bin", "train_tokens.npy", "edufineweb_test_000000.bin"):
        (tmp_path / name).write_text("no shard")
    meta = read_meta(tmp_path, "text")
    assert (meta["tokenizer"], meta["train"]["tokens"], meta["val"]["tokens"]) == ("gpt2", 4, 2)
    arrays = open_arrays(tmp_path, meta)
    assert [array.tolist() for array in arrays["train"]] == [[50256, 1, 2], [3]]
    assert [array.tolist() for array in arrays["val"]] == [[50256, 4]]
    assert all(isinstance(array, np.memmap) for array in arrays["train"] + arrays["val"])
    with pytest.raises(UserError, match="incomplete or not a dataset"):
        read_meta(tmp_path, "chat")


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (("train.bin", "val.bin"), write_raw),  # nanoGPT
        (("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"), write_bin),  # llm.c
        (("TinyStories_train.bin", "TinyStories_val.bin"), write_bin),  # llm.c
        (("fineweb_train_000001.bin", "fineweb_val_000000.bin"), write_bin),  # llm.c, modded-nanogpt
    ],
)
def test_names_of_other_repositories(tmp_path, names, write):
    for name in names:
        write(tmp_path / name, [50256, 7])
    meta = read_meta(tmp_path)
    assert (meta["train"]["files"][0]["file"], meta["val"]["files"][0]["file"]) == names


def test_one_token_without_a_header(tmp_path):
    write_raw(tmp_path / "train.bin", [7])
    assert open_array(tmp_path / "train.bin").tolist() == [7]


HEADER = np.array([20240520, 1, 3], "<i4").tobytes().ljust(1024, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + bytes(5), "it has 1,029 bytes, expected 1,030 for the 3 tokens in its header; download or write"),
        (HEADER + bytes(8), "it has 1,032 bytes, expected 1,030"),
        (HEADER[:800], "it has 800 bytes, expected 1,030"),
        (HEADER[:4], "has magic 20240520 and version 0"),
        (HEADER[:8] + bytes(1016), "it holds no tokens"),
        (HEADER[:8] + b"\xff" * 4 + bytes(1012), "it has 1,024 bytes, expected 1,022"),
        (bytes(7), "it has an odd number of bytes, 7, expected uint16 tokens"),
        (b"", "it holds no tokens"),
    ],
)
def test_corrupt_bin_files(tmp_path, content, message):
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_array(tmp_path / "train.bin")
    assert str(tmp_path / "train.bin") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("magic", "version", "dtype"), [(20240801, 7, "<u4"), (20240522, 1, "<u2"), (20240520, 2, "<u2")]
)
def test_other_formats_of_llm_c_are_refused(tmp_path, magic, version, dtype):
    write_bin(tmp_path / "fineweb_val_000000.bin", [128000, 1, 2][-2:], magic, version, dtype)
    message = rf"magic {magic} and version {version} in its header, expected 20240520 and 1: .* Llama 3"
    with pytest.raises(UserError, match=message):
        open_array(tmp_path / "fineweb_val_000000.bin")


def test_character_tokens_of_nanogpt_are_refused(tmp_path):
    for name in ("train.bin", "val.bin"):
        write_raw(tmp_path / name, [1, 2, 3])
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"character tokens: .* prepare_fineweb.py --files input.txt --tokenizer bytes"):
        read_meta(tmp_path, "text")


def test_shards_in_two_formats_are_refused(tmp_path):
    """They are often the same tokens twice."""
    for split in SPLITS:
        write_bin(tmp_path / f"{split}.bin", [1, 2])
        write_npy(tmp_path / f"{split}_000000.npy", [1, 2])
    with pytest.raises(UserError, match=r"holds shards in \.npy and \.bin files: keep one"):
        read_meta(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "train_000001.npy"])
def test_only_regular_files_are_opened(tmp_path, name):
    """Opening a named pipe would wait for a writer."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is not a regular file"):
        open_array(tmp_path / name)
    (tmp_path / "link").mkdir()
    write_raw(tmp_path / "real", [5])
    (tmp_path / "link" / "train.bin").symlink_to("../real")
    assert open_array(tmp_path / "link" / "train.bin").tolist() == [5]


def test_an_empty_file_is_not_an_array(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(UserError, match="is corrupt or truncated"):
        open_array(tmp_path / "a.npy", 3)


def test_an_npz_archive_is_not_an_array(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UserError, match="is corrupt or truncated"):
        open_array(tmp_path / "a.npy", 3)


def test_more_shards_than_the_usual_limit_of_open_files(tmp_path):
    """1.3 T tokens have 13,000 shards; most systems let a process open 1,024 files unless it asks for more."""
    n_shards, hard = 13_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < n_shards + 100:
        pytest.skip(f"this system allows {hard:,} open files")
    np.save(tmp_path / "0.npy", np.arange(5, dtype=np.uint16))
    for i in range(1, n_shards):
        os.link(tmp_path / "0.npy", tmp_path / f"{i}.npy")
    files = [{"file": f"{i}.npy", "length": 5} for i in range(n_shards)]
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, hard))
    try:
        arrays = shards.open_arrays(tmp_path, {"train": {"files": files[1:]}, "val": {"files": files[:1]}})
        assert len(arrays["train"]) == n_shards - 1 and all(array[4] == 4 for array in arrays["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
