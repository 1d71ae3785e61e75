"""The metrics of a run: `log.jsonl`, the progress line, MFU, TensorBoard and Weights & Biases."""

import atexit
import importlib.util
import json
import math
import re
import secrets
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.cli import Progress, UserError, strip_control_chars
from minigpt.distributed import Processes
from minigpt.files import append_line, write_file
from minigpt.run import Run
from minigpt.runs import list_checkpoints, read_log
from minigpt.stragglers import StragglerDetector
from model import GPT

# Peak of dense bf16 or float16 matrix products in FLOP/s, from the data sheets, by a part of the GPU's name.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
MAX_SKIPPED_STEPS = 5  # consecutive steps with a non-finite loss or gradient, after which a run stops


class MetricsLogger:
    """Writes each step to log.jsonl, to the trackers of --report_to and to the screen.

    MFU (model FLOPs utilisation) is the fraction of the hardware's peak that the model's own arithmetic uses ("PaLM",
    Chowdhery et al., 2022).

    Args:
        run: the run that is logged.
        model: its model.
        step, steps: completed steps, and steps of the whole run.
        batch_tokens: tokens per step over all processes.
        val_bytes_per_token: mean number of bytes of a validation target.
    """

    def __init__(self, run: Run, model: GPT, step: int, steps: int, batch_tokens: int, val_bytes_per_token: float):
        self.run, self.procs, self.batch_tokens = run, run.procs, batch_tokens
        self.val_bytes_per_token, self.on_cpu = val_bytes_per_token, self.procs.device.type == "cpu"
        self.checked_duration = False
        self.stragglers = StragglerDetector(model, self.procs)
        self.n_slow: Counter[int] = Counter()  # how often each process was the slowest
        self.skipped_steps = 0  # consecutive
        flops, source = peak_flops(self.procs)
        self.peak_tokens_per_s = flops * self.procs.world_size / model.flops_per_token()
        self.progress = Progress(steps, "step", initial=step, enabled=self.procs.is_main)
        if not self.on_cpu:
            self.progress.print(f"peak       100 % MFU is {flops / 1e12:,.2f} TFLOP/s per process ({source})")
        names = dict.fromkeys(run.config.report_to) if self.procs.is_main else ()
        self.trackers = [open_tracker(name, run.folder, run.config, step) for name in names]
        for tracker in self.trackers:
            self.progress.print(f"log        {tracker.hint}")

    def log_step(self, step: int, metrics: dict[str, Tensor], lr: float, started: float) -> None:
        """Log one training step; `started` is its start time by `time.perf_counter()`.

        Raises `UserError` after `MAX_SKIPPED_STEPS` consecutive steps with a non-finite loss or gradient. In float16, a
        gradient that overflows does not count, unless the loss scale is below 1.
        """
        loss, grad_norm = metrics["loss"].item(), metrics["grad_norm"].item()  # waits for the device
        tokens_per_s = self.batch_tokens / (time.perf_counter() - started)
        mfu = tokens_per_s / self.peak_tokens_per_s
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        loss_scale = metrics["loss_scale"].item() if "loss_scale" in metrics else None
        row = {"loss": loss, "grad_norm": grad_norm, "lr": lr}
        row |= {"tokens_per_s": round(tokens_per_s, 1), "mfu": round(mfu, 4)}
        if loss_scale is not None:
            row["loss_scale"] = loss_scale
        if not finite:
            row |= {"loss": None, "grad_norm": None, "skipped": True}  # JSON has no NaN
        straggler = self.stragglers.end_step()
        self._write(step, row | straggler)
        if straggler:
            self._warn_of_straggler(straggler)
        speed = f"{tokens_per_s:,.0f} tok/s" + ("" if self.on_cpu else f"  MFU {mfu:.1%}")
        self.progress.update(1, f"loss {loss:.4f}  {speed}  lr {lr:.2e}  norm {grad_norm:.2f}")
        if finite:
            self.skipped_steps = 0
        elif math.isfinite(loss) and (loss_scale or 0) >= 1:
            self.skipped_steps = 0
            self.progress.print(
                f"step {step:,} skipped: gradients overflow float16; the loss scale is now {loss_scale:g}"
            )
        else:
            self.skipped_steps += 1
            self.progress.print(
                f"step {step:,} skipped: loss {loss}, gradient norm {grad_norm}; the weights are unchanged"
            )
        if self.skipped_steps == MAX_SKIPPED_STEPS:
            self.run.finish_saving()
            newest = (list_checkpoints(self.run.folder) or ["none"])[-1]
            raise UserError(
                f"loss or gradient was not finite in {MAX_SKIPPED_STEPS} consecutive steps, up to step {step:,}; the"
                f" last good checkpoint is {newest}: lower --lr or check the data, and start again with another --out"
            )

    def _warn_of_straggler(self, straggler: dict[str, float]) -> None:
        """Print a warning when a process is the slowest for the third time."""
        rank = straggler["slowest_process"]
        self.n_slow[rank] += 1
        if self.n_slow[rank] == 3:
            self.progress.print(
                f"warning: process {rank} takes {straggler['slowest_s']:.3g} s per step for data and forward passes,"
                f" the fastest process {straggler['fastest_s']:.3g} s; see slowest_process in log.jsonl",
                file=sys.stderr,
            )

    def log_micro_batch(self, done: int, total: int) -> None:
        """Show how much of a step is done, and warn once if the run will take more than a day.

        For CPUs, on which a step can take an hour; a GPU has not finished a micro-batch when its call returns.
        """
        if not self.on_cpu:
            return
        self.progress.update_fraction(done / total, f"micro-batch {done}/{total}")
        if not self.checked_duration and done >= min(3, total):
            self.checked_duration = True
            days = self.progress.seconds_left() / 86_400
            if days > 1:
                self.progress.print(
                    f"warning: this run will take about {days:.1f} days on this CPU: choose a smaller model, lower"
                    " --steps or --batch_tokens, or use a GPU",
                    file=sys.stderr,
                )

    def log_val_batch(self, n: int) -> None:
        """Show that `n` batches of a validation are done, on a CPU."""
        if self.on_cpu:
            self.progress.update_fraction(0.0, f"validation batch {n}")

    def log_validation(self, step: int, val_loss: float) -> dict[str, float]:
        """Log a validation loss; return it with its bits per byte, which are comparable between tokenizers."""
        bits_per_byte = val_loss / math.log(2) / self.val_bytes_per_token
        values = {"val_loss": val_loss, "bits_per_byte": bits_per_byte}
        self._write(step, values, f"validation loss {val_loss:.4f} nats per token, {bits_per_byte:.2f} bits per byte")
        if self.progress.done == self.progress.initial:
            self.progress.restart_clock()  # the time left is that of the steps
        return values

    def log_hellaswag(self, step: int, accuracies: dict[str, float]) -> None:
        """Log the result of `evaluate_hellaswag`."""
        per_ending, per_token = accuracies["hellaswag"], accuracies["hellaswag_norm"]
        self._write(step, accuracies, f"HellaSwag {per_ending:.2%}, normalised by tokens {per_token:.2%}")

    def log_samples(self, step: int, samples: list[dict]) -> None:
        """Log sampled texts: {"prompt", "text"} each."""
        self._write(step, {"samples": samples}, *(strip_control_chars(s["prompt"] + s["text"]) for s in samples))

    def _write(self, step: int, values: dict, *lines: str) -> None:
        """Append a row to log.jsonl, send it to the trackers, and print lines."""
        if self.procs.is_main:
            row = {"step": step, "tokens": step * self.batch_tokens} | values
            append_line(self.run.log_file, json.dumps(row))
            for tracker in self.trackers:
                tracker.log(row)
        for line in lines:
            self.progress.print(f"step {step:,}: {line}")

    def close(self) -> None:
        """Close the progress bar."""
        self.progress.close()


