"""How good a model is: exact losses, bits per byte, HellaSwag, and continuations to read.

These functions serve evaluate.py and the training scripts alike.  They change neither the model nor torch's own
randomness, and their figures do not depend on the number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import Progress, check
from data import Dataset, TokenDataset, val_batches
from model import GPT, IGNORE
from sampling import Sampling, seeded, write
from sources import FileSource, HubSource, expand
from tokenizer import Tokenizer
from training import Processes, validate

N_ENDINGS = 4  # in each example of HellaSwag
HELLASWAG_BATCH = 16  # examples; always the same ones together, so that processes do not change the last bits
LOGITS_ROWS = 1024  # of tokens whose logits are in memory at once


# ---- losses --------------------------------------------------------------------------------------------------------


def validation(
    model: nn.Module, data: Dataset, procs: Processes, micro_batch_size: int, max_tokens: int | None = None
) -> dict[str, float]:
    """The exact loss on a dataset folder's validation split; of a text's, on the first `max_tokens` tokens of it.

    Returns:
        val_loss: nats per token; of conversations, per token that the assistant says.
        tokens: how many these are.
        bits_per_byte: for text, the loss in bits over the bytes of the text: comparable between tokenizers.
    """
    rows, text = data.n_rows["val"], isinstance(data, TokenDataset)
    if text and max_tokens is not None:
        rows = min(rows, max(1, max_tokens // data.block_size))
    batches = val_batches(data, rows, micro_batch_size, procs.rank, procs.world_size)
    figures: dict[str, float] = {"val_loss": validate(model, batches, procs)}
    if not text:
        return figures | {"tokens": int(data.meta["val"]["learned_tokens"])}
    n_tokens = rows * data.block_size
    bits = figures["val_loss"] * n_tokens / math.log(2)
    return figures | {"tokens": n_tokens, "bits_per_byte": bits / count_bytes(data, n_tokens)}


def count_bytes(data: TokenDataset, n_tokens: int) -> int:
    """The bytes of text in the validation split's targets, tokens 1 ... n_tokens.  End-of-text tokens have none."""
    tokenizer = data.tokenizer
    lengths = np.array([*(len(tokenizer.text_bytes(token)) for token in range(tokenizer.end_of_text)), 0])
    pieces = range(1, n_tokens + 1, 1 << 20)
    return sum(int(lengths[data.window("val", at, min(1 << 20, n_tokens + 1 - at))].sum()) for at in pieces)


# ---- HellaSwag -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """An example of HellaSwag (Zellers et al., 2019): the beginning of a text, and four endings of which one is right.

    Attributes:
        context: tokens of the beginning.
        endings: tokens of each ending, behind a space.
        characters: the length of each ending.
        label: which one is right.
    """

    context: list[int]
    endings: list[list[int]]
    characters: list[int]
    label: int


def load_hellaswag(files: Sequence[str], tokenizer: Tokenizer, max_examples: int | None = None) -> list[Choice]:
    """The validation examples of the hub's Rowan/hellaswag, or those of local files in its columns.

    Raises `UserError`: files or hub out of reach, or a record that is no example.
    """
    if files:
        records = FileSource(expand(files, (".jsonl", ".parquet")), text_field=None).records()
    else:
        records = HubSource("Rowan/hellaswag", None, split="validation").records()
    choices = []
    for place, record in records:
        choices.append(read_choice(place, record, tokenizer))
        if len(choices) == max_examples:
            break
    check(bool(choices), "HellaSwag has no examples: the files are empty")
    return choices


def read_choice(place: str, record: dict, tokenizer: Tokenizer) -> Choice:
    """One record in HellaSwag's columns.  Raises `UserError`, naming the record, where it is none."""
    context, endings, label = (record.get(name) for name in ("ctx", "endings", "label"))
    texts = [context, *endings] if isinstance(endings, list) else []
    fits = len(texts) == 1 + N_ENDINGS and all(isinstance(text, str) for text in texts) and all(texts[1:])
    fits = fits and str(label) in map(str, range(N_ENDINGS))
    needs = f"it needs a text ctx, {N_ENDINGS} texts in endings, and label, the number of the right one from 0"
    check(fits, f"{place}: no example of HellaSwag: {needs}")
    tokens = [tokenizer.encode(" " + ending) for ending in endings]
    return Choice(tokenizer.encode(context), tokens, [len(ending) for ending in endings], int(label))


