"""A run's folder, `runs/NAME`: it goes on where it stopped, stays one and the same run, and its log tells how."""

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import checkpoint
from cli import Progress, UserError, check, harmless
from data import Dataset
from files import lock, publish
from loggers import open_logger
from model import GPT
from training import Processes

# Dense bf16 matrix products per second as the makers' data sheets give them, by a part of the GPU's name.
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
}


def peak_flops(procs: Processes) -> tuple[float, str]:
    """The operations per second that 100 % MFU means here, and whose word that is: a data sheet's or a measurement's.

    Measured is a square matrix product in the training precision, the best of several.
    """
    if procs.device.type == "cuda" and procs.dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(procs.device)
        for part, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{part}\b", name):
                return flops, f"{name}, data sheet"
    n = 8192 if procs.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=procs.device, dtype=procs.dtype)
    return 2 * n**3 / procs.fastest(lambda: torch.mm(a, a)), f"{procs.device.type}, measured"


# How a run is computed and kept, as against what it computes: these flags may change when it is resumed.
HOW = {
    *("data", "run", "micro_batch_size", "val_every", "save_every", "keep", "max_minutes", "log"),
    *("device", "dtype", "compile", "deterministic", "dry_run", "gpu_dollars_per_hour"),
    *("hellaswag_every", "hellaswag_files", "sample_every", "sample_prompts"),
}
STOPPED = 75  # exit code: stopped on request and saved, to go on later (EX_TEMPFAIL of sysexits.h)
MAX_SKIPPED = 5  # steps in a row whose loss or gradient is not finite, after which going on is pointless


