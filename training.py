"""What both training scripts must do alike: processes and devices, optimiser, schedule, one step, validation."""

import contextlib
import ctypes
import gc
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli import UserError, check, check_range
from data import Batch, Dataset
from loggers import check_loggers
from model import GPT, IGNORE

# ---- processes and devices -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among all that train together; one process alone is the same code.

    Attributes:
        rank: 0 ... world_size - 1.
        world_size: how many processes there are.
        device: where this one computes.
        dtype: the precision of the matrix products; the weights are always float32.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the model computes in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number."""
        total = self.sum(torch.tensor([number, number**2], device=self.device))
        return bool(total[0] ** 2 == self.world_size * total[1])  # equality in Cauchy-Schwarz

    def memory_used(self) -> float:
        """The part of the device's memory that was taken at most: of a GPU's since the last question, of the machine's
        since this process began."""
        if self.device.type != "cuda":
            machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / machine
        used = torch.cuda.max_memory_reserved(self.device) / torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.reset_peak_memory_stats(self.device)
        return used

    def synchronize(self) -> None:
        """Wait for the device, so that a clock can be read."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def fastest(self, work: Callable[[], Any], n: int = 8) -> float:
        """Seconds that some work takes on the device, the best of several times."""

        def seconds() -> float:
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            return time.perf_counter() - started

        return min(seconds() for _ in range(n))

    def close(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


def find_device(device: str | None, local_rank: int = 0) -> torch.device:
    """The device of that name, or the best that this machine has; of several GPUs each process takes its own.

    Raises `UserError` where the machine has no such device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    wrong = f"--device {name}: this machine has no such device; give cuda, mps or cpu, or leave it out"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(wrong) from None
    gpus = torch.cuda.device_count()
    there = {"cuda": (found.index or 0) < gpus, "mps": torch.backends.mps.is_available(), "cpu": True}
    check(there.get(found.type, False), wrong)
    if found.type == "cuda" and found.index is None:
        check(local_rank < gpus, f"there are more processes than GPUs: start torchrun with --nproc_per_node={gpus}")
        found = torch.device("cuda", local_rank)
    return found


def find_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The precision of that name, or bfloat16 on GPUs that have it in hardware and float32 elsewhere."""
    if dtype is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def start_processes(device: str | None, dtype: str | None, deterministic: bool) -> Processes:
    """Meet the other processes that `torchrun` started, if it did: over nccl on GPUs, over gloo elsewhere."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for before it promises anything
        torch.use_deterministic_algorithms(True)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = find_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    one_each = world_size == 1 or not (device or "").startswith("cuda:")
    check(one_each, f"--device {device} gives all processes the same GPU: use --device cuda")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    elif found.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        # torchrun gives restarted processes the store of those that died; without a prefix of their own they would
        # look for the dead (pytorch issue 135712).
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend, device_id = ("nccl", found) if found.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return Processes(rank, world_size, found, find_dtype(dtype, found))


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors of up to 32 MB for the next ones: on a CPU every step frees and takes
    the same sizes, and new pages from the kernel took 14 % of the demo's step.  Without glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in {-3: 2**25, -1: 2**31 - 1, -2: 2**26}.items():  # M_MMAP_THRESHOLD, _TRIM_, TOP_PAD
            mallopt(parameter, value)


def parallelize(model: GPT, procs: Processes, compile: bool) -> nn.Module:
    """The model to train with: compiled, then wrapped for several processes.  `model` itself shares its weights."""
    trained: nn.Module = torch.compile(model, dynamic=False) if compile else model
    if procs.world_size > 1:
        device_ids = [procs.device.index] if procs.device.type == "cuda" else None
        trained = nn.parallel.DistributedDataParallel(trained, device_ids, gradient_as_bucket_view=True)
    gc.collect()
    gc.freeze()  # what is here now stays to the end: the garbage collector need not look through it again
    return trained


# ---- what both scripts check and print; the arithmetic of batch and machine ------------------------------------------


def batch_rows(batch_tokens: int, micro_batch_size: int | None, block_size: int, world_size: int) -> int:
    """Rows in the global batch.  Raises `UserError` where it does not divide into the processes' micro-batches."""
    unit = (micro_batch_size or 1) * block_size * world_size
    nearest = max(unit, round(batch_tokens / unit) * unit)
    rows = f"--micro_batch_size {micro_batch_size} x " if micro_batch_size else ""
    check(
        batch_tokens > 0 and batch_tokens % unit == 0,
        f"--batch_tokens {batch_tokens} is not a multiple of {unit} ({rows}context {block_size} x {world_size}"
        f" processes): use --batch_tokens {nearest}",
    )
    return batch_tokens // block_size


def choose_micro_batch_size(
    config: Any, held: dict, model: GPT, data: Dataset, optimizer: torch.optim.Optimizer, rows: int, procs: Processes
) -> int:
    """--micro_batch_size where it is given; else what the run had before, where that still divides the batch of `rows`
    rows; else, on a GPU, the largest power of two that fits in memory; else one of about 4,096 tokens, beyond which
    a CPU gains nothing."""
    before = held.get("micro_batch_size")
    if config.micro_batch_size or (before and rows % (before * procs.world_size) == 0):
        return config.micro_batch_size or before
    sizes = [2**i for i in range(12) if rows // procs.world_size % 2**i == 0]
    if procs.device.type != "cuda":
        return max(size for size in sizes if size * data.block_size <= max(4096, data.block_size))
    return largest_that_fits(model, data, optimizer, sizes, procs)


def largest_that_fits(
    model: GPT, data: Dataset, optimizer: torch.optim.Optimizer, sizes: Sequence[int], procs: Processes
) -> int:
    """The largest of some micro-batch sizes, in rising order, whose forward and backward pass fits on every process's
    GPU.  Weights and gradients stay as they were.  Raises `UserError` where none fits."""
    batch, reserved, fitting = None, None, 0
    for size in sizes:
        try:
            torch.accelerator.empty_cache()  # what was kept for smaller sizes is of no use for this one
            if reserved is None and not optimizer.state:  # two numbers for each weight, from the first step on
                reserved = torch.empty(2, model.config.num_parameters, device=procs.device)
            batch = data.batch("train", np.resize(np.arange(data.n_rows["train"]), size)).to(procs.device)
            with procs.autocast():
                loss = model(batch.tokens, batch.targets, batch.positions)
            loss.backward()
            fits = procs.memory_used() < 0.92
        except torch.OutOfMemoryError:
            fits = False
        loss = None  # and with it all that the backward pass would need
        model.zero_grad(set_to_none=True)
        if procs.sum(torch.tensor(int(not fits), device=procs.device)):
            break
        fitting = size
    del reserved, batch
    gc.collect()
    torch.accelerator.empty_cache()
    procs.memory_used()  # the next question is about what comes now
    check(fitting > 0, "not even one row at a time fits in the GPU's memory: choose a smaller model")
    return fitting


def check_training(config: Any) -> None:
    """Check the values that both scripts have, before any work starts.  Raises `UserError`."""
    check(config.run.strip() != "", "--run is empty: give the run a name")
    for name in ("batch_tokens", "micro_batch_size", "val_every", "save_every", "keep"):
        if getattr(config, name) is not None:
            check_range(name, getattr(config, name), 1)
    check_range("lr", config.lr, 0, 1, open_low=True)
    check_range("warmup_fraction", config.warmup_fraction, 0, 1)
    check_range("weight_decay", config.weight_decay, 0)
    check_range("grad_clip", config.grad_clip, 0, open_low=True)
    check_range("dropout", config.dropout, 0, 0.9)
    check_range("seed", config.seed, 0, 2**63 - 1)
    check_loggers(config.log)


def describe(config: Any, name: str, model: GPT, procs: Processes, rows: int) -> None:
    """Print the model and the arithmetic of the batch before the first step."""
    block_size = model.config.block_size
    precision = str(procs.dtype).removeprefix("torch.")
    print(
        f"model      {name}: {model.config.num_parameters:,} parameters, context {block_size}, {precision} on"
        f" {procs.device.type}{', compiled' if config.compile else ''}"
    )
    print(
        f"batch      {config.batch_tokens:,} tokens a step = {config.micro_batch_size} rows x {block_size} tokens x"
        f" {procs.world_size} processes x {rows // (config.micro_batch_size * procs.world_size)} micro-batches"
    )


# ---- one step ------------------------------------------------------------------------------------------------------


def build_optimizer(model: GPT, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter, 2019) with GPT-3's betas; weight decay on matrices, not on biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def lr_at(step: int, steps: int, lr: float, warmup_fraction: float, min_lr_fraction: float = 0.1) -> float:
    """The learning rate of a step, from 0: linear warm-up to `lr`, then half a cosine down to a fraction of it."""
    warmup = max(1, round(warmup_fraction * steps))
    if step < warmup:
        return lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return lr * (min_lr_fraction + (1 - min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * done)))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a pure function of (seed, step, rank), so that a resumed run draws what the first would have."""
    torch.manual_seed(((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    lr: float,
    grad_clip: float,
    procs: Processes,
) -> dict[str, Tensor]:
    """One optimiser step on this process's micro-batches of the global batch.

    Where the loss or the gradient is not finite, the weights and the optimiser's state stay as they are.

    The loss is the sum over all learned tokens of all micro-batches on all processes, over their count: no token weighs
    more because its micro-batch or its process has fewer of them.

    Returns:
        loss: mean cross-entropy per learned token of the global batch, in nats; on the device, like grad_norm.
        grad_norm: the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    batches = [batch.to(procs.device) for batch in batches]
    learned = procs.sum(torch.stack([(batch.targets != IGNORE).sum() for batch in batches]).sum())
    total = torch.zeros((), device=procs.device)
    for i, batch in enumerate(batches):
        accumulate = procs.world_size > 1 and i < len(batches) - 1  # gradients are exchanged with the last one only
        with model.no_sync() if accumulate else contextlib.nullcontext():
            with procs.autocast():
                loss = model(batch.tokens, batch.targets, batch.positions)
            (loss * (procs.world_size / learned)).backward()  # DistributedDataParallel averages: undo its division
        total += loss.detach()
    loss = procs.sum(total) / learned
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    # Where this is 1, fused AdamW leaves weights and state as they are, without the host waiting to know.
    optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": grad_norm}


@torch.no_grad()
def validate(model: nn.Module, batches: Iterable[Batch], procs: Processes) -> float:
    """The exact mean loss per learned token over a fixed set of rows, however many processes share them."""
    training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # summed loss, learned tokens
    for batch in batches:
        batch = batch.to(procs.device)
        with procs.autocast():
            loss = model(batch.tokens, batch.targets, batch.positions)
        learned = (batch.targets != IGNORE).sum()
        total += torch.tensor([loss.item(), learned.item()], dtype=torch.float64)
    model.train(training)
    loss_sum, learned = procs.sum(total.to(procs.device) if procs.world_size > 1 else total).tolist()
    return loss_sum / learned
