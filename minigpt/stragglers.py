"""Stragglers: processes whose GPU, machine or storage is slower than the others', which all wait for them."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from minigpt.distributed import Processes
from model import GPT

CHECK_EVERY = 10  # steps
TOLERANCE = 1.2  # ratio of the times of the slowest and the fastest process


class StragglerDetector:
    """Compares the processes by the time that each spends on a step without waiting for another one.

    These are the wait for data and the forward passes. DDP communicates in the backward pass only. A sharded model also
    communicates in the forward pass, so a slow GPU is not found there.

    Args:
        model: the model, before DDP.
        procs: the processes that train it.
    """

    def __init__(self, model: GPT, procs: Processes):
        self.model, self.procs = model, procs
        self.data_seconds, self.times = 0.0, []
        if procs.world_size > 1:
            model.register_forward_pre_hook(self._record)
            model.register_forward_hook(self._record)

    def time_data(self, batches: Iterator) -> Iterator:
        """Yield the same items, and measure the wait for each."""
        started = time.perf_counter()
        for batch in batches:
            self.data_seconds += time.perf_counter() - started
            yield batch
            started = time.perf_counter()

    def _record(self, *_: Any) -> None:
        """Record the time at which the device starts or completes a forward pass."""
        if not self.model.training:
            return
        if self.procs.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())

    def check(self, step: int) -> dict[str, float]:
        """Compare the times of the last step, if it is due; all processes must call this after each step.

        Returns {} if they differ by less than 20 %, else:
            slowest_process: its rank.
            slowest_s: its seconds for data and forward passes.
            slowest_data_s: its seconds for data.
            fastest_s: the seconds of the fastest process.
        """
        data_seconds, self.data_seconds = self.data_seconds, 0.0
        times, self.times = self.times, []
        if self.procs.world_size == 1 or step % CHECK_EVERY:
            return {}
        passes = zip(times[::2], times[1::2], strict=True)
        forward = sum(a.elapsed_time(b) / 1e3 if self.procs.device.type == "cuda" else b - a for a, b in passes)
        all_seconds = self.procs.all_gather((data_seconds + forward, data_seconds))
        slowest = max(range(len(all_seconds)), key=all_seconds.__getitem__)
        (slowest_s, slowest_data_s), (fastest_s, _) = all_seconds[slowest], min(all_seconds)
        if slowest_s < TOLERANCE * fastest_s:
            return {}
        row = {"slowest_s": slowest_s, "slowest_data_s": slowest_data_s, "fastest_s": fastest_s}
        return {"slowest_process": slowest} | {name: round(seconds, 5) for name, seconds in row.items()}
