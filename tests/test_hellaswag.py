"""HellaSwag: equal to plain loops over transformers' GPT-2, and no change to the training around it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TRAIN, make_model, read_log

import pretrain
from minigpt import hellaswag
from minigpt.cli import UserError, strip_control_chars
from minigpt.distributed import Processes
from minigpt.hellaswag import ending_losses, evaluate_hellaswag, load_examples
from minigpt.pretrained import load_pretrained
from minigpt.sources import NetworkError
from minigpt.tokenizer import load_tokenizer
from model import GPT, GPTConfig

SINGLE = Processes(0, 1, torch.device("cpu"), torch.float32)
ENDINGS = [
    "sails away.",
    "is eaten by the captain, who is hungry.",
    "sings",
    "turns into a très long story about — well.",
]


def write_examples(file: Path) -> Path:
    """Write 50 examples in HellaSwag's columns, with texts of many lengths."""
    with open(file, "w") as out:
        for i in range(50):
            context = " ".join(f"Ship {i * j} leaves the harbour and" for j in range(1 + i % 3))
            endings = [f"{ending}{'!' * (i % 4)}" for ending in ENDINGS[i % 4 :] + ENDINGS[: i % 4]]
            record = {"ind": i, "activity_label": "Sailing", "ctx": context, "endings": endings, "label": str(i % 3)}
            out.write(json.dumps(record) + "\n")
    return file


@pytest.fixture(scope="module")
def examples_file(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("hellaswag") / "validation.jsonl")


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def random_checkpoint(request, tmp_path_factory):
    """Return a checkpoint of random weights and its tokenizer."""
    gpt2 = request.param == "gpt2"
    tokenizer = request.getfixturevalue("gpt2_tokenizer") if gpt2 else load_tokenizer("bytes")
    return make_model(tmp_path_factory.mktemp("random") / "run", tokenizer, chat=False), tokenizer


# ---- losses and accuracies -------------------------------------------------------------------------------------------


def test_ending_losses_equal_a_plain_loop(random_checkpoint, examples_file, run_script, tmp_path):
    transformers = pytest.importorskip("transformers")
    source, tokenizer = random_checkpoint
    run_script("export.py", "--checkpoint", source, "--out", "here")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here").eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "here")
    examples = load_examples([str(examples_file)], tokenizer)
    losses = ending_losses(load_pretrained(str(source)).model, examples, tokenizer, SINGLE)
    records = [json.loads(line) for line in examples_file.read_text().splitlines()]
    n_correct = {"hellaswag": 0, "hellaswag_norm": 0, "hellaswag_norm_chars": 0}
    for record, ours in zip(records, losses, strict=True):
        expected, per_token, per_char = [], [], []
        for ending in record["endings"]:
            context_tokens, ending_tokens = encode(record["ctx"])["input_ids"], encode(" " + ending)["input_ids"]
            tokens = torch.tensor([(context_tokens + ending_tokens)[-65:]])
            with torch.no_grad():
                logits = theirs(tokens[:, :-1]).logits[0]
            loss = F.cross_entropy(logits, tokens[0, 1:], reduction="none")[-len(ending_tokens) :]
            expected.append(loss.sum().item())
            per_token.append(loss.mean().item())
            per_char.append(loss.sum().item() / len(ending))
        assert ours.tolist() == pytest.approx(expected, rel=1e-5)
        for name, values in zip(n_correct, (expected, per_token, per_char), strict=True):
            n_correct[name] += min(range(4), key=values.__getitem__) == int(record["label"])
    result = evaluate_hellaswag(load_pretrained(str(source)).model, examples, tokenizer, SINGLE)
    assert {name: round(result[name] * 50) for name in n_correct} == n_correct
    assert len(set(n_correct.values())) > 1  # the accuracies are not interchangeable
    p = result["hellaswag"]
    assert result["hellaswag_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 49))


def test_lengths_are_padded_on_gpus(examples_file, random_checkpoint):
    """With cuDNN attention, each new length costs a plan; padding changes no loss. The device only claims to be one."""

    class CpuNamedCuda(str):
        type = "cuda"

    source, tokenizer = random_checkpoint
    model, examples = load_pretrained(str(source)).model, load_examples([str(examples_file)], tokenizer)
    expected = ending_losses(model, examples, tokenizer, SINGLE)
    with mock.patch.object(model, "hidden", wraps=model.hidden) as hidden:
        losses = ending_losses(model, examples, tokenizer, replace(SINGLE, device=CpuNamedCuda("cpu")))
    lengths = {call.args[0].size(1) for call in hidden.call_args_list}
    assert all(length % 64 == 0 or length == model.config.block_size for length in lengths)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    "record",
    [
        {"ctx": "A", "endings": ["a", "b", "c", "d"]},
        {"ctx": "A", "endings": ["a", "b", "c", "d"], "label": ""},
        {"ctx": "A", "endings": ["a", "b", "c", "d"], "label": "4"},
        {"ctx": "A", "endings": ["a", "b", "c", ""], "label": 0},
        {"ctx": "A", "endings": ["a", "b", "c"], "label": 0},
        {"ctx": "A", "endings": "abcd", "label": 0},
        {"ctx": None, "endings": ["a", "b", "c", "d"], "label": 0},
    ],
)
def test_invalid_record_is_named(tmp_path, record):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl line 1: not a HellaSwag example"):
        load_examples([str(tmp_path / "x.jsonl")], load_tokenizer("bytes"))


