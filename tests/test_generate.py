"""generate.py as a real process: texts, answers, conversations, and its error messages."""

import io
import json
import os
import re
import shutil

import pytest
import torch
from conftest import start
from test_pretrained import save_nanogpt

import chat_web
import generate
from minigpt import checkpoint, runs
from minigpt.chat import encode_prompt
from minigpt.hf import save_hf
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import load_tokenizer
from model import GPT, GPTConfig

GREEDY = ("--temperature", 0, "--max_tokens", 20)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """A chat model that has memorised four answers."""
    folder = tmp_path_factory.mktemp("parrot")
    pairs = {"sky?": "Blue.", "grass?": "Green, mostly.", "snow?": "White.", "coal?": "Black as é."}
    records = [{"instruction": q, "context": "", "response": a} for q, a in pairs.items()] * 30
    records += [{"instruction": f"{i}?", "context": "", "response": "No."} for i in range(20)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = ("--files", "chat.jsonl", "--tokenizer", "bytes", "--block_size", 64, "--val_fraction", 0.2)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=2, n_embd=64))
    checkpoint.save(
        folder / "base" / "step_000001", model.config, model.state_dict(), load_tokenizer("bytes"), {}, {"step": 1}
    )
    start("prepare_dolly.py", *data, cwd=folder)
    steps = ("--steps", 120, "--batch_tokens", 1024, "--micro_batch_size", 16, "--lr", 1e-2, "--dropout", 0)
    start("finetune.py", "--init", "./base", *steps, "--val_every", 60, cwd=folder)
    questions = {json.loads(line)["instruction"] for line in (folder / "chat.jsonl").read_text().splitlines()}
    assert set(pairs) <= questions
    return folder, pairs


def test_answers_and_stops_by_itself(parrot):
    """The default checkpoint is runs/dolly; at least three of the four answers were in the training split."""
    folder, pairs = parrot
    answers = {q: start("generate.py", "--prompt", q, *GREEDY, cwd=folder).stdout for q in pairs}
    assert sum(answers[q] == a + "\n" for q, a in pairs.items()) >= 3, answers


def test_conversation_remembers(parrot):
    """Two messages are answered, and the end of the input ends the chat."""
    folder, pairs = parrot
    done = start("generate.py", "--chat", *GREEDY, cwd=folder, input="sky?\nsnow?\n")
    _, first, *second = done.stdout.splitlines()  # after the line that names the model
    assert first == pairs["sky?"] and "".join(second).strip()
    assert "Traceback" not in done.stderr


def test_raw_continues_the_text(parrot):
    folder, _ = parrot
    done = start("generate.py", "--prompt", "sky", "--raw", *GREEDY, cwd=folder)
    assert done.stdout.startswith("sky")


