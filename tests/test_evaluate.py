"""evaluate.py as a real process: exact losses, bits per byte, any number of processes, lower precision, errors."""

import json
import math
from pathlib import Path

import pytest
from conftest import read_log, start
from test_hellaswag import SINGLE, write_examples

import evaluate
from evaluate import evaluate_dataset
from minigpt.cli import UserError
from minigpt.dataset import ChatDataset, TokenDataset
from minigpt.pretrained import load_pretrained
from model import IGNORE_INDEX


@pytest.fixture(scope="module")
def examples_file(tmp_path_factory) -> Path:
    return write_examples(tmp_path_factory.mktemp("hellaswag") / "validation.jsonl")


def test_bits_per_byte_is_the_loss_over_the_bytes_of_the_text(pretrained, text_data):
    model = load_pretrained(str(pretrained)).model
    data = TokenDataset(text_data, 64)
    result = evaluate_dataset(model, data, SINGLE, micro_batch_size=3)
    tokens = data.window("val", 1, result["tokens"]).tolist()
    n_bytes = sum(token != 256 for token in tokens)
    assert result["tokens"] == data.n_rows["val"] * 64 and n_bytes < len(tokens)
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] * len(tokens) / math.log(2) / n_bytes)
    last = [row["val_loss"] for row in read_log(pretrained) if "val_loss" in row][-1]
    assert result["val_loss"] == pytest.approx(last, rel=1e-6)
    part = evaluate_dataset(model, data, SINGLE, micro_batch_size=3, max_tokens=130)
    assert part["tokens"] == 128 and part["val_loss"] != result["val_loss"]


