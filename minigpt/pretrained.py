"""A model from any source: a run, a checkpoint, a Hugging Face GPT-2 folder, a hub id or nanoGPT's ckpt.pt."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint import load_model
from minigpt.cli import UserError
from minigpt.hf import MissingFileError, find_hf_file, load_hf
from minigpt.nanogpt import load_nanogpt
from minigpt.runs import find_best, find_newest_run, format_runs, is_whole, list_checkpoints, read_meta
from minigpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, read_tokenizer
from model import GPT


@dataclass(frozen=True)
class PretrainedModel:
    """A model and its origin.

    Attributes:
        tokenizer: the tokenizer it was trained with.
        is_chat: whether it was finetuned for the chat format.
        source: the folder, file or hub id.
        history: the training runs that produced it, oldest first: "source" of the data, "step", "metrics", and
            "config", the flags; "source" and perhaps "step" only for weights that were trained elsewhere.
    """

    model: GPT
    tokenizer: Tokenizer
    is_chat: bool
    source: str
    history: list[dict]


def load_pretrained(source: str | None, chat: bool = False) -> PretrainedModel:
    """Load a model from a run (its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder or a hub id.

    nanoGPT's `ckpt.pt`, or the folder that holds it, is loaded as well. None loads the newest run under runs/, with
    `chat` the newest chat run, and prints its checkpoint on stderr. Raises `UserError` if the source does not exist or
    is corrupt.
    """
    folder = find_newest_run(chat) if source is None else Path(source)
    if list_checkpoints(folder):
        folder = find_best(folder)
    if source is None and os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {folder} (the newest {'chat ' * chat}run)", file=sys.stderr)
    if (folder / "meta.json").is_file():
        return load_checkpoint(folder)
    if folder.suffix == ".pt" or (folder / "ckpt.pt").exists():
        model, step = load_nanogpt(folder)
        return from_parts(model, load_tokenizer("gpt2"), source, [{"source": source, "step": step}])
    is_path = folder.is_dir() or source.count("/") > 1 or source.startswith((".", "/", "runs/"))
    if is_path and not (folder / "config.json").is_file():
        raise UserError(
            f"{source}: no checkpoint found; give a run, a checkpoint, a Hugging Face folder or hub id, or ckpt.pt;"
            f" {format_runs()}"
        )
    model = load_hf(source)
    return from_parts(model, find_tokenizer(source, model.config.vocab_size), source, [{"source": source}])


def load_checkpoint(folder: Path) -> PretrainedModel:
    """Load a checkpoint. Raises `UserError` if it is corrupt, which names another checkpoint of the run."""
    try:
        meta = read_meta(folder)
        model, tokenizer = load_model(folder, meta), load_tokenizer(meta["tokenizer"], folder)
    except UserError as error:
        others = (other for other in reversed(list_checkpoints(folder.parent)) if other != folder and is_whole(other))
        other = next(others, None)
        raise UserError(f"{error}; use {other} instead, which is whole" if other else str(error)) from None
    history = [*meta["history"], {key: meta.get(key) for key in ("source", "step", "metrics", "config", "schedule")}]
    return from_parts(model, tokenizer, str(folder), history)


def from_parts(model: GPT, tokenizer: Tokenizer, source: str, history: list[dict]) -> PretrainedModel:
    """Combine model and tokenizer. Raises `UserError` if the vocabulary sizes differ.

    A model with the chat tokens in its vocabulary is a chat model.
    """
    size, text_size, chat_size = model.config.vocab_size, tokenizer.vocab_size, tokenizer.chat_vocab_size
    if size not in (text_size, chat_size):
        raise UserError(
            f"{source} has a vocabulary of {size} tokens; {tokenizer.name} has {text_size}, or {chat_size} with chat"
            " tokens"
        )
    return PretrainedModel(model, tokenizer, size == chat_size, source, history)


def find_tokenizer(source: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder or hub id: its tokenizer.json.

    Without one, it is the built-in vocabulary of that size. Raises `UserError` if the file is corrupt or not supported.
    """
    try:
        file = find_hf_file(source, TOKENIZER_FILE)
    except MissingFileError:
        tokenizer = load_tokenizer("bytes")  # needs no download
        return tokenizer if vocab_size in (tokenizer.vocab_size, tokenizer.chat_vocab_size) else load_tokenizer("gpt2")
    return read_tokenizer(file, vocab_size)
