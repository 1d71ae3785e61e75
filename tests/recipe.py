"""Compare training recipes on small models, for docs/recipe.md.

    python prepare_tokenizer.py --vocab_size 2048 --out data/recipe_tokenizer
    python prepare_fineweb.py --tokenizer data/recipe_tokenizer --max_tokens 38000000 --out data/recipe
    python tests/recipe.py              # all runs that docs/recipe.jsonl does not have yet; hours on a CPU
    python tests/recipe.py 1M/muon      # only the runs with this prefix

Every run of a size sees the same tokens in the same order. Each CPU core trains one run. Run the command again to
resume. Each result is a line of docs/recipe.jsonl: the run's name, its flags, and the validation loss after each number
of tokens.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt.files import append_line  # noqa: E402

RESULTS = ROOT / "docs" / "recipe.jsonl"
SIZES = {
    "1M": {"n_layer": 4, "n_head": 2, "n_embd": 128, "steps": 1000},
    "3M": {"n_layer": 6, "n_head": 3, "n_embd": 192, "steps": 1500},
    "10M": {"n_layer": 8, "n_head": 5, "n_embd": 320, "steps": 2000},
}
COMMON = {
    "model": "demo",
    "block_size": 256,
    "batch_tokens": 4096,
    "dtype": "bfloat16",
    "val_tokens": 98_304,
    "val_every": 50,
    "keep": 1,
}
ARMS = {
    "reference": {"optimizer": "adamw", "schedule": "cosine"},
    "adamw_wsd": {"optimizer": "adamw", "schedule": "wsd", "decay_fraction": 0.5},
    "muon": {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.5, "lr": 1e-2, "adamw_lr": 4e-3},
}


def list_runs() -> Iterator[tuple[str, str, dict]]:
    """Yield the size, the arm and the flags that differ from the arm's."""
    yield "1M", "muon", {}
    for lr in (4e-3, 8e-3, 2e-3, 1e-3):
        yield "1M", "reference", {"lr": lr}
    for lr in (2e-2, 5e-3):
        yield "1M", "muon", {"lr": lr}
    for lr in (4e-3, 8e-3, 2e-3):
        yield "1M", "adamw_wsd", {"lr": lr}
    for adamw_lr in (8e-3, 2e-3):
        yield "1M", "muon", {"adamw_lr": adamw_lr}
    yield "1M", "muon", {"weight_decay": 0}
    for steps in (500, 400, 300):
        yield "1M", "muon", {"steps": steps}


def train(name: str, flags: dict) -> None:
    """Train one run, or resume it, and append its result."""
    print(f"--- {name}", flush=True)
    out = ROOT / "runs" / "recipe" / name.replace("/", "_")
    arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
    command = [sys.executable, ROOT / "pretrain.py", "--data", ROOT / "data" / "recipe", "--out", out, *arguments]
    with open(f"{out}.txt", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [[row["tokens"], round(row["val_loss"], 5)] for row in rows if "val_loss" in row]
    print(f"{name}: {losses[-1][1]:.3f}", flush=True)
    append_line(RESULTS, json.dumps({"name": name, "flags": flags, "val_loss": losses}))


def main(prefix: str = "") -> None:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    (ROOT / "runs" / "recipe").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for size, arm, changes in list_runs():
            name = "/".join([size, arm, ",".join(f"{flag}={value:g}" for flag, value in changes.items())]).rstrip("/")
            if name.startswith(prefix) and name not in done:
                flags = COMMON | SIZES[size] | ARMS[arm] | changes
                flags["save_every"] = flags["steps"] // 4
                futures.append(pool.submit(train, name, flags))
        for future in futures:
            try:
                future.result()
            except subprocess.CalledProcessError:  # or interrupted: do not start the others
                pool.shutdown(cancel_futures=True)
                raise


if __name__ == "__main__":
    main(*sys.argv[1:])
