"""generate.py --chat in a pseudo-terminal: multi-line input, history, Ctrl-C, commands, saved conversations."""

import io
import json
import os
import re
import select
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, start
from forked import ForkedProcess

from minigpt import terminal_chat
from minigpt.cli import UserError
from minigpt.inference import make_generator
from minigpt.pretrained import load_pretrained
from minigpt.sampling import SamplingParams
from minigpt.terminal_chat import Conversation, TextPrinter

PROMPT, CTRL_C, CTRL_D, UP = "> ", "\x03", "\x04", "\x1b[A"


class Terminal:
    """generate.py in a pseudo-terminal; reads what it prints and types into it."""

    def __init__(self, *args: object, cwd):
        self.screen, self.slave = os.openpty()
        env = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        self.process = ForkedProcess([ROOT / "generate.py", *args], cwd, env, terminal=os.ttyname(self.slave))
        self.output, self.read, self.bracketed_paste = "", 0, False

    def type(self, text: str) -> None:
        if text == CTRL_C:
            time.sleep(0.5)  # Python ignores a Ctrl-C between printing the prompt and waiting for a key
        os.write(self.screen, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read up to and including the next match of a regular expression; return the text."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.output[self.read :])):
            assert time.monotonic() < end, f"{pattern!r} was not printed:\n{self.output[self.read :]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # the process has closed the terminal
                    piece = ""
                if self.slave is not None:  # the process has it open: its end is the end of the terminal
                    os.close(self.slave)
                    self.slave = None
                assert piece, f"{pattern!r} was not printed before the process exited:\n{self.output[self.read :]!r}"
                self.bracketed_paste |= "\x1b[?2004h" in piece
                self.output += re.sub(r"\x1b\[\?2004[hl]\r?|\r", "", piece)
        text = self.output[self.read : self.read + found.end()]
        self.read += found.end()
        return text

    def ask(self, text: str) -> str:
        """Type a line, wait for the next prompt, and return the text in between."""
        self.type(text + "\r")
        return self.until(r"\n> ").partition("\n")[2].removesuffix("\n> ")

    def wait(self) -> int:
        """Wait for the process and return its exit code."""
        code = self.process.wait(timeout=60)
        os.close(self.screen)
        return code


@pytest.fixture
def terminal(tmp_path):
    """Return a function that starts generate.py --chat and reads up to its first prompt."""
    opened = []

    def open_terminal(checkpoint, *args: object) -> Terminal:
        opened.append(Terminal("--chat", "--checkpoint", checkpoint, *args, cwd=tmp_path))
        opened[-1].until(r"\n> ")
        return opened[-1]

    yield open_terminal
    for chat in opened:
        chat.process.kill()
        chat.process.wait()


def saved_conversations(tmp_path, name: str = "talk.jsonl") -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in (tmp_path / name).read_text().splitlines()]


def user_messages(tmp_path) -> list[str]:
    """Return the user's messages in the last saved conversation."""
    return [message["content"] for message in saved_conversations(tmp_path)[-1] if message["role"] == "user"]


GREEDY = ("--max_tokens", 3, "--temperature", 0)


@pytest.fixture
def printer(chatterbox) -> TextPrinter:
    generator = make_generator(1, torch.device("cpu"))
    return TextPrinter(load_pretrained(str(chatterbox)), SamplingParams(max_tokens=5), generator)


def test_multi_line_messages(terminal, chatterbox, tmp_path):
    """Pasted lines, and lines that end in a backslash, form one message."""
    chat = terminal(chatterbox, *GREEDY)
    assert chat.bracketed_paste
    chat.type("\x1b[200~one\ntwo\nthree\x1b[201~")
    chat.until("three")
    chat.ask("!")
    chat.type("four\\\r")
    chat.until(r"\n\.\.\. ")
    chat.ask("five")
    chat.ask("six")
    chat.ask("/save talk.jsonl")
    assert user_messages(tmp_path) == ["one\ntwo\nthree!", "four\nfive", "six"]
    chat.type(CTRL_D)
    assert chat.wait() == 0


def test_line_editing_and_history(terminal, chatterbox, tmp_path):
    """Arrow up recalls the last message, Ctrl-A moves to the start of a line, and Ctrl-U clears it."""
    chat = terminal(chatterbox, *GREEDY)
    chat.ask("first")
    chat.ask(UP + "?")
    chat.ask("wrong\x15right\x01all ")
    chat.ask("/save talk.jsonl")
    assert user_messages(tmp_path) == ["first", "first?", "all right"]


