"""Log-likelihoods of continuations, for HellaSwag and the tasks of lm_eval."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.cli import Progress
from minigpt.distributed import Processes
from model import GPT, IGNORE_INDEX, eval_mode

BATCH_TOKENS = 16_384  # padding included


@torch.no_grad()
def score_continuations(
    model: GPT, requests: Sequence[tuple[list[int], list[int]]], procs: Processes, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every continuation, and whether greedy decoding would generate it.

    Rows of similar length share a batch, the longest first. Batches, and so the rounding errors, are the same for any
    number of processes, which compute them in turn.

    Args:
        model: the raw model, in train or eval mode.
        requests: tokens of each context and of its continuation, one token or more each. If they are longer than the
            model's context, the beginning is dropped.
        progress: counts requests.

    Returns:
        losses: (n,) float64, summed over the tokens of the continuation, in nats.
        greedy: (n,) bool, True if every token of the continuation is the most likely one. Both are on the CPU.
    """
    rows = [build_row(context, continuation, model.config.block_size) for context, continuation in requests]

    def score(batch: list[int]) -> list[tuple[float, int]]:
        scores = score_batch(model, [rows[i] for i in batch], procs)
        if progress is not None:
            progress.update(min(len(batch) * procs.world_size, len(rows) - progress.done))
        return scores

    losses, n_mismatches = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows))
    batches = build_batches([len(tokens) for tokens, _ in rows])
    with eval_mode(model), procs.autocast():
        for batch, scores in zip(batches, procs.map(score, batches), strict=True):
            for i, (loss, mismatches) in zip(batch, scores, strict=True):
                losses[i], n_mismatches[i] = loss, mismatches
    return losses, n_mismatches == 0


def build_row(context: list[int], continuation: list[int], block_size: int) -> tuple[list[int], int]:
    """Return the last tokens of context and continuation that fit, and how many of them belong to the continuation."""
    tokens = [*context, *continuation][-block_size - 1 :]
    return tokens, min(len(continuation), len(tokens) - 1)


def build_batches(lengths: Sequence[int]) -> list[list[int]]:
    """Return batches of row numbers, the longest rows first; each has at most `BATCH_TOKENS` tokens or one row."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while order:
        n = max(1, BATCH_TOKENS // lengths[order[0]])
        batches.append(order[:n])
        order = order[n:]
    return batches


def score_batch(model: GPT, rows: Sequence[tuple[list[int], int]], procs: Processes) -> list[tuple[float, int]]:
    """Return the summed loss of the last n tokens of each row of (tokens, n), and how many differ from the argmax."""
    length = max(len(tokens) for tokens, _ in rows) - 1
    if procs.device.type == "cuda":  # cuDNN attention builds a plan for each new length
        length = min(math.ceil(length / 64) * 64, model.config.block_size)
    inputs = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORE_INDEX)
    for i, (tokens, n) in enumerate(rows):
        end = len(tokens) - 1
        inputs[i, :end] = torch.tensor(tokens[:-1])
        targets[i, end - n : end] = torch.tensor(tokens[-n:])
    inputs, targets = inputs.to(procs.device), targets.to(procs.device)
    in_continuation = targets != IGNORE_INDEX
    hidden, targets = model.hidden(inputs)[in_continuation], targets[in_continuation]  # (tokens of all rows, C)
    losses, mismatches = [], []
    for h, t in zip(hidden.split(1024), targets.split(1024), strict=True):  # not all logits in memory at once
        logits = model.logits(h).float()
        losses.append(F.cross_entropy(logits, t, reduction="none").cpu().double())
        mismatches.append((logits.argmax(dim=-1) != t).cpu())
    row_of_token = in_continuation.nonzero()[:, 0].cpu()
    loss_sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row_of_token, torch.cat(losses))
    counts = torch.zeros(len(rows), dtype=torch.int64).index_add_(0, row_of_token, torch.cat(mismatches).long())
    return list(zip(loss_sums.tolist(), counts.tolist(), strict=True))
