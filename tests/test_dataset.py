"""Which rows come when, and what a row holds: the fast paths against slow and obvious ones."""

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_manifest
from dataset_size import write_sparse_dataset
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_shards import BARE_FORMATS, write_bin

from minigpt import dataset
from minigpt.chat import encode_chat
from minigpt.cli import UserError
from minigpt.dataset import (
    Batch,
    ChatDataset,
    Dataset,
    TokenDataset,
    global_rows,
    pack_rows,
    permute,
    start_reading,
    train_batches,
    val_batches,
)
from minigpt.files import write_manifest
from minigpt.shards import FORMAT_VERSIONS, ShardWriter, write_array
from minigpt.tokenizer import load_tokenizer
from model import IGNORE_INDEX

relaxed = settings(deadline=None, max_examples=60)
on_disk = settings(deadline=None, max_examples=20)

BYTES = load_tokenizer("bytes")
SEEDS = st.integers(0, 2**31)


def write_meta(folder: Path, kind: str, splits: dict, tokenizer: str = "bytes") -> Path:
    meta = {"version": FORMAT_VERSIONS[kind], "kind": kind, "tokenizer": tokenizer, "vocab_size": 257}
    meta |= {"source": {}, "val_fraction": 0.1, "block_size": 8}
    meta |= dict.fromkeys(("records", "truncated", "dropped", "skipped_empty"), 0)
    counts = {"documents": 1, "tokens": 1, "loss_tokens": 1}
    write_manifest(folder / "meta.json", meta | {split: counts | entry for split, entry in splits.items()})
    return folder


def text_folder(
    folder: Path, train: np.ndarray, val: np.ndarray, shard_tokens: int = 1000, tokenizer: str = "bytes"
) -> Path:
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, tokens in {"train": train, "val": val}.items():
        writer = ShardWriter(folder, split, shard_tokens)
        writer.add(tokens.astype(np.uint16))
        splits[split] = writer.close()
    return write_meta(folder, "text", splits, tokenizer)


Conversation = tuple[list[int], list[bool]]


