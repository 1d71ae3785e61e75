"""Plot the training curves of one or more runs: losses, bits per byte, learning rate, speed, HellaSwag.

    python plot.py                                                  # all runs under runs/, to loss.png
    python plot.py runs/demo runs/demo_chat --x hours --out demo.png
    python plot.py runs/lr_* --x steps                              # compare the runs of a sweep

Takes a few seconds. The first 5 % of a run may lie above the loss axis. Axes are logarithmic if the other losses span
more than a factor of 2, or if learning rate or speed differ by more than a factor of 10 between runs. Hours are
computed from the logged tokens/s; they exclude validation, checkpoints and pauses.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from minigpt import cli
from minigpt.cli import UserError
from minigpt.files import write_file
from minigpt.runs import read_log

# The colour-blind-safe palette of Okabe and Ito; dashes and markers differ as well.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (6, 1.5)), (0, (2, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (12, 2)))
MARKERS = "os^DvP"
# Keys of the rows in log.jsonl.
KEYS = ("loss", "val_loss", "bits_per_byte", "lr", "tokens_per_s", "hellaswag", "hellaswag_norm")
NOISY_KEYS = ("loss", "tokens_per_s")
PANELS = (("loss", "val_loss"), ("lr", "tokens_per_s", "bits_per_byte", "hellaswag"))  # top and bottom row
TITLES = {"loss": "Training loss", "val_loss": "Validation loss", "lr": "Learning rate"}
TITLES |= {
    "tokens_per_s": "Tokens per second",
    "bits_per_byte": "Validation bits per byte",
    "hellaswag": "HellaSwag accuracy",
}
EARLY_FRACTION = 0.05  # start of a run; its losses do not affect the range of the loss axis
SUFFIXES = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "k"}
Curves = dict[str, np.ndarray]  # key -> (2, n): x and y; y is NaN at a skipped step


@dataclass(frozen=True)
class Config:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders to plot; default: all runs in runs/."""
    out: Path = Path("loss.png")
    """File to write: .png, .pdf or .svg."""
    x: Literal["tokens", "hours", "steps"] = "tokens"
    """Quantity on the x axis."""
    smooth: float = 0.02
    """Fraction of a run's steps over which training loss and speed are averaged; 0 disables smoothing."""


def main(config: Config) -> None:
    cli.check_range("smooth", config.smooth, 0, 1)
    if config.out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {config.out}: the file name must end in .png, .pdf or .svg")
    paths = config.runs or [log.parent for log in sorted(Path("runs").glob("*/log.jsonl")) if log.stat().st_size]
    folders = [path for path in paths if not path.is_file()]  # runs/* also matches pictures
    if not folders:
        raise UserError("no run folder given, and none under runs/: name at least one, as in plot.py runs/gpt2")
    runs = {str(folder).removeprefix("runs/"): get_curves(read_rows(folder), config.x) for folder in folders}
    picture = io.BytesIO()
    draw_figure(runs, config).savefig(picture, format=config.out.suffix[1:])
    write_file(config.out, [picture.getvalue()])
    print(f"wrote {config.out} with the curves of {', '.join(runs)}")


def read_rows(run: Path) -> list[dict]:
    """Return the rows of a run's log. Raises `UserError` if the log is missing or empty."""
    if not (run / "log.jsonl").is_file():
        raise UserError(f"{run} has no log.jsonl: name a folder that pretrain.py or finetune.py wrote, e.g. runs/gpt2")
    rows = list(read_log(run))
    if not any(set(KEYS) & row.keys() for row in rows):
        raise UserError(f"{run}/log.jsonl has no steps yet: wait for the first one")
    return rows


def get_curves(rows: list[dict], x: str) -> Curves:
    """Return the curve of each key in the log; `x` is "tokens", "hours" or "steps"."""
    steps, tokens = [row["step"] for row in rows], [row["tokens"] for row in rows]
    timed = [row for row in rows if row.get("tokens_per_s")]
    seconds = np.diff([0, *(row["tokens"] for row in timed)]) / [row["tokens_per_s"] for row in timed]
    hours = np.interp(steps, [0, *(row["step"] for row in timed)], np.cumsum([0, *seconds]) / 3600)
    values = {"tokens": tokens, "hours": hours, "steps": steps}[x]
    points = {key: [(value, row[key]) for value, row in zip(values, rows, strict=True) if key in row] for key in KEYS}
    curves = {key: np.array(points[key], dtype=float).T for key in KEYS if points[key]}  # None becomes NaN
    return {key: np.where(np.isfinite(curve), curve, np.nan) for key, curve in curves.items()}


