"""Build a small text corpus and questions with answers from Python's own documentation, without a download.

    python prepare_sample.py                    # into data/sample; `make demo` shows the commands that follow

The text is about 2 MB of English: the language reference that `help()` shows, and the docstrings of the standard
library. The questions ask what well-known modules, functions, classes and methods do, each in two ways; some are small
talk. Each occurs in several conversations. The names in chat_val.jsonl do not occur in chat.jsonl. The files depend on
the version of the Python interpreter. Takes about 3 seconds.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import ast
import builtins
import importlib
import inspect
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

from minigpt import cli, shards
from minigpt.cli import UserError
from minigpt.files import write_file

EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "idlelib", "turtledemo"}

MODULES = """
    argparse asyncio base64 bisect calendar collections contextlib copy csv dataclasses datetime decimal enum fnmatch
    fractions functools glob gzip hashlib heapq html importlib io itertools json logging math os os.path pathlib pickle
    pprint queue random re secrets shlex shutil sqlite3 statistics string struct subprocess sys tempfile textwrap
    threading time timeit unittest urllib.parse uuid warnings webbrowser zipfile zlib
"""
TYPES = "dict float int list set str tuple collections.Counter collections.deque pathlib.Path"  # for their methods
COMMON_IN_OS = (  # of 300 functions
    "path|access|chdir|chmod|chown|close|cpu_count|get_terminal_size|getcwd|getenv|getlogin|getpid|kill|link|listdir"
    "|makedirs|mkdir|open|pipe|putenv|read|remove|removedirs|rename|replace|rmdir|scandir|stat|symlink|system|times"
    "|umask|uname|unlink|urandom|utime|wait|walk|write"
)
OBSCURE = (
    rf"os\.(?!({COMMON_IN_OS})\b)|sys\.(_|[gs]et_|\w*hook)"
    r"|asyncio\.(Abstract|.*(Child|Protocol|Transport|[Uu]nix|policy|watcher))"
)
MAX_ANSWER_CHARS = 160
REPEATS = 6  # number of conversations with the same question
MAX_CONVERSATION_CHARS = 550  # fits into 256 tokens of the demo's vocabulary
VAL_FRACTION = 0.03  # of the names

FIRST_QUESTION = {"function": "What does {} do?", "class": "What is {}?", "module": "What is the {} module?"}
SECOND_QUESTION = ("What is {} for?", "How do I use {}?", "Explain {}.", "Tell me about {}.")
SMALL_TALK = """
Hello! | Hi | Hello! Ask me what a function of Python does.
Good morning! | Good evening! | Good day! Which part of Python shall we look at?
How are you? | How are you doing? | I am a program, so always the same. How can I help you?
Who are you? | What are you? | I am a small language model, trained on Python's documentation.
What is your name? | Do you have a name? | I have no name. I am the demo model of this repository.
What can you do? | What can I ask you? | I can say what many functions of Python do. Try: What does len do?
Help | Can you help me? | Ask about a name in Python's standard library. Try: What does json.dumps do?
How were you trained? | How did you learn this? | I read Python's documentation, then I learned questions with answers.
What is your training data? | What have you read? | The docstrings and help pages of Python, about 2 MB of text.
How big are you? | How many parameters do you have? | About a million parameters, a millionth of a large model.
How long did your training take? | Was your training expensive? | A few minutes on a laptop CPU.
Are you a human? | Are you a real person? | No, I am a small language model.
Are you ChatGPT? | Are you GPT-4? | No. I am a far smaller model with the architecture of GPT-2.
Are you intelligent? | Can you think? | No. I recall sentences that I was trained on, and often fail at anything else.
Do you know everything? | Do you make mistakes? | I know only what I was trained on. The rest I make up.
Can I trust your answers? | Are your answers correct? | Check them with help() in Python: I may be wrong.
Can you write code? | Write a program for me. | No, I am too small for that. I can say what functions of Python do.
What is the weather like? | Will it rain tomorrow? | I do not know. I only know Python's documentation.
What is the capital of France? | Who was Albert Einstein? | I do not know: it is not in Python's documentation.
Tell me a joke. | Do you know a joke? | Python is named after Monty Python, but I was trained on its manual.
What is Python? | Tell me about Python. | Python is a programming language that is easy to read and has a large library.
Who made you? | Who trained you? | You did: the scripts of this repository trained me on your computer.
Do you remember me? | Do you learn from our chat? | No. I learned during training only.
Do you speak German? | Which languages do you speak? | I only know the English of Python's documentation.
How can I make you better? | How can I improve you? | Train a larger model on more text: see the README.
Thanks! | Thank you | You are welcome!
Great! | Well done! | Thank you! What else would you like to know about Python?
Bye! | Goodbye | Goodbye!
"""


class Documented(NamedTuple):
    """A name in the standard library, as people write it, with its kind ("function", "class", "module")."""

    name: str
    kind: str
    docstring: str


@dataclass(frozen=True)
class Config:
    out: Path = Path("data/sample")
    """Folder to write text.jsonl, chat.jsonl and chat_val.jsonl to."""


def main(config: Config) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    modules = [(name, parse_docstrings(file)) for name, file in find_modules(library)]
    if not any(docstrings for _, docstrings in modules):
        raise UserError(f"{library} has no Python sources with docstrings: use another Python installation")
    objects = find_objects()
    parsed = {text for _, docstrings in modules for _, text in docstrings}
    compiled = [item for item in objects if item.docstring not in parsed]  # written in C
    for owner, items in groupby(compiled, key=lambda item: item.name.rpartition(".")[0]):
        modules.append((owner, [(item.name.rpartition(".")[2], item.docstring) for item in items]))
    texts = list(topics.values()) + [format_document(name, docstrings) for name, docstrings in modules if docstrings]
    write_jsonl(config.out / "text.jsonl", [{"text": text} for text in texts])
    print(f"wrote {len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} MB, to {config.out / 'text.jsonl'}")

    pairs: dict[str, list[tuple[str, str]]] = {"chat": small_talk() * 3, "chat_val": []}  # a chat starts with it
    for item in objects:
        is_val = shards.hash_document(item.docstring.encode()) < VAL_FRACTION
        pairs["chat_val" if is_val else "chat"] += make_questions(item)
    for name, split in pairs.items():
        conversations = make_conversations(split, repeats=1 if name == "chat_val" else REPEATS)
        write_jsonl(config.out / f"{name}.jsonl", conversations)
        count = f"{len(set(split)):,} questions with answers in {len(conversations):,} conversations"
        print(f"wrote {count} to {config.out / f'{name}.jsonl'}")


def find_modules(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and source file of each public module in the standard library."""
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and not EXCLUDED & set(parts) and not any(part.startswith("_") for part in parts):
            name = ".".join(parts)
            yield "os.path" if name == "posixpath" else name, file


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
    return "\n\n".join(f"{module}.{name}".strip(".") + f"\n\n{text}" for name, text in docstrings) + "\n"


