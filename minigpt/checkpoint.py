"""Checkpoints that are whole or absent: write, load and prune.

    runs/NAME/step_000500/model.safetensors         weights under the model's parameter names
                          train_state.safetensors   optimiser state
                          tokenizer.json            a trained vocabulary; none for gpt2 and bytes
                          meta.json                 step, model, tokenizer, data, flags, metrics, checksums

A checkpoint is written to a temporary folder beside its final place, flushed to disk and renamed. safetensors files
hold tensors only, so loading a checkpoint from elsewhere cannot execute code.
"""

import itertools
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minigpt.cli import UserError
from minigpt.distributed import Processes
from minigpt.files import atomic_rename, fsync, sha256, write_manifest
from minigpt.parallel import full_tensor, shard_like
from minigpt.runs import FORMAT_VERSION, find_best, list_checkpoints, list_steps, verify_file
from minigpt.tokenizer import Tokenizer
from model import GPT, GPTConfig


def save(
    folder: Path,
    config: GPTConfig,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    train_state: dict[str, Tensor],
    meta: dict,
) -> None:
    """Write a checkpoint atomically.

    Args:
        config: the model's.
        weights: the model's `state_dict`.
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
        for name, tensors in {"model": weights, "train_state": train_state}.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
        tokenizer.save(temporary)
        files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        for file in files:
            (temporary / file).chmod(0o644)  # safetensors allows only the owner; others may share the run
            fsync(temporary / file)
        own = {"version": FORMAT_VERSION, "model": asdict(config), "tokenizer": tokenizer.name, "files": files}
        unset = {"metrics": {}, "identity": {}, "config": {}, "source": {}, "history": []}
        write_manifest(temporary / "meta.json", unset | meta | own)
        atomic_rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error}; earlier checkpoints are unchanged") from None


def load_weights(folder: Path, meta: dict, model: GPT) -> None:
    """Load the weights of a verified checkpoint into a model of the same shape, which may be sharded."""
    own = model.state_dict()
    weights = load_tensors(folder, "model", meta, verified=True)
    model.load_state_dict({name: shard_like(tensor, own[name]) for name, tensor in weights.items()})


def load_model(folder: Path, meta: dict) -> GPT:
    """Return a checkpoint's model. Raises `UserError` if its files are corrupt or do not match each other."""
    try:
        return build_model(GPTConfig(**meta["model"]), load_tensors(folder, "model", meta), "model.safetensors")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} is corrupt: {' '.join(str(error).split())}") from None


class SkipInit(TorchFunctionMode):
    """Skip the functions of `torch.nn.init`, for a model whose weights are loaded.

    On the meta device they do nothing, but import torch's compiler, which takes two seconds.
    """

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def build_model(config: GPTConfig, weights: dict[str, Tensor], file_name: str) -> GPT:
    """Return a model with the weights of a file. Other weights in it are ignored; the embedding may lack its padding.

    Raises `ValueError` if a weight is missing or has another shape.
    """
    with torch.device("meta"), SkipInit():
        first_layers = [name for name, _ in GPT(replace(config, n_layer=1)).named_parameters()]
        names = (name.replace("h.0.", f"h.{layer}.") for layer in range(config.n_layer) for name in first_layers)
        missing = next((name for name in names if name not in weights), None)
        if missing is not None:  # before n_layer, a number in a file, decides how many modules are created
            raise ValueError(f"{file_name} has no {missing}")
        model = GPT(config)
    own = {}
    for name, parameter in model.named_parameters():
        weight, expected = weights[name], tuple(parameter.shape)
        if name == "wte.weight" and len(weight) != config.padded_vocab_size:
            expected = (config.vocab_size, config.n_embd)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} in {file_name} has shape {tuple(weight.shape)}, expected {expected}")
        if not weight.is_floating_point():
            raise ValueError(f"{name} in {file_name} is {weight.dtype}, expected floating point")
        padding = len(parameter) - len(weight)
        own[name] = (F.pad(weight, (0, 0, 0, padding)) if padding else weight).float().contiguous()
    model.load_state_dict(own, assign=True)
    return model


def load_tensors(folder: Path, name: str, meta: dict, verified: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's file, whose checksum is compared unless the file is `verified`.

    Raises `UserError` if the file is corrupt.
    """
    file = folder / f"{name}.safetensors"
    if not verified:
        verify_file(file, meta)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is corrupt: {error}") from None


def optimizer_state_dict(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state as named tensors, such as "exp_avg.wte.weight"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{names[p]}": tensor for p, state in optimizer.state.items() for key, tensor in state.items()}


def copy_to_main(tensors: dict[str, Tensor], procs: Processes) -> dict[str, Tensor]:
    """Return copies of tensors, which may be sharded, in the main process's CPU memory; return {} on the others.

    All processes must call this.
    """
    copies = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)  # one at a time in the GPU's memory
        if procs.is_main:
            copies[name] = whole.to("cpu", copy=True)
    return copies


def checkpoint_bytes(model: GPT, optimizer: torch.optim.Optimizer) -> int:
    """Return the size of a checkpoint after the first step: weights and optimiser state, without the headers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *optimizer_state_dict(model, optimizer).values()))


def load_optimizer_state_dict(
    folder: Path, meta: dict, model: GPT, optimizer: torch.optim.Optimizer, verified: bool = False
) -> None:
    """Load a checkpoint's optimiser state to the devices of the parameters, and shard it like them."""
    parameters = dict(model.named_parameters())
    for key, tensor in load_tensors(folder, "train_state", meta, verified).items():
        key, name = key.split(".", 1)
        if name not in parameters or tensor.shape not in (parameters[name].shape, ()):
            raise UserError(f"{folder} is corrupt: its optimiser state {key}.{name} does not fit the model")
        parameter = parameters[name]
        is_scalar = tensor.dim() == 0  # a step count, which is not sharded
        optimizer.state[parameter][key] = tensor.to(parameter.device) if is_scalar else shard_like(tensor, parameter)


def prune(run: Path, keep: int, protected: Collection[Path] = ()) -> None:
    """Delete a run's checkpoints except the newest `keep`, the best and `protected` ones; also temporary folders."""
    found = list_checkpoints(run)
    for folder in set(found[:-keep]) - {find_best(run), *protected}:
        discard(folder)
    for leftover in run.glob("step_*.tmp"):
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Rename a checkpoint so that `prune` deletes it: a deletion that is interrupted must not leave a partial one."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.rename(temporary)


def set_aside(run: Path, newest: Path) -> None:
    """Rename the corrupt checkpoints after `newest`, which are in the way of new ones."""
    found = list_steps(run)
    for item in found[found.index(newest) + 1 :]:
        names = (item.with_name(f"{item.name}.corrupt{i or ''}") for i in itertools.count())
        name = next(name for name in names if not name.exists())
        item.rename(name)
        print(f"warning: renamed {item} to {name.name}", file=sys.stderr)
