"""Finetune a pretrained model on conversations, so that it answers.

    python finetune.py                                              # runs/gpt2 on data/dolly, into runs/dolly
    python finetune.py --init openai-community/gpt2                 # OpenAI's GPT-2 124M from the hub
    python finetune.py --init runs/mine --data data/mine_chat --out runs/mine_chat
    torchrun --standalone --nproc_per_node=8 finetune.py

The loss covers the assistant's messages only. If a run is interrupted, run the same command again to resume. Three
epochs of Dolly-15k are about six hundred steps: minutes on one GPU.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import math
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from minigpt import cli, training
from minigpt.cli import UserError, plural, resumable
from minigpt.dataset import ChatDataset, train_batches, val_batches
from minigpt.distributed import init_processes
from minigpt.metrics import MetricsLogger
from minigpt.optim import build_optimizer
from minigpt.parallel import parallelize, shard
from minigpt.prefetch import prefetch
from minigpt.pretrained import PretrainedModel, load_pretrained
from minigpt.run import Run
from minigpt.runs import find_best, find_newest
from minigpt.training import TrainConfig
from model import GPT


@dataclass(frozen=True)
class Config(TrainConfig):
    data: str = resumable("data/dolly")
    out: str = resumable("runs/dolly")
    batch_tokens: int = 16_384
    lr: float = 5e-4
    steps: int | None = None
    """Optimiser steps, instead of --epochs."""
    dropout: float = 0.1
    val_every: int = resumable(50)
    save_every: int = resumable(100)
    init: str = "runs/gpt2"
    """The initial model: a run, a checkpoint, a Hugging Face GPT-2 folder or hub id, or nanoGPT's ckpt.pt."""
    epochs: float = 3.0
    """Passes over the conversations."""
    best_by: Literal["val_loss", "step"] = resumable("val_loss")
    """The best checkpoint, which --checkpoint RUN loads: lowest validation loss, or last step, to recall the data."""


