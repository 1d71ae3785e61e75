"""Compare training recipes on small models, for docs/recipe.md.

    python prepare_tokenizer.py --vocab_size 2048 --out data/recipe_tokenizer
    python prepare_fineweb.py --tokenizer data/recipe_tokenizer --max_tokens 38000000 --out data/recipe
    python prepare_dolly.py --tokenizer data/recipe_tokenizer --block_size 256 --out data/recipe_dolly
    python tests/recipe.py              # all runs that docs/recipe.jsonl does not have yet; hours on a CPU
    python tests/recipe.py 1M/muon      # only the runs with this prefix

Every run of a size sees the same tokens in the same order. Runs train in parallel, one per CPU core. Run the command
again to resume; at the end, tables are printed, and docs/recipe.png is drawn. Each result is a line of
docs/recipe.jsonl: the run's name, the validation loss after each number of tokens, and for finetuning the figures of
evaluate.py.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt.files import append_line  # noqa: E402

RESULTS = ROOT / "docs" / "recipe.jsonl"
RUNS = ROOT / "runs" / "recipe"
SIZES = {
    "1M": {"n_layer": 4, "n_head": 2, "n_embd": 128, "steps": 1000},
    "3M": {"n_layer": 6, "n_head": 3, "n_embd": 192, "steps": 1000},
    "10M": {"n_layer": 8, "n_head": 5, "n_embd": 320, "steps": 1000},
}
SHARED = {"batch_tokens": 4096, "dtype": "bfloat16", "val_every": 50, "keep": 1}
PRETRAIN = {"data": ROOT / "data" / "recipe", "model": "demo", "block_size": 256, "val_tokens": 98_304} | SHARED
ARMS = {
    "reference": {"optimizer": "adamw", "schedule": "cosine"},
    "adamw_wsd": {"optimizer": "adamw", "schedule": "wsd", "decay_fraction": 0.5},
    "muon": {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.5, "lr": 1e-2, "embedding_lr": 4e-3},
}
CURVES = {  # the runs of docs/recipe.png
    "reference": "1M/reference/lr=0.004",
    "adamw_wsd": "1M/adamw_wsd/lr=0.004,embedding_lr=0.016",
    "muon": "1M/muon/lr=0.005,embedding_lr=0.032",
    "muon, 600 steps": "1M/muon/steps=600,embedding_lr=0.032",
}
INITIAL = "1M/muon/embedding_lr=0.032"  # the run that is finetuned
FINETUNE = {"data": ROOT / "data" / "recipe_dolly", "init": RUNS / INITIAL.replace("/", "_")} | SHARED


@dataclass(frozen=True)
class Job:
    """A training run: its name, its script and its flags."""

    name: str
    script: str
    flags: dict


def list_jobs() -> Iterator[Job]:
    """Yield all runs in the order in which they start: those of the smallest size first, then the finetuning runs."""
    pretraining = []
    for size, arm, changes in list_pretraining():
        flags = PRETRAIN | SIZES[size] | ARMS[arm] | changes
        job = Job(format_name(size, arm, changes), "pretrain.py", flags | {"save_every": flags["steps"] // 4})
        pretraining.append(job)
    short = [job for job in pretraining if job.flags["steps"] <= 2000 and job.name.startswith("1M")]
    yield from short
    for changes in list_finetuning():
        flags = FINETUNE | {"epochs": 2, "dropout": 0.1, "save_every": 10_000} | changes
        yield Job(format_name("finetune", changes), "finetune.py", flags)
    yield from (job for job in pretraining if job not in short)


def list_pretraining() -> Iterator[tuple[str, str, dict]]:
    """Yield the size, the arm and the flags that differ from the arm's."""
    yield "1M", "muon", {}
    for lr in (4e-3, 8e-3, 2e-3, 1e-3):
        yield "1M", "reference", {"lr": lr}
    for lr in (2e-2, 5e-3):
        yield "1M", "muon", {"lr": lr}
    for lr in (4e-3, 8e-3, 2e-3):
        yield "1M", "adamw_wsd", {"lr": lr}
    for embedding_lr in (8e-3, 2e-3, 1.6e-2, 3.2e-2, 6.4e-2):
        yield "1M", "muon", {"embedding_lr": embedding_lr}
    for steps in (500, 400):
        yield "1M", "muon", {"steps": steps}
    for embedding_lr in (1.6e-2, 3.2e-2):
        yield "1M", "adamw_wsd", {"lr": 4e-3, "embedding_lr": embedding_lr}
    for steps in (500, 400, 600):
        yield "1M", "muon", {"steps": steps, "embedding_lr": 3.2e-2}
    for changes in ({"lr": 2e-2}, {"lr": 5e-3}, {"weight_decay": 0}):
        yield "1M", "muon", changes | {"embedding_lr": 3.2e-2}
    for seed in (1, 2):
        yield "1M", "adamw_wsd", {"lr": 4e-3, "embedding_lr": 1.6e-2, "seed": seed}
        yield "1M", "muon", {"embedding_lr": 3.2e-2, "seed": seed}
    yield "1M", "muon", {"lr": 5e-3, "embedding_lr": 6.4e-2}
    for decay_fraction in (0.5, 0.8):
        for lr in (5e-3, 1e-2):
            changes = {"decay_fraction": decay_fraction} if decay_fraction != 0.5 else {}
            yield "1M", "muon", {"steps": 500, "lr": lr, "embedding_lr": 6.4e-2} | changes
    yield "1M", "adamw_wsd", {"lr": 4e-3, "embedding_lr": 1.6e-2, "decay_fraction": 0.8}
    yield "1M", "muon", {"batch_tokens": 2048, "steps": 1000, "embedding_lr": 3.2e-2}
    yield "1M", "adamw_wsd", {"batch_tokens": 2048, "steps": 2000, "lr": 4e-3, "embedding_lr": 1.6e-2}
    for lr in (2e-3, 4e-3, 1e-3):
        yield "3M", "adamw_wsd", {"lr": lr, "embedding_lr": 1.6e-2}
    for lr in (1e-2, 5e-3):
        yield "3M", "muon", {"steps": 600, "lr": lr, "embedding_lr": 3.2e-2}
    yield "3M", "reference", {"lr": 2e-3}
    yield "3M", "muon", {"lr": 5e-3, "embedding_lr": 3.2e-2}
    yield "10M", "adamw_wsd", {"lr": 2e-3, "embedding_lr": 1.6e-2}
    yield "10M", "muon", {"steps": 600, "lr": 5e-3, "embedding_lr": 3.2e-2}
    for changes in ({}, {"weight_decay": 0}):
        yield "1M", "muon", {"steps": 10_000, "embedding_lr": 3.2e-2} | changes
    yield "1M", "adamw_wsd", {"steps": 10_000, "lr": 4e-3, "embedding_lr": 1.6e-2}


