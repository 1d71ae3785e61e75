"""Compare training recipes on small models, for docs/recipe.md.

    python prepare_tokenizer.py --vocab_size 2048 --out data/recipe_tokenizer
    python prepare_fineweb.py --tokenizer data/recipe_tokenizer --max_tokens 38000000 --out data/recipe
    python tests/recipe.py              # all runs that docs/recipe.jsonl does not have yet; hours on a CPU
    python tests/recipe.py 1M/muon      # only the runs with this prefix

Every run of a size sees the same tokens in the same order. Run the command again to resume. Each result is a line of
docs/recipe.jsonl: the run's name, its flags, and the validation loss after each number of tokens.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt.files import append_line  # noqa: E402

RESULTS = ROOT / "docs" / "recipe.jsonl"
SIZES = {
    "1M": {"n_layer": 4, "n_head": 4, "n_embd": 128, "steps": 1000},
    "3M": {"n_layer": 6, "n_head": 6, "n_embd": 192, "steps": 2000},
    "10M": {"n_layer": 8, "n_head": 5, "n_embd": 320, "steps": 3000},
}
COMMON = {"model": "demo", "block_size": 256, "batch_tokens": 4096, "val_tokens": 98_304, "val_every": 50, "keep": 1}
WSD = {"schedule": "wsd", "decay_fraction": 0.5}


def list_runs() -> Iterator[tuple[str, dict]]:
    """Yield the name and the flags of each run."""
    for lr in (2e-3, 4e-3, 8e-3, 1e-3):
        yield f"1M/reference/lr={lr:g}", {"lr": lr}
    for lr in (4e-3, 8e-3, 2e-3):
        yield f"1M/adamw_wsd/lr={lr:g}", {"lr": lr, **WSD}
    for lr, adamw_lr, weight_decay in (
        (1e-2, 4e-3, 0),
        (1e-2, 4e-3, 0.1),
        (2e-2, 4e-3, 0.1),
        (5e-3, 4e-3, 0.1),
        (1e-2, 8e-3, 0.1),
        (1e-2, 2e-3, 0.1),
    ):
        flags = {"optimizer": "muon", "lr": lr, "adamw_lr": adamw_lr, "weight_decay": weight_decay, **WSD}
        yield f"1M/muon/lr={lr:g},adamw_lr={adamw_lr:g},weight_decay={weight_decay:g}", flags


def main(prefix: str = "") -> None:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    for name, own in list_runs():
        if name in done or not name.startswith(prefix):
            continue
        flags = COMMON | SIZES[name.split("/")[0]] | own
        flags["save_every"] = flags["steps"] // 4
        out = ROOT / "runs" / "recipe" / name.replace("/", "_")
        arguments = [str(part) for flag, value in flags.items() for part in (f"--{flag}", value)]
        command = [sys.executable, ROOT / "pretrain.py", "--data", ROOT / "data" / "recipe", "--out", out, *arguments]
        print(f"--- {name}", flush=True)
        subprocess.run(command, check=True)
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = [[row["tokens"], round(row["val_loss"], 5)] for row in rows if "val_loss" in row]
        append_line(RESULTS, json.dumps({"name": name, "flags": flags, "val_loss": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