def find_objects() -> list[Documented]:
    """Return the builtins, the methods of `TYPES`, the `MODULES` and their functions and classes."""
    objects = list(public_members(builtins, ""))
    for name in TYPES.split():
        module, _, type_name = name.rpartition(".")
        objects += public_members(getattr(importlib.import_module(module or "builtins"), type_name), f"{type_name}.")
    for name in MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # an optional part of this Python installation
            continue
        objects.append(Documented(name, "module", inspect.cleandoc(module.__doc__ or "")))
        objects += public_members(module, f"{name}.")
    return [item for item in objects if item.docstring and not re.match(OBSCURE, item.name)]


def public_members(owner: object, prefix: str) -> Iterator[Documented]:
    """Yield the functions and classes that a module or class defines, without those of other modules and aliases."""
    names = getattr(owner, "__all__", None)
    for name in names or dir(owner):
        with warnings.catch_warnings(action="ignore"):  # of deprecated names
            member = getattr(owner, name, None)
        is_public = not name.startswith("_") and getattr(member, "__name__", None) == name
        if names is None and inspect.ismodule(owner):
            is_public &= (getattr(member, "__module__", None) or owner.__name__).strip("_") == owner.__name__
        if is_public and (inspect.isroutine(member) or inspect.isclass(member)):
            kind = "class" if inspect.isclass(member) else "function"
            yield Documented(prefix + name, kind, inspect.cleandoc(member.__doc__ or ""))


