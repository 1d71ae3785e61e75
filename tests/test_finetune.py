"""finetune.py as a real process: from runs and Hugging Face folders, loss on answers, resuming, two processes."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TUNE, read_log, start
from test_model import assert_close, random_tokens, small_model
from test_pretrained import save_nanogpt

from finetune import add_chat_tokens
from minigpt import checkpoint, runs
from minigpt.dataset import ChatDataset
from minigpt.distributed import Processes
from minigpt.hf import save_hf
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import load_tokenizer
from minigpt.training import validate
from model import GPT, IGNORE_INDEX, GPTConfig

OFTEN = ("--val_every", 4, "--save_every", 6)


def losses(run) -> list[float]:
    return [row["loss"] for row in read_log(run) if "loss" in row]


def test_learns_to_answer(finetuned, pretrained):
    validations = [row["val_loss"] for row in read_log(finetuned) if "val_loss" in row]
    assert validations[-1] < 0.9 * validations[0]
    loaded = load_pretrained(str(finetuned))
    assert loaded.is_chat and loaded.model.config.vocab_size == 261
    assert not load_pretrained(str(pretrained)).is_chat


def test_validation_is_the_mean_over_what_the_assistant_says(finetuned, chat_data):
    """The logged loss equals the loss of the conversations one by one, unpacked, over their targets."""
    best = runs.find_best(finetuned)
    model = load_pretrained(str(best)).model.eval()
    tokens, loss_mask, offsets = ChatDataset(chat_data, 64).arrays["val"]
    total = count = 0
    for begin, end in itertools.pairwise(offsets):
        row = torch.tensor(tokens[begin:end].astype("int64"))[None]
        targets = torch.where(torch.tensor(loss_mask[begin + 1 : end]), row[0, 1:], IGNORE_INDEX)[None]
        with torch.no_grad():
            total += model(row[:, :-1], targets).item()
        count += int(loss_mask[begin + 1 : end].sum())
    assert runs.read_meta(best)["metrics"]["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_packed_loss_equals_unpacked(chat_data):
    """A row's loss is the sum of its conversations' losses, each computed alone."""
    data = ChatDataset(chat_data, 64)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=261, n_layer=2, n_head=2, n_embd=32)).eval()
    tokens, loss_mask, offsets = data.arrays["train"]
    assert max(map(len, data.rows["train"])) > 1
    for row in range(data.n_rows["train"]):
        batch = data.batch("train", [row])
        alone = 0.0
        for i in data.rows["train"][row]:
            span = torch.tensor(tokens[offsets[i] : offsets[i + 1]].astype("int64"))[None]
            mask = torch.tensor(loss_mask[offsets[i] + 1 : offsets[i + 1]])
            targets = torch.where(mask, span[0, 1:], IGNORE_INDEX)[None]
            alone += model(span[:, :-1], targets).item()
        assert model(batch.tokens, batch.targets, batch.positions).item() == pytest.approx(alone, rel=1e-5)


def test_resumed_equals_uninterrupted(run_script, chat_data, pretrained, tmp_path):
    """With dropout, which must be drawn anew as it would have been; --init is not needed any more."""
    args = ("finetune.py", "--data", chat_data, *TUNE, *OFTEN, "--dropout", 0.2, "--deterministic")
    shutil.copytree(pretrained, tmp_path / "base")
    run_script(*args, "--init", "./base", "--out", "./whole")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "step_000012")
    run_script(*args, "--init", "./base", "--out", "./broken")
    for file in ("model.safetensors", "train_state.safetensors"):
        whole, broken = (tmp_path / run / "step_000012" / file for run in ("whole", "broken"))
        assert whole.read_bytes() == broken.read_bytes()


def test_two_processes_equal_one(chat_data, pretrained, tmp_path):
    """Also with dropout, and though the two have different numbers of targets in each micro-batch; also sharded."""
    args = ("finetune.py", "--init", pretrained, "--data", chat_data, *TUNE, *OFTEN, "--micro_batch_size", 4)
    start(*args, "--out", "./one", cwd=tmp_path)
    start(*args, "--out", "./two", cwd=tmp_path, processes=2)
    start(*args, "--out", "./sharded", "--shard", cwd=tmp_path, processes=2)
    one, *others = (read_log(tmp_path / run) for run in ("one", "two", "sharded"))
    for log, key in itertools.product(others, ("loss", "val_loss")):
        expected = [row[key] for row in one if key in row]
        assert [row[key] for row in log if key in row] == pytest.approx(expected, rel=1e-5)


def test_epochs_say_how_long(run_script, chat_data, pretrained, tmp_path):
    rows = ChatDataset(chat_data, 64).n_rows["train"]
    sizes = ("--batch_tokens", 512, "--micro_batch_size", 8, "--epochs", 1.5)
    done = run_script("finetune.py", "--init", pretrained, "--data", chat_data, "--out", "./run", *sizes)
    n_steps = len(losses(tmp_path / "run"))
    assert n_steps == -(-1.5 * rows // 8)
    assert n_steps < 20 and f"warning: only {n_steps} steps, too few to learn the conversations" in done.stderr
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "run").glob("step_*/*")}
    assert modes == {0o644}  # other users can load the checkpoint


def test_from_models_of_other_repositories(run_script, gpt2_tokenizer, tmp_path):
    """A Hugging Face folder and nanoGPT's ckpt.pt are finetuned in GPT-2's vocabulary, with their own GELU."""
    torch.manual_seed(0)
    save_hf(GPT(GPTConfig(block_size=64, n_layer=1, n_head=2, n_embd=16)), tmp_path / "gpt2")
    save_nanogpt(tmp_path / "ckpt.pt", args={"block_size": 64})
    record = '{"instruction": "Who?", "context": "", "response": "Somebody or other."}\n'
    (tmp_path / "chat.jsonl").write_text("".join(record.replace("Who", f"Who {i}") for i in range(40)))
    run_script("prepare_dolly.py", "--files", "chat.jsonl", "--block_size", 64, "--val_fraction", 0.3)
    sizes = ("--steps", 2, "--batch_tokens", 256, "--micro_batch_size", 2)
    run_script("finetune.py", "--init", "./gpt2", *sizes)
    run_script("finetune.py", "--init", "ckpt.pt", *sizes, "--out", "runs/nanogpt")
    for run, gelu in {"dolly": "tanh", "nanogpt": "none"}.items():
        loaded = load_pretrained(str(tmp_path / "runs" / run))
        assert loaded.tokenizer is gpt2_tokenizer and loaded.model.config.vocab_size == 50_261
        assert loaded.model.config.gelu == gelu
    assert loaded.history[0] == {"source": "ckpt.pt", "step": 2000}
    assert read_log(tmp_path / "runs" / "dolly")[0]["val_loss"] == pytest.approx(10.82, abs=0.2)  # ln 50,261


def test_dropped_conversations_never_share_attention(chat_data):
    """Changing one conversation of a row does not change the logits of the others."""
    data = ChatDataset(chat_data, 64)
    row = next(i for i, items in enumerate(data.rows["train"]) if len(items) > 1)
    batch = data.batch("train", [row])
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=261, n_layer=2, n_head=2, n_embd=32)).eval()
    second = int((batch.positions[0] == 0).nonzero()[1])
    changed = batch.tokens.clone()
    changed[0, :second] = 7
    with torch.no_grad():
        before, after = (model(tokens, positions=batch.positions) for tokens in (batch.tokens, changed))
    torch.testing.assert_close(before[:, second:], after[:, second:], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, :second], after[:, :second])


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--init", "./nowhere"), "./nowhere: no checkpoint found"),
        (("--data", "nowhere"), "nowhere: no such dataset folder; create it with prepare_dolly.py"),
        (("--lr", 2), "--lr is 2.0: it must be above 0 and at most 1"),
        (("--epochs", 0), "--epochs is 0"),
        (("--steps", -3), "--steps is -3"),
        (("--batch_tokens", 100), "--batch_tokens 100 is not a multiple of 512"),
    ],
)
def test_bad_values(fails, pretrained, chat_data, flags, words):
    assert words in fails("finetune.py", "--init", pretrained, "--data", chat_data, *TUNE, *flags)


def test_bad_inits(fails, pretrained, chat_data, text_data, tmp_path):
    args = ("finetune.py", "--data", chat_data, *TUNE)
    shutil.copytree(pretrained, tmp_path / "cut")
    for weights in (tmp_path / "cut").glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    assert "corrupt or truncated" in fails(*args, "--init", "./cut")

    small = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(
        tmp_path / "small" / "step_000001", small.config, small.state_dict(), load_tokenizer("bytes"), {}, {"step": 1}
    )
    sizes = ("--batch_tokens", 256, "--micro_batch_size", 8)
    assert "the model's context is 16" in fails(*args, *sizes, "--init", "./small")
    assert "holds text data, not chat" in fails(*args, "--init", pretrained, "--data", text_data)


def test_other_tokens(fails, gpt2_tokenizer, chat_data, tmp_path):
    save_hf(GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8)), tmp_path / "gpt2")
    error = fails("finetune.py", "--init", "./gpt2", "--data", chat_data, *TUNE)
    assert "has bytes tokens" in error and "--tokenizer gpt2" in error


def test_validation_does_not_depend_on_batching(chat_data):
    data = ChatDataset(chat_data, 64)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=261, n_layer=1, n_head=1, n_embd=16))
    procs = Processes(0, 1, torch.device("cpu"), torch.float32)
    rows = range(data.n_rows["val"])
    one_by_one = validate(model, [data.batch("val", [row]) for row in rows], procs)
    assert validate(model, [data.batch("val", list(rows))], procs) == pytest.approx(one_by_one, rel=1e-6)


def test_a_checkpoint_has_the_history_of_its_training(finetuned, pretrained):
    first, second = load_pretrained(str(finetuned)).history
    assert [first] == load_pretrained(str(pretrained)).history
    assert (first["config"]["model"], first["step"], second["step"]) == ("tiny", 12, 12)
    for training, name in ((first, "text.jsonl"), (second, "chat.jsonl")):
        assert training["source"]["files"][0]["file"].endswith(name)
    assert second["metrics"]["val_loss"] > 0


@pytest.mark.parametrize("vocab_size", [37, 41, 48, 60])
@torch.no_grad()
def test_added_tokens_do_not_change_the_others(vocab_size):
    """The vocabulary of 37 tokens has 48 rows: new tokens fit in the padding, or need more rows."""
    model, tokens = small_model(dropout=0.1), random_tokens(2, 16)
    model.wte.weight[37:] = 1e3  # padding must not count in the mean or in the logits
    expected = model(tokens)
    chat_model = add_chat_tokens(model, vocab_size, dropout=0.3).eval()
    assert chat_model.config == replace(model.config, vocab_size=vocab_size, dropout=0.3)
    assert chat_model(tokens).shape[-1] == vocab_size
    assert_close(chat_model(tokens)[..., :37], expected, 1e-6)
    mean = model.wte.weight[:37].mean(dim=0)
    assert_close(chat_model.wte.weight[37:vocab_size], mean.expand(vocab_size - 37, -1), 1e-6)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in chat_model.parameters())
    assert model.config.vocab_size == 37 and torch.equal(model(tokens), expected)


def test_model_with_added_tokens_can_be_trained():
    chat_model = add_chat_tokens(small_model(), 41, dropout=0.0)
    tokens = random_tokens(2, 8, vocab_size=41)
    optimizer = torch.optim.SGD(chat_model.parameters(), lr=1e-3)
    before = chat_model(tokens, tokens)
    before.backward()
    assert all(parameter.grad is not None for parameter in chat_model.parameters())
    optimizer.step()
    assert chat_model(tokens, tokens) < before
