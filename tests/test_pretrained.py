"""Models from every source: runs, checkpoints, Hugging Face folders and hub ids; corrupt files are rejected."""

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import edit_manifest, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import error_message, failing, save_checkpoint, tiny_model, truncate
from test_model import SMALL, assert_close, random_tokens, small_model
from torch import nn

from minigpt.cli import UserError
from minigpt.hf import load_hf, save_hf
from minigpt.pretrained import load_pretrained
from minigpt.tokenizer import load_tokenizer
from model import GPT, GPTConfig

# ---- load_pretrained: any source -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "name"


@pytest.fixture
def two_checkpoints(run, tmp_path, monkeypatch) -> Path:
    """Return a run whose older checkpoint is better. The working directory contains `runs`."""
    save_checkpoint(run / "step_000001", tiny_model(1), val_loss=2.0)
    save_checkpoint(run / "step_000002", tiny_model(2), val_loss=3.0)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize(
    ("source", "seed"),
    [
        ("runs/name", 1),
        ("runs/name/", 1),
        ("./runs/name", 1),
        ("runs/name/step_000001", 1),
        ("runs/name/step_000002", 2),
    ],
)
def test_runs_and_checkpoints_load(two_checkpoints, source, seed):
    loaded = load_pretrained(source)
    assert torch.equal(loaded.model.wpe.weight, tiny_model(seed).wpe.weight)
    assert loaded.source == f"runs/name/step_00000{seed}"
    assert loaded.tokenizer is load_tokenizer("bytes") and not loaded.is_chat


def test_bare_name_of_a_folder_loads(two_checkpoints, tmp_path):
    two_checkpoints.rename(tmp_path / "elsewhere")
    assert load_pretrained("elsewhere").source == "elsewhere/step_000001"


def test_chat_model_is_detected_by_its_vocabulary(run):
    save_checkpoint(run / "step_000001", tiny_model(vocab_size=257 + 4))
    assert load_pretrained(str(run)).is_chat


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bytes", "has a vocabulary of 99 tokens; bytes has 257, or 261 with chat tokens"),
        ("morse", "tokenizer.json is missing, the vocabulary morse"),
    ],
)
def test_tokenizer_of_another_size_is_rejected(run, name, message):
    save_checkpoint(run / "step_000001", tiny_model(vocab_size=99))
    edit_manifest(run / "step_000001" / "meta.json", tokenizer=name)
    assert message in error_message(load_pretrained, str(run))


@pytest.mark.parametrize(
    "source", ["runs/none", "./none", "/none", "../none", "runs/empty", "empty", "a/b/none", "runs/name/step_9"]
)
def test_missing_path_is_rejected_without_a_hub_request(two_checkpoints, monkeypatch, source):
    for folder in ("empty", "runs/empty"):
        Path(folder).mkdir()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(None, AssertionError("hub request"), 1))
    assert f"{source}: no checkpoint found" in error_message(load_pretrained, source)