def make_questions(item: Documented) -> list[tuple[str, str]]:
    """Return two questions for a name, with its answer; [] if its docstring does not start with a short sentence."""
    answer = summarize(item)
    subject = f"the {item.name} module" if item.kind == "module" else item.name
    second = SECOND_QUESTION[sum(item.name.encode()) % len(SECOND_QUESTION)]
    questions = (FIRST_QUESTION[item.kind].format(item.name), second.format(subject))
    return [(question, answer) for question in questions] if answer else []


def summarize(item: Documented) -> str:
    """Return the first paragraph of a docstring as one line, or its first sentence if it is long; "" if of no use."""
    name = re.escape(item.name.split(".")[-1])
    text = re.split(r"\n\n|\n\w+\(.*\) -+>", strip_signature(item.docstring))[0]
    text = re.sub(r"\s+", " ", text).strip(" \\")
    text = re.sub(rf"^(?:the |module )?{name}(?: module)?(?: -+|:) ", "", text, flags=re.IGNORECASE)
    text = re.sub(r":\w+:`[~!]?([^`]*)`", r"`\1`", text).replace("``", "`")  # reStructuredText
    if len(text) > MAX_ANSWER_CHARS and (sentence := re.match(r".{15,}?(?<!e\.g)(?<!i\.e)\.(?= )", text)):
        text = sentence[0]
    text = text[:1].upper() + text[1:]
    text += "" if text.endswith((".", "!", "?", ":")) else "."
    is_sentence = 10 <= len(text) <= MAX_ANSWER_CHARS and " " in text and text[0].isalpha()
    useless = r":$|->|>>>|^(The|All) .*arguments? |^Deprecated|^(Async )?\w+\(.*\)\.$"
    return text if is_sentence and not re.search(useless, text) else ""


def strip_signature(docstring: str) -> str:
    """Remove the signatures at the start of a docstring, but not the sentence in "D.clear() -> None.  Remove all"."""
    while found := re.match(r"[\w.]+\(.*?\)(?: -+>? *(?:\w+[.,] +)?(.*))?(?:\n+|$)", docstring):
        if found[1] and found[1].count(" ") >= 4:
            return re.sub(r"^(?=an? )", "return ", docstring[found.start(1) :])
        docstring = docstring[found.end() :]
    return docstring


def small_talk() -> list[tuple[str, str]]:
    """Return the pairs of `SMALL_TALK`: each line has two questions and their answer."""
    lines = [line.split(" | ") for line in SMALL_TALK.strip().splitlines()]
    return [(question, answer) for first, second, answer in lines for question in (first, second)]


def make_conversations(pairs: list[tuple[str, str]], repeats: int) -> list[dict]:
    """Return each question in `repeats` conversations of one to about ten questions, with others before it each time.

    A model that sees a question alone, or always after the same one, does not answer it later in a chat. Every third
    time the question is typed carelessly, "what does len do".
    """
    rng, conversations = random.Random(0), []
    for repeat in range(repeats):
        shuffled = rng.sample(pairs, len(pairs))
        while shuffled:
            messages: list[dict] = []
            space = rng.uniform(0, MAX_CONVERSATION_CHARS)
            while shuffled and (not messages or space >= sum(map(len, shuffled[-1]))):
                question, answer = shuffled.pop()
                typed = question if repeat % 3 < 2 else (question[0].lower() + question[1:]).rstrip("?!.")
                messages += [{"role": "user", "content": typed}, {"role": "assistant", "content": answer}]
                space -= len(question) + len(answer)
            conversations.append({"messages": messages})
    return conversations


def write_jsonl(file: Path, records: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
