"""prepare_tokenizer.py: a vocabulary trained on one's own text goes from the data to the exported model."""

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import start
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_tokenizer
from minigpt.cli import UserError
from minigpt.optim import build_optimizer
from minigpt.pretrained import load_pretrained
from minigpt.shards import read_meta
from minigpt.tokenizer import CHAT_TOKENS, Tokenizer, load_tokenizer
from minigpt.tokenizer_json import read_vocabulary
from model import GPT, GPTConfig

GREEK = "Η θάλασσα είναι ήρεμη σήμερα, και ο ουρανός είναι γαλανός· το πλοίο {0} φεύγει για το νησί στις {1} το πρωί. "
CODE = "def add_{0}(x, y):\n    # the sum, {1} times\n    for _ in range({1}):\n        x = x + y\n    return x\n\n\n"


def write_texts(file: Path, template: str, n: int = 60) -> Path:
    records = [{"text": "".join(template.format(i * j, i + j) for j in range(8))} for i in range(n)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def train(folder: Path, template: str, **flags) -> Tokenizer:
    file = write_texts(folder / "text.jsonl", template)
    prepare_tokenizer.main(prepare_tokenizer.Config(files=(str(file),), out=folder / "tokenizer", **flags))
    return load_tokenizer(str(folder / "tokenizer"))


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def trained(request, tmp_path_factory) -> tuple[Path, Tokenizer]:
    """Return a folder and a vocabulary of 400 tokens, for each pattern."""
    folder = tmp_path_factory.mktemp("trained")
    return folder / "tokenizer", train(folder, GREEK + CODE, vocab_size=400, pattern=request.param)


PIECES = ["θάλασσα", "def", " ", "\n", "\r\n", "  ", "42", "1234", "'s", "’", "日本", "_x"]
texts = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(PIECES)).map("".join))


def test_the_vocabulary_has_the_size_and_special_tokens_behind(trained):
    folder, tokenizer = trained
    assert tokenizer.vocab_size == 400 and tokenizer.end_of_text == 399
    assert tokenizer.chat_vocab_size == 404 and tokenizer.name.startswith("bpe-")
    assert all(tokenizer.token_bytes(byte) == bytes([byte]) for byte in range(256))
    assert sorted(file.name for file in folder.iterdir()) == ["meta.json", "tokenizer.json", "vocab.tiktoken"]


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_tokenizers_tiktoken_and_gigatoken_encode_equally(trained, text):
    import tokenizers

    folder, tokenizer = trained
    text = text.encode("utf-8", "replace").decode()
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == tokens
    if tokenizer.gigatoken is not None:
        [document] = tokenizer.encode_documents([text])
        assert document.tolist() == [tokenizer.end_of_text, *tokens]


def test_tiktoken_reads_the_ranks(trained):
    from tiktoken.load import load_tiktoken_bpe

    folder, tokenizer = trained
    assert load_tiktoken_bpe(str(folder / "vocab.tiktoken")) == tokenizer.ranks


def test_the_same_text_gives_the_same_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (train(tmp_path / name, GREEK, vocab_size=300) for name in "ab")
    assert first.name == second.name
    for name in ("tokenizer.json", "vocab.tiktoken"):
        assert (tmp_path / "a/tokenizer" / name).read_bytes() == (tmp_path / "b/tokenizer" / name).read_bytes()


def test_bytes_per_token_exceed_those_of_gpt2_in_another_language(tmp_path, gpt2_tokenizer, capsys):
    tokenizer = train(tmp_path, GREEK, vocab_size=500)
    text = GREEK.format(7, 8)
    assert len(tokenizer.encode(text)) < len(gpt2_tokenizer.encode(text)) / 2
    printed = capsys.readouterr().out
    assert "bytes per token on" in printed and "gpt2, with 50,257 tokens" in printed
    assert re.search(
        rf"next: python \S*prepare_fineweb.py --files {tmp_path}/text.jsonl --tokenizer \S+ --out", printed
    )