def test_ctrl_c_stops_only_the_answer(terminal, chatterbox, tmp_path):
    chat = terminal(chatterbox, "--max_tokens", 100_000)
    chat.type("talk\r")
    chat.until(r"talk\n[a-p ]{20}")
    chat.type(CTRL_C)
    rest = chat.until(r"\n> ")
    chat.ask("/save talk.jsonl")
    [question, answer] = saved_conversations(tmp_path)[0]
    assert question == {"role": "user", "content": "talk"} and answer["role"] == "assistant"
    assert 20 <= len(answer["content"]) < 50_000
    assert answer["content"].endswith(re.sub(r"\^C\n> $|\n> $", "", rest)[-20:])
    chat.type("more\r")
    chat.until(r"more\n[a-p ]{20}")
    chat.type(CTRL_C)
    chat.until(r"\n> ")


def test_ctrl_c_at_the_prompt(terminal, chatterbox, tmp_path):
    """The first Ctrl-C clears the line; only a second one right after it exits."""
    chat = terminal(chatterbox, *GREEDY)
    chat.type("a cleared line")
    chat.until("cleared line")
    chat.type(CTRL_C)
    assert "Ctrl-C again, or Ctrl-D, to end" in chat.until(r"\n> ")
    chat.ask("a sent line")
    chat.ask("/save talk.jsonl")
    assert user_messages(tmp_path) == ["a sent line"]
    chat.type(CTRL_C)
    assert "Ctrl-C again" in chat.until(r"\n> ")
    chat.type(CTRL_C)
    assert chat.wait() == 0


def test_commands(terminal, chatterbox, tmp_path):
    chat = terminal(chatterbox, *GREEDY, "--system", "Be kind.")
    help_text = chat.ask("/help")
    assert all(command in help_text for command in ("/retry", "/reset", "/system", "/temperature", "/save", "/exit"))
    assert "Ctrl-C" in help_text
    assert "nothing to save" in chat.ask("/save talk.jsonl")
    chat.ask("one")
    assert "there is no command /rest: type /help to see all commands" in chat.ask("/rest")
    assert "needs a file name" in chat.ask("/save")
    assert "could not be written: No such file" in chat.ask("/save nowhere/talk.jsonl")
    assert "the name must end in .jsonl" in chat.ask("/save talk.txt")
    assert "3 messages appended to talk.jsonl" in chat.ask("/save talk.jsonl")
    chat.ask("/system Be brief.")
    chat.ask("two")
    chat.ask("/save talk.jsonl")
    assert "system message stays" in chat.ask("/reset")
    chat.ask("three")
    chat.ask("/save talk.jsonl")
    assert "it was: Be brief." in chat.ask("/system")
    chat.ask(" /four")
    chat.ask("/save talk.jsonl")
    contents = [
        [m["content"] for m in messages if m["role"] != "assistant"] for messages in saved_conversations(tmp_path)
    ]
    assert contents == [
        ["Be kind.", "one"],
        ["Be brief.", "one", "two"],
        ["Be brief.", "three"],
        ["three", " /four"],
    ]
    chat.type("/exit\r")
    assert chat.wait() == 0


@pytest.mark.parametrize("line", ["exit", " quit ", "/exit"])
def test_lines_that_end_the_chat(printer, capsys, monkeypatch, line):
    typed = io.BytesIO(f"exit it\n{line}\nnot read\n".encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed))
    terminal_chat.chat(printer, [])
    assert len(capsys.readouterr().out.splitlines()) == 2  # the header and one answer


def test_retry_replaces_the_last_answer(printer):
    """The new answer follows the same messages as the old one."""
    chat, prompts, answer = Conversation(printer, []), [], printer.answer
    printer.answer = lambda messages, **options: prompts.append(messages) or answer(messages, **options)
    with pytest.raises(UserError, match="there is no question to answer again"):
        chat.run_command("/retry")
    for text in ("one", "two"):
        chat.add_message(text)
    before = chat.turns
    for _ in range(2):
        chat.run_command("/retry")
        assert prompts[-1] == before[:3] and chat.turns[:3] == before[:3] and chat.turns[3:] != before[3:]
    assert len(chat.turns) == 4


def test_temperature(printer, capsys):
    """A wrong value is an error and changes nothing."""
    chat = Conversation(printer, [])
    chat.run_command("/temperature")
    chat.run_command("/temperature 0")
    for value, error in {
        "warm": "give a number",
        "-1": "temperature is -1.0: it must be",
        "nan": "nan: it must",
    }.items():
        with pytest.raises(UserError, match=error) as raised:
            chat.run_command(f"/temperature {value}")
        assert "--" not in str(raised.value)
    chat.run_command("/temperature")
    assert capsys.readouterr().out.splitlines() == ["temperature: 0.8", "temperature: 0", "temperature: 0"]
    chat.add_message("talk")
    first = chat.turns
    chat.run_command("/retry")
    assert chat.turns == first  # greedy


