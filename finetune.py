"""Teach a pretrained model to answer, on the conversations of a dataset folder.

    python finetune.py                                              # the best checkpoint of runs/gpt2, on data/dolly
    python finetune.py --init openai-community/gpt2                 # OpenAI's GPT-2 124M from the hub instead
    python finetune.py --init runs/mine --data data/mine_chat --run mine_chat
    torchrun --standalone --nproc_per_node=8 finetune.py

Only what the assistant says is learned.  The same command again goes on where the run stopped.  Three epochs of
Dolly-15k are some six hundred steps: minutes on one GPU.
"""

import math
import shlex
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

import checkpoint
import cli
from checkpoint import best, run_folder
from cli import check
from data import ChatDataset, all_train_batches, val_batches
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
    init: str = "runs/gpt2"
    """The weights to start from: a run (its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder or a hub id."""
    data: str = "data/dolly"
    """The dataset folder that prepare_dolly.py made."""
    run: str = "dolly"
    """The run: a name under runs/, or a path with a slash in it."""
    epochs: float = 3.0
    """How often every conversation is seen."""
    steps: int | None = None
    """Optimiser steps instead of epochs."""
    batch_tokens: int = 16_384
    """Tokens per step over all processes: packed rows, questions and padding counted."""
    micro_batch_size: int | None = None
    """Rows computed at once, gradients of the rest being added; None takes what the run had, else the most that fit."""
    lr: float = 1e-4
    """The highest learning rate."""
    warmup_fraction: float = 0.05
    """The part of the steps in which the learning rate rises; it then falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """Of the matrices."""
    grad_clip: float = 1.0
    """The longest gradient."""
    dropout: float = 0.1
    """The fraction of activations that is dropped while training."""
    val_every: int = 50
    """Steps between two validations, on the whole validation split."""
    save_every: int = 100
    """Steps between two checkpoints; each is validated too, so that the best one is known."""
    keep: int = 2
    """The newest checkpoints that stay; the best one stays as well."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the log goes besides log.jsonl."""
    seed: int = 1337
    """Decides the order of the data and the dropout."""
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
    cli.check_range("epochs", config.epochs, 0, 10_000, open_low=True)
    if config.steps is not None:
        cli.check_range("steps", config.steps, 1)
        cli.check(config.epochs == Config.epochs, "--epochs and --steps exclude each other: give one")
    procs = start_processes(config.device, config.dtype, config.deterministic)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN where there is a mask (pytorch issue 196678)
    resumed = checkpoint.newest_whole(run_folder(config.run))  # then --init is not needed any more
    start = checkpoint.load(str(resumed or config.init))
    block_size = start.model.config.block_size
    rows = batch_rows(config.batch_tokens, config.micro_batch_size, block_size, procs.world_size)
    data = ChatDataset(config.data, block_size)
    check_tokenizer(config, start, data)
    steps = config.steps or math.ceil(config.epochs * data.n_rows["train"] / rows)
    run = Run(config, data, procs, start.history)

    model = start.model.adapt(data.tokenizer.chat_vocab_size, config.dropout).to(procs.device)
    optimizer = build_optimizer(model, config.lr, config.weight_decay)
    step = run.resume(model, optimizer)
    micro_batch_size = choose_micro_batch_size(config, run.held, model, data, optimizer, rows, procs)
    config = run.config = replace(config, micro_batch_size=micro_batch_size)
    trained = parallelize(model, procs, config.compile)
    if procs.is_main:
        tell_data(config, data)
        epochs = steps * rows / data.n_rows["train"]
        print(f"run        {run.folder}: {steps:,} steps, {epochs:.2f} epochs, {step:,} steps done")
        describe(config, start.source, model, procs, rows)
    todo = range(step, steps)
    batches = all_train_batches(data, todo, config.seed, rows, micro_batch_size, procs.rank, procs.world_size)
    log = Log(run, model, step, steps, config.batch_tokens)

    def validation_loss() -> float:
        batches = val_batches(data, data.n_rows["val"], micro_batch_size, procs.rank, procs.world_size)
        return validate(trained, batches, procs)

    if step == 0:
        log.validation(step, validation_loss())
    while not run.stop_requested() and step < steps:
        started = time.perf_counter()
        lr = lr_at(step, steps, config.lr, config.warmup_fraction)
        seed_step(config.seed, step, procs.rank)
        metrics = train_step(trained, next(batches), optimizer, lr, config.grad_clip, procs)
        step += 1
        log.step(step, metrics, lr, started)
        save = step % config.save_every == 0 or step == steps
        if save or step % config.val_every == 0:
            val_loss = validation_loss()
            log.validation(step, val_loss)
        if save:
            run.save(step, model, optimizer, {"val_loss": val_loss})
    log.close()
    if step < steps:
        run.stop(step, model, optimizer)
    if procs.is_main:
        print(f"done: {step:,} steps; best checkpoint {best(run.folder)}")
        print(f"next: python generate.py --checkpoint {shlex.quote(str(run.folder))} --chat")
    procs.close()


def check_tokenizer(config: Config, start: checkpoint.Loaded, data: ChatDataset) -> None:
    """The model and the data must speak of the same tokens."""
    check(
        start.tokenizer.name == data.tokenizer.name,
        f"{config.data} has {data.tokenizer.name} tokens and {start.source} knows {start.tokenizer.name} tokens: run"
        f" prepare_dolly.py with --tokenizer {start.tokenizer.name}",
    )


def tell_data(config: Config, data: ChatDataset) -> None:
    """Print what there is to learn, and how well it is packed."""
    train, rows = data.meta["train"], data.n_rows["train"]
    print(
        f"data       {config.data}: {train['documents']:,} conversations packed into {rows:,} rows,"
        f" {train['tokens'] / (rows * data.block_size):.1%} full; {train['learned_tokens']:,} tokens to learn"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
