"""Kill a training run repeatedly at chosen moments and check that the result equals that of an uninterrupted run.

    make soak                                                       # 200 kills
    .venv/bin/python tests/soak.py --kills 50

Each launch is a real process that dies by SIGKILL. Two of three die before the n-th system call that changes a
checkpoint (creating the folder, writing, flushing, renaming, deleting; a write is cut in half), the third at a random
time.
"""

import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from forked import ForkedProcess

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FLAGS = ("--model", "tiny", "--batch_tokens", 512, "--micro_batch_size", 8, "--lr", 3e-3, "--dropout", 0.1)
OFTEN = ("--steps", 24, "--save_every", 2, "--val_every", 8, "--val_tokens", 640)


WATCHED = re.compile(r"step_\d|\.npy|/meta\.json|/incomplete\.json")


def kill_self(when: int | float) -> None:
    """Let this process die: before the n-th call that changes a checkpoint or shard, or after a time in seconds if
    `when` is a float."""
    import safetensors.torch

    count = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def event() -> None:
        nonlocal count
        count += 1
        if count == when:
            die()

    def audit(name: str, args: tuple) -> None:
        changes = name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        changes |= name == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and WATCHED.search(str(args[0])):
            event()

    def fsync(handle: int, real=os.fsync) -> None:
        event()
        real(handle)

    def save_file(tensors: dict, file: Path, real=safetensors.torch.save_file) -> None:
        real(tensors, file)
        if count + 1 == when:
            os.truncate(file, file.stat().st_size // 2)
        event()

    os.fsync, safetensors.torch.save_file = fsync, save_file
    sys.addaudithook(audit)
    if isinstance(when, float):
        timer = threading.Timer(when, die)
        timer.daemon = True
        timer.start()


def launch(script: str, *args: object, kill: int | float | None = None) -> subprocess.CompletedProcess:
    """Run a script as a process that dies as `kill_self` describes."""
    process = ForkedProcess([__file__, "--launch", json.dumps(kill), ROOT / script, *args])
    output = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def survive(kills: int, data: Path, work: Path, report=lambda line: None) -> int:
    """Kill runs on `data` this many times; return the number of runs.

    Raises `AssertionError` if a run does not resume, loses a checkpoint, or differs from an uninterrupted run.
    """
    from minigpt.runs import find_newest

    args = ("pretrain.py", "--data", data, *FLAGS, *OFTEN)
    done = launch(*args, "--out", work / "uninterrupted")
    assert done.returncode == 0, done.stderr
    survived = runs = 0
    at_random = random.Random(0)
    while survived < kills:
        run, newest = work / f"run_{runs}", -1
        while True:
            kill = 1 + (7 * survived + survived // 7) % 31  # covers every moment
            kill = at_random.uniform(0, 2) if survived % 3 == 2 else kill
            done = launch(*args, "--out", run, kill=kill if survived < kills else None)
            if done.returncode == 0:
                break
            assert done.returncode == -signal.SIGKILL, done.stderr
            survived += 1
            found = find_newest(run)
            step = int(found.name[5:]) if found else -1
            assert step >= newest, f"kill {survived} lost step {newest}"
            newest = step
            report(f"kill {survived}: step {max(step, 0)} is whole")
        assert_equal(work / "uninterrupted", run)
        shutil.rmtree(run)
        runs += 1
    return runs


def assert_equal(one: Path, other: Path) -> None:
    """Check that the last checkpoints are equal bit for bit, the logs except for times, and that no files are left."""
    from minigpt.runs import list_checkpoints

    ends = [list_checkpoints(run)[-1] for run in (one, other)]
    assert ends[0].name == ends[1].name
    for file in ("model.safetensors", "train_state.safetensors"):
        assert (ends[0] / file).read_bytes() == (ends[1] / file).read_bytes(), f"{file} differs"
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    for row in [row for log in logs for row in log]:
        row.pop("tokens_per_s", None), row.pop("mfu", None)
    assert logs[0] == logs[1], "the logs differ"
    assert not list(other.glob("*.tmp")), "temporary files are left"


def main() -> None:
    kills = int(sys.argv[sys.argv.index("--kills") + 1]) if "--kills" in sys.argv else 200
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = "".join(f"Paragraph {i} has words, {i} of them.\n\n" * 40 for i in range(800))
        (work / "text.txt").write_text(text)
        flags = ("--tokenizer", "bytes", "--val_fraction", 0.2, "--out", work / "data")
        done = launch("prepare_fineweb.py", "--files", work / "text.txt", *flags)
        assert done.returncode == 0, done.stderr
        runs = survive(kills, work / "data", work, report=print)
    print(f"{kills} kills survived in {runs} runs: weights, optimiser state and logs equal an uninterrupted run's")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--launch"]:
        kill, sys.argv = json.loads(sys.argv[2]), sys.argv[3:]
        if kill is not None:
            kill_self(kill)
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
