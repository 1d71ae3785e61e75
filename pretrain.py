"""Train a GPT-2 from scratch on a dataset folder.

    torchrun --standalone --nproc_per_node=8 pretrain.py            # GPT-2 124M on data/fineweb_edu, into runs/gpt2
    python pretrain.py                                              # the same on one GPU
    python pretrain.py --data data/mine --run mine --steps 2000     # on your own text

The same command again goes on where the run stopped.  GPT-2 124M on 10 billion tokens of FineWeb-Edu
takes 19,073 steps of 524,288 tokens; the README works out the hours and the price.
"""

import shlex
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import cli
from checkpoint import best
from data import TokenDataset, train_batches, val_batches
from model import GPT, PRESETS
from runs import Log, Run
from training import (
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
    """Rows that a process computes at once, the rest is gradient accumulation; None takes the most that fit."""
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
    save_every: int = 1000
    """Steps between two checkpoints; each is validated too, so that the best one is known."""
    keep: int = 2
    """The newest checkpoints that stay; the best one stays as well."""
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
    compile: bool = field(default_factory=torch.cuda.is_available)
    """Compile the model; the first step then takes about a minute."""


def main(config: Config) -> None:
    check_training(config)
    cli.check_range("steps", config.steps, 1)
    cli.check_range("val_tokens", config.val_tokens, 1)
    procs = start_processes(config.device, config.dtype, config.deterministic)
    block_size = PRESETS[config.model].block_size
    rows = batch_rows(config.batch_tokens, config.micro_batch_size, block_size, procs.world_size)
    data = TokenDataset(config.data, block_size)
    run = Run(config, data, procs)

    torch.manual_seed(config.seed)
    shape = replace(PRESETS[config.model], vocab_size=data.tokenizer.vocab_size, dropout=config.dropout)
    model = GPT(shape).to(procs.device)
    optimizer = build_optimizer(model, config.lr, config.weight_decay)
    step = run.resume(model, optimizer)
    micro_batch_size = choose_micro_batch_size(config, run.held, model, data, optimizer, rows, procs)
    config = run.config = replace(config, micro_batch_size=micro_batch_size)
    trained = parallelize(model, procs, config.compile)
    if procs.is_main:
        epochs = config.steps * rows / data.n_rows["train"]
        print(
            f"data       {config.data}: {data.n_rows['train']:,} rows of {block_size} tokens,"
            f" tokenizer {data.tokenizer.name}"
        )
        print(f"run        {run.folder}: {config.steps:,} steps, {epochs:.2f} epochs, {step:,} steps done")
        describe(config, config.model, model, procs, rows)
    log = Log(run, model, step, config.steps, config.batch_tokens)

    def validation_loss() -> float:
        val_rows = max(1, config.val_tokens // block_size)
        batches = val_batches(data, val_rows, micro_batch_size, procs.rank, procs.world_size)
        return validate(trained, batches, procs)

    if step == 0:
        log.validation(step, validation_loss())
    while not run.stop_requested() and step < config.steps:
        started = time.perf_counter()
        batches = train_batches(data, step, config.seed, rows, micro_batch_size, procs.rank, procs.world_size)
        lr = lr_at(step, config.steps, config.lr, config.warmup_fraction)
        seed_step(config.seed, step, procs.rank)
        metrics = train_step(trained, batches, optimizer, lr, config.grad_clip, procs)
        step += 1
        log.step(step, metrics, lr, started)
        save = step % config.save_every == 0 or step == config.steps
        if save or step % config.val_every == 0:
            val_loss = validation_loss()
            log.validation(step, val_loss)
        if save:
            run.save(step, model, optimizer, {"val_loss": val_loss})
    log.close()
    if step < config.steps:
        run.stop(step, model, optimizer)
    if procs.is_main:
        print(f"done: {step:,} steps; best checkpoint {best(run.folder)}")
        print(f"next: python generate.py --checkpoint {shlex.quote(str(run.folder))} --prompt 'Once upon a time'")
    procs.close()


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
