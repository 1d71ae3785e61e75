"""bench.py: candidates run in turn, ratios compare medians, every stage yields its rows, peers do the same work."""

import json

import numpy as np
import pytest
import torch

import bench
from minigpt.distributed import Processes
from model import PRESETS

SINGLE_PROCESS = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)


def test_candidates_run_in_turn_after_a_warm_up():
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) or len(calls) for name in ("ours", "peer")}
    rates = bench.measure_rates(candidates, 3)
    assert calls == ["ours", "peer"] * 4
    assert rates == {"ours": [3, 5, 7], "peer": [4, 6, 8]}


def test_a_row_shows_median_spread_and_ratio():
    row = bench.compare({"ours": [30.0, 20.0, 10.0], "peer": [5.0, 99.0, 4.0]}, "ours", "peer", peak=40.0)
    assert (row.value, row.spread, row.of_peak, row.ratio) == (20.0, 0.5, 0.5, 4.0)
    assert str(row).split() == ["ours", "20", "tokens/s", "±50%", "50%", "4.00", "x", "peer"]
    row = bench.compare({"ours": [3.0], "peer": [2.0]}, "ours", "peer")
    assert row.spread is None and row.of_peak is None
    assert str(bench.Row("peak", 1234.5, "GB/s")).split() == ["peak", "1,234", "GB/s"]


def test_tokenize_on_files(run_script, gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Some words that are said again and again.\n\n" * 20_000)
    run_script("bench.py", "tokenize", "--files", "a.txt", "--repeats", 1, "--json", "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"].split(":")[0] for row in rows] == ["peak", "peak", "tokenize"]
    assert all(row["value"] > 0 for row in rows) and rows[2]["peer"] == "process pool" and rows[2]["ratio"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "rows.jsonl"]


def test_both_tokenizers_write_the_same_shards(gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i} says {i * i}.\n\n" for i in range(9000)))
    files = [tmp_path / "a.txt"]
    bench.tokenize_ours(files, tmp_path, gpt2_tokenizer)
    bench.tokenize_with_pool(files, tmp_path)
    assert (tmp_path / "train_000000.npy").read_bytes() == (tmp_path / "val_000000.npy").read_bytes()


def test_the_pool_stops_at_max_tokens(gpt2_tokenizer, tmp_path):
    """It also closes cleanly when the documents fill the pipe to its processes, where an interrupted pool can hang."""
    (tmp_path / "a.txt").write_text("".join("word " * 5000 + "\n\n" for _ in range(1000)))
    for _ in range(3):
        bench.tokenize_with_pool([tmp_path / "a.txt"], tmp_path, max_tokens=20_000)
        assert 20_000 <= np.load(tmp_path / "val_000000.npy", mmap_mode="r").size < 2_500_000


@pytest.fixture
def tiny_models(monkeypatch):
    """Replace the measured models by tiny ones, and the memory measurement by constants."""
    memory = {"GPT": 3, "TransformersGPT2": 4}
    for name in ("demo", "gpt2"):
        monkeypatch.setitem(bench.PRESETS, name, PRESETS["tiny"])
    monkeypatch.setattr(bench, "run_in_subprocess", lambda function, model_class: memory[model_class.__name__])
    monkeypatch.setattr(bench, "PROMPT", [1, 2, 3])


def test_train(tiny_models):
    rows = list(bench.bench_train(bench.Config(repeats=1), SINGLE_PROCESS, flops=1e12))
    peers = ["transformers", "all logits demo", "transformers", "all logits gpt2", "transformers"]
    assert [row.peer for row in rows] == peers
    assert all(row.ratio > 0 for row in rows) and rows[-1].ratio == 0.75


def test_the_peers_compute_the_same_loss(tiny_models):
    """Otherwise the comparison would be between different work."""
    shape = PRESETS["tiny"]
    ours, all_logits, theirs = bench.GPT(shape), bench.AllLogitsGPT(shape), bench.TransformersGPT2(shape)
    all_logits.load_state_dict(ours.state_dict())
    state = {f"transformer.{name}": weight for name, weight in ours.state_dict().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: shape.vocab_size]
    for name in state:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = state[name].t()
    theirs.model.load_state_dict(state, strict=False)
    tokens = torch.randint(shape.vocab_size, (2, 64))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = ours(tokens, targets) / 126
    torch.testing.assert_close(theirs(tokens, tokens) / 128, expected, atol=1e-4, rtol=0)  # it shifts labels itself
    torch.testing.assert_close(ours(tokens, tokens), all_logits(tokens, tokens), atol=2, rtol=1e-3)


def test_generate(tiny_models):
    rows = list(bench.bench_generate(bench.Config(repeats=1), SINGLE_PROCESS, bandwidth=1e9, n_tokens=4))
    precisions = ["float32", "bfloat16", "float16", "int8"]
    assert [row.name for row in rows[::2]] == [f"generate {precision}" for precision in precisions]
    assert [row.peer for row in rows[::2]] == ["transformers"] + ["generate float32"] * 3
    assert [(row.name, row.peer) for row in rows[1::2]] == [(f"{row.name}, 8 samples", row.name) for row in rows[::2]]
    assert all(row.value > 0 and row.ratio > 0 for row in rows)


def test_errors_come_before_the_work(fails, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "--files contain no text" in fails("bench.py", "tokenize", "--files", "empty.txt", "--repeats", 1)
    assert "nowhere/x.jsonl" in fails("bench.py", "tokenize", "--json", "nowhere/x.jsonl")