def test_the_next_command_reads_the_same_source(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("number,body\n" + "".join(f"{i},text {i} of many\n" for i in range(50)))
    (tmp_path / "b.py").write_text("print(1)\n" * 50)
    source = {"files": (str(tmp_path / "a.csv"), str(tmp_path / "b.py")), "text_field": "body"}
    flags = source | {"text_suffixes": (".py",), "vocab_size": 270, "out": tmp_path / "out"}
    prepare_tokenizer.main(prepare_tokenizer.Config(**flags))
    command = capsys.readouterr().out.splitlines()[-1]
    files = f"--files {tmp_path}/a.csv {tmp_path}/b.py"
    assert f"{files} --text_field body --text_suffixes .py --tokenizer {tmp_path}/out --out" in command


def test_empty_documents_are_not_held_out(tmp_path):
    records = [{"text": text} for text in ("some words", " ", "other words")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = {"files": (str(tmp_path / "a.jsonl"),), "vocab_size": 258, "out": tmp_path / "out"}
    prepare_tokenizer.main(prepare_tokenizer.Config(**flags))
    assert load_tokenizer(str(tmp_path / "out")).vocab_size == 258


def test_a_second_run_is_already_complete(tmp_path, capsys):
    train(tmp_path, GREEK, vocab_size=300)
    train(tmp_path, GREEK, vocab_size=300)
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists: delete it or choose another folder"):
        train(tmp_path, GREEK, vocab_size=301)


def test_fewer_tokens_than_asked_for_are_reported(tmp_path, capsys):
    tokenizer = train(tmp_path, "aab{}", vocab_size=5000)
    assert tokenizer.vocab_size < 5000
    assert "fewer tokens than --vocab_size 5,000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vocab_size", 65_001), "--vocab_size is 65001: it must be at least 258 and at most 65000"),
        (("--vocab_size", 257), "--vocab_size is 257: it must be at least 258"),
        (("--files", "none.txt"), "none.txt: no such file"),
        (("--files", "one.txt"), "has 1 document in its first 100,000,000 characters; at least two are needed"),
    ],
)
def test_mistakes_end_in_one_line(fails, tmp_path, flags, message):
    (tmp_path / "one.txt").write_text("one short line")
    files = () if "--files" in flags else ("--files", "one.txt")
    assert message in fails("prepare_tokenizer.py", *files, *flags)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["nothing", "data/none"])
def test_an_unknown_tokenizer_is_rejected(name):
    with pytest.raises(UserError, match=f"there is no tokenizer '{name}': choose gpt2, bytes or a folder with"):
        load_tokenizer(name)


def test_merges_that_ranks_cannot_express_are_rejected(trained, tmp_path):
    content = json.loads((trained[0] / "tokenizer.json").read_text())
    content["model"]["merges"][0], content["model"]["merges"][1] = content["model"]["merges"][1::-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="merges tokens in another order"):
        read_vocabulary(tmp_path / "tokenizer.json")


# ---- another language and source code ----------------------------------------------------------------------------

WORDS = (
    "η θάλασσα είναι ήρεμη σήμερα και ο ουρανός γαλανός το πλοίο φεύγει για νησί στις οκτώ πρωί με λίγους ταξιδιώτες"
    " που κοιτάζουν τα βουνά ενώ παιδιά παίζουν στην παραλία κάτω από παλιά δέντρα μέχρι αργά βράδυ"
)
NAMES = "total count item values index result buffer offset length parse_line read_block write_header"


def make_greek(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS.split(), k=12)).capitalize() + ". "


def make_code(rng: random.Random) -> str:
    name, a, b = rng.sample(NAMES.split(), 3)
    return f"def {name}({a}, {b}):\n    if {a} is None:\n        return {b}\n    return {name}({b}, {a}) + 1\n\n\n"


