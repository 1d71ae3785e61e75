"""The command line that every script shares: a dataclass becomes the flags, a mistake becomes one line, long work shows
how far it is."""

import errno
import io
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import tyro
from tqdm import tqdm

# What a terminal may take for a command: control characters but for the end of a line and the tabulator.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class UserError(Exception):
    """Something that the person at the keyboard can put right.  The text is one line: the value, the rule, the fix."""


def run(main: Callable[[Any], None], config_class: type, description: str | None) -> None:
    """Parse the command line into `config_class`, call `main` with it, and turn mistakes into exit codes.

    Exit codes: 0 done, 2 a mistake that one line on stderr explains, 130 interrupted by Ctrl-C.  Anything else is a bug
    and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not in UTF-8
    # tyro itself looks at stdout alone, and not at what https://no-color.org asks for
    tyro._experimental_options["ansi_codes"] = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    try:
        try:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(manual(description or ""), end="\n\n")  # tyro would join its lines
            main(tyro.cli(config_class, description="", use_underscores=True))
        finally:
            sys.stdout.flush()  # here, where a reader that went away is no error, and not when the interpreter ends
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:  # the reader of our output went away, as in `generate.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more
        sys.exit(0)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that this file need not import torch
            raise
        fail("out of GPU memory: set --micro_batch_size to half of what was printed (training), or fewer --num_samples")
    except OSError as error:  # disk full, no permission, read-only: the machine's state, not a bug in the script
        if error.errno is None:
            raise
        fix = ": free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        fail(f"{error.filename or 'file system'}: {error.strerror}{fix}")


def manual(text: str) -> str:
    """A script's docstring for the screen: as it stands, but for paragraphs that are too wide for it."""
    width = shutil.get_terminal_size().columns
    parts = text.strip().split("\n\n")
    fits = [part.startswith(" ") or max(map(len, part.splitlines())) <= width for part in parts]
    return "\n\n".join(part if fit else textwrap.fill(part, width) for part, fit in zip(parts, fits, strict=True))


def harmless(text: str) -> str:
    """A text that a model or a stranger wrote, for a terminal: without what would steer it."""
    return text.translate(CONTROLS)


def fail(message: str, code: int = 2) -> None:
    """End the process with one line on stderr.

    Under torchrun most mistakes are everybody's, and the first process of each machine speaks for all: the others wait,
    and speak only if torchrun has not ended them by then.
    """
    speaker = ""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)
        speaker = f"process {os.environ.get('RANK')}: "
    print(f"error: {speaker}{' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_range(name: str, value: float, low: float, high: float = float("inf"), open_low: bool = False) -> None:
    """Raise `UserError` unless `low <= value <= high` (`low < value` with `open_low`); NaN is never in range."""
    if not (low < value if open_low else low <= value) or not value <= high:
        rule = f"above {low:g}" if open_low else f"at least {low:g}"
        rule += f" and at most {high:g}" if high < float("inf") else ""
        raise UserError(f"--{name} is {value}: it must be {rule}")


class Progress:
    """How far long work is: a bar on a terminal, a plain line now and then in a log file.

    The lines come ever more rarely, up to every ten minutes, so that those of the first minutes tell what happens and
    those of days can still be read.

    Args:
        total: how many units the work has; None where nobody knows.
        unit: what is counted, "step" or "token".
        initial: how many were done before (a resumed run).
        enabled: False shows nothing (all processes but the first).
        seconds: the pause between the first lines.
    """

    def __init__(self, total: int | None, unit: str, initial: int = 0, enabled: bool = True, seconds: float = 10.0):
        self.total, self.unit, self.done, self.enabled, self.seconds = total, unit, initial, enabled, seconds
        self.initial, self.started = initial, time.perf_counter()
        self.printed = -math.inf if total else self.started  # work of unknown length may be over before it needs a line
        self.bar = None
        if enabled and sys.stderr.isatty():
            shape = (
                "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]" if total else None
            )
            options = {"unit_scale": unit == "token", "dynamic_ncols": True, "bar_format": shape}
            self.bar = tqdm(total=total, unit=unit, initial=initial, **options)

    def update(self, n: int, figures: str = "") -> None:
        """Count `n` more units; `figures` is shown beside the count."""
        self.done += n
        if self.bar is not None:
            self.bar.set_postfix_str(figures, refresh=False)
            self.bar.update(n)
        elif self.enabled and (time.perf_counter() - self.printed > self.pause() or self.done == self.total):
            self.printed = time.perf_counter()
            of_total = f"/{self.total:,}" if self.total else ""
            print(f"{self.unit} {self.done:,}{of_total}  {figures}  {self.time_left()}".rstrip(), flush=True)

    def pause(self) -> float:
        """Seconds between two lines: `seconds` at first, then a hundredth of the time so far, at most ten minutes."""
        return min(max(self.seconds, (time.perf_counter() - self.started) / 100), 600)

    def time_left(self) -> str:
        """The time that the rest takes at the speed so far, as "12:34 left"; empty where the total is unknown."""
        if not self.total or self.done <= self.initial:
            return ""
        elapsed = time.perf_counter() - self.started
        return f"{tqdm.format_interval(elapsed / (self.done - self.initial) * max(0, self.total - self.done))} left"

    def print(self, line: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        elif self.enabled:
            print(line, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.bar is not None:
            self.bar.close()
