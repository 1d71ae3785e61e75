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
    {"question": "Who wrote it?", "answer": "Jane Austen."}                question and answer
    {"prompt": "Who wrote it?", "response": "Jane Austen."}                prompt and response

The loss covers all messages of the assistant; with prompt and completion, those of the completion only. `--files` takes
.jsonl, .json, .csv and .parquet files, and folders saved by datasets.save_to_disk.

Writes `.npy` arrays and `meta.json` into `--out`, which `finetune.py` reads. Dolly-15k takes less than a minute.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minigpt import cli, shards
from minigpt.chat import encode_chat, to_messages
from minigpt.cli import Progress, UserError, plural
from minigpt.runs import RUNS, list_checkpoints, list_runs, read_meta
from minigpt.shards import FORMAT_VERSIONS, SPLITS, SplitChooser
from minigpt.sources import DatasetConfig, FileSource, HubSource, data_suffix, find_files
from minigpt.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
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
    block_size: int | None = None
    """Maximum length of a conversation in tokens; default: the context of the newest pretrained model under runs/."""
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


class Conversation(NamedTuple):
    """A conversation of the dataset, and how often the training split contains it."""

    source: Source
    hash: float
    tokens: np.ndarray
    loss_mask: np.ndarray
    times: int


def main(config: Config) -> None:
    check_config(config)
    sources = open_sources(config)
    tokenizer = load_tokenizer(config.tokenizer)
    run = find_pretrained_run(tokenizer.name, config.block_size or 1)
    config = choose_block_size(config, run, tokenizer)
    if config.preview is not None:
        preview(config, sources, tokenizer)
        return
    meta = dataset_meta(config, tokenizer, sources)
    if shards.begin_dataset(config.out, meta) is None:
        print(f"{config.out} is already complete")
        meta = shards.read_meta(config.out, "chat")
        shards.open_arrays(config.out, meta)  # checks their lengths
        print_summary(config, meta, run)
        return
    tokenizer.save(config.out)
    try:
        meta |= read_splits(config, sources, tokenizer)
    except UserError:  # nothing is saved yet
        shards.discard_dataset(config.out)
        raise
    shards.finish_dataset(config.out, meta)
    for item, source in zip(config.mix, sources, strict=False):  # no lines without --mix
        n_tokens = plural(source.loss_tokens, "token")
        print(f"{item}: {plural(source.conversations, 'conversation')}, {n_tokens} in the loss")
    print_summary(config, meta, run)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    config.check("mix")
    if config.val_files and config.val_fraction != Config.val_fraction:
        raise UserError("--val_files and --val_fraction cannot be combined: give one of them")
    cli.check_range("block_size", config.block_size, 16)
    cli.check_range("preview", config.preview, 1)


def open_sources(config: Config) -> list[Source]:
    """Return the sources of --mix, the local files, or the dataset on the hub; and those of --val_files."""
    open_files = partial(FileSource, text_field=None, max_record_mb=config.max_record_mb)
    if config.mix:
        sources = [parse_mix_item(item, open_files) for item in config.mix]
    elif config.files:
        sources = [Source(open_files(find_files(config.files, SUFFIXES, split=config.split)))]
    else:
        sources = [Source(HubSource(config.dataset, config.name, split=config.split))]
    if config.val_files:
        sources = [replace(source, split="train") for source in sources]
        val_files = find_files(config.val_files, SUFFIXES, "--val_files")
        sources.append(Source(open_files(val_files), split="val"))
    return sources


def parse_mix_item(item: str, open_files: Callable[[list[Path]], FileSource]) -> Source:
    """Return the source of "mine.jsonl=2": a local path if it exists, else a dataset on the hub."""
    name, _, number = item.rpartition("=")
    weight = float(number) if re.fullmatch(r"\d+\.?\d*|\.\d+", number) else 0.0
    if not name or not 0 < weight <= 100:
        raise UserError(f"--mix {item}: expected SOURCE=WEIGHT, with a weight above 0 and at most 100")
    hub_name = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?", name)
    if hub_name is None or Path(name).exists() or data_suffix(Path(name)) in SUFFIXES:
        return Source(open_files(find_files([name], SUFFIXES, "--mix")), weight)
    return Source(HubSource(hub_name[1], hub_name[2] or None, split=hub_name[3] or "train"), weight)


def find_pretrained_run(tokenizer: str, block_size: int) -> tuple[Path, dict] | None:
    """Return the newest run of pretrain.py under runs/ with this tokenizer, and its model's sizes.

    Its context is at least `block_size`.
    """
    for run in reversed(list_runs()):
        with contextlib.suppress(UserError):  # corrupt
            meta = read_meta(list_checkpoints(run)[-1])
            fits = meta["tokenizer"] == tokenizer and meta["model"]["block_size"] >= block_size
            if fits and "init" not in meta["identity"]:  # finetune.py's flags have --init
                return run, meta["model"]
    return None


def choose_block_size(config: Config, run: tuple[Path, dict] | None, tokenizer: Tokenizer) -> Config:
    """Return the flags with the context of the run as --block_size, unless it was given."""
    if config.block_size is not None:
        return config
    block_size, reason = 1024, f"no run under {RUNS} has {tokenizer.name} tokens yet"
    if run is not None:
        block_size, reason = run[1]["block_size"], f"the context of {run[0]}"
    print(f"--block_size {block_size}: {reason}")
    return replace(config, block_size=block_size)


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


