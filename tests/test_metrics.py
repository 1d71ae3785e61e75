"""The metrics of a run: log rows, MFU, and the trackers, which equal log.jsonl when their own readers load them."""

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TRAIN, read_log
from test_faults import LONG, spawn, wait_for_step
from test_slurm import wait_for

import pretrain
from minigpt import cli, metrics, runs
from minigpt.cli import UserError
from minigpt.distributed import Processes
from minigpt.metrics import PEAK_FLOPS, MetricsLogger, open_tracker, peak_flops
from minigpt.training import check_train_config
from model import GPT, GPTConfig

SINGLE = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)

# ---- log rows and MFU ------------------------------------------------------------------------------------------------


def open_logger(folder: Path, steps: int, procs: Processes = SINGLE) -> MetricsLogger:
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    config = SimpleNamespace(report_to=())
    run = SimpleNamespace(folder=folder, log_file=folder / "log.jsonl", procs=procs, config=config)
    run.finish_saving = lambda: None
    return MetricsLogger(run, model, step=0, steps=steps, batch_tokens=16, val_bytes_per_token=4.0)


@pytest.mark.parametrize("loss, scale, stops", [(2.0, 64.0, False), (2.0, 0.5, True), (math.nan, 64.0, True)])
def test_an_overflow_of_float16_is_no_divergence(tmp_path, capsys, loss, scale, stops):
    logger = open_logger(tmp_path, steps=9)
    values = {"loss": torch.tensor(loss), "grad_norm": torch.tensor(math.inf), "loss_scale": torch.tensor(scale)}
    for step in range(1, 5):
        logger.log_step(step, values, 1e-3, started=0.0)
    with pytest.raises(UserError, match="5 consecutive steps") if stops else contextlib.nullcontext():
        logger.log_step(5, values, 1e-3, started=0.0)
    assert ("step 4 skipped: gradients overflow float16; the loss scale is now 64" in capsys.readouterr().out) != stops
    row = list(read_log(tmp_path))[-1]
    assert (row["loss"], row["skipped"], row["loss_scale"]) == (None, True, scale)


def test_log_rows_have_the_metrics(tmp_path, capsys):
    logger = open_logger(tmp_path, steps=2)
    bits_per_byte = pytest.approx(5.5 / 4 / math.log(2))
    assert logger.log_validation(0, 5.5) == {"val_loss": 5.5, "bits_per_byte": bits_per_byte}
    values = {"loss": torch.tensor(2.5), "grad_norm": torch.tensor(0.5)}
    logger.log_step(1, values, 1e-3, started=time.perf_counter() - 0.5)
    logger.close()
    validation, step = read_log(tmp_path)
    assert validation == {"step": 0, "tokens": 0, "val_loss": 5.5, "bits_per_byte": bits_per_byte}
    assert step.pop("tokens_per_s") > 0 and step.pop("mfu") >= 0
    assert step == {"step": 1, "tokens": 16, "loss": 2.5, "grad_norm": 0.5, "lr": 1e-3}
    printed = capsys.readouterr().out
    assert "step 0: validation loss 5.5000 nats per token, 1.98 bits per byte\n" in printed
    assert "loss 2.5000" in printed and "TFLOP/s" not in printed and "MFU" not in printed  # they say little on a CPU


