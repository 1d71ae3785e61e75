"""A conversation in a real terminal: what is typed, pasted, stopped, recalled and saved in generate.py --chat."""

import json
import os
import re
import select
import subprocess
import sys
import time

import pytest
from conftest import ROOT, start

PROMPT, CTRL_C, CTRL_D, UP = "> ", "\x03", "\x04", "\x1b[A"
# A process becomes the terminal's own, so that Ctrl-C reaches it, by opening it as the first of a session.
OWN = "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A script in a pseudo-terminal: what it shows is read, what a person types is written."""

    def __init__(self, *args: object, cwd):
        self.screen, slave = os.openpty()
        command = [sys.executable, "-c", OWN, str(ROOT / "generate.py"), *map(str, args)]
        env = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=env, start_new_session=True
        )
        os.close(slave)
        self.shown, self.read, self.pastes = "", 0, False

    def type(self, text: str) -> None:
        if text == CTRL_C:
            time.sleep(0.5)  # Python sleeps over one that comes between its prompt and its waiting for a key
        os.write(self.screen, text.encode())

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to the next match of a regular expression, and the match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown[self.read :])):
            assert time.monotonic() < end, f"{pattern!r} was not shown:\n{self.shown[self.read :]!r}"
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    piece = ""
                assert piece, f"{pattern!r} was not shown before the end:\n{self.shown[self.read :]!r}"
                self.pastes |= "\x1b[?2004h" in piece  # the terminal is asked to mark what is pasted
                self.shown += re.sub(r"\x1b\[\?2004[hl]\r?|\r", "", piece)
        text = self.shown[self.read : self.read + found.end()]
        self.read += found.end()
        return text

    def ask(self, text: str) -> str:
        """Type a line and wait for the next prompt; returns what was shown between."""
        self.type(text + "\r")
        return self.until(r"\n> ").partition("\n")[2].removesuffix("\n> ")

    def end(self) -> int:
        code = self.process.wait(timeout=60)
        os.close(self.screen)
        return code


@pytest.fixture
def terminal(tmp_path):
    """Starts generate.py --chat in a terminal, up to its first prompt."""
    opened = []

    def open_terminal(checkpoint, *args: object) -> Terminal:
        opened.append(Terminal("--chat", "--checkpoint", checkpoint, *args, cwd=tmp_path))
        opened[-1].until(r"\n> ")
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.process.kill()
        one.process.wait()


def saved(tmp_path, name: str = "talk.jsonl") -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in (tmp_path / name).read_text().splitlines()]


def asked(tmp_path) -> list[str]:
    """What the user has said in the conversation that was saved last."""
    return [message["content"] for message in saved(tmp_path)[-1] if message["role"] == "user"]


SHORT = ("--max_tokens", 3, "--temperature", 0)


def test_a_message_of_several_lines(terminal, chatterbox, tmp_path):
    """Pasted, or typed with backslashes: one message each; three lines without either would be three."""
    chat = terminal(chatterbox, *SHORT)
    assert chat.pastes
    chat.type("\x1b[200~one\ntwo\nthree\x1b[201~")
    chat.until("three")
    chat.ask("!")
    chat.type("four\\\r")
    chat.until(r"\n\.\.\. ")
    chat.ask("five")
    chat.ask("six")
    chat.ask("/save talk.jsonl")
    assert asked(tmp_path) == ["one\ntwo\nthree!", "four\nfive", "six"]
    chat.type(CTRL_D)
    assert chat.end() == 0


def test_lines_are_edited_and_recalled(terminal, chatterbox, tmp_path):
    """Arrow up brings back the last message; Ctrl-A and Ctrl-K are at work, and Ctrl-U leaves nothing of a line."""
    chat = terminal(chatterbox, *SHORT)
    chat.ask("first")
    chat.ask(UP + "?")
    chat.ask("wrong\x15right\x01all ")
    chat.ask("/save talk.jsonl")
    assert asked(tmp_path) == ["first", "first?", "all right"]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(terminal, chatterbox, tmp_path):
    chat = terminal(chatterbox, "--max_tokens", 100_000)
    chat.type("talk\r")
    chat.until(r"talk\n[a-p ]{20}")
    chat.type(CTRL_C)
    shown = chat.until(r"\n> ")
    chat.ask("/save talk.jsonl")
    [question, answer] = saved(tmp_path)[0]
    assert question == {"role": "user", "content": "talk"} and answer["role"] == "assistant"
    assert 20 <= len(answer["content"]) < 50_000
    assert answer["content"].endswith(re.sub(r"\^C\n> $|\n> $", "", shown)[-20:])
    chat.type("more\r")  # and it goes on
    chat.until(r"more\n[a-p ]{20}")
    chat.type(CTRL_C)
    chat.until(r"\n> ")


