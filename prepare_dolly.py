"""Turn instructions and conversations into tokens with a loss mask, for finetuning.

    python prepare_dolly.py                                         # databricks-dolly-15k, from the hub
    python prepare_dolly.py --files mine.jsonl --out data/mine      # your own
    python prepare_dolly.py --files mine.jsonl --preview 3          # show the loss mask; write nothing

The fields of a record determine its layout:

    {"instruction": "Who wrote it?", "context": "Emma, by Jane Austen", "response": "Jane Austen."}      Dolly
    {"instruction": "Who wrote it?", "input": "Emma, by Jane Austen", "output": "Jane Austen."}          Alpaca
    {"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]}       OpenAI
    {"conversations": [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hi."}]}           ShareGPT
    {"prompt": "Hello!", "completion": "Hi."}                              TRL; each may be a list of messages

The loss covers all messages of the assistant; with prompt and completion, those of the completion only.

Writes `.npy` arrays and `meta.json` into `--out`, which `finetune.py` reads. Dolly-15k takes less than a minute.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigpt import cli, shards
from minigpt.chat import encode_chat, to_messages
from minigpt.cli import Progress, UserError
from minigpt.shards import FORMAT_VERSIONS, SPLITS
from minigpt.sources import DatasetConfig, FileSource, HubSource, data_suffix, find_files
from minigpt.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = (".jsonl", ".json", ".parquet")
COUNTS = ("records", "truncated", "dropped", "skipped_empty")


@dataclass(frozen=True)
class Config(DatasetConfig):
    dataset: str = "databricks/databricks-dolly-15k"
    out: Path = Path("data/dolly")
    val_fraction: float = 0.02
    mix: tuple[str, ...] = ()
    """Weighted sources instead, SOURCE=WEIGHT: files, folders, or hub datasets as owner/name:config:split."""
    val_files: tuple[str, ...] = ()
    """Local files with the conversations of the validation split; then all others are for training."""
    block_size: int = 1024
    """Maximum length of a conversation in tokens: the model's context."""
    preview: int | None = None
    """Print this number of conversations of each source with their loss mask, and write nothing."""


@dataclass
class Source:
    """A source of conversations, its weight, the split it is for (None: either), and what it contributed."""

    data: FileSource | HubSource
    weight: float = 1.0
    split: str | None = None
    conversations: int = 0
    loss_tokens: int = 0


class Example(NamedTuple):
    """A conversation with its tokens and loss mask, and the location of its record."""

    location: str
    messages: list[dict]
    tokens: list[int]
    loss_mask: list[bool]


@dataclass
class Split:
    """One split while it is built: arrays of tokens and loss mask for each conversation."""

    tokens: list[np.ndarray] = field(default_factory=list)
    loss_mask: list[np.ndarray] = field(default_factory=list)
    documents: set[bytes] = field(default_factory=set)  # of a mix's validation split, to exclude duplicates


def main(config: Config) -> None:
    check_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    sources = open_sources(config)
    if config.preview is not None:
        preview(config, sources, tokenizer)
        return
    meta = dataset_meta(config, tokenizer, sources)
    if shards.begin_dataset(config.out, meta) is None:
        print(f"{config.out} is already complete")
        return

    tokenizer.save(config.out)
    splits, counts = {split: Split() for split in SPLITS}, dict.fromkeys(COUNTS, 0)
    progress = Progress(None, "record")
    for source in sources:
        for example in read_examples(source, tokenizer, config.block_size, counts):
            add_example(example, source, splits, config)
            progress.update(counts["records"] - progress.done)
    progress.close()
    sizes = {name: len(split.tokens) for name, split in splits.items()}
    shards.check_splits(sizes, "conversations", config.val_fraction, format_counts(counts, config))
    written = {name: write_split(config.out, name, split) for name, split in splits.items()}
    shards.finish_dataset(config.out, meta | written | counts)
    print_summary(config, sources, written, counts)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    config.check("mix")
    if config.val_files and config.val_fraction != Config.val_fraction:
        raise UserError("--val_files and --val_fraction cannot be combined: give one of them")
    cli.check_range("block_size", config.block_size, 16)
    cli.check_range("preview", config.preview, 1)