def chat_folder(folder: Path, train: list[Conversation], val: list[Conversation]) -> Path:
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, conversations in {"train": train, "val": val}.items():
        arrays = {
            "tokens": np.array([token for tokens, _ in conversations for token in tokens], dtype=np.uint16),
            "loss_mask": np.array([mark for _, loss_mask in conversations for mark in loss_mask], dtype=bool),
            "offsets": np.cumsum([0, *(len(tokens) for tokens, _ in conversations)]),
        }
        splits[split] = {"files": [write_array(folder / f"{split}_{key}.npy", array) for key, array in arrays.items()]}
    return write_meta(folder, "chat", splits)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> TokenDataset:
    """Text of 43 training rows and 21 for validation."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    return TokenDataset(text_folder(folder, rng.integers(0, 257, 43 * 8 + 5), rng.integers(0, 257, 21 * 8 + 1), 50), 8)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatDataset:
    """Eighty short conversations in each split."""
    splits = [[random_conversation(2 + 7 * i % 28, i) for i in range(start, start + 80)] for start in (0, 80)]
    return ChatDataset(chat_folder(tmp_path_factory.mktemp("chat"), *splits), 32)


def random_conversation(length: int, seed: int = 0) -> Conversation:
    rng = np.random.default_rng([length, seed])
    tokens = [BYTES.end_of_text, *rng.integers(0, 256, length - 1).tolist()]
    return tokens, [False, *(rng.random(length - 2) < 0.5).tolist(), True]


def rows_of(batches: list[Batch]) -> Counter:
    """How often each row occurs; tokens, targets and positions all count."""
    fields = [[b.tokens, b.targets] + ([] if b.positions is None else [b.positions]) for b in batches]
    joined = [torch.cat(tensors, dim=1) for tensors in fields]
    return Counter(tuple(row) for rows in joined for row in rows.tolist())


# ---- permute -------------------------------------------------------------------------------------------------------


@relaxed
@given(n=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 50))
@example(n=1, seed=0, epoch=0)
@example(n=2, seed=0, epoch=0)
@example(n=1024, seed=0, epoch=0)
@example(n=1025, seed=0, epoch=0)
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@relaxed
@given(n=st.integers(1, 10**12), seed=SEEDS, data=st.data())
def test_permute_of_a_few_of_many(n, seed, data):
    """Any indices can be asked for alone, in any order; no two of them meet."""
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), unique=True, min_size=1, max_size=50)))
    taken = permute(index, n, seed, 3)
    assert len(set(taken.tolist())) == len(index) and taken.min() >= 0 and taken.max() < n
    assert [int(permute(index[i : i + 1], n, seed, 3)[0]) for i in range(len(index))] == taken.tolist()


@relaxed
@given(n=st.integers(30, 2000), seed=SEEDS, epoch=st.integers(0, 50))
def test_permute_differs_between_epochs_and_seeds(n, seed, epoch):
    orders = [permute(np.arange(n), n, *key) for key in ((seed, epoch), (seed, epoch + 1), (seed + 1, epoch))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (orders[i] == orders[j]).mean() < 0.5
    assert (orders[0] == np.arange(n)).mean() < 0.5


def test_permute_is_roughly_uniform():
    """Over many epochs each index goes everywhere about equally often, and neighbours part."""
    n, epochs = 100, 2000
    orders = np.stack([permute(np.arange(n), n, 1, epoch) for epoch in range(epochs)])  # (epochs, n)
    for i in range(n):
        counts = np.bincount(orders[:, i], minlength=n)
        assert np.abs(counts - epochs / n).max() < 7 * (epochs / n) ** 0.5
    apart = np.abs(np.diff(orders, axis=1))
    assert (apart == 1).mean() < 2 * 2 / n and apart.mean() == pytest.approx(n / 3, rel=0.03)


# ---- global_rows and train_batches ---------------------------------------------------------------------------------


@relaxed
@given(n_rows=st.integers(1, 60), batch_rows=st.integers(1, 150), seed=SEEDS)
@example(n_rows=10, batch_rows=10, seed=0)
@example(n_rows=10, batch_rows=7, seed=0)
@example(n_rows=7, batch_rows=100, seed=0)
def test_every_row_comes_once_an_epoch(n_rows, batch_rows, seed):
    epochs = 4
    steps = -(-epochs * n_rows // batch_rows)
    batches = [global_rows(n_rows, batch_rows, seed, step) for step in range(steps)]
    assert all(batch.shape == (batch_rows,) for batch in batches)
    stream = np.concatenate(batches)[: epochs * n_rows].reshape(epochs, n_rows)
    assert (np.sort(stream, axis=1) == np.arange(n_rows)).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second, other = global_rows(50, 50, 1, 0), global_rows(50, 50, 1, 1), global_rows(50, 50, 2, 0)
    assert first.tolist() != second.tolist() and first.tolist() != other.tolist()
    assert first.tolist() != sorted(first)
    assert global_rows(50, 50, 1, 0).tolist() == first.tolist()


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_processes_share_the_same_global_batch(request, kind, step):
    data: Dataset = request.getfixturevalue(kind)
    expected = rows_of([data.batch("train", global_rows(data.n_rows["train"], 16, 5, step))])
    for world_size in (1, 2, 4):
        for micro in (1, 2, 4):
            ranks = [train_batches(data, step, 5, 16, micro, rank, world_size) for rank in range(world_size)]
            assert {len(batches) for batches in ranks} == {16 // world_size // micro}
            assert {batch.tokens.shape for batches in ranks for batch in batches} == {(micro, data.block_size)}
            assert rows_of([batch for batches in ranks for batch in batches]) == expected


def test_one_epoch_of_training_sees_every_row_once(text):
    n_rows = text.n_rows["train"]
    assert n_rows == 43
    batches = [batch for step in range(n_rows) for batch in train_batches(text, step, 9, 1, 1)]
    assert rows_of(batches) == rows_of([text.batch("train", range(n_rows))])


# ---- TokenDataset --------------------------------------------------------------------------------------------------


@on_disk
@given(n=st.integers(5, 90), shard_tokens=st.integers(7, 40), block_size=st.integers(1, 12), data=st.data())
def test_a_row_is_a_slice_of_the_corpus(tmp_path_factory, n, shard_tokens, block_size, data):
    assume(n > block_size)
    corpus = {"train": np.arange(n) * 7 % 257, "val": np.arange(n) * 5 % 257}
    folder = text_folder(tmp_path_factory.mktemp("text"), **corpus, shard_tokens=shard_tokens)
    dataset = TokenDataset(folder, block_size)
    assert dataset.n_rows == {"train": (n - 1) // block_size, "val": (n - 1) // block_size}
    for split, tokens in corpus.items():
        rows = data.draw(st.lists(st.integers(0, dataset.n_rows[split] - 1), min_size=1, max_size=5))
        batch = dataset.batch(split, rows)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.positions is None
        for i, row in enumerate(rows):
            begin = row * block_size
            assert batch.tokens[i].tolist() == tokens[begin : begin + block_size].tolist()
            assert batch.targets[i].tolist() == tokens[begin + 1 : begin + 1 + block_size].tolist()


def test_memory_does_not_grow_with_the_dataset(tmp_path):
    """`tests/dataset_size.py` measures whole runs."""
    n_files = write_sparse_dataset(tmp_path / "data", 10**11)
    tracemalloc.start()
    data = TokenDataset(tmp_path / "data", 1024)
    (batch,) = train_batches(data, step=1000, seed=1, batch_size=8, micro_batch_size=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_files == 1001 and data.n_rows["train"] == 97_656_249 and batch.tokens.shape == (8, 1024)
    assert peak < 20e6, peak


def test_the_rows_of_a_step_are_read_ahead(text, monkeypatch):
    """All of this process's rows before the first micro-batch: else slow storage would delay each row."""
    started: list[tuple[int, int]] = []

    def record(array: np.ndarray) -> int:
        started.append((array.ctypes.data, array.nbytes))
        return start_reading(array)

    def check(data: TokenDataset, split: str, rows: np.ndarray) -> Batch:
        assert len(started) >= 8
        return batch(data, split, rows)

    batch = TokenDataset.batch
    monkeypatch.setattr(dataset, "start_reading", record)
    monkeypatch.setattr(TokenDataset, "batch", check)
    train_batches(text, step=3, seed=1, batch_size=16, micro_batch_size=2, rank=1, world_size=2)
    own = global_rows(text.n_rows["train"], 16, 1, 3).reshape(4, 2, 2)[:, 1].ravel()
    T = text.block_size
    pieces = [piece for row in own for piece in text.pieces("train", int(row) * T, T + 1)]
    assert started == [(piece.ctypes.data, piece.nbytes) for piece in pieces]


