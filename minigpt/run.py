"""A run folder: its lock, its identity, resuming, signals and saving."""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt import checkpoint, runs
from minigpt.cli import UserError
from minigpt.dataset import Dataset
from minigpt.distributed import Processes, restarts_on_failure, seconds_since_launch
from minigpt.files import lock_folder, write_file
from minigpt.optim import Schedule
from model import GPT, GPTConfig

EXIT_STOPPED = 75  # exit code: stopped on request and saved, run again to resume (EX_TEMPFAIL of sysexits.h)
STOPPED_FILE = "stopped"  # in a run folder: the same, for job scripts, as torchrun does not pass on the exit code
STEPS_FLAGS = ("steps", "epochs", "decay_fraction")  # may change until the decay starts
# The files and folders in a run folder besides the checkpoints.
RUN_FILES = ("log.jsonl", "log.jsonl.tmp", ".lock", ".shared", STOPPED_FILE, "tensorboard", "wandb")


class Run:
    """A run folder. A run that is resumed continues the same training.

    Args:
        config: the script's flags. Together with the data they define the run, except those declared `resumable`.
        data: the training data.
        procs: the processes that train.
        schedule: the learning rate of each step, for a new run.
        history: earlier training runs of the initial model, see `PretrainedModel`.
        newest_checkpoint: the checkpoint to resume from, if it is already verified.

    Attributes:
        newest_checkpoint: the checkpoint to resume from; None for a new run.
        schedule: the learning rate of each step; a resumed run continues its warmup.
        saved_flags: the flags in that checkpoint; {} for a new run.

    Raises:
        UserError: the folder holds another run, or other files.
    """

    def __init__(
        self,
        config: Any,
        data: Dataset,
        procs: Processes,
        schedule: Schedule,
        history: Sequence[dict] = (),
        newest_checkpoint: Path | None = None,
    ):
        self.folder, self.config, self.procs, self.schedule = Path(config.out), config, procs, schedule
        self.history, self.source = list(history), data.meta.get("source", {})
        self.tokenizer, self.log_file = data.tokenizer, self.folder / "log.jsonl"
        self.identity = {
            field.name: getattr(config, field.name) for field in fields(config) if "resumable" not in field.metadata
        }
        self.identity["data"] = data.fingerprint
        flags = asdict(config) | {"out": None, "data": data.fingerprint}  # paths may differ between machines
        first, *others = procs.all_gather(flags)
        for rank, other in enumerate(others, 1):
            for name in (name for name in flags if other[name] != first[name]):
                raise UserError(
                    f"{name} differs between the processes: it is {first[name]} on process 0 and {other[name]} on"
                    f" process {rank}; start all with the same flags and data"
                )
        self.newest_checkpoint = procs.call_on_main(self._lock_and_find_newest, newest_checkpoint)
        self._check_shared_folder()
        self.stop_reason, self.signal_time = "", 0.0
        self.started = time.monotonic() - seconds_since_launch()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        self.saved_flags: dict = {}
        if self.newest_checkpoint is not None:
            meta = runs.read_meta(self.newest_checkpoint)
            self._check_identity(meta)
            self.saved_flags, self.history = meta["config"], meta["history"]
        self.schedule.check()
        self.saved_step = 0
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.pending_save: Future[None] | None = None  # on the main process

    def _lock_and_find_newest(self, verified: Path | None) -> Path | None:
        """Lock the folder and return its newest checkpoint, without comparing the checksums of `verified` again."""
        names = [item.name for item in self.folder.iterdir()] if self.folder.exists() else []
        is_new = all(name in RUN_FILES or name.startswith("step_") for name in names)
        if not (is_new or runs.list_checkpoints(self.folder)):
            raise UserError(f"{self.folder} already exists and is not a run: choose another --out")
        lock_folder(self.folder)
        (self.folder / STOPPED_FILE).unlink(missing_ok=True)
        if verified is not None and runs.list_steps(self.folder)[-1:] == [verified]:
            return verified
        return runs.find_newest(self.folder)

    def _check_shared_folder(self) -> None:
        """Raise `UserError` if the machines do not share the run folder."""
        if self.procs.world_size == 1:
            return
        marker = self.folder / ".shared"

        def write() -> str:
            text = os.urandom(16).hex()
            write_file(marker, text)
            return text

        text, found = self.procs.call_on_main(write), ""
        with contextlib.suppress(OSError):
            found = marker.read_text()
        others = [str(rank) for rank, same in enumerate(self.procs.all_gather(found == text)) if not same]
        if self.procs.is_main:
            marker.unlink()
        if others:
            raise UserError(
                f"--out {self.folder.absolute()} is not the same folder on process {', '.join(others)} as on process"
                " 0: give a folder that all machines share"
            )

    def _check_identity(self, meta: dict) -> None:
        """Raise `UserError` if the run of a checkpoint differs from this one, and continue its warmup.

        The number of steps may differ while the step is before the decay of both schedules: the learning rates so far
        are equal.
        """
        if meta.get("schedule") is None:
            raise UserError(f"{self.folder} was written by an earlier version: resume it with the code that wrote it")
        step, saved = meta["step"], Schedule(*(meta["schedule"][field.name] for field in fields(Schedule)))
        if not 0 <= saved.decay_fraction <= 1:
            raise UserError(f"{self.newest_checkpoint}/meta.json is corrupt: decay_fraction is {saved.decay_fraction}")
        warmup_steps = self.schedule.warmup_steps if self.config.warmup_steps is not None else saved.warmup_steps
        before = meta["identity"] | {"warmup_steps": saved.warmup_steps}
        now = self.identity | {"warmup_steps": warmup_steps}
        steps_flags = {name: before.get(name) for name in STEPS_FLAGS if name in now}
        hint = ""
        if step <= min(saved.decay_start, self.schedule.decay_start):
            now |= steps_flags
        elif saved.name == "wsd" and before == now | steps_flags:  # nothing else has changed
            least = math.ceil(step / (1 - min(self.schedule.decay_fraction, 0.99)))
            hint = f"; the decay would start before step {step:,}: give at least {least:,} steps"
            if step > saved.decay_start:
                hint = (
                    "; the number of steps can change until the decay starts: to continue from step"
                    f" {saved.decay_start:,}, copy that checkpoint into a new run folder"
                )
        self._check_same(before, now, hint)
        self.schedule = replace(self.schedule, warmup_steps=saved.warmup_steps)

    def _check_same(self, saved: dict, current: dict, hint: str = "") -> None:
        """Raise `UserError` if the saved run differs from the current one."""
        if ("init" in saved) != ("init" in current):
            raise UserError(f"{self.folder} is a run of the other training script: choose another --out")
        names = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
        if names:
            changes = ", ".join(f"{name} was {saved.get(name)} and is now {current.get(name)}" for name in names)
            raise UserError(
                f"{self.folder} holds a different run: {changes}; use the old values to resume it, or another --out to"
                f" start a new run{hint}"
            )

    def resume(self, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
        """Load the newest checkpoint, if any; return the number of completed steps, 0 for a new run.

        Raises `UserError` if the checkpoint is corrupt or of another shape.
        """
        step = None
        if self.newest_checkpoint is not None:
            meta = runs.read_meta(self.newest_checkpoint)
            saved = asdict(GPTConfig()) | meta["model"]  # a field that is newer than the checkpoint has its default
            self._check_same(saved, asdict(model.config))
            checkpoint.load_weights(self.newest_checkpoint, meta, model)
            checkpoint.load_optimizer_state_dict(self.newest_checkpoint, meta, model, optimizer, verified=True)
            self._resume_scaler(scaler, meta.get("grad_scaler"))
            step = self.saved_step = meta["step"]
        if self.procs.is_main:
            if self.newest_checkpoint is not None:
                checkpoint.set_aside(self.folder, self.newest_checkpoint)
                self._prune()  # completes a deletion that was interrupted
            self._truncate_log(-1 if step is None else step)
        return step or 0

    def _resume_scaler(self, scaler: torch.amp.GradScaler, saved: dict | None) -> None:
        """Load the saved loss scale; ignore it if the precision has changed."""
        if saved is not None and scaler.is_enabled():
            if not 0 < saved["scale"] < 2**127:
                raise UserError(f"{self.newest_checkpoint}/meta.json is corrupt: the loss scale is {saved['scale']}")
            scaler.load_state_dict(scaler.state_dict() | {name: saved[name] for name in ("scale", "_growth_tracker")})

    def _truncate_log(self, step: int) -> None:
        """Drop the log rows after a step, which will be logged again."""
        if self.log_file.exists():
            rows = (row for row in runs.read_log(self.folder) if row["step"] <= step)
            write_file(self.log_file, (json.dumps(row).encode() + b"\n" for row in rows))

    def save(
        self, step: int, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, metrics: dict
    ) -> None:
        """Copy the weights and optimiser state, and write the step's checkpoint in the background.

        Wait for the previous checkpoint first. Raises `UserError` if writing it failed.
        """
        self.finish_saving()
        self.saved_step = step
        weights = checkpoint.copy_to_main(model.state_dict(), self.procs)  # first: it reshards the parameters
        train_state = checkpoint.copy_to_main(checkpoint.optimizer_state_dict(model, optimizer), self.procs)
        if self.procs.is_main:
            meta = {
                "step": step,
                "metrics": metrics,
                "identity": self.identity,
                "config": asdict(self.config),
                "schedule": asdict(self.schedule),
                "grad_scaler": scaler.state_dict() or None,  # None unless it is enabled
                "source": self.source,
                "history": self.history,
            }
            self.pending_save = self.writer.submit(self._write_and_prune, model.config, weights, train_state, meta)

    def _write_and_prune(
        self, config: GPTConfig, weights: dict[str, Tensor], train_state: dict[str, Tensor], meta: dict
    ) -> None:
        """Write a checkpoint, then delete old ones."""
        folder = self.folder / f"step_{meta['step']:06d}"
        checkpoint.save(folder, config, weights, self.tokenizer, train_state, meta)
        self._prune()

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is written. All processes must call this; all raise its `UserError`."""
        self.procs.call_on_main(lambda: self.pending_save and self.pending_save.result())

    def _prune(self) -> None:
        """Delete old checkpoints, except the last one before the decay, from which a longer run can continue."""
        before_decay = self.folder / f"step_{self.schedule.decay_start:06d}"
        checkpoint.prune(self.folder, self.config.keep, protected={before_decay})

    def stop_requested(self) -> bool:
        """Return whether any process received a signal or reached --max_minutes; then all stop after the same step.

        Raises `UserError` if writing the last checkpoint has failed.
        """
        limit = self.config.max_minutes
        if limit is not None and time.monotonic() - self.started > 60 * limit:
            self.stop_reason = self.stop_reason or f"--max_minutes {limit:g}"
        save = self.pending_save
        failed = save is not None and save.done() and save.exception() is not None
        flags = torch.tensor([bool(self.stop_reason), failed], dtype=torch.int32, device=self.procs.device)
        stop, failed = self.procs.all_reduce(flags).tolist()
        if failed:
            self.finish_saving()
        return bool(stop)

    def _on_signal(self, number: int, frame: Any) -> None:
        # Ctrl-C reaches every process, and torchrun forwards it: a signal within a second is the same Ctrl-C.
        if number == signal.SIGINT and self.signal_time and time.monotonic() - self.signal_time > 1:
            os._exit(130)
        if not self.signal_time and self.procs.is_main:
            hint = b"; press Ctrl-C again to stop now" if number == signal.SIGINT else b""
            os.write(2, b"\nstopping after this step" + hint + b"\n")  # print() is not reentrant
        self.stop_reason = self.stop_reason or signal.Signals(number).name
        self.signal_time = self.signal_time or time.monotonic()

    def save_and_exit(
        self, step: int, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """Save this step if needed, write `STOPPED_FILE` and exit.

        The exit code is 75, but 0 if torchrun would take 75 for a failure and start the run again.
        """
        if step > self.saved_step:
            self.save(step, model, optimizer, scaler, {})
        self.finish_saving()
        if self.procs.is_main:
            reason = self.stop_reason or "a signal to another process"
            write_file(self.folder / STOPPED_FILE, f"{reason} after step {step}\n")
            print(f"stopped by {reason} after step {step:,}: run the same command again to resume", flush=True)
        self.procs.close()
        sys.exit(0 if restarts_on_failure() else EXIT_STOPPED)
