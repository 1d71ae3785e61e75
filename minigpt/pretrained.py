"""A model from any source: a run, a checkpoint, a Hugging Face GPT-2 folder, a hub id or nanoGPT's ckpt.pt; and back to
a Hugging Face folder."""

import contextlib
import json
import os
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.checkpoint import find_best, list_checkpoints, load_model, read_meta, verify
from minigpt.cli import UserError
from minigpt.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, read_tokenizer
from model import GPT, GPTConfig

# Settings of transformers' GPT2Config that this model implements.
SUPPORTED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # fields with the same name in GPTConfig and GPT2Config
ACTIVATIONS = {"tanh": "gelu_new", "none": "gelu"}  # names of both GELUs in GPTConfig and GPT2Config
NANOGPT_ARGS = {"block_size", *SIZES, "bias", "dropout"}  # the "model_args" of nanoGPT's ckpt.pt


@dataclass(frozen=True)
class PretrainedModel:
    """A model and its origin.

    Attributes:
        tokenizer: the tokenizer it was trained with.
        is_chat: whether it was finetuned for the chat format.
        source: the folder, file or hub id.
        history: the training runs that produced it, oldest first: "source" of the data, "step", "metrics", and
            "config", the flags; "source" and perhaps "step" only for weights that were trained elsewhere.
    """

    model: GPT
    tokenizer: Tokenizer
    is_chat: bool
    source: str
    history: list[dict]


def load_pretrained(source: str | None, chat: bool = False) -> PretrainedModel:
    """Load a model from a run (its best checkpoint), a checkpoint, a Hugging Face GPT-2 folder or a hub id.

    nanoGPT's `ckpt.pt`, or the folder that holds it, is loaded as well. None loads the newest run under runs/, with
    `chat` the newest chat run, and prints its checkpoint on stderr. Raises `UserError` if the source does not exist or
    is corrupt.
    """
    folder = find_newest_run(chat) if source is None else Path(source)
    if list_checkpoints(folder):
        folder = find_best(folder)
    if source is None and os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {folder} (the newest {'chat ' * chat}run)", file=sys.stderr)
    if (folder / "meta.json").is_file():
        return load_checkpoint(folder)
    if folder.suffix == ".pt" or (folder / "ckpt.pt").exists():
        return load_nanogpt(folder)
    is_path = folder.is_dir() or source.count("/") > 1 or source.startswith((".", "/", "runs/"))
    if is_path and not (folder / "config.json").is_file():
        raise UserError(
            f"{source}: no checkpoint found; give a run, a checkpoint, a Hugging Face folder or hub id, or ckpt.pt;"
            f" {format_runs()}"
        )
    model = load_hf(source)
    return from_parts(model, find_tokenizer(source, model.config.vocab_size), source, [{"source": source}])


def load_checkpoint(folder: Path) -> PretrainedModel:
    """Load a checkpoint. Raises `UserError` if it is corrupt, which names another checkpoint of the run."""
    try:
        meta = read_meta(folder)
        model, tokenizer = load_model(folder, meta), load_tokenizer(meta["tokenizer"], folder)
    except UserError as error:
        others = (other for other in reversed(list_checkpoints(folder.parent)) if other != folder and is_whole(other))
        other = next(others, None)
        raise UserError(f"{error}; use {other} instead, which is whole" if other else str(error)) from None
    history = [*meta.get("history", []), {key: meta.get(key) for key in ("source", "step", "metrics", "config")}]
    return from_parts(model, tokenizer, str(folder), history)


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


def find_tokenizer(source: str, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder or hub id: its tokenizer.json.

    Without one, it is the built-in vocabulary of that size. Raises `UserError` if the file is corrupt or not supported.
    """
    try:
        file = find_hf_file(source, TOKENIZER_FILE)
    except UserError:
        tokenizer = load_tokenizer("bytes")  # needs no download
        return tokenizer if vocab_size in (tokenizer.vocab_size, tokenizer.chat_vocab_size) else load_tokenizer("gpt2")
    return read_tokenizer(file, vocab_size)


def load_hf(source: str | Path) -> GPT:
    """Load a Hugging Face GPT-2 folder (`config.json`, `model.safetensors`) or hub id ("openai-community/gpt2").

    Raises `UserError` if it is not found, corrupt, or not a GPT-2 that this model implements.
    """
    config_file, weights_file = (find_hf_file(source, name) for name in ("config.json", "model.safetensors"))
    try:
        config = config_from_hf(json.loads(config_file.read_text()))
        return build_model(config, weights_from_hf(weights_file), weights_file)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} is not a readable GPT-2: {' '.join(str(error).split())}") from None


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
        "activation_function": ACTIVATIONS[config.gelu],
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
    gelu = [name for name, hf_name in ACTIVATIONS.items() if config.get("activation_function", "gelu_new") == hf_name]
    if not gelu:
        raise ValueError(
            f"activation_function is {config['activation_function']!r}; only 'gelu_new' and 'gelu' are supported"
        )
    sizes = {name: config[name] for name in SIZES}
    return GPTConfig(block_size=config.get("n_positions", 1024), gelu=gelu[0], **sizes)


def weights_from_hf(file: Path) -> dict[str, Tensor]:
    """Return the weights of a Hugging Face file in this model's layout. Raises `ValueError` if it is corrupt."""
    try:
        stored = {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file.name} is corrupt: {error}") from None
    return {name: weight.t() if is_linear(name) else weight for name, weight in stored.items()}


def build_model(config: GPTConfig, stored: dict[str, Tensor], file: Path) -> GPT:
    """Return a model with the stored weights, which have no padding. Other weights among them are ignored.

    Raises `ValueError` if one is missing or has another shape.
    """
    if file.stat().st_size < config.num_parameters:  # before memory is allocated
        raise ValueError(f"{file.name} is too small for the model of its configuration")
    model = GPT(config)
    weights = {}
    for name, own in model.state_dict().items():
        if name not in stored:
            raise ValueError(f"{file.name} has no {name}")
        weight = stored[name]
        expected = (config.vocab_size, *own.shape[1:]) if name == "wte.weight" else tuple(own.shape)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name} in {file.name} has shape {tuple(weight.shape)}, expected {expected}")
        weights[name] = weight
    padding = torch.zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    weights["wte.weight"] = torch.cat([weights["wte.weight"].float(), padding])
    model.load_state_dict(weights)
    return model


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