def test_reading_ahead_is_possible(text):
    assert all(start_reading(array) == 0 for split in ("train", "val") for array in text.arrays[split])


def test_a_split_too_short_for_one_row(tmp_path):
    folder = text_folder(tmp_path, np.arange(100), np.arange(8))
    assert TokenDataset(folder, 7).n_rows == {"train": 14, "val": 1}
    with pytest.raises(UserError, match="the val split has 8 tokens, too few for one row of 8 and its targets"):
        TokenDataset(folder, 8)


@pytest.mark.parametrize("place", [3, 8])  # 8 is a target only
def test_a_token_beyond_the_vocabulary(tmp_path, place):
    tokens = np.arange(20)
    tokens[place] = 257
    data = TokenDataset(text_folder(tmp_path, tokens, np.arange(20)), 8)
    data.batch("val", [0])
    with pytest.raises(
        UserError, match="holds token 257, but bytes has 257 tokens: delete the folder and prepare it again"
    ):
        data.batch("train", [0])


def test_text_and_conversations_are_not_mixed_up(text, chat):
    with pytest.raises(UserError, match="holds chat data, not text"):
        TokenDataset(chat.folder, 8)
    with pytest.raises(UserError, match="holds text data, not chat"):
        ChatDataset(text.folder, 8)


# ---- validation ----------------------------------------------------------------------------------------------------


@relaxed
@given(
    kind=st.sampled_from(["text", "chat"]),
    max_rows=st.integers(1, 50),
    micro=st.integers(1, 7),
    world_size=st.integers(1, 8),
)
def test_validation_sees_every_row_once(text, chat, kind, max_rows, micro, world_size):
    data = {"text": text, "chat": chat}[kind]
    batches = [batch for rank in range(world_size) for batch in val_batches(data, max_rows, micro, rank, world_size)]
    assert {batch.tokens.shape for batch in batches} == {(micro, data.block_size)}
    whole = data.batch("val", range(min(max_rows, data.n_rows["val"])))
    assert sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches) == int(
        (whole.targets != IGNORE_INDEX).sum()
    )
    seen = rows_of(batches)
    filling = Counter(
        {row: n for row, n in seen.items() if set(row[data.block_size : 2 * data.block_size]) == {IGNORE_INDEX}}
    )
    assert seen - filling == rows_of([whole])


# ---- ChatDataset ---------------------------------------------------------------------------------------------------


