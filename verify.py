"""Verify runs, checkpoints and dataset folders: compare every file with its checksum.

    python verify.py                                                # all runs in runs/
    python verify.py runs/gpt2 data/fineweb_edu                     # one run and one dataset folder
    python verify.py runs/gpt2/step_001000

Prints one line per checkpoint or dataset. The time is that of reading all files once.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from minigpt import cli
from minigpt.cli import Progress, UserError
from minigpt.files import read_json, sha256
from minigpt.runs import find_best, list_checkpoints, list_steps, read_val_loss, verify
from minigpt.shards import SPLITS, open_arrays, read_meta
from minigpt.tokenizer import TOKENIZER_FILE, read_tokenizer


@dataclass(frozen=True)
class Config:
    paths: tyro.conf.Positional[tuple[str, ...]] = ("runs",)
    """Runs, checkpoints, dataset folders, vocabularies, and folders of these."""


def main(config: Config) -> None:
    folders = [found for path in config.paths for found in find_folders(Path(path))]
    runs = {folder.parent for folder in folders if is_checkpoint(folder) and list_checkpoints(folder.parent)}
    best = {folder for folder in map(find_best, runs) if read_val_loss(folder) < math.inf}
    n_files = {folder: sum(1 for _ in folder.iterdir()) for folder in folders}
    progress = Progress(sum(n_files.values()), "file", enabled=sys.stderr.isatty())  # elsewhere the table is enough
    print_line = progress.print if progress.enabled else print
    width = max(len(str(folder)) for folder in folders)
    print_line(f"{'folder':<{width}}  validation loss          size  saved             state")
    n_corrupt = n_done = 0
    for folder in n_files:
        try:
            if is_checkpoint(folder):
                verify(folder)
            else:
                verify_dataset(folder, progress)
            state = "whole"
        except UserError as error:
            state = str(error).removeprefix(str(folder)).strip(" /").removeprefix("is ")
            n_corrupt += 1
        print_line(f"{folder!s:<{width}}  {format_figures(folder)}  {'best, ' * (folder in best)}{state}")
        n_done += n_files[folder]
        progress.update(n_done - progress.done)
    progress.close()
    if n_corrupt:
        raise UserError(f"{n_corrupt} of {len(folders)} are corrupt: delete them, and prepare datasets again")


def find_folders(path: Path) -> list[Path]:
    """Return the checkpoints and dataset folders of a path. Raises `UserError` if there are none."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a run, a folder of runs, a checkpoint or a dataset folder")
    if (path / "meta.json").exists() or (path / "train_state.safetensors").exists():
        return [path]
    if any(step.is_dir() and not list_steps(step) for step in list_steps(path)):  # a run, not a folder of runs
        return list_folders(path)
    found = [folder for item in sorted(path.iterdir()) for folder in list_folders(item)]
    if not found and is_checkpoint(path):
        return [path]
    if not found:
        raise UserError(f"{path} holds no checkpoints and no meta.json: there are no checksums to compare")
    return found


def list_folders(item: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, also of those without meta.json, or a dataset folder."""
    return [item] if (item / "meta.json").is_file() else [step for step in list_steps(item) if step.is_dir()]


def is_checkpoint(folder: Path) -> bool:
    return folder.name.startswith("step_") or (folder / "train_state.safetensors").is_file()


def verify_dataset(folder: Path, progress: Progress) -> None:
    """Compare every file of a dataset folder with its length and checksum. Raises `UserError` if one is corrupt.

    A vocabulary of prepare_tokenizer.py has no checksums: it is read.
    """
    if read_json(folder / "meta.json").get("kind") == "tokenizer":
        read_tokenizer(folder / TOKENIZER_FILE)
        return
    meta = read_meta(folder)
    open_arrays(folder, meta)
    for entry in [entry for split in SPLITS for entry in meta[split]["files"]]:
        if sha256(folder / entry["file"]) != entry.get("sha256"):
            raise UserError(
                f"{folder / entry['file']} is corrupt: its checksum is wrong; delete {folder} and prepare it again"
            )
        progress.update(1)


def format_figures(folder: Path) -> str:
    """Return the columns validation loss, size and date."""
    val_loss = read_val_loss(folder) if is_checkpoint(folder) else math.inf
    loss = f"{val_loss:.4f}" if val_loss < math.inf else "-"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    meta = folder / "meta.json"
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((meta if meta.exists() else folder).stat().st_mtime))
    return f"{loss:>15}  {size:>9,.1f} MB  {saved}"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
