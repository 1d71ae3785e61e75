"""How fast every stage is on this machine: as a figure, as a part of what the machine can do, and beside a peer.

    python bench.py                                                 # all stages, a few minutes on two cores
    python bench.py train                                           # one of train, generate, tokenize
    python bench.py tokenize --files 'data/*.parquet'               # on your own text
    python bench.py generate --checkpoint runs/demo --data data/demo        # and what lower precision costs in loss

The limits are measured first: a square matrix product in the training precision, and the reading of memory.  Then ours
and the peer take turns, after a warm-up, and the medians are compared, in a row for each peer.  "spread" is half the
range of ours, as a part of the median, "limit" the part of the machine's limit.  The peers are the usual ways:
transformers' GPT-2, a loss over all logits at once, and a process pool with tiktoken.  Training counts 6 N + 12 L C T
operations per token (see model.py).
"""

import copy
import functools
import importlib.util
import json
import multiprocessing
import re
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import checkpoint
import cli
from data import Batch, TokenDataset, val_batches
from inference import prepare
from model import GPT, PRESETS
from runs import peak_flops
from sampling import generate
from shards import ShardWriter, read_ahead
from sources import FileSource, batched_texts, expand
from tokenizer import GPT2Tokenizer, load_tokenizer
from training import (
    Processes,
    build_optimizer,
    find_device,
    find_dtype,
    keep_freed_memory,
    parallelize,
    train_step,
    validate,
)


@dataclass(frozen=True)
class Config:
    stage: Annotated[Literal["all", "tokenize", "train", "generate"], tyro.conf.Positional] = "all"
    """What to measure."""
    files: tuple[str, ...] = ()
    """Text to tokenise: .txt, .jsonl or .parquet; none takes the source code of Python's standard library."""
    checkpoint: str | None = None
    """A run or checkpoint whose loss at lower precision is told; none leaves that out."""
    data: str | None = None
    """The dataset folder for that loss."""
    repeats: int = 5
    """How often everything is timed."""
    json: Path | None = None
    """A file for the figures as JSON lines."""
    device: str | None = None
    """cuda, mps or cpu; None takes the best there is."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float  # the median
    unit: str
    spread: float | None = None
    limit: float | None = None  # the part of what the machine can do
    peer: str = ""
    ratio: float | None = None  # to the peer's median

    def __str__(self) -> str:
        spread = "" if self.spread is None else f"±{self.spread:.0%}"
        limit = "" if self.limit is None else f"{self.limit:.0%}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} x {self.peer}"
        value = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.4g}"
        return f"{self.what:<42} {value:>12} {self.unit:<10} {spread:>6} {limit:>8}   {ratio}".rstrip()


def main(config: Config) -> None:
    cli.check_range("repeats", config.repeats, 1, 1000)
    cli.check(
        (config.checkpoint is None) == (config.data is None), "--checkpoint and --data belong together: give both"
    )
    device = find_device(config.device)
    procs = Processes(0, 1, device, find_dtype(None, device))
    peer = config.stage == "tokenize" or importlib.util.find_spec("transformers")
    cli.check(bool(peer), "the peer is not installed: pip install -r requirements-dev.txt")
    trained = trained_model(config) if config.checkpoint else None
    if config.json is not None:
        config.json.write_text("")
    if device.type == "cpu":
        keep_freed_memory()
    rows = []
    print(f"{'':<42} {'':>12} {'':<10} {'spread':>6} {'limit':>8}   beside a peer")
    for row in measurements(config, procs, trained):
        print(row, flush=True)
        rows.append(row)
    if config.json is not None:
        config.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))


def measurements(config: Config, procs: Processes, trained: tuple[GPT, TokenDataset] | None) -> Iterator[Row]:
    """The rows of the table, one by one."""
    flops, source = peak_flops(procs)
    bandwidth = read_bandwidth(procs)
    yield Row(f"limit: matrix product ({source})", flops / 1e9, "GFLOP/s")
    yield Row("limit: reading memory", bandwidth / 1e9, "GB/s")
    if config.stage in ("all", "tokenize"):
        yield from tokenize(config)
    if config.stage in ("all", "train"):
        yield from train(config, procs, flops)
    if config.stage in ("all", "generate"):
        yield from decode(config, procs, bandwidth)
    if trained is not None:
        yield from losses(*trained, procs)


def read_bandwidth(procs: Processes) -> float:
    """Bytes per second of a matrix-vector product that is far larger than all caches, the best of several."""
    matrix = torch.ones(2**17 if procs.device.type == "cuda" else 2**14, 2**13, device=procs.device)
    vector = torch.ones(2**13, device=procs.device)
    return matrix.numel() * matrix.element_size() / procs.fastest(lambda: torch.mv(matrix, vector))


def rates(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call each candidate in turn, `repeats` times after a warm-up; each returns how much it did per second."""
    for candidate in candidates.values():
        candidate()
    measured: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            measured[name].append(candidate())
    return measured


