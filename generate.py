"""Write with a model, or talk to it.

    python generate.py --prompt "Why is the sky blue?"              # runs/dolly if it is there, else runs/gpt2
    python generate.py --chat                                       # a conversation in the terminal
    python generate.py --checkpoint runs/gpt2 --prompt "The sea" --num_samples 4 --max_tokens 100
    python generate.py --checkpoint openai-community/gpt2 --prompt "The sea"

A model that was finetuned answers the prompt as a question; --raw continues it as a text, as a pretrained model
always does.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

import checkpoint
import cli
from checkpoint import Loaded
from cli import check
from inference import prepare
from sampling import Sampling, answer_prompt, seeded, write
from training import find_device


@dataclass(frozen=True)
class Config:
    prompt: str | None = None
    """The text to go on from, or the question to answer."""
    chat: bool = False
    """Hold a conversation of several turns."""
    checkpoint: str | None = None
    """A run (its best checkpoint), a checkpoint, a GPT-2 folder or hub id; None takes runs/dolly, else runs/gpt2."""
    raw: bool = False
    """Continue the prompt as plain text, even with a chat model."""
    system: str | None = None
    """What a chat model is told before the conversation."""
    max_tokens: int = 256
    """The most tokens that are made, per sample or answer."""
    temperature: float = 0.8
    """Below 1 likelier, above 1 wilder; 0 always takes the likeliest token."""
    top_k: int | None = 200
    """Draw from the k likeliest tokens; None from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability; 1 from all."""
    num_samples: int = 1
    """How many texts are made, together in one batch."""
    seed: int | None = None
    """The same seed gives the same text; None another each time."""
    device: str | None = None
    """cuda, mps or cpu; None takes the best there is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights."""
    quantize: Literal["int8"] | None = None
    """Weights of 8 bits: on a CPU more than twice as fast, and a little less exact."""


def main(config: Config) -> None:
    check_config(config)
    device = find_device(config.device)
    check(config.quantize is None or device.type == "cpu", "--quantize is for CPUs: add --device cpu, or leave it out")
    loaded = checkpoint.load(config.checkpoint)
    check(loaded.chat or not config.chat, f"{loaded.source} is not a chat model: finetune it first, or use --prompt")
    check(config.system is None or (loaded.chat and not config.raw), "--system is for a chat model, and without --raw")
    prepare(loaded.model, device, getattr(torch, config.dtype), config.quantize is not None)
    writer = Writer(config, loaded, device)
    if config.chat:
        hold_conversation(config, writer)
    elif loaded.chat and not config.raw:
        writer.answer([*messages_before(config), message("user", config.prompt)])
    else:
        writer.go_on(config.prompt)


def check_config(config: Config) -> None:
    """Everything that can be wrong with the values alone."""
    check(config.chat or config.prompt is not None, "nothing to do: give a --prompt, or --chat for a conversation")
    check(not (config.chat and config.prompt is not None), "--chat and --prompt exclude each other: type in the chat")
    check(not (config.chat and config.num_samples > 1), "--chat gives one answer: leave --num_samples out")
    check(not (config.chat and config.raw), "--chat and --raw exclude each other: a chat needs the chat format")
    exact = config.dtype == "float32"
    check(config.quantize is None or exact, "--quantize and --dtype exclude each other: 8-bit weights have no other")
    sampling(config)
    cli.check_range("num_samples", config.num_samples, 1)
    if config.seed is not None:
        cli.check_range("seed", config.seed, 0, 2**63 - 1)


def sampling(config: Config) -> Sampling:
    """How tokens are chosen.  Raises `UserError` where a value is out of range."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.max_tokens)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def messages_before(config: Config) -> list[dict]:
    """What every conversation begins with."""
    return [message("system", config.system)] if config.system is not None else []


class Writer:
    """Makes text and shows it as it is made."""

    def __init__(self, config: Config, loaded: Loaded, device: torch.device):
        self.config, self.loaded, self.sampling = config, loaded, sampling(config)
        self.generator = seeded(config.seed, device)

    def answer(self, messages: list[dict]) -> str:
        """Print the assistant's next message and return its text."""
        loaded, block_size = self.loaded, self.loaded.model.config.block_size
        prompt, left_out = answer_prompt(loaded.model, loaded.tokenizer, messages, self.config.max_tokens)
        if left_out:
            whole = len(prompt) + left_out
            warn(f"the conversation has {whole} tokens, the context {block_size}: its oldest part is left out")
        return self.write(prompt)

    def go_on(self, text: str) -> None:
        """Print a text and its continuation."""
        tokenizer, block_size = self.loaded.tokenizer, self.loaded.model.config.block_size
        prompt = [tokenizer.end_of_text, *tokenizer.encode(text)]
        if len(prompt) > block_size:
            warn(f"the prompt has {len(prompt)} tokens, the context {block_size}: only its end is used")
        self.write(prompt, echo=text)

    def write(self, prompt: list[int], echo: str = "") -> str:
        """Continue a prompt and print the result: one sample token by token, several when they are complete.

        Args:
            echo: what to print before each sample.

        Returns:
            the first sample's text.
        """
        loaded, n = self.loaded, self.config.num_samples
        texts = [""] * n
        if n == 1:
            show(echo)
        try:
            for pieces in write(loaded.model, loaded.tokenizer, prompt, self.sampling, self.generator, n):
                texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
                if n == 1:
                    show(pieces[0] or "")
        except KeyboardInterrupt:
            show("\n")
            raise
        show("\n" if n == 1 else "".join(f"--- sample {i}\n{echo}{text}\n" for i, text in enumerate(texts, 1)))
        return texts[0]


def hold_conversation(config: Config, writer: Writer) -> None:
    """Read, answer, and remember, until the input ends (Ctrl-D) or Ctrl-C."""
    messages = messages_before(config)
    print(f"{writer.loaded.source}: type, and press Enter; Ctrl-D or Ctrl-C ends the conversation")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text.strip():
            messages.append(message("user", text))
            messages.append(message("assistant", writer.answer(messages)))


def show(text: str) -> None:
    print(text, end="", flush=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
