"""Train the tiny model on datasets of 100 million to 100 billion tokens; print start-up time, memory and step time.

    TMPDIR=/dev/shm python tests/dataset_size.py                    # less than a minute; the files are sparse

Start-up, memory and the time of a step should not depend on the size: files are mapped into memory, and the order of
the rows is computed, not stored. Start-up is the time besides the steps: imports, three validations of 640 tokens and
two checkpoints. Files in /dev/shm exclude the disk from the times.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minigpt.files import write_manifest  # noqa: E402
from minigpt.shards import FORMAT_VERSIONS  # noqa: E402

SHARD_TOKENS = 100_000_000
FLAGS = ("--model", "tiny", "--batch_tokens", "4096", "--steps", "50", "--val_tokens", "640", "--device", "cpu")


def main(*sizes: str) -> None:
    print("| tokens | files | start-up | memory | step |\n|---|---|---|---|---|", flush=True)
    for n_tokens in map(int, sizes or (10**8, 10**9, 10**10, 10**11)):
        with tempfile.TemporaryDirectory() as work:
            n_files = write_sparse_dataset(Path(work) / "data", n_tokens)
            seconds, memory, step = measure(Path(work))
        print(f"| {n_tokens / 1e9:g} B | {n_files:,} | {seconds:.1f} s | {memory / 1e6:.0f} MB | {1e3 * step:.1f} ms |")


def write_sparse_dataset(folder: Path, n_tokens: int) -> int:
    """Write a dataset folder of zeros that takes no space on most file systems; return the number of its files."""
    folder.mkdir()
    splits = {}
    for split, length in {"train": n_tokens, "val": 10_000}.items():
        files = []
        for start in range(0, length, SHARD_TOKENS):
            name, size = f"{split}_{len(files):06d}.npy", min(SHARD_TOKENS, length - start)
            np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.uint16, shape=(size,))
            files.append({"file": name, "length": size, "sha256": f"{len(files):064x}"})
        splits[split] = {"files": files, "documents": 1, "tokens": length, "loss_tokens": length}
    meta = {"version": FORMAT_VERSIONS["text"], "kind": "text", "tokenizer": "bytes", "vocab_size": 257, "source": {}}
    meta |= {"val_fraction": 0.1, "block_size": 0, "records": 1, "truncated": 0, "dropped": 0, "skipped_empty": 0}
    write_manifest(folder / "meta.json", meta | splits)
    return sum(len(entry["files"]) for entry in splits.values())


def measure(work: Path) -> tuple[float, int, float]:
    """Train on `work/data`; return the seconds besides the steps, the peak memory in bytes and the seconds per step."""
    started = time.monotonic()
    command = (sys.executable, ROOT / "pretrain.py", "--data", work / "data", "--out", work / "run", *FLAGS)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status != 0:
        raise SystemExit(f"pretrain.py failed with status {status}")
    rows = map(json.loads, (work / "run" / "log.jsonl").read_text().splitlines())
    steps = [4096 / row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    return seconds - sum(steps), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), statistics.median(steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