class Run:
    """A run's folder: its checkpoints, its log, and the promise that what goes on in it is one and the same run.

    Args:
        config: the script's flags; all but `HOW` define the run, together with the data.
        data: what it is trained on.
        procs: who trains.
        history: the trainings of the model that it starts from; see `Loaded`.

    Raises:
        UserError: the folder holds another run, or something else.
    """

    def __init__(self, config: Any, data: Dataset, procs: Processes, history: Sequence[dict] = ()):
        self.folder, self.config, self.procs = checkpoint.run_folder(config.run), config, procs
        self.history, self.source = list(history), data.meta.get("source", {})
        self.tokenizer, self.log_file = data.tokenizer.name, self.folder / "log.jsonl"
        self.identity = {name: value for name, value in asdict(config).items() if name not in HOW}
        self.identity["data"] = data.fingerprint
        known = checkpoint.checkpoints(self.folder) or not self.folder.exists()
        ours = known or all(_is_ours(item) for item in self.folder.iterdir())
        check(ours, f"{self.folder} already holds something else: choose another --run")
        if procs.is_main:
            self.lock = lock(self.folder)
        self.newest = checkpoint.newest_whole(self.folder, tell=procs.is_main)
        self.stop_reason, self.started, self.signalled = "", time.monotonic(), 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self.held: dict = {}  # the flags of the newest checkpoint
        if self.newest is not None:
            meta = checkpoint.read_meta(self.newest)
            self._check_same(meta.get("identity", {}), self.identity)
            self.held = meta.get("config", {})
            self.history = meta.get("history", [])

    def _check_same(self, held: dict, now: dict) -> None:
        check(
            ("init" in held) == ("init" in now),
            f"{self.folder} is a run of the other training script: choose another --run",
        )
        names = [name for name in {**held, **now} if held.get(name) != now.get(name)]
        changes = ", ".join(f"{name} was {held.get(name)} and is now {now.get(name)}" for name in names)
        check(
            not names,
            f"{self.folder} holds a run that is not this one: {changes}; use the old values to go on with"
            " it, or another --run to start anew",
        )

    def resume(self, model: GPT, optimizer: torch.optim.Optimizer) -> int:
        """Take up the newest checkpoint, if there is one; returns the number of steps done, 0 at the beginning.

        Raises `UserError` where the checkpoint is damaged or of another shape, or not the same for all processes.
        """
        step = None
        if self.newest is not None:
            meta = checkpoint.read_meta(self.newest)
            self._check_same(meta["model"], asdict(model.config))
            model.load_state_dict(checkpoint.load_tensors(self.newest, "model", meta))
            checkpoint.load_optimizer_state(self.newest, meta, model, optimizer)
            step = meta["step"]
        check(
            self.procs.agree(-1 if step is None else step),
            f"the processes see different checkpoints in {self.folder}: it must be one folder for all machines",
        )
        if self.procs.is_main:
            found = checkpoint.checkpoints(self.folder)
            for folder in found[found.index(self.newest) + 1 :] if self.newest else []:
                checkpoint.discard(folder)  # damaged, and in the way of those to come
            self._cut_log(-1 if step is None else step)
        return step or 0

    def _cut_log(self, step: int) -> None:
        """Drop the log's rows after a step: they will come again."""
        if not self.log_file.exists():
            return
        rows = [line for line in self.log_file.read_text().splitlines() if _step_of(line) <= step]
        temporary = self.log_file.with_suffix(".tmp")
        temporary.write_text("".join(row + "\n" for row in rows))
        publish(temporary, self.log_file)

    def save(self, step: int, model: GPT, optimizer: torch.optim.Optimizer, metrics: dict) -> None:
        """Write the checkpoint of a step, and delete those that need not stay."""
        if self.procs.is_main:
            meta = {
                "step": step,
                "tokenizer": self.tokenizer,
                "metrics": metrics,
                "identity": self.identity,
                "config": asdict(self.config),
                "source": self.source,
                "history": self.history,
            }
            folder = self.folder / f"step_{step:06d}"
            checkpoint.save(folder, model, checkpoint.optimizer_state(model, optimizer), meta)
            checkpoint.retain(self.folder, self.config.keep)
        if self.procs.world_size > 1:
            dist.barrier()

    def _on_signal(self, number: int, frame: Any) -> None:
        # torchrun passes on a Ctrl-C that all processes have had from the terminal: within a second it is the same one.
        if number == signal.SIGINT and self.signalled and time.monotonic() - self.signalled > 1:
            os._exit(130)
        if not self.signalled and self.procs.is_main:
            os.write(2, b"\nstopping when this step is done\n")  # print() must not be interrupted by itself
        self.stop_reason = self.stop_reason or signal.Signals(number).name
        self.signalled = self.signalled or time.monotonic()

    def stop_requested(self) -> bool:
        """Whether a signal or --max_minutes asks for an end, of any process: then all stop after the same step."""
        limit = self.config.max_minutes
        if limit is not None and time.monotonic() - self.started > 60 * limit:
            self.stop_reason = self.stop_reason or f"--max_minutes {limit:g}"
        asked = torch.tensor(int(bool(self.stop_reason)), device=self.procs.device)
        return bool(self.procs.sum(asked))

    def stop(self, step: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Save what is not saved yet, and end the process with exit code 75, for the launcher to see."""
        if step > 0 and not (self.folder / f"step_{step:06d}").exists():
            self.save(step, model, optimizer, {})
        if self.procs.is_main:
            reason = self.stop_reason or "another process"
            print(f"stopped by {reason} after step {step:,}, which is saved; the same command goes on", flush=True)
        self.procs.close()
        sys.exit(STOPPED)


def _is_ours(item: Path) -> bool:
    return item.name in ("log.jsonl", "log.tmp", ".lock", "tensorboard", "wandb") or item.name.startswith("step_")


def _step_of(line: str) -> float:
    """The step of a log row; one that a crash cut short counts as after all others."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """What a run tells: rows in log.jsonl and to whom --log names, and a progress bar or lines on the screen.

    MFU is the share of the machine's peak that the model's own arithmetic takes ("PaLM", Chowdhery et al., 2022).

    Args:
        run: the run that tells.
        model: its model, for the arithmetic.
        step, steps: how many are done and how many there will be.
        batch_tokens: tokens in a step, over all processes.
    """

    def __init__(self, run: Run, model: GPT, step: int, steps: int, batch_tokens: int):
        self.run, self.file, self.procs, self.batch_tokens = run, run.log_file, run.procs, batch_tokens
        self.skipped = 0  # steps in a row
        flops, source = peak_flops(self.procs)
        self.peak_tokens_per_s = flops * self.procs.world_size / model.flops_per_token()
        self.progress = Progress(steps, "step", initial=step, enabled=self.procs.is_main)
        self.progress.print(f"limit      {flops / 1e12:,.2f} TFLOP/s for each process is 100 % MFU ({source})")
        names = dict.fromkeys(run.config.log) if self.procs.is_main else ()
        self.loggers = [open_logger(name, run.folder, run.config, step) for name in names]
        for logger in self.loggers:
            self.progress.print(f"log        {logger.hint}")

    def step(self, step: int, metrics: dict[str, Tensor], lr: float, started: float) -> None:
        """Tell of a training step that began when `time.perf_counter()` was `started`."""
        loss, grad_norm = metrics["loss"].item(), metrics["grad_norm"].item()  # waits for the device
        rate = self.batch_tokens / (time.perf_counter() - started)
        mfu = rate / self.peak_tokens_per_s
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        row = {"step": step, "tokens": step * self.batch_tokens, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        row |= {"tokens_per_s": round(rate, 1), "mfu": round(mfu, 4)}
        self.write(row if finite else row | {"loss": None, "grad_norm": None, "skipped": True})  # JSON has no NaN
        self.progress.update(1, f"loss {loss:.4f}  {rate:,.0f} tok/s  MFU {mfu:.1%}  lr {lr:.2e}  norm {grad_norm:.2f}")
        self.skipped = 0 if finite else self.skipped + 1
        if not finite:
            self.progress.print(
                f"step {step:,} skipped: loss {loss}, gradient norm {grad_norm}; the weights are unchanged"
            )
        if self.skipped == MAX_SKIPPED:
            good = (checkpoint.checkpoints(self.run.folder) or ["none"])[-1]
            raise UserError(
                f"loss or gradient was not finite {MAX_SKIPPED} times in a row, up to step {step:,}; the last good"
                f" checkpoint is {good}: lower --lr or look at the data, and start another --run"
            )

    def validation(self, step: int, val_loss: float) -> None:
        """Tell of a validation after so many steps."""
        self.write({"step": step, "tokens": step * self.batch_tokens, "val_loss": val_loss})
        self.progress.print(f"step {step:,}: validation loss {val_loss:.4f}")

    def hellaswag(self, step: int, figures: dict[str, float]) -> None:
        """Tell of the accuracy on HellaSwag after so many steps."""
        self.write({"step": step, "tokens": step * self.batch_tokens} | figures)
        whole, per_token = figures["hellaswag"], figures["hellaswag_norm"]
        self.progress.print(f"step {step:,}: HellaSwag {whole:.2%}, per token {per_token:.2%}")

    def samples(self, step: int, samples: list[dict]) -> None:
        """Tell how the model goes on from some texts: {"prompt", "text"} each."""
        self.write({"step": step, "tokens": step * self.batch_tokens, "samples": samples})
        for sample in samples:
            self.progress.print(f"step {step:,}: {harmless(sample['prompt'] + sample['text'])}")

    def write(self, row: dict) -> None:
        """Append one row to log.jsonl, and send it on."""
        if self.procs.is_main:
            with open(self.file, "a") as file:
                file.write(json.dumps(row) + "\n")
            for logger in self.loggers:
                logger.write(row)

    def close(self) -> None:
        """Leave the screen to others."""
        self.progress.close()
