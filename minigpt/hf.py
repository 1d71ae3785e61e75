"""GPT-2 in Hugging Face's format: a folder with config.json and model.safetensors, or a hub id."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.checkpoint import build_model
from minigpt.cli import UserError
from minigpt.files import read_json, write_json
from minigpt.runs import format_runs
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


class MissingFileError(UserError):
    """A Hugging Face folder or hub id does not have a file."""


def load_hf(source: str | Path) -> GPT:
    """Load a Hugging Face GPT-2 folder (`config.json`, `model.safetensors`) or hub id ("openai-community/gpt2").

    Raises `UserError` if it is not found, corrupt, or not a GPT-2 that this model implements.
    """
    config_file, weights_file = (find_hf_file(source, name) for name in ("config.json", "model.safetensors"))
    try:
        config = config_from_hf(read_json(config_file))
        return build_model(config, weights_from_hf(weights_file), weights_file.name)
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
    write_json(folder / "config.json", config_to_hf(model.config))


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


def find_hf_file(source: str | Path, name: str) -> Path:
    """Return a file of a Hugging Face folder or hub id, downloaded once. Raises `UserError` if it does not exist."""
    if Path(source).is_dir():
        file = Path(source) / name
        if not file.is_file():
            raise MissingFileError(f"{source} has no {name}, which a Hugging Face GPT-2 folder needs")
        return file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name))
    except Exception as error:  # the client raises many types: invalid name, unknown model, no network
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise MissingFileError(f"{source} has no {name}, which a Hugging Face GPT-2 needs") from None
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source} is neither a folder nor a model on the hub: {reason}; {format_runs()}") from None
