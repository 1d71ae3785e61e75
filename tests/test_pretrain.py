"""pretrain.py as a real process: learning, logging, pruning, resuming, errors, and two processes."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, edit_manifest, read_log, start
from safetensors.torch import load_file
from test_hellaswag import write_examples
from test_shards import write_bin

import evaluate
from minigpt import checkpoint, runs
from minigpt.dataset import TokenDataset, global_rows
from minigpt.optim import build_optimizer


def losses(run) -> list[float]:
    return [row["loss"] for row in read_log(run) if "loss" in row]


def test_learns_and_logs(pretrained):
    rows = read_log(pretrained)
    steps = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["tokens"] for row in steps] == [1024 * step for step in range(1, 13)]
    assert all({"loss", "grad_norm", "lr", "tokens_per_s", "mfu"} <= row.keys() for row in steps)
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in steps)
    assert [row["step"] for row in validations] == [0, 4, 6, 8, 12]
    assert validations[-1]["val_loss"] < 0.9 * validations[0]["val_loss"]


def test_checkpoints_are_validated_and_described(pretrained):
    folders = runs.list_checkpoints(pretrained)
    assert [folder.name for folder in folders] == ["step_000006", "step_000012"]
    rows = [row for row in read_log(pretrained) if "val_loss" in row]
    validations = {row.pop("step"): row for row in rows if row.pop("tokens") >= 0}
    assert all(row["bits_per_byte"] == pytest.approx(row["val_loss"] / math.log(2), rel=0.01) for row in rows)
    for folder in folders:
        meta = runs.read_meta(folder)
        assert meta["metrics"] == validations[meta["step"]]
        assert meta["tokenizer"] == "bytes" and meta["model"]["vocab_size"] == 257
        assert meta["identity"]["lr"] == 3e-3 and meta["identity"]["data"]
        assert meta["config"]["micro_batch_size"] == 8 and "micro_batch_size" not in meta["identity"]


def test_prints_the_arithmetic_first(run_script, text_data, tmp_path):
    done = run_script("pretrain.py", "--data", text_data, "--out", "runs/mine", *TRAIN, "--keep", 1, "--save_every", 3)
    assert "1,024 tokens per step = 8 rows x 64 tokens x 1 process x 2 micro-batches" in done.stdout
    assert "tiny: 35,744 parameters" in done.stdout
    assert "left" in done.stdout and "MFU" not in done.stdout and not done.stderr
    kept = {folder.name for folder in runs.list_checkpoints(tmp_path / "runs" / "mine")}
    assert {"step_000006", "step_000012"} <= kept and len(kept) <= 3  # also the best, if that is another
    assert "lr         peak 0.003 after 0 steps, wsd decay from step 6\n" in done.stdout
    assert "step 0: validation loss 5.5" in done.stdout  # ln 257 = 5.549: the loss of uniform predictions
    assert f"next: python {ROOT}/generate.py --checkpoint runs/mine --prompt 'Once upon a time'\n" in done.stdout


ADAMW = ("--optimizer", "adamw", "--schedule", "cosine", "--decay_fraction", 0.3)


@pytest.mark.parametrize("flags", [(), ("--dropout", 0.2, *ADAMW), ("--dtype", "float16")])
def test_resumed_equals_uninterrupted(run_script, text_data, tmp_path, flags):
    """A run that crashed after step 8 resumes to the same bits, and no step is logged twice."""
    args = ("pretrain.py", "--data", text_data, *TRAIN, "--save_every", 6, "--val_every", 4, *flags)
    run_script(*args, "--out", "./whole")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "step_000012")
    rows = (broken / "log.jsonl").read_text().splitlines(keepends=True)
    (broken / "log.jsonl").write_text("".join(rows[:11]) + rows[11][:20])  # the last line is cut in the middle
    done = run_script(*args, "--out", "./broken")
    assert "6 completed" in done.stdout
    for file in ("model.safetensors", "train_state.safetensors"):
        assert (whole / "step_000012" / file).read_bytes() == (broken / "step_000012" / file).read_bytes()
    timeless = [[{k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")} for row in read_log(run)]
                for run in (whole, broken)]  # fmt: skip
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(("steps", "decay_start"), [(16, 8), (8, 4)])
def test_a_changed_number_of_steps_gives_the_run_that_was_planned_so(
    run_script, text_data, tmp_path, steps, decay_start
):
    """A run of 12 steps, whose decay starts at step 6, becomes longer or shorter."""
    args = ("pretrain.py", "--data", text_data, *TRAIN[:2], *TRAIN[4:])
    args = (*args, "--warmup_steps", 2, "--val_every", 4, "--save_every", 4, "--keep", 9)
    run_script(*args, "--steps", 12, "--out", "./first")
    run_script(*args, "--steps", steps, "--out", "./planned")
    assert (tmp_path / "planned" / f"step_{decay_start:06d}").exists()
    begin = min(6, decay_start)
    shutil.copytree(tmp_path / "first" / f"step_{begin:06d}", tmp_path / "changed" / f"step_{begin:06d}")
    done = run_script(*args, "--steps", steps, "--out", "./changed")
    assert f"{steps} steps, {begin} completed" in done.stdout
    for file in ("model.safetensors", "train_state.safetensors"):
        ends = [(tmp_path / run / f"step_{steps:06d}" / file).read_bytes() for run in ("planned", "changed")]
        assert ends[0] == ends[1]


def test_a_crash_before_the_first_checkpoint_starts_again(run_script, text_data, tmp_path):
    """No row of the first attempt stays in the log."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 0, "val_loss": 5}\n{"step": 1, "loss": 5}\n{"st')
    run_script("pretrain.py", "--data", text_data, "--out", "./run", *TRAIN, "--steps", 2, *ADAMW)
    rows = [(row["step"], "val_loss" in row) for row in read_log(tmp_path / "run")]
    assert rows == [(0, True), (1, False), (2, False), (2, True)]