@torch.no_grad()
def hellaswag(
    model: GPT, choices: Sequence[Choice], tokenizer: Tokenizer, procs: Processes, progress: Progress | None = None
) -> dict[str, float]:
    """How often the model finds the right ending the likeliest.

    Args:
        model: the raw model, in whatever mode.

    Returns:
        hellaswag: accuracy by the whole ending's probability, which lm_eval calls "acc".
        hellaswag_norm: by its probability per token, as published for GPT-2.
        hellaswag_norm_chars: by its probability per character, which lm_eval calls "acc_norm".
        and of each the standard error, `hellaswag_stderr` and so on.

        The texts are the records' own; lm_eval's task "hellaswag" rewrites them before.
    """
    losses = ending_losses(model, choices, tokenizer, procs, progress)  # (examples, 4)
    lengths = {
        "hellaswag": torch.ones_like(losses),
        "hellaswag_norm": torch.tensor([[len(ending) for ending in choice.endings] for choice in choices]),
        "hellaswag_norm_chars": torch.tensor([choice.characters for choice in choices]),
    }
    labels, n = torch.tensor([choice.label for choice in choices]), len(choices)
    figures = {}
    for name, length in lengths.items():
        accuracy = ((losses / length).argmin(dim=1) == labels).double().mean().item()
        error = math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1))
        figures |= {name: accuracy, f"{name}_stderr": error}
    return figures


def ending_losses(
    model: GPT, choices: Sequence[Choice], tokenizer: Tokenizer, procs: Processes, progress: Progress | None = None
) -> Tensor:
    """The loss of every ending in nats, summed over its tokens: (examples, 4) float64, on the CPU.

    Examples of like length share a batch; the processes take turns with the batches.
    """
    rows = [[row_of(choice.context, ending, model, tokenizer) for ending in choice.endings] for choice in choices]
    order = sorted(range(len(rows)), key=lambda i: max(len(tokens) for tokens, _ in rows[i]))
    batches = [order[at : at + HELLASWAG_BATCH] for at in range(0, len(order), HELLASWAG_BATCH)]
    losses = torch.zeros(len(rows), N_ENDINGS, dtype=torch.float64)
    training = model.training
    model.eval()
    for batch in batches[procs.rank :: procs.world_size]:
        with procs.autocast():
            losses[batch] = batch_losses(model, [row for i in batch for row in rows[i]], procs).view(len(batch), -1)
        if progress is not None:
            progress.update(min(len(batch) * procs.world_size, len(rows) - progress.done))
    model.train(training)
    return procs.sum(losses.to(procs.device)).cpu() if procs.world_size > 1 else losses


def row_of(context: list[int], ending: list[int], model: GPT, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """The tokens of a context and its ending, the newest that fit, and how many of them are the ending's."""
    tokens = [*(context or [tokenizer.end_of_text]), *ending][-model.config.block_size - 1 :]
    return tokens, min(len(ending), len(tokens) - 1)


def batch_losses(model: GPT, rows: Sequence[tuple[list[int], int]], procs: Processes) -> Tensor:
    """The summed loss of the last n tokens of each row of (tokens, n): (rows,) float64, on the CPU."""
    length = max(len(tokens) for tokens, _ in rows) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE)
    for i, (tokens, n) in enumerate(rows):
        end = len(tokens) - 1
        inputs[i, :end] = torch.tensor(tokens[:-1])
        targets[i, end - n : end] = torch.tensor(tokens[-n:])
    inputs, targets = inputs.to(procs.device), targets.to(procs.device)
    at = targets != IGNORE
    hidden, targets = model.hidden(inputs)[at], targets[at]  # (tokens of all endings, C)
    pieces = zip(hidden.split(LOGITS_ROWS), targets.split(LOGITS_ROWS), strict=True)
    losses = torch.cat([F.cross_entropy(model.logits(h).float(), t, reduction="none") for h, t in pieces])
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, at.nonzero()[:, 0].cpu(), losses.cpu().double())


# ---- samples -------------------------------------------------------------------------------------------------------


def samples(model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: Sampling, seed: int) -> list[dict]:
    """How the model goes on from some texts: {"prompt", "text"} each; the same seed gives the same text."""
    written = []
    for prompt in prompts:
        tokens = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        generator = seeded(seed, model.wte.weight.device)
        pieces = (pieces[0] or "" for pieces in write(model, tokenizer, tokens, sampling, generator))
        written.append({"prompt": prompt, "text": "".join(pieces)})
    return written
