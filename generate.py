"""Generate text with a model, or chat with it.

    python generate.py --prompt "Why is the sky blue?"              # the newest run under runs/
    python generate.py --chat                                       # a conversation with the newest chat run
    python generate.py --checkpoint runs/gpt2 --prompt "The sea" --num_samples 4 --max_tokens 100
    python generate.py --checkpoint openai-community/gpt2 --prompt "The sea"

A chat model answers the prompt; with --raw it continues the prompt as text, as a pretrained model always does. GPT-2
124M generates about 40 tokens/s on two CPU cores.
"""

from __future__ import annotations

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minigpt import cli
from minigpt.cli import InferenceConfig, UserError
from minigpt.sampling import SamplingParams

if TYPE_CHECKING:  # torch is imported in main(), so that --help does not wait for it
    from minigpt.terminal_chat import TextPrinter


@dataclass(frozen=True)
class Config(SamplingParams, InferenceConfig):
    prompt: str | None = None
    """The text to continue, or the question to answer."""
    chat: bool = False
    """Chat in the terminal."""
    raw: bool = False
    """Continue the prompt as plain text, even with a chat model."""
    system: str | None = None
    """The system message of a chat model."""
    num_samples: int = 1
    """Number of samples, generated as one batch."""
    seed: int | None = None
    """Random seed; default: a different one each time."""


def main(config: Config) -> None:
    check_config(config)
    from minigpt.inference import load_for_inference, make_generator
    from minigpt.terminal_chat import TextPrinter, chat

    loaded, device = load_for_inference(config, config.chat)
    if config.chat and not loaded.is_chat:
        raise UserError(f"{loaded.source} is not a chat model: finetune it first, or use --prompt")
    if config.system is not None and (config.raw or not loaded.is_chat):
        raise UserError("--system needs a chat model, without --raw")
    printer = TextPrinter(loaded, config, make_generator(config.seed, device))
    system_messages = [{"role": "system", "content": config.system}] if config.system is not None else []
    if config.chat:
        chat(printer, system_messages)
    elif loaded.is_chat and not config.raw:
        printer.answer([*system_messages, {"role": "user", "content": config.prompt}], config.num_samples)
    else:
        continue_text(printer, config.prompt, config.num_samples)


def check_config(config: Config) -> None:
    """Check the flags before torch is imported. Raises `UserError`."""
    if not config.chat and config.prompt is None:
        raise UserError("nothing to do: give a --prompt, or --chat for a conversation")
    conflicts = {"prompt": config.prompt is not None, "num_samples": config.num_samples > 1, "raw": config.raw}
    for name, given in conflicts.items():
        if config.chat and given:
            raise UserError(f"--chat and --{name} cannot be combined: give one of them")
    cli.check_range("num_samples", config.num_samples, 1)
    cli.check_range("seed", config.seed, 0, 2**63 - 1)


def continue_text(printer: TextPrinter, text: str, n_samples: int) -> None:
    """Print a text and its continuation."""
    tokenizer, block_size = printer.loaded.tokenizer, printer.loaded.model.config.block_size
    prompt = [tokenizer.end_of_text, *tokenizer.encode(text)]
    if len(prompt) > block_size:
        print(
            f"warning: the prompt has {len(prompt)} tokens, the context {block_size}: only its end is used",
            file=sys.stderr,
        )
    printer.print_samples(prompt, n_samples, echo=text)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
