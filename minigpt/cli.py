"""The command line of every script: flags from a dataclass, one-line errors, progress.

Importing this module is cheap: tyro and tqdm are imported when they are used.
"""

import dataclasses
import difflib
import errno
import faulthandler
import io
import math
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

# Control characters, which could steer a terminal. Line feed and tab are kept.
CONTROL_CHARS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class UserError(Exception):
    """A mistake that the user can correct. The message is one line: the value, the rule, the fix."""


exit_code: int | None = None  # of `run`, once it is called


def run(main: Callable[[Any], None], config_class: type, description: str | None) -> None:
    """Parse the command line into `config_class`, call `main` with it, and turn errors into exit codes.

    Exit codes: 0 done, 2 a mistake explained by one line on stderr, 1 another process hangs or has ended, 130
    interrupted by Ctrl-C. Any other exception is a bug and keeps its traceback.
    """
    global exit_code
    exit_code = 1  # unless `call_main` returns or exits with another code
    try:
        call_main(main, config_class, description)
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        raise


def call_main(main: Callable[[Any], None], config_class: type, description: str | None) -> None:
    """Parse the command line, call `main` and turn errors into exit codes."""
    import tyro

    faulthandler.enable(sys.__stderr__)  # prints a traceback if data is truncated under a running job (SIGBUS)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    # By default tyro checks stdout only and ignores https://no-color.org.
    tyro._experimental_options["ansi_codes"] = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    try:
        try:
            if {"-h", "--help"} & set(sys.argv[1:]):
                print(format_docstring(description or ""), end="\n\n")  # tyro would join its lines
            options = {"description": "", "use_underscores": True, "return_unknown_args": True}
            config, unknown = tyro.cli(config_class, **options)
            check_unknown_args(config, unknown)
            main(config)
        finally:
            sys.stdout.flush()  # raises BrokenPipeError here, where it is handled
    except UserError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        exit_with_error("interrupted", code=130)
    except BrokenPipeError:  # the reader of stdout is gone, as in `generate.py | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout once more
        sys.exit(0)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; by name, so that torch is not imported here
            exit_with_error("out of GPU memory: for training halve --micro_batch_size, else lower --num_samples")
        # These are the messages of gloo. NCCL ends the process by itself.
        if "Timed out waiting" in str(error):
            fix = "see --timeout_minutes; run the same command again to resume"
            exit_with_error(f"another process hangs or is too slow: {fix}", code=1)
        if any(text in str(error) for text in ("Connection reset by peer", "Connection closed by peer")):
            exit_with_error("another process has ended: run the same command again to resume", code=1)
        raise
    except OSError as error:  # disk full, no permission, read-only file system
        if error.errno is None:
            raise
        fix = ": free some space and run the same command again" if error.errno == errno.ENOSPC else ""
        exit_with_error(f"{error.filename or 'file system'}: {error.strerror}{fix}")


def check_unknown_args(config: Any, unknown: Sequence[str]) -> None:
    """Raise `UserError` with a suggestion if a part of the command line is not a flag or its value."""
    names = {field.name for field in dataclasses.fields(config)}
    names |= {f"no_{name}" for name in names if isinstance(getattr(config, name), bool)}
    script = Path(sys.argv[0]).name
    for flag in (word.split("=")[0] for word in unknown if word.startswith("-")):
        name = flag.lstrip("-").replace("-", "_")
        nearest = difflib.get_close_matches(name, names - {name}, n=1, cutoff=0.5)
        fix = f"did you mean --{nearest[0]}?" if nearest else f"see {script} --help"
        raise UserError(f"unknown flag {flag}: {fix}")
    if unknown and "prompt" in names:
        prompt = " ".join([*filter(None, [config.prompt]), *unknown])
        quoted = shlex.quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'
        raise UserError(
            f"unexpected argument {unknown[0]}: give a prompt with its flag and in quotes: --prompt {quoted}"
        )
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]}: it does not belong to a flag; see {script} --help")


