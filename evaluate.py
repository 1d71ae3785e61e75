"""Evaluate a model: exact validation loss, bits per byte, answers to questions, HellaSwag and other benchmarks.

    python evaluate.py                                              # the newest run under runs/
    python evaluate.py --checkpoint runs/gpt2 --data data/fineweb_edu
    python evaluate.py --checkpoint openai-community/gpt2 --json results.jsonl
    python evaluate.py --tasks piqa arc_easy arc_challenge sciq lambada_openai hellaswag        # by lm_eval
    python evaluate.py --quantize int8 --no_hellaswag               # the loss with 8-bit weights
    torchrun --standalone --nproc_per_node=8 evaluate.py            # the same figures on eight GPUs

HellaSwag's 10,042 examples take minutes on a GPU and hours on a CPU; there, start with `--max_examples 500`. A chat
model also answers 100 questions from the validation split of its conversations, which takes minutes on a CPU. `--tasks`
needs requirements-extra.txt.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import importlib.util
import json
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minigpt import cli
from minigpt.answers import Answer, answer_questions, summarize_answers
from minigpt.cli import InferenceConfig, Progress, UserError
from minigpt.dataset import ChatDataset, Dataset, TokenDataset, val_batches
from minigpt.distributed import Processes, init_processes
from minigpt.files import append_line
from minigpt.hellaswag import N_ENDINGS, evaluate_hellaswag, load_examples
from minigpt.inference import load_for_inference
from minigpt.pretrained import PretrainedModel
from minigpt.shards import read_meta
from minigpt.training import validate

# Accuracies on HellaSwag's validation examples, normalised by tokens, zero-shot.
REFERENCE_ACCURACY = {
    "chance": 0.25,
    "OpenAI's GPT-2 124M": 0.2955,  # 2,967 of 10,042; published as 29.4 to 29.6 %
}

# lm_eval's acc_norm of OpenAI's GPT-2 124M, zero-shot; from the README of MARS (github.com/AGI-Arena/MARS).
REFERENCE_ACC_NORM = {"hellaswag": 0.311, "arc_easy": 0.395, "arc_challenge": 0.227, "piqa": 0.625, "sciq": 0.644}
DOLLY_ROUGE_L = 23.3  # of GPT-2 120M finetuned on Dolly, on 500 other questions (Gu et al., "MiniLLM", 2024)


@dataclass(frozen=True)
class Config(InferenceConfig):
    data: tuple[str, ...] | None = None
    """Dataset folders; default: data/fineweb_edu and data/dolly, if they exist and fit the model."""
    max_tokens: int | None = None
    """Number of validation tokens of a text dataset, from the start of the split; default: all."""
    max_answers: int = 100
    """Answer this number of validation questions of a chat dataset; 0: none."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm_eval to run instead of HellaSwag, such as piqa arc_easy; `lm_eval ls tasks` lists them."""
    task_folder: Path | None = None
    """The folder of task files of your own, .yaml in lm_eval's format; default: lm_eval's own tasks."""
    hellaswag: bool = True
    """Evaluate HellaSwag."""
    hellaswag_files: tuple[str, ...] = ()
    """HellaSwag's examples in local .jsonl or .parquet files; default: the hub's Rowan/hellaswag."""
    max_examples: int | None = None
    """Number of examples of HellaSwag and of each task; default: all."""
    micro_batch_size: int = 8
    """Rows per forward pass, for the losses."""
    json: Path | None = None
    """Append the figures to this file, as one JSON line."""