def test_short_context_keeps_the_last_tokens(examples_file):
    tokenizer, model = load_tokenizer("bytes"), GPT(GPTConfig(8, 257, 1, 1, 8, init_std=0.5))
    losses = ending_losses(model, load_examples([str(examples_file)], tokenizer, 5), tokenizer, SINGLE)
    assert losses.isfinite().all() and losses.min() > 0


# ---- evaluation and samples during training --------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_does_not_change_training(run_script, text_data, examples_file, tmp_path, processes):
    """With and without evaluation, the checkpoints are equal bit for bit.  evaluate.py gives the logged accuracies."""
    flags = ("--data", text_data, *TRAIN, "--save_every", 6, "--val_every", 4, "--dropout", 0.2)
    often = ("--hellaswag_every", 3, "--hellaswag_files", examples_file, "--sample_every", 4)
    done = run_script("pretrain.py", *flags, "--out", "with_hellaswag", *often, processes=processes)
    run_script("pretrain.py", *flags, "--out", "plain", processes=processes)
    for name in ("model", "train_state"):
        file = f"step_000012/{name}.safetensors"
        assert (tmp_path / "with_hellaswag" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    rows = read_log(tmp_path / "with_hellaswag")
    assert [row["step"] for row in rows if "hellaswag" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "samples" in row] == [4, 8, 12]
    if processes == 2:
        return
    args = ("--checkpoint", "./with_hellaswag", "--data", text_data, "--hellaswag_files", examples_file)
    run_script("evaluate.py", *args, "--json", "figures.jsonl")
    figures = json.loads((tmp_path / "figures.jsonl").read_text())
    last = [row for row in rows if "hellaswag" in row][-1]
    assert all(last[name] == figures[name] for name in ("hellaswag", "hellaswag_norm", "hellaswag_norm_chars"))
    sample = [row for row in rows if "samples" in row][-1]["samples"][0]
    assert sample["prompt"] == "Once upon a time" and sample["text"]
    assert strip_control_chars(f"step 12: Once upon a time{sample['text']}").split("\n")[0] in done.stdout
    resumed = run_script("pretrain.py", *flags, "--out", "with_hellaswag")  # the evaluation flags may change
    assert "12 steps, 12 completed" in resumed.stdout


def test_evaluation_keeps_mode_and_random_state(random_checkpoint, examples_file):
    source, tokenizer = random_checkpoint
    initial = load_pretrained(str(source)).model
    model = GPT(replace(initial.config, dropout=0.5)).train()
    model.load_state_dict(initial.state_dict())
    examples = load_examples([str(examples_file)], tokenizer, 7)
    before = torch.get_rng_state()
    first = pretrain.sample_texts(model, tokenizer, ["A", "B"], seed=1)
    figures = evaluate_hellaswag(model, examples, tokenizer, SINGLE)
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first == pretrain.sample_texts(model, tokenizer, ["A", "B"], seed=1)
    assert figures == evaluate_hellaswag(model.eval(), examples, tokenizer, SINGLE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hellaswag_files": ("x.jsonl",)}, "--hellaswag_files needs --hellaswag_every"),
        ({"sample_every": 0}, "--sample_every is 0: it must be at least 1"),
        ({"sample_prompts": ("x",)}, "--sample_prompts needs --sample_every"),
        ({"sample_every": 1, "sample_prompts": ()}, "--sample_prompts is empty"),
    ],
)
def test_evaluation_flags_are_checked_before_any_work(text_data, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        pretrain.main(pretrain.Config(data=str(text_data), **flags))
    assert not (tmp_path / "runs").exists()


def test_samples_cannot_control_the_terminal(run_script, text_data, tmp_path):
    """An untrained model samples any byte. A terminal without UTF-8 does not end the run."""
    args = ("--data", text_data, *TRAIN, "--steps", 2, "--out", "run", "--sample_every", 1)
    prompts = ("--sample_prompts", *"abcdefgh")
    done = run_script("pretrain.py", *args, *prompts, env={"PYTHONIOENCODING": "ascii"})
    texts = [sample["text"] for row in read_log(tmp_path / "run") for sample in row.get("samples", [])]
    assert any(ord(c) < 9 for text in texts for c in text) and any(ord(c) > 127 for text in texts for c in text)
    assert not any(ord(c) < 9 or c in "\x1b\x0e" for c in done.stdout) and "\\ufffd" in done.stdout


def test_without_network_the_error_names_the_flags(monkeypatch):
    monkeypatch.setattr(hellaswag, "HubSource", mock.Mock(side_effect=NetworkError("no network, or use --files")))
    with pytest.raises(UserError, match=r"no network, or give --hellaswag_files; .* \(--no_hellaswag\)"):
        load_examples((), load_tokenizer("bytes"))
