"""Checkpoints: whole or absent, loaded bit for bit, and rejected in one line if they are corrupt."""

import errno
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import edit_manifest
from safetensors import SafetensorError
from safetensors.torch import load_file

from minigpt import checkpoint, runs
from minigpt.cli import UserError
from minigpt.optim import build_optimizer
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import load_tokenizer
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=8)
FILES = ["meta.json", "model.safetensors", "train_state.safetensors"]


def tiny_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**asdict(CONFIG) | changes))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train a few steps, each on its own batch."""
    for step in steps:
        tokens = torch.randint(257, (2, 8), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trained(steps: int = 3, **changes) -> tuple[GPT, torch.optim.Optimizer]:
    model = tiny_model(**changes)
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    train(model, optimizer, range(steps))
    return model, optimizer


def save_model(folder: Path, model: GPT, train_state: dict, meta: dict) -> None:
    checkpoint.save(folder, model.config, model.state_dict(), load_tokenizer("bytes"), train_state, meta)


def save_checkpoint(folder: Path, model: GPT | None = None, val_loss: float | None = None, **meta) -> Path:
    """Write a checkpoint without optimiser state."""
    metrics = {} if val_loss is None else {"val_loss": val_loss}
    save_model(folder, model or tiny_model(), {}, {"step": 1, "metrics": metrics} | meta)
    return folder


def edit_meta(folder: Path, **changes) -> None:
    edit_manifest(folder / "meta.json", **changes)


def error_message(function, *args) -> str:
    """Return the message of the `UserError` that a call raises: one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files under a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "name"


@pytest.fixture
def saved(run: Path) -> Path:
    """Return a checkpoint of a trained model, with optimiser state."""
    model, optimizer = trained()
    meta = {"step": 3, "metrics": {"val_loss": 5.5}, "identity": {"seed": 1}}
    train_state = checkpoint.optimizer_state_dict(model, optimizer)
    save_model(run / "step_000003", model, train_state, meta)
    return run / "step_000003"


# ---- save and load ---------------------------------------------------------------------------------------------------


def test_weights_and_optimizer_load_bit_for_bit(saved):
    """The steps after loading equal those of an uninterrupted training."""
    model, optimizer = trained()
    train(model, optimizer, range(3, 6))

    meta = runs.read_meta(saved)
    again = checkpoint.load_model(saved, meta)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in trained()[0].state_dict().items())
    assert again.config == CONFIG and all(p.requires_grad and not p.is_meta for p in again.parameters())
    fresh = build_optimizer(again, lr=1e-2, weight_decay=0.1)
    checkpoint.load_optimizer_state_dict(saved, meta, again, fresh)
    train(again, fresh, range(3, 6))

    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    before, after = (checkpoint.optimizer_state_dict(*pair) for pair in ((model, optimizer), (again, fresh)))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_loading_changes_no_file(saved):
    before = contents(saved)
    meta = runs.read_meta(saved)
    model = checkpoint.load_model(saved, meta)
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    checkpoint.load_optimizer_state_dict(saved, meta, model, optimizer)
    train(model, optimizer, range(2))
    assert contents(saved) == before


def test_tensor_names_are_the_parameter_names(saved):
    weights, state = load_file(saved / "model.safetensors"), load_file(saved / "train_state.safetensors")
    assert weights.keys() == dict(tiny_model().named_parameters()).keys()
    assert {"wte.weight", "wpe.weight", "h.1.attn.c_attn.bias", "h.0.mlp.c_proj.weight", "ln_f.bias"} < weights.keys()
    assert state.keys() == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in weights}
    assert state["step.wte.weight"].item() == 3 and state["exp_avg.wte.weight"].shape == weights["wte.weight"].shape