def list_finetuning() -> Iterator[dict]:
    """Yield the flags that differ from the defaults in `list_jobs`."""
    for lr in (1e-3, 3e-3, 3e-4, 1e-2):
        yield {"lr": lr}
    yield {"optimizer": "muon", "lr": 3e-3, "embedding_lr": 3e-3}
    yield {"lr": 3e-3, "schedule": "wsd", "decay_fraction": 1.0}
    yield {"lr": 3e-3, "dropout": 0.0}
    for epochs in (1, 4):
        yield {"lr": 3e-3, "epochs": epochs}


def format_name(*parts: str | dict) -> str:
    """Return a run's name, such as "1M/muon/lr=0.02"."""
    texts = [part if isinstance(part, str) else ",".join(f"{flag}={part[flag]}" for flag in part) for part in parts]
    return "/".join(filter(None, texts))


def train(job: Job) -> None:
    """Train a run, or resume it, and append its result."""
    print(f"--- {job.name}", flush=True)
    out = RUNS / job.name.replace("/", "_")
    arguments = ["--compile", *(str(part) for flag, value in job.flags.items() for part in (f"--{flag}", value))]
    with open(f"{out}.txt", "a") as log:
        options = {"check": True, "stdout": log, "stderr": log, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
        subprocess.run([sys.executable, ROOT / job.script, "--out", out, *arguments], **options)
        result = {"name": job.name, "val_loss": read_losses(out)}
        if job.script == "finetune.py":
            file = out / "figures.jsonl"
            flags = ("--checkpoint", out, "--data", job.flags["data"], "--no_hellaswag", "--max_answers", "250")
            subprocess.run([sys.executable, ROOT / "evaluate.py", *flags, "--json", file], **options)
            result["answers"] = json.loads(file.read_text().splitlines()[-1])["data"][str(job.flags["data"])]
    print(f"{job.name}: {result['val_loss'][-1][1]:.3f}", flush=True)
    append_line(RESULTS, json.dumps(result))


def read_losses(run: Path) -> list[list[float]]:
    """Return the [tokens, validation loss] pairs of a run's log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [[row["tokens"], round(row["val_loss"], 5)] for row in rows if "val_loss" in row]


def read_results() -> dict[str, list[list[float]]]:
    """Return the [tokens, validation loss] pairs of each finished run."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {result["name"]: result["val_loss"] for result in map(json.loads, lines)}


def tokens_to_reach(target: float, curve: list[list[float]]) -> float:
    """Return the number of tokens at which a curve first reaches a loss, interpolated; infinite if it never does."""
    for (tokens, loss), (next_tokens, next_loss) in itertools.pairwise(curve):
        if next_loss <= target:
            return tokens + (next_tokens - tokens) * (loss - target) / (loss - next_loss)
    return math.inf


def print_table(results: dict[str, list[list[float]]]) -> None:
    """Print the last loss of each run, and the fraction of the tokens at which it reaches that of the best AdamW run.

    The best AdamW run is that of the same size with the default number of steps and the default seed.
    """
    for size, flags in SIZES.items():
        runs = {name: curve for name, curve in results.items() if name.startswith(f"{size}/")}
        n_tokens = flags["steps"] * SHARED["batch_tokens"]
        adamw = {name: curve for name, curve in runs.items() if "muon" not in name and "seed" not in name}
        targets = [curve[-1][1] for curve in adamw.values() if curve[-1][0] == n_tokens]
        if not targets:
            continue
        print("\n| run | tokens | last loss | reaches the best AdamW's loss at |\n|---|---|---|---|")
        for name, curve in sorted(runs.items(), key=lambda item: item[1][-1][1]):
            fraction = tokens_to_reach(min(targets), curve) / n_tokens
            reached = f"{fraction:.2f}" if fraction < math.inf else "-"
            print(f"| {name} | {curve[-1][0] / 1e6:.1f} M | {curve[-1][1]:.3f} | {reached} |")


def draw_curves(results: dict[str, list[list[float]]]) -> None:
    """Draw docs/recipe.png with plot.py, from the results alone."""
    folders = [RUNS / "curves" / name for name in CURVES]
    for folder, run in zip(folders, CURVES.values(), strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        rows = ({"step": tokens // 4096, "tokens": tokens, "val_loss": loss} for tokens, loss in results[run])
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "plot.py", *CURVES, "--out", ROOT / "docs" / "recipe.png"]
    subprocess.run(command, cwd=RUNS / "curves", check=True)


def main(prefix: str = "") -> None:
    done = read_results()
    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [
            pool.submit(train, job) for job in list_jobs() if job.name.startswith(prefix) and job.name not in done
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # a run failed, or Ctrl-C: do not start the others
            pool.shutdown(cancel_futures=True)
            raise
    print_table(read_results())
    if set(CURVES.values()) <= read_results().keys():
        draw_curves(read_results())


if __name__ == "__main__":
    main(*sys.argv[1:])