def test_finished_run_has_nothing_to_do(run_script, text_data, pretrained):
    before = (pretrained / "log.jsonl").read_bytes()
    done = run_script("pretrain.py", "--data", text_data, "--out", pretrained, *TRAIN)
    assert "done: 12 steps" in done.stdout and (pretrained / "log.jsonl").read_bytes() == before


def test_refuses_to_resume_another_run(fails, text_data, pretrained):
    error = fails("pretrain.py", "--data", text_data, "--out", pretrained, *TRAIN, "--lr", 1e-3, "--seed", 7)
    assert "lr was 0.003 and is now 0.001" in error and "seed was 1337 and is now 7" in error


def test_refuses_to_resume_on_other_data(fails, text_data, pretrained, tmp_path):
    shutil.copytree(text_data, tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    meta["train"]["files"][0]["sha256"] = "0" * 64
    edit_manifest(tmp_path / "other" / "meta.json", train=meta["train"])
    assert "data was" in fails("pretrain.py", "--data", "other", "--out", pretrained, *TRAIN)


def test_two_processes_equal_one(pretrained, text_data, tmp_path):
    """The same global batches, losses within float32 rounding; begun on two, gone on with on one, and the other way."""
    args = ("pretrain.py", "--data", text_data, *TRAIN, "--val_every", 4, "--save_every", 6)
    done = start(*args, "--out", "./two", "--micro_batch_size", 4, cwd=tmp_path, processes=2)
    assert "Warning" not in done.stderr, done.stderr  # for example a FutureWarning
    one, two = read_log(pretrained), read_log(tmp_path / "two")
    for key in ("loss", "val_loss"):
        expected = [row[key] for row in one if key in row]
        assert [row[key] for row in two if key in row] == pytest.approx(expected, rel=1e-5)

    shutil.copytree(pretrained, tmp_path / "other")
    for run, processes in (("two", 1), ("other", 2)):
        shutil.rmtree(tmp_path / run / "step_000012")
        start(*args, "--out", f"./{run}", cwd=tmp_path, processes=processes)
        assert losses(tmp_path / run) == pytest.approx(losses(pretrained), rel=1e-5)


def test_two_processes_equal_one_with_adamw(text_data, tmp_path):
    args = ("pretrain.py", "--data", text_data, *TRAIN, *ADAMW, "--micro_batch_size", 4)
    for processes in (1, 2):
        start(*args, "--out", f"./{processes}", cwd=tmp_path, processes=processes)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_sharded_run_equals_one_process(pretrained, text_data, tmp_path):
    """Losses, samples, HellaSwag, and the same checkpoint files, from which either kind of run continues."""
    examples = write_examples(tmp_path / "examples.jsonl")
    extras = ("--sample_every", 12, "--hellaswag_every", 12, "--hellaswag_files", examples, "--micro_batch_size", 4)
    args = ("pretrain.py", "--data", text_data, *TRAIN, "--val_every", 4, "--save_every", 6, *extras)
    done = start(*args, "--out", "./sharded", "--shard", cwd=tmp_path, processes=2)
    assert "Warning" not in done.stderr, done.stderr
    start(*args, "--out", "./whole", cwd=tmp_path)
    sharded, whole = read_log(tmp_path / "sharded"), read_log(tmp_path / "whole")
    for key in ("loss", "val_loss", "grad_norm", "hellaswag", "samples"):
        values = [[row[key] for row in log if key in row] for log in (sharded, whole)]
        assert values[0] and (values[0] == values[1] or values[0] == pytest.approx(values[1], rel=1e-4))
    for file in ("model", "train_state"):
        tensors = [load_file(tmp_path / run / "step_000012" / f"{file}.safetensors") for run in ("sharded", "whole")]
        torch.testing.assert_close(*tensors, rtol=1e-2, atol=1e-4)

    shutil.copytree(pretrained, tmp_path / "other")
    for run, processes, flags in (("sharded", 1, ()), ("other", 2, ("--shard",))):
        shutil.rmtree(tmp_path / run / "step_000012")
        start(*args, "--out", f"./{run}", *flags, cwd=tmp_path, processes=processes)
        assert losses(tmp_path / run) == pytest.approx(losses(pretrained), rel=1e-5)


def test_an_error_of_one_process_is_reported(text_data, tmp_path):
    """A token that only the second process meets ends both, with the reason on the screen."""
    shutil.copytree(text_data, tmp_path / "data")
    shard = np.load(tmp_path / "data" / "train_000000.npy")
    row = int(global_rows(TokenDataset(text_data, 64).n_rows["train"], 16, 1337, 0)[8])  # of the second process
    shard[row * 64] = 300
    np.save(tmp_path / "data" / "train_000000.npy", shard)
    done = start("pretrain.py", "--data", "data", *TRAIN, cwd=tmp_path, processes=2, torchrun=True, expect=1)
    assert "process 1: data holds token 300, but bytes has 257 tokens" in done.stderr


def test_micro_batches_do_not_matter(run_script, text_data, pretrained, tmp_path):
    often = ("--val_every", 4, "--save_every", 6, "--micro_batch_size", 2)
    run_script("pretrain.py", "--data", text_data, "--out", "./small", *TRAIN, *often)
    assert losses(tmp_path / "small") == pytest.approx(losses(pretrained), rel=1e-5)


@pytest.mark.parametrize(("processes", "flags"), [(1, ()), (2, ("--activation_checkpointing",))])
def test_compiled_equals_eager(text_data, pretrained, tmp_path, processes, flags):
    pytest.importorskip("torch._inductor")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPU")
    args = ("--data", text_data, "--out", "./compiled", *TRAIN, "--micro_batch_size", 4, "--compile", *flags)
    start("pretrain.py", *args, cwd=tmp_path, processes=processes)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(pretrained), rel=1e-5)


