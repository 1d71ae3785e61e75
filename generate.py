"""Write with a model, or talk to it.

    python generate.py --prompt "Why is the sky blue?"              # runs/dolly if it is there, else runs/gpt2
    python generate.py --chat                                       # a conversation in the terminal; see its /help
    python generate.py --checkpoint runs/gpt2 --prompt "The sea" --num_samples 4 --max_tokens 100
    python generate.py --checkpoint openai-community/gpt2 --prompt "The sea"

A model that was finetuned answers the prompt as a question; --raw continues it as a text, as a pretrained model
always does.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import cli
from checkpoint import Loaded
from cli import UserError, check
from inference import load_prepared
from sampling import Sampling, answer_prompt, seeded, write

HELP = """\
/reset        forget the conversation; the system message stays
/system TEXT  what the model is told before the conversation; without TEXT nothing
/save FILE    append the conversation to a .jsonl file, as prepare_dolly.py --files reads it
/exit         leave, as Ctrl-D does
A line that ends in \\ goes on in the next one; a pasted text is one message, however many lines it has.
Arrow up brings back what you typed before.  Ctrl-C stops an answer."""


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
    loaded, device = load_prepared(config.checkpoint, config.device, config.dtype, config.quantize)
    check(loaded.chat or not config.chat, f"{loaded.source} is not a chat model: finetune it first, or use --prompt")
    check(config.system is None or (loaded.chat and not config.raw), "--system is for a chat model, and without --raw")
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
        self.warned = False

    def answer(self, messages: list[dict]) -> str:
        """Print the assistant's next message and return its text."""
        loaded, block_size = self.loaded, self.loaded.model.config.block_size
        prompt, left_out = answer_prompt(loaded.model, loaded.tokenizer, messages, self.config.max_tokens)
        if left_out and not self.warned:
            self.warned, whole = True, len(prompt) + left_out
            much = f"{whole} tokens, too many for the context of {block_size} and an answer"
            warn(f"the conversation has {much}: its oldest part is left out")
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
            the first sample's text; in a conversation at a terminal, Ctrl-C ends it there.
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
            if not (self.config.chat and sys.stdin.isatty()):
                raise
            return texts[0]
        show("\n" if n == 1 else "".join(f"--- sample {i}\n{echo}{text}\n" for i, text in enumerate(texts, 1)))
        return texts[0]


class Conversation:
    """What was said in the terminal, and the commands that steer it."""

    def __init__(self, config: Config, writer: Writer):
        self.writer, self.turns = writer, []
        self.before = messages_before(config)
        self.check_room(self.before)

    def check_room(self, before: list[dict]) -> None:
        """Raise `UserError` where a system message leaves no room for any conversation."""
        answer_prompt(self.writer.loaded.model, self.writer.loaded.tokenizer, [*before, message("user", "?")], 1)

    def say(self, text: str) -> None:
        """Take a message of the user's: print the answer, remember both."""
        question = message("user", text)
        answer = self.writer.answer([*self.before, *self.turns, question])
        self.turns += [question, message("assistant", answer)]

    def obey(self, line: str) -> None:
        """Carry out a command.  Raises `UserError` where it cannot be, with nothing changed."""
        name, rest = [*line.split(maxsplit=1), ""][:2]
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.turns, self.writer.warned = [], False
            print("the conversation is forgotten" + ("; the system message stays" if self.before else ""))
        elif name == "/system":
            self.instruct(rest.rstrip())
        elif name == "/save":
            self.save(rest.rstrip())
        else:
            raise UserError(f"there is no command {name}: /help lists them; a space before the / sends it as a message")

    def instruct(self, text: str) -> None:
        """Set the system message, or take it away where there is no text."""
        old, before = self.before, [message("system", text)] if text else []
        self.check_room(before)
        self.before = before
        was = f"; it was: {old[0]['content']}" if old else ""
        print(f"the system message is: {text}" if text else f"there is no system message now{was}")

    def save(self, file: str) -> None:
        """Append the conversation to a file, as a record that prepare_dolly.py reads."""
        check(bool(file), "/save needs the name of a file: /save FILE.jsonl")
        check(bool(self.turns), "there is nothing to save yet: say something first")
        check(file.endswith(".jsonl"), f"/save {file}: the name must end in .jsonl, for prepare_dolly.py to read it")
        path, record = Path(os.path.expanduser(file)), {"messages": [*self.before, *self.turns]}
        try:
            with open(path, "a+b") as out:
                if out.tell():  # another record is there: if it ends without a line break, it gets one
                    out.seek(-1, os.SEEK_END)
                    out.write(b"" if out.read() == b"\n" else b"\n")
                out.write(json.dumps(record).encode() + b"\n")
        except (OSError, ValueError) as error:  # ValueError: no name that a file can have
            raise UserError(f"{path} could not be written: {getattr(error, 'strerror', error)}") from None
        print(f"{len(record['messages'])} messages appended to {path}, as prepare_dolly.py --files reads them")


def hold_conversation(config: Config, writer: Writer) -> None:
    """Read, obey or answer, and remember, until Ctrl-D, /exit, two Ctrl-C in a row or the end of the input."""
    conversation, leaving = Conversation(config, writer), False
    prepare_terminal()
    print(f"{writer.loaded.source}: type, and press Enter; /help tells more, Ctrl-D ends the conversation")
    while True:
        try:
            text = read_message()
            leaving = False
            if text.split()[:1] == ["/exit"]:
                return
            if text.startswith("/"):
                conversation.obey(text)
            elif text.strip():
                conversation.say(text)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not sys.stdin.isatty():
                raise
            if leaving:
                return
            leaving = True
            print("Ctrl-C again, or Ctrl-D, ends the conversation")


def prepare_terminal() -> None:
    """Make `input` edit lines, recall them with the arrow keys, and take a pasted text of several lines as one."""
    sys.stdin.reconfigure(errors="replace")  # what is no UTF-8 is no reason to end
    with contextlib.suppress(ImportError):  # a Python built without it
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off


def read_message() -> str:
    """A message: a line, or several where one ends in a backslash or several were pasted.  Raises `EOFError` where
    there is none."""
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(input("... "))
    return "\n".join(lines)


def show(text: str) -> None:
    """Print a part of a text; on a terminal without what would steer it, as untrained models write anything."""
    print(cli.harmless(text) if sys.stdout.isatty() else text, end="", flush=True)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
