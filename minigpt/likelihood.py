"""How likely a model finds the continuations of texts: the basis of HellaSwag and of other benchmarks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.cli import Progress
from minigpt.distributed import Processes
from model import GPT, IGNORE_INDEX, eval_mode

BATCH_SIZE = 64  # rows; batches are the same for any number of processes, and so are the rounding errors


@torch.no_grad()
def score_continuations(
    model: GPT, pairs: Sequence[tuple[list[int], list[int]]], procs: Processes, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every continuation, and whether greedy decoding would generate it.

    Rows of similar length share a batch. Batches are distributed over the processes in turn; all get all results.

    Args:
        model: the raw model, in train or eval mode.
        pairs: tokens of each context, at least one, and of its continuation. If they are longer than the model's
            context, the beginning is dropped.
        progress: counts pairs.

    Returns:
        losses: (n,) float64, summed over the tokens of the continuation, in nats.
        greedy: (n,) bool. Both are on the CPU.
    """
    rows = [build_row(context, continuation, model.config.block_size) for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    batches = [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    with eval_mode(model), procs.autocast():
        for batch in batches[procs.rank :: procs.world_size]:
            sums[batch] = score_batch(model, [rows[i] for i in batch], procs)
            if progress is not None:
                progress.update(min(len(batch) * procs.world_size, len(rows) - progress.done))
    if procs.world_size > 1:
        sums = procs.all_reduce(sums.to(procs.device)).cpu()
    return sums[:, 0], sums[:, 1] == 0


def build_row(context: list[int], continuation: list[int], block_size: int) -> tuple[list[int], int]:
    """Return the last tokens of context and continuation that fit the model, and how many are the continuation's."""
    tokens = [*context, *continuation][-block_size - 1 :]
    return tokens, min(len(continuation), len(tokens) - 1)


def score_batch(model: GPT, rows: Sequence[tuple[list[int], int]], procs: Processes) -> Tensor:
    """Return, for the last n tokens of each row of (tokens, n), the summed loss and the number of unlikely tokens.

    A token is unlikely if another one is more likely. The result is (rows, 2) float64, on the CPU.
    """
    length = max(len(tokens) for tokens, _ in rows) - 1
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for i, (tokens, n) in enumerate(rows):
        end = len(tokens) - 1
        inputs[i, :end] = torch.tensor(tokens[:-1])
        targets[i, end - n : end] = torch.tensor(tokens[len(tokens) - n :])
    inputs, targets = inputs.to(procs.device), targets.to(procs.device)
    in_continuation = targets != IGNORE_INDEX
    hidden, targets = model.hidden(inputs)[in_continuation], targets[in_continuation]  # (tokens of all rows, C)
    scores = []
    for h, t in zip(hidden.split(1024), targets.split(1024), strict=True):  # not all logits in memory at once
        logits = model.logits(h).float()
        scores.append(torch.stack([F.cross_entropy(logits, t, reduction="none"), logits.argmax(dim=-1) != t], dim=1))
    row_of_token = in_continuation.nonzero()[:, 0].cpu()
    return torch.zeros(len(rows), 2, dtype=torch.float64).index_add_(0, row_of_token, torch.cat(scores).cpu().double())
