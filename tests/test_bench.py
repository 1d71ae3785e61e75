"""bench.py measures what it says: candidates take turns, ratios are of medians, every stage has its rows."""

import json

import numpy as np
import pytest
import torch

import bench
from model import PRESETS
from training import Processes

ALONE = Processes(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32)


def test_candidates_take_turns_after_a_warm_up():
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) or len(calls) for name in ("ours", "peer")}
    measured = bench.rates(candidates, 3)
    assert calls == ["ours", "peer"] * 4
    assert measured == {"ours": [3, 5, 7], "peer": [4, 6, 8]}


def test_a_row_has_the_median_its_spread_and_its_ratio():
    (row,) = bench.rows_of({"ours": [30.0, 20.0, 10.0], "peer": [5.0, 99.0, 4.0]}, {"ours": "peer"}, "tokens/s", 40.0)
    assert (row.value, row.spread, row.limit, row.ratio) == (20.0, 0.5, 0.5, 4.0)
    assert str(row).split() == ["ours", "20", "tokens/s", "±50%", "50%", "4.00", "x", "peer"]
    (alone,) = bench.rows_of({"ours": [3.0]}, {"ours": "peer"}, "tokens/s", None)
    assert alone.ratio is None and alone.limit is None


def test_tokenize_on_files(run_script, gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("Some words that are said again and again.\n\n" * 20_000)
    run_script("bench.py", "tokenize", "--files", "a.txt", "--repeats", 1, "--json", "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["what"].split(":")[0] for row in rows] == ["limit", "limit", "tokenize"]
    assert all(row["value"] > 0 for row in rows) and rows[2]["peer"] == "process pool" and rows[2]["ratio"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "rows.jsonl"]


def test_both_ways_to_tokenize_write_the_same(gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"Paragraph {i} says {i * i}.\n\n" for i in range(9000)))
    files = [tmp_path / "a.txt"]
    bench.tokenize_ours(files, tmp_path, gpt2_tokenizer)
    bench.tokenize_usual(files, tmp_path)
    assert (tmp_path / "train_000000.npy").read_bytes() == (tmp_path / "val_000000.npy").read_bytes()


def test_the_usual_way_ends_early(gpt2_tokenizer, tmp_path):
    """By itself, with documents that fill the pipe to its processes: a pool that is broken off then sometimes hangs."""
    (tmp_path / "a.txt").write_text("".join("word " * 5000 + "\n\n" for _ in range(1000)))
    for _ in range(3):
        bench.tokenize_usual([tmp_path / "a.txt"], tmp_path, most=20_000)
        assert 20_000 <= np.load(tmp_path / "val_000000.npy", mmap_mode="r").size < 2_500_000


@pytest.fixture
def small(monkeypatch):
    for name in ("demo", "gpt2"):
        monkeypatch.setitem(bench.PRESETS, name, PRESETS["tiny"])
    monkeypatch.setattr(bench, "in_a_process", lambda function, kind: {"GPT": 3, "Transformers": 4}[kind.__name__])
    monkeypatch.setattr(bench, "PROMPT", [1, 2, 3])


def test_train(small):
    rows = list(bench.train(bench.Config(repeats=1), ALONE, flops=1e12))
    assert [row.peer for row in rows] == [
        "transformers",
        "all logits demo",
        "transformers",
        "all logits gpt2",
        "transformers",
    ]
    assert all(row.ratio > 0 for row in rows) and rows[-1].ratio == 0.75


def test_the_peers_compute_the_same_loss(small):
    """Or the comparison would be of different work."""
    shape = PRESETS["tiny"]
    ours, plain, theirs = bench.GPT(shape), bench.PlainLoss(shape), bench.Transformers(shape)
    plain.load_state_dict(ours.state_dict())
    state = {f"transformer.{name}": weight for name, weight in ours.state_dict().items()}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: shape.vocab_size]
    for name in state:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = state[name].t()
    theirs.model.load_state_dict(state, strict=False)
    tokens = torch.randint(shape.vocab_size, (2, 64))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = ours(tokens, targets) / 126
    torch.testing.assert_close(theirs(tokens, tokens) / 128, expected, atol=1e-4, rtol=0)  # it shifts them itself
    torch.testing.assert_close(ours(tokens, tokens), plain(tokens, tokens), atol=2, rtol=1e-3)


def test_generate(small):
    rows = list(bench.decode(bench.Config(repeats=1), ALONE, bandwidth=1e9, tokens=4))
    assert [row.what for row in rows[::2]] == ["generate float32", "generate bfloat16", "generate int8"]
    assert [row.peer for row in rows] == ["transformers", *["one text", "generate float32"] * 2, "one text"]
    assert all(row.value > 0 and row.ratio > 0 for row in rows)


def test_losses_at_lower_precision(pretrained, text_data):
    rows = list(
        bench.losses(*bench.trained_model(bench.Config(checkpoint=str(pretrained), data=str(text_data))), ALONE)
    )
    assert [row.what.split(" (")[0] for row in rows] == [f"validation loss, {name}" for name in bench.PRECISIONS]
    assert "(+0.00000)" in rows[0].what and all(row.value == pytest.approx(rows[0].value, rel=0.02) for row in rows)


def test_what_is_wrong_is_said_before_the_work(fails, chat_data, pretrained, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert "--files hold no text" in fails("bench.py", "tokenize", "--files", "empty.txt", "--repeats", 1)
    assert "belong together" in fails("bench.py", "--checkpoint", pretrained)
    assert "holds chat data" in fails("bench.py", "--checkpoint", pretrained, "--data", chat_data)
    assert "nowhere/x.jsonl" in fails("bench.py", "tokenize", "--json", "nowhere/x.jsonl")
