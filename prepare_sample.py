"""Build a small text corpus and a set of questions with answers from Python's own documentation, without a download.

    python prepare_sample.py
    python prepare_fineweb.py --files data/sample/text.jsonl --tokenizer bytes --val_fraction 0.05 --out data/demo
    python prepare_dolly.py --files data/sample/chat.jsonl --tokenizer bytes --block_size 256 --out data/demo_chat

The text is about 2 MB of English: the language reference that `help()` shows, and the docstrings of the standard
library. The questions, several thousand, ask what the library's functions and classes do. The files depend on the
version of the Python interpreter. Takes about 3 seconds.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from minigpt import cli
from minigpt.cli import UserError

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}
MAX_ANSWER_CHARS = 160  # a question and its answer fit into 256 byte tokens


@dataclass(frozen=True)
class Config:
    out: Path = Path("data/sample")
    """Folder to write text.jsonl and chat.jsonl to."""


def main(config: Config) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(name, parse_docstrings(file)) for name, file in find_modules(library)]
    if not any(docstrings for _, docstrings in modules):
        raise UserError(f"{library} has no Python sources with docstrings: use another Python installation")
    texts = list(topics.values()) + [format_document(name, docstrings) for name, docstrings in modules if docstrings]
    pairs = list(dict.fromkeys(pair for name, docstrings in modules for pair in make_questions(name, docstrings)))
    write_jsonl(config.out / "text.jsonl", [{"text": text} for text in texts])
    write_jsonl(config.out / "chat.jsonl", [{"instruction": q, "context": "", "response": a} for q, a in pairs])
    print(f"wrote {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} MB, to {config.out / 'text.jsonl'}")
    print(f"wrote {len(pairs):,} questions with answers to {config.out / 'chat.jsonl'}")


def find_modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and source file of each public module in the standard library."""
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not EXCLUDED & set(parts) and not any(part.startswith("_") for part in parts):
            yield ".".join(parts), file


def parse_docstrings(file: Path) -> list[tuple[str, str]]:
    """Return (dotted name, docstring) pairs of a source file, without importing it; the module's own name is ""."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some files use the syntax of other Python versions
        return []
    docstrings = []

    def visit(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):
            docstrings.append((name, text))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}".lstrip("."))

    visit(tree, "")
    return docstrings


def format_document(module: str, docstrings: list[tuple[str, str]]) -> str:
    """Join the docstrings of a module into one text."""
    return "\n\n".join(f"{module}.{name}".rstrip(".") + f"\n\n{text}" for name, text in docstrings) + "\n"


def make_questions(module: str, docstrings: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield a (question, answer) pair for each public name whose docstring starts with a short paragraph."""
    for name, text in docstrings:
        answer = " ".join(text.split("\n\n")[0].split())
        is_public = not any(part.startswith("_") for part in name.split("."))
        if is_public and len(answer) <= MAX_ANSWER_CHARS and " " in answer:
            yield f"What does {module}.{name} do?" if name else f"What is {module}?", answer


def write_jsonl(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