def test_activation_checkpointing_changes_no_bit(run_script, text_data, tmp_path):
    """Not even with dropout, whose masks are drawn twice."""
    flags = ("--data", text_data, *TRAIN, "--dropout", 0.2)
    run_script("pretrain.py", *flags, "--out", "./plain")
    run_script("pretrain.py", *flags, "--out", "./checkpointing", "--activation_checkpointing")
    for file in ("model.safetensors", "train_state.safetensors"):
        plain, checkpointing = (tmp_path / run / "step_000012" / file for run in ("plain", "checkpointing"))
        assert plain.read_bytes() == checkpointing.read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains(run_script, text_data, pretrained, tmp_path, dtype):
    run_script("pretrain.py", "--data", text_data, "--out", "./half", *TRAIN, "--dtype", dtype)
    assert losses(tmp_path / "half") != losses(pretrained)
    assert losses(tmp_path / "half") == pytest.approx(losses(pretrained), rel=2e-2)
    weights = load_file(runs.list_checkpoints(tmp_path / "half")[-1] / "model.safetensors")
    assert all(str(weight.dtype) == "torch.float32" for weight in weights.values())


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--batch_tokens", 1000), "--batch_tokens 1000 is not a multiple of 512"),
        (("--lr", 0), "--lr is 0.0: it must be above 0"),
        (("--lr", "nan"), "--lr is nan"),
        (("--warmup_steps", -1), "--warmup_steps is -1"),
        (("--decay_fraction", 1.5), "--decay_fraction is 1.5"),
        (("--dropout", -0.1), "--dropout is -0.1"),
        (("--weight_decay", -1), "--weight_decay is -1"),
        (("--grad_clip", 0), "--grad_clip is 0"),
        (("--steps", 0), "--steps is 0"),
        (("--micro_batch_size", 0), "--micro_batch_size is 0"),
        (("--gpu_dollars_per_hour", 2), "--gpu_dollars_per_hour is for --dry_run"),
        (("--keep", 0), "--keep is 0"),
        (("--seed", -1), "--seed is -1"),
        (("--seed", 10**20), "--seed is 100000000000000000000"),
        (("--data", "nowhere"), "nowhere: no such dataset folder; create it with prepare_fineweb.py"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--model", "gpt2"), "--batch_tokens 1024 is not a multiple of 8192"),
    ],
)
def test_bad_values(fails, text_data, flags, words):
    assert words in fails("pretrain.py", "--data", text_data, *TRAIN, *flags)