def test_bytes_of_gpt2_tokens_are_those_of_the_text(gpt2_tokenizer, tmp_path):
    texts = [f"Naïve café no. {i}: 東京 🙂\n\n" * 20 for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ("--files", "t.jsonl", "--val_fraction", 0.3, "--out", "data")
    start("prepare_fineweb.py", *flags, cwd=tmp_path)
    data = TokenDataset(tmp_path / "data", 8)
    tokens = data.window("val", 1, 8 * data.n_rows["val"])
    expected = b"".join(gpt2_tokenizer.token_bytes(int(t)) for t in tokens if t != gpt2_tokenizer.end_of_text)
    assert data.count_val_bytes(data.n_rows["val"]) == data.count_val_bytes(10**9) == len(expected) > 1000
    lengths = [len(gpt2_tokenizer.token_bytes(int(t))) for t in tokens[: 8 * 70] if t != gpt2_tokenizer.end_of_text]
    assert data.count_val_bytes(70) == sum(lengths)  # more rows than are read at once


def test_chat_loss_is_over_the_assistants_tokens(finetuned, chat_data, run_script, tmp_path):
    model, data = load_pretrained(str(finetuned)).model, ChatDataset(chat_data, 64)
    result = evaluate_dataset(model, data, SINGLE, micro_batch_size=2)
    batch = data.batch("val", range(data.n_rows["val"]))
    assert result["tokens"] == (batch.targets != IGNORE_INDEX).sum()
    expected = model.eval()(batch.tokens, batch.targets, batch.positions).item() / result["tokens"]
    assert result["val_loss"] == pytest.approx(expected, rel=1e-5)
    n_bytes = ((batch.targets >= 0) & (batch.targets < 256)).sum().item()  # the end of the turn has none
    assert 0 < n_bytes < result["tokens"] and data.count_val_bytes(10**9) == n_bytes
    assert result["bits_per_byte"] == pytest.approx(expected * result["tokens"] / math.log(2) / n_bytes, rel=1e-5)
    done = run_script("evaluate.py", "--checkpoint", finetuned, "--data", chat_data, "--no_hellaswag")
    per_byte = f"{result['bits_per_byte']:.4f} bits per byte"
    assert f"loss {result['val_loss']:.4f} nats per token   {per_byte}" in done.stdout
    assert f"{result['tokens']:,} tokens" in done.stdout


@pytest.mark.parametrize(
    ("flags", "precision"),
    [(("--quantize", "int8"), "int8"), (("--dtype", "bfloat16"), "bfloat16"), (("--dtype", "float16"), "float16")],
)
def test_loss_in_lower_precision_is_close_to_float32(pretrained, text_data, run_script, tmp_path, flags, precision):
    args = ("--checkpoint", pretrained, "--data", text_data, "--no_hellaswag", "--json", "figures.jsonl")
    run_script("evaluate.py", *args)
    done = run_script("evaluate.py", *args, *flags)
    assert f"parameters, {precision}\n" in done.stdout
    plain, lower = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    assert (plain["dtype"], lower["dtype"]) == ("float32", precision)
    expected, loss = (figures["data"][str(text_data)]["val_loss"] for figures in (plain, lower))
    assert abs(loss - expected) < 0.05 and loss != expected


def test_any_number_of_processes_gives_the_same_figures(finetuned, examples_file, text_data, chat_data, tmp_path):
    flags = ("--checkpoint", finetuned, "--hellaswag_files", examples_file, "--data", text_data, chat_data)
    printed = []
    for n in (1, 2):
        done = start("evaluate.py", *flags, "--max_answers", 5, "--json", f"{n}.jsonl", cwd=tmp_path, processes=n)
        assert "HellaSwag, 50 examples" in done.stdout and "chance" in done.stdout
        printed.append([line for line in done.stdout.splitlines() if line.startswith("    ")])
    one, two = (json.loads((tmp_path / f"{n}.jsonl").read_text()) for n in (1, 2))
    assert {k: v for k, v in one.items() if k != "data"} == {k: v for k, v in two.items() if k != "data"}
    for folder, figures in one["data"].items():
        assert figures == pytest.approx(two["data"][folder], rel=1e-6)
    answers = one["data"][str(chat_data)]
    assert answers["answers"] == 5 and f"5 answers: Rouge-L {answers['rouge_l']:.1f}" in done.stdout
    assert printed[0] == printed[1] and printed[0][8].startswith("    reference")  # the last of three answers


def test_no_answers(finetuned, chat_data, capsys):
    evaluate.main(evaluate.Config(str(finetuned), data=(str(chat_data),), max_answers=0, hellaswag=False))
    printed = capsys.readouterr().out
    assert f"answers in {chat_data}" in printed and "Rouge-L" not in printed


def test_default_folders_that_do_not_fit_are_skipped(run_script, fails, finetuned, text_data, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fineweb_edu").symlink_to(text_data)
    (tmp_path / "data" / "dolly").mkdir()  # incomplete: it has no meta.json
    flags = ("--checkpoint", finetuned, "--no_hellaswag")
    done = run_script("evaluate.py", *flags)
    assert "text in data/fineweb_edu" in done.stdout and "skipped: data/dolly is incomplete" in done.stderr
    assert "data/dolly is incomplete" in fails("evaluate.py", *flags, "--data", "data/dolly")


def test_mistakes_are_one_line(fails, pretrained, chat_data, examples_file):
    def check_error(message: str, **flags: object) -> None:
        with pytest.raises(UserError, match=message):
            evaluate.main(evaluate.Config(str(pretrained), **flags))

    check_error("--max_examples is 0: it must be at least 1", max_examples=0)
    check_error("nothing to evaluate", hellaswag=False)
    check_error("--hellaswag_files cannot be combined with", hellaswag=False, hellaswag_files=(str(examples_file),))
    check_error("holds conversations, and .* is not a chat model", hellaswag=False, data=(str(chat_data),))
    check_error("nowhere: no such dataset folder", hellaswag=False, data=("nowhere",))
    check_error(r"--hellaswag_files nowhere\.jsonl: no such file", hellaswag_files=("nowhere.jsonl",))
    for path, message in {"nowhere/x.jsonl": "No such file or directory", ".": "Is a directory"}.items():
        assert f"{path}: {message}" in fails("evaluate.py", "--checkpoint", pretrained, "--json", path)
