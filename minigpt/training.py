"""Training, shared by pretraining and finetuning: flags, one optimiser step, exact validation, micro-batch size."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minigpt.cli import UserError, check_range, plural, resumable
from minigpt.dataset import Batch, Dataset
from minigpt.distributed import Processes, can_compile
from minigpt.metrics import check_report_to
from minigpt.optim import Schedule
from minigpt.parallel import compile_blocks, full_tensor, is_sharded_model
from model import GPT, IGNORE_INDEX, eval_mode

MEMORY_LIMIT = 0.92  # fraction of a GPU's memory that the micro-batch search uses


@dataclass(frozen=True)
class TrainConfig:
    """The flags that pretrain.py and finetune.py share; their defaults are in the scripts."""

    data: str
    """The dataset folder to train on."""
    out: str
    """The run folder, for checkpoints and log."""
    batch_tokens: int
    """Tokens per step over all processes, with padding."""
    lr: float
    """The peak learning rate."""
    steps: int | None
    """Optimiser steps. With --schedule wsd, they can change on resume until the decay starts."""
    dropout: float
    """Dropout probability."""
    val_every: int
    """Steps between validations."""
    save_every: int
    """Steps between checkpoints; each is validated too."""
    keep: int = resumable(2)
    """Number of newest checkpoints to keep; the best one, and the last one before a decay, are kept too."""
    micro_batch_size: int | None = resumable(None)
    """Rows per forward pass; default: as in the resumed run, else the most that fit, on a CPU about 4,096 tokens."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others."""
    warmup_steps: int | None = resumable(None)
    """Steps with linear warmup of the learning rate; default: 4 % of the steps at the first start."""
    embedding_lr: float | None = None
    """Peak learning rate of embeddings, biases and LayerNorms; default: --lr, with Muon twice --lr."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warmup: a cosine down to a tenth, or constant, then a linear decay to 0 (wsd)."""
    decay_fraction: float = 0.3
    """With --schedule wsd: fraction of the steps with linear decay."""
    weight_decay: float = 0.1
    """Weight decay, on 2-D parameters only; with --optimizer muon, on the matrices of the blocks only."""
    grad_clip: float = 1.0
    """Clip the gradient norm to this value."""
    seed: int = 1337
    """Seed of the initial weights, the data order and dropout."""
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = resumable(())
    """Trackers to log to, besides log.jsonl."""
    max_minutes: float | None = resumable(None)
    """Save and stop this long after the start of torchrun or the script; run the same command again to resume."""
    timeout_minutes: float = resumable(30.0)
    """Timeout of collective operations: end the run if a process waits this long. Saving must take less."""
    device: str | None = resumable(None)
    """cuda, mps or cpu; default: the best available."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = resumable(None)
    """Precision of the matrix products; default on GPUs: bfloat16, or float16 on V100 and T4; elsewhere float32."""
    compile: bool = resumable(default_factory=can_compile)
    """Compile the model, by default on a GPU; the first step then takes longer."""
    activation_checkpointing: bool = resumable(False)
    """Keep only the input of each block for the backward pass: much less memory, a third more computation."""
    shard: bool = resumable(False)
    """Shard weights, gradients and optimiser state over the processes: less memory, more communication."""
    deterministic: bool = resumable(False)
    """Use deterministic GPU kernels only: slower, but a resumed run equals an uninterrupted one bit for bit."""


def check_train_config(config: TrainConfig) -> None:
    """Check the shared flags before any work starts. Raises `UserError`."""
    if not config.out.strip():
        raise UserError("--out is empty: give a folder, such as runs/mine")
    for name in ("batch_tokens", "micro_batch_size", "val_every", "save_every", "keep"):
        check_range(name, getattr(config, name), 1)
    check_range("lr", config.lr, 0, 1, open_low=True)
    check_range("steps", config.steps, 1)
    check_range("warmup_steps", config.warmup_steps, 0)
    check_range("weight_decay", config.weight_decay, 0)
    check_range("embedding_lr", config.embedding_lr, 0, 1, open_low=True)
    check_range("decay_fraction", config.decay_fraction, 0, 1)
    if config.decay_fraction != TrainConfig.decay_fraction and config.schedule != "wsd":
        raise UserError("--decay_fraction is for --schedule wsd")
    check_range("grad_clip", config.grad_clip, 0, open_low=True)
    check_range("dropout", config.dropout, 0, 0.9)
    check_range("seed", config.seed, 0, 2**63 - 1)
    check_range("max_minutes", config.max_minutes, 0, open_low=True)
    check_range("timeout_minutes", config.timeout_minutes, 0, 10_000, open_low=True)
    check_report_to(config.report_to)


def build_schedule(config: TrainConfig, steps: int) -> Schedule:
    """Return the learning rate of each step of a new run."""
    warmup_steps = round(0.04 * steps) if config.warmup_steps is None else config.warmup_steps
    return Schedule(config.schedule, config.lr, steps, warmup_steps, config.decay_fraction)


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: Optimizer,
    lr: float,
    grad_clip: float,
    procs: Processes,
    seed_and_step: tuple[int, int] = (0, 0),
    on_micro_batch: Callable[[int, int], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """Do one optimiser step on this process's micro-batches of the global batch.

    The loss is the sum over all targets of all micro-batches on all processes, divided by their number. So no target
    weighs more because its micro-batch has fewer. If the loss or a gradient is not finite, weights and optimiser state
    stay unchanged; in float16, only the gradients decide. `seed_and_step` decides the dropout. `scaler` is that of
    `build_scaler`; None is for precisions other than float16. `on_micro_batch(done, total)` is called after each.

    Returns:
        loss: mean cross-entropy per target of the global batch in nats; on the device, like grad_norm.
        grad_norm: gradient norm before clipping.
        loss_scale: with an enabled `scaler`, the factor of the next step's loss.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    batches = [batch.to(procs.device) for batch in batches]
    # This waits for processes whose data is late, before the forward passes, which `StragglerDetector` times.
    n_targets = procs.all_reduce(torch.stack([(batch.targets != IGNORE_INDEX).sum() for batch in batches]).sum())
    loss_sum = torch.zeros((), device=procs.device)
    for i, batch in enumerate(batches):
        seed_dropout(*seed_and_step, i * procs.world_size + procs.rank)
        # DDP all-reduces gradients after the last micro-batch only. FSDP reduce-scatters them after each.
        skip_sync = hasattr(model, "no_sync") and i < len(batches) - 1
        with model.no_sync() if skip_sync else contextlib.nullcontext():
            with procs.autocast():
                loss = model(batch.tokens, batch.targets, batch.positions)
            scaler.scale(loss * (procs.world_size / n_targets)).backward()  # DDP and FSDP average gradients: undo it
        loss_sum += loss.detach()
        if on_micro_batch is not None:
            on_micro_batch(i + 1, len(batches))
    loss = procs.all_reduce(loss_sum) / n_targets
    scaler.unscale_(optimizer)
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    # found_inf=1 makes fused AdamW skip the update without a host sync. An enabled scaler sets it to its own result.
    optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    scale = {"loss_scale": torch.tensor(scaler.get_scale())} if scaler.is_enabled() else {}
    return {"loss": loss, "grad_norm": grad_norm} | scale


