"""plot.py: every logged value is drawn at its place, and damaged or short logs are handled."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import read_log

import plot
from minigpt.cli import UserError

ROWS = [{"step": 0, "tokens": 0, "val_loss": 5.0}]
ROWS += [{"step": s, "tokens": 100 * s, "loss": 5.0 - s / 100, "lr": 1e-3, "tokens_per_s": 50.0} for s in range(1, 101)]
ROWS += [{"step": 100, "tokens": 10_000, "val_loss": 4.25}]


def draw(*runs: list[dict], x: str = "tokens", smooth: float = 0.0) -> dict:
    """Plot logs and return the panels by title, and the figure under the key None."""
    curves = {f"run{i}": plot.get_curves(rows, x) for i, rows in enumerate(runs)}
    figure = plot.draw_figure(curves, plot.Config(tuple(map(Path, curves)), x=x, smooth=smooth))
    return {axis.get_title("left"): axis for axis in figure.axes} | {None: figure}


def lines(axis) -> list[tuple[list, list]]:
    """Return (x, y) of the lines in a panel, without empty ones."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines if len(line.get_xdata())]


def test_runs_of_the_scripts(run_script, pretrained, finetuned, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(pretrained)
    (tmp_path / "runs" / "old.png").write_text("a picture, as runs/* finds it")
    runs = ("runs/mine", f"{finetuned}/", "runs/old.png")
    done = run_script("plot.py", *runs, "--x", "hours", "--out", "runs/new.png")
    assert done.stdout == f"wrote runs/new.png with the curves of mine, {finetuned}\n" and not done.stderr
    assert (tmp_path / "runs" / "new.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "runs" / "chat").symlink_to(finetuned)
    (tmp_path / "runs" / "started").mkdir()
    (tmp_path / "runs" / "started" / "log.jsonl").touch()
    assert run_script("plot.py").stdout == "wrote loss.png with the curves of chat, mine\n"
    assert (tmp_path / "loss.png").stat().st_size > 20_000


def test_every_value_is_drawn_at_its_place(pretrained):
    rows = read_log(pretrained)
    panels = draw(plot.read_rows(pretrained))
    for title, key in {"Training loss": "loss", "Validation loss": "val_loss", "Learning rate": "lr"}.items():
        expected = [row["tokens"] for row in rows if key in row], [row[key] for row in rows if key in row]
        x, y = lines(panels[title])[0]
        assert x == expected[0] and y == expected[1]
    assert min(row["val_loss"] for row in rows if "val_loss" in row) == pytest.approx(
        float(panels[None].legends[0].get_texts()[0].get_text().split()[-1]), abs=1e-4
    )


def test_no_panel_is_empty():
    validation = [row for row in ROWS if "val_loss" in row]
    panels = draw(validation, validation)
    assert list(panels) == ["Validation loss", None]
    assert len(panels[None].legends[0].get_texts()) == 2 and not panels[None].get_supxlabel()
    steps = [row for row in ROWS if "loss" in row]
    assert list(draw(steps)) == ["Training loss", "Learning rate", "Tokens per second", None]


def test_x_axis():
    for x, last in {"tokens": 10_000, "steps": 100, "hours": 10_000 / 50 / 3600}.items():
        panels = draw(ROWS, x=x)
        assert lines(panels["Training loss"])[0][0][-1] == pytest.approx(last)
        assert lines(panels["Validation loss"])[0][0] == [0, pytest.approx(last)]
        assert x in panels["Learning rate"].get_xlabel()


def test_hours_use_the_speed_of_each_step():
    rows = [dict(row, tokens_per_s=50 if row["step"] <= 50 else 100) for row in ROWS]
    hours = lines(draw(rows, x="hours")["Learning rate"])[0][0]
    assert hours[49] == pytest.approx(5000 / 50 / 3600) and hours[99] - hours[49] == pytest.approx(50 / 3600)


def test_smoothing_keeps_positions_and_is_in_the_caption():
    values = np.concatenate([np.linspace(9, 3, 500), np.full(500, 3.0)])
    noisy = values + np.random.default_rng(0).normal(0, 0.1, 1000)
    assert np.allclose(plot.moving_average(values, 0), values)
    assert np.allclose(plot.moving_average(values, 0.02), values, atol=0.05)
    averaged = plot.moving_average(noisy, 0.02)
    assert np.std(averaged - values) < 0.03 and abs(averaged[-1] - 3) < 0.1
    panels = draw(ROWS, smooth=0.02)
    assert "mean over 2 % of a run's steps" in panels[None].get_supxlabel()
    faint, opaque = panels["Training loss"].lines[-3], panels["Training loss"].lines[-1]
    assert faint.get_alpha() < 0.5 and opaque.get_alpha() is None


def test_skipped_steps_are_marked():
    skipped = [dict(row, loss=None, skipped=True) if row["step"] in (40, 41) else row for row in ROWS]
    panels = draw(skipped)
    raw, marks, _ = lines(panels["Training loss"])
    assert 4000 not in raw[0] and len(raw[0]) == 98
    assert marks[0] == [4000, 4100] and marks[1] == pytest.approx([4.6, 4.59])
    assert "skipped" in panels[None].get_supxlabel() and "skipped" not in draw(ROWS)[None].get_supxlabel()


def test_hellaswag_panel_only_if_logged():
    accuracy = {"hellaswag": 0.3, "hellaswag_norm": 0.35, "samples": []}
    rows = [row | accuracy if "val_loss" in row else row for row in ROWS]
    assert "HellaSwag accuracy" not in draw(ROWS)
    assert lines(draw(ROWS, rows)["HellaSwag accuracy"]) == [([0, 10_000], [0.3, 0.3]), ([0, 10_000], [0.35, 0.35])]


def test_bits_per_byte_panel_only_if_logged():
    rows = [row | {"bits_per_byte": row["val_loss"] / 2} if "val_loss" in row else row for row in ROWS]
    panels = draw(ROWS, rows)
    assert "Validation bits per byte" not in draw(ROWS)
    assert lines(panels["Validation bits per byte"]) == [([0, 10_000], [2.5, 2.125])]
    assert panels["Validation bits per byte"].get_ylim()[0] > 1  # as for the losses, the axis does not start at 0
    panels = draw([row | {"hellaswag": 0.3} for row in rows])
    assert len(panels) == 7 and panels[None].axes[0].get_gridspec().get_geometry() == (2, 12)


@pytest.mark.parametrize(
    "rows", [ROWS[:1], ROWS[:2], ROWS[1:2], [dict(ROWS[1], loss=None)], [dict(ROWS[0], val_loss=math.nan)]]
)
def test_a_run_that_has_just_started(rows, tmp_path):
    for x in ("tokens", "hours", "steps"):
        draw(rows, x=x)[None].savefig(tmp_path / "a.png")


@pytest.mark.parametrize("cut", ['{"step": 101, "tok', "\x00\x00", '"a"\n7\n[]', "{}"])
def test_a_line_cut_off_by_a_crash(tmp_path, cut):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + cut)
    assert plot.read_rows(tmp_path) == ROWS


def test_axes_are_logarithmic_for_wide_ranges():
    def scales(*runs):
        return {title: axis.get_yscale() for title, axis in draw(*runs).items() if title}

    assert set(scales(ROWS).values()) == {"linear"}
    assert set(scales(ROWS, [row | {"tokens_per_s": 400.0, "lr": 2e-4} for row in ROWS[1:-1]]).values()) == {"linear"}
    wide = scales(ROWS, [dict(row, tokens_per_s=900.0, lr=9e-5, loss=1.0) for row in ROWS if "loss" in row])
    assert set(wide.values()) == {"log"}


def test_the_ticks_of_a_loss_over_three_decades_do_not_overlap():
    axis = draw([dict(row, loss=5 * 0.93 ** row["step"]) for row in ROWS if "loss" in row])["Training loss"]
    low, high = axis.get_ylim()
    assert high / low > 500
    assert 4 < sum(low < tick < high for tick in axis.get_yticks()) < 10


def test_six_runs_look_different():
    panels = draw(*[ROWS] * 6)
    handles = panels[None].legends[0].legend_handles
    styles = {(handle.get_color(), handle.get_marker()) for handle in handles}
    assert len(styles) == 6 and len({color for color, _ in styles}) == 6 and len({marker for _, marker in styles}) == 6


def test_names_are_not_parsed_as_markup(run_script, tmp_path):
    for name in ("_try", r"a$\frac$b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run_script("plot.py", "runs/_try", r"runs/a$\frac$b")
    figure = plot.draw_figure({"_try": plot.get_curves(ROWS, "tokens")}, plot.Config((Path("_try"),)))
    assert "_try" in figure.legends[0].get_texts()[0].get_text()


@pytest.mark.parametrize("value, text", [(0, "0"), (1500, "1.5k"), (2e7, "20M"), (1e10, "10B"), (0.1 + 0.2, "0.3")])
def test_format_number(value, text):
    assert plot.format_number(value) == text


@pytest.mark.parametrize("value, text", [(0, "0"), (6e-4, "6e-4"), (1.25e-3, "1.25e-3"), (0.01, "1e-2")])
def test_format_lr(value, text):
    assert plot.format_lr(value) == text


def test_errors(fails, tmp_path):
    (tmp_path / "runs" / "new").mkdir(parents=True)
    assert "runs/nowhere has no log.jsonl" in fails("plot.py", "runs/nowhere")
    (tmp_path / "runs" / "new" / "log.jsonl").write_text('{"step": 0, "tokens": 0}\n')
    assert "runs/new/log.jsonl has no steps yet" in fails("plot.py", "runs/new")
    (tmp_path / "empty").mkdir()
    assert "no run folder given, and none under runs/" in fails("plot.py", cwd=tmp_path / "empty")
    assert "--out loss.xyz" in fails("plot.py", "runs/new", "--out", "loss.xyz")
    (tmp_path / "runs" / "new" / "log.jsonl").write_text(json.dumps(ROWS[0]))
    assert "nowhere/loss.png" in fails("plot.py", "runs/new", "--out", "nowhere/loss.png")
    assert not list(tmp_path.glob("*.png"))
    with pytest.raises(UserError):
        plot.read_rows(Path("nowhere"))
