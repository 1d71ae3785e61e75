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
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cli
from cli import Progress, UserError, check
from shards import FORMAT_VERSION, SPLITS, close_output, is_validation, open_output, write_array
from sources import FileSource, HubSource, Record, expand
from tokenizer import ROLES, Tokenizer, load_tokenizer

KINDS = (".jsonl", ".json", ".parquet")
LAYOUTS = "messages, or conversations, or prompt and completion, or instruction and response or output"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


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
    tokenizer: str = "gpt2"
    """gpt2, or bytes, which needs no download; the model's own."""
    out: Path = Path("data/dolly")
    """The dataset folder to make."""
    block_size: int = 1024
    """The longest conversation in tokens: the model's context."""
    val_fraction: float = 0.02
    """The part of the conversations that is kept for validation."""


@dataclass
class Conversations:
    """One split as it grows: arrays of tokens and of learned marks, one each per conversation."""

    tokens: list[np.ndarray]
    learned: list[np.ndarray]


def main(config: Config) -> None:
    cli.check_range("val_fraction", config.val_fraction, 0, 0.5, open_low=True)
    cli.check_range("block_size", config.block_size, 16)
    of_hub = (config.dataset, config.name, config.split) != (Config.dataset, Config.name, Config.split)
    check(not (config.files and of_hub), "--files excludes --dataset, --name and --split: give one or the other")
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config)
    description = describe(config, tokenizer, source)
    if open_output(config.out, description) is None:
        print(f"{config.out} is already complete.")
        return

    splits = {split: Conversations([], []) for split in SPLITS}
    counts = {"records": 0, "shortened": 0, "dropped": 0, "skipped_empty": 0}
    progress = Progress(None, "record")
    for messages, tokens, learned in examples(source.records(), tokenizer, config.block_size, counts):
        split = splits["val" if is_validation(json.dumps(messages).encode(), config.val_fraction) else "train"]
        split.tokens.append(np.array(tokens, dtype=np.uint16))
        split.learned.append(np.array(learned, dtype=bool))
        progress.update(counts["records"] - progress.done)
    progress.close()
    check_splits(splits, config, counts)
    manifest = {name: write_split(config.out, name, split) for name, split in splits.items()}
    close_output(config.out, description | manifest | counts)
    summarise(config, manifest, counts)


def open_source(config: Config) -> FileSource | HubSource:
    """Local files, or a dataset on the hub."""
    if config.files:
        return FileSource(expand(config.files, KINDS), text_field=None)
    return HubSource(config.dataset, config.name, split=config.split)


def describe(config: Config, tokenizer: Tokenizer, source: FileSource | HubSource) -> dict:
    """The part of the manifest that is known before the work starts; the same description gives the same bytes."""
    return {
        "version": FORMAT_VERSION,
        "kind": "chat",
        "tokenizer": config.tokenizer,
        "vocab_size": tokenizer.chat_vocab_size,
        "source": source.describe(),
        "block_size": config.block_size,
        "val_fraction": config.val_fraction,
    }


def examples(
    records: Iterable[Record], tokenizer: Tokenizer, block_size: int, counts: dict
) -> Iterator[tuple[list[dict], list[int], list[bool]]]:
    """Each conversation that can be learned, as messages, tokens and learned marks; the others are counted.

    Raises `UserError`, naming the record, where there is no assistant to learn from.
    """
    for place, record in records:
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
            yield messages, tokens, [False] * first + learned[first:]  # answers in the prompt are not learned


def to_messages(place: str, record: dict) -> tuple[list[dict], int]:
    """A record as messages of "role" and "content", and how many of them, at the beginning, are prompt only.

    Raises `UserError`, naming the record, where it has no known layout.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in fields:
            return as_messages(place, name, fields[name]), 0
    if "prompt" in fields and "completion" in fields:
        prompt = as_messages(place, "prompt", fields["prompt"], role="user")
        return prompt + as_messages(place, "completion", fields["completion"], role="assistant"), len(prompt)
    has = f"its fields are {', '.join(record)}" if record else "it has no fields"
    check("instruction" in fields, f"{place}: no known layout: {has}; known are {LAYOUTS}")
    instruction = field(place, record, "instruction")
    context = field(place, record, "context", "input", optional=True)
    response = field(place, record, "response", "output")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}], 0


def as_messages(place: str, name: str, value: Any, role: str | None = None) -> list[dict]:
    """The messages in a field: a list of them, or a text of this role."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    check(isinstance(value, list), f"{place}: {name} must be a list of messages")
    return [as_message(f"{place}, message {number} of {name}", item) for number, item in enumerate(value, start=1)]


def as_message(place: str, item: Any) -> dict:
    """A message of "role" and "content", or of ShareGPT's "from" and "value"."""
    said = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    role = said.get("role", SHAREGPT_ROLES.get(str(said.get("from")), said.get("from")))
    content = said.get("content", said.get("value"))
    check(role in ROLES, f"{place}: role {role!r}; a message needs one of {', '.join(ROLES)}")
    check(isinstance(content, str), f"{place}: a message needs a content in text, not {type(content).__name__}")
    return {"role": role, "content": content}


def field(place: str, record: dict, *names: str, optional: bool = False) -> str:
    """The text in the first of these fields that the record has."""
    value = next((record[name] for name in names if record.get(name) is not None), "" if optional else None)
    if not isinstance(value, str):
        fields = ", ".join(map(str, record))
        raise UserError(f"{place}: no text in field {' or '.join(map(repr, names))}; the record has: {fields}")
    return value


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


def summarise(config: Config, manifest: dict, counts: dict) -> None:
    for name, split in manifest.items():
        learned = f"{split['learned_tokens']:,} of {split['tokens']:,} tokens are learned"
        print(f"{name}: {split['documents']:,} conversations, {learned}")
    print(
        f"{counts['records']:,} records, {counts['shortened']} of them shortened to {config.block_size} tokens; not"
        f" kept are {counts['dropped']} with an answer longer than that and {counts['skipped_empty']} with an empty one"
    )
    own = f" --init RUN --data {shlex.quote(str(config.out))} --run {config.out.name}"
    print(f"-> {config.out}; next: python finetune.py{'' if config.out == Config.out else own}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
