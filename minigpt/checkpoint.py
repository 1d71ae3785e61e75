"""Checkpoints that are whole or absent: write, load and prune.

    runs/NAME/step_000500/model.safetensors         weights under the model's parameter names
                          train_state.safetensors   optimiser state
                          tokenizer.json            a trained vocabulary; none for gpt2 and bytes
                          meta.json                 step, model, tokenizer, data, flags, metrics, checksums

A checkpoint is written to a temporary folder beside its final place, flushed to disk and renamed. safetensors files
hold tensors only, so loading a checkpoint from elsewhere cannot execute code.
"""

import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.cli import UserError
from minigpt.files import atomic_rename, fsync, sha256, write_json
from minigpt.runs import FORMAT_VERSION, find_best, list_checkpoints, verify_file
from minigpt.tokenizer import Tokenizer
from model import GPT, GPTConfig


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
