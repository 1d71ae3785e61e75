"""A model from any source: a run, a checkpoint, a Hugging Face GPT-2 folder or a hub id; and back to a folder."""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.checkpoint import find_best, list_checkpoints, load_model, read_meta, verify
from minigpt.cli import UserError
from minigpt.files import read_json
from minigpt.tokenizer import CHAT_TOKENS, TOKENIZER_NAMES, Tokenizer, load_tokenizer
from model import GPT, GPTConfig

# Settings of transformers' GPT2Config that this model implements.
SUPPORTED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # fields with the same name in GPTConfig and GPT2Config


@dataclass(frozen=True)
class PretrainedModel:
    """A model and its origin.

    Attributes:
        tokenizer: the tokenizer it was trained with.
        is_chat: whether it was finetuned for the chat format.
        source: the folder or hub id.
        history: the training runs that produced it, oldest first: "source" of the data, "step", "metrics", and
            "config", the flags; {"source": SOURCE} only for weights that were trained elsewhere.
    """

    model: GPT
    tokenizer: Tokenizer
    is_chat: bool
    source: str
    history: list[dict]


def load_pretrained(source: str | None, chat: bool = False) -> PretrainedModel:
    """Load a model from a run (its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder, or a hub id.

    None loads the newest run under runs/, with `chat` the newest chat run, and prints its checkpoint on stderr. Raises
    `UserError` if the source does not exist or is corrupt.
    """
    folder = find_newest_run(chat) if source is None else Path(source)
    if list_checkpoints(folder):
        folder = find_best(folder)
    if source is None and os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {folder} (the newest {'chat ' * chat}run)", file=sys.stderr)
    if (folder / "meta.json").is_file():
        return load_checkpoint(folder)
    is_path = folder.is_dir() or source.count("/") > 1 or source.startswith((".", "/", "runs/"))
    if is_path and not (folder / "config.json").is_file():
        raise UserError(
            f"{source}: no checkpoint found; give a run, a checkpoint, a Hugging Face GPT-2 folder or a hub id;"
            f" {format_runs()}"
        )
    model = load_hf(source)
    loaded = from_parts(model, guess_tokenizer(model.config.vocab_size), source, [{"source": source}])
    check_hf_tokenizer(loaded)
    return loaded


def load_checkpoint(folder: Path) -> PretrainedModel:
    """Load a checkpoint. Raises `UserError` if it is corrupt, which names another checkpoint of the run."""
    try:
        meta = read_meta(folder)
        model = load_model(folder, meta)
    except UserError as error:
        others = (other for other in reversed(list_checkpoints(folder.parent)) if other != folder and is_whole(other))
        other = next(others, None)
        raise UserError(f"{error}; use {other} instead, which is whole" if other else str(error)) from None
    history = [*meta.get("history", []), {key: meta.get(key) for key in ("source", "step", "metrics", "config")}]
    return from_parts(model, load_tokenizer(meta["tokenizer"]), str(folder), history)


def is_whole(checkpoint: Path) -> bool:
    """Return whether no file of a checkpoint is corrupt."""
    with contextlib.suppress(UserError):
        verify(checkpoint)
        return True
    return False


def find_newest_run(chat: bool) -> Path:
    """Return the run under runs/ with the newest checkpoint, or the newest chat run. Raises `UserError` if none."""
    runs = [run for run in list_runs() if is_chat_run(run) or not chat]
    if runs:
        return runs[-1]
    if chat:
        raise UserError(
            f"no chat run under runs/: finetune a model with finetune.py, or give --checkpoint; {format_runs()}"
        )
    raise UserError("no run under runs/: train a model with pretrain.py, or give --checkpoint")


def list_runs() -> list[Path]:
    """Return the runs under runs/ that have a checkpoint, the one with the newest checkpoint last."""
    newest = {run: checkpoints[-1] for run in Path("runs").glob("*") if (checkpoints := list_checkpoints(run))}
    return sorted(newest, key=lambda run: (newest[run] / "meta.json").stat().st_mtime)


def is_chat_run(run: Path) -> bool:
    """Return whether finetune.py wrote a run, whose flags have --init."""
    with contextlib.suppress(UserError):
        return "init" in read_meta(list_checkpoints(run)[-1]).get("identity", {})
    return False


def format_runs() -> str:
    """Return the list of runs under runs/, for an error message."""
    runs = ", ".join(f"{run} (chat)" if is_chat_run(run) else str(run) for run in reversed(list_runs()))
    return f"existing runs: {runs}" if runs else "there is no run under runs/: train one with pretrain.py"


def from_parts(model: GPT, tokenizer: Tokenizer, source: str, history: list[dict]) -> PretrainedModel:
    """Combine model and tokenizer. Raises `UserError` if the vocabulary sizes differ.

    A model with the chat tokens in its vocabulary is a chat model.
    """
    size, text_size, chat_size = model.config.vocab_size, tokenizer.vocab_size, tokenizer.chat_vocab_size
    if size not in (text_size, chat_size):
        raise UserError(
            f"{source} has a vocabulary of {size} tokens; {tokenizer.name} has {text_size}, or {chat_size} with chat"
            " tokens"
        )
    return PretrainedModel(model, tokenizer, size == chat_size, source, history)


