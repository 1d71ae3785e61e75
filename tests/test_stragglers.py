"""A slow process is reported; small differences are not."""

import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TRAIN, read_log, start

from minigpt.distributed import Processes
from minigpt.stragglers import COMPARE_EVERY, StragglerDetector
from model import GPT, GPTConfig

SCRIPT = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from minigpt.dataset import TokenDataset
read = TokenDataset.batch
def read_slowly(*args):
    time.sleep(0.2)
    return read(*args)
if os.environ["RANK"] == "1":
    TokenDataset.batch = read_slowly
sys.argv[0] = {root!r} + "/pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


gpu = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


def open_detector(device: str, monkeypatch: pytest.MonkeyPatch, other: list[float]) -> StragglerDetector:
    """Return a detector of two processes, of which the other one has the given seconds, for all and for data."""
    device = torch.device(device)
    procs = Processes(rank=0, world_size=2, device=device, dtype=torch.float32)
    monkeypatch.setattr(Processes, "all_gather", lambda procs, value: [value, other])
    return StragglerDetector(
        GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8)).to(device), procs
    )


def end_steps(detector: StragglerDetector, n: int = COMPARE_EVERY) -> dict[str, float]:
    """End steps; return the result of the last one. Those before it, and the first ten, have none."""
    rows = [detector.end_step() for _ in range(n)]
    assert not any(rows[:-1])
    return rows[-1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_forward_passes_in_training_are_timed(monkeypatch, device):
    detector = open_detector(device, monkeypatch, [1e6, 1e5])
    tokens = torch.zeros(2, 8, dtype=torch.long, device=device)

    def run(*modes: bool) -> float:
        for training in modes:
            detector.model.train(training)(tokens)
        detector.procs.synchronize()
        row = end_steps(detector)
        assert (row["slowest_process"], row["slowest_s"], row["slowest_data_s"]) == (1, 1e6, 1e5)
        return row["fastest_s"]

    detector.model(tokens)
    assert end_steps(detector) == {}  # the first steps are slower
    assert run(False) == run() == 0
    assert run(*[True, False] * 50) > 0
    assert run() == 0


def test_the_wait_for_data_is_timed(monkeypatch):
    detector = open_detector("cpu", monkeypatch, [0.02, 0.0])
    end_steps(detector)

    def read() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.2)
            yield item

    batches = detector.time_data(read())
    assert [next(batches), next(batches)] == [0, 1]
    row = end_steps(detector)
    assert row["slowest_process"] == 0 and 0.04 <= row["slowest_data_s"] == row["slowest_s"] < 10  # per step
    assert row["fastest_s"] == 0.02
    assert list(batches) == [2]


@pytest.mark.parametrize("other, reported", [(0.95, False), (0.75, True)])
def test_a_small_difference_is_not_reported(monkeypatch, other, reported):
    detector = open_detector("cpu", monkeypatch, [other, 0.0])
    end_steps(detector)
    detector.data_seconds = COMPARE_EVERY
    assert bool(end_steps(detector)) == reported


def test_a_single_process_has_no_stragglers(monkeypatch):
    detector = open_detector("cpu", monkeypatch, [0.1, 0.0])
    detector.procs = replace(detector.procs, world_size=1)
    assert not any(detector.end_step() for _ in range(30))


def test_a_slow_process_is_logged(text_data, tmp_path):
    """With --shard, processes wait for each other in the forward passes, but not for data."""
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    args = ("--data", text_data, "--out", "./run", *TRAIN, "--steps", 40, "--shard")
    err = start(script, *args, cwd=tmp_path, processes=2).stderr
    rows = [row for row in read_log(tmp_path / "run") if "slowest_process" in row]
    assert [(row["step"], row["slowest_process"]) for row in rows] == [(20, 1), (30, 1), (40, 1)]
    assert all(row["slowest_data_s"] > 0.03 for row in rows)
    assert err.count("warning: process 1 takes") == 1 and "see slowest_process in log.jsonl" in err