def test_mfu_is_shown_on_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda procs: (1e12, "a data sheet"))
    logger = open_logger(tmp_path, 2, replace(SINGLE, device=torch.device("cuda", 0)))
    logger.log_micro_batch(1, 2)  # on a GPU, only complete steps are shown
    logger.log_step(1, {"loss": torch.tensor(2.5), "grad_norm": torch.tensor(0.5)}, 1e-3, started=0.0)
    printed = capsys.readouterr().out
    assert "100 % MFU is 1.00 TFLOP/s" in printed and "MFU 0.0%" in printed and "micro-batch" not in printed


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until `clock.now` is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(cli.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.mark.parametrize(("seconds", "warned"), [(20, False), (25, True)])
def test_a_run_of_days_on_a_cpu_is_announced(tmp_path, capsys, monkeypatch, clock, seconds, warned):
    """1,000 steps of four micro-batches: 0.93 and 1.16 days."""
    monkeypatch.setattr(metrics, "peak_flops", lambda procs: (1e12, "measured"))
    logger = open_logger(tmp_path, 1000)
    clock.now += 10_000  # the validation at step 0 does not count
    logger.log_val_batch(7)
    assert capsys.readouterr().out == "step 0/1,000  validation batch 7\n"
    logger.log_validation(0, 5.5)
    for done in (1, 2, 3, 4):
        clock.now += seconds
        logger.log_micro_batch(done, 4)
        printed = capsys.readouterr()
        assert (f"\nstep 0/1,000  micro-batch {done}/4  " in f"\n{printed.out}") == (done < 4)  # then the step is shown
        expected = f"about {1000 * 4 * seconds / 86_400:.1f} days on this CPU" if warned and done == 3 else ""
        assert printed.err.count("\n") == bool(expected) and expected in printed.err


def test_a_resumed_run_of_days_is_announced_after_its_first_micro_batch(tmp_path, capsys, monkeypatch, clock):
    """A step may have one micro-batch only."""
    monkeypatch.setattr(metrics, "peak_flops", lambda procs: (1e12, "measured"))
    logger = open_logger(tmp_path, 1000)
    clock.now += 100
    logger.log_micro_batch(1, 1)
    assert capsys.readouterr().err.startswith("warning: this run will take about 1.2 days on this CPU: choose")


def test_peak_is_measured_on_a_cpu():
    flops, source = peak_flops(SINGLE)
    assert 1e9 < flops < 1e14 and source == "cpu, measured"


@pytest.mark.parametrize(
    ("name", "part"),
    [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 80GB HBM3", "H100")],
)
def test_peak_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch, name, part):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    procs = Processes(0, 1, torch.device("cuda", 0), torch.bfloat16)
    assert peak_flops(procs) == (PEAK_FLOPS[part], f"{name}, data sheet")


def test_peak_of_a_gpu_with_a_similar_name_is_measured(monkeypatch):
    """An A1000 is not an A100."""

    class MeasuredError(Exception):
        pass

    def measure(*args, **kwargs):
        raise MeasuredError

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A1000")
    monkeypatch.setattr(torch, "randn", measure)
    with pytest.raises(MeasuredError):
        peak_flops(Processes(0, 1, torch.device("cuda", 0), torch.bfloat16))


# ---- TensorBoard and Weights & Biases --------------------------------------------------------------------------------

REASON = "optional, in requirements-extra.txt"
OFTEN = ("--val_every", 4, "--save_every", 6)
BOTH = ("--report_to", "tensorboard", "wandb")


@pytest.fixture
def offline(monkeypatch, tmp_path) -> None:
    """Use wandb without network or account. Skip the test if the libraries are not installed."""
    pytest.importorskip("tensorboard", reason=REASON)
    pytest.importorskip("wandb", reason=REASON)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):  # wandb sets the second in a process that opens a tracker
        monkeypatch.delenv(name, raising=False)


def numbers(rows: list[dict]) -> dict[str, dict[int, float]]:
    """Return the numbers of rows by name and step, except speeds, which differ between runs."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not name.startswith(("step", "_", "tokens", "mfu")):
                found.setdefault(name, {})[row["step"]] = value
    return found


def in_log(run: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in log.jsonl."""
    return {name: pytest.approx(values, rel=1e-6) for name, values in numbers(read_log(run)).items()}