def guess_tokenizer(vocab_size: int) -> Tokenizer:
    """Return the tokenizer with this vocabulary size, with or without chat tokens; gpt2 if there is none."""
    for name in reversed(TOKENIZER_NAMES):  # bytes needs no download
        tokenizer = load_tokenizer(name)
        if vocab_size in (tokenizer.vocab_size, tokenizer.chat_vocab_size):
            break
    return tokenizer


def check_hf_tokenizer(loaded: PretrainedModel) -> None:
    """Compare the tokenizer.json of a Hugging Face folder or hub id with our tokenizer.

    Raises `UserError` if they differ. Without tokenizer.json nothing is checked.
    """
    try:
        file = find_hf_file(loaded.source, "tokenizer.json")
    except UserError:
        return
    content, tokenizer = read_json(file), loaded.tokenizer
    try:
        vocab = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError):
        raise UserError(f"{file} is corrupt: it has no vocabulary") from None
    # Compare tokens of printable ASCII, which the file stores as they are; other bytes are stored in an encoding.
    tokens = ((tokenizer.token_bytes(token), token) for token in range(tokenizer.end_of_text))
    ours = {text.decode(): token for text, token in tokens if all(0x21 <= byte <= 0x7E for byte in text)}
    if not ours.items() <= vocab.items():
        raise UserError(f"{loaded.source} has other tokens than {tokenizer.name}, the tokenizer of its vocabulary size")
    special = {token: tokenizer.vocab_size + i for i, token in enumerate(CHAT_TOKENS)} if loaded.is_chat else {}
    if not special.items() <= vocab.items():
        raise UserError(f"{loaded.source} has another chat format: it lacks {', '.join(CHAT_TOKENS)}")


def load_hf(source: str | Path) -> GPT:
    """Load a Hugging Face GPT-2 folder (`config.json`, `model.safetensors`) or hub id ("openai-community/gpt2").

    Raises `UserError` if it is not found, corrupt, or not a GPT-2 that this model implements.
    """
    config_file, weights_file = (find_hf_file(source, name) for name in ("config.json", "model.safetensors"))
    try:
        config = config_from_hf(json.loads(config_file.read_text()))
        if weights_file.stat().st_size < 2 * config.num_parameters:  # before memory is allocated
            raise ValueError(f"{weights_file.name} is too small for the model of {config_file.name}")
        model = GPT(config)
        model.load_state_dict(weights_from_hf(model, weights_file))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is not a readable GPT-2: {' '.join(str(error).split())}") from None
    return model


def save_hf(model: GPT, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` for `transformers.GPT2LMHeadModel`, without padding."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, weight in model.state_dict().items():
        weight = weight[: model.config.vocab_size] if name == "wte.weight" else weight
        weight = weight.t() if is_linear(name) else weight
        weights[f"transformer.{name}"] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(model.config), indent=2) + "\n")


def is_linear(name: str) -> bool:
    """Return whether a parameter is a weight that transformers stores as (in, out), and nn.Linear as (out, in)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def config_to_hf(config: GPTConfig) -> dict:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        **{name: getattr(config, name) for name in SIZES},
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),  # n_ctx: for llama.cpp's converter
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), min(config.vocab_size - 1, 50_256)),
        "layer_norm_epsilon": 1e-5,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


def config_from_hf(config: dict) -> GPTConfig:
    for name, value in SUPPORTED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r}; only {value!r} is supported")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise ValueError(f"n_inner is {config['n_inner']}; only 4 * n_embd is supported")
    return GPTConfig(block_size=config.get("n_positions", 1024), **{name: config[name] for name in SIZES})


def weights_from_hf(model: GPT, file: Path) -> dict[str, Tensor]:
    try:
        stored = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file.name} is corrupt: {error}") from None
    weights = {}
    for name, own in model.state_dict().items():
        if name not in stored:
            raise ValueError(f"{file.name} has no {name}")
        weight = stored[name].t() if is_linear(name) else stored[name]
        expected = (model.config.vocab_size, *own.shape[1:]) if name == "wte.weight" else tuple(own.shape)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} in {file.name} has shape {tuple(weight.shape)}, expected {expected}")
        weights[name] = weight
    padding = torch.zeros(model.config.padded_vocab_size - model.config.vocab_size, model.config.n_embd)
    weights["wte.weight"] = torch.cat([weights["wte.weight"].float(), padding])
    return weights


def find_hf_file(source: str | Path, name: str) -> Path:
    """Return a file of a Hugging Face folder or hub id, downloaded once. Raises `UserError` if it does not exist."""
    if Path(source).is_dir():
        file = Path(source) / name
        if not file.is_file():
            raise UserError(f"{source} has no {name}, which a Hugging Face GPT-2 folder needs")
        return file
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(str(source), name))
    except Exception as error:  # the client raises many types: invalid name, unknown model, no network
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source} is neither a folder nor a model on the hub: {reason}; {format_runs()}") from None
