"""Run scripts in processes forked from one that has imported torch, because the import takes longer than most runs."""

import atexit
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["numpy", "torch", "torch._dynamo", "torch.nn.parallel", "safetensors.torch", "tyro"])


class ForkedProcess:
    """Run `python *command` in a new session. Has the methods of `subprocess.Popen` that the tests use.

    `stdout` and `stderr` are the paths of files.

    Args:
        command: a script's path, or "-m" and a module; then its arguments.
        input: text for stdin.
        terminal: the path of a terminal that becomes its stdin, stdout and stderr, and controls it.
    """

    def __init__(self, command: list, cwd: Path | None = None, env: dict | None = None, input: str = "", terminal=None):
        self.args, self.folder = list(map(str, command)), tempfile.TemporaryDirectory()
        files = [str(Path(self.folder.name) / name) for name in ("stdin", "stdout", "stderr")]
        Path(files[0]).write_text(input)
        self.stdout, self.stderr = map(Path, files[1:])
        streams = [terminal] * 3 if terminal else files
        target = (self.args, str(cwd or Path.cwd()), dict(env or os.environ), streams)
        self.process = CONTEXT.Process(target=run, args=target)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process; return what it wrote to stdout and stderr. A process that hangs prints its stack."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as error:
            os.kill(self.pid, signal.SIGABRT)  # the scripts enable faulthandler
            self.process.join(10)
            raise TimeoutError(f"{error}\n{self.stderr.read_text()}") from None
        return self.stdout.read_text(), self.stderr.read_text()

    def first_line(self) -> str:
        """Wait for the first line on stdout, or for the end of the process."""
        while self.poll() is None and not (self.stdout.exists() and "\n" in self.stdout.read_text()):
            time.sleep(0.05)
        return self.stdout.read_text().partition("\n")[0]

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: list[str], cwd: str, env: dict, streams: list[str]) -> None:
    """Become `python *command`, in the forked process."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, file in enumerate(streams):
        # The first terminal that a session opens controls it.
        opened = os.open(file, os.O_RDWR | (0 if file.startswith("/dev/") else os.O_CREAT | os.O_APPEND))
        os.dup2(opened, descriptor)
        os.close(opened)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    # multiprocessing gives children /dev/null as stdin; the other streams remember that the server's were files.
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding)
    stdout, stderr = (io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)) for descriptor in (1, 2))
    sys.stdout = io.TextIOWrapper(stdout, encoding, line_buffering=os.isatty(1))
    sys.stderr = io.TextIOWrapper(stderr, encoding, errors="backslashreplace", line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()  # multiprocessing skips them
