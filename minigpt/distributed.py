"""Processes of a training run: ranks, device, precision, communication."""

import atexit
import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt.cli import UserError, skip_shutdown

START_TIMEOUT = timedelta(minutes=10)  # machines may take minutes to start


@dataclass(frozen=True)
class Processes:
    """Rank, device and precision of this process, and collective operations. A single process uses the same code.

    Attributes:
        rank: 0 ... world_size - 1.
        world_size: number of processes.
        device: the device of this process.
        dtype: precision of the matrix products; weights are always float32.
    """

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context in which the model computes in `dtype`."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list:
        """Gather a picklable value from every process; return them in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def map(self, function: Callable[[Any], Any], items: Sequence) -> list:
        """Apply a function to every item, each process to its share. All processes return all results, in order.

        Every process makes the same number of calls, because the forward pass of a sharded model is a collective
        operation. A process with fewer items repeats the last one.
        """
        indices = range(self.rank, len(items) + -len(items) % self.world_size, self.world_size)
        shares = self.all_gather([function(items[min(i, len(items) - 1)]) for i in indices])
        return [shares[i % self.world_size][i // self.world_size] for i in range(len(items))]

    def call_on_main(self, function: Callable, *args: Any) -> Any:
        """Call a function on the main process and return its result on all. All processes raise its user errors."""
        results: list = [None]
        if self.is_main:
            try:
                results = [function(*args)]
            except (UserError, OSError) as error:
                results = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(results)
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def peak_memory(self) -> int:
        """Return the peak memory use in bytes.

        On a GPU: of this GPU, since the last call. On a CPU: of this process, since it started.
        """
        if self.device.type != "cuda":
            unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else KiB
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return used

    def total_memory(self) -> int:
        """Return the memory of this GPU, or of the machine, in bytes."""
        if self.device.type != "cuda":
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return torch.cuda.mem_get_info(self.device)[1]

    def synchronize(self) -> None:
        """Wait for the device, before a clock is read."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def close(self) -> None:
        """Wait for the other processes, which may need this one until they end.

        The process group of gloo is not destroyed. One of its threads may still free the tensor of the last collective,
        for which it needs the GIL, which the main thread would hold while it joins the thread. `skip_shutdown` ends the
        process instead.
        """
        if dist.is_initialized():
            dist.barrier()
            if dist.get_backend() == "nccl":
                dist.destroy_process_group()


def init_processes(
    device: str | None, dtype: str | None, deterministic: bool = False, timeout_minutes: float = 30
) -> Processes:
    """Join the process group that `torchrun` starts, if any: nccl on GPUs, gloo elsewhere.

    `timeout_minutes` is the time that collective operations wait for other processes.
    """
    if deterministic:
        import torch._inductor.config as inductor_config

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by use_deterministic_algorithms
        torch.use_deterministic_algorithms(True)
        inductor_config.deterministic = True  # choose kernels without timing them
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        atexit.register(skip_shutdown)  # first, so that it is called last
        stop_with_launcher()
    if world_size > 1 and (device or "").startswith("cuda:"):
        raise UserError(f"--device {device} gives all processes the same GPU: use --device cuda")
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    elif found.type == "cpu":
        tune_malloc()
    if world_size > 1:
        if rank == 0:
            warn_if_restarts_fail()
        store = rendezvous(rank, world_size)
        backend, device_id = ("nccl", found) if found.type == "cuda" else ("gloo", None)
        options = {"timeout": timedelta(minutes=timeout_minutes), "device_id": device_id}
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, **options)
    return Processes(rank, world_size, found, find_dtype(dtype, found))


def rendezvous(rank: int, world_size: int) -> dist.Store:
    """Wait until all processes have started; return their shared key-value store.

    Raises `UserError` after `START_TIMEOUT`. The process group by itself would wait for half an hour.
    """
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # After a restart, torchrun passes the store that still has the addresses of the dead processes (pytorch
            # issue 135712). A prefix hides them. On several machines, counts can differ: see `warn_if_restarts_fail`.
            store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        store.set(f"started_{rank}", "")
        store.wait([f"started_{other}" for other in range(world_size)], START_TIMEOUT)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {world_size} processes did not find each other at {address} (they wait for"
            f" {START_TIMEOUT.total_seconds():g} seconds): {str(error).splitlines()[0]}"
        ) from None
    return store


def n_machines() -> int:
    """Return the number of machines, each with its torchrun."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def warn_if_restarts_fail() -> None:
    """Warn if the processes of several machines could not meet again after torchrun has restarted them."""
    if n_machines() > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        print(
            "warning: with several machines, restarts work only if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set for"
            " torchrun on each of them",
            file=sys.stderr,
        )


def restarts_on_failure() -> bool:
    """Return whether torchrun would start this process again if it failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def seconds_since_launch() -> float:
    """Return the seconds since torchrun started, including restarts; without torchrun, since this process started.

    Without Linux's /proc, return 0.
    """
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks = int(fields[19])  # starttime in man 5 proc, counted from the start of the machine
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def stop_with_launcher() -> None:
    """Let Linux send a signal to this process when torchrun ends, also by `kill -9`, so that no process is orphaned.

    SIGTERM stops the run. With restarts and several machines it is SIGKILL: for the torchruns of the other machines,
    this is a failure, and they start the run again.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    launcher = os.getppid()
    if prctl is not None and launcher != 1:
        others_restart = restarts_on_failure() and n_machines() > 1
        prctl(1, signal.SIGKILL if others_restart else signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it ended before the call
            raise UserError("torchrun has ended")


def find_device(device: str | None) -> torch.device:
    """Return the named device, or the best one available. Under torchrun each process gets its own GPU.

    Raises `UserError` if the machine does not have the device.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    unavailable = f"--device {name}: this machine has no such device; use cuda, mps or cpu, or omit the flag"
    try:
        found = torch.device(name)
    except RuntimeError:
        raise UserError(unavailable) from None
    n_gpus = torch.cuda.device_count()
    available = {"cuda": (found.index or 0) < n_gpus, "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(found.type, False):
        raise UserError(unavailable)
    if found.type == "cuda" and found.index is None:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= n_gpus:
            raise UserError(f"there are more processes than GPUs: start torchrun with --nproc_per_node={n_gpus}")
        found = torch.device("cuda", local_rank)
    return found


def find_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the named precision; None is the fastest that the device supports in hardware.

    That is bfloat16 on GPUs since 2020, float16 on older ones from compute capability 7.0 (V100, T4), else float32.
    """
    if dtype is not None:
        return getattr(torch, dtype)
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return torch.float16
    return torch.float32


def can_compile() -> bool:
    """Return whether torch.compile works on this machine's GPU: Triton needs compute capability 7.0 (V100, T4)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)


def tune_malloc() -> None:
    """Let glibc keep freed memory for reuse.

    On a CPU each step frees and allocates the same tensors; new pages from the kernel took 14 % of the demo's step.
    Without glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        for parameter, value in {-3: 2**25, -1: 2**31 - 1, -2: 2**26}.items():
            mallopt(parameter, value)