def main(config: Config) -> None:
    check_config(config)
    procs = init_processes(config.device, "float32")
    loaded, _ = load_for_inference(config)
    datasets = list(open_datasets(config, loaded, procs))
    hellaswag = config.hellaswag and not config.tasks
    examples = load_examples(config.hellaswag_files, loaded.tokenizer, config.max_examples) if hellaswag else []
    tasks = load_tasks(config, procs) if config.tasks else []
    if not (datasets or examples or tasks):
        raise UserError("nothing to evaluate: give --data or --tasks, or omit --no_hellaswag")
    precision = config.quantize or config.dtype
    figures: dict = {"checkpoint": loaded.source, "dtype": precision, "data": {}}
    print_on_main(procs, f"{loaded.source}: {loaded.model.config.num_parameters:,} parameters, {precision}")
    for data in datasets:
        result = evaluate_dataset(loaded.model, data, procs, config.micro_batch_size, config.max_tokens)
        print_on_main(procs, format_loss(data, result))
        if isinstance(data, ChatDataset) and config.max_answers:
            answers = answer_questions(loaded.model, data, config.max_answers, procs)
            result |= summarize_answers(answers)
            print_on_main(procs, format_answers(answers, result))
        figures["data"][str(data.folder)] = result
    if examples:
        progress = Progress(len(examples) * N_ENDINGS, "ending", enabled=procs.is_main)
        result = evaluate_hellaswag(loaded.model, examples, loaded.tokenizer, procs, progress)
        progress.close()
        figures |= result | {"hellaswag_examples": len(examples)}
        print_on_main(procs, format_hellaswag(result, len(examples)))
    if tasks:
        from minigpt.tasks import evaluate_tasks

        figures["tasks"] = evaluate_tasks(loaded, tasks, procs, config.max_examples)
        print_on_main(procs, format_tasks(figures["tasks"]))
    if config.json is not None:
        procs.call_on_main(append_line, config.json, json.dumps(figures))
        print_on_main(procs, f"figures appended to {config.json}")
    procs.close()


def print_on_main(procs: Processes, text: str) -> None:
    """Print on the main process."""
    if procs.is_main:
        print(text, flush=True)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    for name in ("max_tokens", "max_examples", "micro_batch_size"):
        cli.check_range(name, getattr(config, name), 1)
    cli.check_range("max_answers", config.max_answers, 0)
    if config.hellaswag_files and (config.tasks or not config.hellaswag):
        raise UserError("--hellaswag_files cannot be combined with --tasks or --no_hellaswag")
    if config.max_examples and not (config.tasks or config.hellaswag):
        raise UserError("--max_examples is for HellaSwag and --tasks: give --tasks, or omit --no_hellaswag")
    if config.task_folder and not config.tasks:
        raise UserError("--task_folder needs --tasks: name the tasks to run")
    if config.task_folder and not config.task_folder.is_dir():
        raise UserError(f"--task_folder {config.task_folder}: no such folder")
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm_eval: pip install -r requirements-extra.txt")
    if config.json is not None:
        with open(config.json, "a") as file:  # fails now rather than at the end
            if not file.seekable():
                raise UserError(f"--json {config.json} is not a regular file: name a file to append to")


def load_tasks(config: Config, procs: Processes) -> list:
    """Load the tasks of lm_eval, which is imported only if there are any. Raises `UserError`."""
    if config.task_folder is None:
        print_on_main(procs, "indexing lm_eval's tasks (about 20 s)")
    from minigpt import tasks

    return tasks.load_tasks(config.tasks, config.task_folder)


def open_datasets(config: Config, loaded: PretrainedModel, procs: Processes) -> Iterator[Dataset]:
    """Yield the dataset folders of --data, or the default ones that fit the model.

    Raises `UserError` if a folder of --data is missing, corrupt or does not fit.
    """
    defaults = [folder for folder in ("data/fineweb_edu", "data/dolly") if Path(folder).is_dir()]
    for folder in defaults if config.data is None else config.data:
        try:
            yield open_dataset(folder, loaded)
        except UserError as error:
            if config.data is not None:
                raise
            if procs.is_main:
                print(f"skipped: {error}", file=sys.stderr)


