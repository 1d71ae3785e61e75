"""evaluation.py and evaluate.py: against plain loops over transformers' GPT-2, against lm_eval, on any number of
processes, and inside a training run that must not notice."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TRAIN, make_model, read_log, start

import checkpoint
import evaluate
import pretrain
from cli import UserError, harmless
from data import ChatDataset, TokenDataset
from evaluation import count_bytes, ending_losses, hellaswag, load_hellaswag, samples, validation
from model import GPT, IGNORE, GPTConfig
from sampling import Sampling
from tokenizer import load_tokenizer
from training import Processes

ALONE = Processes(0, 1, torch.device("cpu"), torch.float32)
ENDINGS = [
    "sails away.",
    "is eaten by the captain, who is hungry.",
    "sings",
    "turns into a très long story about — well.",
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Examples in HellaSwag's columns, with texts of many lengths."""
    file = tmp_path_factory.mktemp("hellaswag") / "validation.jsonl"
    with open(file, "w") as out:
        for i in range(50):
            context = " ".join(f"Ship {i * j} leaves the harbour and" for j in range(1 + i % 3))
            endings = [f"{ending}{'!' * (i % 4)}" for ending in ENDINGS[i % 4 :] + ENDINGS[: i % 4]]
            record = {"ind": i, "activity_label": "Sailing", "ctx": context, "endings": endings, "label": str(i % 3)}
            out.write(json.dumps(record) + "\n")
    return file


@pytest.fixture(scope="module", params=["gpt2", "bytes"])
def judged(request, tmp_path_factory):
    """(a checkpoint of random weights, its tokenizer)."""
    own = request.getfixturevalue("gpt2_tokenizer") if request.param == "gpt2" else load_tokenizer("bytes")
    return make_model(tmp_path_factory.mktemp("judged") / "run", own, chat=False), own


# ---- HellaSwag -----------------------------------------------------------------------------------------------------