def test_pretrained_model_continues_the_prompt(run_script, pretrained):
    args = ("generate.py", "--checkpoint", pretrained, "--prompt", "Document", "--max_tokens", 30)
    first, again, other = (run_script(*args, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other and first.startswith("Document") and len(first) > 30


def test_samples_in_one_batch(run_script, pretrained):
    args = ("generate.py", "--checkpoint", pretrained, "--prompt", "Document", "--max_tokens", 30)
    samples = run_script(*args, "--num_samples", 3, "--seed", 1).stdout.split("--- sample ")[1:]
    assert len(samples) == 3 and len({sample[1:] for sample in samples}) == 3
    alone = run_script(*args, "--temperature", 0).stdout
    together = run_script(*args, "--temperature", 0, "--num_samples", 2).stdout
    assert together == f"--- sample 1\n{alone}--- sample 2\n{alone}"


def test_continues_past_the_context(run_script, pretrained):
    """The tiny context is 64 tokens: 200 more are generated, a prompt of 100 is truncated with a warning."""
    args = ("generate.py", "--checkpoint", pretrained, "--max_tokens", 200, "--temperature", 0)
    done = run_script(*args, "--prompt", "Document")
    assert len(done.stdout.encode()) >= 200 and done.stderr == ""
    done = run_script(*args, "--prompt", "Document " * 12)
    assert "warning: the prompt has 109 tokens, the context 64" in done.stderr


def test_long_question_keeps_its_end(finetuned):
    """People paste a document and ask at the end: the beginning is dropped."""
    loaded = load_pretrained(str(finetuned))
    question = "Read this first. " * 20 + "How many?"
    tokens, n_dropped = encode_prompt(loaded.tokenizer, [{"role": "user", "content": question}], 64, 256)
    text = loaded.tokenizer.decode(tokens)
    assert text.endswith("How many?<|end|><|assistant|>") and text.startswith("<|endoftext|><|user|>")
    assert len(tokens) == 64 - 16  # a quarter of the context is kept for the answer
    assert n_dropped == len(question) + 4 - len(tokens)


def test_long_question_is_answered_with_a_warning(run_script, finetuned):
    done = run_script("generate.py", "--checkpoint", finetuned, "--prompt", "After 7? " * 20, *GREEDY)
    assert "its oldest part is dropped" in done.stderr and done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(run_script, pretrained, dtype):
    """A seed gives the same text again."""
    args = ("generate.py", "--checkpoint", pretrained, "--prompt", "Document", "--max_tokens", 20, "--seed", 1)
    outputs = [run_script(*args, "--dtype", dtype).stdout for _ in range(2)]
    assert outputs[0].startswith("Document") and outputs[0] == outputs[1]


@pytest.mark.parametrize("source", ["./gpt2", "out"])
def test_models_of_other_repositories(run_script, gpt2_tokenizer, tmp_path, source):
    save_hf(GPT(GPTConfig(block_size=32, n_layer=1, n_head=1, n_embd=8)), tmp_path / "gpt2")
    save_nanogpt(tmp_path / "out" / "ckpt.pt")
    done = run_script("generate.py", "--checkpoint", source, "--prompt", "The sea", *GREEDY)
    assert done.stdout.startswith("The sea")


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), "give a --prompt"),
        (("--prompt", "a", "--temperature", -1), "--temperature is -1.0: it must be at least 0"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature is nan"),
        (("--prompt", "a", "--top_p", 0), "--top_p is 0.0: it must be above 0 and at most 1"),
        (("--prompt", "a", "--top_p", 1.1), "--top_p is 1.1"),
        (("--prompt", "a", "--top_k", 0), "--top_k is 0"),
        (("--prompt", "a", "--seed", 10**20), "--seed is 100000000000000000000"),
        (("--prompt", "a", "--device", "meta"), "--device meta: this machine has no such device"),
        (("--prompt", "a", "--num_samples", 0), "--num_samples is 0"),
        (("--prompt", "a", "--max_tokens", 0), "--max_tokens is 0"),
        (("--prompt", "a", "--chat"), "cannot be combined"),
        (("--chat",), "is not a chat model"),
        (("--prompt", "a", "--checkpoint", "runs/nowhere"), "runs/nowhere: no checkpoint found"),
        (("--prompt", "a", "--checkpoint", "nobody/nothing"), "neither a folder nor a model on the hub"),
    ],
)
def test_mistakes(fails, pretrained, flags, words):
    checkpoint_flag = () if "--checkpoint" in flags else ("--checkpoint", pretrained)
    assert words in fails("generate.py", *checkpoint_flag, *flags)


@pytest.mark.parametrize("chat", [True, False])
def test_chat_takes_the_newest_chat_run(finetuned, pretrained, tmp_path, monkeypatch, capsys, chat):
    (tmp_path / "runs").mkdir()
    for name, run, time in (("chat", finetuned, 1e9), ("text", pretrained, 2e9)):
        shutil.copytree(run, tmp_path / "runs" / name)
        newest = runs.list_checkpoints(tmp_path / "runs" / name)[-1]
        os.utime(newest / "meta.json", (time, time))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    generate.main(generate.Config(chat=chat, prompt=None if chat else "a"))
    assert re.match(f"checkpoint: runs/{'chat' if chat else 'text'}/step_0000", capsys.readouterr().err)
    if chat:
        monkeypatch.setattr(chat_web, "import_gradio", lambda: None)
        monkeypatch.setattr(chat_web, "build_page", lambda loaded, device: loaded)
        monkeypatch.setattr(chat_web, "serve", lambda loaded, config: print(loaded.source))
        chat_web.main(chat_web.Config())
        assert capsys.readouterr().out.startswith("runs/chat/step_0000")


def test_corrupt_checkpoints(fails, finetuned, tmp_path):
    for name, words in {"model.safetensors": "corrupt or truncated", "meta.json": "is corrupt"}.items():
        folder = tmp_path / name / "step_000001"
        folder.mkdir(parents=True)
        for file in runs.list_checkpoints(finetuned)[-1].iterdir():
            data = file.read_bytes()
            (folder / file.name).write_bytes(data[: len(data) // 2] if file.name == name else data)
        assert words in fails("generate.py", "--checkpoint", folder, "--prompt", "a")

    other = tmp_path / "other" / "step_000001"
    other.mkdir(parents=True)
    (other / "meta.json").write_text('{"version": 99}')
    assert "format version 99" in fails("generate.py", "--checkpoint", other, "--prompt", "a")