def test_ctrl_c_at_the_prompt(terminal, chatterbox, tmp_path):
    """Once it drops the line and tells how to leave; with something between, that is again the first time."""
    chat = terminal(chatterbox, *SHORT)
    chat.type("nothing of this")
    chat.until("of this")
    chat.type(CTRL_C)
    assert "Ctrl-C again, or Ctrl-D, ends" in chat.until(r"\n> ")
    chat.ask("but this")
    chat.ask("/save talk.jsonl")
    assert asked(tmp_path) == ["but this"]
    chat.type(CTRL_C)
    assert "Ctrl-C again" in chat.until(r"\n> ")
    chat.type(CTRL_C)
    assert chat.end() == 0


def test_commands(terminal, chatterbox, tmp_path):
    chat = terminal(chatterbox, *SHORT, "--system", "Be kind.")
    for command in ("/reset", "/system", "/save", "/exit", "Ctrl-C"):
        assert command in chat.ask("/help")
    assert "nothing to save" in chat.ask("/save talk.jsonl")
    chat.ask("one")
    assert "no command /rest: /help lists them" in chat.ask("/rest")
    assert "needs the name of a file" in chat.ask("/save")
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
    contents = [[m["content"] for m in messages if m["role"] != "assistant"] for messages in saved(tmp_path)]
    assert contents == [
        ["Be kind.", "one"],
        ["Be brief.", "one", "two"],
        ["Be brief.", "three"],
        ["three", " /four"],
    ]
    chat.type("/exit\r")
    assert chat.end() == 0


def test_a_system_message_that_is_too_long(terminal, fails, chatterbox):
    """As a flag it is a mistake; as a command it is refused, and the old one stays."""
    words = "system message alone fills the context of 512 tokens"
    assert words in fails("generate.py", "--checkpoint", chatterbox, "--chat", "--system", "long " * 120)
    chat = terminal(chatterbox, *SHORT, "--system", "Be kind.")
    assert words in chat.ask("/system " + "long " * 120)
    assert "it was: Be kind." in chat.ask("/system")


def test_a_long_conversation_warns_once(run_script, chatterbox):
    """And once more where a new one has become too long."""
    question = "x" * 200 + "\n"
    flags = ("--checkpoint", chatterbox, "--chat", "--max_tokens", 50)
    done = run_script("generate.py", *flags, input=question * 4 + "/reset\n" + question * 3)
    assert done.stderr.count("its oldest part is left out") == 2


def test_a_pipe_is_a_terminal_too(run_script, chatterbox, tmp_path):
    """Without readline: a line is a message, commands work, bytes that are no UTF-8 and a last backslash do no harm."""
    done = run_script(
        "generate.py", "--checkpoint", chatterbox, "--chat", *SHORT, input="a\\\nb\n/save t.jsonl\n/no\nc\\"
    )
    assert (
        done.stderr == "error: there is no command /no: /help lists them; a space before the / sends it as a message\n"
    )
    assert saved(tmp_path, "t.jsonl")[0][0]["content"] == "a\nb"
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(chatterbox), "--chat", *map(str, SHORT)]
    assert subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, check=False).returncode == 0


def test_what_is_saved_can_be_learned(run_script, chatterbox, tmp_path):
    """Appended to a file whose last line has no end; prepare_dolly.py reads all of it."""
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    talk = (
        "héllo\n/save talk.jsonl\n" + "more\n/reset\n" + "".join(f"{i}\n/save talk.jsonl\n/reset\n" for i in range(20))
    )
    run_script("generate.py", "--checkpoint", chatterbox, "--chat", *SHORT, input=talk)
    assert saved(tmp_path)[1][0]["content"] == "héllo" and len(saved(tmp_path)) == 22
    data = ("--files", "talk.jsonl", "--tokenizer", "bytes", "--val_fraction", 0.3, "--out", "data")
    assert "22 records" in run_script("prepare_dolly.py", *data).stdout


def test_what_would_steer_the_terminal_is_not_shown(chatterbox, tmp_path):
    """An escape sequence in a prompt that is echoed: as it is into a pipe, harmless on a terminal."""
    flags = ("--checkpoint", chatterbox, "--raw", "--prompt", "a\x1b]0;b\n\tc", *SHORT)
    assert "a\x1b]0;b\n\tc" in start("generate.py", *flags, cwd=tmp_path).stdout
    shown = Terminal(*flags, cwd=tmp_path).until("c[a-p ]{3}")
    assert "a\ufffd]0;b\n" in shown