def draw_figure(runs: dict[str, Curves], config: Config) -> Figure:
    """Draw the losses in the top row and the other metrics in the bottom row; `runs` maps legend labels to curves."""
    logged = {key.removesuffix("_norm") for run in runs.values() for key in run}
    rows = [[panel for panel in row if panel in logged] for row in PANELS]
    rows = [row for row in rows if row]
    mosaic = [[panel for panel in row for _ in range(12 // len(row))] for row in rows]
    figure = Figure(figsize=(13, 8.5 if len(rows) == 2 else 5.5), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic(mosaic, height_ratios=[3, 2][: len(rows)])
    for i, (label, run) in enumerate(runs.items()):
        draw_run(axes, i, label, run, config.smooth)
    for panel, axis in axes.items():
        set_y_scale(axis, panel, list(runs.values()), config.smooth)
        style_axis(axis, panel, config.x)
    legend = {"ncols": min(3, len(runs)), "handlelength": 4, "frameon": False, "fontsize": 11}
    figure.legend(*next(iter(axes.values())).get_legend_handles_labels(), loc="outside upper center", **legend)
    average = f"Training loss and speed: mean over {100 * config.smooth:.3g} % of a run's steps, each step faint."
    skipped = any(np.isnan(run["loss"]).any() for run in runs.values() if "loss" in run)
    caption = average * (config.smooth > 0 and bool(logged & set(NOISY_KEYS))) + " x: skipped step." * skipped
    caption += " Dotted: HellaSwag normalised by length." * ("hellaswag" in logged)
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return figure


def draw_run(axes: dict[str, Axes], i: int, label: str, run: Curves, smooth: float) -> None:
    """Draw the curves of run number `i`, each in its panel."""
    color, dashes, marker = COLORS[i % len(COLORS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]
    val_losses = filter_curve(run, "val_loss", smooth)[1]
    label = " " + label.replace("$", r"\$")  # Matplotlib hides labels that start with _, and parses $ as math
    label += f": best validation loss {val_losses.min():.4f}" if len(val_losses) else ""
    next(iter(axes.values())).plot([], [], color=color, linestyle=dashes, marker=marker, label=label)
    for key in run:
        axis, (x, y) = axes[key.removesuffix("_norm")], filter_curve(run, key, smooth)
        if key in NOISY_KEYS:
            axis.plot(*filter_curve(run, key, smooth=0), color=color, alpha=0.3, linewidth=0.7)
        if key == "loss" and len(x):
            skipped = run[key][0][np.isnan(run[key][1])]
            axis.plot(skipped, np.interp(skipped, x, y), "x", color=color, markersize=9, markeredgewidth=2)
        points = {"marker": marker, "markersize": 5, "markevery": max(1, len(x) // 16)}
        points = points if key in ("val_loss", "bits_per_byte", "hellaswag") or len(x) < 3 else {}
        axis.plot(x, y, color=color, linestyle=":" if key == "hellaswag_norm" else dashes, linewidth=1.8, **points)


def filter_curve(run: Curves, key: str, smooth: float) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of a curve without skipped steps; noisy curves are smoothed."""
    x, y = run.get(key, np.empty((2, 0)))
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    return x, moving_average(y, smooth) if smooth and key in NOISY_KEYS else y


def moving_average(values: np.ndarray, fraction: float) -> np.ndarray:
    """Average over a window of `fraction` of all values; narrower at the start, to keep a steep drop steep."""
    index, half = np.arange(len(values)), round(fraction * len(values) / 2)
    first, last = np.maximum(index - half, 0), np.minimum(index + np.minimum(index, half), len(values) - 1)
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def set_y_scale(axis: Axes, panel: str, runs: list[Curves], smooth: float) -> None:
    """Set the range of the y axis, linear or logarithmic; both loss panels get the same one."""
    is_loss = panel in ("loss", "val_loss", "bits_per_byte")
    keys = ("loss", "val_loss") if "loss" in panel else (panel,)
    curves = [filter_curve(run, key, smooth) for run in runs for key in keys]
    curves = [(x, y) for x, y in curves if len(y)]
    if not curves or panel == "hellaswag":
        return
    typical = np.concatenate([y[x >= EARLY_FRACTION * x[-1]] if is_loss else [np.quantile(y, 0.9)] for x, y in curves])
    low, high = typical.min(), typical.max() if is_loss else max(y.max() for _, y in curves)
    if 0 < low * (2 if is_loss else 10) < typical.max():
        axis.set_yscale("log", subs=())
        is_short = is_loss and typical.max() < 20 * low  # more ticks would overlap
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if is_short else (1, 3)))
        axis.set_ylim(low * 0.97 if is_loss else low / 10, high * 1.1)
    else:
        margin = 0.05 * (high - low if is_loss else high) or 0.1
        axis.set_ylim(low - margin if is_loss else 0, high + margin)


def style_axis(axis: Axes, panel: str, x: str) -> None:
    """Set the title, labels, grid and tick format of a panel."""
    axis.set_title(TITLES[panel], loc="left", fontsize=12, fontweight="bold")
    axis.set_xlabel("hours of training steps" if x == "hours" else x)
    axis.set_ylabel("nats per token" if "loss" in panel else "")
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(FuncFormatter(format_number))
    formatters = {"lr": FuncFormatter(format_lr), "hellaswag": PercentFormatter(1, 0)}
    axis.yaxis.set_major_formatter(formatters.get(panel, FuncFormatter(format_number)))


def format_number(value: float, position: int | None = None) -> str:
    """Format a tick label with a suffix: 0.5, 250, 1.5k, 20M, 10B."""
    size, suffix = next(((size, suffix) for size, suffix in SUFFIXES.items() if abs(value) >= size), (1, ""))
    return f"{value / size:.4g}{suffix}"


def format_lr(value: float, position: int | None = None) -> str:
    """Format a learning rate in short scientific notation: 6e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
