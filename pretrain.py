"""Train a GPT-2 from scratch on a dataset folder.

    torchrun --standalone --nproc_per_node=8 pretrain.py            # GPT-2 124M on data/fineweb_edu, into runs/gpt2
    python pretrain.py                                              # the same on one GPU
    python pretrain.py --data data/mine --run mine --steps 2000     # on your own text
    python pretrain.py --dry_run --gpu_dollars_per_hour 2           # how fast, how long and for how much it would be

The same command again goes on where the run stopped.  GPT-2 124M on 10 billion tokens of FineWeb-Edu
takes 19,073 steps of 524,288 tokens; the README works out the hours and the price.
"""

import shlex
import shutil
import statistics
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

import cli
from checkpoint import best, checkpoints, run_folder
from data import TokenDataset, all_train_batches, train_batches, val_batches
from evaluation import hellaswag, load_hellaswag, samples
from model import GPT, PRESETS
from runs import Log, Run, peak_flops
from sampling import Sampling
from training import (
    Processes,
    batch_rows,
    build_optimizer,
    check_training,
    choose_micro_batch_size,
    describe,
    lr_at,
    parallelize,
    seed_step,
    start_processes,
    train_step,
    validate,
)


@dataclass(frozen=True)
class Config:
    data: str = "data/fineweb_edu"
    """The dataset folder that prepare_fineweb.py made."""
    run: str = "gpt2"
    """The run: a name under runs/, or a path with a slash in it."""
    model: Literal["tiny", "demo", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """The size of the model, from the table in model.py."""
    steps: int = 19_073
    """Optimiser steps; the default sees 10 billion tokens."""
    batch_tokens: int = 524_288
    """Tokens per step over all processes."""
    micro_batch_size: int | None = None
    """Rows computed at once, gradients of the rest being added; None takes what the run had, else the most that fit."""
    lr: float = 6e-4
    """The highest learning rate."""
    warmup_fraction: float = 0.04
    """The part of the steps in which the learning rate rises; it then falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """Of the matrices."""
    grad_clip: float = 1.0
    """The longest gradient."""
    dropout: float = 0.0
    """The fraction of activations that is dropped while training."""
    val_every: int = 250
    """Steps between two validations."""
    val_tokens: int = 2_097_152
    """Tokens of the validation split that are used, from its beginning."""
    hellaswag_every: int | None = None
    """Steps between two times that HellaSwag is asked, as evaluate.py does; None never asks."""
    hellaswag_files: tuple[str, ...] = ()
    """HellaSwag's examples in local .jsonl or .parquet files instead of the hub's Rowan/hellaswag."""
    sample_every: int | None = None
    """Steps between two times that the model goes on from --sample_prompts, into the log; None never does."""
    sample_prompts: tuple[str, ...] = ("Once upon a time", "The water cycle begins", "The capital of France is")
    """The beginnings that it goes on from."""
    save_every: int = 1000
    """Steps between two checkpoints; each is validated too, so that the best one is known."""
    keep: int = 2
    """The newest checkpoints that stay; the best one stays as well."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log goes besides log.jsonl."""
    seed: int = 1337
    """Decides the initial weights, the order of the data and the dropout."""
    device: str | None = None
    """cuda, mps or cpu; None takes the best there is."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the matrix products; None takes bfloat16 where a GPU has it."""
    deterministic: bool = False
    """Only GPU kernels that give the same bits each time: slower, and resumed runs equal uninterrupted ones exactly."""
    max_minutes: float | None = None
    """Save and stop after so long, with exit code 75; the same command goes on."""
    dry_run: bool = False
    """Check data, batch, memory and disk, time some steps, tell what the whole run will take, leave nothing behind."""
    gpu_dollars_per_hour: float | None = None
    """The price of one GPU, for the cost that --dry_run tells."""
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Compile the model; the first step then takes about a minute."""


def main(config: Config) -> None:
    check_training(config)
    cli.check_range("steps", config.steps, 1)
    cli.check_range("val_tokens", config.val_tokens, 1)
    if config.gpu_dollars_per_hour is not None:
        cli.check_range("gpu_dollars_per_hour", config.gpu_dollars_per_hour, 0)
        cli.check(config.dry_run, "--gpu_dollars_per_hour is for --dry_run, which tells the cost")
    check_judging(config)
    procs = start_processes(config.device, config.dtype, config.deterministic)
    block_size = PRESETS[config.model].block_size
    rows = batch_rows(config.batch_tokens, config.micro_batch_size, block_size, procs.world_size)
    data = TokenDataset(config.data, block_size)
    if config.dry_run:
        return rehearse(config, data, rows, procs)
    choices = load_hellaswag(config.hellaswag_files, data.tokenizer) if config.hellaswag_every else []
    run = Run(config, data, procs)
    model, optimizer = build(config, data, procs)
    step = run.resume(model, optimizer)
    micro_batch_size = choose_micro_batch_size(config, run.held, model, data, optimizer, rows, procs)
    config = run.config = replace(config, micro_batch_size=micro_batch_size)
    trained = parallelize(model, procs, config.compile)
    if procs.is_main:
        print(f"run        {run.folder}: {config.steps:,} steps, {step:,} steps done")
        tell(config, data, model, rows, procs)
    todo = range(step, config.steps)
    batches = all_train_batches(data, todo, config.seed, rows, micro_batch_size, procs.rank, procs.world_size)
    log = Log(run, model, step, config.steps, config.batch_tokens)

    def validation_loss() -> float:
        val_rows = max(1, config.val_tokens // block_size)
        batches = val_batches(data, val_rows, micro_batch_size, procs.rank, procs.world_size)
        return validate(trained, batches, procs)

    if step == 0:
        log.validation(step, validation_loss())
    while not run.stop_requested() and step < config.steps:
        started = time.perf_counter()
        lr = lr_at(step, config.steps, config.lr, config.warmup_fraction)
        seed_step(config.seed, step, procs.rank)
        metrics = train_step(trained, next(batches), optimizer, lr, config.grad_clip, procs)
        step += 1
        log.step(step, metrics, lr, started)
        save = step % config.save_every == 0 or step == config.steps
        if save or step % config.val_every == 0:
            val_loss = validation_loss()
            log.validation(step, val_loss)
        if config.hellaswag_every and step % config.hellaswag_every == 0:
            log.hellaswag(step, hellaswag(model, choices, data.tokenizer, procs))
        if config.sample_every and step % config.sample_every == 0 and procs.is_main:
            sampling = Sampling(max_tokens=100)
            log.samples(step, samples(model, data.tokenizer, config.sample_prompts, sampling, config.seed))
        if save:
            run.save(step, model, optimizer, {"val_loss": val_loss})
    log.close()
    if step < config.steps:
        run.stop(step, model, optimizer)
    if procs.is_main:
        print(f"done: {step:,} steps; best checkpoint {best(run.folder)}")
        print(f"next: python generate.py --checkpoint {shlex.quote(str(run.folder))} --prompt 'Once upon a time'")
    procs.close()


def check_judging(config: Config) -> None:
    """The values of HellaSwag and the samples."""
    for name in ("hellaswag_every", "sample_every"):
        if getattr(config, name) is not None:
            cli.check_range(name, getattr(config, name), 1)
    asked = config.hellaswag_every is not None or not config.hellaswag_files
    cli.check(asked, "--hellaswag_files is for --hellaswag_every, which says how often it is asked")
    asked = config.sample_every is not None or config.sample_prompts == Config.sample_prompts
    cli.check(asked, "--sample_prompts is for --sample_every, which says how often they are gone on from")
    cli.check(len(config.sample_prompts) > 0, "--sample_prompts is empty: give a text, or leave it out")


def build(config: Config, data: TokenDataset, procs: Processes) -> tuple[GPT, torch.optim.Optimizer]:
    """The model at its beginning, and its optimiser."""
    torch.manual_seed(config.seed)
    shape = replace(PRESETS[config.model], vocab_size=data.tokenizer.vocab_size, dropout=config.dropout)
    model = GPT(shape).to(procs.device)
    return model, build_optimizer(model, config.lr, config.weight_decay)


def tell(config: Config, data: TokenDataset, model: GPT, rows: int, procs: Processes) -> None:
    """Print what is trained on what."""
    epochs = config.steps * rows / data.n_rows["train"]
    print(
        f"data       {config.data}: {data.n_rows['train']:,} rows of {data.block_size} tokens, tokenizer"
        f" {data.tokenizer.name}; {epochs:.2f} epochs"
    )
    describe(config, config.model, model, procs, rows)


def rehearse(config: Config, data: TokenDataset, rows: int, procs: Processes) -> None:
    """--dry_run: time steps on the real data, and print what the whole run will take."""
    model, optimizer = build(config, data, procs)
    micro_batch_size = choose_micro_batch_size(config, {}, model, data, optimizer, rows, procs)
    config = replace(config, micro_batch_size=micro_batch_size)
    trained = parallelize(model, procs, config.compile)
    if procs.is_main:
        tell(config, data, model, rows, procs)
    batches = train_batches(data, 0, config.seed, rows, micro_batch_size, procs.rank, procs.world_size)

    def seconds(micro_batches: int) -> float:
        procs.synchronize()
        started = time.perf_counter()
        train_step(trained, batches[:micro_batches], optimizer, config.lr, config.grad_clip, procs)
        procs.synchronize()
        return time.perf_counter() - started

    # Two sizes tell apart what a micro-batch takes and what a step takes besides, without a step of all of them.
    few = min(4, len(batches))
    seconds(few)  # compiles, and takes the optimiser's memory
    one, more = (statistics.median(seconds(n) for _ in range(3)) for n in (1, few))
    step = more + (len(batches) - few) * (more - one) / (few - 1) if few > 1 else one
    if procs.is_main:
        tokens_per_s, (flops, source) = config.batch_tokens / step, peak_flops(procs)
        mfu = tokens_per_s * model.flops_per_token() / (flops * procs.world_size)
        duration = timedelta(seconds=round(config.steps * step))
        folder = run_folder(config.run)
        size, free = checkpoint_bytes(model), shutil.disk_usage(existing(folder)).free
        # The newest, the best, and the one that is being written; some may be there already.
        need = max(0, config.keep + 2 - len(checkpoints(folder))) * size
        print(f"memory     {procs.memory_used():.0%} of the {procs.device.type}'s at most, each process")
        print(f"disk       {need / 1e9:.2f} GB for checkpoints of {size / 1e9:.2f} GB, {free / 1e9:.1f} GB free")
        print(f"limit      {flops / 1e12:,.2f} TFLOP/s for each process is 100 % MFU ({source})")
        print(f"speed      {tokens_per_s:,.0f} tokens/s, {step:.2f} s a step, {mfu:.1%} MFU")
        price = (config.gpu_dollars_per_hour or 0) * procs.world_size
        cost = f", ${duration.total_seconds() / 3600 * price:,.2f} at ${price:g} an hour" if price else ""
        print(f"whole run  {config.steps:,} steps in {duration}{cost}, without validation")
        cli.check(
            need < free, f"--run {config.run}: its checkpoints do not fit on the disk: free space or lower --keep"
        )
    procs.close()


def checkpoint_bytes(model: GPT) -> int:
    """A checkpoint has each weight and two averages of its gradients, in float32."""
    return 12 * sum(parameter.numel() for parameter in model.parameters())


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
