"""--log: TensorBoard and Weights & Biases have what log.jsonl has, whatever happens; their own readers read it back."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, read_log
from test_faults import LONG, spawn, wait_for_step

import loggers
import pretrain
from cli import UserError
from training import check_training

REASON = "an extra, of requirements-extra.txt"
OFTEN = ("--val_every", 4, "--save_every", 6)
BOTH = ("--log", "tensorboard", "wandb")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and nobody's account."""
    pytest.importorskip("tensorboard", reason=REASON)
    pytest.importorskip("wandb", reason=REASON)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_SERVICE"):  # the second is left by a test that opens a logger in this process
        monkeypatch.delenv(name, raising=False)


def points(rows: list[dict]) -> dict[str, dict[int, float]]:
    """The numbers of rows by name and step; speeds differ from launch to launch."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not name.startswith(("step", "_", "tokens", "mfu")):
                found.setdefault(name, {})[row["step"]] = value
    return found


def logged(run: Path) -> dict[str, dict[int, float]]:
    return {name: pytest.approx(values, rel=1e-6) for name, values in points(read_log(run)).items()}


def in_tensorboard(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    rows = [{"step": e.step, tag: e.value} for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len({(row["step"], *row) for row in rows}) == len(rows), "a step twice"
    return points(rows)


def in_wandb(run: Path) -> dict[str, dict[int, float]]:
    rows, ids = [], set()
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        ids.add(folder.name.rsplit("-", 1)[1])
        rows += [record["item"] | {"step": record["step"]["num"]} for record in wandb_records(folder, "history")]
    assert len(ids) == 1, "one run, with one id"
    return points(rows)


def wandb_records(folder: Path, kind: str) -> list[dict]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    return [record[kind] for record in records if record["type"] == kind]


def test_a_run_that_is_killed_and_stopped_and_goes_on(text_data, tmp_path):
    """kill -9 leaves steps that come again, Ctrl-C does not; in the end all steps are there once, but for those that
    wandb had not yet written when it was killed."""
    args = ("pretrain.py", "--data", text_data, "--run", "./run", *LONG, "--save_every", 20, "--val_every", 10, *BOTH)
    run, done = tmp_path / "run", []
    for step, number, code in ((35, signal.SIGKILL, -9), (45, signal.SIGINT, 75), (65, signal.SIGTERM, 75)):
        process = spawn(*args, cwd=tmp_path)
        wait_for_step(run, step, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
        done.append(steps_done(output))
    assert "stopped by SIGTERM after step" in output and "wandb:" not in output and "\x1b" not in output
    process = spawn(*args, cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in output, output
    done.append(steps_done(output))
    assert set(logged(run)["loss"].expected) == set(range(1, 101))
    assert in_tensorboard(run) == logged(run) and len(list((run / "tensorboard").iterdir())) == 1
    sent = in_wandb(run)
    assert set(range(21, 101)) <= sent["loss"].keys()
    assert all(
        sent[name] == {step: values.expected[step] for step in sent[name]} for name, values in logged(run).items()
    )
    folders = sorted((run / "wandb").glob("offline-run-*"))
    for folder, before in list(zip(folders, done, strict=True))[1:]:  # what was sent is not sent again
        assert min(record["step"]["num"] for record in wandb_records(folder, "history")) > before
    assert [record["exit_code"] for folder in folders[1:] for record in wandb_records(folder, "exit")] == [75, 75, 0]


def steps_done(output: str) -> int:
    """How many steps a run had done when it was started."""
    return int(re.search(r"([\d,]+) steps done", output)[1].replace(",", ""))


def test_it_may_be_asked_for_later(run_script, pretrained, text_data, tmp_path):
    """It is no part of what a run is, and what was logged before is sent then."""
    shutil.copytree(pretrained, tmp_path / "run")
    args = ("pretrain.py", "--data", text_data, "--run", "./run", *TRAIN, *OFTEN)
    done = run_script(*args, *BOTH)
    assert "tensorboard --logdir" in done.stdout and "wandb sync run/wandb" in done.stdout and not done.stderr
    assert in_tensorboard(tmp_path / "run") == logged(pretrained)
    assert in_wandb(tmp_path / "run") == logged(pretrained)
    run_script(*args)


def test_a_run_that_begins_anew_is_another_one(tmp_path):
    """Nothing of it had been saved: its log has been emptied."""
    ids = []
    for _ in range(2):
        logger = loggers.open_logger("wandb", tmp_path, pretrain.Config(), 0)
        ids.append(logger.run.id)
        logger.run.finish()
    assert ids[0] != ids[1]


ROW = {"step": 7, "tokens": 70, "hellaswag": 0.25, "val_loss": None, "note": "a\n# b"}
ROW |= {"samples": [{"prompt": "Once", "text": "upon\n  a time"}, {"prompt": "One", "text": "<b>two</b>"}]}


def test_what_is_sent_follows_from_its_type(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.open_logger("tensorboard", tmp_path, pretrain.Config(), 0)
    logger.write(ROW)
    logger.writer.close()
    assert in_tensorboard(tmp_path) == {"hellaswag": {7: 0.25}}
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "**prompt**\n\n    Once\n\n**text**\n\n    upon\n      a time" in texts["samples/text_summary"]
    assert texts["note/text_summary"] == "    a\n    # b" and "6e-4" not in texts["config/text_summary"]
    assert "**lr**\n\n    0.0006" in texts["config/text_summary"]

    logger = loggers.open_logger("wandb", tmp_path, pretrain.Config(), 0)
    logger.write(ROW)
    logger.run.finish()
    folder = next((tmp_path / "wandb").glob("offline-run-*"))
    (history,) = wandb_records(folder, "history")
    assert history["item"]["note"] == "a\n# b" and history["item"]["hellaswag"] == 0.25
    assert history["item"]["tokens"] == 70
    assert "val_loss" not in history["item"] and history["step"] == {"num": 7}
    table = json.loads(next(folder.glob("files/media/table/*.json")).read_text())
    assert table["columns"] == ["prompt", "text"] and table["data"][1] == ["One", "<b>two</b>"]


def test_a_script_that_dies_of_an_error_leaves_what_it_logged(tmp_path):
    script = "import sys; sys.path.insert(0, sys.argv[1]); import loggers, pretrain; from pathlib import Path\n"
    script += "opened = [loggers.open_logger(n, Path(), pretrain.Config(), 0) for n in ('tensorboard', 'wandb')]\n"
    script += "for logger in opened: logger.write({'step': 1, 'loss': 2.5})\n"
    done = subprocess.run([sys.executable, "-c", script + "1 / 0", ROOT], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert in_tensorboard(tmp_path) == in_wandb(tmp_path) == {"loss": {1: 2.5}}
    assert wandb_records(next((tmp_path / "wandb").glob("offline-run-*")), "exit")[0]["exit_code"] == 1


def test_what_is_missing_is_said_before_any_work(fails, text_data, monkeypatch, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--run", "./run", *TRAIN, "--log", "wandb")
    assert "`wandb login` first" in fails(*args, env={"WANDB_MODE": "online"})
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(UserError, match=r"--log wandb is not installed: pip install -r requirements-extra.txt"):
        check_training(pretrain.Config(log=("tensorboard", "wandb")))
    check_training(replace(pretrain.Config(), log=("tensorboard",)))
