"""Text in the terminal: printing samples as they are generated, and the chat of `generate.py --chat`."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minigpt.chat import encode_prompt, max_prompt_length
from minigpt.cli import UserError, strip_control_chars
from minigpt.files import append_line
from minigpt.inference import stream_text
from minigpt.pretrained import PretrainedModel
from minigpt.sampling import SamplingParams

HELP = """\
/retry          answer the last question again; the new answer replaces the old one
/reset          start a new conversation; the system message stays
/system TEXT    set the system message; without TEXT remove it
/temperature X  set the sampling temperature; without X print it
/save FILE      append the conversation to a .jsonl file, for prepare_dolly.py --files
/exit           end the chat, like exit, quit and Ctrl-D
A line that ends in \\ continues on the next line. Pasted text is sent as one message.
Arrow up recalls earlier messages. Ctrl-C stops an answer."""


class TextPrinter:
    """Generates text and prints it as it is generated."""

    def __init__(self, loaded: PretrainedModel, params: SamplingParams, generator: torch.Generator):
        self.loaded, self.params, self.generator = loaded, params, generator
        self.warned = False  # about a conversation that is longer than the context

    def answer(self, messages: list[dict], n_samples: int = 1, catch_interrupt: bool = False) -> str:
        """Print the assistant's reply to a conversation; see `print_samples`."""
        tokenizer, block_size = self.loaded.tokenizer, self.loaded.model.config.block_size
        prompt, n_dropped = encode_prompt(tokenizer, messages, block_size, self.params.max_tokens)
        if n_dropped and not self.warned:
            self.warned = True
            available = max_prompt_length(block_size, self.params.max_tokens)
            print(
                f"warning: the conversation has {len(prompt) + n_dropped} tokens, {available} are available (context"
                f" {block_size}, less {block_size - available} for the answer): its oldest part is dropped",
                file=sys.stderr,
            )
        return self.print_samples(prompt, n_samples, catch_interrupt=catch_interrupt)

    def print_samples(
        self, prompt: list[int], n_samples: int = 1, echo: str = "", catch_interrupt: bool = False
    ) -> str:
        """Continue a prompt and print the result: one sample token by token, several when they are complete.

        Args:
            echo: text to print before each sample.
            catch_interrupt: Ctrl-C ends the sample instead of raising `KeyboardInterrupt`.

        Returns:
            the first sample.
        """
        texts = [""] * n_samples
        if n_samples == 1:
            print_text(echo)
        try:
            for pieces in stream_text(
                self.loaded.model, self.loaded.tokenizer, prompt, self.params, self.generator, n_samples
            ):
                texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
                if n_samples == 1:
                    print_text(pieces[0] or "")
        except KeyboardInterrupt:
            print_text("\n")
            if not catch_interrupt:
                raise
            return texts[0]
        samples = "".join(f"--- sample {i}\n{echo}{text}\n" for i, text in enumerate(texts, 1))
        print_text("\n" if n_samples == 1 else samples)
        return texts[0]


def print_text(text: str) -> None:
    """Print a part of a text; on a terminal without control characters, which an untrained model may generate."""
    print(strip_control_chars(text) if sys.stdout.isatty() else text, end="", flush=True)


def chat(printer: TextPrinter, system_messages: list[dict]) -> None:
    """Read messages and print answers until /exit, exit, quit, two Ctrl-C in a row or the end of the input."""
    conversation, interrupted = Conversation(printer, system_messages), False
    setup_line_editing()
    print(f"{printer.loaded.source}: type a message and press Enter; /help lists commands, Ctrl-D ends the chat")
    while True:
        try:
            text = read_message()
            interrupted = False
            if text.split()[:1] in (["/exit"], ["/quit"]) or text.strip() in ("exit", "quit"):
                return
            if text.startswith("/"):
                conversation.run_command(text)
            elif text.strip():
                conversation.add_message(text)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            print()
            if not sys.stdin.isatty():
                raise
            if interrupted:
                return
            interrupted = True
            print("press Ctrl-C again, or Ctrl-D, to end the chat")