def bits_per_byte(tokenizer: Tokenizer, train_text: str, val_text: str) -> float:
    """Train a small model for 20 steps of 256 tokens; return its bits per byte on other text."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(config)
    optimizer = build_optimizer(model, 3e-3, 0.1)
    tokens, val_tokens = (torch.tensor(tokenizer.encode(text)) for text in (train_text, val_text))
    for _ in range(20):
        rows = tokens.unfold(0, 33, 1)[torch.randint(len(tokens) - 32, (8,))]
        (model(rows[:, :-1], rows[:, 1:]) / 256).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = val_tokens[: len(val_tokens) // 33 * 33].view(-1, 33)
    with torch.no_grad():
        nats = model(rows[:, :-1], rows[:, 1:]).item()
    n_bytes = sum(len(tokenizer.token_bytes(token)) for token in rows[:, 1:].flatten().tolist())
    return nats / math.log(2) / n_bytes


@pytest.mark.parametrize("make", [make_greek, make_code])
def test_an_own_vocabulary_has_the_lowest_bits_per_byte_at_equal_training(tmp_path, gpt2_tokenizer, make):
    rng = random.Random(0)
    train_text, val_text = ("".join(make(rng) for _ in range(n)) for n in (1000, 30))
    (tmp_path / "text.txt").write_text(train_text)
    flags = {"files": (str(tmp_path / "text.txt"),), "out": tmp_path / "tokenizer"}
    prepare_tokenizer.main(prepare_tokenizer.Config(vocab_size=512, **flags))
    own = load_tokenizer(str(tmp_path / "tokenizer"))
    tokenizers = (own, load_tokenizer("bytes"), gpt2_tokenizer)
    own, *others = (bits_per_byte(tokenizer, train_text, val_text) for tokenizer in tokenizers)
    assert own < 0.9 * min(others)


# ---- from the text to the exported model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """Return a folder in which each script was run with a trained vocabulary."""
    folder = tmp_path_factory.mktemp("walk")
    write_texts(folder / "text.jsonl", GREEK + CODE, n=120)
    pairs = [{"instruction": f"Ποιο πλοίο {i};", "context": "", "response": f"Το πλοίο {i}."} for i in range(60)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train_flags = ("--batch_tokens", 1024, "--micro_batch_size", 8, "--lr", 3e-3, "--steps", 6)
    vocabulary = ("--tokenizer", "data/tokenizer")
    start("prepare_tokenizer.py", "--files", "text.jsonl", "--vocab_size", 400, cwd=folder)
    data = ("--files", "text.jsonl", *vocabulary, "--val_fraction", 0.1)
    start("prepare_fineweb.py", *data, "--out", "data/text", cwd=folder)
    start("pretrain.py", "--data", "data/text", "--out", "runs/text", "--model", "tiny", *train_flags, cwd=folder)
    data = ("--files", "chat.jsonl", *vocabulary, "--val_fraction", 0.1, "--block_size", 64)
    start("prepare_dolly.py", *data, "--out", "data/chat", cwd=folder)
    chat = ("--init", "runs/text", "--data", "data/chat", "--out", "runs/chat")
    start("finetune.py", *chat, *train_flags, cwd=folder)
    return folder


def test_datasets_and_checkpoints_name_and_contain_the_vocabulary(walk):
    name = load_tokenizer(str(walk / "data/tokenizer")).name
    content = (walk / "data/tokenizer/tokenizer.json").read_bytes()
    for folder in ("data/text", "data/chat", "runs/text/step_000006", "runs/chat/step_000006"):
        assert json.loads((walk / folder / "meta.json").read_text())["tokenizer"] == name
        assert (walk / folder / "tokenizer.json").read_bytes() == content
    assert read_meta(walk / "data/text")["vocab_size"] == 400


def test_a_run_moved_to_another_machine_generates(walk, run_script, tmp_path):
    shutil.copytree(walk / "runs/chat", tmp_path / "moved")
    text = run_script("generate.py", "--checkpoint", "moved", "--prompt", "Ποιο πλοίο 3;", "--max_tokens", 5)
    assert text.stdout.strip()
    assert "whole" in run_script("verify.py", "moved").stdout


def test_a_vocabulary_that_changed_is_detected(walk, tmp_path, run_script, fails):
    shutil.copytree(walk / "runs/chat", tmp_path / "moved")
    shutil.copytree(walk / "data/text", tmp_path / "text")
    other = train(tmp_path, GREEK, vocab_size=300).to_json()
    for file in (tmp_path / "moved/step_000006/tokenizer.json", tmp_path / "text/tokenizer.json"):
        file.write_text(other)
    assert "tokenizer.json is not the vocabulary bpe-" in fails("generate.py", "--checkpoint", "moved", "--prompt", "x")
    verified = run_script("verify.py", "moved", expect=2)
    assert "tokenizer.json is corrupt or truncated: its checksum is wrong" in verified.stdout
    assert "is not the vocabulary" in fails("pretrain.py", "--data", "text", "--out", "new", "--model", "tiny")
    (tmp_path / "text/tokenizer.json").unlink()
    assert "tokenizer.json is missing" in fails("pretrain.py", "--data", "text", "--out", "new", "--model", "tiny")


def test_finetune_names_the_vocabulary_of_the_model(walk, chat_data, fails):
    message = fails("finetune.py", "--init", walk / "runs/text", "--data", chat_data, "--out", "new")
    assert f"run prepare_dolly.py with --tokenizer {walk / 'runs/text/step_000006'}" in message


def test_transformers_loads_the_export_with_equal_tokens(walk, run_script, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from minigpt.chat import encode_prompt

    run_script("export.py", "--checkpoint", walk / "runs/chat", "--out", "exported")
    ours = load_pretrained(str(walk / "runs/chat"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = GREEK.format(3, 4) + CODE.format(5, 6)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(text)
    assert theirs.convert_tokens_to_ids(list(CHAT_TOKENS)) == [400, 401, 402, 403]
    messages = [{"role": "user", "content": "Ποιο πλοίο 3;"}]
    template = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert template == encode_prompt(ours.tokenizer, messages, 64, 10)[0]
    again = load_pretrained(str(tmp_path / "exported"))
    assert again.is_chat and again.tokenizer.name == ours.tokenizer.name