def build_scaler(procs: Processes) -> torch.amp.GradScaler:
    """Return the scaler of the loss, which keeps small gradients from becoming 0 in float16; else it does nothing.

    It starts at 65,536, halves after a step whose gradients overflow, and doubles after 2,000 steps without overflow.
    """
    return torch.amp.GradScaler(procs.device.type, enabled=procs.dtype == torch.float16)


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Make dropout a pure function of (seed, step, number of the micro-batch in the global batch).

    So a resumed run draws the same masks, and so does any number of processes.
    """
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + micro_batch) % 2**63)


@torch.no_grad()
def validate(
    model: nn.Module, batches: Iterable[Batch], procs: Processes, on_batch: Callable[[int], None] | None = None
) -> float:
    """Return the exact mean loss per target over a fixed set of rows, for any number of processes.

    `on_batch(n)` is called after the n-th batch.
    """
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, number of targets
    with eval_mode(model):
        for n, batch in enumerate(batches, 1):
            batch = batch.to(procs.device)
            with procs.autocast():
                loss = model(batch.tokens, batch.targets, batch.positions)
            n_targets = (batch.targets != IGNORE_INDEX).sum()
            total += torch.tensor([loss.item(), n_targets.item()], dtype=torch.float64)
            if on_batch is not None:
                on_batch(n)
    loss_sum, n_targets = procs.all_reduce(total.to(procs.device) if procs.world_size > 1 else total).tolist()
    return loss_sum / n_targets


def get_batch_size(batch_tokens: int, micro_batch_size: int | None, block_size: int, world_size: int) -> int:
    """Return the rows of the global batch. Raises `UserError` if they do not divide into micro-batches."""
    unit = (micro_batch_size or 1) * block_size * world_size
    nearest = max(unit, round(batch_tokens / unit) * unit)
    rows = f"--micro_batch_size {micro_batch_size} x " if micro_batch_size else ""
    if batch_tokens <= 0 or batch_tokens % unit:
        raise UserError(
            f"--batch_tokens {batch_tokens} is not a multiple of {unit} ({rows}context {block_size} x {world_size}"
            f" processes): use --batch_tokens {nearest}"
        )
    return batch_tokens // block_size


def choose_micro_batch_size(
    config: TrainConfig,
    saved_flags: dict,
    model: GPT,
    data: Dataset,
    optimizer: Optimizer,
    procs: Processes,
) -> int:
    """Return --micro_batch_size or its default.

    The default is the size of the resumed run, if it still divides the batch. Else, on a GPU, it is the largest power
    of two that fits in memory; on a CPU about 4,096 tokens, above which it is not faster.
    """
    batch_size, saved = config.batch_tokens // data.block_size, saved_flags.get("micro_batch_size")
    if config.micro_batch_size:
        return config.micro_batch_size
    if any(saved_flags.get(name, False) != getattr(config, name) for name in ("activation_checkpointing", "shard")):
        saved = None  # another size fits
    if saved and batch_size % (saved * procs.world_size) == 0:
        return saved
    n_rows = batch_size // procs.world_size
    if procs.device.type != "cuda":
        max_size = max(1, 4096 // data.block_size)
        return max(size for size in range(1, max_size + 1) if n_rows % size == 0)
    sizes = [2**i for i in range(12) if n_rows % 2**i == 0]
    return find_max_micro_batch_size(model, data, optimizer, sizes, procs, config.compile)


def find_max_micro_batch_size(
    model: GPT, data: Dataset, optimizer: Optimizer, sizes: Sequence[int], procs: Processes, compile: bool = False
) -> int:
    """Return the largest of increasing sizes whose forward and backward pass fits in every process's GPU memory.

    With `compile`, only the sizes around the largest that fits uncompiled are compiled, which takes a while for each. A
    sharded model is compiled first, see `count_sharded_sizes`.
    Weights and gradients stay unchanged. Raises `UserError` if no size fits.
    """
    # The first step of AdamW allocates two values per weight, Muon one. DDP copies the gradients to communicate them
    # unless there is one micro-batch.
    sharded = is_sharded_model(model)
    n_copies = 2 * (not optimizer.state) + (procs.world_size > 1 and not sharded)
    n_weights = model.config.num_parameters // (procs.world_size if sharded else 1)
    reserved = torch.empty(n_copies, n_weights, device=procs.device)
    if sharded:
        if compile:
            compile_blocks(model)
        n_fitting = count_sharded_sizes(model, data, sizes, procs)
    else:
        fits = functools.partial(fits_in_memory, model, data=data, procs=procs)
        n_fitting = sum(1 for _ in itertools.takewhile(fits, sizes))
        if compile and n_fitting:
            compile_blocks(model)
            n_fitting += sum(1 for _ in itertools.takewhile(fits, sizes[n_fitting:]))
            while n_fitting and not fits(sizes[n_fitting - 1]):
                n_fitting -= 1
    del reserved
    gc.collect()
    torch.accelerator.empty_cache()
    procs.peak_memory()  # resets the peak
    if n_fitting == 0:
        raise UserError(
            "not even one row fits in the GPU's memory: use --activation_checkpointing, --shard on several GPUs, or a"
            " smaller model"
        )
    return sizes[n_fitting - 1]


def fits_in_memory(model: GPT, size: int, data: Dataset, procs: Processes) -> bool:
    """Return whether a micro-batch of `size` rows fits in the memory of all processes."""
    try:
        fits = measure_memory(model, size, data, procs) < MEMORY_LIMIT
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad(set_to_none=True)
    return not procs.all_reduce(torch.tensor(int(not fits), device=procs.device))


def count_sharded_sizes(model: GPT, data: Dataset, sizes: Sequence[int], procs: Processes) -> int:
    """Return how many of the sizes, each twice the previous one, fit in the memory of all processes.

    A size is tried only if it fits by linear growth: a process that runs out of memory alone would leave the others
    waiting for it.
    """
    used: list[float] = []
    for size in sizes:
        growth = 2 * (used[-1] - used[-2]) if len(used) > 1 else sum(used)
        if sum(used[-1:]) + growth >= MEMORY_LIMIT:
            break
        used.append(max(procs.all_gather(measure_memory(model, size, data, procs))))
    return sum(1 for fraction in used if fraction < MEMORY_LIMIT)


def measure_memory(model: GPT, size: int, data: Dataset, procs: Processes) -> float:
    """Return the peak memory use of a micro-batch of `size` rows, as a fraction of this process's memory."""
    torch.accelerator.empty_cache()  # memory cached for another size cannot be reused
    procs.peak_memory()  # resets the peak
    batch = data.batch("train", np.resize(np.arange(data.n_rows["train"]), size)).to(procs.device)
    with procs.autocast():
        loss = model(batch.tokens, batch.targets, batch.positions)
    loss.backward()
    model.zero_grad(set_to_none=True)
    return procs.peak_memory() / procs.total_memory()


def print_model_and_batch(config: TrainConfig, name: str, model: GPT, procs: Processes, batch_size: int) -> None:
    """Print the model and the batch arithmetic before the first step."""
    block_size = model.config.block_size
    precision = str(procs.dtype).removeprefix("torch.")
    micro_batches = batch_size // (config.micro_batch_size * procs.world_size)
    print(
        f"model      {name}: {model.config.num_parameters:,} parameters, context {block_size}, {precision} on"
        f" {procs.device.type}{', compiled' if config.compile else ''}"
        f"{', sharded' if is_sharded_model(model) else ''}"
    )
    rows = plural(config.micro_batch_size, "row")
    print(
        f"batch      {config.batch_tokens:,} tokens per step = {rows} x {block_size} tokens x"
        f" {plural(procs.world_size, 'process', 'processes')} x {plural(micro_batches, 'micro-batch', 'micro-batches')}"
    )