def read_splits(config: Config, sources: list[Source], tokenizer: Tokenizer) -> dict:
    """Read all conversations, write both splits and return their entries for meta.json."""
    conversations: list[Conversation] = []
    counts, chooser = dict.fromkeys(COUNTS, 0), SplitChooser(1)
    progress = Progress(None, "record")
    for source in sources:
        for example in read_examples(source, tokenizer, config.block_size, counts):
            conversation = make_conversation(example, source)
            if conversation.times:
                conversations.append(conversation)
                chooser.add(conversation.hash, 1)
            progress.update(counts["records"] - progress.done)
    progress.close()
    val_fraction, skipped = config.val_fraction, format_counts(counts, config.block_size)
    if not config.val_files:
        val_fraction = chooser.choose(val_fraction, "conversation", skipped)
    splits = split_conversations(conversations, val_fraction, unique=bool(config.mix))
    for name in SPLITS:
        if not splits[name]:
            raise UserError(f"no usable conversation for the {name} split ({skipped}): give more data")
    entries = {name: write_split(config.out, name, split) for name, split in splits.items()} | counts
    return entries | ({"val_fraction_used": val_fraction} if val_fraction != config.val_fraction else {})


def make_conversation(example: Example, source: Source) -> Conversation:
    """Return an example as arrays, with its hash.

    The hash decides whether a fractional weight includes it, so adding data never changes that.
    """
    document = json.dumps(example.messages).encode()
    times = int(source.weight) + (shards.hash_document(document, salt=b"mix") < source.weight % 1)
    tokens, loss_mask = np.array(example.tokens, dtype=np.uint16), np.array(example.loss_mask, dtype=bool)
    return Conversation(source, shards.hash_document(document), tokens, loss_mask, times)


def split_conversations(
    conversations: list[Conversation], val_fraction: float, unique: bool
) -> dict[str, list[Conversation]]:
    """Return the conversations of each split, repeated by their sources' weights.

    With `unique`, the validation split contains each once.
    """
    splits: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
    seen: set[float] = set()
    for conversation in conversations:
        split = conversation.source.split or ("val" if conversation.hash < val_fraction else "train")
        times = conversation.times
        if unique and split == "val":
            times = int(conversation.hash not in seen)
            seen.add(conversation.hash)
        splits[split] += [conversation] * times
        conversation.source.conversations += times
        conversation.source.loss_tokens += times * int(conversation.loss_mask.sum())
    return splits


def write_split(folder: Path, name: str, split: list[Conversation]) -> dict:
    """Write one split's three arrays; return its entry for meta.json."""
    tokens = np.concatenate([conversation.tokens for conversation in split])
    loss_mask = np.concatenate([conversation.loss_mask for conversation in split])
    offsets = np.cumsum([0, *(len(conversation.tokens) for conversation in split)], dtype=np.int64)
    arrays = {"tokens": tokens, "loss_mask": loss_mask, "offsets": offsets}
    return {
        "documents": len(split),
        "tokens": len(tokens),
        "loss_tokens": int(loss_mask.sum()),
        "files": [shards.write_array(folder / f"{name}_{key}.npy", array) for key, array in arrays.items()],
    }


def print_summary(config: Config, meta: dict, run: tuple[Path, dict] | None) -> None:
    """Print the size of each split and the next command."""
    for split in SPLITS:
        in_loss = f"{meta[split]['loss_tokens']:,} of {plural(meta[split]['tokens'], 'token')} in the loss"
        print(f"{split}: {plural(meta[split]['documents'], 'conversation')}, {in_loss}")
    if explanation := shards.explain_val_fraction(meta, "conversation"):
        print(explanation)
    print(f"{config.out}: {format_counts(meta, config.block_size)}")
    if run is None:
        tokenizer = "" if config.tokenizer == Config.tokenizer else f" --tokenizer {shlex.quote(config.tokenizer)}"
        command = f"python {cli.script_path('prepare_fineweb.py')}{tokenizer}"
        print("no run has this tokenizer: pretrain a model with it first, or prepare again with that of a run")
        print(f"next: {command}")
        return
    folder, model = run
    command = f"python {cli.script_path('finetune.py')}"
    command += "" if folder == RUNS / "gpt2" else f" --init {shlex.quote(str(folder))}"
    if config.out != Config.out:
        name = config.out.resolve().name
        out = RUNS / (f"{name}_chat" if folder == RUNS / name else name)
        command += f" --data {shlex.quote(str(config.out))} --out {shlex.quote(str(out))}"
    on_gpu = shutil.which("nvidia-smi") is not None
    flags = suggest_finetuning(meta["train"]["documents"], meta["train"]["tokens"], model, on_gpu)
    print(f"next: {command} {flags}".rstrip())


def suggest_finetuning(n_conversations: int, n_tokens: int, model: dict, on_gpu: bool) -> str:
    """Return flags of finetune.py that suit the training split, the model's sizes and the device; "" for its defaults.

    Small batches and more epochs give a few conversations about 300 steps, but at most 30 epochs of at least 8 steps.
    """
    flags = []
    if n_conversations < 2000 or not on_gpu:
        batch_tokens = max(1, min(4096, n_tokens // 8) // model["block_size"]) * model["block_size"]
        epochs = min(max(3, round(300 * batch_tokens / n_tokens)), 30)
        flags += [f"--batch_tokens {batch_tokens}", f"--epochs {epochs}"]
    if model["n_embd"] < 512:
        flags += ["--lr 1e-3"]
    return " ".join(flags)


def format_counts(counts: dict, block_size: int) -> str:
    return (
        f"{plural(counts['records'], 'record')}, {counts['truncated']:,} truncated to {block_size:,} tokens,"
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
        print(format_counts(counts, config.block_size))
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
