"""Turn instructions and conversations into tokens, with a mask of what the assistant learns, for finetuning.

    python prepare_dolly.py                                         # databricks-dolly-15k, from the hub
    python prepare_dolly.py --files mine.jsonl --out data/mine      # your own

The records of files and hub datasets are recognised by their fields, each in one of these layouts:

    {"instruction": "Who wrote it?", "context": "Emma, by Jane Austen", "response": "Jane Austen."}      Dolly
    {"instruction": "Who wrote it?", "input": "Emma, by Jane Austen", "output": "Jane Austen."}          Alpaca
    {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]}       any turns
    {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi."}]}           ShareGPT
    {"prompt": "Hello!", "completion": "Hi."}                                       or messages in both, see below

What the assistant says is learned, in all its turns; where prompt and completion are lists of messages, in those of the
completion alone.

Writes `.npy` arrays and `meta.json` into `--out`, where `finetune.py` reads them.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

import cli
from cli import Progress, check
from layouts import to_messages
from shards import FORMAT_VERSION, SPLITS, close_output, is_chosen, is_validation, open_output, write_array
from sources import FileSource, HubSource, expand, kind_of
from tokenizer import Tokenizer, load_tokenizer

KINDS = (".jsonl", ".json", ".parquet")
COUNTED = ("records", "shortened", "dropped", "skipped_empty")


@dataclass(frozen=True)
class Config:
    dataset: str = "databricks/databricks-dolly-15k"
    """An instruction dataset on the Hugging Face Hub."""
    name: str | None = None
    """Which of the dataset's configurations; None where it has one only."""
    split: str = "train"
    """Which of the dataset's splits is read."""
    files: tuple[str, ...] = ()
    """Local .jsonl, .json and .parquet files instead, as paths, folders or globs; also .jsonl.gz and the like."""
    mix: tuple[str, ...] = ()
    """Several sources instead, as SOURCE=WEIGHT each: files as above, or a hub dataset as owner/name:config:split."""
    tokenizer: str = "gpt2"
    """gpt2, or bytes, which needs no download; the model's own."""
    out: Path = Path("data/dolly")
    """The dataset folder to make."""
    block_size: int = 1024
    """The longest conversation in tokens: the model's context."""
    val_fraction: float = 0.02
    """The part of the conversations that is kept for validation."""
    preview: int | None = None
    """Print the first so many conversations of each source with a mark on what is learned, and write nothing."""


@dataclass
class Source:
    """Where conversations come from, how often each of them is taken, and what that gave."""

    data: FileSource | HubSource
    weight: float = 1.0
    conversations: int = 0
    learned_tokens: int = 0


class Example(NamedTuple):
    """A conversation that can be learned, and the words that name its record."""

    place: str
    messages: list[dict]
    tokens: list[int]
    learned: list[bool]


@dataclass
class Conversations:
    """One split as it grows: arrays of tokens and of learned marks, one each per conversation."""

    tokens: list[np.ndarray] = field(default_factory=list)
    learned: list[np.ndarray] = field(default_factory=list)
    documents: set[bytes] = field(default_factory=set)  # of the validation split of a mix: none of them comes twice


def main(config: Config) -> None:
    check_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    sources = open_sources(config)
    if config.preview is not None:
        preview(config, sources, tokenizer)
        return
    description = describe(config, tokenizer, sources)
    if open_output(config.out, description) is None:
        print(f"{config.out} is already complete.")
        return

    splits, counts = {split: Conversations() for split in SPLITS}, dict.fromkeys(COUNTED, 0)
    progress = Progress(None, "record")
    for source in sources:
        for example in examples(source, tokenizer, config.block_size, counts):
            take(example, source, splits, config)
            progress.update(counts["records"] - progress.done)
    progress.close()
    check_splits(splits, config, counts)
    manifest = {name: write_split(config.out, name, split) for name, split in splits.items()}
    close_output(config.out, description | manifest | counts)
    summarise(config, sources, manifest, counts)


