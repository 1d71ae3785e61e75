"""One training step and one validation against plain computations of the same thing; schedule and batch arithmetic."""

import copy
import functools
import itertools
import math
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from screenshot import free_port
from torch.nn import functional as F

from minigpt import distributed
from minigpt.cli import UserError
from minigpt.dataset import Batch
from minigpt.distributed import Processes, find_device, find_dtype, init_processes, parallelize
from minigpt.optim import build_optimizer, get_lr
from minigpt.training import (
    choose_micro_batch_size,
    find_max_micro_batch_size,
    get_batch_size,
    seed_dropout,
    train_step,
    validate,
)
from model import GPT, IGNORE_INDEX, GPTConfig

CPU = torch.device("cpu")
ALONE = Processes(rank=0, world_size=1, device=CPU, dtype=torch.float32)


def small_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, dropout=dropout))


def ragged_batch(rows: int) -> Batch:
    """Rows with different numbers of targets."""
    tokens = torch.randint(0, 50, (rows, 17), generator=torch.Generator().manual_seed(rows))
    targets = tokens[:, 1:].clone()
    for row in range(rows):
        targets[row, : 2 * row] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), targets)


def split(batch: Batch, size: int) -> list[Batch]:
    return [Batch(*pair) for pair in zip(batch.tokens.split(size), batch.targets.split(size), strict=True)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6])
