"""Runs under runs/ and the checkpoints in them: list, choose and verify.

This module does not import torch, so that preparations start fast.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from minigpt.cli import UserError, plural
from minigpt.files import check_manifest, check_regular, has_shape, parse_int, read_json, sha256
from minigpt.sources import SOURCE

FORMAT_VERSION = 1
RUNS = Path("runs")
METRICS = {str: (float, None)}
FLAGS = {"batch_tokens": (int, None), "micro_batch_size": (int, None)}
SCHEDULE = {"name": str, "lr": float, "steps": int, "warmup_steps": int, "decay_fraction": float}
TRAINING = {"source": (SOURCE, str), "step": (int, None), "metrics": (METRICS, None), "config": (FLAGS, None)}
TRAINING |= {"schedule": (SCHEDULE, None)}
CHECKPOINT = {  # of a checkpoint's meta.json; see `has_shape`
    "step": int,
    "metrics": METRICS,
    "model": {"block_size": int, "n_embd": int},
    "tokenizer": str,
    "files": {str: str},
    "identity": dict,
    "config": FLAGS,
    "source": SOURCE,
    "history": [TRAINING],
    "schedule": (SCHEDULE, None),
    "grad_scaler": ({"scale": float, "_growth_tracker": int}, None),
}
LOG_ROW = {"step": int, "tokens": int}
LOG_ROW |= dict.fromkeys(("loss", "grad_norm", "lr", "tokens_per_s", "mfu"), (float, None))
LOG_ROW |= dict.fromkeys(("val_loss", "bits_per_byte", "hellaswag", "hellaswag_norm"), (float, None))


def find_newest_run(chat: bool) -> Path:
    """Return the run under runs/ with the newest checkpoint, or the newest chat run. Raises `UserError` if none."""
    runs = [run for run in list_runs() if is_chat_run(run) or not chat]
    if runs:
        return runs[-1]
    if chat:
        raise UserError(
            f"no chat run under runs/: finetune a model with finetune.py, or give --checkpoint; {format_runs()}"
        )
    raise UserError("no run under runs/: train a model with pretrain.py, or give --checkpoint")


def list_runs() -> list[Path]:
    """Return the runs under runs/ that have a checkpoint, the one with the newest checkpoint last."""
    newest = {run: checkpoints[-1] for run in RUNS.glob("*") if (checkpoints := list_checkpoints(run))}
    return sorted(newest, key=lambda run: (newest[run] / "meta.json").stat().st_mtime)


def is_chat_run(run: Path) -> bool:
    """Return whether finetune.py wrote a run, whose flags have --init."""
    with contextlib.suppress(UserError):
        return "init" in read_meta(list_checkpoints(run)[-1])["identity"]
    return False


def format_runs() -> str:
    """Return the list of runs under runs/, for an error message."""
    runs = ", ".join(f"{run} (chat)" if is_chat_run(run) else str(run) for run in reversed(list_runs()))
    return f"existing runs: {runs}" if runs else "there is no run under runs/: train one with pretrain.py"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return [folder for folder in list_steps(run) if (folder / "meta.json").is_file()]


def list_steps(run: Path) -> list[Path]:
    """Return what a run has at the places of checkpoints, damaged or not, oldest first."""
    found = [item for item in run.glob("step_*") if re.fullmatch("step_[0-9]{1,18}", item.name)]
    return sorted(found, key=lambda item: int(item.name[5:]))


def find_newest(run: Path) -> Path | None:
    """Return the newest checkpoint that is not corrupt, or None. A warning on stderr names corrupt ones.

    Raises `UserError` if all checkpoints are corrupt.
    """
    found = list_steps(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            print(f"warning: {error}; trying an earlier checkpoint", file=sys.stderr)
    if found:
        raise UserError(f"all checkpoints of {run} are corrupt: delete them to start again, or choose another --out")
    return None


def find_best(run: Path) -> Path:
    """Return the checkpoint with the lowest validation loss, or the newest if the run has `--best_by step`.

    Among equals, the newest. The run has at least one.
    """
    found = list_checkpoints(run)
    with contextlib.suppress(UserError):  # corrupt: reported when the checkpoint is loaded
        if read_meta(found[-1])["config"].get("best_by") == "step":
            return found[-1]
    return min(reversed(found), key=read_val_loss)


def read_val_loss(folder: Path) -> float:
    """Return the validation loss of a checkpoint; infinity if it has none."""
    try:
        value = read_meta(folder)["metrics"].get("val_loss")
    except UserError:  # corrupt: reported when the checkpoint is loaded
        return math.inf
    return value if isinstance(value, (int, float)) and value == value else math.inf  # NaN is never the best


def is_whole(checkpoint: Path) -> bool:
    """Return whether no file of a checkpoint is corrupt."""
    with contextlib.suppress(UserError):
        verify(checkpoint)
        return True
    return False


def read_meta(folder: Path) -> dict:
    """Return a checkpoint's `meta.json`. Raises `UserError` if it is missing, corrupt, or of another version."""
    file = folder / "meta.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no meta.json")
    meta = read_json(file)
    if "kind" in meta:
        raise UserError(f"{folder} is a folder of kind {str(meta['kind'])[:20]!r}, not a checkpoint")
    if meta.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format version {meta.get('version')}, expected {FORMAT_VERSION}: use the code"
            " that wrote it"
        )
    return check_manifest(file, meta, CHECKPOINT)


def verify(folder: Path) -> None:
    """Compare all files of a checkpoint with their checksums. Raises `UserError` if one is corrupt."""
    meta = read_meta(folder)
    for name in {"model.safetensors", "train_state.safetensors", *meta["files"]}:
        verify_file(folder / Path(name).name, meta)


def verify_file(file: Path, meta: dict) -> None:
    """Compare a file with its checksum. Raises `UserError` if it is missing or corrupt."""
    check_regular(file)
    if sha256(file) != meta["files"].get(file.name):
        raise UserError(f"{file} is corrupt or truncated: its checksum is wrong")


def read_log(run: Path) -> Iterator[dict]:
    """Yield the rows of a run's log.jsonl, if it exists; damaged rows are dropped with a warning."""
    file, n_damaged = run / "log.jsonl", 0
    if not file.exists():
        return
    check_regular(file)
    with open(file, "rb") as lines:
        for line in lines:
            row = None
            with contextlib.suppress(ValueError, RecursionError):  # a crash can truncate the last line
                row = json.loads(line, parse_int=parse_int)
            if has_shape(row, LOG_ROW):
                yield row
            else:
                n_damaged += 1
    if n_damaged:
        print(f"warning: {file}: dropped {plural(n_damaged, 'damaged row')}", file=sys.stderr)
