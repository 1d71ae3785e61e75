"""A new user's walk with files of their own: every command but the first of a chain is the `next:` line of the last."""

import csv
import random
import shlex
from pathlib import Path

import pytest
from conftest import start

TEXT = "the sea was calm and grey under a pale sky while ships went slowly home with salt fish and old songs"
WORDS = TEXT.split()


def make_text(n_chars: int, seed: int = 0) -> str:
    """Return paragraphs of random sentences."""
    rng, parts, size = random.Random(seed), [], 0
    while size < n_chars:
        sentence = " ".join(rng.choices(WORDS, k=rng.randrange(4, 12))).capitalize() + rng.choice([". ", ".\n\n"])
        parts.append(sentence)
        size += len(sentence)
    return "".join(parts)


def run(folder: Path, *command: object, **options):
    """Run a command in the folder; return what it printed and its `next:` command without "python"."""
    done = start(*command, cwd=folder, **options)
    lines = [line for line in done.stdout.splitlines() if line.startswith("next: python ")]
    return done.stdout, shlex.split(lines[0].removeprefix("next: python "))[0:] if lines else None


def follow(folder: Path, command: list[str], *flags: object, **options):
    """Run the command of a `next:` line, whose script may be given by its path."""
    script, *rest = command
    return run(folder, Path(script).name, *rest, *flags, **options)


def write_csv(file: Path, columns: list[str], rows: list[list[str]]) -> None:
    with open(file, "w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def test_from_a_text_file_and_a_csv_of_questions_to_a_chat(tmp_path):
    (tmp_path / "mine.txt").write_text(make_text(60_000))
    pairs = [[f"Where is ship {i}?", f"It went to port {i % 7}, with salt."] for i in range(60)]
    write_csv(tmp_path / "pairs.csv", ["question", "answer"], pairs)

    printed, command = run(tmp_path, "prepare_tokenizer.py", "--files", "mine.txt", "--vocab_size", 400)
    assert "data/tokenizer: " in printed
    printed, command = follow(tmp_path, command)  # prepare_fineweb.py
    assert "val: " in printed and "validation: the " in printed  # the split would have been empty
    printed, command = follow(tmp_path, command, "--steps", 10)  # pretrain.py
    assert "done: " in printed and "bits per byte" in printed
    run_folder = command[command.index("--checkpoint") + 1]
    printed, _ = follow(tmp_path, command, "--max_tokens", 8)  # generate.py
    assert printed.startswith("Once upon a time")

    dolly = ("--files", "pairs.csv", "--tokenizer", "data/tokenizer", "--out", "data/pairs")
    printed, command = run(tmp_path, "prepare_dolly.py", *dolly)
    assert command[command.index("--init") + 1] == run_folder
    printed, command = follow(tmp_path, command, "--epochs", 1)  # finetune.py
    assert "done: " in printed and command[-1] == "--chat"
    printed, _ = follow(tmp_path, command, "--max_tokens", 8, input="Where is ship 3?\n")  # generate.py
    assert len(printed.strip().splitlines()) >= 2


@pytest.mark.parametrize("kind", ["csv", "markdown"])
def test_from_a_csv_and_from_a_folder_of_markdown_to_a_model(tmp_path, kind):
    if kind == "csv":
        rows = [[str(i), make_text(500, seed=i)] for i in range(40)]
        write_csv(tmp_path / "notes.csv", ["number", "body"], rows)
        files = ("--files", "notes.csv", "--text_field", "body")
    else:
        (tmp_path / "notes" / "deep").mkdir(parents=True)
        for i in range(20):
            (tmp_path / "notes" / ("deep" if i % 2 else ".") / f"{i}.md").write_text(
                f"# Note {i}\n\n{make_text(900, i)}"
            )
        files = ("--files", "notes")
    _, command = run(tmp_path, "prepare_fineweb.py", *files, "--tokenizer", "bytes", "--out", "data/notes")
    printed, command = follow(tmp_path, command, "--model", "tiny", "--steps", 10)
    assert "done: " in printed
    printed, _ = follow(tmp_path, command, "--max_tokens", 8)
    assert printed.startswith("Once upon a time")
