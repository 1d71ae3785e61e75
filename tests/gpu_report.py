"""Run the tests and measure every stage on this machine's GPU, and write a report in Markdown.

    make gpu DATA=data/fineweb_edu CHAT=data/dolly                  # all phases, into runs/gpu_report/report.md
    .venv/bin/python tests/gpu_report.py pretrain finetune          # some of them
    .venv/bin/python tests/gpu_report.py --device cpu --model tiny --batch_tokens 1024 --minutes 0.2    # without a GPU

The phases run the repository's scripts, without network: prepare both dataset folders first. A phase that takes more
than 9 minutes fails. Run the command again to resume: phases that passed are kept, others run again. The exit code is 1
if a phase failed.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt import cli  # noqa: E402
from minigpt.cli import UserError  # noqa: E402
from minigpt.files import read_json, write_file, write_json  # noqa: E402
from minigpt.run import EXIT_STOPPED  # noqa: E402
from minigpt.runs import read_log  # noqa: E402
from model import PRESETS  # noqa: E402

TIME_LIMIT = 530  # seconds per phase
BENCH_RUNS = (("train",), ("generate",))  # the stages of bench.py that need no vocabulary
RESUMED_STEPS = 10
QUESTIONS = ("What is the capital of France?", "Give me three tips for a good night's sleep.")


@dataclass(frozen=True)
class Config:
    phases: tyro.conf.Positional[
        tuple[Literal["tests", "bench", "pretrain", "numerics", "finetune", "generate"], ...]
    ] = ()
    """Phases to run; default: all."""
    data: Path = Path("data/fineweb_edu")
    """The dataset folder to pretrain on."""
    chat: Path = Path("data/dolly")
    """The chat dataset folder to finetune on."""
    out: Path = Path("runs/gpu_report")
    """Folder for the report, the results and the runs."""
    model: Literal["tiny", "gpt2"] = "gpt2"
    """The model to pretrain."""
    batch_tokens: int = 524_288
    """Tokens per pretraining step."""
    minutes: float = 4.0
    """Stop pretraining after this time."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Use cpu with --model tiny to test this script."""


class PhaseError(Exception):
    """A command failed or ran too long; the message has the last lines of its output."""