def test_every_ending_costs_what_a_plain_loop_finds(judged, questions, run_script, tmp_path):
    transformers = pytest.importorskip("transformers")
    source, tokenizer = judged
    run_script("export.py", "--checkpoint", source, "--out", "here")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "here").eval()
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "here")
    choices = load_hellaswag([str(questions)], tokenizer)
    losses = ending_losses(checkpoint.load(str(source)).model, choices, tokenizer, ALONE)
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    right = {"hellaswag": 0, "hellaswag_norm": 0, "hellaswag_norm_chars": 0}
    for record, ours in zip(records, losses, strict=True):
        expected, per_token, per_char = [], [], []
        for ending in record["endings"]:
            context, goes_on = encode(record["ctx"])["input_ids"], encode(" " + ending)["input_ids"]
            tokens = torch.tensor([(context + goes_on)[-65:]])
            with torch.no_grad():
                logits = theirs(tokens[:, :-1]).logits[0]
            each = F.cross_entropy(logits, tokens[0, 1:], reduction="none")[-len(goes_on) :]
            expected.append(each.sum().item())
            per_token.append(each.mean().item())
            per_char.append(each.sum().item() / len(ending))
        assert ours.tolist() == pytest.approx(expected, rel=1e-5)
        for name, values in zip(right, (expected, per_token, per_char), strict=True):
            right[name] += min(range(4), key=values.__getitem__) == int(record["label"])
    found = hellaswag(checkpoint.load(str(source)).model, choices, tokenizer, ALONE)
    assert {name: round(found[name] * 50) for name in right} == right
    assert len(set(right.values())) > 1  # so that one cannot stand for another
    p = found["hellaswag"]
    assert found["hellaswag_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 49))


TASK = """\
task: local_hellaswag
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{ctx}}"
doc_to_target: "{{label | int}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def test_lm_eval_finds_the_same(gpt2_tokenizer, questions, run_script, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    source = make_model(tmp_path / "run", gpt2_tokenizer, chat=False)
    run_script("export.py", "--checkpoint", source, "--out", "here")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.replace("FILE", str(questions)))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "local_hellaswag"]
    command += ["--model_args", "pretrained=here,dtype=float32", "--include_path", "tasks", "--device", "cpu"]
    command += ["--output_path", "results", "--log_samples", "--batch_size", "8"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]["local_hellaswag"]
    run_script("evaluate.py", "--checkpoint", source, "--files", questions, "--json", "ours.jsonl")
    ours = json.loads((tmp_path / "ours.jsonl").read_text())
    for name, theirs in {"hellaswag": "acc", "hellaswag_norm_chars": "acc_norm"}.items():
        assert ours[name] == pytest.approx(results[f"{theirs},none"])
        assert ours[f"{name}_stderr"] == pytest.approx(results[f"{theirs}_stderr,none"])
    choices = load_hellaswag([str(questions)], gpt2_tokenizer)
    losses = ending_losses(checkpoint.load(str(source)).model, choices, gpt2_tokenizer, ALONE)
    lines = next((tmp_path / "results").rglob("samples_*.jsonl")).read_text().splitlines()
    for sample in map(json.loads, lines):
        theirs = [-float(response[0][0]) for response in sample["resps"]]
        assert losses[sample["doc_id"]].tolist() == pytest.approx(theirs, rel=1e-4)


def test_processes_change_no_figure(pretrained, questions, text_data, tmp_path):
    flags = ("--checkpoint", pretrained, "--files", questions, "--data", text_data)
    for n in (1, 2):
        done = start("evaluate.py", *flags, "--json", f"{n}.jsonl", cwd=tmp_path, processes=n)
        assert "HellaSwag, 50 examples" in done.stdout and "chance" in done.stdout
    one, two = (json.loads((tmp_path / f"{n}.jsonl").read_text()) for n in (1, 2))
    assert {k: v for k, v in one.items() if k != "data"} == {k: v for k, v in two.items() if k != "data"}
    assert one["data"][str(text_data)] == pytest.approx(two["data"][str(text_data)], rel=1e-6)


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
def test_what_is_no_example_is_named(tmp_path, record):
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl line 1: no example of HellaSwag"):
        load_hellaswag([str(tmp_path / "x.jsonl")], load_tokenizer("bytes"))


# ---- losses --------------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_text(pretrained, text_data):
    model = checkpoint.load(str(pretrained)).model
    data = TokenDataset(text_data, 64)
    found = validation(model, data, ALONE, micro_batch_size=3)
    tokens = data.window("val", 1, found["tokens"]).tolist()
    n_bytes = sum(token != 256 for token in tokens)
    assert found["tokens"] == data.n_rows["val"] * 64 and n_bytes < len(tokens)
    assert found["bits_per_byte"] == pytest.approx(found["val_loss"] * len(tokens) / math.log(2) / n_bytes)
    last = [row["val_loss"] for row in read_log(pretrained) if "val_loss" in row][-1]
    assert found["val_loss"] == pytest.approx(last, rel=1e-6)
    part = validation(model, data, ALONE, micro_batch_size=3, max_tokens=130)
    assert part["tokens"] == 128 and part["val_loss"] != found["val_loss"]


def test_the_bytes_of_gpt2_tokens_are_those_of_the_text(gpt2_tokenizer, tmp_path):
    texts = [f"Naïve café no. {i}: 東京 🙂\n\n" * 20 for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ("--files", "t.jsonl", "--val_fraction", 0.3, "--out", "data")
    start("prepare_fineweb.py", *flags, cwd=tmp_path)
    data = TokenDataset(tmp_path / "data", 8)
    tokens = data.window("val", 1, 8 * data.n_rows["val"])
    expected = b"".join(gpt2_tokenizer.token_bytes(int(t)) for t in tokens if t != gpt2_tokenizer.end_of_text)
    assert count_bytes(data, len(tokens)) == len(expected) > 1000


def test_answers_are_judged_on_what_the_assistant_says(finetuned, chat_data, run_script, tmp_path):
    model, data = checkpoint.load(str(finetuned)).model, ChatDataset(chat_data, 64)
    found = validation(model, data, ALONE, micro_batch_size=2)
    batch = data.batch("val", range(data.n_rows["val"]))
    assert found["tokens"] == (batch.targets != IGNORE).sum()
    assert found["val_loss"] == pytest.approx(
        (model.eval()(batch.tokens, batch.targets, batch.positions) / found["tokens"]).item(), rel=1e-5
    )
    done = run_script("evaluate.py", "--checkpoint", finetuned, "--data", chat_data, "--no_hellaswag")
    assert (
        f"loss {found['val_loss']:.4f} nats per token" in done.stdout and f"{found['tokens']:,} tokens" in done.stdout
    )


# ---- while training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_run_does_not_notice_that_it_is_judged(run_script, text_data, questions, tmp_path, processes):
    often = ("--hellaswag_every", 3, "--hellaswag_files", questions, "--sample_every", 4, "--dropout", 0.2)
    data = ("--data", text_data, *TRAIN, "--save_every", 6, "--val_every", 4)
    done = run_script("pretrain.py", *data, "--run", "judged", *often, processes=processes)
    run_script("pretrain.py", *data, "--run", "plain", "--dropout", 0.2, processes=processes)
    for name in ("model", "train_state"):
        file = f"step_000012/{name}.safetensors"
        assert (tmp_path / "runs/judged" / file).read_bytes() == (tmp_path / "runs/plain" / file).read_bytes()
    rows = read_log(tmp_path / "runs" / "judged")
    assert [row["step"] for row in rows if "hellaswag" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in rows if "samples" in row] == [4, 8, 12]
    run_script("evaluate.py", "--checkpoint", "judged", "--data", text_data, "--files", questions, "--json", "e.jsonl")
    judged = json.loads((tmp_path / "e.jsonl").read_text())
    last = [row for row in rows if "hellaswag" in row][-1]
    assert all(last[name] == judged[name] for name in ("hellaswag", "hellaswag_norm", "hellaswag_norm_chars"))
    written = [row for row in rows if "samples" in row][-1]["samples"]
    assert written[0]["prompt"] == "Once upon a time" and written[0]["text"]
    assert harmless(f"step 12: Once upon a time{written[0]['text']}").split("\n")[0] in done.stdout
    resumed = run_script("pretrain.py", *data, "--run", "judged", "--dropout", 0.2)  # how it is judged may change
    assert "12 steps done" in resumed.stdout


def test_judging_touches_neither_mode_nor_randomness(judged, questions):
    tokenizer = judged[1]
    model = checkpoint.load(str(judged[0])).model.adapt(tokenizer.vocab_size, dropout=0.5)
    model.train()
    before = torch.get_rng_state()
    first = samples(model, tokenizer, ["A", "B"], Sampling(max_tokens=9), seed=1)
    figures = hellaswag(model, load_hellaswag([str(questions)], tokenizer, 7), tokenizer, ALONE)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first == samples(model, tokenizer, ["A", "B"], Sampling(max_tokens=9), seed=1)
    assert figures == hellaswag(model.eval(), load_hellaswag([str(questions)], tokenizer, 7), tokenizer, ALONE)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(fails, pretrained, chat_data, questions, tmp_path):
    def refused(words: str, **flags: object) -> None:
        with pytest.raises(UserError, match=words):
            evaluate.main(evaluate.Config(str(pretrained), **flags))

    refused("at least 1", max_examples=0)
    refused("nothing to judge", hellaswag=False)
    refused("--no_hellaswag", hellaswag=False, files=(str(questions),))
    refused("knows text alone", hellaswag=False, data=(str(chat_data),))
    refused("no such dataset folder", hellaswag=False, data=("nowhere",))
    refused("no such file", files=("nowhere.jsonl",))
    for where, words in {"nowhere/x.jsonl": "No such file or directory", ".": "Is a directory"}.items():
        assert f"{where}: {words}" in fails("evaluate.py", "--checkpoint", pretrained, "--json", where)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"hellaswag_files": ("x.jsonl",)}, "--hellaswag_every"),
        ({"sample_every": 0}, "at least 1"),
        ({"sample_prompts": ("x",)}, "--sample_every"),
        ({"sample_every": 1, "sample_prompts": ()}, "--sample_prompts is empty"),
    ],
)
def test_mistakes_in_a_run_are_found_before_any_work(text_data, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        pretrain.main(pretrain.Config(data=str(text_data), **flags))
    assert not (tmp_path / "runs").exists()


def test_a_short_context_keeps_the_newest_tokens(questions):
    tokenizer, model = load_tokenizer("bytes"), GPT(GPTConfig(8, 257, 1, 1, 8, init_std=0.5))
    losses = ending_losses(model, load_hellaswag([str(questions)], tokenizer, 5), tokenizer, ALONE)
    assert losses.isfinite().all() and losses.min() > 0


def test_default_folders_that_do_not_fit_are_left_out(run_script, fails, finetuned, questions, text_data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fineweb_edu").symlink_to(text_data)
    (tmp_path / "data" / "dolly").mkdir()  # half-written, as it has no meta.json
    flags = ("--checkpoint", finetuned, "--no_hellaswag")
    done = run_script("evaluate.py", *flags)
    assert "text in data/fineweb_edu" in done.stdout and "left out: data/dolly" in done.stderr
    assert "data/dolly is half-written" in fails("evaluate.py", *flags, "--data", "data/dolly")


def test_what_a_model_says_cannot_harm_the_terminal(run_script, text_data, tmp_path):
    """Untrained models say anything; a screen that is not in UTF-8 must not end the run either."""
    often = ("--sample_every", 1, "--sample_prompts", *"abcdefgh")
    done = run_script(
        "pretrain.py",
        "--data",
        text_data,
        *TRAIN,
        "--steps",
        2,
        "--run",
        "x",
        *often,
        env={"PYTHONIOENCODING": "ascii"},
    )
    texts = [sample["text"] for row in read_log(tmp_path / "runs" / "x") for sample in row.get("samples", [])]
    assert any(ord(c) < 9 for text in texts for c in text) and any(ord(c) > 127 for text in texts for c in text)
    assert not any(ord(c) < 9 or c in "\x1b\x0e" for c in done.stdout) and "\\ufffd" in done.stdout
