"""Judge a model: exact validation loss and bits per byte, the loss of answers, and HellaSwag.

    python evaluate.py                                              # runs/dolly if it is there, else runs/gpt2
    python evaluate.py --checkpoint runs/gpt2 --data data/fineweb_edu
    python evaluate.py --checkpoint openai-community/gpt2 --json results.jsonl
    torchrun --standalone --nproc_per_node=8 evaluate.py            # the same figures, sooner

HellaSwag (Zellers et al., 2019) asks which of four endings goes on from a text.  Its 10,042 examples are slow on a CPU,
where `--max_examples 500` gives a first idea.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import checkpoint
import cli
from checkpoint import Loaded
from cli import Progress, UserError, check
from data import ChatDataset, TokenDataset
from evaluation import hellaswag, load_hellaswag, validation
from files import read_json
from training import Processes, start_processes

# Accuracies on HellaSwag's validation examples, per token, without examples before the question.
YARDSTICKS = {
    "chance": 0.25,
    "OpenAI's GPT-2 124M": 0.2955,  # 2,967 of 10,042; published as 29.4 to 29.6 %
}


@dataclass(frozen=True)
class Config:
    checkpoint: str | None = None
    """A run (its best checkpoint), a checkpoint, a GPT-2 folder or hub id; None takes runs/dolly, else runs/gpt2."""
    data: tuple[str, ...] | None = None
    """Dataset folders of text or conversations; None takes data/fineweb_edu and data/dolly, if there and fitting."""
    max_tokens: int | None = None
    """Only so many tokens of a text's validation split, from its beginning; None takes all."""
    hellaswag: bool = True
    """Ask HellaSwag's questions."""
    files: tuple[str, ...] = ()
    """HellaSwag's examples in local .jsonl or .parquet files instead of the hub's Rowan/hellaswag."""
    max_examples: int | None = None
    """Only so many of the examples; None takes all."""
    micro_batch_size: int = 8
    """Rows that a process computes at once, for the losses."""
    json: Path | None = None
    """A file to which the figures are appended as one JSON line."""
    device: str | None = None
    """cuda, mps or cpu; None takes the best there is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the matrix products."""


def main(config: Config) -> None:
    for name in ("max_tokens", "max_examples", "micro_batch_size"):
        if getattr(config, name) is not None:
            cli.check_range(name, getattr(config, name), 1)
    check(
        config.hellaswag or not (config.files or config.max_examples), "--no_hellaswag leaves nothing to ask of files"
    )
    if config.json is not None:
        config.json.open("a").close()  # where it cannot be written, better known now
    procs = start_processes(config.device, config.dtype, deterministic=False)
    loaded = checkpoint.load(config.checkpoint)
    datasets = list(open_datasets(config, loaded, procs))
    choices = load_hellaswag(config.files, loaded.tokenizer, config.max_examples) if config.hellaswag else []
    check(bool(datasets or choices), "nothing to judge the model by: give --data, or leave --no_hellaswag out")
    loaded.model.to(procs.device)
    figures: dict = {"checkpoint": loaded.source, "dtype": config.dtype, "data": {}}
    tell(procs, f"{loaded.source}: {loaded.model.config.num_parameters:,} parameters, {config.dtype}")
    for data in datasets:
        found = validation(loaded.model, data, procs, config.micro_batch_size, config.max_tokens)
        figures["data"][str(data.folder)] = found
        tell(procs, describe_loss(data, found))
    if choices:
        progress = Progress(len(choices), "example", enabled=procs.is_main)
        found = hellaswag(loaded.model, choices, loaded.tokenizer, procs, progress)
        progress.close()
        figures |= found | {"hellaswag_examples": len(choices)}
        tell(procs, describe_hellaswag(found, len(choices)))
    if config.json is not None and procs.is_main:
        with open(config.json, "a") as file:
            file.write(json.dumps(figures) + "\n")
        print(f"-> {config.json}")
    procs.close()


def open_datasets(config: Config, loaded: Loaded, procs: Processes) -> Iterator[TokenDataset | ChatDataset]:
    """The dataset folders that are asked for, or those by the default names that fit the model.

    Raises `UserError` where one that is asked for is missing, damaged or does not fit.
    """
    usual = [folder for folder in ("data/fineweb_edu", "data/dolly") if Path(folder).is_dir()]
    for folder in usual if config.data is None else config.data:
        try:
            yield open_dataset(folder, loaded)
        except UserError as error:
            if config.data is not None:
                raise
            if procs.is_main:
                print(f"left out: {error}", file=sys.stderr)


def open_dataset(folder: str, loaded: Loaded) -> TokenDataset | ChatDataset:
    """A dataset folder of either kind.  Raises `UserError` where it does not fit the model."""
    meta = Path(folder, "meta.json")
    chat = meta.is_file() and read_json(meta).get("kind") == "chat"
    check(loaded.chat or not chat, f"--data {folder} has conversations, and {loaded.source} knows text alone")
    data = (ChatDataset if chat else TokenDataset)(folder, loaded.model.config.block_size)
    ours, theirs = loaded.tokenizer.name, data.tokenizer.name
    check(ours == theirs, f"--data {folder} has {theirs} tokens, and {loaded.source} knows {ours} tokens")
    return data


def describe_loss(data: TokenDataset | ChatDataset, found: dict) -> str:
    what = f"{'answers' if isinstance(data, ChatDataset) else 'text'} in {data.folder}"
    per_byte = f"   {found['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in found else ""
    return f"{what:<32} loss {found['val_loss']:.4f} nats per token{per_byte}   {found['tokens']:,} tokens"


def describe_hellaswag(found: dict, n: int) -> str:
    """HellaSwag's table, with what others have reached."""
    names = {
        "hellaswag": "whole ending",
        "hellaswag_norm": "per token",
        "hellaswag_norm_chars": "per character",
    }
    lines = [f"HellaSwag, {n:,} examples"]
    lines += [f"    {names[key]:<32}{found[key]:>7.2%} ± {found[key + '_stderr']:.2%}" for key in names]
    lines += [f"    {name + ', per token':<32}{accuracy:>7.2%}" for name, accuracy in YARDSTICKS.items()]
    return "\n".join(lines)


def tell(procs: Processes, text: str) -> None:
    if procs.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
