"""What all scripts share: flags, one-line errors, progress, and a closed output pipe."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import typing

import pytest
from conftest import ROOT, TRAIN

from minigpt import cli
from minigpt.cli import Progress, UserError, check_range

SCRIPTS = (
    "prepare_fineweb",
    "prepare_dolly",
    "prepare_sample",
    "pretrain",
    "finetune",
    "generate",
    "bench",
    "plot",
    "verify",
)


@dataclasses.dataclass(frozen=True)
class Config:
    block_size: int = 8
    """How long."""


def run(monkeypatch, main, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    cli.run(main, Config, "What it does.")


def raising(error: BaseException):
    def main(config: Config) -> None:
        raise error

    return main


# ---- errors in one line --------------------------------------------------------------------------------------------


def test_flags_become_the_config(monkeypatch):
    seen = []
    run(monkeypatch, seen.append, "--block_size", "16")
    run(monkeypatch, seen.append)
    assert seen == [Config(16), Config(8)]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("two lines\n  become one"), 2, "error: two lines become one"),
        (UserError("a.jsonl: \x1b[31m\x9b2J, \u00e9"), 2, "error: a.jsonl: \ufffd[31m\ufffd2J, \u00e9"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "out/a.npy"), 2, "error: out/a.npy: Permission denied"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:542] Connection closed by peer [127.0.0.1]:3542"),
            1,
            "error: another process has ended: run the same command again to resume",
        ),
        (OSError(errno.EIO, "Input/output error"), 2, "error: file system: Input/output error"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/a.npy"),
            2,
            "error: out/a.npy: No space left on device: free some space and run the same command again",
        ),
    ],
)
def test_user_errors_are_one_line(monkeypatch, capsys, error, code, line):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, raising(error))
    assert end.value.code == code
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), AssertionError(), OSError("no errno")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        run(monkeypatch, raising(error))
    assert raised.value is error


def test_one_process_per_machine_reports_an_error(monkeypatch, capsys):
    """The others wait, then report with their rank: the error may be theirs only."""
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "9")
    for rank, lines in (("0", "error: no data\n"), ("1", "error: process 9: no data\n")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, raising(UserError("no data")))
        assert end.value.code == 2 and capsys.readouterr().err == lines
    assert waited == [2]


def test_out_of_memory_names_the_fix(monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB")))
    assert end.value.code == 2 and "halve --micro_batch_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "bounds", "rule"),
    [
        (0, {"low": 1}, "at least 1"),
        (0.0, {"low": 0, "open_low": True}, "above 0"),
        (1.01, {"low": 0, "high": 1}, "at least 0 and at most 1"),
        (0.6, {"low": 0, "high": 0.5, "open_low": True}, "above 0 and at most 0.5"),
        (float("nan"), {"low": 0}, "at least 0"),
        (float("nan"), {"low": 0, "high": 1}, "at least 0 and at most 1"),
        (float("nan"), {"low": 0, "open_low": True}, "above 0"),
        (float("-inf"), {"low": 0}, "at least 0"),
    ],
)
def test_values_out_of_range(value, bounds, rule):
    with pytest.raises(UserError) as error:
        check_range("lr", value, **bounds)
    assert str(error.value) == f"--lr is {value}: it must be {rule}"


@pytest.mark.parametrize(
    ("value", "bounds"),
    [(1, {"low": 1}), (1e-9, {"low": 0, "open_low": True}), (1, {"low": 0, "high": 1}), (1e30, {"low": 0})],
)
def test_values_in_range(value, bounds):
    check_range("lr", value, **bounds)


# ---- the scripts' flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_with_underscores(run_script, script):
    done = run_script(f"{script}.py", "--help", env={"COLUMNS": "120"})
    module = importlib.import_module(script)
    flags = done.stdout.removeprefix(module.__doc__.strip())
    assert flags != done.stdout  # the examples are shown as they stand in the script
    for flag in dataclasses.fields(module.Config):
        positional = "Positional" in str(flag.type) or typing.get_origin(flag.type) is typing.Annotated
        assert re.search(rf"--(no_)?{flag.name}\b", flags) or positional, flag.name
    assert not re.search(r"--\w+-\w", flags)
    assert not done.stderr and "\x1b" not in done.stdout


def test_help_fits_a_narrow_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "One line that is\nlonger than the screen on which it is read.\n\n    python it.py        # as it is\n"
    assert cli.format_docstring(text) == (
        "One line that is longer than the screen\non which it is read.\n\n    python it.py        # as it is"
    )


def on_a_terminal(*command: object, **environment: str) -> str:
    """What a script writes on a terminal of its own."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, *map(str, command)], os.environ | environment)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    written = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error
        while piece := os.read(terminal, 65536):
            written += piece
    os.waitpid(process, 0)
    return written.decode()


