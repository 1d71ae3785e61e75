"""HellaSwag (Zellers et al., 2019): which of four endings continues a text? Used by evaluate.py and during training.

Evaluation changes neither the model nor torch's random state, and the result is the same for any number of processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from minigpt.cli import Progress, UserError
from minigpt.distributed import Processes
from minigpt.likelihood import score_continuations
from minigpt.sources import FileSource, HubSource, NetworkError, find_files
from minigpt.tokenizer import Tokenizer
from model import GPT

N_ENDINGS = 4  # of each example


@dataclass(frozen=True)
class HellaSwagExample:
    """The beginning of a text and four endings, one of which is correct.

    Attributes:
        context: tokens of the beginning.
        endings: tokens of each ending, with a space before it.
        n_chars: length of each ending in characters.
        label: index of the correct ending.
    """

    context: list[int]
    endings: list[list[int]]
    n_chars: list[int]
    label: int


def load_examples(
    files: Sequence[str], tokenizer: Tokenizer, max_examples: int | None = None
) -> list[HellaSwagExample]:
    """Load the validation examples of the hub's Rowan/hellaswag, or of local files with the same columns.

    Raises `UserError` if the files or the hub cannot be read, or if a record is not an example.
    """
    if files:
        records = FileSource(find_files(files, (".jsonl", ".parquet"), "--hellaswag_files"), text_field=None).records()
    else:
        try:
            records = HubSource("Rowan/hellaswag", None, split="validation").records()
        except NetworkError as error:
            reason = str(error).removesuffix("use --files")
            raise UserError(f"{reason}give --hellaswag_files; evaluate.py can omit it (--no_hellaswag)") from None
    examples = [parse_example(location, record, tokenizer) for location, record in islice(records, max_examples)]
    if not examples:
        raise UserError("HellaSwag has no examples: the files are empty")
    return examples


def parse_example(location: str, record: dict, tokenizer: Tokenizer) -> HellaSwagExample:
    """Return one record as an example. Raises `UserError`, naming the record, if it is not one."""
    context, endings, label = (record.get(name) for name in ("ctx", "endings", "label"))
    texts = [context, *endings] if isinstance(endings, list) else []
    valid = len(texts) == 1 + N_ENDINGS and all(isinstance(text, str) for text in texts) and all(texts[1:])
    if not valid or str(label) not in map(str, range(N_ENDINGS)):
        raise UserError(
            f"{location}: not a HellaSwag example: expected a text ctx, {N_ENDINGS} texts in endings, and label, the"
            " index of the correct one"
        )
    tokens = [tokenizer.encode(" " + ending) for ending in endings]
    return HellaSwagExample(tokenizer.encode(context), tokens, [len(ending) for ending in endings], int(label))


def evaluate_hellaswag(
    model: GPT,
    examples: Sequence[HellaSwagExample],
    tokenizer: Tokenizer,
    procs: Processes,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return how often the correct ending is the most likely one.

    Args:
        model: the raw model, in train or eval mode.
        progress: counts endings.

    Returns:
        hellaswag: accuracy by the probability of the whole ending, lm_eval's "acc".
        hellaswag_norm: by the probability per token, as published for GPT-2.
        hellaswag_norm_chars: by the probability per character, lm_eval's "acc_norm".
        Each has its standard error, `hellaswag_stderr` and so on.

        Texts are used as they are; lm_eval's task "hellaswag" preprocesses them.
    """
    losses = ending_losses(model, examples, tokenizer, procs, progress)  # (examples, 4)
    lengths = {
        "hellaswag": torch.ones_like(losses),
        "hellaswag_norm": torch.tensor([[len(ending) for ending in example.endings] for example in examples]),
        "hellaswag_norm_chars": torch.tensor([example.n_chars for example in examples]),
    }
    labels, n = torch.tensor([example.label for example in examples]), len(examples)
    result = {}
    for name, length in lengths.items():
        accuracy = ((losses / length).argmin(dim=1) == labels).double().mean().item()
        stderr = math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1))
        result |= {name: accuracy, f"{name}_stderr": stderr}
    return result


def ending_losses(
    model: GPT,
    examples: Sequence[HellaSwagExample],
    tokenizer: Tokenizer,
    procs: Processes,
    progress: Progress | None = None,
) -> Tensor:
    """Return the summed loss of every ending in nats: (examples, 4) float64, on the CPU."""
    pairs = [(example.context or [tokenizer.end_of_text], ending) for example in examples for ending in example.endings]
    losses, _ = score_continuations(model, pairs, procs, progress)
    return losses.view(-1, N_ENDINGS)
