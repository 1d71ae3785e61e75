"""Draw what the logs of one or several runs tell: losses, learning rate, speed.

    python plot.py gpt2                                             # runs/gpt2, into loss.png
    python plot.py runs/demo runs/demo_chat --x hours --out demo.png
    python plot.py runs/lr_* --x steps                              # a sweep, beside each other

The losses of a run's first twentieth may lie above the picture, so that the rest can be told apart.  The axis of the
losses is logarithmic where what is left spans more than a factor of 2, those of learning rate and speed where the runs
are more than a factor of 10 apart.  Hours are those of the training steps, worked out from the tokens/s of each: the
log keeps no clock, so validating, saving and pauses are not in them.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

import cli
from checkpoint import run_folder

# Okabe and Ito's colours, which colour-blind people can tell apart; dashes and markers differ too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (12, 2)))
MARKERS = "os^DvP"
KEYS = ("loss", "val_loss", "lr", "tokens_per_s", "hellaswag", "hellaswag_norm")  # of a log's rows
NOISY = ("loss", "tokens_per_s")
TITLES = {"loss": "Training loss", "val_loss": "Validation loss", "lr": "Learning rate"}
TITLES |= {"tokens_per_s": "Tokens per second", "hellaswag": "HellaSwag accuracy"}
EARLY = 0.05  # the part of a run whose high losses may leave the picture, for the rest to be seen
UNITS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "k"}
Curves = dict[str, np.ndarray]  # of one run, by key: (2, n), x and y, which is NaN where a step was skipped


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """The runs: names under runs/, or paths with a slash in them."""
    out: Path = Path("loss.png")
    """The picture: .png, .pdf or .svg."""
    x: Literal["tokens", "hours", "steps"] = "tokens"
    """What the curves are drawn against."""
    smooth: float = 0.02
    """The part of a run's steps over which training loss and speed are averaged; 0 leaves them as they are."""