def peak_flops(procs: Processes) -> tuple[float, str]:
    """Return the FLOP/s per process that are 100 % MFU, and their source: a data sheet or a measurement.

    The measurement is the fastest of several square matrix products in the training precision.
    """
    if procs.device.type == "cuda" and procs.dtype != torch.float32:
        name = torch.cuda.get_device_name(procs.device)
        for part, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return flops, f"{name}, data sheet"
    n = 8192 if procs.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=procs.device, dtype=procs.dtype)
    return 2 * n**3 / min_seconds(lambda: torch.mm(a, a), procs), f"{procs.device.type}, measured"


def min_seconds(work: Callable[[], Any], procs: Processes) -> float:
    """Return the shortest time in seconds that `work` takes on the device."""

    def time_once() -> float:
        procs.synchronize()
        started = time.perf_counter()
        work()
        procs.synchronize()
        return time.perf_counter() - started

    return min(time_once() for _ in range(8))


def check_report_to(names: tuple[str, ...]) -> None:
    """Raise `UserError` if a library of --report_to is not installed, or Weights & Biases has no login."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--report_to {name} is not installed: pip install -r requirements-extra.txt")
    if "wandb" in names:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("--report_to wandb: not logged in: run `wandb login` first, or set WANDB_MODE=offline")


def open_tracker(name: str, folder: Path, config: Any, step: int) -> Any:
    """Return the named tracker for the run in `folder`, whose log.jsonl ends at `step`; `log(row)` adds a row to it."""
    return {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}[name](folder, config, step)


class TensorBoardTracker:
    """Event files in the run folder.

    A crash loses up to two minutes of events and leaves steps that will be logged again. So a resumed run writes all
    events again from log.jsonl; `purge_step=0` makes a running TensorBoard discard the old ones.
    """

    def __init__(self, folder: Path, config: Any, step: int):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=0)
        atexit.register(self.writer.close)
        self.writer.add_text("config", to_markdown([asdict(config)]), 0)
        for row in read_log(folder):
            self.log(row)
        self.hint = f"tensorboard --logdir {folder.parent}"

    def log(self, row: dict) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "tokens"):
                self.writer.add_scalar(name, value, row["step"], new_style=False)
            elif isinstance(value, (str, list)):
                self.writer.add_text(name, to_markdown(value), row["step"])


def to_markdown(value: str | list[dict]) -> str:
    """Return Markdown that shows text literally, as an indented block."""
    if isinstance(value, str):
        return textwrap.indent(value, "    ")
    return "\n\n---\n\n".join(
        "\n\n".join(f"**{key}**\n\n{textwrap.indent(str(text), '    ')}" for key, text in record.items())
        for record in value
    )


class WandbTracker:
    """A Weights & Biases run, which keeps its id when the run is resumed.

    It accepts each step once; steps that are logged again after a crash have the same values. Offline, `kill -9` loses
    the last 15 seconds, which wandb has not written yet. WANDB_MODE, WANDB_PROJECT and so on are wandb's own.
    """

    def __init__(self, folder: Path, config: Any, step: int):
        import wandb

        id_file = folder / "wandb" / "run_id"
        resumed = step > 0 and id_file.exists()
        run_id = id_file.read_text() if resumed else secrets.token_hex(4)
        id_file.parent.mkdir(exist_ok=True)
        online = wandb.setup().settings.mode == "online"
        settings = wandb.Settings(silent=not online, quiet=True, console="off")
        options = {"name": folder.name, "config": asdict(config), "dir": folder}
        try:
            self.run = wandb.init(id=run_id, resume="allow", settings=settings, **options)
        except wandb.Error as error:
            raise UserError(f"--report_to wandb: {error}; WANDB_MODE=offline needs no network") from None
        self.table = wandb.Table
        write_file(id_file, run_id)
        first = math.inf if resumed and self.run.offline else self.run.step  # online, the server returns its last step
        for row in read_log(folder):
            if row["step"] >= first:
                self.log(row)
        sync = f"wandb sync {folder}/wandb/offline-run-*"
        self.hint = sync if self.run.offline else self.run.url or "wandb is disabled"

    def log(self, row: dict) -> None:
        values = {name: value for name, value in row.items() if value is not None and name != "step"}
        for name, value in values.items():
            if isinstance(value, list):
                columns = list(value[0])
                values[name] = self.table(columns=columns, data=[[record[key] for key in columns] for record in value])
        self.run.log(values, step=row["step"])
