"""Train a GPT-2 from scratch on a dataset folder.

    torchrun --standalone --nproc_per_node=8 pretrain.py            # GPT-2 124M on data/fineweb_edu, into runs/gpt2
    python pretrain.py                                              # the same run on one GPU
    python pretrain.py --data data/mine --out runs/mine --steps 2000        # your own text
    python pretrain.py --model demo --n_layer 6 --block_size 128    # your own size
    python pretrain.py --dry_run --gpu_dollars_per_hour 2           # measure speed, time and cost; write nothing

If a run is interrupted, run the same command again to resume. The default run, 9,536 steps of 524,288 tokens, is 5
billion tokens; the README estimates its hours and price. The validation loss starts near 10.9.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import itertools
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

from minigpt import cli, training
from minigpt.checkpoint import checkpoint_bytes
from minigpt.cli import UserError, resumable
from minigpt.dataset import TokenDataset, train_batches, val_batches
from minigpt.distributed import Processes, init_processes
from minigpt.hellaswag import evaluate_hellaswag, load_examples
from minigpt.inference import generate_tokens, make_generator
from minigpt.metrics import MetricsLogger, peak_flops
from minigpt.optim import build_optimizer
from minigpt.parallel import eager_model, parallelize, shard
from minigpt.prefetch import prefetch
from minigpt.run import Run
from minigpt.runs import find_best, list_checkpoints
from minigpt.sampling import SamplingParams
from minigpt.tokenizer import Tokenizer
from minigpt.training import TrainConfig
from model import GPT, PRESETS, GPTConfig


@dataclass(frozen=True)
class Config(TrainConfig):
    data: str = resumable("data/fineweb_edu")
    out: str = resumable("runs/gpt2")
    batch_tokens: int = 524_288
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 1.8e-3
    schedule: Literal["cosine", "wsd"] = "wsd"
    steps: int = 9_536
    """Optimiser steps, by default 5 billion tokens; with --schedule wsd, they can change until the decay starts."""
    dropout: float = 0.0
    val_every: int = resumable(250)
    save_every: int = resumable(1000)
    model: Literal["tiny", "demo", "small", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """The model size, from the table in model.py."""
    n_layer: int | None = None
    """Number of layers, instead of that of --model."""
    n_head: int | None = None
    """Number of attention heads, instead of that of --model."""
    n_embd: int | None = None
    """Width of the model, instead of that of --model."""
    block_size: int | None = None
    """Context length in tokens, instead of that of --model."""
    val_tokens: int = 2_097_152
    """Number of validation tokens, from the start of the split."""
    hellaswag_every: int | None = resumable(None)
    """Steps between HellaSwag evaluations; default: never."""
    hellaswag_files: tuple[str, ...] = resumable(())
    """HellaSwag's examples in local .jsonl or .parquet files; default: the hub's Rowan/hellaswag."""
    sample_every: int | None = resumable(None)
    """Steps between samples from --sample_prompts, for the log; default: never."""
    sample_prompts: tuple[str, ...] = resumable(
        ("Once upon a time", "The water cycle begins", "The capital of France is")
    )
    """Prompts for --sample_every."""
    dry_run: bool = resumable(False)
    """Check data, batch, memory and disk, time some steps, and print the time and cost of the whole run."""
    gpu_dollars_per_hour: float | None = resumable(None)
    """Price of one GPU, for the cost in --dry_run."""


def main(config: Config) -> None:
    check_config(config)
    model_config = get_model_config(config)
    procs = init_processes(config.device, config.dtype, config.deterministic, config.timeout_minutes)
    block_size = model_config.block_size
    batch_size = training.get_batch_size(config.batch_tokens, config.micro_batch_size, block_size, procs.world_size)
    data = TokenDataset(config.data, block_size)
    if config.dry_run:
        return dry_run(config, data, model_config, batch_size, procs)
    examples = load_examples(config.hellaswag_files, data.tokenizer) if config.hellaswag_every else []
    run = Run(config, data, procs, training.build_schedule(config, config.steps))
    model, optimizer = build_model(config, data, model_config, procs)
    scaler = training.build_scaler(procs)
    step = run.resume(model, optimizer, scaler)
    micro_batch_size = training.choose_micro_batch_size(config, run.saved_flags, model, data, optimizer, procs)
    config = run.config = replace(config, micro_batch_size=micro_batch_size)
    train_model = parallelize(model, procs, config.compile)
    if procs.is_main:
        print(f"run        {run.folder}: {config.steps:,} steps, {step:,} completed")
        print_summary(config, data, model, batch_size, procs)
        print(f"lr         {run.schedule}")
    sizes = (batch_size, micro_batch_size, procs.rank, procs.world_size)
    val_rows = min(data.n_rows["val"], max(1, config.val_tokens // block_size))
    bytes_per_token = data.count_val_bytes(val_rows) / (val_rows * block_size)
    logger = MetricsLogger(run, model, step, config.steps, config.batch_tokens, bytes_per_token)
    batches = prefetch(train_batches(data, s, config.seed, *sizes) for s in range(step, config.steps))
    batches = logger.stragglers.time_data(batches)

    def validation_loss() -> float:
        batches = val_batches(data, val_rows, micro_batch_size, procs.rank, procs.world_size)
        return training.validate(train_model, batches, procs, logger.log_val_batch)

    if step == 0:
        logger.log_validation(step, validation_loss())
    while not run.stop_requested() and step < config.steps:
        started = time.perf_counter()
        lr = run.schedule.get_lr(step)
        options = (lr, config.grad_clip, procs, (config.seed, step), logger.log_micro_batch, scaler)
        metrics = training.train_step(train_model, next(batches), optimizer, *options)
        step += 1
        logger.log_step(step, metrics, lr, started)
        save = step % config.save_every == 0 or step in (config.steps, run.schedule.decay_start)
        if save or step % config.val_every == 0:
            val_metrics = logger.log_validation(step, validation_loss())
        if config.hellaswag_every and step % config.hellaswag_every == 0:
            with eager_model(model):
                logger.log_hellaswag(step, evaluate_hellaswag(model, examples, data.tokenizer, procs))
        if config.sample_every and step % config.sample_every == 0:
            with eager_model(model):
                logger.log_samples(step, sample_texts(model, data.tokenizer, config.sample_prompts, config.seed))
        if save:
            run.save(step, model, optimizer, scaler, val_metrics)
    logger.close()
    if step < config.steps:
        run.save_and_exit(step, model, optimizer, scaler)
    run.finish_saving()
    if procs.is_main:
        print(f"done: {step:,} steps; best checkpoint {find_best(run.folder)}")
        command = f"python {cli.script_path('generate.py')} --checkpoint {shlex.quote(str(run.folder))}"
        print(f"next: {command} --prompt 'Once upon a time'")
    procs.close()


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    training.check_train_config(config)
    for name in ("val_tokens", "hellaswag_every", "sample_every"):
        cli.check_range(name, getattr(config, name), 1)
    cli.check_range("gpu_dollars_per_hour", config.gpu_dollars_per_hour, 0)
    if config.gpu_dollars_per_hour is not None and not config.dry_run:
        raise UserError("--gpu_dollars_per_hour is for --dry_run, which prints the cost")
    if config.hellaswag_files and not config.hellaswag_every:
        raise UserError("--hellaswag_files needs --hellaswag_every, the number of steps between evaluations")
    if config.sample_prompts != Config.sample_prompts and not config.sample_every:
        raise UserError("--sample_prompts needs --sample_every, the number of steps between samples")
    if not config.sample_prompts:
        raise UserError("--sample_prompts is empty: give a text, or omit it")


def get_model_config(config: Config) -> GPTConfig:
    """Return the preset of --model with the sizes that flags override. Raises `UserError` for impossible sizes."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    sizes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        return replace(PRESETS[config.model], **sizes, dropout=config.dropout)
    except ValueError as error:
        raise UserError(f"--{error}") from None


