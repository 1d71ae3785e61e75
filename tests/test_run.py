"""A run folder: what can be resumed, what is rejected, and which log rows are kept."""

import json
import signal
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import edit_manifest
from safetensors.torch import load_file

import finetune
import pretrain
from minigpt import checkpoint, run, runs
from minigpt.cli import UserError, resumable
from minigpt.distributed import Processes
from minigpt.files import sha256
from minigpt.metrics import MetricsLogger
from minigpt.optim import build_optimizer
from minigpt.run import Run
from minigpt.tokenizer import load_tokenizer
from minigpt.training import build_schedule
from model import GPT, GPTConfig

SINGLE = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)
DATA = SimpleNamespace(fingerprint="abc", tokenizer=load_tokenizer("bytes"), meta={"source": {"files": []}})
SCALER = torch.amp.GradScaler(enabled=False)
MODEL = GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)


@dataclass(frozen=True)
class Flags:
    out: str = resumable()
    lr: float = 1e-3
    steps: int = 10
    schedule: str = "cosine"
    warmup_steps: int | None = resumable(None)
    decay_fraction: float = 0.5
    keep: int = resumable(2)
    val_every: int = resumable(5)
    max_minutes: float | None = resumable(None)
    report_to: tuple = resumable(())


@pytest.fixture(autouse=True)
def many_runs_in_one_process(monkeypatch) -> Iterator[None]:
    """Undo what a run does for the lifetime of its process: it locks the folder and handles signals."""
    monkeypatch.setattr(run, "lock_folder", lambda folder: folder.mkdir(parents=True, exist_ok=True))
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def flags(tmp_path) -> Flags:
    return Flags(str(tmp_path / "run"))


def open_run(flags: Flags, model_config: GPTConfig = MODEL, data=DATA) -> tuple[Run, GPT, torch.optim.Optimizer, int]:
    """Open a run as the training scripts do; return it with model, optimiser and completed steps."""
    run, model = Run(flags, data, SINGLE, build_schedule(flags, flags.steps)), GPT(model_config)
    optimizer = build_optimizer(model, 1e-3, 0.1)
    return run, model, optimizer, run.resume(model, optimizer, SCALER)


def save(run: Run, step: int, model: GPT, optimizer: torch.optim.Optimizer, metrics: dict | None = None) -> None:
    """Write a checkpoint, and wait until it is complete."""
    run.save(step, model, optimizer, SCALER, metrics or {})
    run.finish_saving()


def test_new_run_starts_at_step_zero_and_resumes_from_the_newest_checkpoint(flags):
    run, model, optimizer, step = open_run(flags)
    assert step == 0
    save(run, 3, model, optimizer, {"val_loss": 2.0})
    save(run, 6, model, optimizer, {"val_loss": 1.0})
    _, resumed, _, step = open_run(flags)
    assert step == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_flags_that_define_the_run_cannot_change(flags):
    run, model, optimizer, _ = open_run(flags)
    save(run, 3, model, optimizer)
    assert open_run(replace(flags, val_every=7, keep=9))[3] == 3
    with pytest.raises(UserError, match=r"holds a different run: lr was 0\.001 and is now 0\.002;"):
        open_run(replace(flags, lr=2e-3))
    with pytest.raises(UserError, match="data was abc and is now xyz"):
        open_run(flags, data=SimpleNamespace(**vars(DATA) | {"fingerprint": "xyz"}))
    with pytest.raises(UserError, match="n_head was 1 and is now 2"):
        open_run(flags, replace(MODEL, n_head=2))


def test_checkpoint_without_a_newer_field_of_the_model_resumes(flags):
    """Such a field has its default in older checkpoints."""
    run, model, optimizer, _ = open_run(flags)
    save(run, 3, model, optimizer)
    file = run.folder / "step_000003" / "meta.json"
    meta = runs.read_meta(file.parent)
    assert meta["model"].pop("gelu") == "tanh"
    edit_manifest(file, model=meta["model"])
    assert open_run(flags)[3] == 3
    assert checkpoint.load_model(file.parent, meta).config == MODEL
    with pytest.raises(UserError, match="gelu was tanh and is now none"):
        open_run(flags, replace(MODEL, gelu="none"))