def unpack(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The (tokens, targets) between restarts of the positions, without what only fills a row up."""
    found = []
    fields = (tensor.tolist() for tensor in (batch.tokens, batch.targets, batch.positions))
    for tokens, targets, positions in zip(*fields, strict=True):
        starts = [i for i, position in enumerate(positions) if position == 0] + [len(tokens)]
        assert positions == [i for a, b in pairwise(starts) for i in range(b - a)]
        pieces = [(tokens[a:b], targets[a:b]) for a, b in pairwise(starts)]
        if set(pieces[-1][1]) == {IGNORE_INDEX}:
            assert set(pieces.pop()[0]) == {BYTES.end_of_text}
        found += pieces
    return found


@on_disk
@given(lengths=st.lists(st.integers(2, 21), min_size=1, max_size=30), data=st.data())
@example(lengths=[21, 21], data=None)  # rows that are full
def test_rows_hold_each_conversation_once(tmp_path_factory, lengths, data):
    conversations = [random_conversation(n, i) for i, n in enumerate(lengths)]
    dataset = ChatDataset(chat_folder(tmp_path_factory.mktemp("chat"), conversations, conversations[:1]), 20)
    batch = dataset.batch("train", range(dataset.n_rows["train"]))
    assert batch.tokens.shape == (dataset.n_rows["train"], 20)
    expected = [
        (tokens[:-1], [t if mark else IGNORE_INDEX for t, mark in zip(tokens[1:], loss_mask[1:], strict=True)])
        for tokens, loss_mask in conversations
    ]
    assert sorted(unpack(batch)) == sorted(expected)


def test_the_loss_covers_the_assistant_only(tmp_path):
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    encoded = encode_chat(BYTES, messages)
    batch = ChatDataset(chat_folder(tmp_path, [encoded], [encoded]), 64).batch("train", [0])
    targets = [target for target in batch.targets[0].tolist() if target != IGNORE_INDEX]
    assert BYTES.decode(targets) == "Because.<|end|>"
    asked = batch.tokens[0, : batch.targets[0].tolist().index(targets[0]) + 1].tolist()
    assert BYTES.decode(asked) == "<|endoftext|><|user|>Why?<|end|><|assistant|>"


def test_the_context_must_hold_the_longest_conversation(tmp_path):
    folder = chat_folder(tmp_path, [random_conversation(21), random_conversation(5)], [random_conversation(5)])
    assert ChatDataset(folder, 20).n_rows["train"] == 2
    with pytest.raises(UserError, match="a conversation of 21 tokens, and the model's context is 19: prepare it with"):
        ChatDataset(folder, 19)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("loss_mask", np.ones(4, dtype=bool), "train arrays do not fit each other"),
        ("offsets", np.array([0, 3, 4]), "train arrays do not fit each other"),
        ("offsets", np.array([0]), "train arrays do not fit each other"),
        ("offsets", np.array([0, 3, 3, 5]), "train offsets do not increase"),
        ("offsets", np.array([0, 4, 2, 5]), "train offsets do not increase"),
    ],
)
def test_arrays_that_do_not_fit_each_other(tmp_path, name, array, message):
    folder = chat_folder(tmp_path, [random_conversation(3), random_conversation(2)], [random_conversation(3)])
    meta = json.loads((folder / "meta.json").read_text())
    entry = write_array(folder / f"train_{name}.npy", array)
    files = [entry if old["file"] == entry["file"] else old for old in meta["train"]["files"]]
    write_meta(folder, "chat", {"train": {"files": files}, "val": meta["val"]})
    with pytest.raises(UserError, match=message):
        ChatDataset(folder, 8)


def test_a_chat_token_beyond_the_vocabulary(tmp_path):
    conversations = [([256, 257, 261, 260], [False, False, False, True])]
    data = ChatDataset(chat_folder(tmp_path, conversations, conversations), 8)
    with pytest.raises(
        UserError, match="holds token 261, but bytes has 261 tokens: delete the folder and prepare it again"
    ):
        data.batch("train", [0])


# ---- pack ----------------------------------------------------------------------------------------------------------


@relaxed
@given(data=st.data(), block_size=st.integers(1, 40))
def test_packing_is_best_fit_decreasing(data, block_size):
    lengths = data.draw(st.lists(st.integers(1, block_size), max_size=60))
    rows = pack_rows(lengths, block_size)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(0 < tokens <= block_size for tokens in filled)

    slow: list[int] = []  # the tokens in each row
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(slow)) if slow[row] + length <= block_size]
        if fitting:
            slow[max(fitting, key=lambda row: slow[row])] += length
        else:
            slow.append(length)
    assert sorted(filled) == sorted(slow)


def test_packing_wastes_less_than_taking_conversations_as_they_come():
    lengths = np.random.default_rng(1).integers(20, 700, 500).tolist()
    next_fit, room = 0, 0
    for length in lengths:
        if length > room:
            next_fit, room = next_fit + 1, 1024
        room -= length
    rows = len(pack_rows(lengths, 1024))
    assert rows <= 1.02 * sum(lengths) / 1024 + 1 and rows < 0.9 * next_fit


# ---- fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_changes_when_the_data_does(tmp_path):
    train, val = np.arange(40), np.arange(30)
    other = np.where(train == 7, 8, train)
    folders = {
        "same": text_folder(tmp_path / "same", train, val),
        "moved": text_folder(tmp_path / "moved", train, val),
        "train": text_folder(tmp_path / "train", other, val),
        "val": text_folder(tmp_path / "val", train, val[:-1]),
        "swapped": text_folder(tmp_path / "swapped", val, train),
    }
    prints = {name: TokenDataset(folder, 8).fingerprint for name, folder in folders.items()}
    assert prints["same"] == prints["moved"] and len(set(prints.values())) == 4
    conversation = random_conversation(6)
    without_loss = conversation[0], [False] * 6
    marks = [
        chat_folder(tmp_path / f"chat{i}", [c], [conversation]) for i, c in enumerate([conversation, without_loss])
    ]
    assert len({ChatDataset(folder, 8).fingerprint for folder in marks}) == 2


@pytest.mark.parametrize("write, suffix", BARE_FORMATS.values(), ids=BARE_FORMATS)
def test_bare_shards_give_the_batches_of_our_own(tmp_path, gpt2_tokenizer, write, suffix):
    tokens = {"train": np.random.default_rng(0).integers(50_257, size=700), "val": np.arange(50_000, 50_100)}
    own = TokenDataset(text_folder(tmp_path / "own", *tokens.values(), tokenizer="gpt2"), 8)
    for split, shards in {"train": np.split(tokens["train"], [300, 600]), "val": [tokens["val"]]}.items():
        for i, shard in enumerate(shards):  # the last shard is shorter
            write(tmp_path / f"fineweb_{split}_{i:06d}{suffix}", shard)
    bare = TokenDataset(tmp_path, 8)
    assert bare.n_rows == own.n_rows and bare.tokenizer is own.tokenizer

    def batches(data: TokenDataset) -> list[Batch]:
        steps = [batch for step in range(12) for batch in train_batches(data, step, 7, 8, 4)]  # more than one epoch
        return steps + list(val_batches(data, 12, 5))

    for ours, theirs in zip(batches(own), batches(bare), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.targets, theirs.targets)


def test_a_token_beyond_gpt2_in_bare_shards(tmp_path, gpt2_tokenizer):
    for split in ("train", "val"):
        write_bin(tmp_path / f"{split}.bin", [50_257] * 20)
    with pytest.raises(UserError, match="holds token 50257, but gpt2 has 50257 tokens"):
        TokenDataset(tmp_path, 8).batch("train", [0])


def test_bare_shards_have_a_fingerprint_of_their_content(tmp_path, gpt2_tokenizer):
    prints = []
    for i in range(2):
        for split in ("train", "val"):
            np.save(tmp_path / f"edufineweb_{split}_000001.npy", np.arange(i, i + 30, dtype=np.uint16))
        prints.append(TokenDataset(tmp_path, 8).fingerprint)
    assert prints[0] != prints[1]


def test_a_last_token_beyond_the_vocabulary(tmp_path):
    conversations = [([256, 257, 5, 261], [False, False, False, True])]
    data = ChatDataset(chat_folder(tmp_path, conversations, conversations), 8)
    with pytest.raises(UserError, match="holds token 261"):
        data.batch("train", [0])


def test_shards_of_another_type(tmp_path):
    folder = text_folder(tmp_path, np.arange(40), np.arange(40))
    np.save(folder / "train_000000.npy", np.linspace(-3, 2, 40))
    with pytest.raises(UserError):
        TokenDataset(folder, 8).batch("train", [0, 1])


def test_offsets_begin_at_zero(tmp_path):
    folder = chat_folder(tmp_path, [random_conversation(3), random_conversation(2)], [random_conversation(3)])
    np.save(folder / "train_offsets.npy", np.array([-2, 3, 5]))
    with pytest.raises(UserError):
        ChatDataset(folder, 8)


@pytest.mark.parametrize("splits", [{"train": []}, {"train": {"files": [{"file": "train_tokens.npy", "length": 5}]}}])
def test_manifest_of_another_shape(tmp_path, splits):
    folder = chat_folder(tmp_path, [random_conversation(3), random_conversation(2)], [random_conversation(3)])
    edit_manifest(folder / "meta.json", **splits)
    with pytest.raises(UserError):
        ChatDataset(folder, 8)