def main(config: Config) -> None:
    check_config(config)
    procs = init_processes(config.device, config.dtype, config.deterministic, config.timeout_minutes)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients can be NaN with masks (pytorch issue 196678)
    resumed = procs.call_on_main(find_newest, Path(config.out))  # has all weights: --init is not needed
    initial = load_pretrained(str(resumed or config.init))
    block_size = initial.model.config.block_size
    batch_size = training.get_batch_size(config.batch_tokens, config.micro_batch_size, block_size, procs.world_size)
    data = ChatDataset(config.data, block_size)
    check_tokenizer(config, initial, data)
    steps = config.steps or math.ceil(config.epochs * data.n_rows["train"] / batch_size)
    run = Run(config, data, procs, training.build_schedule(config, steps), initial.history, resumed)

    model = add_chat_tokens(initial.model, data.tokenizer.chat_vocab_size, config.dropout).to(procs.device)
    model.activation_checkpointing = config.activation_checkpointing
    if config.shard:
        shard(model, procs)
    optimizer = build_optimizer(model, config.lr, config.weight_decay, config.optimizer, config.embedding_lr)
    scaler = training.build_scaler(procs)
    step = run.resume(model, optimizer, scaler)
    micro_batch_size = training.choose_micro_batch_size(config, run.saved_flags, model, data, optimizer, procs)
    config = run.config = replace(config, micro_batch_size=micro_batch_size)
    train_model = parallelize(model, procs, config.compile)
    if procs.is_main:
        print_data(config, data)
        epochs = steps * batch_size / data.n_rows["train"]
        print(f"run        {run.folder}: {plural(steps, 'step')}, {epochs:.2f} epochs, {step:,} completed")
        if steps < 20 and not config.steps:
            hint = f"use a lower --batch_tokens, such as {block_size}, or more --epochs"
            print(f"warning: only {plural(steps, 'step')}, too few to learn the conversations: {hint}", file=sys.stderr)
        training.print_model_and_batch(config, initial.source, model, procs, batch_size)
        print(f"lr         {run.schedule}")
    sizes = (batch_size, micro_batch_size, procs.rank, procs.world_size)
    bytes_per_token = data.count_val_bytes(data.n_rows["val"]) / data.meta["val"]["loss_tokens"]
    logger = MetricsLogger(run, model, step, steps, config.batch_tokens, bytes_per_token)
    batches = prefetch(train_batches(data, s, config.seed, *sizes) for s in range(step, steps))
    batches = logger.stragglers.time_data(batches)

    def validation_loss() -> float:
        batches = val_batches(data, data.n_rows["val"], micro_batch_size, procs.rank, procs.world_size)
        return training.validate(train_model, batches, procs, logger.log_val_batch)

    if step == 0:
        logger.log_validation(step, validation_loss())
    while not run.stop_requested() and step < steps:
        started = time.perf_counter()
        lr = run.schedule.get_lr(step)
        options = (lr, config.grad_clip, procs, (config.seed, step), logger.log_micro_batch, scaler)
        metrics = training.train_step(train_model, next(batches), optimizer, *options)
        step += 1
        logger.log_step(step, metrics, lr, started)
        save = step % config.save_every == 0 or step in (steps, run.schedule.decay_start)
        if save or step % config.val_every == 0:
            val_metrics = logger.log_validation(step, validation_loss())
        if save:
            run.save(step, model, optimizer, scaler, val_metrics)
    logger.close()
    if step < steps:
        run.save_and_exit(step, model, optimizer, scaler)
    run.finish_saving()
    if procs.is_main:
        print(f"done: {step:,} steps; best checkpoint {find_best(run.folder)}")
        print(f"next: python {cli.script_path('generate.py')} --checkpoint {shlex.quote(str(run.folder))} --chat")
    procs.close()


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    training.check_train_config(config)
    cli.check_range("epochs", config.epochs, 0, 10_000, open_low=True)
    if config.steps and config.epochs != Config.epochs:
        raise UserError("--epochs and --steps cannot be combined: give one of them")


def check_tokenizer(config: Config, initial: PretrainedModel, data: ChatDataset) -> None:
    """Raise `UserError` if model and data have different tokenizers."""
    if initial.tokenizer.name != data.tokenizer.name:
        name = initial.tokenizer.name
        fix = initial.source if name.startswith("bpe-") else name  # a checkpoint contains its trained vocabulary
        raise UserError(
            f"{config.data} has {data.tokenizer.name} tokens, {initial.source} has {name} tokens: run prepare_dolly.py"
            f" with --tokenizer {fix}"
        )


@torch.no_grad()
def add_chat_tokens(model: GPT, vocab_size: int, dropout: float) -> GPT:
    """Return the model with a larger vocabulary (in the padding if it fits) and another dropout.

    New tokens start with the mean embedding of all others.
    """
    old = model.config
    assert vocab_size >= old.vocab_size
    config = replace(old, vocab_size=vocab_size, dropout=dropout)
    weight = model.wte.weight.new_zeros(config.padded_vocab_size, config.n_embd)
    weight[: old.vocab_size] = model.wte.weight[: old.vocab_size]
    weight[old.vocab_size : vocab_size] = model.wte.weight[: old.vocab_size].mean(dim=0)
    with torch.device("meta"):
        chat_model = GPT(config)
    chat_model.load_state_dict(model.state_dict() | {"wte.weight": weight}, assign=True)
    return chat_model


def print_data(config: Config, data: ChatDataset) -> None:
    """Print the size of the dataset and how full its packed rows are."""
    train, n_rows = data.meta["train"], data.n_rows["train"]
    print(
        f"data       {config.data}: {plural(train['documents'], 'conversation')} packed into {plural(n_rows, 'row')},"
        f" {train['tokens'] / (n_rows * data.block_size):.1%} full; {train['loss_tokens']:,} tokens in the loss"
    )


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