def check_config(config: Config) -> None:
    of_hub = (config.dataset, config.name, config.split) != (Config.dataset, Config.name, Config.split)
    given = [bool(config.files), bool(config.mix), of_hub]
    check(sum(given) <= 1, "--files, --mix and --dataset with --name and --split exclude each other: give one of them")
    cli.check_range("val_fraction", config.val_fraction, 0, 0.5, open_low=True)
    cli.check_range("block_size", config.block_size, 16)
    if config.preview is not None:
        cli.check_range("preview", config.preview, 1)


def open_sources(config: Config) -> list[Source]:
    """The sources that are mixed; or one of local files, or one of a dataset on the hub."""
    if config.mix:
        return [open_weighted(item) for item in config.mix]
    if config.files:
        return [Source(FileSource(expand(config.files, KINDS), text_field=None))]
    return [Source(HubSource(config.dataset, config.name, split=config.split))]


def open_weighted(item: str) -> Source:
    """A source from "mine.jsonl=2": what there is on disk, else a dataset on the hub."""
    name, _, number = item.rpartition("=")
    weight = float(number) if re.fullmatch(r"\d+\.?\d*|\.\d+", number) else 0.0
    check(bool(name) and 0 < weight <= 100, f"--mix {item}: give it as SOURCE=WEIGHT, the weight above 0 and up to 100")
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?", name)
    if on_hub is None or Path(name).exists() or kind_of(Path(name)) in KINDS:
        return Source(FileSource(expand([name], KINDS, "--mix"), text_field=None), weight)
    return Source(HubSource(on_hub[1], on_hub[2] or None, split=on_hub[3] or "train"), weight)


def describe(config: Config, tokenizer: Tokenizer, sources: list[Source]) -> dict:
    """The part of the manifest that is known before the work starts; the same description gives the same bytes."""
    parts = [source.data.describe() for source in sources]
    mixed = [{"weight": source.weight} | part for source, part in zip(sources, parts, strict=True)]
    return {
        "version": FORMAT_VERSION,
        "kind": "chat",
        "tokenizer": config.tokenizer,
        "vocab_size": tokenizer.chat_vocab_size,
        "source": {"mix": mixed} if config.mix else parts[0],
        "block_size": config.block_size,
        "val_fraction": config.val_fraction,
    }


def take(example: Example, source: Source, splits: dict[str, Conversations], config: Config) -> None:
    """Put a conversation into its split as often as the source's weight says; into a mix's validation split once.

    Whether it is taken for a weight's fraction is decided by its own hash, so other data never changes it.
    """
    document = json.dumps(example.messages).encode()
    times = int(source.weight) + is_chosen(document, source.weight % 1, salt=b"mix")
    split = splits["val" if is_validation(document, config.val_fraction) else "train"]
    if config.mix and split is splits["val"]:
        times = min(times, 1) if document not in split.documents else 0
        split.documents |= {document} if times else set()
    split.tokens += [np.array(example.tokens, dtype=np.uint16)] * times
    split.learned += [np.array(example.learned, dtype=bool)] * times
    source.conversations += times
    source.learned_tokens += times * sum(example.learned)


def examples(source: Source, tokenizer: Tokenizer, block_size: int, counts: dict) -> Iterator[Example]:
    """Each conversation that can be learned; the others are counted.

    Raises `UserError`, naming the record, where there is no assistant to learn from.
    """
    for place, record in source.data.records():
        counts["records"] += 1
        messages, n_prompt = to_messages(place, record)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= n_prompt]
        check(bool(answers), f"{place}: nothing to learn: the conversation has no message of the assistant")
        messages = messages[: answers[-1] + 1]  # what follows the last answer teaches nothing
        if not any(messages[i]["content"].strip() for i in answers):
            counts["skipped_empty"] += 1
            continue
        encoded = tokenizer.encode_chat(messages)
        if len(encoded[0]) > block_size:
            encoded = tokenizer.encode_chat(messages, max_length=block_size)
            counts["dropped" if encoded is None else "shortened"] += 1
        if encoded is not None:
            tokens, learned = encoded
            turns = [i for i, token in enumerate(tokens) if token == tokenizer.role_tokens["assistant"]]
            first = turns[-len(answers) :][0]
            learned[:first] = [False] * first  # answers in the prompt
            yield Example(place, messages, tokens, learned)


