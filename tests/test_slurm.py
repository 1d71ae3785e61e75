"""The job scripts on a real Slurm: a controller and one node on this machine, if slurm-wlm and munge are installed."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN, read_log
from screenshot import free_port
from test_prepare_fineweb import write_jsonl

from minigpt import runs
from minigpt.dataset import TokenDataset

CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=1
MinJobAge=3600
KillWait=60
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Return a function that runs a Slurm command."""
    if not all(shutil.which(name) for name in DAEMONS) or os.geteuid() != 0:
        pytest.skip("needs root and the packages slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), folder=folder, ports=[free_port(), free_port()], cpus=os.cpu_count())
    )
    env = os.environ | {"SLURM_CONF": str(config), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["OMP_NUM_THREADS"] = "1"
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge")
    commands = (["runuser", "-u", "munge", "--", "munged", "--foreground"], ["slurmctld", "-D"], ["slurmd", "-D"])
    daemons = [subprocess.Popen(command, env=env) for command in commands]

    def command(*arguments: object) -> str:
        done = subprocess.run(list(map(str, arguments)), env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        wait_for(lambda: "idle" in subprocess.run(["sinfo"], env=env, capture_output=True, text=True).stdout)
        yield command
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def submit(slurm: Callable[..., str], folder: Path, script: str, *arguments: object) -> str:
    """Submit a job on one node without GPUs; return its number. Its output is the file job.txt."""
    options = ("--parsable", "--nodes=1", "--gpus-per-node=0", f"--chdir={ROOT}", f"--output={folder}/job.txt")
    return slurm("sbatch", *options, ROOT / "slurm" / script, *arguments).strip()


def test_a_job_is_requeued_until_the_run_is_done(slurm, text_data, run_script, tmp_path):
    """It is signalled as before its time limit, saves, starts again by itself, and ends with the same weights."""
    flags = ("--data", text_data, *TRAIN, "--steps", 400, "--save_every", 100, "--val_every", 200)
    job = submit(slurm, tmp_path, "pretrain.sbatch", *flags, "--out", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 20,' in log.read_text())
    slurm("scancel", "--signal=USR1", job)
    wait_for(lambda: "step_000400" in str(runs.list_checkpoints(tmp_path / "run")), 240)
    printed = (tmp_path / "job.txt").read_text()
    assert "stopped by SIGUSR1 after step" in printed and "done: 400 steps" in printed
    assert not (tmp_path / "run" / "stopped").exists()
    run_script("pretrain.py", *flags, "--out", "./whole")
    weights = [(tmp_path / run / "step_000400" / "model.safetensors").read_bytes() for run in ("run", "whole")]
    assert weights[0] == weights[1]
    steps = [row["step"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, 401))


def test_a_job_that_fails_is_not_requeued(slurm, text_data, tmp_path):
    """Not even if an earlier job of the run was stopped."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stopped").write_text("SIGUSR1 after step 5\n")
    job = submit(slurm, tmp_path, "pretrain.sbatch", f"--out={tmp_path}/run", "--data", text_data, *TRAIN, "--lr", -1)
    wait_for(lambda: "JobState=FAILED" in slurm("scontrol", "show", "job", job))
    assert "Requeue=1 Restarts=0" in slurm("scontrol", "show", "job", job)
    assert "--lr is -1.0: it must be above 0" in (tmp_path / "job.txt").read_text()


def test_an_array_prepares_one_dataset(slurm, tmp_path):
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"File {i}, document {j}." for j in range(200)])
    flags = ("--files", tmp_path / "*.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.2, "--out", tmp_path / "out")
    options = (f"--chdir={ROOT}", "--array=1-3", "--cpus-per-task=1", f"--output={tmp_path}/part_%a.txt")
    slurm("sbatch", *options, ROOT / "slurm" / "prepare.sbatch", *flags)
    wait_for(lambda: (tmp_path / "out" / "meta.json").exists())
    assert TokenDataset(tmp_path / "out", 16).n_rows["train"] > 100
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["train"]["documents"] > 500