def rows_of(measured: dict[str, list[float]], peers: dict[str, str], unit: str, limit: float | None) -> Iterator[Row]:
    """A row for each candidate that is ours, one more for each of its peers; `limit` is 100 %."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    for name, peer in peers.items():
        values = measured[name]
        spread = (max(values) - min(values)) / 2 / medians[name] if len(values) > 1 else None
        part = medians[name] / limit if limit else None
        ratio = medians[name] / medians[peer] if peer in medians else None
        yield Row(name, medians[name], unit, spread, part, peer, ratio)


# ---- tokenize ------------------------------------------------------------------------------------------------------


def tokenize(config: Config) -> Iterator[Row]:
    """Files to shards, as prepare_fineweb.py does it, beside a pool of processes that runs tiktoken."""
    tokenizer = load_tokenizer("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        files = expand(config.files, (".txt", ".jsonl", ".parquet")) if config.files else [library(Path(folder))]
        candidates = {
            "tokenize": functools.partial(tokenize_ours, files, Path(folder), tokenizer),
            "process pool": functools.partial(tokenize_usual, files, Path(folder)),
        }
        measured = rates(candidates, config.repeats)
    yield from rows_of(measured, {"tokenize": "process pool"}, "tokens/s", None)


def library(folder: Path) -> Path:
    """The source code of Python's standard library as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/**/*.py"))
    texts = [file.read_text(errors="replace") for file in files if "site-packages" not in file.parts]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "library.parquet")
    return folder / "library.parquet"


def tokenize_ours(files: list[Path], folder: Path, tokenizer: GPT2Tokenizer) -> float:
    started = time.perf_counter()
    writer = ShardWriter(folder, "train", 100_000_000)
    for texts, _ in read_ahead(batched_texts(FileSource(files), None, "text")):
        for tokens in tokenizer.encode_documents(texts):
            writer.add(tokens)
    writer.close()
    cli.check(writer.tokens > 0, "--files hold no text")
    return writer.tokens / (time.perf_counter() - started)


def tokenize_usual(files: list[Path], folder: Path, most: int = 4_000_000) -> float:
    """One process for each core maps tiktoken over the documents; about so many tokens are enough to know its rate."""
    writer = ShardWriter(folder, "val", 100_000_000)
    records = (record for _, record in FileSource(files).records())
    # The documents end, and the pool is not broken off: a pool that is still being fed can hang at its end.
    documents = (record["text"] for record in takewhile(lambda _: writer.tokens < most, records))
    with multiprocessing.get_context("fork").Pool() as pool:
        started = time.perf_counter()
        for tokens in pool.imap(encode_document, documents, chunksize=16):
            writer.add(tokens)
        writer.close()
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    return writer.tokens / seconds


def encode_document(text: str) -> np.ndarray:
    tokenizer = load_tokenizer("gpt2")
    return np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16)


# ---- train ---------------------------------------------------------------------------------------------------------


class PlainLoss(GPT):
    """The usual loss: all logits at once."""

    def forward(self, tokens, targets, positions=None):
        logits = F.linear(self.hidden(tokens), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def train(config: Config, procs: Processes, flops: float) -> Iterator[Row]:
    """Whole training steps of the demo's model and of GPT-2 124M."""
    on_gpu = procs.device.type == "cuda"
    for name, rows in {"demo": 16, "gpt2": 32 if on_gpu else 1}.items():
        shape = replace(PRESETS[name], vocab_size=257) if name == "demo" else PRESETS[name]
        ours = {f"train {name}": GPT(shape), f"all logits {name}": PlainLoss(shape)}
        if on_gpu:
            ours[f"train {name}, compiled"] = parallelize(GPT(shape).to(procs.device), procs, compile=True)
        candidates = {
            label: trainer(model.to(procs.device), rows, shape.block_size, procs) for label, model in ours.items()
        }
        candidates["transformers"] = trainer(Transformers(shape).to(procs.device), rows, shape.block_size, procs)
        measured = rates(candidates, config.repeats if name == "demo" or on_gpu else min(3, config.repeats))
        limit = flops / GPT.flops_per_token(ours[f"train {name}"])
        peers = dict.fromkeys([label for label in ours if label.startswith("train")], "transformers")
        yield from rows_of(measured, peers, "tokens/s", limit)
        yield from rows_of(measured, {f"train {name}": f"all logits {name}"}, "tokens/s", limit)
    if Path("/proc/self/status").exists() and not on_gpu:
        peaks = {kind.__name__: in_a_process(peak_memory, kind) for kind in (GPT, Transformers)}
        ratio = peaks["GPT"] / peaks["Transformers"]
        yield Row("memory of a gpt2 step, 1 x 1024", peaks["GPT"] / 1e9, "GB", peer="transformers", ratio=ratio)


class Transformers(torch.nn.Module):
    """transformers' GPT-2, called as ours is."""

    def __init__(self, shape):
        import transformers

        super().__init__()
        transformers.logging.set_verbosity_error()
        sizes = {"n_positions": shape.block_size, "vocab_size": shape.vocab_size, "n_layer": shape.n_layer}
        sizes |= {"n_head": shape.n_head, "n_embd": shape.n_embd, "bos_token_id": 0, "eos_token_id": 0}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none))

    def forward(self, tokens, targets, positions=None):
        return self.model(input_ids=tokens, labels=tokens).loss * targets.numel()


