"""Batches as a pure function of (dataset, seed, step): rows of tokens from a dataset folder, and which rows come when.

No loader state is saved or needed: resuming is asking for step s.  `shards.py` has the folder's format.
"""

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cli import check
from model import IGNORE
from shards import SPLITS, open_arrays, read_ahead, read_meta
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class Batch:
    """Rows for `GPT.forward`.  tokens, targets, positions: (B, T) int64; positions are None for plain rows."""

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            if tensor is None:
                return None
            if device.type == "cuda":
                tensor = tensor.pin_memory()  # without which the copy would not be asynchronous
            return tensor.to(device, non_blocking=True)

        return Batch(move(self.tokens), move(self.targets), move(self.positions))


class Dataset:
    """What both kinds of data share: a manifest, and rows of `block_size` tokens that are numbered within each split.

    Attributes:
        meta: the manifest.
        tokenizer: the tokenizer that made the tokens.
        n_rows: rows in each split.
        fingerprint: changes whenever any of the data does.
    """

    kind: str

    def __init__(self, folder: str | Path, block_size: int):
        self.folder, self.block_size = Path(folder), block_size
        self.meta = read_meta(self.folder, self.kind)
        self.tokenizer = load_tokenizer(self.meta.get("tokenizer", ""))
        self.arrays = open_arrays(self.folder, self.meta)
        self.n_rows: dict[str, int] = {}
        identity = [self.kind, self.meta["tokenizer"], *(self.meta[split]["files"] for split in SPLITS)]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        """These rows of a split."""
        raise NotImplementedError


class TokenDataset(Dataset):
    """Text to pretrain on.  Row i of a split is the window of tokens i * block_size ... (i + 1) * block_size."""

    kind = "text"

    def __init__(self, folder: str | Path, block_size: int):
        super().__init__(folder, block_size)
        for array in [array for split in SPLITS for array in self.arrays[split]]:
            check(array.dtype == np.uint16, f"{folder} holds arrays of {array.dtype}, expected uint16")
        self.starts = {split: np.cumsum([0, *map(len, self.arrays[split])]) for split in SPLITS}  # of each shard
        self.n_rows = {split: (int(self.starts[split][-1]) - 1) // block_size for split in SPLITS}
        for split, n_rows in self.n_rows.items():
            check(
                n_rows > 0,
                f"{folder}: the {split} split has {self.starts[split][-1]} tokens, too few for one"
                f" row of {block_size} and its targets: prepare more text, or with another --val_fraction",
            )

    def window(self, split: str, start: int, length: int) -> np.ndarray:
        """Tokens start ... start + length of a split, across shards."""
        pieces = []
        shard = bisect.bisect_right(self.starts[split], start) - 1
        while length > 0:
            offset = start - int(self.starts[split][shard])
            piece = self.arrays[split][shard][offset : offset + length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return np.concatenate(pieces).astype(np.int64)

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        T = self.block_size
        windows = torch.from_numpy(np.stack([self.window(split, int(row) * T, T + 1) for row in rows]))  # (B, T + 1)
        largest = int(windows.max())
        check(
            largest < self.tokenizer.vocab_size,
            f"{self.folder} holds token {largest}, but {self.tokenizer.name} has {self.tokenizer.vocab_size} tokens:"
            " delete the folder and prepare it again",
        )
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


class ChatDataset(Dataset):
    """Conversations to finetune on, packed: a row holds several, each of which sees itself alone."""

    kind = "chat"

    def __init__(self, folder: str | Path, block_size: int):
        super().__init__(folder, block_size)
        self.rows: dict[str, list[list[int]]] = {}  # the conversations in each row
        for split in SPLITS:
            check(len(self.arrays[split]) == 3, f"{folder}: the {split} split is not three arrays; prepare it again")
            tokens, learned, offsets = self.arrays[split]
            ends = len(offsets) > 1 and (int(offsets[0]), int(offsets[-1])) == (0, len(tokens))
            check(
                len(learned) == len(tokens) and ends,
                f"{folder}: the {split} arrays do not fit each other; delete the folder and prepare it again",
            )
            lengths = np.diff(offsets) - 1  # a conversation's last token is a target only
            check(
                int(lengths.min()) > 0,
                f"{folder}: the {split} offsets do not rise; delete the folder and prepare it again",
            )
            check(
                int(lengths.max()) <= block_size,
                f"{folder} holds a conversation of {lengths.max() + 1} tokens, and the model's context is {block_size}:"
                f" prepare it with --block_size {block_size}",
            )
            self.rows[split] = pack(lengths.tolist(), block_size)
        self.n_rows = {split: len(rows) for split, rows in self.rows.items()}

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        tokens, learned, offsets = self.arrays[split]
        shape = (len(rows), self.block_size)
        inputs = np.full(shape, self.tokenizer.end_of_text, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        positions = np.tile(np.arange(self.block_size), (len(rows), 1))
        for b, row in enumerate(rows):
            at = 0
            for conversation in self.rows[split][row]:
                begin, end = int(offsets[conversation]), int(offsets[conversation + 1])
                span = slice(at, at + end - begin - 1)
                inputs[b, span] = tokens[begin : end - 1]
                targets[b, span] = np.where(learned[begin + 1 : end], tokens[begin + 1 : end].astype(np.int64), IGNORE)
                positions[b, span] = np.arange(end - begin - 1)
                at = span.stop
            positions[b, at:] = np.arange(self.block_size - at)  # the rest of the row is a document of its own
        largest = max(int(inputs.max()), int(targets.max()))
        check(
            largest < self.tokenizer.chat_vocab_size,
            f"{self.folder} holds token {largest}, which {self.tokenizer.name} has not: delete the folder and"
            " prepare it again",
        )
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions))


def pack(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Put items of these lengths into rows of `block_size`, by best-fit decreasing: the longest first, each into the
    fullest row that has room (Johnson, 1974).  Returns the items of each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[item], 0))
        if place == len(room):
            rows.append([])
            left, row = block_size, len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row].append(item)
        bisect.insort(room, (left - lengths[item], row))
    return rows