@pytest.mark.parametrize("arguments", [["--help"], ["--out"]])
def test_colours_only_where_they_are_wanted(run_script, arguments):
    script, environment = ROOT / "prepare_sample.py", {"TERM": "xterm"}
    assert "\x1b[" in on_a_terminal(script, *arguments, **environment)
    assert "\x1b[" not in on_a_terminal(script, *arguments, NO_COLOR="1", **environment)
    done = run_script("prepare_sample.py", *arguments, expect=None, env=environment)
    assert "\x1b[" not in done.stdout + done.stderr


def test_a_whole_run_on_a_terminal_without_colour(text_data, tmp_path):
    args = (ROOT / "pretrain.py", "--data", text_data, "--out", tmp_path / "run", *TRAIN)
    written = on_a_terminal(*args, NO_COLOR="1", TERM="xterm")
    assert "12/12" in written and "validation loss" in written and "\x1b" not in written


@pytest.mark.parametrize("arguments", [["--shard_tokens", "many"], ["--max_tokens"]])
def test_a_flag_with_a_wrong_value(run_script, tmp_path, arguments):
    done = run_script("prepare_fineweb.py", *arguments, expect=2)
    assert arguments[0] in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("pretrain.py --n_layers 3", "unknown flag --n_layers: did you mean --n_layer?"),
        ("pretrain.py --steps 3 --n-layers=3 --batch 4", "unknown flag --n-layers: did you mean --n_layer?"),
        ("pretrain.py --batch 4", "unknown flag --batch: did you mean --batch_tokens?"),
        ("finetune.py --no_compil", "unknown flag --no_compil: did you mean --no_compile?"),
        ("prepare_fineweb.py --vall_fraction 0.1", "unknown flag --vall_fraction: did you mean --val_fraction?"),
        ("plot.py --runs runs/gpt2", "unknown flag --runs: see plot.py --help"),
        ("verify.py -x", "unknown flag -x: see verify.py --help"),
        ("pretrain.py --steps 3 4", "unexpected argument 4: it does not belong to a flag; see pretrain.py --help"),
    ],
)
def test_a_mistyped_flag_suggests_the_nearest(command, error, monkeypatch, capsys):
    assert error_of_main(command, monkeypatch, capsys) == error


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("hello", '--prompt "hello"'),
        ("Why is the sky blue?", '--prompt "Why is the sky blue?"'),
        ("--seed 1 --prompt Why is it $5?", "--prompt 'Why is it $5?'"),
    ],
)
def test_a_prompt_without_its_flag_or_quotes(arguments, suggestion, monkeypatch, capsys):
    assert error_of_main(f"generate.py {arguments}", monkeypatch, capsys).endswith(f": {suggestion}")


def error_of_main(command: str, monkeypatch, capsys) -> str:
    """The one line of error of a command line, split at its spaces, whose script does no work."""
    monkeypatch.setattr(sys, "argv", command.split())
    config = importlib.import_module(sys.argv[0].removesuffix(".py")).Config
    with pytest.raises(SystemExit) as error:
        cli.run(pytest.fail, config, None)
    printed = capsys.readouterr()
    assert error.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    return printed.err.strip().removeprefix("error: ")


# ---- progress ------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until `clock.now` is set; no terminal."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(cli.time, "perf_counter", lambda: Clock.now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return Clock


def test_a_log_file_gets_few_lines(clock, capsys):
    progress = Progress(100_000, "step", seconds=10)
    for step in range(1, 100_001):
        clock.now += 0.0003  # thirty seconds in all
        progress.update(1, f"loss {step % 7}")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0] == "step 1/100,000  loss 1  00:29 left"
    assert lines[-1] == "step 100,000/100,000  loss 5  00:00 left"
    assert sys.stderr.getvalue() == ""


