"""Detection of stragglers: processes with a slower GPU, machine or storage, for which all others wait."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from minigpt.distributed import Processes
from model import GPT

COMPARE_EVERY = 10  # steps
MAX_RATIO = 1.2  # of the seconds of the slowest and the fastest process


class StragglerDetector:
    """Comparison of the processes by their seconds for data and forward passes, in which DDP does not communicate.

    A sharded model communicates in the forward pass. So there, slow storage is found, but not a slow GPU.

    Args:
        model: the model, before DDP.
        procs: the processes that train it.
    """

    def __init__(self, model: GPT, procs: Processes):
        self.model, self.procs = model, procs
        self.n_steps = 0
        self.data_seconds = self.forward_seconds = 0.0
        self.times: list = []  # start and end of each forward pass of the current step
        if procs.world_size > 1:
            model.register_forward_pre_hook(self._record_time)
            model.register_forward_hook(self._record_time)

    def time_data(self, batches: Iterator) -> Iterator:
        """Yield the same items, and measure the wait for each."""
        started = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def _record_time(self, *_: Any) -> None:
        """Record the time at which the device starts or ends a forward pass of a training step."""
        if not self.model.training:
            return
        if self.procs.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())

    def end_step(self) -> dict[str, float]:
        """Count a step whose forward passes the device has completed; all processes must call this after each step.

        Returns {}, but after every tenth step in which the processes differ by 20 % or more:
            slowest_process: its rank.
            slowest_s: its mean seconds per step for data and forward passes.
            slowest_data_s: the part of `slowest_s` for data.
            fastest_s: the same as `slowest_s` for the fastest process.
        """
        passes = zip(self.times[::2], self.times[1::2], strict=True)
        on_gpu = self.procs.device.type == "cuda"
        self.forward_seconds += sum(start.elapsed_time(end) / 1e3 if on_gpu else end - start for start, end in passes)
        self.times.clear()
        self.n_steps += 1
        if self.procs.world_size == 1 or self.n_steps % COMPARE_EVERY:
            return {}
        seconds = [(self.data_seconds + self.forward_seconds) / COMPARE_EVERY, self.data_seconds / COMPARE_EVERY]
        self.data_seconds = self.forward_seconds = 0.0
        if self.n_steps == COMPARE_EVERY:  # the first steps include compilation and reading without prefetching
            return {}
        all_seconds = self.procs.all_gather(seconds)
        (slowest_s, slowest_data_s), (fastest_s, _) = max(all_seconds), min(all_seconds)
        if slowest_s < MAX_RATIO * fastest_s:
            return {}
        row = {"slowest_s": slowest_s, "slowest_data_s": slowest_data_s, "fastest_s": fastest_s}
        rank = all_seconds.index([slowest_s, slowest_data_s])
        return {"slowest_process": rank} | {name: round(value, 5) for name, value in row.items()}