# ---- which rows, when ----------------------------------------------------------------------------------------------


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where a seeded permutation of 0 ... n - 1 takes these indices, without writing the permutation down.

    A four-round Feistel network permutes the numbers below a power of four; numbers that land at n or above walk on
    until they land below ("cycle walking": Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each of the two halves
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for key in keys:
            left, right = right, left ^ (scramble(right ^ key) & mask)
        value[outside] = (left << half) | right
        outside = value >= n
    return value.astype(np.int64)


def scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of the 64-bit numbers that mixes all bits (the finaliser of SplitMix64; Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def global_rows(n_rows: int, batch_rows: int, seed: int, step: int) -> np.ndarray:
    """The rows (batch_rows,) of the global batch at a step: every row once an epoch, each epoch in its own order."""
    count = np.arange(step * batch_rows, (step + 1) * batch_rows)  # rows since the run began
    rows = np.empty(batch_rows, dtype=np.int64)
    for epoch in np.unique(count // n_rows):
        here = count // n_rows == epoch
        rows[here] = permute(count[here] % n_rows, n_rows, seed, int(epoch))
    return rows


def train_batches(
    data: Dataset, step: int, seed: int, batch_rows: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """One process's micro-batches of the global batch at a step: a pure function of its arguments.

    The number of processes only decides who takes which rows.  `batch_rows` is a multiple of
    `micro_batch_size * world_size`.
    """
    rows = global_rows(data.n_rows["train"], batch_rows, seed, step)
    return [data.batch("train", micro) for micro in rows.reshape(-1, world_size, micro_batch_size)[:, rank]]


def all_train_batches(
    data: Dataset, steps: range, seed: int, batch_rows: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[list[Batch]]:
    """`train_batches` of each step in turn, the next one read while this one is trained on."""
    sizes = (seed, batch_rows, micro_batch_size, rank, world_size)
    return read_ahead(train_batches(data, step, *sizes) for step in steps)


def val_batches(
    data: Dataset, max_rows: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """One process's share of the validation set: the first `max_rows` rows, in batches of one shape.

    Where the rows run out, a batch is filled up with rows whose targets are all ignored.
    """
    rows = np.arange(min(max_rows, data.n_rows["val"]))[rank::world_size]
    for start in range(0, len(rows), micro_batch_size):
        here = rows[start : start + micro_batch_size]
        batch = data.batch("val", np.resize(here, micro_batch_size))  # np.resize repeats
        batch.targets[len(here) :] = IGNORE
        yield batch
