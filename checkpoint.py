"""Checkpoints that are whole or absent: how they are written, found, verified, loaded and retained.

    runs/NAME/step_000500/model.safetensors         the weights, under the model's own parameter names
                          train_state.safetensors   the optimiser's state
                          meta.json                 step, model, tokenizer, data, configuration, metrics, checksums

A checkpoint is written into a temporary folder beside its place, flushed to disk and renamed.  safetensors holds
tensors alone, so that nothing in a checkpoint that someone else made can run.

    python checkpoint.py                                            # list all in runs/, compare files with checksums
    python checkpoint.py runs/gpt2                                  # those of one run; or name one checkpoint
"""

import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import cli
from cli import Progress, UserError, check
from files import flush, publish, read_json, sha256, write_json
from model import GPT, GPTConfig, hf_file
from tokenizer import CHAT_TOKENS, TOKENIZERS, Tokenizer, load_tokenizer

FORMAT_VERSION = 1
RUNS = Path("runs")


def run_folder(run: str) -> Path:
    """Where a run lives: `runs/NAME` for a bare name, the path itself for anything with a slash in it."""
    return RUNS / run if Path(run).name == run else Path(run)


# ---- one checkpoint ------------------------------------------------------------------------------------------------


def save(folder: Path, model: GPT, train_state: dict[str, Tensor], meta: dict) -> None:
    """Write a checkpoint into `folder`, which appears whole or not at all.

    Args:
        model: the raw model, neither compiled nor wrapped.
        train_state: see `optimizer_state`.
        meta: what else to keep: "tokenizer", and usually "step", "metrics" and "identity"; the rest is added here.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, tensors in {"model": model.state_dict(), "train_state": train_state}.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / f"{name}.safetensors")
        files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        for file in files:
            flush(temporary / file)
        own = {"version": FORMAT_VERSION, "model": asdict(model.config), "files": files}
        write_json(temporary / "meta.json", {"metrics": {}} | meta | own)
        publish(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} could not be written: {error}; the checkpoints before it are untouched") from None


def read_meta(folder: Path) -> dict:
    """A checkpoint's `meta.json`.  Raises `UserError`: missing, damaged, or of another format version."""
    check((folder / "meta.json").is_file(), f"{folder} is no checkpoint: it has no meta.json")
    meta = read_json(folder / "meta.json")
    version = meta.get("version")
    check(
        version == FORMAT_VERSION,
        f"{folder} has checkpoint format version {version}, this code reads"
        f" {FORMAT_VERSION}: use the code that wrote it",
    )
    for name, kind in {"files": dict, "metrics": dict, "model": dict, "tokenizer": str}.items():
        check(isinstance(meta.get(name), kind), f"{folder} is damaged: its meta.json has no {name}")
    return meta


def check_file(file: Path, meta: dict) -> None:
    """Compare a file with its checksum.  Raises `UserError` where it is missing or damaged."""
    check(file.is_file(), f"{file.parent} is damaged: {file.name} is missing")
    check(sha256(file) == meta["files"].get(file.name), f"{file} is damaged or truncated: its checksum is wrong")


def load_tensors(folder: Path, name: str, meta: dict) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files, checksum verified first.  Raises `UserError` where it is damaged."""
    file = folder / f"{name}.safetensors"
    check_file(file, meta)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def load_weights(folder: Path, meta: dict) -> GPT:
    """The model of a checkpoint.  Raises `UserError` where its files are damaged or do not fit each other."""
    try:
        config, weights = GPTConfig(**meta["model"]), load_tensors(folder, "model", meta)
        stored = sum(weight.numel() for weight in weights.values())
        check(stored >= config.num_parameters, f"{folder} is damaged: model.safetensors is too small for its model")
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged: {' '.join(str(error).split())}") from None
    return model


# ---- the optimiser's state as named tensors ------------------------------------------------------------------------


def optimizer_state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors, "exp_avg.wte.weight" for example."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{named[p]}": tensor for p, state in optimizer.state.items() for key, tensor in state.items()}


def load_optimizer_state(folder: Path, meta: dict, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser the state that a checkpoint holds, on the devices of its parameters."""
    parameters = dict(model.named_parameters())
    for key, tensor in load_tensors(folder, "train_state", meta).items():
        key, name = key.split(".", 1)
        fits = name in parameters and tensor.shape in (parameters[name].shape, ())
        check(fits, f"{folder} is damaged: its optimiser state {key}.{name} does not fit the model")
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)


