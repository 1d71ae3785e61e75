"""Two machines, as network namespaces connected by a veth pair. Needs root and iproute2."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, read_log, start
from test_faults import LONG
from test_slurm import wait_for

HOSTS = "127.0.0.1 localhost\n10.77.0.1 {0}\n10.77.0.2 {1}\n"
LAUNCHER = ("--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=gpt2")
LAUNCHER += ("--monitor_interval=0.1", "--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=5,last_call_timeout=1")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Create the namespaces and yield their names, which are also their host names."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"machine{i}-{os.getpid()}" for i in (1, 2)]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}")
    for i, name in enumerate(names, 1):
        commands += [f"ip -n {name} link set lo up", f"ip -n {name} addr add 10.77.0.{i}/24 dev eth0"]
        commands += [f"ip -n {name} link set eth0 up"]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"network namespaces cannot be created here: {done.stderr.strip()}")
        for name in names:
            hosts = Path("/etc/netns") / name / "hosts"  # `ip netns exec` mounts it over /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text(HOSTS.format(*names))
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


def launch(machine: str, log: Path, *command: object) -> subprocess.Popen:
    """Start a command on a machine; its output goes to `log`."""
    shell = ("ip", "netns", "exec", machine, "unshare", "--uts", "sh", "-c", f'hostname {machine}; exec "$@"', "sh")
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen([*shell, *map(str, command)], cwd=log.parent, env=env, **options)


def last_step(run: Path) -> int:
    rows = read_log(run) if (run / "log.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def test_a_second_machine_joins_and_is_lost(machines, text_data, tmp_path):
    """The run uses one machine, then two, then one, and ends with the losses of an uninterrupted run."""
    args = (ROOT / "pretrain.py", "--data", text_data, *LONG, "--micro_batch_size", 4, "--save_every", 10)
    args += ("--steps", 400)
    torchrun = (sys.executable, "-m", "torch.distributed.run", *LAUNCHER, f"--rdzv_endpoint={machines[0]}:29400")
    run, outputs = tmp_path / "run", [tmp_path / "first.txt", tmp_path / "second.txt"]
    processes = [launch(machines[0], outputs[0], *torchrun, *args, "--out", run)]
    try:
        wait_for(lambda: last_step(run) >= 20)
        processes.append(launch(machines[1], outputs[1], *torchrun, *args, "--out", run))
        wait_for(lambda: "2 processes" in outputs[0].read_text())
        step = last_step(run)
        wait_for(lambda: last_step(run) >= step + 20)
        os.killpg(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(120) == 0, outputs[0].read_text()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    start(*args, "--out", "./whole", cwd=tmp_path)
    whole, losses = ([row["loss"] for row in read_log(tmp_path / run) if "loss" in row] for run in ("whole", "run"))
    assert losses == pytest.approx(whole, rel=1e-5) and len(losses) == 400
