"""Make a small corpus and some thousand questions with answers from Python's own documentation, with no download.

    python prepare_sample.py
    python prepare_fineweb.py --files data/sample/text.jsonl --tokenizer bytes --val_fraction 0.05 --out data/demo
    python prepare_dolly.py --files data/sample/chat.jsonl --tokenizer bytes --block_size 256 --out data/demo_chat

The text, about 2 MB of English, is the language reference that `help()` shows and the docstrings of the standard
library of the interpreter that runs this; the questions ask what its functions and classes do.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import cli
from cli import check

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}
LONGEST_ANSWER = 160  # characters: question and answer fit 256 byte tokens


@dataclass(frozen=True)
class Config:
    out: Path = Path("data/sample")
    """The folder for text.jsonl and chat.jsonl."""


def main(config: Config) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(name, docstrings(file)) for name, file in module_files(library)]
    check(any(found for _, found in modules), f"{library} holds no Python sources to take docstrings from")
    documents = list(topics.values()) + [document(name, found) for name, found in modules if found]
    pairs = list(dict.fromkeys(pair for name, found in modules for pair in questions(name, found)))
    write_jsonl(config.out / "text.jsonl", [{"text": text} for text in documents])
    write_jsonl(config.out / "chat.jsonl", [{"instruction": q, "context": "", "response": a} for q, a in pairs])
    size = sum(map(len, documents)) / 1e6
    print(f"{len(documents)} documents, {size:.1f} MB of text -> {config.out / 'text.jsonl'}")
    print(f"{len(pairs)} questions with answers -> {config.out / 'chat.jsonl'}")


def module_files(library: Path) -> Iterator[tuple[str, Path]]:
    """The public modules of the standard library as (dotted name, source file)."""
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not NOT_LIBRARY & set(parts) and not any(part.startswith("_") for part in parts):
            yield ".".join(parts), file


def docstrings(file: Path) -> list[tuple[str, str]]:
    """The docstrings in a source file, parsed and never run: (dotted name, text) each, the module's own named ""."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # some files hold other versions' syntax on purpose
        return []
    found = []

    def visit(node: ast.AST, name: str) -> None:
        if text := ast.get_docstring(node):
            found.append((name, text))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}".lstrip("."))

    visit(tree, "")
    return found


def document(module: str, found: list[tuple[str, str]]) -> str:
    """A module's docstrings as one text."""
    return "\n\n".join(f"{module}.{name}".rstrip(".") + f"\n\n{text}" for name, text in found) + "\n"


def questions(module: str, found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """A question and an answer for each public name: the first paragraph of its docstring, where that is short."""
    for name, text in found:
        answer = " ".join(text.split("\n\n")[0].split())
        public = not any(part.startswith("_") for part in name.split("."))
        if public and len(answer) <= LONGEST_ANSWER and " " in answer:
            kind = "is" if not name else "does"
            full_name = f"{module}.{name}".rstrip(".")
            yield f"What {kind} {full_name}{' do' if name else ''}?", answer


def write_jsonl(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