def open_sources(config: Config) -> list[Source]:
    """Return the sources of --mix, the local files, or the dataset on the hub; and those of --val_files."""
    if config.mix:
        sources = [parse_mix_item(item) for item in config.mix]
    elif config.files:
        sources = [Source(FileSource(find_files(config.files, SUFFIXES), text_field=None))]
    else:
        sources = [Source(HubSource(config.dataset, config.name, split=config.split))]
    if config.val_files:
        sources = [replace(source, split="train") for source in sources]
        val_files = find_files(config.val_files, SUFFIXES, "--val_files")
        sources.append(Source(FileSource(val_files, text_field=None), split="val"))
    return sources


def parse_mix_item(item: str) -> Source:
    """Return the source of "mine.jsonl=2": a local path if it exists, else a dataset on the hub."""
    name, _, number = item.rpartition("=")
    weight = float(number) if re.fullmatch(r"\d+\.?\d*|\.\d+", number) else 0.0
    if not name or not 0 < weight <= 100:
        raise UserError(f"--mix {item}: expected SOURCE=WEIGHT, with a weight above 0 and at most 100")
    hub_name = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?", name)
    if hub_name is None or Path(name).exists() or data_suffix(Path(name)) in SUFFIXES:
        return Source(FileSource(find_files([name], SUFFIXES, "--mix"), text_field=None), weight)
    return Source(HubSource(hub_name[1], hub_name[2] or None, split=hub_name[3] or "train"), weight)


def dataset_meta(config: Config, tokenizer: Tokenizer, sources: list[Source]) -> dict:
    """Return the metadata that is fixed before the work starts. The same metadata gives the same bytes."""
    parts = [source.data.metadata() for source in sources]
    val_source = {"val": parts.pop()} if config.val_files else {}
    mix = [{"weight": source.weight} | part for source, part in zip(sources, parts, strict=False)]
    return {
        "version": FORMAT_VERSIONS["chat"],
        "kind": "chat",
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.chat_vocab_size,
        "source": ({"mix": mix} if config.mix else parts[0]) | val_source,
        "block_size": config.block_size,
        "val_fraction": config.val_fraction,
    }


def read_examples(source: Source, tokenizer: Tokenizer, block_size: int, counts: dict) -> Iterator[Example]:
    """Yield the conversations of a source. Those whose answers are empty or too long are only counted.

    Raises `UserError`, naming the record, if a conversation has no message of the assistant.
    """
    for location, record in source.data.records():
        counts["records"] += 1
        messages, n_prompt = to_messages(location, record)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= n_prompt]
        if not answers:
            raise UserError(f"{location}: the conversation has no message of the assistant")
        messages = messages[: answers[-1] + 1]  # messages after the last answer are not in the loss
        if not any(messages[i]["content"].strip() for i in answers):
            counts["skipped_empty"] += 1
            continue
        encoded = encode_chat(tokenizer, messages)
        if len(encoded[0]) > block_size:
            encoded = encode_chat(tokenizer, messages, max_length=block_size)
            counts["dropped" if encoded is None else "truncated"] += 1
        if encoded is not None:
            tokens, loss_mask = encoded
            turns = [i for i, token in enumerate(tokens) if token == tokenizer.role_tokens["assistant"]]
            first = turns[-len(answers) :][0]
            loss_mask[:first] = [False] * first  # answers in the prompt
            yield Example(location, messages, tokens, loss_mask)


def add_example(example: Example, source: Source, splits: dict[str, Split], config: Config) -> None:
    """Add a conversation to its split repeated by the source's weight; once to a mix's validation split.

    The conversation's hash decides whether a fractional weight includes it, so adding data never changes that.
    """
    document = json.dumps(example.messages).encode()
    times = int(source.weight) + shards.hash_selects(document, source.weight % 1, salt=b"mix")
    split = splits[source.split or ("val" if shards.is_validation(document, config.val_fraction) else "train")]
    if config.mix and split is splits["val"]:
        times = min(times, 1) if document not in split.documents else 0
        split.documents |= {document} if times else set()
    split.tokens += [np.array(example.tokens, dtype=np.uint16)] * times
    split.loss_mask += [np.array(example.loss_mask, dtype=bool)] * times
    source.conversations += times
    source.loss_tokens += times * sum(example.loss_mask)