def test_typing_during_an_answer_is_discarded(terminal, chatterbox, tmp_path):
    """It is not shown in the answer, nor sent after it; typing works again afterwards."""
    chat = terminal(chatterbox, "--max_tokens", 400)
    chat.type("talk\r")
    chat.until(r"talk\n[a-p ]{20}")
    chat.type("XYZ\rXYZ")
    assert re.fullmatch(r"[a-p ]+\n> ", chat.until(r"\n> "))
    chat.ask("/save talk.jsonl")
    [question, answer] = saved_conversations(tmp_path)[0]
    assert question["content"] == "talk" and len(answer["content"]) == 400
    assert "/save talk.jsonl" in chat.output  # typing is shown again


def test_the_terminal_is_restored_after_an_exception(monkeypatch):
    """Echo is off only inside."""
    screen, terminal = os.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(terminal, "r"))
    before = termios.tcgetattr(terminal)
    with pytest.raises(KeyboardInterrupt), terminal_chat.discard_typing():
        assert before[3] & ~termios.tcgetattr(terminal)[3] == termios.ECHO
        os.write(screen, b"typed\n")
        raise KeyboardInterrupt
    assert termios.tcgetattr(terminal) == before and not select.select([terminal], [], [], 0)[0]
    sys.stdin.close()
    os.close(screen)


def test_system_message_too_long(terminal, fails, chatterbox):
    """The flag ends in an error; the command prints it and keeps the old system message."""
    error = "system message alone fills the context of 2048 tokens"
    assert error in fails("generate.py", "--checkpoint", chatterbox, "--chat", "--system", "long " * 480)
    chat = terminal(chatterbox, *GREEDY, "--system", "Be kind.")
    assert error in chat.ask("/system " + "long " * 480)
    assert "it was: Be kind." in chat.ask("/system")


def test_a_long_conversation_warns_once(run_script, chatterbox):
    """After /reset, it can warn once more. The warning says how long the conversation is and may be."""
    question = "x" * 800 + "\n"
    flags = ("--checkpoint", chatterbox, "--chat", "--max_tokens", 50)
    done = run_script("generate.py", *flags, input=question * 4 + "/reset\n" + question * 3)
    warning = "has 2512 tokens, 1998 are available (context 2048, less 50 for the answer): its oldest part"
    assert done.stderr.count(warning) == 2 == done.stderr.count("warning")


def test_input_from_a_pipe(run_script, chatterbox, tmp_path):
    """Each line is a message and commands work; invalid UTF-8 and a trailing backslash do not stop the conversation.

    No prompt is printed.
    """
    done = run_script(
        "generate.py", "--checkpoint", chatterbox, "--chat", *GREEDY, input="a\\\nb\n/save t.jsonl\n/no\nc\\"
    )
    assert done.stderr.startswith("error: there is no command /no: type /help") and done.stderr.count("\n") == 1
    header, answer, saved, last_answer = done.stdout.splitlines()
    assert "type a message" in header and "appended" in saved and len(answer) == len(last_answer) == 3
    assert saved_conversations(tmp_path, "t.jsonl")[0][0]["content"] == "a\nb"
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(chatterbox), "--chat", *map(str, GREEDY)]
    assert subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, check=False).returncode == 0


def test_prepare_dolly_reads_saved_conversations(run_script, chatterbox, tmp_path):
    """They are appended to a file whose last line has no line break."""
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    talk = (
        "héllo\n/save talk.jsonl\n" + "more\n/reset\n" + "".join(f"{i}\n/save talk.jsonl\n/reset\n" for i in range(20))
    )
    run_script("generate.py", "--checkpoint", chatterbox, "--chat", *GREEDY, input=talk)
    assert saved_conversations(tmp_path)[1][0]["content"] == "héllo" and len(saved_conversations(tmp_path)) == 22
    data = ("--files", "talk.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.3, "--out", "data")
    assert "22 records" in run_script("prepare_dolly.py", *data).stdout


def test_control_characters_do_not_reach_the_terminal(chatterbox, tmp_path):
    """The echo of a prompt with an escape sequence is unchanged in a pipe, and replaced on a terminal."""
    flags = ("--checkpoint", chatterbox, "--raw", "--prompt", "a\x1b]0;b\n\tc", *GREEDY)
    assert "a\x1b]0;b\n\tc" in start("generate.py", *flags, cwd=tmp_path).stdout
    output = Terminal(*flags, cwd=tmp_path).until("c[a-p ]{3}")
    assert "a\ufffd]0;b\n" in output