def open_dataset(folder: str, loaded: PretrainedModel) -> Dataset:
    """Open a dataset folder of either kind. Raises `UserError` if it does not fit the model."""
    is_chat = read_meta(Path(folder))["kind"] == "chat"
    if is_chat and not loaded.is_chat:
        raise UserError(f"{folder} holds conversations, and {loaded.source} is not a chat model")
    data = (ChatDataset if is_chat else TokenDataset)(folder, loaded.model.config.block_size)
    if loaded.tokenizer.name != data.tokenizer.name:
        raise UserError(
            f"{folder} has {data.tokenizer.name} tokens, {loaded.source} has {loaded.tokenizer.name} tokens"
        )
    return data


def evaluate_dataset(
    model: nn.Module, data: Dataset, procs: Processes, micro_batch_size: int, max_tokens: int | None = None
) -> dict[str, float]:
    """Return the exact loss on the validation split, of text on its first `max_tokens` tokens.

    Returns:
        val_loss: nats per token; of conversations, over the assistant's tokens.
        tokens: number of tokens in the loss.
        bits_per_byte: comparable between tokenizers.
    """
    n_rows, is_text = data.n_rows["val"], isinstance(data, TokenDataset)
    if is_text and max_tokens is not None:
        n_rows = min(n_rows, max(1, max_tokens // data.block_size))
    n_tokens = n_rows * data.block_size if is_text else data.meta["val"]["loss_tokens"]
    val_loss = validate(model, val_batches(data, n_rows, micro_batch_size, procs.rank, procs.world_size), procs)
    bits_per_byte = val_loss * n_tokens / math.log(2) / data.count_val_bytes(n_rows)
    return {"val_loss": val_loss, "tokens": n_tokens, "bits_per_byte": bits_per_byte}


def format_loss(data: Dataset, result: dict) -> str:
    what = f"{'answers' if isinstance(data, ChatDataset) else 'text'} in {data.folder}"
    losses = f"loss {result['val_loss']:.4f} nats per token   {result['bits_per_byte']:.4f} bits per byte"
    return f"{what:<32} {losses}   {result['tokens']:,} tokens"


def format_answers(answers: list[Answer], result: dict) -> str:
    """Return the scores and three sample answers as text."""
    lines = [
        f"{len(answers)} answers: Rouge-L {result['rouge_l']:.1f} (standard error {result['rouge_l_stderr']:.1f};"
        f" MiniLLM's GPT-2 120M on Dolly: {DOLLY_ROUGE_L}), {result['finished']:.0f} % finished"
    ]
    for answer in answers[:: max(1, len(answers) // 3)][:3]:
        for name in ("question", "answer", "reference"):
            text = textwrap.shorten(cli.strip_control_chars(getattr(answer, name)), 200, placeholder=" ...")
            lines.append(f"    {name:<10} {text}".rstrip())
    return "\n".join(lines)


def format_hellaswag(result: dict, n_examples: int) -> str:
    """Return the table of accuracies, with published ones."""
    labels = {
        "hellaswag": "whole ending",
        "hellaswag_norm": "normalised by tokens",
        "hellaswag_norm_chars": "normalised by characters",
    }
    lines = [f"HellaSwag, {n_examples:,} examples"]
    lines += [f"    {labels[key]:<42}{result[key]:>7.2%} ± {result[key + '_stderr']:.2%}" for key in labels]
    lines += [f"    {name + ', normalised by tokens':<42}{value:>7.2%}" for name, value in REFERENCE_ACCURACY.items()]
    return "\n".join(lines)


def format_tasks(metrics: dict[str, dict[str, float]]) -> str:
    """Return the table of metrics, with published ones."""
    lines = [f"{'task':<24} {'metric':<20} {'value':>10} {'standard error':>16} {'GPT-2 124M':>12}"]
    for task, values in metrics.items():
        for name in values:
            if not name.endswith("_stderr"):
                stderr = f"{values[f'{name}_stderr']:.4f}" if f"{name}_stderr" in values else ""
                published = REFERENCE_ACC_NORM.get(task, "") if name == "acc_norm" else ""
                lines.append(f"{task:<24} {name:<20} {values[name]:>10.4f} {stderr:>16} {published:>12}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