def build_model(
    config: Config, data: TokenDataset, model_config: GPTConfig, procs: Processes
) -> tuple[GPT, torch.optim.Optimizer]:
    """Return the initial model and its optimiser."""
    torch.manual_seed(config.seed)
    model = GPT(replace(model_config, vocab_size=data.tokenizer.vocab_size)).to(procs.device)
    model.activation_checkpointing = config.activation_checkpointing
    if config.shard:
        shard(model, procs)
    return model, build_optimizer(model, config.lr, config.weight_decay, config.optimizer, config.embedding_lr)


def print_summary(config: Config, data: TokenDataset, model: GPT, batch_size: int, procs: Processes) -> None:
    """Print data, model and batch, and warn about many epochs."""
    n_rows = data.n_rows["train"]
    epochs = config.steps * batch_size / n_rows
    print(
        f"data       {config.data}: {n_rows:,} rows of {data.block_size} tokens, tokenizer {data.tokenizer.name};"
        f" {epochs:,.2f} epochs"
    )
    if epochs > 20:
        steps = max(1, round(10 * n_rows / batch_size))
        print(
            f"warning: {epochs:,.0f} epochs: a model memorises text that it sees this often; 10 epochs are --steps"
            f" {steps}{' (more with a lower --batch_tokens)' if steps < 100 else ''}",
            file=sys.stderr,
        )
    name = "custom" if config.n_layer or config.n_head or config.n_embd or config.block_size else config.model
    training.print_model_and_batch(config, name, model, procs, batch_size)


