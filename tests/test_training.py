"""One training step and one validation against plain computations of the same thing; schedule and batch arithmetic."""

import copy
import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import ROOT
from screenshot import free_port
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import pretrain
from minigpt import distributed, optim, training
from minigpt.cli import UserError
from minigpt.dataset import Batch, TokenDataset, val_batches
from minigpt.distributed import Processes, find_device, find_dtype, init_processes
from minigpt.optim import Schedule, build_optimizer, orthogonalize, orthogonalize_distributed
from minigpt.parallel import eager_model, parallelize
from minigpt.training import (
    build_scaler,
    build_schedule,
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
    matrices, embeddings, vectors = build_optimizer(small_model(), 1e-3, 0.1).param_groups
    assert (matrices["weight_decay"], embeddings["weight_decay"], vectors["weight_decay"]) == (0.1, 0.1, 0.0)
    assert all(p.dim() == 2 for p in [*matrices["params"], *embeddings["params"]])
    assert all(p.dim() == 1 for p in vectors["params"])


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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gradients_that_overflow_float16_change_nothing_but_the_scale(name):
    model, half = small_model(), replace(ALONE, dtype=torch.float16)
    optimizer, scaler = build_optimizer(model, 1e-2, 0.1, name), torch.amp.GradScaler("cpu", init_scale=2.0**30)
    batch, initial, scale = ragged_batch(2), copy.deepcopy(model.state_dict()), 2.0**30
    while True:
        metrics = train_step(model, [batch], optimizer, 1e-2, 1.0, half, scaler=scaler)
        if metrics["grad_norm"].isfinite():
            break
        scale /= 2
        assert metrics["loss"].isfinite() and metrics["loss_scale"] == scale
        assert all(torch.equal(initial[name], weight) for name, weight in model.state_dict().items())
    assert metrics["loss_scale"] == scale < 2.0**30
    single = small_model()
    plain = train_step(single, [batch], build_optimizer(single, 1e-2, 0.1, name), 1e-2, 1.0, ALONE)
    assert metrics["grad_norm"].item() == pytest.approx(plain["grad_norm"].item(), rel=1e-2)
    assert not all(torch.equal(initial[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "bf16, capability, expected",
    [(True, (9, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), "float32")],
)
def test_the_default_precision_of_a_gpu(monkeypatch, bf16, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert find_dtype(None, torch.device("cuda")) == getattr(torch, expected)
    assert build_scaler(replace(ALONE, dtype=getattr(torch, expected))).is_enabled() == (expected == "float16")


# ---- Muon ------------------------------------------------------------------------------------------------------------


def test_muon_equals_torch(monkeypatch):
    """Of query, key and value apart, and of the other matrices; torch's own computes in bfloat16 unless patched."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    model = small_model()
    plain = copy.deepcopy(model)
    optimizer = build_optimizer(model, 1e-2, 0.1, "muon", 2e-3)
    oracles = []
    for block in plain.h:
        for layer in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            oracles.append((layer.weight, [layer.weight]))
        parts = [nn.Parameter(part.detach().clone()) for part in block.attn.c_attn.weight.chunk(3)]
        oracles.append((block.attn.c_attn.weight, parts))
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon([part for _, parts in oracles for part in parts], **options)
    matrices = {id(weight) for weight, _ in oracles}
    others = [p for p in plain.parameters() if id(p) not in matrices]
    adamw = torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for seed in range(5):
        torch.manual_seed(seed)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            theirs.grad = torch.randn_like(theirs)
            ours.grad = theirs.grad.clone()
        for weight, parts in oracles:
            for part, gradient in zip(parts, weight.grad.chunk(len(parts)), strict=True):
                part.grad = gradient.clone()
        for group in optimizer.param_groups[1:]:
            group["lr"] = 2e-3
        for each in (optimizer, muon, adamw):
            each.step()
    for weight, parts in oracles:
        weight.data.copy_(torch.cat([part.detach() for part in parts]))
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (1, 64, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices)
    product = u.mT @ found @ vh.mT
    torch.testing.assert_close(product, torch.diag_embed(product.diagonal(dim1=1, dim2=2)))  # the same directions
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.25 and values[s > 0.05 * s.max()].min() > 0.65


@pytest.mark.parametrize(("world_size", "n_matrices"), [(2, 4), (3, 4), (4, 3)])
def test_processes_share_the_orthogonalization(monkeypatch, world_size, n_matrices):
    """Every process receives the result of one process, even if the matrices do not divide evenly."""
    matrices = torch.randn(n_matrices, 8, 16, generator=torch.Generator().manual_seed(0))
    expected, shares = orthogonalize(matrices), []

    def all_gather(gathered: list[torch.Tensor], own: torch.Tensor) -> None:
        shares.append(own)
        if len(shares) == world_size:
            for tensor, share in zip(gathered, shares, strict=True):
                tensor.copy_(share)

    for rank in range(world_size):
        group = mock.Mock(all_gather=all_gather)
        group.get_world_size.return_value, group.get_rank.return_value = world_size, rank
        monkeypatch.setattr(optim, "dist", group)
        found = orthogonalize_distributed(matrices)
    torch.testing.assert_close(found, expected)
    assert [len(share) for share in shares] == [math.ceil(n_matrices / world_size)] * world_size


def test_muon_trains_the_matrices_of_the_blocks():
    model = small_model()
    muon, *adamw = build_optimizer(model, 1e-2, 0.1, "muon", 4e-3).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p].split(".", 2)[2] for p in muon["params"]} == {
        *("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    }
    assert len(muon["params"]) + sum(len(group["params"]) for group in adamw) == len(names)
    assert [group["weight_decay"] for group in (muon, *adamw)] == [0.1, 0.0, 0.0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rates_keep_their_ratio(name):
    model = small_model()
    optimizer = build_optimizer(model, 1e-2, 0.1, name, 4e-3)
    train_step(model, [ragged_batch(2)], optimizer, 5e-3, 1.0, ALONE)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 2e-3, 2e-3]


def test_wsd_schedule():
    """Up in a straight line, constant, down to zero in a straight line."""
    schedule = Schedule("wsd", 1.0, 100, 10, 0.4)
    rates = [schedule.get_lr(step) for step in range(100)]
    assert schedule.decay_start == 60
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:61]) == {1.0}
    assert rates[60:] == pytest.approx([1 - i / 40 for i in range(40)])
    assert [Schedule("wsd", 1.0, 4, 0, 0.0).get_lr(step) for step in range(4)] == [1.0] * 4


@pytest.mark.parametrize(("name", "steps", "last"), [("cosine", 10, 10), ("wsd", 100, 70)])
def test_the_warmup_must_end_before_the_decay(name, steps, last):
    schedule = Schedule(name, 1.0, steps, last, 0.3)
    schedule.check()
    with pytest.raises(UserError, match=rf"the {last + 1} steps of the warmup are more than the {last} before"):
        replace(schedule, warmup_steps=last + 1).check()


def test_the_default_warmup():
    assert build_schedule(pretrain.Config(), 100).warmup_steps == 4
    assert build_schedule(pretrain.Config(warmup_steps=0), 100).warmup_steps == 0


def test_schedule():
    """Up in a straight line, a cosine down to a tenth, never above the highest and never zero."""
    rates = [Schedule("cosine", 1e-3, 100, 10, 0.3).get_lr(step) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(1e-3) and rates[10] == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(0.55e-3)  # half of the way down: the mean of 1 and 0.1
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(1e-4, rel=0.01)
    assert Schedule("cosine", 1e-3, 1, 0, 0.3).get_lr(0) == 1e-3


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
    with pytest.raises(UserError, match=r"did not find each other at 127\.0\.0\.1:\d+ \(they wait for 1 seconds\): "):
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


def test_training_shapes_are_compiled_and_others_are_not(monkeypatch):
    """The last batch of a validation is smaller, and a second shape must not break the graph."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    model = small_model()
    trained = parallelize(copy.deepcopy(model), ALONE, compile=True)
    for rows in (4, 3):
        batch = Batch(*torch.randint(50, (2, rows, 16)))
        losses = [forward(batch.tokens, batch.targets).item() for forward in (trained, model)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    n_compiled = counter.frame_count
    assert n_compiled == 4  # blocks and loss, for each shape
    with eager_model(trained):
        for rows, length in ((3, 16), (3, 5), (1, 1)):
            tokens = torch.randint(50, (rows, length))
            torch.testing.assert_close(trained.hidden(tokens), model.hidden(tokens))
    trained(batch.tokens, batch.targets)
    assert counter.frame_count == n_compiled and "forward" in vars(trained.h[0])


SPLIT = """
import functools, sys, torch
from torch import nn
sys.path.insert(0, {root!r})
from minigpt.dataset import Batch
from minigpt.distributed import init_processes
from minigpt.parallel import full_tensor, parallelize, shard
from minigpt.optim import build_optimizer, local_rows
from minigpt.training import build_scaler, train_step
from model import GPT, GPTConfig

shape, optimizer, dtype, *flags = sys.argv[1:]
n_layer, n_embd = map(int, shape.split("x"))
torch.compile = functools.partial(torch.compile, backend="aot_eager")
nn.parallel.DistributedDataParallel = functools.partial(nn.parallel.DistributedDataParallel, bucket_cap_mb=1)
procs = init_processes("cpu", dtype)
torch.manual_seed(0)
model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=n_layer, n_head=2, n_embd=n_embd))
model.activation_checkpointing = "checkpointing" in flags
tokens = torch.randint(50, (12, 8)).chunk(procs.world_size)[procs.rank]
if "shard" in flags:
    shard(model, procs)
optimizer, scaler = build_optimizer(model, 1e-2, 0.1, optimizer), build_scaler(procs)
trained = parallelize(model, procs, compile="compile" in flags and procs.world_size > 1)


def on_micro_batch(done, total):
    if step == 2 and (procs.is_main or "shard" not in flags):  # with sharding, in the rows of one process
        local_rows(model.wte.weight.grad)[0, 0] = torch.inf


for step in range(4):
    options = (1e-2, 0.5, procs, (0, step), on_micro_batch, scaler)
    metrics = train_step(trained, [Batch(tokens, tokens)] * 2, optimizer, *options)
    norm = full_tensor(nn.utils.get_total_norm(list(model.parameters())))
    if procs.is_main:
        print(metrics["loss"].item(), metrics["grad_norm"].item(), norm.item(), scaler.get_scale())
procs.close()
"""


def train_split(run_script: Callable, folder: Path, processes: int, *args: str) -> list[list[float]]:
    """Return loss, gradient norm, norm of the weights and loss scale after each of 4 steps, of which one is skipped."""
    (folder / "split.py").write_text(SPLIT.format(root=str(ROOT)))
    output = run_script(folder / "split.py", *args, processes=processes).stdout
    return [list(map(float, line.split())) for line in output.splitlines()]


def test_ddp_with_several_buckets_and_compiled_equals_one_process(run_script, tmp_path):
    """A block of 3 MB fills several buckets of 1 MB; smaller models have one bucket only."""
    one, two = (train_split(run_script, tmp_path, n, "3x256", "adamw", "float32", "compile") for n in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("optimizer", "dtype", "flags"),
    [
        ("adamw", "float32", ()),
        ("adamw", "float16", ()),
        ("muon", "float32", ()),
        ("muon", "float32", ("compile", "checkpointing")),
    ],
)
def test_sharded_equals_one_process(run_script, tmp_path, optimizer, dtype, flags):
    """The rows of the matrices, 10 and 30, do not divide into three equal shares, nor do the 2 or 5 matrices."""
    args = ("5x10", optimizer, dtype, *flags)
    one, three = train_split(run_script, tmp_path, 1, *args), train_split(run_script, tmp_path, 3, *args, "shard")
    torch.testing.assert_close(three, one, rtol=1e-4 if dtype == "float32" else 1e-2, atol=0, equal_nan=True)
    assert one[1][2] == one[2][2] != one[3][2]  # weights after the second, the skipped and the last step


def test_all_processes_run_the_model_equally_often(text_data, monkeypatch):
    """The forward pass of a sharded model is a collective operation. Five rows or items on four processes."""
    data, n_rows = TokenDataset(text_data, 64), 0
    for rank in range(4):
        batches = list(val_batches(data, 5, 1, rank, 4))
        assert len(batches) == 2
        n_rows += sum(int((batch.targets != IGNORE_INDEX).any()) for batch in batches)
        calls = []
        monkeypatch.setattr(Processes, "all_gather", lambda self, value: [value] * 4)
        replace(ALONE, rank=rank, world_size=4).map(calls.append, range(5))
        assert calls == [rank, min(4 + rank, 4)]
    assert n_rows == 5


# ---- the size of a micro-batch -------------------------------------------------------------------------------------


def choose_size(
    micro_batch_size: int | None, saved_flags: dict, rows: int = 24, procs: Processes = ALONE, block_size: int = 1024
):
    data = SimpleNamespace(block_size=block_size)
    config = SimpleNamespace(micro_batch_size=micro_batch_size, batch_tokens=rows * block_size)
    config.shard, config.activation_checkpointing = False, False
    return choose_micro_batch_size(config, saved_flags, None, data, None, procs)


def test_the_size_of_a_micro_batch():
    """The flag; else the saved size, if it divides; else on a CPU the largest that divides, up to 4,096 tokens."""
    assert choose_size(3, {"micro_batch_size": 8}) == 3
    assert choose_size(None, {"micro_batch_size": 6}) == 6
    assert choose_size(None, {"micro_batch_size": 6, "shard": True}) == 4  # another size may fit
    assert choose_size(None, {"micro_batch_size": 7}) == choose_size(None, {}) == 4
    assert choose_size(None, {}, procs=replace(ALONE, world_size=12)) == 2
    assert choose_size(None, {}, rows=64, block_size=64) == 64
    assert choose_size(None, {}, rows=7, block_size=64) == 7
    assert choose_size(None, {}, rows=5) == choose_size(None, {}, block_size=9999) == 1


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
    monkeypatch.setattr(Processes, "peak_memory", lambda self: model.kept)
    monkeypatch.setattr(Processes, "total_memory", lambda self: 10)
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


@pytest.mark.parametrize(("most", "expected"), [(99, 16), (8, 8), (4, 4), (2, 2), (0, None)])
def test_the_largest_size_that_fits_compiled(monkeypatch, most, expected):
    """It can be larger or smaller than that of the model that is not compiled, 4."""
    model, data = OutOfMemory(small_model().config), SimpleNamespace(n_rows={"train": 3}, block_size=8)
    data.batch = lambda split, rows: Batch(*torch.randint(50, (2, len(rows), 8)))
    model.most, model.kept = 5, 0
    monkeypatch.setattr(training, "compile_blocks", lambda model: setattr(model, "most", most))
    monkeypatch.setattr(Processes, "peak_memory", lambda self: 0)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    arguments = (model, data, build_optimizer(model, 1e-3, 0.1), [1, 2, 4, 8, 16], ALONE, True)
    if expected is None:
        with pytest.raises(UserError, match="not even one row fits"):
            find_max_micro_batch_size(*arguments)
    else:
        assert find_max_micro_batch_size(*arguments) == expected


@pytest.mark.parametrize(
    ("world_size", "resumed", "sharded", "copies"),
    [(1, False, False, 2), (2, False, False, 3), (1, True, False, 0), (2, True, False, 1), (2, False, True, 2)],
)
def test_the_search_reserves_memory_for_optimizer_and_ddp(monkeypatch, world_size, resumed, sharded, copies):
    model, data = small_model(), SimpleNamespace(n_rows={"train": 3}, block_size=8)
    data.batch = lambda split, rows: Batch(*torch.randint(50, (2, len(rows), 8)))
    optimizer, reserved = build_optimizer(model, 1e-3, 0.1), []
    if resumed:
        train_step(model, [data.batch("train", [0])], optimizer, 1e-3, 1.0, ALONE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: reserved.append(shape) or empty(*shape, **options))
    monkeypatch.setattr(Processes, "peak_memory", lambda self: 0)
    monkeypatch.setattr(Processes, "all_reduce", lambda self, tensor: tensor)
    monkeypatch.setattr(Processes, "all_gather", lambda self, value: [value])
    monkeypatch.setattr(training, "is_sharded_model", lambda model: sharded)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    find_max_micro_batch_size(model, data, optimizer, [1, 2], replace(ALONE, world_size=world_size))
    assert reserved[0] == (copies, model.config.num_parameters // (world_size if sharded else 1))


@pytest.mark.parametrize(
    ("fixed", "per_row", "expected", "tried"),
    [(0.1, 0.01, 16, [1, 2, 4, 8, 16]), (0.1, 0.1, 8, [1, 2, 4, 8]), (0.5, 0.1, 1, [1]), (0.9, 0.1, None, [1])],
)
def test_the_sizes_of_a_sharded_model_are_tried_if_they_fit(monkeypatch, fixed, per_row, expected, tried):
    """A process that runs out of memory alone would leave the others waiting for it."""
    sizes = []
    monkeypatch.setattr(
        training, "measure_memory", lambda model, size, *args: sizes.append(size) or fixed + per_row * size
    )
    monkeypatch.setattr(training, "is_sharded_model", lambda model: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    model = small_model()
    search = functools.partial(find_max_micro_batch_size, model, None, build_optimizer(model, 1e-3, 0.1))
    if expected is None:
        with pytest.raises(UserError, match="not even one row fits"):
            search([1, 2, 4, 8, 16], ALONE)
    else:
        assert search([1, 2, 4, 8, 16], ALONE) == expected
    assert sizes == tried


def test_deterministic_reaches_inductor():
    code = (
        "from minigpt.distributed import init_processes; init_processes('cpu', None, deterministic=True);"
        "import torch._inductor.config as config; print(config.deterministic)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize(("capability", "expected"), [((6, 1), False), ((7, 0), True), ((9, 0), True), (None, False)])
def test_compile_by_default_where_triton_runs(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert pretrain.Config().compile is expected
