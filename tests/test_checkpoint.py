"""Checkpoints: whole or absent, read back bit for bit, and refused in one line where they are damaged."""

import errno
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoint
from cli import UserError
from model import GPT, GPTConfig
from tokenizer import load_tokenizer
from training import build_optimizer

CONFIG = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=8)
FILES = ["meta.json", "model.safetensors", "train_state.safetensors"]


def tiny_model(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**asdict(CONFIG) | changes))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A few steps, each on a batch of its own."""
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


def save(folder: Path, model: GPT | None = None, val_loss: float | None = None, **meta) -> Path:
    """Write a checkpoint of a model that need not be trained."""
    metrics = {} if val_loss is None else {"val_loss": val_loss}
    checkpoint.save(folder, model or tiny_model(), {}, {"tokenizer": "bytes", "metrics": metrics} | meta)
    return folder


def edit_meta(folder: Path, **changes) -> None:
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps(meta))


def refused(function, *args) -> str:
    """The one line of the `UserError` that a call ends in."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Everything under a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "name"


@pytest.fixture
def saved(run: Path) -> Path:
    """A checkpoint of a trained model, with the optimiser's state."""
    model, optimizer = trained()
    meta = {"step": 3, "tokenizer": "bytes", "metrics": {"val_loss": 5.5}, "identity": {"seed": 1}}
    checkpoint.save(run / "step_000003", model, checkpoint.optimizer_state(model, optimizer), meta)
    return run / "step_000003"


# ---- there and back ------------------------------------------------------------------------------------------------


def test_weights_and_optimizer_come_back_bit_for_bit(saved):
    """The next steps after loading are those that would have come without the interruption."""
    model, optimizer = trained()
    train(model, optimizer, range(3, 6))

    meta = checkpoint.read_meta(saved)
    again = checkpoint.load_weights(saved, meta)
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in trained()[0].state_dict().items())
    assert again.config == CONFIG and all(p.requires_grad and not p.is_meta for p in again.parameters())
    fresh = build_optimizer(again, lr=1e-2, weight_decay=0.1)
    checkpoint.load_optimizer_state(saved, meta, again, fresh)
    train(again, fresh, range(3, 6))

    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    before, after = (checkpoint.optimizer_state(*pair) for pair in ((model, optimizer), (again, fresh)))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_loading_leaves_the_files_alone(saved):
    before = contents(saved)
    meta = checkpoint.read_meta(saved)
    model = checkpoint.load_weights(saved, meta)
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.1)
    checkpoint.load_optimizer_state(saved, meta, model, optimizer)
    train(model, optimizer, range(2))
    assert contents(saved) == before


def test_names_are_the_models_own(saved):
    weights, state = load_file(saved / "model.safetensors"), load_file(saved / "train_state.safetensors")
    assert weights.keys() == dict(tiny_model().named_parameters()).keys()
    assert {"wte.weight", "wpe.weight", "h.1.attn.c_attn.bias", "h.0.mlp.c_proj.weight", "ln_f.bias"} < weights.keys()
    assert state.keys() == {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in weights}
    assert state["step.wte.weight"].item() == 3 and state["exp_avg.wte.weight"].shape == weights["wte.weight"].shape


def test_meta_describes_the_checkpoint(saved):
    assert sorted(path.name for path in saved.iterdir()) == FILES
    meta = checkpoint.read_meta(saved)
    files = meta.pop("files")
    assert meta == {
        "version": checkpoint.FORMAT_VERSION,
        "model": asdict(CONFIG),
        "step": 3,
        "tokenizer": "bytes",
        "metrics": {"val_loss": 5.5},
        "identity": {"seed": 1},
    }
    assert files.keys() == set(FILES) - {"meta.json"} and all(len(digest) == 64 for digest in files.values())