def trainer(model: torch.nn.Module, rows: int, block_size: int, procs: Processes) -> Callable[[], float]:
    """A function that does one training step and returns its tokens per second."""
    batch = Batch(*torch.randint(257, (2, rows, block_size)))
    optimizer = build_optimizer(model, 1e-4, 0.1)

    def step() -> float:
        started = time.perf_counter()
        train_step(model, [batch], optimizer, 1e-4, 1.0, procs)
        procs.synchronize()
        return rows * block_size / (time.perf_counter() - started)

    return step


def peak_memory(kind: type) -> int:
    """Bytes that this process had in memory at most while it trained GPT-2 124M for two steps on a CPU."""
    procs = Processes(0, 1, torch.device("cpu"), torch.float32)
    keep_freed_memory()
    step = trainer(kind(PRESETS["gpt2"]), 1, 1024, procs)
    step(), step()
    status = Path("/proc/self/status").read_text()  # getrusage would count what the parent had when it forked
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def in_a_process(function: Callable, *args: object) -> int:
    """What a function returns in a fresh process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# ---- generate ------------------------------------------------------------------------------------------------------


PRECISIONS = {"float32": (torch.float32, False), "bfloat16": (torch.bfloat16, False), "int8": (torch.float32, True)}


def decode(config: Config, procs: Processes, bandwidth: float, tokens: int = 48) -> Iterator[Row]:
    """GPT-2 124M going on greedily from a short prompt, one text at a time and eight."""
    model, peer = GPT(PRESETS["gpt2"]), Transformers(PRESETS["gpt2"]).to(procs.device).eval()
    models = {
        name: prepare(copy.deepcopy(model), procs.device, *how) for name, how in PRECISIONS.items() if on(procs, name)
    }
    candidates: dict[str, Callable[[], float]] = {"transformers": functools.partial(decode_theirs, peer.model, tokens)}
    for n in (1, 8):
        candidates |= {
            f"{name}, {n}": functools.partial(decode_ours, m, n, tokens, procs) for name, m in models.items()
        }
    measured = rates(candidates, config.repeats)
    for name in models:
        bytes_read = {"float32": 4, "bfloat16": 2, "int8": 1}[name] * model.config.num_parameters
        row = {f"generate {name}": measured[f"{name}, 1"], "generate float32": measured["float32, 1"]}
        row |= {"transformers": measured["transformers"], "one text": measured[f"{name}, 1"]}
        peers = {f"generate {name}": "transformers" if name == "float32" else "generate float32"}
        yield from rows_of(row, peers, "tokens/s", bandwidth / bytes_read)
        row[f"generate {name}, 8 texts"] = measured[f"{name}, 8"]
        yield from rows_of(row, {f"generate {name}, 8 texts": "one text"}, "tokens/s", None)


def on(procs: Processes, precision: str) -> bool:
    """Whether the device can do it."""
    return precision != "int8" or procs.device.type == "cpu"


PROMPT = list(range(1000, 1016))


def decode_ours(model: GPT, n: int, tokens: int, procs: Processes) -> float:
    stream = generate(model, PROMPT, n, torch.Generator(procs.device), temperature=0)
    next(stream), next(stream)  # the prompt, and what is done once on a GPU
    procs.synchronize()
    started = time.perf_counter()
    for _ in islice(stream, tokens):
        pass
    procs.synchronize()
    return n * tokens / (time.perf_counter() - started)


@torch.inference_mode()
def decode_theirs(model: torch.nn.Module, tokens: int) -> float:
    prompt = torch.tensor([PROMPT], device=model.device)
    times = []
    for length in (1, tokens + 1):
        started = time.perf_counter()
        out = model.generate(prompt, min_new_tokens=length, max_new_tokens=length, do_sample=False, pad_token_id=0)
        out.tolist()
        times.append(time.perf_counter() - started)
    return tokens / (times[1] - times[0])


def trained_model(config: Config) -> tuple[GPT, TokenDataset]:
    """--checkpoint and --data.  Raises `UserError` where they do not go together."""
    loaded = checkpoint.load(config.checkpoint)
    data = TokenDataset(config.data, loaded.model.config.block_size)
    names = loaded.tokenizer.name, data.tokenizer.name
    cli.check(names[0] == names[1], f"--checkpoint has {names[0]} tokens and --data {names[1]} tokens")
    return loaded.model, data


def losses(model: GPT, data: TokenDataset, procs: Processes) -> Iterator[Row]:
    """The validation loss at each precision, on at most 64 rows."""
    procs, plain = replace(procs, dtype=torch.float32), None  # the precision is the model's own
    for name, how in PRECISIONS.items():
        if on(procs, name):
            loss = validate(prepare(copy.deepcopy(model), procs.device, *how), val_batches(data, 64, 4), procs)
            plain = plain or loss
            yield Row(f"validation loss, {name} ({loss - plain:+.5f})", loss, "nats")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