def sample_texts(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], seed: int) -> list[dict]:
    """Return continuations of prompts, {"prompt", "text"} each. The same seed gives the same text.

    All processes generate equally many tokens, as a sharded model requires, even if one of them ends the document.
    """
    samples = []
    for prompt in prompts:
        start = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        generator = make_generator(seed, model.wte.weight.device)
        stream = generate_tokens(model, start, SamplingParams(), generator)
        tokens = [token.item() for token in itertools.islice(stream, 100)]
        document = itertools.takewhile(lambda token: token < tokenizer.end_of_text, tokens)
        samples.append({"prompt": prompt, "text": tokenizer.decode(document)})
    return samples


def dry_run(config: Config, data: TokenDataset, model_config: GPTConfig, batch_size: int, procs: Processes) -> None:
    """Time steps on the real data and print the time, memory, disk space and cost of the whole run."""
    model, optimizer = build_model(config, data, model_config, procs)
    micro_batch_size = training.choose_micro_batch_size(config, {}, model, data, optimizer, procs)
    config = replace(config, micro_batch_size=micro_batch_size)
    train_model = parallelize(model, procs, config.compile)
    if procs.is_main:
        print_summary(config, data, model, batch_size, procs)
    batches = train_batches(data, 0, config.seed, batch_size, micro_batch_size, procs.rank, procs.world_size)

    def time_step(n_micro_batches: int) -> float:
        procs.synchronize()
        started = time.perf_counter()
        training.train_step(train_model, batches[:n_micro_batches], optimizer, config.lr, config.grad_clip, procs)
        procs.synchronize()
        return time.perf_counter() - started

    # Two sizes separate the time per micro-batch from the rest of the step, without timing all micro-batches.
    n = min(4, len(batches))
    time_step(n)  # compiles, and allocates the optimiser state
    one, several = (statistics.median(time_step(size) for _ in range(3)) for size in (1, n))
    step_seconds = several + (len(batches) - n) * (several - one) / (n - 1) if n > 1 else one
    procs.call_on_main(print_estimate, config, model, optimizer, step_seconds, procs)
    procs.close()


def print_estimate(
    config: Config, model: GPT, optimizer: torch.optim.Optimizer, step_seconds: float, procs: Processes
) -> None:
    """Print what the whole run needs. Raises `UserError` if its checkpoints do not fit on the disk."""
    tokens_per_s, (flops, source) = config.batch_tokens / step_seconds, peak_flops(procs)
    mfu = tokens_per_s * model.flops_per_token() / (flops * procs.world_size)
    duration = timedelta(seconds=round(config.steps * step_seconds))
    folder = Path(config.out)
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    size = checkpoint_bytes(model, optimizer)
    # The kept checkpoints, the best, that before the decay, and the one being written, less those that exist.
    n_kept = config.keep + (3 if config.schedule == "wsd" else 2)
    need = max(0, n_kept - len(list_checkpoints(folder))) * size
    price = (config.gpu_dollars_per_hour or 0) * procs.world_size
    cost = f", ${duration.total_seconds() / 3600 * price:,.2f} at ${price:g} per hour" if price else ""
    peak, total = procs.peak_memory(), procs.total_memory()
    print(f"memory     {peak / 1e9:.2f} GB at peak per process, {peak / total:.0%} of the device's memory")
    print(f"disk       {need / 1e9:.2f} GB for checkpoints of {size / 1e9:.2f} GB, {free / 1e9:.1f} GB free")
    print(f"peak       100 % MFU is {flops / 1e12:,.2f} TFLOP/s per process ({source})")
    print(f"speed      {tokens_per_s:,.0f} tokens/s, {step_seconds:.2f} s per step, {mfu:.1%} MFU")
    print(f"whole run  {config.steps:,} steps in {duration}{cost}, without validation")
    if need >= free:
        raise UserError(f"--out {config.out}: its checkpoints do not fit on the disk: free space or lower --keep")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
