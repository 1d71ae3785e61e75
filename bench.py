"""Measure the speed of every stage on this machine, next to the machine's peak and to the usual alternative.

    python bench.py                                                 # all stages
    python bench.py train                                           # one stage: tokenize, train or generate
    python bench.py tokenize --files 'data/*.parquet'               # on your own text

All stages take a few minutes on an idle 2-core CPU. The peers are transformers' GPT-2, a loss that keeps all logits in
memory, and a process pool that runs tiktoken. Our code and its peer take turns after a warm-up. The columns are:

    value           the median over --repeats
    spread          half the range, relative to the median
    of peak         share of the measured peak: matrix product for training, memory bandwidth for generation
    vs. peer        our median relative to the peer's

Training counts 6 N + 12 L C T operations per token (GPT.flops_per_token in model.py).
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

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

from minigpt import cli
from minigpt.cli import UserError
from minigpt.dataset import Batch
from minigpt.distributed import Processes, find_device, find_dtype, tune_malloc
from minigpt.files import write_file
from minigpt.hf import config_to_hf
from minigpt.inference import generate_tokens, optimize_for_inference
from minigpt.metrics import min_seconds, peak_flops
from minigpt.optim import build_optimizer
from minigpt.parallel import parallelize
from minigpt.prefetch import prefetch
from minigpt.sampling import SamplingParams
from minigpt.shards import ShardWriter
from minigpt.sources import FileSource, find_files, text_batches
from minigpt.tokenizer import Tokenizer, load_tokenizer
from minigpt.training import train_step
from model import GPT, PRESETS, GPTConfig


@dataclass(frozen=True)
class Config:
    stage: Annotated[Literal["all", "tokenize", "train", "generate"], tyro.conf.Positional] = "all"
    """Stage to measure."""
    files: tuple[str, ...] = ()
    """Text to tokenise (.txt, .jsonl or .parquet); default: the source code of Python's standard library."""
    repeats: int = 5
    """Number of timed runs per measurement."""
    json: Path | None = None
    """Also write the rows to this file, as JSON lines."""
    device: str | None = None
    """cuda, mps or cpu; default: the best available."""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    value: float  # the median
    unit: str
    spread: float | None = None  # half the range, relative to the median
    of_peak: float | None = None  # value relative to the machine's peak
    peer: str = ""
    ratio: float | None = None  # value relative to the peer's median

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.4g}"
        spread = "" if self.spread is None else f"±{self.spread:.0%}"
        of_peak = "" if self.of_peak is None else f"{self.of_peak:.0%}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f} x {self.peer}"
        return f"{self.name:<42} {value:>12} {self.unit:<10} {spread:>6} {of_peak:>8}   {ratio}".rstrip()