# ---- the checkpoints of a run --------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [folder for folder in run.glob("step_*") if folder.name[5:].isdigit() and (folder / "meta.json").is_file()]
    return sorted(found, key=lambda folder: int(folder.name[5:]))


def verify(folder: Path) -> None:
    """Compare all of a checkpoint's files with their checksums.  Raises `UserError` where one is damaged."""
    meta = read_meta(folder)
    for name in ("model", "train_state"):
        check_file(folder / f"{name}.safetensors", meta)


def newest_whole(run: Path, tell: bool = False) -> Path | None:
    """The newest checkpoint of a run that is not damaged; None where there is none.  `tell` warns of those that are.

    Raises `UserError` where there are checkpoints and all are damaged.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except UserError as error:
            if tell:
                print(f"warning: {error}; trying an earlier checkpoint", file=sys.stderr)
    check(not found, f"all checkpoints of {run} are damaged: delete them to start anew, or choose another --run")
    return None


def val_loss(folder: Path) -> float:
    """The validation loss of a checkpoint; infinite where it has none."""
    try:
        value = read_meta(folder)["metrics"].get("val_loss")
    except UserError:  # damaged, which is for those to say who want to use it
        return math.inf
    return value if isinstance(value, (int, float)) and value == value else math.inf  # NaN is never the best


def best(run: Path) -> Path:
    """The checkpoint of a run with the lowest validation loss; the newest of equals.  The run has at least one."""
    return min(reversed(checkpoints(run)), key=val_loss)


def retain(run: Path, keep: int) -> None:
    """Delete a run's checkpoints except the newest `keep` and the best, and what crashes have left."""
    found = checkpoints(run)
    for folder in set(found[:-keep]) - {best(run)}:
        discard(folder)
    for leftover in run.glob("step_*.tmp"):  # of a write or a deletion that a crash cut short
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Take a checkpoint out of the run, to be deleted by `retain`: renamed, as half a deletion must not look whole."""
    doomed = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)


@dataclass(frozen=True)
class Loaded:
    """A model to start from, and where it came from.

    Attributes:
        tokenizer: the one it was trained with.
        chat: whether it was finetuned to the chat format.
        source: the folder or hub id.
        history: each training that made it, the first one first: "source" of the data, "step", "metrics", and "config",
            the flags; {"source": SOURCE} alone for weights that were not trained here.
    """

    model: GPT
    tokenizer: Tokenizer
    chat: bool
    source: str
    history: list[dict]


def load(source: str | None) -> Loaded:
    """A model from a run (its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder, or a hub id; None takes
    runs/dolly, and runs/gpt2 where that is not there.

    Raises `UserError`: nothing of the kind is there, or it is damaged.
    """
    source = source or ("runs/dolly" if checkpoints(RUNS / "dolly") else "runs/gpt2")
    folder = run_folder(source) if run_folder(source).is_dir() else Path(source)
    if folder.is_dir() and checkpoints(folder):
        folder = best(folder)
    if (folder / "meta.json").is_file():
        meta = read_meta(folder)
        training = {key: meta.get(key) for key in ("source", "step", "metrics", "config")}
        history = [*meta.get("history", []), training]
        return identify(load_weights(folder, meta), load_tokenizer(meta["tokenizer"]), str(folder), history)
    looks_like_path = folder.is_dir() or source.count("/") > 1 or source.startswith((".", "/", "runs/"))
    check(
        (folder / "config.json").is_file() or not looks_like_path,
        f"{source}: no checkpoint there; train one with pretrain.py, or name a run, a checkpoint, a Hugging Face"
        " GPT-2 folder or a hub id",
    )
    try:
        model = GPT.from_pretrained(folder if folder.is_dir() else source)
    except (OSError, ValueError) as error:
        also = "" if folder.is_dir() else f"; there is no run {run_folder(source)} either"
        raise UserError(f"{error}{also}") from None
    size = model.config.vocab_size
    fitting = (name for name, t in TOKENIZERS.items() if size in (t.vocab_size, t.vocab_size + len(CHAT_TOKENS)))
    loaded = identify(model, load_tokenizer(next(fitting, "gpt2")), source, [{"source": source}])
    check_tokenizer(folder if folder.is_dir() else source, loaded)
    return loaded


def check_tokenizer(source: str | Path, loaded: Loaded) -> None:
    """Compare the tokenizer.json of a Hugging Face folder or hub id, if it has one, with the tokenizer that its number
    of tokens speaks for.  Raises `UserError` where they differ."""
    try:
        file = hf_file(source, "tokenizer.json")
    except OSError:
        return
    described, tokenizer = read_json(file), loaded.tokenizer
    try:
        known = described["model"]["vocab"] | {token["content"]: token["id"] for token in described["added_tokens"]}
    except (KeyError, TypeError):
        raise UserError(f"{file} is damaged: it has no vocabulary") from None
    # Tokens of visible ASCII alone, which the file writes as they are; the others it writes in a code of its own.
    texts = ((tokenizer.text_bytes(token), token) for token in range(tokenizer.end_of_text))
    ours = {text.decode(): token for text, token in texts if all(0x21 <= byte <= 0x7E for byte in text)}
    check(
        ours.items() <= known.items(), f"{source} has other tokens than {tokenizer.name}, which is the one known here"
    )
    special = {token: tokenizer.vocab_size + i for i, token in enumerate(CHAT_TOKENS)} if loaded.chat else {}
    check(special.items() <= known.items(), f"{source} has another chat format: it has no {', '.join(CHAT_TOKENS)}")


def identify(model: GPT, tokenizer: Tokenizer, source: str, history: list[dict]) -> Loaded:
    """Tell from the vocabulary whether a model has learned the chat format.  Raises `UserError` for any other size."""
    size, text, chat = model.config.vocab_size, tokenizer.vocab_size, tokenizer.chat_vocab_size
    fits = size in (text, chat)
    check(fits, f"{source} has a vocabulary of {size} tokens; {tokenizer.name} has {text}, and {chat} for a chat")
    return Loaded(model, tokenizer, size == chat, source, history)


# ---- python checkpoint.py FOLDER -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    folder: Annotated[str, tyro.conf.Positional] = str(RUNS)
    """A folder of runs, a run, or a checkpoint."""


def main(config: Config) -> None:
    """Print a line for each checkpoint.  Raises `UserError` where one is damaged, after all have been looked at."""
    folder = run_folder(config.folder) if run_folder(config.folder).is_dir() else Path(config.folder)
    check(folder.is_dir(), f"{folder}: no such folder; give a folder of runs, a run or a checkpoint")
    found = [folder] if folder.name.startswith("step_") or (folder / "train_state.safetensors").is_file() else []
    found = found or checkpoints(folder)
    found = found or [step for run in sorted(folder.iterdir()) for step in checkpoints(run)]
    check(bool(found), f"{folder} holds no checkpoints; give a folder of runs, a run or a checkpoint")
    taken = {best(run) for run in {step.parent for step in found} if checkpoints(run)}
    progress = Progress(len(found), "checkpoint", enabled=sys.stderr.isatty())  # elsewhere the lines tell enough
    tell = progress.print if progress.enabled else print
    width, damaged = max(len(str(step)) for step in found), 0
    tell(f"{'checkpoint':<{width}}  validation loss          size  saved             state")
    for step in found:
        try:
            verify(step)
            state = "whole"
        except UserError as error:
            state, damaged = str(error).removeprefix(str(step)).strip(" /").removeprefix("is "), damaged + 1
        loss = f"{val_loss(step):.4f}" if val_loss(step) < math.inf else "-"
        size = sum(file.stat().st_size for file in step.iterdir()) / 1e6
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((step / "meta.json").stat().st_mtime))
        tell(f"{step!s:<{width}}  {loss:>15}  {size:>9,.1f} MB  {saved}  {'best, ' * (step in taken)}{state}")
        progress.update(1)
    progress.close()
    check(not damaged, f"{damaged} of {len(found)} checkpoints cannot be used: delete them; training passes over them")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
