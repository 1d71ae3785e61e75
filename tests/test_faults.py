"""What a run survives: kills, signals, time limits, corrupt files, a full disk, non-finite values, a second process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import hub
import pyarrow
import pyarrow.parquet
import pytest
import soak
import torch
from conftest import ROOT, TRAIN, TUNE, distributed_env, error_of, read_log, start
from forked import ForkedProcess
from screenshot import free_port
from torch import nn

from minigpt import checkpoint, runs
from minigpt.cli import UserError
from minigpt.dataset import Batch
from minigpt.distributed import Processes
from minigpt.files import append_line, lock_folder
from minigpt.metrics import MAX_SKIPPED_STEPS
from minigpt.optim import build_optimizer
from minigpt.run import EXIT_STOPPED
from minigpt.shards import read_meta
from minigpt.training import train_step
from model import GPT, GPTConfig

LONG = ("--model", "tiny", "--batch_tokens", 2048, "--micro_batch_size", 8, "--lr", 3e-3, "--dropout", 0.1)
LONG = (*LONG, "--steps", 100, "--val_every", 1000, "--save_every", 1000)


def spawn(*args: object, cwd: Path, processes: int = 1, launcher: tuple = ()) -> ForkedProcess:
    """Start a script, or several of it under torchrun, in a process group of its own, and do not wait."""
    if processes > 1:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher)
    return ForkedProcess([*launcher, ROOT / str(args[0]), *args[1:]], cwd)


def wait_for_step(run: Path, step: int, process: ForkedProcess) -> None:
    """Wait until a run has logged a step."""
    for _ in range(600):
        if (run / "log.jsonl").exists() and f'"step": {step},' in (run / "log.jsonl").read_text():
            return
        assert process.poll() is None, "".join(process.communicate())
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text_data) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start("pretrain.py", "--data", text_data, "--out", folder, *LONG, cwd=folder.parent)
    return folder


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_twelve_kills(text_data, tmp_path):
    """Killed before the system calls of a save, see soak.py; `make soak` does it two hundred times."""
    assert soak.survive(12, text_data, tmp_path) >= 1


def test_killed_preparation_resumes(tmp_path):
    """Killed before each call that touches a shard, it produces the bytes of an uninterrupted run."""
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i} says {i * i}.\n\n" for i in range(150_000)))
    flags = ("--tokenizer", "bytes", "--val_fraction", 0.2, "--shard_tokens", 400_000)
    args = ("prepare_fineweb.py", "--files", tmp_path / "a.txt", *flags)
    soak.launch(*args, "--out", tmp_path / "peace")
    for kill_at in (*range(1, 60, 4), None):
        done = soak.launch(*args, "--out", tmp_path / "out", kill=kill_at)
        whole = (tmp_path / "out" / "meta.json").exists()
        assert done.returncode == (0 if kill_at is None else -signal.SIGKILL) or whole, done.stderr
        if not whole:
            with pytest.raises(UserError, match="is incomplete"):
                read_meta(tmp_path / "out", "text")
    peace, out = ({file.name: file.read_bytes() for file in (tmp_path / f).iterdir()} for f in ("peace", "out"))
    assert out == peace


def test_killed_preparation_keeps_finished_shards(tmp_path):
    """After a kill near the end, only about the last shard is tokenised again."""
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i} says {i * i}.\n\n" for i in range(400_000)))
    flags = ("--tokenizer", "bytes", "--val_fraction", 0.2, "--shard_tokens", 1_000_000)
    args = ("prepare_fineweb.py", "--files", tmp_path / "a.txt", "--out", tmp_path / "out", *flags)
    soak.launch(*args, kill=70)
    progress = json.loads((tmp_path / "out" / "incomplete.json").read_text())["progress"]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("train_*.npy")}
    assert progress["position"] > 100 and len(kept) > 2
    assert soak.launch(*args).returncode == 0
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items() if file.name in str(progress))


def test_a_faulty_hub_changes_no_byte(tmp_path):
    """Every fifth request gets a 503, every fifth body is truncated."""
    (tmp_path / "files").mkdir()
    for i in range(3):
        texts = [f"File {i}, document {j}: " + " ".join(str(j * k) for k in range(300)) for j in range(600)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "files" / f"train-{i}-of-3.parquet")
    flags = ("--dataset", "some/texts", "--tokenizer", "bytes", "--val_fraction", 0.1, "--shard_tokens", 300_000)
    for out, faults in {"peace": {}, "faulty": {"error_every": 5, "drop_every": 5}}.items():
        with hub.serve(tmp_path / "files", **faults) as address:
            there = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / out / "hf"), "HF_HUB_OFFLINE": "0"}
            done = start("prepare_fineweb.py", *flags, "--out", f"{out}/data", cwd=tmp_path, env=there)
    assert "503" in done.stderr and "Retrying" in done.stderr
    peace, faulty = (
        {f.name: f.read_bytes() for f in (tmp_path / out / "data").iterdir()} for out in ("peace", "faulty")
    )
    assert len(peace) > 10 and faulty == peace


def test_torchrun_restarts_a_dead_process(text_data, tmp_path):
    """One of two processes dies; both restart from the last checkpoint, and the log has each step once."""
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--micro_batch_size", 4)
    args += ("--steps", 40, "--save_every", 10)
    process = spawn(*args, cwd=tmp_path, processes=2, launcher=("--max-restarts=1",))
    wait_for_step(tmp_path / "run", 25, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    output = "".join(process.communicate(timeout=120))
    assert process.returncode == 0, output
    steps = [row["step"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 41))


STORE = "import signal; from torch.distributed import TCPStore; s = TCPStore('127.0.0.1', {}, is_master=True, \
wait_for_workers=False); signal.pause()"


def test_two_machines_survive_the_loss_of_either(text_data, tmp_path, monkeypatch):
    """Each torchrun is killed once, and started again; the run ends with the losses of an uninterrupted one.

    The torchruns meet at a store that is neither's.
    """
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    port = free_port()
    store = subprocess.Popen([sys.executable, "-c", STORE.format(port)])
    launcher = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3")
    launcher += ("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--monitor_interval=0.1")
    launcher += ("--rdzv_conf=is_host=0,keep_alive_interval=1,keep_alive_max_attempt=2,last_call_timeout=1",)
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--micro_batch_size", 4, "--save_every", 10)
    start(*args, "--out", "./whole", cwd=tmp_path)
    machines = [spawn(*args, cwd=tmp_path, launcher=launcher) for _ in range(2)]
    try:
        for lost, step in enumerate((15, 55)):
            wait_for_step(tmp_path / "run", step, machines[1 - lost])
            machines[lost].kill()
            machines[lost].wait(10)
            machines[lost] = spawn(*args, cwd=tmp_path, launcher=launcher)
        outputs = ["".join(machine.communicate(timeout=120)) for machine in machines]
    finally:
        for process in (*machines, store):
            process.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "warning: with several machines" not in "".join(outputs)
    whole, losses = ([row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in ("whole", "run"))
    assert losses == pytest.approx(whole, rel=1e-5) and len(losses) == 100


def test_a_stop_is_no_failure_to_restart(text_data, tmp_path):
    """With restarts, torchrun must not start a run again that was stopped; a file tells a job script of the stop."""
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *TRAIN, "--micro_batch_size", 4)
    process = spawn(*args, "--max_minutes", 1e-9, cwd=tmp_path, processes=2, launcher=("--max-restarts=2",))
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 0 and output.count("stopped by --max_minutes") == 1
    assert (tmp_path / "run" / "stopped").read_text() == "--max_minutes 1e-09 after step 0\n"
    start(*args, cwd=tmp_path)
    assert not (tmp_path / "run" / "stopped").exists()


def test_the_clock_of_torchrun_continues_over_restarts(tmp_path):
    code = "import time; from minigpt.distributed import seconds_since_launch; print(seconds_since_launch())"

    def measure(**env) -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=True)
        return float(done.stdout)

    own, launchers = measure(), measure(TORCHELASTIC_RUN_ID="none")
    assert 0 < own < 60 and launchers >= own + time.process_time() / 2  # this process is the launcher


def test_machines_must_share_the_run_folder(text_data, tmp_path):
    """At the first start, when there is no checkpoint that one of them could miss."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    command = ("--data", text_data, "--out", "./run", *TRAIN)
    for error in start_two([command] * 2, folders):
        assert "is not the same folder on process 1 as on process 0: give a folder that all machines share" in error