def main(config: Config) -> None:
    cli.check_range("smooth", config.smooth, 0, 1)
    cli.check(config.out.suffix in (".png", ".pdf", ".svg"), f"--out {config.out}: it must end in .png, .pdf or .svg")
    names = [name for name in dict.fromkeys(config.runs) if not run_folder(name).is_file()]  # runs/* has pictures too
    cli.check(bool(names), "no run is named: give names under runs/, or folders with a log.jsonl")
    runs = {name.removeprefix("runs/").rstrip("/"): curves(read_log(run_folder(name)), config.x) for name in names}
    draw(runs, config).savefig(config.out)
    print(f"{config.out}: {', '.join(runs)}")


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log, without a line that a crash cut short.  Raises `UserError` where there are none."""
    file, rows = run / "log.jsonl", []
    cli.check(file.is_file(), f"{run} has no log.jsonl: name a run that pretrain.py or finetune.py made")
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    rows = [row for row in rows if isinstance(row, dict) and {"step", "tokens"} <= row.keys()]
    cli.check(any(set(KEYS) & row.keys() for row in rows), f"{file} has no steps yet: wait for the first")
    return rows


def curves(rows: list[dict], x: str) -> Curves:
    """The curves of a log."""
    timed = [row for row in rows if row.get("tokens_per_s")]
    seconds = np.diff([0, *(row["tokens"] for row in timed)]) / [row["tokens_per_s"] for row in timed]
    hours = np.cumsum([0, *seconds]) / 3600
    at = {"tokens": [row["tokens"] for row in rows], "steps": [row["step"] for row in rows]}
    at["hours"] = np.interp(at["steps"], [0, *(row["step"] for row in timed)], hours)
    points = {key: [(place, row[key]) for place, row in zip(at[x], rows, strict=True) if key in row] for key in KEYS}
    return {key: np.array(points[key], dtype=float).T for key in KEYS if points[key]}  # None becomes NaN


def smoothed(values: np.ndarray, part: float) -> np.ndarray:
    """The mean of a window around each value, `part` of all wide; it begins narrow, so that a steep start stays."""
    index, half = np.arange(len(values)), round(part * len(values) / 2)
    first, last = np.maximum(index - half, 0), np.minimum(index + np.minimum(index, half), len(values) - 1)
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def shown(run: Curves, key: str, smooth: float) -> tuple[np.ndarray, np.ndarray]:
    """A curve as it is drawn: without skipped steps, and smoothed if it is noisy."""
    x, y = run.get(key, np.empty((2, 0)))
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    return x, smoothed(y, smooth) if smooth and key in NOISY else y


def draw(runs: dict[str, Curves], config: Config) -> Figure:
    """The picture: losses above, the rest below, the legend over and the caption under them."""
    hellaswag = any({"hellaswag", "hellaswag_norm"} & run.keys() for run in runs.values())
    below = ["lr", "tokens_per_s", *(["hellaswag"] if hellaswag else [])]
    mosaic = [["loss"] * 3 + ["val_loss"] * 3, [panel for panel in below for _ in range(6 // len(below))]]
    figure = Figure(figsize=(13, 8.5), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic(mosaic, height_ratios=[3, 2])
    for i, (name, run) in enumerate(runs.items()):
        draw_run(axes, i, name, run, config.smooth)
    for panel, axis in axes.items():
        scale(axis, panel, list(runs.values()), config.smooth)
        dress(axis, panel, config.x)
    labels = axes["loss"].get_legend_handles_labels()
    columns = min(3, len(runs))
    figure.legend(*labels, loc="outside upper center", ncols=columns, handlelength=4, frameon=False, fontsize=11)
    average = f"Training loss and speed: mean over {100 * config.smooth:.3g} % of a run's steps, each step faint."
    skipped = any(np.isnan(run["loss"]).any() for run in runs.values() if "loss" in run)
    caption = average * (config.smooth > 0) + " x: skipped step." * skipped
    caption += " Dotted: HellaSwag normalised by length." * hellaswag
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return figure


def draw_run(axes: dict[str, Axes], i: int, name: str, run: Curves, smooth: float) -> None:
    """The curves of run number `i`, each in its panel."""
    color, dashes, marker = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]
    losses = shown(run, "val_loss", smooth)[1]
    label = " " + name.replace("$", r"\$")  # to Matplotlib $ begins a formula, and what begins with _ is hidden
    label += f": best validation loss {losses.min():.4f}" if len(losses) else ""
    axes["loss"].plot([], [], color=color, linestyle=dashes, marker=marker, label=label)
    for key in run:
        axis, (x, y) = axes[key.removesuffix("_norm")], shown(run, key, smooth)
        if key in NOISY:
            axis.plot(*shown(run, key, 0), color=color, alpha=0.3, linewidth=0.7)
        if key == "loss" and len(x):
            skipped = run[key][0][np.isnan(run[key][1])]
            axis.plot(skipped, np.interp(skipped, x, y), "x", color=color, markersize=9, markeredgewidth=2)
        points = {"marker": marker, "markersize": 5, "markevery": max(1, len(x) // 16)}
        points = points if key in ("val_loss", "hellaswag") or len(x) < 3 else {}
        axis.plot(x, y, color=color, linestyle=":" if key == "hellaswag_norm" else dashes, linewidth=1.8, **points)


def dress(axis: Axes, panel: str, x: str) -> None:
    """Title, labels and grid of a panel."""
    axis.set_title(TITLES[panel], loc="left", fontsize=12, fontweight="bold")
    axis.set_xlabel("hours of training steps" if x == "hours" else x)
    axis.set_ylabel("nats per token" if "loss" in panel else "")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(FuncFormatter(short))
    axis.yaxis.set_major_formatter(
        {"lr": FuncFormatter(scientific), "hellaswag": PercentFormatter(1, 0)}.get(panel, FuncFormatter(short))
    )


def scale(axis: Axes, panel: str, runs: list[Curves], smooth: float) -> None:
    """The range of a panel's vertical axis, the same for both losses, and whether it is logarithmic."""
    loss = "loss" in panel
    drawn = [shown(run, key, smooth) for run in runs for key in (("loss", "val_loss") if loss else (panel,))]
    drawn = [(x, y) for x, y in drawn if len(y)]
    if not drawn or panel == "hellaswag":
        return
    usual = np.concatenate([y[x >= EARLY * x[-1]] if loss else [np.quantile(y, 0.9)] for x, y in drawn])
    low, high = usual.min(), max(usual.max(), 0 if loss else max(y.max() for _, y in drawn))
    if 0 < low * (2 if loss else 10) < usual.max():
        axis.set_yscale("log", subs=())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if loss else (1, 3)))
        axis.set_ylim(low * 0.97 if loss else low / 10, high * 1.1)
    else:
        margin = 0.05 * (high - low if loss else high) or 0.1
        axis.set_ylim(low - margin if loss else 0, high + margin)


def short(value: float, position: int | None = None) -> str:
    """A number as people write it at an axis: 0.5, 250, 1.5k, 20M, 10B."""
    size, unit = next(((size, unit) for size, unit in UNITS.items() if abs(value) >= size), (1, ""))
    return f"{value / size:.4g}{unit}"


def scientific(value: float, position: int | None = None) -> str:
    """A learning rate as people write it: 6e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
