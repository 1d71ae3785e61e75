"""GPT-2 in nanoGPT's format: ckpt.pt."""

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from minigpt.checkpoint import build_model
from minigpt.cli import UserError
from minigpt.hf import SIZES
from model import GPT, GPTConfig

NANOGPT_ARGS = {"block_size", *SIZES, "bias", "dropout"}  # the "model_args" of nanoGPT's ckpt.pt


def load_nanogpt(path: Path) -> tuple[GPT, int | None]:
    """Return the model and the step of nanoGPT's `ckpt.pt`, or that of a folder. Nothing in the file is executed.

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
        model = build_model(config, weights, file.name)
        if unknown := weights.keys() - model.state_dict().keys():
            raise ValueError(f"{file.name} has {min(unknown)}, which is not in GPT-2")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{file} is not a readable nanoGPT checkpoint: {' '.join(str(error).split())}") from None
    step = content.get("iter_num")
    return model, step if isinstance(step, int) else None


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
    return {name: weight.clone() for name, weight in weights.items()}  # not mapped to the file