def main(config: Config) -> None:
    cli.check_range("repeats", config.repeats, 1, 1000)
    device = find_device(config.device)
    procs = Processes(0, 1, device, find_dtype(None, device))
    if config.stage != "tokenize" and not importlib.util.find_spec("transformers"):
        raise UserError("bench.py needs transformers: pip install -r requirements-dev.txt")
    if config.json is not None:
        write_file(config.json, "")  # a path that cannot be written fails before the work
    if device.type == "cpu":
        tune_malloc()
    print(f"{'':<42} {'value':>12} {'':<10} {'spread':>6} {'of peak':>8}   vs. peer")
    rows = []
    for row in run_stages(config, procs):
        print(row, flush=True)
        rows.append(row)
    if config.json is not None:
        write_file(config.json, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def run_stages(config: Config, procs: Processes) -> Iterator[Row]:
    """Measure the machine's peak, then each selected stage."""
    flops, source = peak_flops(procs)
    bandwidth = memory_bandwidth(procs)
    yield Row(f"peak: matrix product ({source})", flops / 1e9, "GFLOP/s")
    yield Row("peak: memory bandwidth (read)", bandwidth / 1e9, "GB/s")
    if config.stage in ("all", "tokenize"):
        yield from bench_tokenize(config)
    if config.stage in ("all", "train"):
        yield from bench_train(config, procs, flops)
    if config.stage in ("all", "generate"):
        yield from bench_generate(config, procs, bandwidth)


def memory_bandwidth(procs: Processes) -> float:
    """Return the bytes read per second by a matrix-vector product on a matrix larger than any cache."""
    matrix = torch.ones(2**17 if procs.device.type == "cuda" else 2**14, 2**13, device=procs.device)
    vector = torch.ones(2**13, device=procs.device)
    return matrix.numel() * matrix.element_size() / min_seconds(lambda: torch.mv(matrix, vector), procs)


def measure_rates(candidates: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call the candidates in turn, `repeats` times after a warm-up. Each call returns units of work per second."""
    for candidate in candidates.values():
        candidate()
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            rates[name].append(candidate())
    return rates


def compare(rates: dict[str, list[float]], name: str, peer: str, peak: float | None = None) -> Row:
    """Return the row of candidate `name` next to its peer; `peak` is the highest possible rate in tokens per second."""
    values, median = rates[name], statistics.median(rates[name])
    spread = (max(values) - min(values)) / 2 / median if len(values) > 1 else None
    of_peak = median / peak if peak else None
    return Row(name, median, "tokens/s", spread, of_peak, peer, median / statistics.median(rates[peer]))


def bench_tokenize(config: Config) -> Iterator[Row]:
    """Tokenise files into shards as prepare_fineweb.py does, and with a process pool that runs tiktoken."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if config.files:
            files = find_files(config.files, (".txt", ".jsonl", ".parquet"))
        else:
            files = [write_standard_library(folder)]
        if next(FileSource(files).records(), None) is None:
            raise UserError("--files contain no text")
        tokenizer = load_tokenizer("gpt2")
        candidates = {
            "tokenize": functools.partial(tokenize_ours, files, folder, tokenizer),
            "process pool": functools.partial(tokenize_with_pool, files, folder),
        }
        rates = measure_rates(candidates, config.repeats)
    yield compare(rates, "tokenize", "process pool")


def write_standard_library(folder: Path) -> Path:
    """Write the source code of Python's standard library to a Parquet file and return its path."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/**/*.py"))
    texts = [file.read_text(errors="replace") for file in files if "site-packages" not in file.parts]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "library.parquet")
    return folder / "library.parquet"


def tokenize_ours(files: list[Path], folder: Path, tokenizer: Tokenizer) -> float:
    """Write the files' tokens to shards and return the tokens per second."""
    started = time.perf_counter()
    writer = ShardWriter(folder, "train", 100_000_000)
    for texts, _ in prefetch(text_batches(FileSource(files), None, "text")):
        for tokens in tokenizer.encode_documents(texts):
            writer.add(tokens)
    writer.close()
    return writer.tokens / (time.perf_counter() - started)


def tokenize_with_pool(files: list[Path], folder: Path, max_tokens: int = 4_000_000) -> float:
    """Do the same with one tiktoken process per core, for about `max_tokens` tokens: enough to measure the rate."""
    writer = ShardWriter(folder, "val", 100_000_000)
    records = (record for _, record in FileSource(files).records())
    # End the input instead of leaving the loop early: a pool that is still being fed can hang when it is closed.
    documents = (record["text"] for record in takewhile(lambda _: writer.tokens < max_tokens, records))
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
    """Encode one document in a process of the pool."""
    tokenizer = load_tokenizer("gpt2")
    return np.array([tokenizer.end_of_text, *tokenizer.encode(text)], dtype=np.uint16)


def bench_train(config: Config, procs: Processes, flops: float) -> Iterator[Row]:
    """Time whole training steps of the demo model and of GPT-2 124M; on a CPU, also compare their memory."""
    on_gpu = procs.device.type == "cuda"
    gpt2_repeats = config.repeats if on_gpu else min(3, config.repeats)
    yield from bench_train_steps("demo", replace(PRESETS["demo"], vocab_size=257), 16, config.repeats, procs, flops)
    yield from bench_train_steps("gpt2", PRESETS["gpt2"], 32 if on_gpu else 1, gpt2_repeats, procs, flops)
    if Path("/proc/self/status").exists() and not on_gpu:
        ours, peer = (run_in_subprocess(peak_train_memory, model_class) for model_class in (GPT, TransformersGPT2))
        yield Row("memory of a gpt2 step, 1 x 1024", ours / 1e9, "GB", peer="transformers", ratio=ours / peer)


def bench_train_steps(
    name: str, shape: GPTConfig, batch_size: int, repeats: int, procs: Processes, flops: float
) -> Iterator[Row]:
    """Compare our training step on `batch_size` rows with transformers' and with one that keeps all logits."""
    device, ours, all_logits = procs.device, f"train {name}", f"all logits {name}"
    models = {ours: GPT(shape).to(device), all_logits: AllLogitsGPT(shape).to(device)}
    peak = flops / models[ours].flops_per_token()
    if device.type == "cuda":
        models[f"{ours}, compiled"] = parallelize(GPT(shape).to(device), procs, compile=True)
    models["transformers"] = TransformersGPT2(shape).to(device)
    steps = {label: make_train_step(model, batch_size, shape.block_size, procs) for label, model in models.items()}
    rates = measure_rates(steps, repeats)
    for label in models:
        if label.startswith("train"):
            yield compare(rates, label, "transformers", peak)
    yield compare(rates, ours, all_logits, peak)


class AllLogitsGPT(GPT):
    """Our model with the usual loss, which keeps all logits in memory at once."""

    def forward(self, tokens, targets, positions=None):
        logits = F.linear(self.hidden(tokens), self.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


class TransformersGPT2(torch.nn.Module):
    """transformers' GPT-2 with our model's interface."""

    def __init__(self, shape: GPTConfig):
        import transformers

        super().__init__()
        transformers.logging.set_verbosity_error()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config_to_hf(shape)))

    def forward(self, tokens, targets, positions=None):
        return self.model(input_ids=tokens, labels=tokens).loss * targets.numel()


def make_train_step(model: torch.nn.Module, batch_size: int, block_size: int, procs: Processes) -> Callable[[], float]:
    """Return a function that does one training step on random tokens and returns its tokens per second."""
    batch = Batch(*torch.randint(257, (2, batch_size, block_size)))
    optimizer = build_optimizer(model, 1e-4, 0.1)

    def step() -> float:
        started = time.perf_counter()
        train_step(model, [batch], optimizer, 1e-4, 1.0, procs)
        procs.synchronize()
        return batch_size * block_size / (time.perf_counter() - started)

    return step


def peak_train_memory(model_class: type[torch.nn.Module]) -> int:
    """Train GPT-2 124M for two steps on the CPU and return this process's peak memory in bytes."""
    procs = Processes(0, 1, torch.device("cpu"), torch.float32)
    tune_malloc()
    step = make_train_step(model_class(PRESETS["gpt2"]), 1, 1024, procs)
    step()
    step()
    status = Path("/proc/self/status").read_text()  # getrusage would include the parent's memory before the fork
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def run_in_subprocess(function: Callable, *args: object) -> int:
    """Call a function in a new process and return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


PRECISIONS = {  # weights' dtype, int8, bytes per weight
    "float32": (torch.float32, False, 4),
    "bfloat16": (torch.bfloat16, False, 2),
    "float16": (torch.float16, False, 2),
    "int8": (torch.float32, True, 1),
}
PROMPT = list(range(1000, 1016))
GREEDY = SamplingParams(temperature=0)


def bench_generate(config: Config, procs: Processes, bandwidth: float, n_tokens: int = 48) -> Iterator[Row]:
    """Continue a short prompt greedily with GPT-2 124M: one sample, then eight, at each precision."""
    model, peer = GPT(PRESETS["gpt2"]), TransformersGPT2(PRESETS["gpt2"]).to(procs.device).eval()
    precisions = [name for name in PRECISIONS if name != "int8" or procs.device.type == "cpu"]  # int8 needs a CPU
    candidates = {"transformers": functools.partial(generate_with_transformers, peer.model, n_tokens)}
    for name in precisions:
        dtype, int8, _ = PRECISIONS[name]
        optimized = optimize_for_inference(copy.deepcopy(model), procs.device, dtype, int8)
        candidates[f"generate {name}"] = functools.partial(generate_ours, optimized, 1, n_tokens, procs)
        candidates[f"generate {name}, 8 samples"] = functools.partial(generate_ours, optimized, 8, n_tokens, procs)
    rates = measure_rates(candidates, config.repeats)
    for name in precisions:
        bytes_per_token = PRECISIONS[name][2] * model.config.num_parameters  # a token reads every weight once
        peer_name = "transformers" if name == "float32" else "generate float32"
        yield compare(rates, f"generate {name}", peer_name, peak=bandwidth / bytes_per_token)
        yield compare(rates, f"generate {name}, 8 samples", f"generate {name}")


def generate_ours(model: GPT, n_samples: int, n_tokens: int, procs: Processes) -> float:
    """Generate `n_tokens` tokens for each sample and return the tokens per second, without the prompt's time."""
    stream = generate_tokens(model, PROMPT, GREEDY, torch.Generator(procs.device), n_samples)
    next(stream)  # reads the prompt
    next(stream)  # captures the CUDA graph on a GPU
    procs.synchronize()
    started = time.perf_counter()
    for _ in islice(stream, n_tokens):
        pass
    procs.synchronize()
    return n_samples * n_tokens / (time.perf_counter() - started)


@torch.inference_mode()
def generate_with_transformers(model: torch.nn.Module, n_tokens: int) -> float:
    """Do the same with `transformers`. The time of a run with one token is subtracted, as it reads the prompt."""
    prompt = torch.tensor([PROMPT], device=model.device)
    seconds = []
    for length in (1, n_tokens + 1):
        started = time.perf_counter()
        out = model.generate(prompt, min_new_tokens=length, max_new_tokens=length, do_sample=False, pad_token_id=0)
        out.tolist()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return n_tokens / (seconds[1] - seconds[0])


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