def test_step_equals_plain_torch(micro_batch_size):
    """Loss, gradient norm and weights equal those of one mean over all targets, for any split into micro-batches."""
    batch, model = ragged_batch(6), small_model()
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = build_optimizer(model, 1e-2, 0.1), build_optimizer(plain, 1e-2, 0.1)
    metrics = train_step(model, split(batch, micro_batch_size), optimizer, 1e-2, 0.5, ALONE)

    loss = F.cross_entropy(plain(batch.tokens).flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    plain_optimizer.step()
    assert math.isclose(metrics["loss"].item(), loss.item(), rel_tol=1e-6)
    assert math.isclose(metrics["grad_norm"].item(), norm.item(), rel_tol=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_step_reports_each_micro_batch():
    model, calls = small_model(), []
    optimizer = build_optimizer(model, 1e-2, 0.1)
    train_step(model, split(ragged_batch(6), 2), optimizer, 1e-2, 0.5, ALONE, (0, 0), lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    validate(model, split(ragged_batch(6), 2), ALONE, calls.append)
    assert calls[3:] == [1, 2, 3]


def test_step_sets_the_learning_rate():
    model = small_model()
    optimizer = build_optimizer(model, 1.0, 0.1)
    before = copy.deepcopy(model.state_dict())
    train_step(model, [ragged_batch(2)], optimizer, 0.0, 1.0, ALONE)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_weight_decay_on_matrices_only():
    decayed, plain = build_optimizer(small_model(), 1e-3, 0.1).param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(p.dim() == 1 for p in plain["params"])


def test_validation_is_the_exact_mean_and_leaves_no_trace():
    """Batches weigh by their number of targets; dropout is off; mode and random state do not change."""
    batch, model = ragged_batch(7), small_model(dropout=0.5)
    model.train()
    random_state = torch.get_rng_state()
    found = validate(model, split(batch, 3), ALONE)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        logits = model.eval()(batch.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1).double(), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
    assert math.isclose(found, expected.item(), rel_tol=1e-6)


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    def draw(*key: int) -> float:
        seed_dropout(*key)
        return torch.rand(()).item()

    keys = [(seed, step, micro) for seed in (0, 1) for step in (0, 1, 2) for micro in (0, 1)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(1, 2, 1) == draw(1, 2, 1)


def test_schedule():
    """Up in a straight line, a cosine down to a tenth, never above the highest and never zero."""
    rates = [get_lr(step, 100, 1e-3, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(0.55e-3)  # half of the way down: the mean of 1 and 0.1
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert get_lr(0, 1, 1e-3, 0.0) == 1e-3


def test_batch_rows():
    assert get_batch_size(524_288, 16, 1024, 8) == 512
    with pytest.raises(
        UserError, match=r"--batch_tokens 500000 is not a multiple of 131072 .*use --batch_tokens 524288"
    ):
        get_batch_size(500_000, 16, 1024, 8)
    with pytest.raises(UserError, match="use --batch_tokens 16384"):
        get_batch_size(100, 16, 1024, 1)


def test_device_and_precision():
    assert find_device("cpu") == CPU
    assert find_dtype(None, CPU) == torch.float32 and find_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UserError, match="--device nonsense"):
        find_device("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no such device"):
            find_device("cuda")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_do_not_wait_for_ever_at_the_start(monkeypatch, rank):
    """Rank 0 waits for another process, rank 1 for the store that rank 0 or torchrun serves."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2, "RANK": rank}
    for name, value in address.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "START_TIMEOUT", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "stop_with_launcher", lambda: None)
    with pytest.raises(UserError, match="the 2 processes did not all start within 1 seconds; is torchrun"):
        init_processes("cpu", None)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_kernels_are_asked_for(monkeypatch, deterministic):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the function would leave set
    try:
        init_processes("cpu", None, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_changes_the_precision_of_products_only():
    batch, model = ragged_batch(2), small_model()
    half = Processes(0, 1, CPU, torch.bfloat16)
    full_loss = validate(model, [batch], ALONE)
    half_loss = validate(model, [batch], half)
    assert half_loss != full_loss and math.isclose(half_loss, full_loss, rel_tol=1e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_every_shape_is_compiled_as_one_graph(monkeypatch):
    """The last batch of a validation is smaller, and a second shape must not break the graph."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    model = small_model()
    trained = parallelize(model, ALONE, compile=True)
    for rows, length in ((4, 8), (3, 8), (3, 5), (1, 1)):
        batch = Batch(*torch.randint(50, (2, rows, length)))
        losses = [forward(batch.tokens, batch.targets).item() for forward in (trained, model)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- the size of a micro-batch -------------------------------------------------------------------------------------


def choose_size(
    micro_batch_size: int | None, saved_flags: dict, rows: int = 24, procs: Processes = ALONE, block_size: int = 1024
):
    data = SimpleNamespace(block_size=block_size)
    config = SimpleNamespace(micro_batch_size=micro_batch_size, batch_tokens=rows * block_size)
    return choose_micro_batch_size(config, saved_flags, None, data, None, procs)


def test_the_size_of_a_micro_batch():
    """The flag; else the saved size, if it divides; else a power of two that divides, about 4,096 tokens."""
    assert choose_size(3, {"micro_batch_size": 8}) == 3
    assert choose_size(None, {"micro_batch_size": 6}) == 6
    assert choose_size(None, {"micro_batch_size": 7}) == choose_size(None, {}) == 4
    assert choose_size(None, {}, procs=replace(ALONE, world_size=12)) == 2
    assert choose_size(None, {}, rows=64, block_size=64) == 64
    assert choose_size(None, {}, rows=3) == choose_size(None, {}, block_size=9999) == 1


class OutOfMemory(GPT):
    """A model that runs out of memory above `most` rows; each row takes a tenth of it, which is cached."""

    def forward(self, tokens, *args):
        if len(tokens) > self.most:
            raise torch.OutOfMemoryError("too much")
        self.kept += len(tokens)
        return super().forward(tokens, *args)


@pytest.mark.parametrize(("most", "expected"), [(99, 8), (5, 4), (1, 1), (0, None)])
def test_the_largest_size_that_fits(monkeypatch, most, expected):
    model, data = OutOfMemory(small_model().config), SimpleNamespace(n_rows={"train": 3}, block_size=8)
    data.batch = lambda split, rows: Batch(*torch.randint(50, (2, len(rows), 8)))
    model.most, model.kept = most, 0
    monkeypatch.setattr(Processes, "peak_memory", lambda self: model.kept / 10)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: setattr(model, "kept", 0))
    before = copy.deepcopy(model.state_dict())
    search = functools.partial(find_max_micro_batch_size, model, data, build_optimizer(model, 1e-3, 0.1))
    if expected is None:
        with pytest.raises(UserError, match="not even one row fits"):
            search([1, 2], ALONE)
    else:
        assert search([1, 2, 4, 8, 16], ALONE) == expected
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