def write_split(folder: Path, name: str, split: Split) -> dict:
    """Write one split's three arrays; return its entry for meta.json."""
    offsets = np.cumsum([0, *map(len, split.tokens)], dtype=np.int64)
    tokens, loss_mask = np.concatenate(split.tokens), np.concatenate(split.loss_mask)
    arrays = {"tokens": tokens, "loss_mask": loss_mask, "offsets": offsets}
    return {
        "documents": len(split.tokens),
        "tokens": len(tokens),
        "loss_tokens": int(loss_mask.sum()),
        "files": [shards.write_array(folder / f"{name}_{key}.npy", array) for key, array in arrays.items()],
    }


def print_summary(config: Config, sources: list[Source], written: dict, counts: dict) -> None:
    """Print the size of each source and split, and the next command."""
    for item, source in zip(config.mix, sources, strict=False):  # no lines without --mix
        print(f"{item}: {source.conversations:,} conversations, {source.loss_tokens:,} tokens in the loss")
    for name, split in written.items():
        in_loss = f"{split['loss_tokens']:,} of {split['tokens']:,} tokens in the loss"
        print(f"{name}: {split['documents']:,} conversations, {in_loss}")
    print(f"{config.out}: {format_counts(counts, config)}")
    data, out = shlex.quote(str(config.out)), shlex.quote(f"runs/{config.out.name}")
    print(f"next: python finetune.py{'' if config.out == Config.out else f' --init RUN --data {data} --out {out}'}")


def format_counts(counts: dict, config: Config) -> str:
    return (
        f"{counts['records']:,} records, {counts['truncated']:,} truncated to {config.block_size:,} tokens,"
        f" {counts['dropped']:,} dropped (answer too long), {counts['skipped_empty']:,} skipped (empty answer)"
    )


def preview(config: Config, sources: list[Source], tokenizer: Tokenizer) -> None:
    """Print the first conversations of each source with their loss mask."""
    in_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\033[32m", "\033[0m") if in_color else ("«", "»")
    for source in sources:
        counts = dict.fromkeys(COUNTS, 0)
        for example in islice(read_examples(source, tokenizer, config.block_size, counts), config.preview):
            n_loss, n_tokens = sum(example.loss_mask), len(example.tokens)
            print(f"--- {example.location}: {n_loss:,} of {n_tokens:,} tokens in the loss")
            print(format_example(example, tokenizer, begin, end), end="\n\n")
        if counts["records"] == 0:
            raise UserError("no conversations: a source has no records")
        print(format_counts(counts, config))
    mark = "green" if in_color else "between « and »"
    print(f"preview: tokens in the loss are {mark}; {config.out} was not written")


def format_example(example: Example, tokenizer: Tokenizer, begin: str, end: str) -> str:
    """Return a conversation as text: special tokens by name, tokens in the loss between `begin` and `end`.

    Text that looks like a special token or a mark, control characters, and invalid UTF-8 are escaped.
    """

    def escape(c: str) -> str:
        return c if (c.isprintable() and c not in (begin, end)) or c in "\n\t" else c.encode("unicode_escape").decode()

    def group_key(pair: tuple[int, bool]) -> tuple[bool, bool]:
        token, in_loss = pair
        return in_loss, token >= tokenizer.end_of_text

    text = ""
    for (in_loss, special), group in groupby(zip(example.tokens, example.loss_mask, strict=True), group_key):
        piece = b"".join(tokenizer.token_bytes(token) for token, _ in group).decode("utf-8", "backslashreplace")
        if not special:
            piece = "".join(map(escape, piece)).replace("<|", "\\x3c|")
        text += f"{begin}{piece}{end}" if in_loss else piece
    return text.replace(end + begin, "")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
