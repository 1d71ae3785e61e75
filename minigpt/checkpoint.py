"""Checkpoints that are whole or absent: write, find, verify and prune.

    runs/NAME/step_000500/model.safetensors         weights under the model's parameter names
                          train_state.safetensors   optimiser state
                          tokenizer.json            a trained vocabulary; none for gpt2 and bytes
                          meta.json                 step, model, tokenizer, data, flags, metrics, checksums

A checkpoint is written to a temporary folder beside its final place, flushed to disk and renamed. safetensors files
hold tensors only, so loading a checkpoint from elsewhere cannot execute code.
"""

import contextlib
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.cli import UserError
from minigpt.files import atomic_rename, fsync, read_json, sha256, write_json
from minigpt.tokenizer import Tokenizer
from model import GPT, GPTConfig

FORMAT_VERSION = 1


def save(folder: Path, model: GPT, tokenizer: Tokenizer, train_state: dict[str, Tensor], meta: dict) -> None:
    """Write a checkpoint atomically.

    Args:
        model: the raw model, neither compiled nor wrapped.
        tokenizer: its tokenizer; a trained vocabulary becomes a part of the checkpoint.
        train_state: see `optimizer_state_dict`.
        meta: usually "step", "metrics" and "identity"; version, model, tokenizer and checksums are added here.

    Raises:
        UserError: the checkpoint could not be written.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in {"model": model.state_dict(), "train_state": train_state}.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
        tokenizer.save(temporary)
        files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        for file in files:
            fsync(temporary / file)
        own = {"version": FORMAT_VERSION, "model": asdict(model.config), "tokenizer": tokenizer.name, "files": files}
        write_json(temporary / "meta.json", {"metrics": {}} | meta | own)
        atomic_rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error}; earlier checkpoints are unchanged") from None


def read_meta(folder: Path) -> dict:
    """Return a checkpoint's `meta.json`. Raises `UserError` if it is missing, corrupt, or of another version."""
    if not (folder / "meta.json").is_file():
        raise UserError(f"{folder} is not a checkpoint: it has no meta.json")
    meta = read_json(folder / "meta.json")
    if meta.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format version {meta.get('version')}, expected {FORMAT_VERSION}: use the code"
            " that wrote it"
        )
    for name, kind in {"files": dict, "metrics": dict, "model": dict, "tokenizer": str}.items():
        if not isinstance(meta.get(name), kind):
            raise UserError(f"{folder} is corrupt: its meta.json has no {name}")
    return meta


def load_model(folder: Path, meta: dict) -> GPT:
    """Return a checkpoint's model. Raises `UserError` if its files are corrupt or do not match each other."""
    try:
        config, weights = GPTConfig(**meta["model"]), load_tensors(folder, "model", meta)
        if sum(weight.numel() for weight in weights.values()) < config.num_parameters:  # before memory is allocated
            raise UserError(f"{folder} is corrupt: model.safetensors is too small for its model")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} is corrupt: {' '.join(str(error).split())}") from None
    return model


def load_tensors(folder: Path, name: str, meta: dict) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file after verifying its checksum. Raises `UserError` if it is corrupt."""
    file = folder / f"{name}.safetensors"
    verify_file(file, meta)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is corrupt: {error}") from None


def optimizer_state_dict(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state as named tensors, such as "exp_avg.wte.weight"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{names[p]}": tensor for p, state in optimizer.state.items() for key, tensor in state.items()}


def load_optimizer_state_dict(folder: Path, meta: dict, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's optimiser state to the devices of the parameters."""
    parameters = dict(model.named_parameters())
    for key, tensor in load_tensors(folder, "train_state", meta).items():
        key, name = key.split(".", 1)
        if name not in parameters or tensor.shape not in (parameters[name].shape, ()):
            raise UserError(f"{folder} is corrupt: its optimiser state {key}.{name} does not fit the model")
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)


def verify(folder: Path) -> None:
    """Compare all files of a checkpoint with their checksums. Raises `UserError` if one is corrupt."""
    meta = read_meta(folder)
    for name in {"model.safetensors", "train_state.safetensors", *meta["files"]}:
        verify_file(folder / Path(name).name, meta)


def verify_file(file: Path, meta: dict) -> None:
    """Compare a file with its checksum. Raises `UserError` if it is missing or corrupt."""
    if not file.is_file():
        raise UserError(f"{file.parent} is corrupt: {file.name} is missing")
    if sha256(file) != meta["files"].get(file.name):
        raise UserError(f"{file} is corrupt or truncated: its checksum is wrong")


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [folder for folder in run.glob("step_*") if folder.name[5:].isdigit() and (folder / "meta.json").is_file()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def find_newest(run: Path, warn: bool = False) -> Path | None:
    """Return the newest checkpoint that is not corrupt, or None; with `warn`, report corrupt ones on stderr.

    Raises `UserError` if all checkpoints are corrupt.
    """
    found = list_checkpoints(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            if warn:
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
        if (read_meta(found[-1]).get("config") or {}).get("best_by") == "step":
            return found[-1]
    return min(reversed(found), key=read_val_loss)


def read_val_loss(folder: Path) -> float:
    """Return the validation loss of a checkpoint; infinity if it has none."""
    try:
        value = read_meta(folder)["metrics"].get("val_loss")
    except UserError:  # corrupt: reported when the checkpoint is loaded
        return math.inf
    return value if isinstance(value, (int, float)) and value == value else math.inf  # NaN is never the best


def prune(run: Path, keep: int) -> None:
    """Delete a run's checkpoints except the newest `keep` and the best, and temporary folders."""
    found = list_checkpoints(run)
    for folder in set(found[:-keep]) - {find_best(run)}:
        discard(folder)
    for leftover in run.glob("step_*.tmp"):
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Rename a checkpoint so that `prune` deletes it: a deletion that is interrupted must not leave a partial one."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.rename(temporary)