# ---- stopped --------------------------------------------------------------------------------------------------------


def test_a_signal_saves_and_stops(text_data, whole, tmp_path):
    """The step is finished and saved, the exit code is 75, and the resumed run equals an uninterrupted one."""
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG)
    for number, step in {signal.SIGTERM: 5, signal.SIGINT: 25, signal.SIGUSR1: 45}.items():
        process = spawn(*args, cwd=tmp_path)
        wait_for_step(tmp_path / "run", step, process)
        process.send_signal(number)
        output = "".join(process.communicate(timeout=60))
        assert process.returncode == EXIT_STOPPED == 75 and f"stopped by {number.name} after step" in output
        last = read_log(tmp_path / "run")[-1]["step"]
        assert runs.find_newest(tmp_path / "run").name == f"step_{last:06d}" and step <= last < 100
    start(*args, cwd=tmp_path)
    soak.assert_equal(whole, tmp_path / "run")


def test_a_signal_to_torchrun_stops_all_processes(text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--micro_batch_size", 4)
    process = spawn(*args, cwd=tmp_path, processes=2)
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode != 0 and "stopped by SIGTERM" in output
    last = read_log(tmp_path / "run")[-1]["step"]
    assert runs.find_newest(tmp_path / "run").name == f"step_{last:06d}"


def test_a_signal_to_one_process_stops_all(text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--micro_batch_size", 4)
    command = [ROOT / args[0], *args[1:]]
    processes = [ForkedProcess(command, tmp_path, os.environ | rank) for rank in distributed_env(2)]
    wait_for_step(tmp_path / "run", 5, processes[0])
    processes[1].send_signal(signal.SIGUSR1)
    output = "".join(processes[0].communicate(timeout=60))
    assert processes[0].returncode == processes[1].wait(60) == EXIT_STOPPED
    assert "stopped by a signal to another process" in output and runs.find_newest(tmp_path / "run") is not None


def test_processes_end_when_torchrun_is_killed(text_data, tmp_path):
    """They do not go on as orphans: they save and stop."""
    process = spawn(
        "pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--steps", 5000, cwd=tmp_path, processes=2
    )
    wait_for_step(tmp_path / "run", 5, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for _ in range(300):
        if not any(Path(f"/proc/{child}").exists() for child in children):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert runs.find_newest(tmp_path / "run") is not None


def test_a_second_interrupt_exits_at_once(text_data, tmp_path):
    """In the middle of a step of many micro-batches, without a checkpoint."""
    slow = ("--batch_tokens", 2**20, "--micro_batch_size", 1)
    process = spawn("pretrain.py", "--data", text_data, "--out", "./run", *LONG, *slow, cwd=tmp_path)
    wait_for_step(tmp_path / "run", 0, process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=10))
    assert "\nstopping after this step; press Ctrl-C again to stop now\n" in output
    assert process.returncode == 130 and not runs.list_checkpoints(tmp_path / "run")


def test_the_clock_stops_finetuning_too(run_script, pretrained, chat_data, tmp_path):
    args = ("finetune.py", "--init", pretrained, "--data", chat_data, "--out", "./run", *TUNE)
    done = run_script(*args, "--max_minutes", 1e-9, expect=EXIT_STOPPED)
    assert "stopped by --max_minutes 1e-09 after step 0" in done.stdout
    run_script(*args)
    run_script(*args[:6], "./whole", *TUNE)
    soak.assert_equal(tmp_path / "whole", tmp_path / "run")


# ---- corrupt ---------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replace_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, replace_by_a_folder, replace_by_a_pipe])
@pytest.mark.parametrize("name", ["model.safetensors", "train_state.safetensors", "meta.json"])
def test_training_falls_back_to_the_newest_good_checkpoint(run_script, pretrained, text_data, tmp_path, name, damage):
    shutil.copytree(pretrained, tmp_path / "run")
    damage(tmp_path / "run" / "step_000012" / name)
    often = ("--val_every", 4, "--save_every", 6)
    done = run_script("pretrain.py", "--data", text_data, "--out", "./run", *TRAIN, *often)
    assert name in done.stderr and "trying an earlier checkpoint" in done.stderr and "6 completed" in done.stdout
    assert "renamed run/step_000012 to step_000012.corrupt" in done.stderr
    soak.assert_equal(pretrained, tmp_path / "run")
    done = run_script("pretrain.py", "--data", text_data, "--out", "./run", *TRAIN, *often)
    assert "12 completed" in done.stdout and not done.stderr


def test_no_new_start_if_all_checkpoints_are_corrupt(fails, pretrained, text_data, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    for file in (tmp_path / "run").glob("*/model.safetensors"):
        truncate(file)
    command = ("pretrain.py", "--data", text_data, "--out", "./run", *TRAIN)
    done = start(*command, cwd=tmp_path, expect=2)
    assert "error: all checkpoints of run are corrupt" in done.stderr
    assert len(runs.list_checkpoints(tmp_path / "run")) == 2


def start_two(commands: list[tuple], folders: list[Path]) -> list[str]:
    """Start two processes of one run as on two machines; return their stderr. Both must exit with code 2."""
    ranks = [os.environ | rank | {"LOCAL_RANK": "0"} for rank in distributed_env(2)]
    triples = zip(commands, folders, ranks, strict=True)
    processes = [ForkedProcess([ROOT / "pretrain.py", *command], cwd, env) for command, cwd, env in triples]
    assert [process.wait(60) for process in processes] == [2, 2]
    return [process.stderr.read_text() for process in processes]


def test_processes_with_different_flags_do_not_train(text_data, tmp_path):
    """As on two machines of which one has old files or another command."""
    args = ("--data", text_data, "--out", "./run", *TRAIN[:-1])
    for error in start_two([(*args, 1e-3), (*args, 2e-3)], [tmp_path] * 2):
        assert "lr differs between the processes: it is 0.001 on process 0 and 0.002 on process 1; start all" in error
    assert not runs.list_steps(tmp_path / "run")


def test_a_process_that_hangs_ends_the_run(text_data, tmp_path):
    args = ("--data", text_data, "--out", "./run", *LONG, "--steps", 100_000, "--timeout_minutes", 0.1)
    command = [ROOT / "pretrain.py", *args, "--micro_batch_size", 4]
    processes = [ForkedProcess(command, tmp_path, os.environ | rank) for rank in distributed_env(2)]
    wait_for_step(tmp_path / "run", 5, processes[0])
    os.kill(processes[1].pid, signal.SIGSTOP)
    _, errors = processes[0].communicate(timeout=60)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert processes[0].returncode == 1 and "Traceback" not in errors
    assert errors.endswith(
        "error: another process hangs or is too slow: see --timeout_minutes; run the same command again to resume\n"
    )


def test_all_processes_report_an_error_of_the_main_process(text_data, tmp_path):
    """None waits for the others: the run belongs to another process, whose lock only the main process tries."""
    lock = lock_folder(tmp_path / "run")
    for error in start_two([("--data", text_data, "--out", "./run", *TRAIN)] * 2, [tmp_path] * 2):
        assert "run is in use by another process" in error
    lock.release()


def test_data_that_is_truncated_under_a_running_job(text_data, fails, tmp_path):
    """The operating system ends the process; the traceback shows where, and the next start names the file."""
    shutil.copytree(text_data, tmp_path / "data")
    args = ("pretrain.py", "--data", "data", "--out", "./run", *LONG, "--steps", 100_000)
    process = spawn(*args, cwd=tmp_path)
    wait_for_step(tmp_path / "run", 5, process)
    for file in (tmp_path / "data").glob("train_*.npy"):
        os.truncate(file, 0)
    assert process.wait(60) == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in process.stderr.read_text()
    assert "dataset.py" in process.stderr.read_text()
    assert "train_000000.npy is corrupt or truncated" in fails(*args)


# ---- a full disk, no permission --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here: " + mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_no_checkpoint(text_data, small_disk, tmp_path):
    """The disk fills up at about the second checkpoint: the error names the folder, the first checkpoint is whole.

    Both processes end with this error, although only one of them writes.
    """
    (small_disk / "ballast").write_bytes(bytes(1_200_000))
    args = ("pretrain.py", "--data", text_data, "--out", small_disk / "run", *TRAIN, "--save_every", 4, "--keep", 9)
    done = start(*args, "--micro_batch_size", 4, cwd=tmp_path, processes=2, expect=2)
    assert f"{small_disk}/run/step_0000" in done.stderr and "unchanged" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "closed" not in done.stderr, done.stderr
    kept = runs.find_newest(small_disk / "run")
    assert kept is not None and not list((small_disk / "run").glob("*.tmp"))
    (small_disk / "ballast").unlink()
    start(*args, cwd=tmp_path)


def test_a_dry_run_of_two_processes_reports_too_little_disk(text_data, small_disk, tmp_path):
    """The main process alone looks at the disk, and none waits for it."""
    args = ("pretrain.py", "--data", text_data, "--out", small_disk / "run", *TRAIN, "--keep", 20, "--dry_run")
    done = start(*args, "--micro_batch_size", 4, cwd=tmp_path, processes=2, expect=2)
    assert "its checkpoints do not fit on the disk" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_while_preparing(small_disk, tmp_path):
    (tmp_path / "a.txt").write_text("Some words.\n\n" * 200_000)
    args = ("prepare_fineweb.py", "--files", "a.txt", "--tokenizer", "bytes", "--out", small_disk / "data")
    args = (*args, "--shard_tokens", 300_000, "--val_fraction", 0.2)
    done = start(*args, cwd=tmp_path, expect=2)
    assert f"{small_disk}/data/" in done.stderr and "free some space" in done.stderr
    assert not (small_disk / "data" / "meta.json").exists() and not list((small_disk / "data").glob("*.npy.tmp"))


def test_a_full_disk_leaves_whole_lines(small_disk):
    """A line is appended whole or not at all, and the error names the file."""
    file, n_lines = small_disk / "log.jsonl", 0
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{file}'")):
        while True:
            append_line(file, "x" * 9_999)
            n_lines += 1
    assert file.read_bytes() == (b"x" * 9_999 + b"\n") * n_lines and n_lines > 100


@pytest.mark.parametrize("script, name", [("prepare_sample.py", "text.jsonl"), ("plot.py", "loss.png")])
def test_a_full_disk_leaves_no_partial_file(script, name, pretrained, small_disk, tmp_path):
    (small_disk / "ballast").write_bytes(bytes(2_060_000))
    args = (pretrained, "--out", small_disk / name) if script == "plot.py" else ("--out", small_disk)
    error = error_of(start(script, *args, cwd=tmp_path, expect=2))
    assert error == f"{small_disk}/{name}: No space left on device: free some space and run the same command again"
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_full_disk_while_exporting(pretrained, small_disk, tmp_path):
    pytest.importorskip("tokenizers")
    (small_disk / "ballast").write_bytes(bytes(2_000_000))
    done = start("export.py", "--checkpoint", pretrained, "--out", small_disk / "here", cwd=tmp_path, expect=2)
    assert f"--out {small_disk}/here could not be written" in error_of(done) and "No space left" in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_no_permission(fails, text_data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "locked" in fails("pretrain.py", "--data", text_data, "--out", "./locked/run", *TRAIN)


# ---- non-finite values -----------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """A model whose loss or gradient becomes non-finite on request."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model, self.poison = model, None

    def forward(self, *args):
        loss = self.model(*args)
        if self.poison == "gradient":  # a finite loss with an infinite gradient
            loss = loss + torch.sqrt((self.model.ln_f.bias.sum() - self.model.ln_f.bias.sum().detach()).abs())
        return loss * {None: 1.0, "gradient": 1.0}.get(self.poison, self.poison)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "gradient"])
def test_non_finite_steps_change_nothing(poison, optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8))
    wrapped, procs = Poisoned(model), Processes(0, 1, torch.device("cpu"), torch.float32)
    optimizer = build_optimizer(model, 1e-2, 0.1, optimizer)
    batch = Batch(torch.randint(9, (2, 8)), torch.randint(9, (2, 8)))

    def bits() -> list[bytes]:
        state = checkpoint.optimizer_state_dict(model, optimizer)
        return [tensor.detach().numpy().tobytes() for tensor in (*model.state_dict().values(), *state.values())]

    train_step(wrapped, [batch], optimizer, 1e-2, 1.0, procs)
    before = bits()
    wrapped.poison = poison
    metrics = train_step(wrapped, [batch], optimizer, 1e-2, 1.0, procs)
    assert not (metrics["loss"].isfinite() and metrics["grad_norm"].isfinite())
    assert bits() == before
    wrapped.poison = None
    train_step(wrapped, [batch], optimizer, 1e-2, 1.0, procs)
    assert bits() != before


def test_a_run_with_non_finite_losses_stops(tmp_path, text_data):
    """From step 9 every loss is NaN: steps are skipped and logged, then the run stops and names a checkpoint."""
    script = tmp_path / "poisoned.py"
    script.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from minigpt import training\n"
        "real, calls = training.train_step, []\n"
        "def step(trained, *args):\n"
        "    calls.append(1)\n"
        "    poisoned = trained if len(calls) < 9 else lambda *a: trained(*a) * float('nan')\n"
        "    if poisoned is not trained: poisoned.parameters = trained.parameters\n"
        "    return real(poisoned, *args)\n"
        "training.train_step = step\n"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    args = ["--data", text_data, "--out", "./run", *TRAIN, "--steps", 40, "--save_every", 4]
    done = start(script, *args, cwd=tmp_path, expect=2)
    assert f"not finite in {MAX_SKIPPED_STEPS} consecutive steps, up to step 13" in done.stderr
    assert "run/step_000012" in done.stderr
    skipped = [row for row in read_log(tmp_path / "run") if row.get("skipped")]
    assert [row["step"] for row in skipped] == [9, 10, 11, 12, 13] and skipped[0]["loss"] is None
    weights = checkpoint.load_model(tmp_path / "run" / "step_000012", runs.read_meta(tmp_path / "run/step_000012"))
    assert all(weight.isfinite().all() for weight in weights.state_dict().values())


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_lives(fails, text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, "--out", "./run", *LONG, "--steps", 100_000)
    process = spawn(*args, cwd=tmp_path)
    wait_for_step(tmp_path / "run", 5, process)
    try:
        assert "in use by another process" in fails(*args)
    finally:
        process.kill()
        process.communicate()
    start(*args, "--max_minutes", 0.001, cwd=tmp_path, expect=EXIT_STOPPED)  # a dead process holds no lock


def test_a_second_preparation_is_refused_while_the_first_lives(fails, run_script, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i}.\n\n" for i in range(20_000)))
    args = ("prepare_fineweb.py", "--files", "a.txt", "--tokenizer", "bytes", "--val_fraction", 0.2, "--out", "data")
    lock = lock_folder(tmp_path / "data")
    assert "data is in use by another process" in fails(*args)
    lock.release()
    run_script(*args)