def test_days_of_work_stay_readable(clock, capsys):
    """Three days of steps of a second each: often at first, never silent for much more than ten minutes."""
    progress, times = Progress(3 * 86_400, "step"), []
    for _ in range(3 * 86_400):
        clock.now += 1
        progress.update(1)
        if capsys.readouterr().out:
            times.append(clock.now - 1000)
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) < 1000 and max(pauses) <= 602
    assert sum(time <= 600 for time in times) >= 50


def test_time_left_is_what_the_rest_takes(clock):
    progress = Progress(1000, "step", initial=200)
    assert progress.time_left() == ""
    clock.now += 60
    progress.update(200)  # and 600 more
    assert progress.time_left() == "03:00 left"
    clock.now += 60
    progress.update(600)
    assert progress.time_left() == "00:00 left"


def test_fractions_of_a_slow_step(clock, capsys):
    """One line every ten seconds, with the time that is left."""
    progress = Progress(4, "step", seconds=10)
    for done in (1, 2, 3):
        clock.now += 6
        progress.update_fraction(done / 4, f"micro-batch {done}/4")
    assert capsys.readouterr().out == "step 0/4  micro-batch 2/4  01:24 left\n"
    clock.now += 6
    progress.update(1, "loss 3")
    assert capsys.readouterr().out == "step 1/4  loss 3  01:12 left\n"
    clock.now += 12
    progress.update_fraction(0.5, "micro-batch 2/4")
    assert capsys.readouterr().out == "step 1/4  micro-batch 2/4  loss 3  01:00 left\n"


def test_the_bar_moves_within_a_slow_step(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    monkeypatch.setattr(cli.time, "time", lambda: clock.now)
    progress = Progress(4, "step")
    clock.now += 50  # not counted
    progress.restart_clock()
    clock.now += 6
    progress.update_fraction(1 / 4, "micro-batch 1/4")
    assert re.search(r"\|6 {9}\| 0/4 \[00:06<01:(30|29), micro-batch 1/4\]$", sys.stderr.getvalue())
    clock.now += 0.5
    progress.update(1, "loss 3")
    assert sys.stderr.getvalue().rsplit("| ")[-1].startswith("1/4 [") and "loss 3]" in sys.stderr.getvalue()
    clock.now += 0.5
    progress.update_fraction(1 / 4, "micro-batch 1/4")  # the step may be a quick one
    assert sys.stderr.getvalue().rstrip().endswith("loss 3]")


def test_without_a_total_no_time_is_promised(clock, capsys):
    progress = Progress(None, "token", seconds=10)
    clock.now += 11
    progress.update(5_000, "1.0 M tokens/s")
    assert progress.time_left() == ""
    assert capsys.readouterr().out == "token 5,000  1.0 M tokens/s\n"


def test_other_processes_are_silent(clock, capsys):
    progress = Progress(2, "step", enabled=False)
    progress.update(2)
    progress.print("a line")
    progress.close()
    assert capsys.readouterr().out == "" and sys.stderr.getvalue() == ""


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(2, "step")
    progress.update(1, "loss 3")
    progress.print("saved")
    progress.update(1, "loss 2")
    progress.close()
    bar = sys.stderr.getvalue()
    assert "2/2" in bar and "loss 2" in bar and "\r" in bar
    assert capsys.readouterr().out == "saved\n"


def test_lines_of_their_own_go_to_the_log_too(clock, capsys):
    Progress(2, "step").print("saved")
    assert capsys.readouterr().out == "saved\n"


# ---- commands to copy ----------------------------------------------------------------------------------------------


def test_a_command_to_copy_runs_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my code").mkdir()
    monkeypatch.chdir(tmp_path / "my code")
    for script, expected in {
        "pretrain.py": "generate.py",
        "./pretrain.py": "generate.py",
        str(tmp_path / "my code" / "pretrain.py"): "generate.py",
        "../other/pretrain.py": "../other/generate.py",
        "../my project/pretrain.py": "'../my project/generate.py'",
        "/opt/minigpt/pretrain.py": "/opt/minigpt/generate.py",
    }.items():
        monkeypatch.setattr(sys, "argv", [script, "--steps", "3"])
        assert cli.script_path("generate.py") == expected


# ---- head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["1", ""])
@pytest.mark.parametrize("arguments", [["prepare_sample.py"], ["prepare_fineweb.py", "--help"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path, unbuffered, arguments):
    """As in `prepare_sample.py | head -1`, with a reader that is gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, ROOT / arguments[0], *arguments[1:]]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