def test_meta_describes_the_checkpoint(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES
    meta = runs.read_meta(saved)
    files = meta.pop("files")
    assert meta == {
        "version": runs.FORMAT_VERSION,
        "model": asdict(CONFIG),
        "step": 3,
        "tokenizer": "bytes",
        "metrics": {"val_loss": 5.5},
        "identity": {"seed": 1},
        "config": {},
        "source": {},
        "history": [],
    }
    assert files.keys() == set(FILES) - {"meta.json"} and all(len(digest) == 64 for digest in files.values())


def test_noncontiguous_state_is_saved(run):
    transposed = torch.arange(6.0).view(2, 3).t()
    save_model(run / "step_000001", tiny_model(), {"exp_avg.wte.weight": transposed}, {"step": 1})
    loaded = checkpoint.load_tensors(run / "step_000001", "train_state", runs.read_meta(run / "step_000001"))
    assert torch.equal(loaded["exp_avg.wte.weight"], transposed)


# ---- corrupt files ---------------------------------------------------------------------------------------------------


def load_all(folder: Path) -> None:
    """Load everything that a resumed run loads."""
    meta = runs.read_meta(folder)
    model = checkpoint.load_model(folder, meta)
    checkpoint.load_optimizer_state_dict(folder, meta, model, build_optimizer(model, lr=1e-2, weight_decay=0.1))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def clear(file: Path) -> None:
    file.write_bytes(b"")


def flip_bit(position: float):
    """Return a function that flips one bit at a fraction of a file's length."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(position * len(content))] ^= 1
        file.write_bytes(content)

    return change


@pytest.mark.parametrize(
    "corrupt", [truncate, clear, flip_bit(0), flip_bit(0.01), flip_bit(0.5), flip_bit(0.9999), Path.unlink]
)
@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors"])
def test_corrupt_tensors_are_rejected(saved, name, corrupt):
    load_all(saved)
    corrupt(saved / name)
    message = error_message(load_all, saved)
    assert str(saved) in message and name in message and "corrupt" in message


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]", "\xff"])
def test_invalid_meta_is_rejected(saved, text):
    (saved / "meta.json").write_bytes(text.encode("latin-1"))
    message = error_message(runs.read_meta, saved)
    assert str(saved / "meta.json") in message and "corrupt" in message
    assert error_message(load_pretrained, str(saved)) == message


def test_missing_meta_is_rejected(saved):
    (saved / "meta.json").unlink()
    assert f"{saved} is not a checkpoint" in error_message(runs.read_meta, saved)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version_is_rejected(saved, version):
    edit_meta(saved, version=version)
    message = error_message(load_all, saved)
    assert str(saved) in message and f"format version {version}, expected 1" in message


@pytest.mark.parametrize(
    "model",
    [None, {}, {"n_embd": 0}, {"depth": 3}, asdict(CONFIG) | {"n_head": 3}, asdict(CONFIG) | {"dropout": "none"}],
)
def test_impossible_model_is_rejected(saved, model):
    edit_meta(saved, model=model)
    with pytest.raises(UserError, match=r"step_000003(/meta\.json)? is corrupt"):
        load_all(saved)


def test_meta_without_model_is_rejected(saved):
    edit_meta(saved, model="absent")
    assert f"{saved / 'meta.json'} is corrupt: model is 'None'" in error_message(load_all, saved)


@pytest.mark.parametrize("size", [{"n_layer": 10**9}, {"n_embd": 10**9, "n_head": 1}, {"block_size": 10**12}])
def test_impossible_sizes_are_rejected_before_memory_is_allocated(saved, size):
    edit_meta(saved, model=asdict(CONFIG) | size)
    message = error_message(load_all, saved)
    assert "has no h.2" in message or "sizes=" in message or "expected (1000000000000, 8)" in message


@pytest.mark.parametrize("name", ["files", "metrics", "tokenizer"])
@pytest.mark.parametrize("value", [None, [], 7])
def test_wrong_types_in_meta_are_rejected(saved, name, value):
    edit_meta(saved, **{name: value})
    assert f"{saved / 'meta.json'} is corrupt: {name} is" in error_message(load_all, saved)


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 999}])
def test_weights_of_another_model_are_rejected(saved, changes):
    edit_meta(saved, model=asdict(CONFIG) | changes)
    with pytest.raises(UserError, match=r"step_000003(/meta\.json)? is corrupt"):
        load_all(saved)


@pytest.mark.parametrize("key", ["exp_avg.h.9.ln_1.weight", "exp_avg.wpe.weight"])
def test_optimizer_state_of_another_model_is_rejected(run, key):
    save_model(run / "step_000001", tiny_model(), {key: torch.ones(3)}, {"step": 1})
    message = error_message(load_all, run / "step_000001")
    assert key in message and "does not fit the model" in message


# ---- interrupted writes ----------------------------------------------------------------------------------------------

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(function, error: BaseException, at_call: int):
    """Return `function`, changed to raise `error` at its n-th call."""
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(args)
        if len(calls) == at_call:
            raise error
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("error", [DISK_FULL, SafetensorError("I/O error: No space left on device")])
@pytest.mark.parametrize(
    ("step", "at_call"),
    [("save_file", 1), ("save_file", 2), ("sha256", 1), ("fsync", 1), ("write_manifest", 1), ("atomic_rename", 1)],
)
def test_failed_write_leaves_nothing(run, monkeypatch, step, at_call, error):
    save_checkpoint(run / "step_000001")
    before = contents(run)
    monkeypatch.setattr(checkpoint, step, failing(getattr(checkpoint, step), error, at_call))
    message = error_message(save_checkpoint, run / "step_000002")
    assert str(run / "step_000002") in message and "No space left on device" in message
    assert [path.name for path in run.iterdir()] == ["step_000001"]
    assert contents(run) == before
    save_checkpoint(run / "step_000002")  # the next write succeeds
    assert [path.name for path in runs.list_checkpoints(run)] == ["step_000001", "step_000002"]


class Killed(BaseException):
    """Simulates the end of the process: no code catches it."""


@pytest.mark.parametrize("step", ["save_file", "sha256", "fsync", "write_manifest", "atomic_rename"])
def test_killed_write_is_not_a_checkpoint(run, monkeypatch, step):
    save_checkpoint(run / "step_000001", tiny_model(1), val_loss=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, step, failing(getattr(checkpoint, step), Killed(), 1))
        with pytest.raises(Killed):
            save_checkpoint(run / "step_000002", tiny_model(2), val_loss=1.0)
    assert (run / "step_000002.tmp").exists() and not (run / "step_000002").exists()
    assert runs.list_checkpoints(run) == [run / "step_000001"]
    assert torch.equal(load_pretrained(str(run)).model.wpe.weight, tiny_model(1).wpe.weight)
    (run / "step_000002.tmp" / "leftover").touch()
    save_checkpoint(run / "step_000002", tiny_model(2), val_loss=1.0)  # deletes the leftovers
    assert sorted(path.name for path in run.iterdir()) == ["step_000001", "step_000002"]
    assert sorted(path.name for path in (run / "step_000002").iterdir()) == FILES


def test_checkpoint_is_on_disk_before_it_is_renamed(run, monkeypatch):
    """The files and the temporary folder are flushed before the rename, the run folder after it."""
    run.mkdir(parents=True)
    flushed, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def watch_replace(source: Path, target: Path) -> None:
        if target == run / "step_000001":
            assert {path.name for path in source.iterdir()} == set(FILES)
            assert {path.stat().st_ino for path in (source, *source.iterdir())} <= flushed
            renamed.append(target)
            flushed.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    save_checkpoint(run / "step_000001")
    assert renamed and run.stat().st_ino in flushed


# ---- the checkpoints of a run ----------------------------------------------------------------------------------------


def names(folders) -> list[str]:
    return [folder.name for folder in folders]


def test_checkpoints_are_listed_by_step(run):
    for step in (1_000_000, 2, 999_999, 10, 1_000_001):
        save_checkpoint(run / f"step_{step:06d}")
    expected = ["step_000002", "step_000010", "step_999999", "step_1000000", "step_1000001"]
    assert names(runs.list_checkpoints(run)) == expected


def test_only_complete_checkpoints_are_listed(run):
    assert runs.list_checkpoints(run) == []
    save_checkpoint(run / "step_000001")
    (run / "step_000002").mkdir()
    save_checkpoint(run / "step_000003").rename(run / "step_000003.tmp")
    save_checkpoint(run / "step_000004").rename(run / "step_000004_copy")
    (run / "log.jsonl").touch()
    assert names(runs.list_checkpoints(run)) == ["step_000001"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0, 2.0], "step_000001"),
        ([3.0, 1.0, 1.0], "step_000002"),
        ([None, 4.0, None], "step_000001"),
        ([None, None], "step_000001"),
        ([2.0, float("inf")], "step_000000"),
        ([2.0, float("nan")], "step_000000"),
        (["high", 2.0, None], "step_000001"),  # corrupt: reported when it is loaded
    ],
)
def test_best_has_the_lowest_validation_loss(run, losses, expected):
    for step, loss in enumerate(losses):
        save_checkpoint(run / f"step_{step:06d}", val_loss=loss)
    assert runs.find_best(run).name == expected


@pytest.mark.parametrize(("best_by", "expected"), [("val_loss", "step_000000"), ("step", "step_000002")])
def test_best_by(run, best_by, expected):
    """The flag of the newest checkpoint decides, so that a resumed run can change it."""
    for step in range(3):
        saved = {} if step == 0 else {"config": {"best_by": best_by if step == 2 else "step"}}
        save_checkpoint(run / f"step_{step:06d}", val_loss=step, **saved)
    assert runs.find_best(run).name == expected
    checkpoint.prune(run, keep=1)
    assert names(runs.list_checkpoints(run)) == sorted({expected, "step_000002"})


@pytest.mark.parametrize(
    ("losses", "keep", "expected"),
    [
        ([5, 4, 3, 2, 1], 2, [3, 4]),
        ([5, 1, 4, 3, 2], 2, [1, 3, 4]),
        ([1, 5, 4, 3, 2], 1, [0, 4]),
        ([1, 2], 2, [0, 1]),
        ([1, 2, 3], 5, [0, 1, 2]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(run, losses, keep, expected):
    for step, loss in enumerate(losses):
        save_checkpoint(run / f"step_{step:06d}", val_loss=loss)
    before = contents(run)
    checkpoint.prune(run, keep)
    assert sorted(path.name for path in run.iterdir()) == [f"step_{step:06d}" for step in expected]
    assert contents(run).items() <= before.items()


def test_interrupted_deletion_leaves_no_partial_checkpoint(run, monkeypatch):
    for step in range(3):
        save_checkpoint(run / f"step_{step:06d}", val_loss=-step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", failing(lambda *_, **__: None, Killed(), 2))
    with pytest.raises(Killed):
        checkpoint.prune(run, 2)
    assert names(runs.list_checkpoints(run)) == ["step_000001", "step_000002"]