def exit_with_error(message: str, code: int = 2) -> None:
    """Exit with one line on stderr.

    Under torchrun most errors occur in all processes. The first process of each machine reports them at once; the
    others wait, and report only if torchrun has not ended them by then.
    """
    prefix = ""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)
        prefix = f"process {os.environ.get('RANK')}: "
    print(f"error: {prefix}{strip_control_chars(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def skip_shutdown() -> None:
    """End the process with the exit code of `run`, without freeing its objects; see `Processes.close`."""
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def format_docstring(text: str) -> str:
    """Wrap the paragraphs of a script's docstring that are wider than the terminal."""
    width = shutil.get_terminal_size().columns
    parts = text.strip().split("\n\n")
    fits = [part.startswith(" ") or max(map(len, part.splitlines())) <= width for part in parts]
    return "\n\n".join(part if fit else textwrap.fill(part, width) for part, fit in zip(parts, fits, strict=True))


def script_path(name: str) -> str:
    """Return a script's path for a command to copy: its name, or its quoted path if run from another folder."""
    folder = Path(sys.argv[0]).parent
    return shlex.quote(name if folder.resolve() == Path.cwd() else str(folder / name))


def strip_control_chars(text: str) -> str:
    """Replace control characters of untrusted text, such as a model's output, before it is printed on a terminal."""
    return text.translate(CONTROL_CHARS)


def plural(n: int, noun: str, nouns: str = "") -> str:
    """Return "1 shard" or "2 shards"; `nouns` is an irregular plural."""
    return f"{n:,} {noun if n == 1 else nouns or f'{noun}s'}"


def check_range(name: str, value: float | None, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Raise `UserError` unless `low <= value <= high` (`low < value` with `open_low`) or `value` is None."""
    if value is None:
        return
    if isinstance(value, int) and value >= 2**63:
        raise UserError(f"--{name} is {str(value)[:40]}: it does not fit in 64 bits")
    if not (low < value if open_low else low <= value) or not value <= high:
        rule = f"above {low:g}" if open_low else f"at least {low:g}"
        rule += f" and at most {high:g}" if high < math.inf else ""
        raise UserError(f"--{name} is {value}: it must be {rule}")


def resumable(default: Any = dataclasses.MISSING, *, default_factory: Any = dataclasses.MISSING) -> Any:
    """Declare a flag that may change when a run is resumed. All other flags define the run."""
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"resumable": True})


@dataclass(frozen=True)
class CheckpointConfig:
    """The flag of scripts that load a model."""

    checkpoint: str | None = None
    """A run, a checkpoint, a GPT-2 folder or hub id, or nanoGPT's ckpt.pt; default: the newest run in runs/."""


@dataclass(frozen=True)
class InferenceConfig(CheckpointConfig):
    """The flags of scripts that run a model without training it."""

    device: str | None = None
    """cuda, mps or cpu; default: the best available."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights."""
    quantize: Literal["int8"] | None = None
    """Quantise the weights to 8 bits: more than twice as fast on a CPU, slightly less accurate."""


class Progress:
    """A progress bar on a terminal, occasional plain lines elsewhere.

    The interval between lines grows to ten minutes, so that the log of a run of days stays readable.

    Args:
        total: amount of work in units; None if unknown.
        unit: what is counted, "step" or "token".
        initial: units done before (a resumed run).
        enabled: False prints nothing (all processes but the first).
        seconds: interval between the first lines.
    """

    def __init__(self, total: int | None, unit: str, initial: int = 0, enabled: bool = True, seconds: float = 10.0):
        self.total, self.unit, self.done, self.enabled, self.seconds = total, unit, initial, enabled, seconds
        self.initial, self.started = initial, time.perf_counter()
        self.fraction, self.postfix, self.updated = 0.0, "", self.started  # of the next unit; of the last update
        self.printed = -math.inf if total else self.started  # work of unknown length may end before the first interval
        self.bar = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            count = "{n_fmt}/{total_fmt}" if unit == "token" else "{desc}"  # n_fmt would show a fraction's digits
            layout = f"{{percentage:3.0f}}%|{{bar:10}}| {count} [{{elapsed}}<{{remaining}}{{postfix}}]"
            options = {"unit_scale": unit == "token", "dynamic_ncols": True, "bar_format": layout if total else None}
            self.bar = tqdm(total=total, unit=unit, initial=initial, desc=self.count() if total else None, **options)

    def update(self, n: int, postfix: str = "") -> None:
        """Count `n` more units; `postfix` is printed after the count."""
        self.done, self.fraction, self.postfix, self.updated = self.done + n, 0.0, postfix, time.perf_counter()
        self._show(postfix, self.done == self.total or self.updated - self.printed > self.interval())

    def update_fraction(self, fraction: float, note: str) -> None:
        """Count a fraction of the next unit. Units of less than a second are shown only when they are complete."""
        self.fraction, now = fraction, time.perf_counter()
        if fraction < 1 and now - self.updated > 1:
            self._show(f"{note}  {self.postfix}".rstrip(), now - max(self.printed, self.started) > self.interval())

    def _show(self, postfix: str, print_line: bool) -> None:
        if self.bar is not None:
            self.bar.set_description_str(self.count() if self.total else None, refresh=False)
            self.bar.set_postfix_str(postfix, refresh=False)
            self.bar.update(self.done + self.fraction - self.bar.n)
        elif self.enabled and print_line:
            self.printed = time.perf_counter()
            line = f"{self.unit} {self.count()}  {postfix}  {self.time_left()}"
            print(line.rstrip(), flush=True)

    def count(self) -> str:
        """Return the number of whole units as "1,234/19,073"."""
        return f"{self.done:,}" + (f"/{self.total:,}" if self.total else "")

    def restart_clock(self) -> None:
        """Exclude the time until now from the time left."""
        self.started = time.perf_counter()
        if self.bar is not None:
            self.bar.start_t = self.bar.last_print_t = time.time()  # of tqdm's clock

    def interval(self) -> float:
        """Return the seconds between two lines: a hundredth of the elapsed time, but `seconds` to ten minutes."""
        return min(max(self.seconds, (time.perf_counter() - self.started) / 100), 600)

    def seconds_left(self) -> float | None:
        """Return the estimated remaining time; None if the total is unknown or nothing is done."""
        done = self.done + self.fraction
        if not self.total or done <= self.initial:
            return None
        return (time.perf_counter() - self.started) / (done - self.initial) * max(0, self.total - done)

    def time_left(self) -> str:
        """Return the estimated remaining time as "12:34 left"; empty if it is unknown."""
        from tqdm import tqdm

        seconds = self.seconds_left()
        return "" if seconds is None else f"{tqdm.format_interval(seconds)} left"

    def print(self, line: str, file: TextIO | None = None) -> None:
        """Print a line above the bar, by default to stdout."""
        if self.bar is not None:
            self.bar.write(line, file)
        elif self.enabled:
            print(line, file=file, flush=True)

    def close(self) -> None:
        """Close the bar; later output starts on a new line."""
        if self.bar is not None:
            self.bar.close()