def test_state_that_is_not_contiguous_is_saved(run):
    turned = torch.arange(6.0).view(2, 3).t()
    checkpoint.save(run / "step_000001", tiny_model(), {"exp_avg.wte.weight": turned}, {"tokenizer": "bytes"})
    loaded = checkpoint.load_tensors(run / "step_000001", "train_state", checkpoint.read_meta(run / "step_000001"))
    assert torch.equal(loaded["exp_avg.wte.weight"], turned)


# ---- damage --------------------------------------------------------------------------------------------------------


def load_all(folder: Path) -> None:
    """Read everything that a resumed run reads."""
    meta = checkpoint.read_meta(folder)
    model = checkpoint.load_weights(folder, meta)
    checkpoint.load_optimizer_state(folder, meta, model, build_optimizer(model, lr=1e-2, weight_decay=0.1))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(position: float):
    """Flip one bit, at a fraction of the file's length."""

    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(position * len(content))] ^= 1
        file.write_bytes(content)

    return change


@pytest.mark.parametrize("damage", [truncate, empty, flip(0), flip(0.01), flip(0.5), flip(0.9999), Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors"])
def test_damaged_tensors_are_refused(saved, name, damage):
    load_all(saved)
    damage(saved / name)
    message = refused(load_all, saved)
    assert str(saved) in message and name in message and "damaged" in message


@pytest.mark.parametrize("text", ["", '{"version": 1', "[]", "\xff"])
def test_a_broken_meta_is_refused(saved, text):
    (saved / "meta.json").write_bytes(text.encode("latin-1"))
    message = refused(checkpoint.read_meta, saved)
    assert str(saved / "meta.json") in message and "damaged" in message
    assert refused(checkpoint.load, str(saved)) == message


def test_a_missing_meta_is_refused(saved):
    (saved / "meta.json").unlink()
    assert f"{saved} is no checkpoint" in refused(checkpoint.read_meta, saved)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(saved, version):
    edit_meta(saved, version=version)
    message = refused(load_all, saved)
    assert str(saved) in message and f"version {version}, this code reads 1" in message


@pytest.mark.parametrize(
    "model",
    [None, {}, {"n_embd": 0}, {"depth": 3}, asdict(CONFIG) | {"n_head": 3}, asdict(CONFIG) | {"dropout": "none"}],
)
def test_an_impossible_model_is_refused(saved, model):
    edit_meta(saved, model=model)
    with pytest.raises(UserError, match="step_000003 is damaged"):
        load_all(saved)


def test_a_meta_without_its_model_is_refused(saved):
    meta = json.loads((saved / "meta.json").read_text())
    del meta["model"]
    (saved / "meta.json").write_text(json.dumps(meta))
    assert f"{saved} is damaged" in refused(load_all, saved)


@pytest.mark.parametrize("size", [{"n_layer": 10**9}, {"n_embd": 10**9, "n_head": 1}, {"block_size": 10**12}])
def test_no_memory_is_taken_on_the_word_of_a_file(saved, size):
    """A model of these sizes would never be built; the file is too small for it, which is seen first."""
    edit_meta(saved, model=asdict(CONFIG) | size)
    assert "too small for its model" in refused(load_all, saved)


@pytest.mark.parametrize("name", ["files", "metrics", "tokenizer"])
@pytest.mark.parametrize("value", [None, [], 7])
def test_a_meta_of_wrong_types_is_refused(saved, name, value):
    edit_meta(saved, **{name: value})
    assert f"{saved} is damaged: its meta.json has no {name}" in refused(load_all, saved)


@pytest.mark.parametrize("changes", [{"n_embd": 16}, {"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 999}])
def test_weights_of_another_model_are_refused(saved, changes):
    edit_meta(saved, model=asdict(CONFIG) | changes)
    with pytest.raises(UserError, match="step_000003 is damaged"):
        load_all(saved)


@pytest.mark.parametrize("key", ["exp_avg.h.9.ln_1.weight", "exp_avg.wpe.weight"])
def test_optimizer_state_of_another_model_is_refused(run, key):
    checkpoint.save(run / "step_000001", tiny_model(), {key: torch.ones(3)}, {"tokenizer": "bytes"})
    message = refused(load_all, run / "step_000001")
    assert key in message and "does not fit the model" in message


# ---- writing that fails --------------------------------------------------------------------------------------------

DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(function, error: BaseException, at_call: int):
    """`function` that raises `error` when it is called for the n-th time."""
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
    [("save_file", 1), ("save_file", 2), ("sha256", 1), ("flush", 1), ("write_json", 1), ("publish", 1)],
)
def test_a_failed_write_leaves_nothing(run, monkeypatch, step, at_call, error):
    save(run / "step_000001")
    before = contents(run)
    monkeypatch.setattr(checkpoint, step, failing(getattr(checkpoint, step), error, at_call))
    message = refused(save, run / "step_000002")
    assert str(run / "step_000002") in message and "No space left on device" in message
    assert [path.name for path in run.iterdir()] == ["step_000001"]
    assert contents(run) == before
    save(run / "step_000002")  # the failing call is over: there is space again
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step_000001", "step_000002"]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("step", ["save_file", "sha256", "flush", "write_json", "publish"])
def test_a_killed_write_is_never_taken_for_a_checkpoint(run, monkeypatch, step):
    save(run / "step_000001", tiny_model(1), val_loss=3.0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, step, failing(getattr(checkpoint, step), Killed(), 1))
        with pytest.raises(Killed):
            save(run / "step_000002", tiny_model(2), val_loss=1.0)
    assert (run / "step_000002.tmp").exists() and not (run / "step_000002").exists()
    assert checkpoint.checkpoints(run) == [run / "step_000001"]
    assert torch.equal(checkpoint.load(str(run)).model.wpe.weight, tiny_model(1).wpe.weight)
    (run / "step_000002.tmp" / "rubbish").touch()
    save(run / "step_000002", tiny_model(2), val_loss=1.0)  # takes the leftovers away
    assert sorted(path.name for path in run.iterdir()) == ["step_000001", "step_000002"]
    assert sorted(path.name for path in (run / "step_000002").iterdir()) == FILES


def test_everything_is_on_disk_before_it_has_its_name(run, monkeypatch):
    """All files and the names of them are flushed before the folder is renamed, and its own name after."""
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
    save(run / "step_000001")
    assert renamed and run.stat().st_ino in flushed


# ---- the checkpoints of a run --------------------------------------------------------------------------------------


def names(folders) -> list[str]:
    return [folder.name for folder in folders]


def test_checkpoints_are_in_the_order_of_their_steps(run):
    for step in (1_000_000, 2, 999_999, 10, 1_000_001):
        save(run / f"step_{step:06d}")
    expected = ["step_000002", "step_000010", "step_999999", "step_1000000", "step_1000001"]
    assert names(checkpoint.checkpoints(run)) == expected


def test_only_whole_checkpoints_count(run):
    assert checkpoint.checkpoints(run) == []
    save(run / "step_000001")
    (run / "step_000002").mkdir()
    save(run / "step_000003").rename(run / "step_000003.tmp")
    save(run / "step_000004").rename(run / "step_000004_copy")
    (run / "log.jsonl").touch()
    assert names(checkpoint.checkpoints(run)) == ["step_000001"]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([3.0, 1.0, 2.0], "step_000001"),
        ([3.0, 1.0, 1.0], "step_000002"),
        ([None, 4.0, None], "step_000001"),
        ([None, None], "step_000001"),
        ([2.0, float("inf")], "step_000000"),
        ([2.0, float("nan")], "step_000000"),
        (["high", 2.0, None], "step_000001"),
    ],
)
def test_the_best_has_the_lowest_validation_loss(run, losses, expected):
    for step, loss in enumerate(losses):
        save(run / f"step_{step:06d}", val_loss=loss)
    assert checkpoint.best(run).name == expected


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
def test_the_newest_and_the_best_are_retained(run, losses, keep, expected):
    for step, loss in enumerate(losses):
        save(run / f"step_{step:06d}", val_loss=loss)
    before = contents(run)
    checkpoint.retain(run, keep)
    assert sorted(path.name for path in run.iterdir()) == [f"step_{step:06d}" for step in expected]
    assert contents(run).items() <= before.items()


def test_a_half_deleted_checkpoint_does_not_count(run, monkeypatch):
    for step in range(3):
        save(run / f"step_{step:06d}", val_loss=-step)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", failing(lambda *_, **__: None, Killed(), 2))
    with pytest.raises(Killed):
        checkpoint.retain(run, 2)
    assert names(checkpoint.checkpoints(run)) == ["step_000001", "step_000002"]


# ---- load: whatever a person names ---------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(run, tmp_path, monkeypatch) -> Path:
    """A run whose older checkpoint is the better one; the current folder is the one that holds `runs`."""
    save(run / "step_000001", tiny_model(1), val_loss=2.0)
    save(run / "step_000002", tiny_model(2), val_loss=3.0)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(
    ("source", "seed"),
    [
        ("name", 1),
        ("runs/name", 1),
        ("runs/name/", 1),
        ("./runs/name", 1),
        ("runs/name/step_000001", 1),
        ("runs/name/step_000002", 2),
    ],
)
def test_runs_and_checkpoints_are_loaded(two_checkpoints, source, seed):
    loaded = checkpoint.load(source)
    assert torch.equal(loaded.model.wpe.weight, tiny_model(seed).wpe.weight)
    assert loaded.source == f"runs/name/step_00000{seed}"
    assert loaded.tokenizer is load_tokenizer("bytes") and not loaded.chat


def test_a_folder_here_is_loaded_by_its_name_alone(two_checkpoints, tmp_path):
    two_checkpoints.rename(tmp_path / "elsewhere")
    assert checkpoint.load("elsewhere").source == "elsewhere/step_000001"


def test_the_vocabulary_tells_a_chat_model(run):
    save(run / "step_000001", tiny_model(vocab_size=257 + 4))
    assert checkpoint.load(str(run)).chat


@pytest.mark.parametrize(
    ("meta", "named"),
    [
        ({}, "has a vocabulary of 99 tokens; bytes has 257, and 261 for a chat"),
        ({"tokenizer": "morse"}, "no tokenizer 'morse'"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(run, meta, named):
    save(run / "step_000001", tiny_model(vocab_size=99), **meta)
    assert named in refused(checkpoint.load, str(run))


@pytest.mark.parametrize(
    "source", ["runs/none", "./none", "/none", "../none", "runs/empty", "empty", "a/b/none", "runs/name/step_9"]
)
def test_nothing_there_is_refused_without_asking_the_hub(two_checkpoints, monkeypatch, source):
    (two_checkpoints.parent / "empty").mkdir()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(None, AssertionError("asked the hub"), 1))
    assert f"{source}: no checkpoint there" in refused(checkpoint.load, source)


def test_a_name_that_only_the_hub_may_know_is_asked_for(two_checkpoints, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(None, ConnectionError("no route"), 1))
    assert "someone/model is neither a folder nor a model on the hub: no route" in refused(
        checkpoint.load, "someone/model"
    )


def test_a_hugging_face_folder_is_loaded(tmp_path, gpt2_tokenizer):
    model = tiny_model(vocab_size=50_257)
    model.save_pretrained(tmp_path / "hf")
    loaded = checkpoint.load(str(tmp_path / "hf"))
    assert loaded.tokenizer is gpt2_tokenizer and not loaded.chat and loaded.source == str(tmp_path / "hf")
    assert torch.equal(loaded.model.wte.weight[:50_257], model.wte.weight[:50_257])


def test_a_hugging_face_folder_of_another_vocabulary_is_refused(tmp_path, gpt2_tokenizer):
    tiny_model(vocab_size=99).save_pretrained(tmp_path / "hf")
    message = refused(checkpoint.load, str(tmp_path / "hf"))
    assert "has a vocabulary of 99 tokens; gpt2 has 50257, and 50261 for a chat" in message


def test_a_damaged_hugging_face_folder_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "hf")
    truncate(tmp_path / "hf" / "model.safetensors")
    assert "model.safetensors is damaged" in refused(checkpoint.load, str(tmp_path / "hf"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused(checkpoint.load, str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("gpt2", "runs/gpt2"),
        ("my.run-2", "runs/my.run-2"),
        ("runs/gpt2", "runs/gpt2"),
        ("./gpt2", "gpt2"),
        ("gpt2/", "gpt2"),
        ("/tmp/gpt2", "/tmp/gpt2"),
        ("../gpt2", "../gpt2"),
    ],
)
def test_run_folder(name, folder):
    assert checkpoint.run_folder(name) == Path(folder)


# ---- python checkpoint.py FOLDER -----------------------------------------------------------------------------------


def test_checkpoints_are_listed(run_script, pretrained, tmp_path):
    """All runs of a folder, one run, or one checkpoint: loss, size, whether it is whole, and which is the best."""
    for name in ("one", "two"):
        shutil.copytree(pretrained, tmp_path / "runs" / name)
    (tmp_path / "runs" / "picture.png").write_text("no run")
    losses = {step: checkpoint.val_loss(pretrained / f"step_{step:06d}") for step in (6, 12)}
    assert losses[12] < losses[6]
    lines = run_script("checkpoint.py").stdout.splitlines()
    assert run_script("checkpoint.py", "runs/").stdout.splitlines() == lines and len(lines) == 5
    assert len(set(map(len, (line.split("  best")[0] for line in lines[2::2])))) == 1  # the columns stand
    for name, (first, second) in {"one": lines[1:3], "two": lines[3:5]}.items():
        assert first.split()[:2] == [f"runs/{name}/step_000006", f"{losses[6]:.4f}"] and first.endswith("  whole")
        assert second.split()[:2] == [f"runs/{name}/step_000012", f"{losses[12]:.4f}"]
        assert second.endswith("  best, whole")
    size = sum(file.stat().st_size for file in (pretrained / "step_000006").iterdir()) / 1e6
    assert f" {size:,.1f} MB  {time.strftime('%Y-')}" in lines[1]
    assert run_script("checkpoint.py", "two").stdout.splitlines()[1:] == lines[3:]
    assert run_script("checkpoint.py", "runs/two/step_000012").stdout.splitlines()[1:] == lines[4:]
    (alone,) = run_script("checkpoint.py", ".", cwd=tmp_path / "runs/one/step_000006").stdout.splitlines()[1:]
    assert alone.startswith(".  ") and alone.endswith("  whole")


def test_damaged_checkpoints_are_listed_and_fail(run_script, fails, pretrained, tmp_path):
    for name in "abcd":
        shutil.copytree(pretrained, tmp_path / name)
    with open(tmp_path / "a/step_000006/model.safetensors", "r+b") as file:
        file.write(b"?")
    (tmp_path / "b/step_000006/train_state.safetensors").unlink()
    (tmp_path / "c/step_000012/meta.json").write_text("{")
    done = run_script("checkpoint.py", tmp_path, expect=2)
    states = [line.split("  ")[-1] for line in done.stdout.splitlines()[1:]]
    assert states[0] == "model.safetensors is damaged or truncated: its checksum is wrong"
    assert states[2] == "damaged: train_state.safetensors is missing"
    assert states[4] == "best, whole" and states[5].startswith("meta.json is damaged: ")
    assert states[1::6] == ["best, whole", "best, whole"] and states[6] == "whole"
    assert done.stderr == "error: 3 of 8 checkpoints cannot be used: delete them; training passes over them\n"
    assert "nowhere: no such folder" in fails("checkpoint.py", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoints" in fails("checkpoint.py", tmp_path / "empty")


def test_a_dataset_folder_is_no_damaged_checkpoint(fails, text_data):
    assert "holds no checkpoints" in fails("checkpoint.py", text_data)