def preview(config: Config, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Print the first conversations of each source as they would be written, with marks on what is learned."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\033[32m", "\033[0m") if colour else ("«", "»")
    for source in sources:
        counts = dict.fromkeys(COUNTED, 0)
        for example in islice(examples(source, tokenizer, config.block_size, counts), config.preview):
            print(f"--- {example.place}: {sum(example.learned):,} of {len(example.tokens):,} tokens are learned")
            print(marked(example, tokenizer, begin, end), end="\n\n")
        check(counts["records"] > 0, "no conversations to learn: a source has no records")
        print(told(counts, config))
    print(f"preview only, what is learned {'in green' if colour else 'between « and »'}: {config.out} was not written")


def marked(example: Example, tokenizer: Tokenizer, begin: str, end: str) -> str:
    """A conversation's tokens as text, special tokens by their names, what is learned between two marks.

    Text that looks like a special token or a mark, what a terminal may take for a command, and bytes that are no UTF-8
    show as escapes.
    """

    def shown(c: str) -> str:
        return c if (c.isprintable() and c not in (begin, end)) or c in "\n\t" else c.encode("unicode_escape").decode()

    def kind(pair: tuple[int, bool]) -> tuple[bool, bool]:
        return pair[1], pair[0] >= tokenizer.end_of_text

    text = ""
    for (learned, special), run in groupby(zip(example.tokens, example.learned, strict=True), kind):
        piece = b"".join(tokenizer.token_bytes(token) for token, _ in run).decode("utf-8", "backslashreplace")
        if not special:
            piece = "".join(map(shown, piece)).replace("<|", "\\x3c|")
        text += f"{begin}{piece}{end}" if learned else piece
    return text.replace(end + begin, "")


def check_splits(splits: dict[str, Conversations], config: Config, counts: dict) -> None:
    """Raise `UserError` where a split got no conversation."""
    total = sum(len(split.tokens) for split in splits.values())
    why = f"of {counts['records']} records {counts['dropped']} are too long and {counts['skipped_empty']} are empty"
    check(total > 0, f"no conversations to learn: {why}")
    for name, split in splits.items():
        direction = "larger" if name == "val" else "smaller"
        check(
            len(split.tokens) > 0,
            f"none of the {total} conversations fell into the {name} split at --val_fraction"
            f" {config.val_fraction}: choose a {direction} one, or give more conversations",
        )


def write_split(folder: Path, name: str, split: Conversations) -> dict:
    """Write one split's three arrays; returns the split's entry in the manifest."""
    offsets = np.cumsum([0, *map(len, split.tokens)], dtype=np.int64)
    tokens, learned = np.concatenate(split.tokens), np.concatenate(split.learned)
    arrays = {"tokens": tokens, "learned": learned, "offsets": offsets}
    return {
        "documents": len(split.tokens),
        "tokens": len(tokens),
        "learned_tokens": int(learned.sum()),
        "files": [write_array(folder / f"{name}_{key}.npy", array) for key, array in arrays.items()],
    }


def told(counts: dict, config: Config) -> str:
    return (
        f"{counts['records']:,} records, {counts['shortened']:,} of them shortened to {config.block_size:,} tokens; not"
        f" kept are {counts['dropped']:,} with an answer longer than that and {counts['skipped_empty']:,} without any"
    )


def summarise(config: Config, sources: list[Source], manifest: dict, counts: dict) -> None:
    for item, source in zip(config.mix, sources, strict=False):  # a single source needs no line of its own
        print(f"{item}: {source.conversations:,} conversations, {source.learned_tokens:,} learned tokens")
    for name, split in manifest.items():
        learned = f"{split['learned_tokens']:,} of {split['tokens']:,} tokens are learned"
        print(f"{name}: {split['documents']:,} conversations, {learned}")
    print(told(counts, config))
    own = f" --init RUN --data {shlex.quote(str(config.out))} --run {config.out.name}"
    print(f"-> {config.out}; next: python finetune.py{'' if config.out == Config.out else own}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