class Conversation:
    """The messages of a chat, and the commands on it."""

    def __init__(self, printer: TextPrinter, system_messages: list[dict]):
        self.printer, self.turns = printer, []
        self.check_length(system_messages)
        self.system_messages = system_messages

    def check_length(self, system_messages: list[dict]) -> None:
        """Raise `UserError` if a system message leaves no room for a conversation."""
        loaded = self.printer.loaded
        messages = [*system_messages, {"role": "user", "content": "?"}]
        encode_prompt(loaded.tokenizer, messages, loaded.model.config.block_size, self.printer.params.max_tokens)

    def add_message(self, text: str, turns: Sequence[dict] | None = None) -> None:
        """Add the user's message to `turns`, by default those so far; print the answer and add it too.

        On a terminal, Ctrl-C ends the answer.
        """
        turns = [*(self.turns if turns is None else turns), {"role": "user", "content": text}]
        with discard_typing():
            answer = self.printer.answer([*self.system_messages, *turns], catch_interrupt=sys.stdin.isatty())
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def retry(self) -> None:
        """Replace the last answer by a new one."""
        if not self.turns:
            raise UserError("there is no question to answer again")
        self.add_message(self.turns[-2]["content"], self.turns[:-2])

    def run_command(self, line: str) -> None:
        """Run a command. Raises `UserError`, with nothing changed, if it fails."""
        name, argument = [*line.split(maxsplit=1), ""][:2]
        if name == "/help":
            print(HELP)
        elif name == "/retry":
            self.retry()
        elif name == "/reset":
            self.turns, self.printer.warned = [], False
            print("new conversation" + ("; the system message stays" if self.system_messages else ""))
        elif name == "/system":
            self.set_system_message(argument.rstrip())
        elif name == "/temperature":
            self.set_temperature(argument.rstrip())
        elif name == "/save":
            self.save(argument.rstrip())
        else:
            raise UserError(
                f"there is no command {name}: type /help to see all commands, or start the line with a space to send it"
                " as a message"
            )

    def set_system_message(self, text: str) -> None:
        """Set the system message, or remove it if there is no text."""
        old, new = self.system_messages, [{"role": "system", "content": text}] if text else []
        self.check_length(new)
        self.system_messages = new
        removed = f"system message removed; it was: {old[0]['content']}" if old else "there is no system message"
        print(f"system message: {text}" if text else removed)

    def set_temperature(self, value: str) -> None:
        """Set the sampling temperature, or print it if there is no value."""
        params = self.printer.params
        if value:
            try:
                self.printer.params = params = dataclasses.replace(params, temperature=float(value))
            except ValueError:
                raise UserError(f"/temperature {value}: give a number, such as /temperature 0.8") from None
            except UserError as error:
                raise UserError(str(error).removeprefix("--")) from None
        print(f"temperature: {params.temperature:g}")

    def save(self, file: str) -> None:
        """Append the conversation to a file, as a record for prepare_dolly.py."""
        if not file:
            raise UserError("/save needs a file name: /save FILE.jsonl")
        if not self.turns:
            raise UserError("there is nothing to save yet")
        if not file.endswith(".jsonl"):
            raise UserError(f"/save {file}: the name must end in .jsonl, for prepare_dolly.py to read it")
        path, record = Path(os.path.expanduser(file)), {"messages": [*self.system_messages, *self.turns]}
        try:
            append_line(path, json.dumps(record))
        except (OSError, ValueError) as error:  # ValueError: an invalid file name
            raise UserError(f"{path} could not be written: {getattr(error, 'strerror', error)}") from None
        print(f"{len(record['messages'])} messages appended to {path}")


def setup_line_editing() -> None:
    """Let `input` edit lines, recall them with the arrow keys, and accept a pasted text of several lines."""
    sys.stdin.reconfigure(errors="replace")  # invalid UTF-8 must not end the chat
    with contextlib.suppress(ImportError):  # readline is optional in Python
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # off by default in Python


@contextlib.contextmanager
def discard_typing() -> Iterator[None]:
    """Hide and discard what is typed on the terminal inside a `with` block. Ctrl-C keeps its effect."""
    if not sys.stdin.isatty() or sys.platform == "win32":
        yield
        return
    import termios

    terminal, saved = sys.stdin.fileno(), termios.tcgetattr(sys.stdin)
    silent = saved.copy()
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(terminal, termios.TCSANOW, silent)
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, saved)
        termios.tcflush(terminal, termios.TCIFLUSH)


def read_message() -> str:
    """Read one line, or several if a line ends in a backslash or several were pasted. Raises `EOFError` at the end."""
    prompt, next_prompt = ("> ", "... ") if sys.stdin.isatty() else ("", "")
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(input(next_prompt))
    return "\n".join(lines)
