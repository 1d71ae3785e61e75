"""A run's folder: what is taken up, what is refused, what is logged."""

import json
import signal
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import runs
from cli import UserError
from model import GPT, GPTConfig
from runs import PEAK_FLOPS, Log, Run, peak_flops
from training import Processes, build_optimizer

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
DATA = SimpleNamespace(fingerprint="abc", tokenizer=SimpleNamespace(name="bytes"), meta={"source": {"files": []}})
SHAPE = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)


@dataclass(frozen=True)
class Flags:
    run: str
    lr: float = 1e-3
    keep: int = 2
    val_every: int = 5
    max_minutes: float | None = None
    log: tuple = ()


@pytest.fixture(autouse=True)
def several_runs_in_one_process(monkeypatch):
    """A run listens to signals and locks its folder until the process ends; this process goes on to the next test."""
    monkeypatch.setattr(runs, "lock", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def flags(tmp_path) -> Flags:
    return Flags(str(tmp_path / "run"))


def open_run(flags: Flags, shape: GPTConfig = SHAPE, data=DATA) -> tuple[Run, GPT, torch.optim.Optimizer, int]:
    """A run as a script opens it."""
    run, model = Run(flags, data, ALONE), GPT(shape)
    optimizer = build_optimizer(model, 1e-3, 0.1)
    return run, model, optimizer, run.resume(model, optimizer)


def rows(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.log_file.read_text().splitlines()]


def test_a_new_run_begins_at_step_zero_and_goes_on_from_the_newest(flags):
    run, model, optimizer, step = open_run(flags)
    assert step == 0
    run.save(3, model, optimizer, {"val_loss": 2.0})
    run.save(6, model, optimizer, {"val_loss": 1.0})
    _, again, _, step = open_run(flags)
    assert step == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_defines_the_run_may_not_change(flags):
    run, model, optimizer, _ = open_run(flags)
    run.save(3, model, optimizer, {})
    assert open_run(replace(flags, val_every=7, keep=9))[3] == 3
    with pytest.raises(UserError, match=r"not this one: lr was 0\.001 and is now 0\.002;"):
        open_run(replace(flags, lr=2e-3))
    with pytest.raises(UserError, match="data was abc and is now xyz"):
        open_run(flags, data=SimpleNamespace(**vars(DATA) | {"fingerprint": "xyz"}))
    with pytest.raises(UserError, match="n_head was 1 and is now 2"):
        open_run(flags, replace(SHAPE, n_head=2))


def test_a_folder_of_something_else_is_left_alone(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already holds something else"):
        open_run(flags)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(flags, tmp_path):
    for name in ("tensorboard", "wandb"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0}\n')
    assert open_run(flags)[3] == 0


@pytest.mark.parametrize("saved, kept", [(3, [0, 1, 2, 3]), (None, [])])
def test_rows_after_the_checkpoint_are_dropped(flags, saved, kept):
    """They will come again; a line that a crash cut short goes too."""
    run, model, optimizer, _ = open_run(flags)
    if saved is not None:
        run.save(saved, model, optimizer, {})
    run.log_file.write_text("".join(f'{{"step": {step}}}\n' for step in range(6)) + '{"step": 2, "lo')
    open_run(flags)
    assert [row["step"] for row in rows(run)] == kept


def test_rows_have_what_people_plot(flags, capsys):
    run, model, _, _ = open_run(flags)
    log = Log(run, model, step=0, steps=2, batch_tokens=16)
    log.validation(0, 5.5)
    log.step(1, {"loss": torch.tensor(2.5), "grad_norm": torch.tensor(0.5)}, 1e-3, started=time.perf_counter() - 0.5)
    log.close()
    validation, step = rows(run)
    assert validation == {"step": 0, "tokens": 0, "val_loss": 5.5}
    assert step.pop("tokens_per_s") > 0 and step.pop("mfu") >= 0
    assert step == {"step": 1, "tokens": 16, "loss": 2.5, "grad_norm": 0.5, "lr": 1e-3}
    printed = capsys.readouterr().out
    assert "TFLOP/s" in printed and "validation loss 5.5000" in printed and "loss 2.5000" in printed


def test_only_the_first_process_writes(flags):
    run, model, optimizer, _ = open_run(flags)
    run.procs, run.config = replace(ALONE, rank=1), replace(flags, log=("tensorboard",))
    Log(run, model, 0, 1, 16).validation(0, 1.0)
    run.save(1, model, optimizer, {})
    assert not run.log_file.exists() and not checkpoint.checkpoints(run.folder)
    assert not (run.folder / "tensorboard").exists()


def test_peak_is_measured_on_cpu():
    flops, source = peak_flops(ALONE)
    assert 1e9 < flops < 1e14 and source == "cpu, measured"


@pytest.mark.parametrize(
    "name, part",
    [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100")],
)
def test_peak_of_a_known_gpu_is_its_data_sheets(monkeypatch, name, part):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    procs = Processes(0, 1, torch.device("cuda", 0), torch.bfloat16)
    assert peak_flops(procs) == (PEAK_FLOPS[part], f"{name}, data sheet")


def test_a_similar_name_is_not_a_known_gpu(monkeypatch):
    """An A1000 is no A100: nothing matches, so the peak is measured."""

    class MeasuredError(Exception):
        pass

    def measure(*args, **kwargs):
        raise MeasuredError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")
    monkeypatch.setattr(torch, "randn", measure)
    with pytest.raises(MeasuredError):
        peak_flops(Processes(0, 1, torch.device("cuda", 0), torch.bfloat16))


def test_a_resumed_run_is_one_training(flags):
    """A finetuning that goes on is loaded from its own checkpoint, whose history has this training in it already."""
    _, model, optimizer, _ = open_run(flags)
    before = [{"source": "gpt2"}]
    Run(flags, DATA, ALONE, before).save(3, model, optimizer, {})
    assert Run(flags, DATA, ALONE, [*before, {"source": "itself"}]).history == before
