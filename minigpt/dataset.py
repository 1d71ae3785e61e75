"""Training and validation batches as a pure function of (dataset, seed, step).

A dataset folder is cut into rows of `block_size` tokens. Each epoch visits all rows in a seeded permutation that is
computed, not stored. No loader state is saved: to resume is to ask for step s. `shards.py` has the folder's format.
"""

import bisect
import ctypes
import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minigpt.cli import UserError
from minigpt.shards import SPLITS, open_arrays, read_meta
from minigpt.tokenizer import load_tokenizer
from model import IGNORE_INDEX

LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Batch:
    """Inputs of `GPT.forward`. tokens, targets, positions: (B, T) int64; positions is None unless rows are packed."""

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device, asynchronously if it is a GPU."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor  # required for an asynchronous copy
            return tensor.to(device, non_blocking=True)

        return Batch(*(None if tensor is None else copy(tensor) for tensor in vars(self).values()))


def train_batches(
    data: "Dataset", step: int, seed: int, batch_size: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """Return one process's micro-batches of the global batch at a step: a pure function of its arguments.

    The number of processes only decides which process takes which rows. `batch_size`, the rows of the global batch, is
    a multiple of `micro_batch_size * world_size`.
    """
    rows = global_rows(data.n_rows["train"], batch_size, seed, step)
    own_rows = rows.reshape(-1, world_size, micro_batch_size)[:, rank]
    data.read_ahead("train", own_rows.ravel())
    return [data.batch("train", micro) for micro in own_rows]


def val_batches(
    data: "Dataset", max_rows: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """Yield one process's share of the first `max_rows` validation rows, in batches of equal shape.

    The last batch is filled with repeated rows whose targets are ignored. All processes have the same number of
    batches, as a sharded model requires.
    """
    n_rows = min(max_rows, data.n_rows["val"])
    rows = np.arange(rank, n_rows, world_size)
    for start in range(0, math.ceil(n_rows / world_size), micro_batch_size):
        micro = rows[start : start + micro_batch_size]
        batch = data.batch("val", np.resize(micro, micro_batch_size))  # repeats rows; without rows, row 0
        batch.targets[len(micro) :] = IGNORE_INDEX
        yield batch


def global_rows(n_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the rows (batch_size,) of the global batch at a step. Every row occurs once per epoch."""
    index = np.arange(step * batch_size, (step + 1) * batch_size)  # counted from the start of the run
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(index // n_rows):
        in_epoch = index // n_rows == epoch
        rows[in_epoch] = permute(index[in_epoch] % n_rows, n_rows, seed, int(epoch))
    return rows


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Map indices through a seeded permutation of 0 ... n - 1, without storing the permutation.

    A four-round Feistel network permutes the numbers below a power of four. Results of n or above are mapped again
    until they are below n ("cycle walking": Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(4, np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        value[outside] = (left << half) | right
        outside = value >= n
    return value.astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Mix all bits of 64-bit numbers, as a bijection: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Dataset:
    """A dataset folder as rows of `block_size` tokens. Base of `TokenDataset` and `ChatDataset`.

    Attributes:
        meta: the folder's metadata.
        tokenizer: the tokenizer of its tokens.
        n_rows: number of rows in each split.
        fingerprint: changes with any of the data.
    """

    kind: str

    def __init__(self, folder: str | Path, block_size: int):
        self.folder, self.block_size = Path(folder), block_size
        self.meta = read_meta(self.folder, self.kind)
        self.tokenizer = load_tokenizer(self.meta.get("tokenizer", ""), self.folder)
        self.arrays = open_arrays(self.folder, self.meta)
        self.n_rows: dict[str, int] = {}
        identity = [self.kind, self.meta["tokenizer"], *(self.meta[split]["files"] for split in SPLITS)]
        self.fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        """Return these rows of a split."""
        raise NotImplementedError

    def read_ahead(self, split: str, rows: Sequence[int]) -> None:
        """Start to read these rows all at once. On slow storage, `batch` would wait for each row."""

    def count_val_bytes(self, max_rows: int) -> int:
        """Return the bytes of text in the targets of the first `max_rows` validation rows; special tokens have none."""
        tokenizer = self.tokenizer
        n_special = tokenizer.chat_vocab_size - tokenizer.end_of_text
        lengths = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.end_of_text)] + [0] * n_special
        lengths = torch.tensor(lengths)
        n_bytes, n_rows = 0, min(max_rows, self.n_rows["val"])
        for start in range(0, n_rows, 64):
            targets = self.batch("val", range(start, min(start + 64, n_rows))).targets
            n_bytes += int(lengths[targets[targets != IGNORE_INDEX]].sum())
        return n_bytes

    def check_tokens(self, largest: int, vocab_size: int) -> None:
        """Raise `UserError` if a token is outside the vocabulary."""
        if largest >= vocab_size:
            raise UserError(
                f"{self.folder} holds token {largest}, but {self.tokenizer.name} has {vocab_size} tokens:"
                " delete the folder and prepare it again"
            )


class TokenDataset(Dataset):
    """Text for pretraining. Row i of a split starts at token i * block_size."""

    kind = "text"

    def __init__(self, folder: str | Path, block_size: int):
        super().__init__(folder, block_size)
        for array in [array for split in SPLITS for array in self.arrays[split]]:
            if array.dtype != np.uint16:
                raise UserError(f"{folder} holds arrays of {array.dtype}, expected uint16")
        self.starts = {split: np.cumsum([0, *map(len, self.arrays[split])]) for split in SPLITS}  # of each shard
        for split in SPLITS:
            n_tokens = int(self.starts[split][-1])
            self.n_rows[split] = (n_tokens - 1) // block_size
            if self.n_rows[split] < 1:
                raise UserError(
                    f"{folder}: the {split} split has {n_tokens} tokens, too few for one row of {block_size} and its"
                    " targets: prepare more text, or use another --val_fraction"
                )

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        T = self.block_size
        windows = torch.from_numpy(np.stack([self.window(split, int(row) * T, T + 1) for row in rows]))  # (B, T + 1)
        self.check_tokens(int(windows.max()), self.tokenizer.vocab_size)
        return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def read_ahead(self, split: str, rows: Sequence[int]) -> None:
        T = self.block_size
        for row in rows:
            for piece in self.pieces(split, int(row) * T, T + 1):
                start_reading(piece)

    def window(self, split: str, start: int, length: int) -> np.ndarray:
        """Return tokens start ... start + length - 1 of a split, across shards."""
        return np.concatenate(self.pieces(split, start, length)).astype(np.int64)

    def pieces(self, split: str, start: int, length: int) -> list[np.ndarray]:
        """Return the slices of the mapped shards that hold these tokens. They are read when they are used."""
        pieces = []
        shard = bisect.bisect_right(self.starts[split], start) - 1
        while length > 0:
            offset = start - int(self.starts[split][shard])
            piece = self.arrays[split][shard][offset : offset + length]
            pieces.append(piece)
            start, length, shard = start + len(piece), length - len(piece), shard + 1
        return pieces


def start_reading(array: np.ndarray) -> int:
    """Start to read a mapped array from the disk, without waiting for it; return 0, or -1 if this is impossible."""
    address = array.ctypes.data
    start = address - address % mmap.PAGESIZE
    size = address + array.nbytes - start
    return LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


class ChatDataset(Dataset):
    """Conversations for finetuning, packed: a row holds several, each of which attends to itself only."""

    kind = "chat"

    def __init__(self, folder: str | Path, block_size: int):
        super().__init__(folder, block_size)
        self.rows = {split: pack_rows(self._row_lengths(split), block_size) for split in SPLITS}
        self.n_rows = {split: len(rows) for split, rows in self.rows.items()}

    def _row_lengths(self, split: str) -> list[int]:
        """Return the number of inputs of each conversation, after checking the arrays."""
        fix = "delete the folder and prepare it again"
        if len(self.arrays[split]) != 3:
            raise UserError(f"{self.folder}: the {split} split does not have three arrays; {fix}")
        tokens, loss_mask, offsets = self.arrays[split]
        if (tokens.dtype, loss_mask.dtype, offsets.dtype) != (np.uint16, np.bool_, np.int64):
            raise UserError(f"{self.folder}: the {split} arrays are not uint16, bool and int64; {fix}")
        spans_tokens = len(offsets) > 1 and (int(offsets[0]), int(offsets[-1])) == (0, len(tokens))
        if len(loss_mask) != len(tokens) or not spans_tokens:
            raise UserError(f"{self.folder}: the {split} arrays do not fit each other; {fix}")
        lengths = np.diff(offsets) - 1  # the last token of a conversation is a target only
        if int(lengths.min()) < 1:
            raise UserError(f"{self.folder}: the {split} offsets do not increase; {fix}")
        if int(lengths.max()) > self.block_size:
            raise UserError(
                f"{self.folder} holds a conversation of {lengths.max() + 1} tokens, and the model's context is"
                f" {self.block_size}: prepare it with --block_size {self.block_size}"
            )
        return lengths.tolist()

    def batch(self, split: str, rows: Sequence[int]) -> Batch:
        tokens, loss_mask, offsets = self.arrays[split]
        shape = (len(rows), self.block_size)
        inputs = np.full(shape, self.tokenizer.end_of_text, dtype=np.int64)
        targets = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        positions = np.tile(np.arange(self.block_size), (len(rows), 1))
        for b, row in enumerate(rows):
            used = 0
            for conversation in self.rows[split][row]:
                begin, end = int(offsets[conversation]), int(offsets[conversation + 1])
                span = slice(used, used + end - begin - 1)
                next_tokens = tokens[begin + 1 : end].astype(np.int64)
                inputs[b, span] = tokens[begin : end - 1]
                targets[b, span] = np.where(loss_mask[begin + 1 : end], next_tokens, IGNORE_INDEX)
                positions[b, span] = np.arange(end - begin - 1)
                used = span.stop
            positions[b, used:] = np.arange(self.block_size - used)  # the padding is a separate document
        self.check_tokens(max(int(inputs.max()), int(targets.max())), self.tokenizer.chat_vocab_size)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(positions))


def pack_rows(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """Pack items of these lengths into rows of `block_size` and return the items of each row.

    Best-fit decreasing (Johnson, 1974): the longest item first, each into the fullest row that has space for it.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free space, row), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(free, (lengths[item], 0))
        if place == len(free):
            rows.append([])
            space, row = block_size, len(rows) - 1
        else:
            space, row = free.pop(place)
        rows[row].append(item)
        bisect.insort(free, (space - lengths[item], row))
    return rows