def test_bad_folders(fails, text_data, chat_data, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("do not lose me")
    assert "already exists and is not a run" in fails("pretrain.py", "--data", text_data, "--out", "./taken", *TRAIN)
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "do not lose me"

    assert "holds chat data, not text" in fails("pretrain.py", "--data", chat_data, *TRAIN)

    shutil.copytree(text_data, tmp_path / "half")
    (tmp_path / "half" / "meta.json").rename(tmp_path / "half" / "incomplete.json")
    assert "is incomplete" in fails("pretrain.py", "--data", "half", *TRAIN)

    shutil.copytree(text_data, tmp_path / "short")
    shard = tmp_path / "short" / "train_000000.npy"
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "corrupt or truncated" in fails("pretrain.py", "--data", "short", *TRAIN)


def test_a_micro_batch_size_is_chosen_and_kept(run_script, text_data, tmp_path):
    """By default a run takes about 4,096 tokens, and keeps its size when it is resumed."""
    args = ("pretrain.py", "--data", text_data, "--out", "./run", "--model", "tiny", "--lr", 3e-3, "--steps", 4)
    done = run_script(*args, "--batch_tokens", 2048, "--save_every", 2)
    assert "2,048 tokens per step = 32 rows x 64 tokens x 1 process x 1 micro-batch" in done.stdout
    shutil.rmtree(tmp_path / "run" / "step_000004")
    again = run_script(*args, "--batch_tokens", 2048, "--save_every", 2, "--micro_batch_size", 4)
    assert "= 4 rows x" in again.stdout
    assert "= 4 rows x" in run_script(*args, "--batch_tokens", 2048).stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_dry_run_prints_an_estimate_and_writes_nothing(run_script, text_data, tmp_path, processes):
    args = ("pretrain.py", "--data", text_data, "--model", "tiny", "--batch_tokens", 65_536, "--steps", 50, "--dry_run")
    done = run_script(*args, "--gpu_dollars_per_hour", 3.6, "--micro_batch_size", 8, processes=processes)
    output = done.stdout
    count = f"{processes} process{'es' * (processes > 1)} x {128 // processes} micro-batches"
    assert f"65,536 tokens per step = 8 rows x 64 tokens x {count}\n" in output
    tokens_per_s, seconds = re.search(r"speed +([\d,]+) tokens/s, ([\d.]+) s per step", output).groups()
    rounding = 0.006 / float(seconds)
    assert float(tokens_per_s.replace(",", "")) * float(seconds) == pytest.approx(65_536, rel=rounding)
    hours, minutes, rest, dollars, price = map(
        float, re.search(r"50 steps in (\d+):(\d+):(\d+), \$([\d.]+) at \$([\d.]+)", output).groups()
    )
    total = 3600 * hours + 60 * minutes + rest
    assert total == pytest.approx(50 * float(seconds), abs=1) and price == pytest.approx(3.6 * processes)
    assert dollars == pytest.approx(total / 3600 * price, abs=0.01)
    assert "GB for checkpoints of 0.00 GB" in output and not list(tmp_path.iterdir())
    assert "MFU" in output
    tokens = 64 * TokenDataset(text_data, 64).n_rows["train"]
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    assert f"{50 * 65_536 / tokens:,.0f} epochs" in warning and "10 epochs are --steps" in warning
    steps = int(re.search(r"--steps (\d+)", warning)[1])
    assert steps == max(1, round(10 * tokens / 65_536)) and "lower --batch_tokens" in warning


def test_dry_run_reports_a_disk_that_is_too_small(fails, text_data, tmp_path):
    args = ("--data", text_data, "--model", "tiny", "--batch_tokens", 512, "--steps", 9, "--dry_run", "--keep", 10**9)
    assert "its checkpoints do not fit on the disk" in fails("pretrain.py", *args)


def test_dry_run_predicts_the_size_of_checkpoints(pretrained):
    """Equal to the size on disk, up to the headers of the files."""
    meta = runs.read_meta(pretrained / "step_000012")
    model = checkpoint.load_model(pretrained / "step_000012", meta)
    optimizer = build_optimizer(model, 1e-3, 0.1, "muon")
    checkpoint.load_optimizer_state_dict(pretrained / "step_000012", meta, model, optimizer)
    real = sum(file.stat().st_size for file in (pretrained / "step_000012").glob("*.safetensors"))
    assert checkpoint.checkpoint_bytes(model, optimizer) == pytest.approx(real, rel=0.05) and real > 100_000


def test_trains_on_the_shards_of_other_repositories(run_script, gpt2_tokenizer, tmp_path):
    """modded-nanogpt's files as they are, in training and evaluation."""
    (tmp_path / "fineweb10B").mkdir()
    tokens = np.random.default_rng(0).integers(50_257, size=2000)
    for name, part in {"train_000001": tokens[:900], "train_000002": tokens[900:1600], "val_000000": tokens}.items():
        write_bin(tmp_path / "fineweb10B" / f"fineweb_{name}.bin", part)
    sizes = ("--model", "tiny", "--steps", 2, "--batch_tokens", 128, "--micro_batch_size", 2, "--val_tokens", 1280)
    run_script("pretrain.py", "--data", "fineweb10B", "--out", "runs/mine", *sizes)
    assert runs.read_meta(tmp_path / "runs/mine/step_000002")["tokenizer"] == "gpt2"
    folder, file = str(tmp_path / "fineweb10B"), tmp_path / "figures.jsonl"
    flags = {"data": (folder,), "max_tokens": 1280, "hellaswag": False, "json": file, "device": "cpu"}
    evaluate.main(evaluate.Config(str(tmp_path / "runs" / "mine"), **flags))
    figures = json.loads(file.read_text())["data"][folder]
    assert figures["tokens"] == 1280 and figures["bits_per_byte"] > 0
    assert figures["val_loss"] == pytest.approx(read_log(tmp_path / "runs" / "mine")[-1]["val_loss"], rel=1e-5)