class Phase:
    """One phase: it runs commands until its time limit and collects figures, checks and samples.

    The text that a command prints is in stdout.txt and stderr.txt in the phase's folder, until the next command.
    """

    def __init__(self, name: str, config: Config):
        self.config, self.folder, self.started = config, config.out / name, time.monotonic()
        self.result: dict = {"figures": [], "checks": [], "samples": []}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def add_figure(self, name: str, value: str, note: str = "") -> None:
        """Add a row to the report's table of figures."""
        self.result["figures"].append([name, value, note])

    def add_check(self, name: str, passed: bool, note: str = "") -> None:
        """Add a row to the report's table of checks."""
        self.result["checks"].append([name, passed, note])

    def run(self, *command: object, expect: Sequence[int] = (0,)) -> subprocess.CompletedProcess:
        """Run Python with these arguments. Raises `PhaseError` after the time limit or with another exit code."""
        arguments = [sys.executable, *map(str, command)]
        outputs = [self.folder / "stdout.txt", self.folder / "stderr.txt"]
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(self.folder.absolute() / "inductor")}  # compile anew
        with open(outputs[0], "wb") as stdout, open(outputs[1], "wb") as stderr:
            process = subprocess.Popen(arguments, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
            try:
                reason = f"exit code {process.wait(self.started + TIME_LIMIT - time.monotonic())}"
            except subprocess.TimeoutExpired:
                reason = f"stopped at the time limit of {TIME_LIMIT} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its children too
                code = process.wait()
        texts = [path.read_text(errors="replace") for path in outputs]
        if code not in expect:
            name = " ".join(arguments[1:]).replace(f"{ROOT}/", "")
            lines = [line for text in texts for line in text.splitlines()[-15:]]
            raise PhaseError("\n".join([f"{name}: {reason}", *lines]))
        return subprocess.CompletedProcess(arguments, code, *texts)

    def run_script(self, script: str, *flags: object, expect: Sequence[int] = (0,)) -> subprocess.CompletedProcess:
        """Run a script of the repository on the device; see `run`."""
        return self.run(ROOT / script, "--device", self.config.device, *flags, expect=expect)


def main(config: Config) -> None:
    check_config(config)
    settings = {name: str(getattr(config, name)) for name in ("data", "chat", "model", "batch_tokens", "minutes")}
    settings |= describe_machine(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    check_settings(config.out / "settings.json", settings)
    for name in config.phases or PHASES:
        run_phase(name, config)
        results = {name: read_json(file) for name in PHASES if (file := config.out / f"{name}.json").exists()}
        write_file(config.out / "report.md", format_report(results, settings))
    failed = [name for name, result in results.items() if not is_passed(result)]
    print(f"wrote {config.out / 'report.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    if failed:
        sys.exit(1)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    cli.check_range("minutes", config.minutes, 0, 5, open_low=True)
    cli.check_range("batch_tokens", config.batch_tokens, 1)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU is available: check nvidia-smi, or use --device cpu --model tiny")
    scripts = {"data": "prepare_fineweb.py", "chat": "prepare_dolly.py"}
    for name, script in scripts.items():
        folder = getattr(config, name)
        if not (folder / "meta.json").is_file():
            raise UserError(f"--{name} {folder} is not a complete dataset folder: run {script} first")


def check_settings(file: Path, settings: dict) -> None:
    """Raise `UserError` if the results in the folder are those of other flags or of another machine."""
    saved = read_json(file) if file.exists() else settings
    changes = ", ".join(f"{name} was {saved.get(name)}" for name in settings if saved.get(name) != settings[name])
    if changes:
        raise UserError(f"{file.parent} has results of another run: {changes}; choose another --out")
    write_json(file, settings)


def describe_machine(device: str) -> dict[str, str]:
    """Return the names and versions in the report's heading."""
    versions = {"card": f"CPU ({platform.machine()})", "torch": torch.__version__, "Python": platform.python_version()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
        versions |= {"card": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda), "driver": driver}
    return versions


def run_phase(name: str, config: Config) -> None:
    """Run a phase and write its result, unless it has passed before."""
    file = config.out / f"{name}.json"
    if file.exists() and is_passed(read_json(file)):
        print(f"{name}: passed before")
        return
    print(f"{name}: running", flush=True)
    phase, error = Phase(name, config), ""
    try:
        PHASES[name](phase)
    except PhaseError as failure:
        error = str(failure)
    except Exception:  # a script's output or log lacks a figure; the other phases still run
        error = traceback.format_exc()
    seconds = time.monotonic() - phase.started
    result = phase.result | {"seconds": round(seconds, 1), "error": error}
    write_json(file, result)
    print(f"{name}: {'passed' if is_passed(result) else 'failed'} in {seconds:.0f} s", flush=True)


def is_passed(result: dict) -> bool:
    """Return whether a phase ended, and all its checks passed."""
    return not result["error"] and all(passed for _, passed, _ in result["checks"])


def run_tests(phase: Phase) -> None:
    """Run the tests that are marked `gpu`."""
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    output = phase.run("-m", "pytest", "-m", "gpu", "-rf", *files, expect=(0, 1)).stdout
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output.splitlines()[-1])
    outcomes = {outcome for _, outcome in counts}
    failed = bool(outcomes - {"passed", "skipped"}) or (phase.config.device == "cuda" and "passed" not in outcomes)
    phase.add_check("tests marked `gpu`", not failed, ", ".join(" ".join(count) for count in counts))
    if failed:
        raise PhaseError("\n".join(output.splitlines()[-30:]))


def run_bench(phase: Phase) -> None:
    """Measure training and generating, relative to the machine's peak and to transformers."""
    for arguments in BENCH_RUNS:
        file = phase.folder / f"{arguments[0]}.jsonl"
        phase.run_script("bench.py", *arguments, "--json", file)
        for row in map(json.loads, file.read_text().splitlines()):
            if row["name"].startswith("peak") and row["name"] in [figure[0] for figure in phase.result["figures"]]:
                continue  # both runs measure the peaks
            notes = [f"±{row['spread']:.0%}"] if row["spread"] is not None else []
            notes += [f"{row['of_peak']:.0%} of peak"] if row["of_peak"] is not None else []
            notes += [f"{row['ratio']:.2f} x {row['peer']}"] if row["ratio"] is not None else []
            phase.add_figure(row["name"], f"{format_number(row['value'])} {row['unit']}", ", ".join(notes))


def run_pretrain(phase: Phase) -> None:
    """Pretrain until --minutes, resume the run for some steps, and time a dry run."""
    config, run = phase.config, phase.folder / "run"
    flags = ("--data", config.data, "--out", run, "--model", config.model, "--batch_tokens", config.batch_tokens)
    flags += ("--warmup_steps", 2)
    started = time.monotonic()
    output = phase.run_script("pretrain.py", *flags, "--max_minutes", config.minutes, expect=(EXIT_STOPPED,)).stdout
    seconds = time.monotonic() - started
    steps, val_losses = read_metrics(run)
    step_seconds = [config.batch_tokens / row["tokens_per_s"] for row in steps]
    micro_batch_size = re.search(r"= (\d+) rows x", output)[1]
    phase.add_figure("model", re.search(r"^model +(.+)", output, re.MULTILINE)[1])
    phase.add_figure("micro-batch size found", micro_batch_size, "rows per forward pass")
    phase.add_figure("first step", f"{step_seconds[0]:.1f} s", "the search and the first validation compile before it")
    phase.add_figure("time outside steps", f"{seconds - sum(step_seconds):.0f} s", "start, search, validation, saving")
    add_speed(phase, steps)

    # The learning rate decays from the step at which the run resumes.
    n = steps[-1]["step"]
    decay = ("--steps", n + RESUMED_STEPS, "--decay_fraction", RESUMED_STEPS / (n + RESUMED_STEPS))
    output = phase.run_script("pretrain.py", *flags, *decay).stdout
    steps, val_losses = read_metrics(run)
    resumed = f"steps, {n:,} completed" in output
    resumed = resumed and [row["step"] for row in steps] == list(range(1, n + RESUMED_STEPS + 1))
    phase.add_check("resumes after `--max_minutes` at the next step", resumed, f"step {n + 1:,}")
    add_finite_check(phase, steps)
    before, after = (mean_loss(part) for part in (steps[:n][-5:], steps[n : n + 5]))
    note = f"means of 5 steps: {before:.3f}, then {after:.3f}"
    phase.add_check("loss does not jump up when the run resumes", after < before + 0.1, note)
    tokens = f"after {steps[-1]['tokens']:,} tokens"
    phase.add_figure("training loss", f"{mean_loss(steps[-5:]):.3f}", f"{tokens}, mean of 5 steps")
    phase.add_figure("validation loss", f"{val_losses[0]:.3f} to {val_losses[-1]:.3f}", tokens)

    output = phase.run_script("pretrain.py", *flags, "--micro_batch_size", micro_batch_size, "--dry_run").stdout
    memory, share = re.search(r"^memory +(\S+ GB) at peak per process, (\S+)", output, re.MULTILINE).groups()
    phase.add_figure("peak memory", memory, f"{share} of the device's memory")
    steps_and_time = re.search(r"^whole run +(.+), without validation", output, re.MULTILINE)[1]
    phase.add_figure("whole run", steps_and_time, "estimate of `--dry_run`, without validation")


def run_numerics(phase: Phase) -> None:
    """Train on the same batches with 32 and with 64 rows per forward pass, and compare the losses."""
    config, losses = phase.config, []
    n_tokens = 64 * PRESETS[config.model].block_size
    flags = ("--data", config.data, "--model", config.model, "--steps", 10, "--warmup_steps", 5)
    flags += ("--batch_tokens", n_tokens, "--val_tokens", n_tokens)
    for n_rows in (32, 64):
        run = phase.folder / f"{n_rows}_rows"
        try:
            phase.run_script("pretrain.py", *flags, "--out", run, "--micro_batch_size", n_rows)
        except PhaseError as error:
            if "error: out of GPU memory" not in str(error):
                raise
            phase.add_figure(f"{n_rows} rows per forward pass", "out of memory")
            continue
        steps, _ = read_metrics(run)
        add_finite_check(phase, steps, f" with {n_rows} rows")
        losses.append([row["loss"] for row in steps[:3]])
    if not losses:
        phase.add_check("32 rows fit in memory", False)
    if len(losses) == 2 and None not in losses[0] + losses[1]:
        difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
        phase.add_check("losses are equal with 32 and 64 rows", difference < 1e-2, f"difference {difference:.1e}")


def run_finetune(phase: Phase) -> None:
    """Finetune the pretrained model with the script's defaults."""
    config, run = phase.config, phase.folder / "run"
    started = time.monotonic()
    batch_tokens = min(16_384, config.batch_tokens)
    flags = ("--init", config.out / "pretrain" / "run", "--data", config.chat, "--batch_tokens", batch_tokens)
    phase.run_script("finetune.py", *flags, "--out", run, "--keep", 1)
    seconds = time.monotonic() - started
    steps, val_losses = read_metrics(run)
    add_finite_check(phase, steps)
    phase.add_check("validation loss falls", val_losses[-1] < val_losses[0])
    phase.add_figure("validation loss", f"{val_losses[0]:.3f} to {val_losses[-1]:.3f}", f"in {len(steps):,} steps")
    phase.add_figure("time of `finetune.py`", f"{seconds:.0f} s")
    add_speed(phase, steps)


def run_generate(phase: Phase) -> None:
    """Generate answers to two questions."""
    started = time.monotonic()
    for question in QUESTIONS:
        flags = ("--checkpoint", phase.config.out / "finetune" / "run", "--max_tokens", 100, "--seed", 1)
        answer = phase.run_script("generate.py", *flags, "--prompt", question).stdout.strip()
        phase.result["samples"].append(f"> {question}\n{cli.strip_control_chars(answer)}")
        phase.add_check(f"answers “{question}”", bool(answer))
    seconds = (time.monotonic() - started) / len(QUESTIONS)
    phase.add_figure("one run of `generate.py`", f"{seconds:.1f} s", "at most 100 tokens, with loading")


PHASES = {
    "tests": run_tests,
    "bench": run_bench,
    "pretrain": run_pretrain,
    "numerics": run_numerics,
    "finetune": run_finetune,
    "generate": run_generate,
}


def read_metrics(run: Path) -> tuple[list[dict], list[float]]:
    """Return the log's rows of training steps, and the validation losses. Raises `PhaseError` for fewer than two."""
    rows = list(read_log(run))
    steps = [row for row in rows if "loss" in row]
    if len(steps) < 2:
        raise PhaseError(f"{run} has {cli.plural(len(steps), 'step')}, at least 2 are needed: increase --minutes")
    return steps, [row["val_loss"] for row in rows if "val_loss" in row]


def add_finite_check(phase: Phase, steps: Sequence[dict], suffix: str = "") -> None:
    """Check that no step was skipped for its loss or gradient, and that gradients are not zero."""
    bad = [row["step"] for row in steps if row["loss"] is None or not row["grad_norm"] > 0]
    note = f"not at step {bad[0]}" if bad else cli.plural(len(steps), "step")
    phase.add_check(f"losses are finite, gradients are not zero{suffix}", not bad, note)


def add_speed(phase: Phase, steps: Sequence[dict]) -> None:
    """Add the median speed and MFU of all steps but the first, which compiles."""
    tokens_per_s, mfu = (statistics.median(row[key] for row in steps[1:]) for key in ("tokens_per_s", "mfu"))
    phase.add_figure("speed", f"{format_number(tokens_per_s)} tokens/s", f"median of steps, MFU {mfu:.1%}")


def mean_loss(steps: Sequence[dict]) -> float:
    """Return the mean training loss of steps, without skipped ones; NaN if all were skipped."""
    losses = [row["loss"] for row in steps if row["loss"] is not None]
    return statistics.fmean(losses) if losses else float("nan")


def format_number(value: float) -> str:
    """Format a figure as bench.py does."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def format_report(results: dict[str, dict], settings: dict) -> str:
    """Return the report as Markdown."""
    versions = [f"{name} {settings[name]}" for name in ("torch", "CUDA", "driver", "Python") if name in settings]
    seconds = ", ".join(f"{name} {result['seconds']:.0f} s" for name, result in results.items())
    missing = [name for name in PHASES if name not in results]
    lines = [f"## {settings['card']}", "", f"Measured on {date.today()} with {', '.join(versions)}, by `make gpu`."]
    lines += [f"Time: {seconds}." + (f" Not run: {', '.join(missing)}." if missing else "")]
    lines += ["", "| phase | figure | measured | note |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(row)} |" for name, result in results.items() for row in result["figures"]]
    lines += ["", "| phase | check | result | note |", "|---|---|---|---|"]
    for name, result in results.items():
        rows = [*result["checks"], *([["runs to its end", False, "see below"]] if result["error"] else [])]
        lines += [f"| {name} | {check} | {'passed' if ok else '**failed**'} | {note} |" for check, ok, note in rows]
    samples = [sample for result in results.values() for sample in result["samples"]]
    if samples:
        lines += ["", "Answers of the finetuned model:", "", "````text", "\n\n".join(samples), "````"]
    for name, result in results.items():
        lines += ["", f"Failure of {name}:", "", "````text", result["error"], "````"] if result["error"] else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