def test_flags_that_do_not_change_the_result_are_resumable():
    shared = {"out", "data", "micro_batch_size", "val_every", "save_every", "keep", "max_minutes", "report_to"}
    shared |= {"device", "dtype", "compile", "deterministic", "activation_checkpointing", "shard", "timeout_minutes"}
    shared |= {"warmup_steps"}  # compared with the schedule
    pretraining = {"dry_run", "gpu_dollars_per_hour", "hellaswag_every", "hellaswag_files", "sample_every"}
    for script, expected in ((pretrain, shared | pretraining | {"sample_prompts"}), (finetune, shared | {"best_by"})):
        found = {field.name for field in fields(script.Config) if "resumable" in field.metadata}
        assert found == expected


def test_folder_with_other_files_is_not_changed(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not a run"):
        open_run(flags)
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_run_without_checkpoint_starts_again(flags, tmp_path):
    for name in ("tensorboard", "wandb"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0}\n')
    assert open_run(flags)[3] == 0


@pytest.mark.parametrize(("saved", "kept"), [(3, [0, 1, 2, 3]), (None, [])])
def test_log_rows_after_the_checkpoint_are_dropped(flags, saved, kept):
    """Those steps will be logged again. A row truncated by a crash is dropped too."""
    run, model, optimizer, _ = open_run(flags)
    if saved is not None:
        save(run, saved, model, optimizer)
    run.log_file.write_text("".join(f'{{"step": {step}, "tokens": 0}}\n' for step in range(6)) + '{"step": 2, "lo')
    open_run(flags)
    assert [json.loads(line)["step"] for line in run.log_file.read_text().splitlines()] == kept


def test_only_the_first_process_writes(flags):
    run, model, optimizer, _ = open_run(flags)
    run.procs, run.config = replace(SINGLE, rank=1), replace(flags, report_to=("tensorboard",))
    MetricsLogger(run, model, 0, 1, 16, 1.0).log_validation(0, 1.0)
    save(run, 1, model, optimizer)
    assert not run.log_file.exists() and not runs.list_checkpoints(run.folder)
    assert not (run.folder / "tensorboard").exists()


def test_training_continues_while_a_checkpoint_is_written(flags, monkeypatch):
    """The checkpoint has the weights and the optimiser state of its step, although both change before it is written."""
    run, model, optimizer, _ = open_run(flags)
    may_write, write = threading.Event(), checkpoint.save

    def wait_and_write(*args: object) -> None:
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(checkpoint, "save", wait_and_write)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    tensors = model.state_dict() | checkpoint.optimizer_state_dict(model, optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run.save(1, model, optimizer, SCALER, {})
    assert not run.stop_requested() and not runs.list_checkpoints(run.folder)
    optimizer.step()
    may_write.set()
    run.finish_saving()
    folder = runs.find_newest(run.folder)
    files = [load_file(folder / f"{name}.safetensors") for name in ("model", "train_state")]
    assert all(torch.equal(tensor, before[name]) for file in files for name, tensor in file.items())
    assert len(before) == sum(map(len, files)) and not torch.equal(model.wte.weight, before["wte.weight"])


def test_a_checkpoint_that_cannot_be_written_ends_the_run(flags, monkeypatch):
    run, model, optimizer, _ = open_run(flags)
    monkeypatch.setattr(checkpoint, "save", mock.Mock(side_effect=UserError("the disk is full")))
    run.save(1, model, optimizer, SCALER, {})
    wait([run.pending_save])
    with pytest.raises(UserError, match="the disk is full"):
        run.stop_requested()
    with pytest.raises(UserError, match="the disk is full"):
        run.save(2, model, optimizer, SCALER, {})


def test_a_stopped_run_waits_for_its_checkpoint(flags, monkeypatch):
    """A job script must not find the file `stopped` before the checkpoint, from which it would resume."""
    run_, model, optimizer, _ = open_run(flags)
    write, found = checkpoint.save, []

    def write_slowly(*args: object) -> None:
        time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(checkpoint, "save", write_slowly)
    monkeypatch.setattr(run, "write_file", lambda *args: found.extend(runs.list_checkpoints(run_.folder)))
    run_.save(1, model, optimizer, SCALER, {})
    with pytest.raises(SystemExit):
        run_.save_and_exit(2, model, optimizer, SCALER)
    assert [folder.name for folder in found] == ["step_000001", "step_000002"]


def test_resumed_run_keeps_its_history(flags):
    """A resumed finetuning loads its own checkpoint, whose history includes this training already."""
    _, model, optimizer, _ = open_run(flags)
    history = [{"source": "gpt2"}]
    save(Run(flags, DATA, SINGLE, build_schedule(flags, 10), history), 3, model, optimizer)
    assert Run(flags, DATA, SINGLE, build_schedule(flags, 10), [*history, {"source": "itself"}]).history == history


def test_steps_can_change_until_the_decay_starts(flags):
    """The decay of a run of 10 steps starts at step 5, of one of 20 at step 10. The warmup stays as planned."""
    flags = replace(flags, schedule="wsd", warmup_steps=None, steps=100)
    run, model, optimizer, _ = open_run(flags)
    save(run, 5, model, optimizer)
    longer = replace(flags, steps=2000)
    assert open_run(longer)[0].schedule.warmup_steps == 4 and run.schedule.warmup_steps == 4
    save(open_run(replace(flags, steps=10))[0], 6, model, optimizer)
    with pytest.raises(UserError, match=r"steps was 10 and is now 20; .* can change until .* step 5, copy that"):
        open_run(replace(flags, steps=20))
    open_run(replace(flags, steps=10))


def test_steps_cannot_become_too_few_for_the_decay(flags):
    run, model, optimizer, _ = open_run(replace(flags, schedule="wsd", steps=100))
    save(run, 30, model, optimizer)
    with pytest.raises(
        UserError, match=r"steps was 100 and is now 40; .* would start before step 30: give at least 60"
    ):
        open_run(replace(flags, schedule="wsd", steps=40))
    assert open_run(replace(flags, schedule="wsd", steps=60))[3] == 30


def test_a_hostile_schedule_is_one_line(flags):
    run, model, optimizer, _ = open_run(flags)
    save(run, 1, model, optimizer)
    schedule = {"name": "wsd", "lr": 1.0, "steps": 10, "warmup_steps": 0, "decay_fraction": float("nan"), "other": 1}
    edit_manifest(run.folder / "step_000001" / "meta.json", schedule=schedule)
    with pytest.raises(UserError, match=r"meta\.json is corrupt: decay_fraction is nan"):
        open_run(flags)


def test_steps_of_a_cosine_cannot_change(flags):
    run, model, optimizer, _ = open_run(flags)
    save(run, 1, model, optimizer)
    with pytest.raises(UserError, match=r"steps was 10 and is now 11; use the old values .* start a new run$"):
        open_run(replace(flags, steps=11))


def test_the_warmup_stays_as_planned_at_the_first_start(flags):
    """Also when a run that has become shorter is resumed after the start of its decay, or the flag names it."""
    flags = replace(flags, schedule="wsd", steps=1000)
    run, model, optimizer, _ = open_run(flags)
    save(run, 10, model, optimizer)
    shorter = replace(flags, steps=100)
    run, model, optimizer, _ = open_run(shorter)
    save(run, 70, model, optimizer)
    assert open_run(shorter)[0].schedule.warmup_steps == 40
    assert open_run(replace(shorter, warmup_steps=40))[0].schedule.warmup_steps == 40
    with pytest.raises(UserError, match="warmup_steps was 40 and is now 4"):
        open_run(replace(shorter, warmup_steps=4))


def test_a_run_cannot_become_shorter_than_its_warmup(flags):
    run, model, optimizer, _ = open_run(replace(flags, schedule="wsd", steps=1000))
    save(run, 10, model, optimizer)
    with pytest.raises(UserError, match="the 40 steps of the warmup are more than the 25 before the decay"):
        open_run(replace(flags, schedule="wsd", steps=50))


def test_a_checkpoint_that_was_saved_meanwhile_is_found(flags):
    """finetune.py looks for the newest checkpoint before it locks the run."""
    run, model, optimizer, _ = open_run(flags)
    for step in (3, 5):
        save(run, step, model, optimizer)
    found = run.folder / "step_000003"
    assert Run(flags, DATA, SINGLE, run.schedule, (), found).newest_checkpoint.name == "step_000005"
    checkpoint.discard(run.folder / "step_000005")
    assert Run(flags, DATA, SINGLE, run.schedule, (), found).newest_checkpoint == found


def test_the_last_checkpoint_before_the_decay_is_kept(flags):
    run, model, optimizer, _ = open_run(replace(flags, schedule="wsd", keep=1))
    for step in range(1, 11):
        save(run, step, model, optimizer, {"val_loss": 1 / step})
    assert [folder.name for folder in runs.list_checkpoints(run.folder)] == ["step_000005", "step_000010"]


def test_a_resumed_run_completes_an_interrupted_deletion(flags):
    """Also if no step is left, after which `save` would do it."""
    run, model, optimizer, _ = open_run(flags)
    save(run, 3, model, optimizer)
    (run.folder / "step_000001.tmp").mkdir()
    open_run(flags)
    assert [item.name for item in run.folder.glob("step_*")] == ["step_000003"]


def test_a_checkpoint_is_hashed_once(flags, monkeypatch):
    run, model, optimizer, _ = open_run(flags)
    save(run, 3, model, optimizer)
    hashed = []
    monkeypatch.setattr(runs, "sha256", lambda file: hashed.append(file.name) or sha256(file))
    assert open_run(flags)[3] == 3
    assert sorted(hashed) == ["model.safetensors", "train_state.safetensors"]


def test_a_long_log_is_not_read_into_memory(flags):
    run, model, optimizer, _ = open_run(flags)
    save(run, 30_000, model, optimizer)
    rows = (json.dumps({"step": step, "tokens": step, "loss": 2.5}) + "\n" for step in range(30_010))
    run.log_file.write_text("".join(rows))
    tracemalloc.start()
    open_run(flags)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6 and len(run.log_file.read_text().splitlines()) == 30_001


def test_the_loss_scale_is_resumed(flags):
    """So is the number of steps since it changed; a run in another precision ignores them."""
    run, model, optimizer, _ = open_run(flags)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    state = scaler.state_dict() | {"_growth_tracker": 7}
    scaler.load_state_dict(state)
    run.save(3, model, optimizer, scaler, {})
    run.finish_saving()
    run, model, optimizer, _ = open_run(flags)
    resumed, disabled = torch.amp.GradScaler("cpu"), torch.amp.GradScaler(enabled=False)
    for scaler in (resumed, disabled):
        assert run.resume(model, optimizer, scaler) == 3
    assert resumed.state_dict() == state and disabled.state_dict() == {}


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), 10**400])
def test_an_impossible_loss_scale_is_reported(flags, scale):
    run = open_run(flags)[0]
    run.newest_checkpoint = Path("step_000003")
    with pytest.raises(UserError, match=r"step_000003/meta\.json is corrupt: the loss scale is"):
        run._resume_scaler(torch.amp.GradScaler("cpu"), {"scale": scale, "_growth_tracker": 0})
