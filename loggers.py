"""`--log tensorboard wandb`: each row of a run's log.jsonl goes on to TensorBoard and Weights & Biases.

A logger has `write(row)`.  What it sends follows from the type of a value: numbers become curves, text and lists of
records (samples, say) become text; None is left out.  Both libraries write in the background and are closed by
themselves when the process ends, after whatever the run has to save.
"""

import atexit
import importlib.util
import json
import math
import secrets
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli import UserError, check


def check_loggers(names: tuple[str, ...]) -> None:
    """Raise `UserError` where a library that --log names is missing, or nobody is logged in to Weights & Biases."""
    for name in names:
        found = importlib.util.find_spec(name) is not None
        check(found, f"--log {name} is not installed: pip install -r requirements-extra.txt")
    if "wandb" in names:
        import wandb

        ready = wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False)
        check(ready, "--log wandb: not logged in: run `wandb login` first, or set WANDB_MODE=offline")


def open_logger(name: str, folder: Path, config: Any, step: int) -> Any:
    """The logger of that name for the run in `folder`, whose log.jsonl ends at `step`."""
    return {"tensorboard": TensorBoard, "wandb": Wandb}[name](folder, config, step)


def rows_so_far(folder: Path) -> Iterator[dict]:
    """What a run that goes on has logged before."""
    if (folder / "log.jsonl").exists():
        for line in (folder / "log.jsonl").read_text().splitlines():
            yield json.loads(line)


class TensorBoard:
    """Event files in the run's folder.  They are written anew from log.jsonl when a run goes on, as a crash takes the
    last two minutes of them away, and leaves steps that come again; `purge_step` tells those who watch."""

    def __init__(self, folder: Path, config: Any, step: int):
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=0)
        atexit.register(self.writer.close)
        self.writer.add_text("config", as_text([asdict(config)]), 0)
        for row in rows_so_far(folder):
            self.write(row)
        self.hint = f"tensorboard --logdir {folder.parent}"

    def write(self, row: dict) -> None:
        for name, value in row.items():
            if isinstance(value, (int, float)) and name not in ("step", "tokens"):
                self.writer.add_scalar(name, value, row["step"], new_style=False)
            elif isinstance(value, (str, list)):
                self.writer.add_text(name, as_text(value), row["step"])


def as_text(value: str | list[dict]) -> str:
    """Markdown that shows text as it is: indented text keeps its lines."""
    if isinstance(value, str):
        return textwrap.indent(value, "    ")
    return "\n\n---\n\n".join(
        "\n\n".join(f"**{key}**\n\n{textwrap.indent(str(text), '    ')}" for key, text in record.items())
        for record in value
    )


class Wandb:
    """A run of Weights & Biases, which keeps its id when our run goes on.  It takes no step twice; the steps that come
    again after a crash have the same values anyway.  Offline, `kill -9` takes the rows of the last 15 seconds, which
    wandb had not written yet.  WANDB_MODE, WANDB_PROJECT and so on are wandb's own."""

    def __init__(self, folder: Path, config: Any, step: int):
        import wandb

        id_file = folder / "wandb" / "run_id"
        known = step > 0 and id_file.exists()
        run_id = id_file.read_text() if known else secrets.token_hex(4)
        id_file.parent.mkdir(exist_ok=True)
        online = wandb.setup().settings.mode == "online"
        settings = wandb.Settings(silent=not online, quiet=True, console="off")  # online it may have to wait
        about = {"name": folder.name, "config": asdict(config), "dir": folder}
        try:
            self.run = wandb.init(id=run_id, resume="allow", settings=settings, **about)
        except wandb.Error as error:
            raise UserError(f"--log wandb: {error}; with WANDB_MODE=offline it needs no network") from None
        self.table = wandb.Table
        id_file.write_text(run_id)
        first = math.inf if known and self.run.offline else self.run.step  # which the server has told
        for row in rows_so_far(folder):
            if row["step"] >= first:
                self.write(row)
        sync = f"wandb sync {folder}/wandb/offline-run-*"
        self.hint = sync if self.run.offline else self.run.url or "wandb is disabled"

    def write(self, row: dict) -> None:
        values = {name: value for name, value in row.items() if value is not None and name != "step"}
        for name, value in values.items():
            if isinstance(value, list):
                columns = list(value[0])
                values[name] = self.table(columns=columns, data=[[record[key] for key in columns] for record in value])
        self.run.log(values, step=row["step"])