def in_tensorboard(run: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in the event files, in which each step appears once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rows = [{"step": e.step, tag: e.value} for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len({(row["step"], *row) for row in rows}) == len(rows)
    return numbers(rows)


def in_wandb(run: Path) -> dict[str, dict[int, float]]:
    """Return the numbers in the offline folders, which all have the same run id."""
    rows, ids = [], set()
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        ids.add(folder.name.rsplit("-", 1)[1])
        rows += [record["item"] | {"step": record["step"]["num"]} for record in wandb_records(folder, "history")]
    assert len(ids) == 1
    return numbers(rows)


def wandb_records(folder: Path, kind: str) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.usefixtures("offline")
def test_interrupted_run_is_tracked_completely(text_data, tmp_path):
    """After kill -9, steps are logged again; after SIGTERM, none. At the end each step appears once, except those that
    wandb had not written when it was killed."""
    args = ("pretrain.py", "--data", text_data, "--out", "run", *LONG, *BOTH)
    args += ("--steps", 60, "--save_every", 10, "--val_every", 5)
    run, completed = tmp_path / "run", []
    for step, number, code in ((15, signal.SIGKILL, -9), (25, signal.SIGTERM, 75)):
        process = spawn(*args, cwd=tmp_path)
        wait_for_step(run, step, process)
        wait_for(lambda: runs.list_checkpoints(run))
        process.send_signal(number)
        output = "".join(process.communicate(timeout=60))
        assert process.returncode == code, output
        completed.append(completed_steps(output))
    assert "stopped by SIGTERM after step" in output and "wandb:" not in output and "\x1b" not in output
    process = spawn(*args, cwd=tmp_path)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 0 and "Traceback" not in output, output
    completed.append(completed_steps(output))
    assert set(in_log(run)["loss"].expected) == set(range(1, 61))
    assert in_tensorboard(run) == in_log(run) and len(list((run / "tensorboard").iterdir())) == 1
    sent = in_wandb(run)
    assert set(range(11, 61)) <= sent["loss"].keys()
    for name, values in in_log(run).items():
        assert sent[name] == {step: values.expected[step] for step in sent[name]}
    folders = sorted((run / "wandb").glob("offline-run-*"))
    for folder, before in list(zip(folders, completed, strict=True))[1:]:  # no row is sent twice
        assert min(record["step"]["num"] for record in wandb_records(folder, "history")) > before
    assert [record["exit_code"] for folder in folders[1:] for record in wandb_records(folder, "exit")] == [75, 0]


def completed_steps(output: str) -> int:
    """Return the number of completed steps that a run prints when it starts."""
    return int(re.search(r"steps, ([\d,]+) completed", output)[1].replace(",", ""))


@pytest.mark.usefixtures("offline")
def test_tracker_can_be_added_on_resume(run_script, pretrained, text_data, tmp_path):
    """--report_to does not define the run. Rows that were logged before are sent too."""
    shutil.copytree(pretrained, tmp_path / "run")
    args = ("pretrain.py", "--data", text_data, "--out", "run", *TRAIN, *OFTEN)
    done = run_script(*args, *BOTH)
    assert "tensorboard --logdir" in done.stdout and "wandb sync run/wandb" in done.stdout and not done.stderr
    assert in_tensorboard(tmp_path / "run") == in_log(pretrained)
    assert in_wandb(tmp_path / "run") == in_log(pretrained)
    run_script(*args)


@pytest.mark.usefixtures("offline")
def test_run_that_starts_again_has_a_new_wandb_id(tmp_path):
    """A run without a checkpoint starts with an empty log."""
    ids = []
    for _ in range(2):
        tracker = open_tracker("wandb", tmp_path, pretrain.Config(), 0)
        ids.append(tracker.run.id)
        tracker.run.finish()
    assert ids[0] != ids[1]


ROW = {"step": 7, "tokens": 70, "hellaswag": 0.25, "val_loss": None, "note": "a\n# b"}
ROW |= {"samples": [{"prompt": "Once", "text": "upon\n  a time"}, {"prompt": "One", "text": "<b>two</b>"}]}


@pytest.mark.usefixtures("offline")
def test_numbers_become_curves_and_samples_become_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = open_tracker("tensorboard", tmp_path, pretrain.Config(), 0)
    tracker.log(ROW)
    tracker.writer.close()
    assert in_tensorboard(tmp_path) == {"hellaswag": {7: 0.25}}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "**prompt**\n\n    Once\n\n**text**\n\n    upon\n      a time" in texts["samples/text_summary"]
    assert texts["note/text_summary"] == "    a\n    # b" and "6e-4" not in texts["config/text_summary"]
    assert "**lr**\n\n    0.0018" in texts["config/text_summary"]

    tracker = open_tracker("wandb", tmp_path, pretrain.Config(), 0)
    tracker.log(ROW)
    tracker.run.finish()
    folder = next((tmp_path / "wandb").glob("offline-run-*"))
    (history,) = wandb_records(folder, "history")
    assert history["item"]["note"] == "a\n# b" and history["item"]["hellaswag"] == 0.25
    assert history["item"]["tokens"] == 70
    assert "val_loss" not in history["item"] and history["step"] == {"num": 7}
    table = json.loads(next(folder.glob("files/media/table/*.json")).read_text())
    assert table["columns"] == ["prompt", "text"] and table["data"][1] == ["One", "<b>two</b>"]


@pytest.mark.usefixtures("offline")
def test_script_that_ends_with_an_error_keeps_its_rows(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import pretrain; from pathlib import Path\n"
    script += "from minigpt.metrics import open_tracker\n"
    script += "trackers = [open_tracker(n, Path(), pretrain.Config(), 0) for n in ('tensorboard', 'wandb')]\n"
    script += "for tracker in trackers: tracker.log({'step': 1, 'loss': 2.5})\n"
    done = subprocess.run([sys.executable, "-c", script + "1 / 0", ROOT], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert in_tensorboard(tmp_path) == in_wandb(tmp_path) == {"loss": {1: 2.5}}
    assert wandb_records(next((tmp_path / "wandb").glob("offline-run-*")), "exit")[0]["exit_code"] == 1


@pytest.mark.usefixtures("offline")
def test_missing_login_and_library_are_reported_before_any_work(fails, text_data, monkeypatch):
    args = ("pretrain.py", "--data", text_data, "--out", "run", *TRAIN, "--report_to", "wandb")
    assert "`wandb login` first" in fails(*args, env={"WANDB_MODE": "online"})
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(UserError, match=r"--report_to wandb is not installed: pip install -r requirements-extra.txt"):
        check_train_config(pretrain.Config(report_to=("tensorboard", "wandb")))
    check_train_config(replace(pretrain.Config(), report_to=("tensorboard",)))