@pytest.mark.parametrize("source", ["someone/model", "name"])
def test_other_names_are_looked_up_on_the_hub(two_checkpoints, monkeypatch, source):
    """A bare name is never a run in runs/: runs are given as paths."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(None, ConnectionError("no route"), 1))
    message = error_message(load_pretrained, source)
    assert f"{source} is neither a folder nor a model on the hub: no route" in message


def save_runs(**runs: bool) -> None:
    """Save a run for each name; the later, the newer. True is a chat run."""
    for i, (name, is_chat) in enumerate(runs.items()):
        folder = Path("runs", name, "step_000001")
        identity = {"init": "runs/gpt2"} if is_chat else {}
        save_checkpoint(folder, tiny_model(vocab_size=261 if is_chat else 257), identity=identity)
        os.utime(folder / "meta.json", (1e9 + i, 1e9 + i))


def test_default_is_the_newest_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert error_message(load_pretrained, None).startswith("no run under runs/: train a model with pretrain.py")
    save_runs(old=False)
    assert "no chat run under runs/: finetune a model" in error_message(load_pretrained, None, True)
    save_runs(c=False, b=True, a=False)
    save_checkpoint(Path("runs", "folder", "nested", "step_000001"))  # a folder of runs is not a run
    for chat, run, words in ((False, "runs/a", "the newest run"), (True, "runs/b", "the newest chat run")):
        assert load_pretrained(None, chat).source == f"{run}/step_000001"
        assert capsys.readouterr().err == f"checkpoint: {run}/step_000001 ({words})\n"
    monkeypatch.setenv("RANK", "1")
    assert load_pretrained(None).source == "runs/a/step_000001" and not capsys.readouterr().err
    os.utime("runs/c/step_000001/meta.json")
    assert load_pretrained(None).source == "runs/c/step_000001"
    monkeypatch.setenv("RANK", "0")
    load_pretrained("runs/a")
    assert not capsys.readouterr().err


def test_missing_checkpoint_lists_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no run under runs/: train one" in error_message(load_pretrained, "runs/gpt2")
    save_runs(old=False, dolly=True, mine=False)
    for source in ("runs/gpt2", "gpt2_typo"):
        assert "; existing runs: runs/mine, runs/dolly (chat), runs/old" in error_message(load_pretrained, source)


def test_corrupt_checkpoint_names_a_whole_one(two_checkpoints):
    save_checkpoint(two_checkpoints / "step_000003", tiny_model(3), val_loss=4.0)
    truncate(two_checkpoints / "step_000003" / "train_state.safetensors")
    best = two_checkpoints / "step_000001"
    truncate(best / "model.safetensors")
    for source in ("runs/name", "runs/name/step_000001"):
        message = error_message(load_pretrained, source)
        assert message.endswith("its checksum is wrong; use runs/name/step_000002 instead, which is whole")
    (best / "meta.json").write_text("{")
    assert "; use runs/name/step_000002 instead" in error_message(load_pretrained, "runs/name/step_000001")
    truncate(two_checkpoints / "step_000002" / "model.safetensors")
    assert "instead" not in error_message(load_pretrained, "runs/name/step_000001")


def test_hugging_face_folder_loads(tmp_path, gpt2_tokenizer):
    model = tiny_model(vocab_size=50_257)
    save_hf(model, tmp_path / "hf")
    loaded = load_pretrained(str(tmp_path / "hf"))
    assert loaded.tokenizer is gpt2_tokenizer and not loaded.is_chat and loaded.source == str(tmp_path / "hf")
    assert torch.equal(loaded.model.wte.weight[:50_257], model.wte.weight[:50_257])


def test_hugging_face_folder_of_another_vocabulary_is_rejected(tmp_path, gpt2_tokenizer):
    save_hf(tiny_model(vocab_size=99), tmp_path / "hf")
    message = error_message(load_pretrained, str(tmp_path / "hf"))
    assert "has a vocabulary of 99 tokens; gpt2 has 50257, or 50261 with chat tokens" in message


def test_corrupt_hugging_face_folder_is_rejected(tmp_path):
    save_hf(tiny_model(), tmp_path / "hf")
    truncate(tmp_path / "hf" / "model.safetensors")
    assert "model.safetensors is corrupt" in error_message(load_pretrained, str(tmp_path / "hf"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "has no model.safetensors" in error_message(load_pretrained, str(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ('"a": 97', '"a": 98', "its ids have gaps"),
        ('"<|end|>"', '"<|stop|>"', "has another chat format: it lacks <|system|>, <|user|>, <|assistant|>, <|end|>"),
        ('"id": 260', '"id": 999', "has another chat format"),
    ],
)
@pytest.mark.parametrize("is_chat", [True, False])
def test_tokenizer_of_a_hugging_face_folder_is_read(tmp_path, old, new, message, is_chat):
    """The chat tokens are compared for a chat model only."""
    tokenizer = load_tokenizer("bytes")
    loaded = load_pretrained(str(make_model(tmp_path / "run", tokenizer, chat=is_chat)))
    save_hf(loaded.model, tmp_path / "hf")
    loaded = load_pretrained(str(tmp_path / "hf"))  # without tokenizer.json, the size decides
    assert loaded.is_chat == is_chat and loaded.tokenizer.name == "bytes"
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer.to_json(chat=True).replace(old, new))
    if message is None or ("chat" in message and not is_chat):
        loaded = load_pretrained(str(tmp_path / "hf"))
        assert loaded.is_chat == is_chat and loaded.tokenizer.name == "bytes"
    else:
        assert message in error_message(load_pretrained, str(tmp_path / "hf"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": {}}, "added_tokens": [1]}'])
def test_corrupt_tokenizer_file_is_rejected(tmp_path, text):
    save_hf(tiny_model(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    assert "tokenizer.json is corrupt" in error_message(load_pretrained, str(tmp_path))


# ---- load_hf and save_hf ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "gelu"), [(37, "tanh"), (48, "none")])
@torch.no_grad()
def test_transformers_loads_saved_folder(tmp_path, vocab_size, gelu):
    transformers = pytest.importorskip("transformers")
    ours = small_model(vocab_size=vocab_size, dropout=0.25, gelu=gelu)
    folder = tmp_path / "new" / "folder"
    save_hf(ours, folder)
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tokens = random_tokens(2, 16)
    assert_close(theirs(tokens).logits, ours(tokens), 1e-4)
    assert theirs.config.vocab_size == vocab_size
    assert theirs.config.activation_function == {"tanh": "gelu_new", "none": "gelu"}[gelu]
    assert theirs.config.attn_pdrop == theirs.config.embd_pdrop == theirs.config.resid_pdrop == 0.25
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == vocab_size - 1
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # required by older versions of transformers


@pytest.mark.parametrize("gelu", ["tanh", "none"])
def test_saved_model_loads_unchanged(tmp_path, gelu):
    ours = small_model(gelu=gelu)
    save_hf(ours, tmp_path)
    again = load_hf(tmp_path).eval()
    assert again.config.gelu == gelu
    assert (again.config.block_size, again.config.vocab_size, again.config.n_head) == (16, 37, 2)
    for name, weight in ours.state_dict().items():
        own = SMALL.vocab_size if name == "wte.weight" else len(weight)
        assert torch.equal(again.state_dict()[name][:own], weight[:own]), name
    assert len(load_file(tmp_path / "model.safetensors")["transformer.wte.weight"]) == SMALL.vocab_size
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.fixture
def hf_folder(tmp_path) -> Path:
    """Return a Hugging Face folder of the small model."""
    save_hf(small_model(), tmp_path / "hf")
    return tmp_path / "hf"


def change_weights(folder: Path, change) -> None:
    """Replace a folder's weights with `change(weights)`."""
    weights = {name: weight.clone() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors")


def test_activation_function_is_gelu_new_by_default(hf_folder):
    change_config(hf_folder, activation_function="absent")
    assert load_hf(hf_folder).config.gelu == "tanh"


def change_config(folder: Path, **changes) -> None:
    """Change values in config.json; the value "absent" removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def without_prefix(weights: dict) -> dict:
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()}


def with_buffers(weights: dict) -> dict:
    """Add what old files contain: the causal mask of a layer, and the tied output layer once more."""
    extras = {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return weights | extras | {"lm_head.weight": without_prefix(weights)["wte.weight"].clone()}


def half_precision(weights: dict) -> dict:
    return {name: weight.half() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (without_prefix, 0),
        (with_buffers, 0),
        (lambda weights: with_buffers(without_prefix(weights)), 0),
        (half_precision, 0.05),
    ],
    ids=["no prefix", "buffers", "no prefix, buffers", "float16"],
)
def test_other_weight_formats_load(hf_folder, change, tolerance):
    change_weights(hf_folder, change)
    loaded = load_hf(hf_folder).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    with torch.no_grad():
        assert_close(loaded(random_tokens(1, 8)), small_model()(random_tokens(1, 8)), tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 24}, "n_inner is 24"),
        ({"n_embd": "absent"}, "n_embd"),
        ({"vocab_size": "absent"}, "vocab_size"),
        ({"n_head": 3}, "n_embd is 8: expected a multiple of n_head, which is 3"),
        ({"n_layer": "two"}, "n_layer is 'two'"),
    ],
)
def test_config_of_another_architecture_is_rejected(hf_folder, changes, message):
    change_config(hf_folder, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_hf(hf_folder)
    assert str(hf_folder) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", "\x00\xff"])
def test_malformed_config_is_rejected(hf_folder, text):
    (hf_folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json is corrupt"):
        load_hf(hf_folder)


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("h.1.mlp.c_fc.weight", None, "has no h.1.mlp.c_fc.weight"),
        ("wpe.weight", None, "has no wpe.weight"),
        ("wte.weight", torch.ones(48, 8), r"wte.weight .* has shape \(48, 8\), expected \(37, 8\)"),
        ("wpe.weight", torch.ones(15, 8), r"wpe.weight .* has shape \(15, 8\), expected \(16, 8\)"),
        ("h.0.attn.c_attn.weight", torch.ones(24, 8), r"c_attn.weight .* has shape \(8, 24\), expected \(24, 8\)"),
    ],
)
def test_missing_weights_and_wrong_shapes_are_rejected(hf_folder, name, weight, message):
    name = f"transformer.{name}"
    change_weights(hf_folder, lambda weights: {k: w for k, w in weights.items() if k != name})
    if weight is not None:
        change_weights(hf_folder, lambda weights: weights | {name: weight})
    with pytest.raises(UserError, match=message):
        load_hf(hf_folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_rejected(hf_folder, length):
    file = hf_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model\.safetensors is (corrupt|too small)"):
        load_hf(hf_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_folder_with_a_missing_file_is_rejected(hf_folder, name):
    (hf_folder / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        load_hf(hf_folder)


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_never_opened(hf_folder):
    (hf_folder / "model.safetensors").unlink()
    (hf_folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(hf_folder / "exploited")))
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_hf(hf_folder)
    assert not (hf_folder / "exploited").exists()


def test_hub_id_is_downloaded(hf_folder, monkeypatch):
    downloaded = []

    def download(repository: str, name: str) -> str:
        downloaded.append((repository, name))
        return str(hf_folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = load_hf("someone/gpt2-small")
    assert torch.equal(model.wpe.weight, small_model().wpe.weight)
    assert downloaded == [("someone/gpt2-small", "config.json"), ("someone/gpt2-small", "model.safetensors")]


@pytest.mark.parametrize("error", [ConnectionError("no route\nto the hub"), OSError("no such model")])
def test_unavailable_hub_id_is_rejected(monkeypatch, error):
    def download(*_):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = error_message(load_hf, "nobody/nothing")  # one line
    assert "nobody/nothing is neither a folder nor a model on the hub: no" in message


@pytest.mark.parametrize("size", [{"n_layer": 10**9}, {"n_embd": 10**9, "n_head": 1}, {"n_positions": 10**12}])
def test_impossible_sizes_are_rejected_before_memory_is_allocated(tmp_path, size):
    save_hf(GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=4)), tmp_path)
    change_config(tmp_path, **size)
    with pytest.raises(UserError, match=r"has no h\.1|sizes=|expected \(1000000000000, 4\)"):
        load_hf(tmp_path)


# ---- nanoGPT's ckpt.pt -----------------------------------------------------------------------------------------------

NANOGPT_ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": False, "vocab_size": 50_304}


class NanoGPT(nn.Module):
    """A model with nanoGPT's parameter names and arithmetic, written for these tests: exact GELU, biases optional."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size):
        super().__init__()
        self.n_head, sizes = (
            n_head,
            {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)},
        )

        def layer_norm() -> nn.LayerNorm:
            return nn.LayerNorm(n_embd, bias=bias)

        def block() -> nn.ModuleDict:
            parts = nn.ModuleDict({"ln_1": layer_norm(), "attn": nn.Module(), "ln_2": layer_norm(), "mlp": nn.Module()})
            for name, (rows, columns) in sizes.items():
                module, layer = name.split(".")
                setattr(parts[module], layer, nn.Linear(rows * n_embd, columns * n_embd, bias=bias))
            return parts

        embeddings = {"wte": nn.Embedding(vocab_size, n_embd), "wpe": nn.Embedding(block_size, n_embd)}
        blocks = nn.ModuleList(block() for _ in range(n_layer))
        self.transformer = nn.ModuleDict(embeddings | {"h": blocks, "ln_f": layer_norm()})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for name, parameter in self.named_parameters():  # no weight of one or bias of zero
            nn.init.normal_(parameter, mean=float("ln" in name and "weight" in name), std=0.5)

    def forward(self, tokens):
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.size(1)))
        mask = torch.ones(tokens.size(1), tokens.size(1)).tril() == 0
        for block in self.transformer["h"]:
            q, k, v = block["attn"].c_attn(block["ln_1"](x)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in (q, k, v))
            scores = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(mask, -torch.inf)
            x = x + block["attn"].c_proj((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
            x = x + block["mlp"].c_proj(nn.GELU()(block["mlp"].c_fc(block["ln_2"](x))))
        return self.lm_head(self.transformer["ln_f"](x))


def save_nanogpt(file: Path, *, args: dict | None = None, weights: dict | None = None, prefix: str = "", **changes):
    """Write a checkpoint as nanoGPT does; return its model. `args`, `weights` and `changes` replace values."""
    torch.manual_seed(0)
    model_args = NANOGPT_ARGS | (args or {})
    model = NanoGPT(**{name: value for name, value in model_args.items() if name in NANOGPT_ARGS})
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(4)[None]).sum().backward()
    optimizer.step()
    content = {
        "model": {prefix + name: weight for name, weight in (model.state_dict() | (weights or {})).items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"dropout": 0.1} | model_args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(3.1),
        "config": {"init_from": "scratch", "learning_rate": 6e-4, "compile": True},
    }
    content = {name: value for name, value in (content | changes).items() if value is not None}
    file.parent.mkdir(exist_ok=True)
    torch.save(content, file)
    return model.eval()


@pytest.mark.parametrize(
    ("args", "prefix"),
    [
        ({"bias": False}, ""),
        ({"bias": True}, "_orig_mod."),
        ({"bias": True, "vocab_size": 50_257}, "module._orig_mod."),  # from OpenAI's weights
    ],
)
@torch.no_grad()
def test_nanogpt_checkpoint_has_equal_logits(tmp_path, gpt2_tokenizer, args, prefix):
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    with torch.enable_grad():
        theirs = save_nanogpt(tmp_path / "out" / "ckpt.pt", args=args, prefix=prefix, weights=masks)
    loaded = load_pretrained(str(tmp_path / "out"))
    assert loaded.tokenizer is gpt2_tokenizer and not loaded.is_chat and loaded.source == str(tmp_path / "out")
    assert loaded.history == [{"source": str(tmp_path / "out"), "step": 2000}]
    ours = loaded.model.eval()
    assert ours.config == GPTConfig(16, 50_257, 2, 2, 8, gelu="none")
    tokens = torch.randint(50_257, (2, 16))
    assert_close(ours(tokens), theirs(tokens)[..., :50_257], 1e-4)
    tanh = GPT(replace(ours.config, gelu="tanh"))
    tanh.load_state_dict(ours.state_dict())
    assert (tanh(tokens) - ours(tokens)).abs().max() > 3e-4  # the comparison above detects the other GELU
    assert ours.wte.weight[50_257:].abs().max() == 0 and all(p.requires_grad for p in ours.parameters())
    (tmp_path / "out" / "ckpt.pt").rename(tmp_path / "model.pt")
    again = load_pretrained(str(tmp_path / "model.pt"))
    assert again.source == str(tmp_path / "model.pt") and torch.equal(again.model.wte.weight, ours.wte.weight)


def test_nanogpt_checkpoint_of_half_precision_weights_alone_loads(tmp_path, gpt2_tokenizer):
    model = save_nanogpt(tmp_path / "a.pt")
    half = {name: weight.bfloat16() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    content = {"model": half, "model_args": NANOGPT_ARGS}
    torch.save(content, tmp_path / "b.pt")
    loaded = load_pretrained(str(tmp_path / "b.pt"))
    assert loaded.model.wpe.weight.dtype == torch.float32 and loaded.history[0]["step"] is None
    assert torch.equal(loaded.model.wpe.weight, half["transformer.wpe.weight"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"args": {"vocab_size": 65}},
            "its vocabulary has 65 tokens, expected GPT-2's 50,257, or 50,304 with padding; ",
        ),
        ({"args": {"use_rmsnorm": True}}, "its model_args are .*use_rmsnorm, expected bias, block_size, dropout, "),
        ({"model_args": {"n_layer": 2}}, "its model_args are n_layer, expected"),
        ({"model_args": NANOGPT_ARGS | {"n_layer": 10**9}}, "ckpt.pt has no h.2.ln_1.weight"),
        ({"model_args": NANOGPT_ARGS | {"n_layer": 3}}, "ckpt.pt has no h.2.ln_1.weight"),
        (
            {"model_args": NANOGPT_ARGS | {"n_layer": 1}},
            r"ckpt.pt has h.1.attn.c_attn.(weight|bias), which is not in GPT-2",
        ),
        ({"model_args": NANOGPT_ARGS | {"n_head": 3}}, "n_embd is 8: expected a multiple of n_head, which is 3"),
        (
            {"model_args": NANOGPT_ARGS | {"n_embd": 16}},
            r"wte.weight .* has shape \(50257, 8\), expected \(50257, 16\)",
        ),
        ({"model_args": NANOGPT_ARGS | {"bias": True}}, "ckpt.pt has no h.0.ln_1.bias"),
        (
            {"model_args": NANOGPT_ARGS | {"vocab_size": 50_257}},
            "wte.weight has 50304 rows, expected 50257 from its model",
        ),
        ({"args": {"bias": True}, "model_args": NANOGPT_ARGS}, "it has biases, although its model_args say bias=False"),
        ({"model_args": [1]}, "is not a readable nanoGPT checkpoint"),
        ({"model": {1: torch.ones(2)}}, "is not a readable nanoGPT checkpoint"),
        ({"model": {"wte.weight": 3}}, "is not a readable nanoGPT checkpoint"),
        ({"model": None}, "is not a nanoGPT checkpoint: it has no 'model' and 'model_args'"),
        ({"weights": {"lm_head.weight": torch.ones(50_304, 8)}}, "lm_head.weight, is not tied to the embedding"),
        (
            {"weights": {"transformer.h.0.attn.c_attn.weight": torch.ones(8, 24)}},
            r"shape \(8, 24\), expected \(24, 8\)",
        ),
        ({"weights": {"transformer.h.0.attn.q_norm.weight": torch.ones(4)}}, "h.0.attn.q_norm.* is not in GPT-2"),
    ],
)
def test_nanogpt_checkpoint_of_another_architecture_is_rejected(tmp_path, changes, message):
    save_nanogpt(tmp_path / "ckpt.pt", **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(str(tmp_path))
    assert str(tmp_path / "ckpt.pt") in str(caught.value) and "\n" not in str(caught.value)


class Trap:
    """An object whose unpickling creates a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_pickled_objects_in_a_pt_file_are_not_executed(tmp_path, monkeypatch, form):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, content = tmp_path / "ckpt.pt", {"model": {}, "model_args": NANOGPT_ARGS, "config": Trap(tmp_path / "sprung")}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "torch")
    message = error_message(load_pretrained, str(tmp_path))
    expected = "ckpt.pt needs unpickling of posix.mkdir, which can execute code, so it is not loaded"
    assert (expected if form == "torch" else "other formats need unpickling, which can execute code") in message
    assert "\n" not in message and not (tmp_path / "sprung").exists()
    if form == "torch":
        torch.load(file, weights_only=False)
        assert (tmp_path / "sprung").exists()  # the trap works


def test_nanogpt_checkpoint_with_other_objects_is_refused(tmp_path):
    save_nanogpt(tmp_path / "ckpt.pt", config=argparse.Namespace(lr=1))
    assert "needs unpickling of argparse.Namespace, which" in error_message(load_pretrained, str(tmp_path))


def test_corrupt_and_missing_nanogpt_checkpoints(tmp_path):
    file = tmp_path / "ckpt.pt"
    assert f"{file}: no such file; give nanoGPT's ckpt.pt" in error_message(load_pretrained, str(file))
    file.mkdir()
    assert "no such file" in error_message(load_pretrained, str(tmp_path))
    file.rmdir()
    save_nanogpt(file)
    content = file.read_bytes()
    for cut in (0, 3, 2000, len(content) - 1):
        file.write_bytes(content[:cut])
        assert "is corrupt, or not in the zip format of torch.save" in error_message(load_pretrained, str(file))