def load_nanogpt(path: Path) -> PretrainedModel:
    """Load nanoGPT's `ckpt.pt`, or that of a folder. Nothing in the file is executed.

    nanoGPT has computed the exact GELU since June 2023. A model without biases gets biases of zero.
    Raises `UserError` if the file is missing, corrupt, or not a GPT-2 with GPT-2's vocabulary.
    """
    file = path / "ckpt.pt" if path.is_dir() else path
    content = read_pt(file)
    try:
        args, stored = content["model_args"], content["model"]
        if args.keys() | {"dropout"} != NANOGPT_ARGS:  # another architecture
            raise ValueError(f"its model_args are {', '.join(args)}, expected {', '.join(sorted(NANOGPT_ARGS))}")
        if args["vocab_size"] not in (50_257, 50_304):
            raise ValueError(
                f"its vocabulary has {args['vocab_size']} tokens, expected GPT-2's 50,257, or 50,304 with padding; the"
                " characters of a character-level model are in a pickle, meta.pkl, which is never loaded"
            )
        sizes = {name: args[name] for name in SIZES if name != "vocab_size"}
        config = GPTConfig(block_size=args["block_size"], vocab_size=50_257, gelu="none", **sizes)
        weights = weights_from_nanogpt(stored, args)
        model = build_model(config, weights, file)
        if unknown := weights.keys() - model.state_dict().keys():
            raise ValueError(f"{file.name} has {min(unknown)}, which is not in GPT-2")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} is not a readable nanoGPT checkpoint: {' '.join(str(error).split())}") from None
    step = content.get("iter_num")
    history = [{"source": str(path), "step": step if isinstance(step, int) else None}]
    return from_parts(model, load_tokenizer("gpt2"), str(path), history)


def read_pt(file: Path) -> dict:
    """Return the content of a `.pt` file: tensors, numbers and text only, since unpickling could execute code."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; give nanoGPT's ckpt.pt, or the folder that holds it")
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise UserError(
            f"{file} needs unpickling{f' of {name[1]}' if name else ''}, which can execute code, so it is not loaded:"
            " save it again with tensors, numbers and text only"
        ) from None
    except OSError:
        raise
    except Exception:  # a corrupt file can raise any type
        raise UserError(
            f"{file} is corrupt, or not in the zip format of torch.save; other formats need unpickling, which can"
            " execute code, and are not loaded"
        ) from None
    if not (isinstance(content, dict) and {"model", "model_args"} <= content.keys()):
        raise UserError(f"{file} is not a nanoGPT checkpoint: it has no 'model' and 'model_args'")
    return content


def weights_from_nanogpt(stored: dict[str, Tensor], args: dict) -> dict[str, Tensor]:
    """Return nanoGPT's weights under this model's names, without padding and with biases."""
    weights = {re.sub(r"^(_orig_mod\.|module\.)*(transformer\.)?", "", name): w for name, w in stored.items()}
    weights = {name: w for name, w in weights.items() if not re.fullmatch(r"h\.\d+\.attn\.bias", name)}  # causal masks
    wte = weights["wte.weight"]
    if not torch.equal(weights.pop("lm_head.weight", wte), wte):
        raise ValueError("its output layer, lm_head.weight, is not tied to the embedding, wte.weight")
    if len(wte) != args["vocab_size"]:
        raise ValueError(f"wte.weight has {len(wte)} rows, expected {args['vocab_size']} from its model_args")
    weights["wte.weight"] = wte[:50_257]
    if not args["bias"]:
        if any(name.endswith(".bias") for name in weights):
            raise ValueError("it has biases, although its model_args say bias=False")
        layers = {name.removesuffix(".weight"): len(w) for name, w in weights.items() if name[:3] not in ("wte", "wpe")}
        weights |= {f"{layer}.bias": torch.zeros(size) for layer, size in layers.items()}
    return weights
