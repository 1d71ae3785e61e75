"""Turn text into token shards for pretraining.

    python prepare_fineweb.py                                       # FineWeb-Edu's 10-billion-token sample, streamed
    python prepare_fineweb.py --max_tokens 100_000_000              # a smaller piece of it
    python prepare_fineweb.py --files books/ 'mine/*.txt' more.jsonl.gz --out data/mine --val_fraction 0.05

Writes `.npy` shards and `meta.json` into `--out`, where `pretrain.py` reads them.  FineWeb-Edu's 10 billion tokens take
20 GB of disk and some hours, most of them download; memory stays the same however large the corpus is.  Interrupted,
the same command goes on from the last finished shard.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import cli
from cli import Progress, check
from shards import (
    FORMAT_VERSION,
    SPLITS,
    ShardWriter,
    close_output,
    is_validation,
    open_output,
    read_ahead,
    save_progress,
)
from sources import FileSource, HubSource, batched_texts, expand
from tokenizer import load_tokenizer, utf8

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class Config:
    dataset: str = FINEWEB_EDU
    """A text dataset on the Hugging Face Hub."""
    name: str | None = None
    """Which of the dataset's configurations; None takes sample-10BT of FineWeb-Edu, and the default of any other."""
    split: str = "train"
    """Which of the dataset's splits is read."""
    files: tuple[str, ...] = ()
    """Local .txt, .jsonl and .parquet files instead, as paths, folders or globs; also .txt.gz, .jsonl.zst and so on."""
    text_field: str = "text"
    """Where a record has its text."""
    tokenizer: str = "gpt2"
    """gpt2, or bytes, which needs no download."""
    out: Path = Path("data/fineweb_edu")
    """The dataset folder to make."""
    shard_tokens: int = 100_000_000
    """Tokens per shard; a token takes two bytes."""
    val_fraction: float = 0.005
    """The part of the documents that is kept for validation."""
    max_tokens: int | None = None
    """Stop after the document that reaches this many tokens."""


def main(config: Config) -> None:
    check_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_source(config)
    description = describe(config, source)
    progress = open_output(config.out, description)
    if progress is None:
        print(f"{config.out} is already complete.")
        return

    started, skipped = time.perf_counter(), progress.get("skipped_empty", 0)
    writers = {split: ShardWriter(config.out, split, config.shard_tokens, progress.get(split)) for split in SPLITS}
    before = done = tokens_of(writers)
    bar = Progress(config.max_tokens, "token", initial=before)
    for texts, position in read_ahead(batched_texts(source, progress.get("position"), config.text_field)):
        full = [text for text in texts if text.strip()]
        skipped += len(texts) - len(full)
        shards = shards_of(writers)
        for text, tokens in zip(full, tokenizer.encode_documents(full), strict=True):
            writers["val" if is_validation(utf8(text), config.val_fraction) else "train"].add(tokens)
            if reached(writers, config.max_tokens):
                break
        done, previous = tokens_of(writers), done
        bar.update(done - previous, f"{(done - before) / (time.perf_counter() - started) / 1e6:.2f} M tokens/s")
        if reached(writers, config.max_tokens):
            break
        if shards_of(writers) > shards:
            states = {split: writer.state() for split, writer in writers.items()}
            states |= {"position": position, "skipped_empty": skipped}
            save_progress(config.out, description, states)
    bar.close()
    splits = finish(writers, config, skipped)
    close_output(config.out, description | splits | {"skipped_empty": skipped})
    summarise(config, splits, skipped, time.perf_counter() - started)


def check_config(config: Config) -> None:
    of_hub = (config.dataset, config.name, config.split) != (Config.dataset, Config.name, Config.split)
    check(not (config.files and of_hub), "--files excludes --dataset, --name and --split: give one or the other")
    cli.check_range("val_fraction", config.val_fraction, 0, 0.5, open_low=True)
    cli.check_range("shard_tokens", config.shard_tokens, 1, 2**31)
    if config.max_tokens is not None:
        cli.check_range("max_tokens", config.max_tokens, 1)


def open_source(config: Config) -> FileSource | HubSource:
    """Local files, or a dataset on the hub."""
    if config.files:
        return FileSource(expand(config.files, (".txt", ".jsonl", ".parquet")), config.text_field)
    name = config.name or ("sample-10BT" if config.dataset == FINEWEB_EDU else None)
    return HubSource(config.dataset, name, config.text_field, config.split)


def describe(config: Config, source: FileSource | HubSource) -> dict:
    """The part of the manifest that is known before the work starts; the same description gives the same bytes."""
    return {
        "version": FORMAT_VERSION,
        "kind": "text",
        "tokenizer": config.tokenizer,
        "vocab_size": load_tokenizer(config.tokenizer).vocab_size,
        "source": source.describe(),
        "text_field": config.text_field,
        "shard_tokens": config.shard_tokens,
        "val_fraction": config.val_fraction,
        "max_tokens": config.max_tokens,
    }


def tokens_of(writers: dict[str, ShardWriter]) -> int:
    return sum(writer.tokens for writer in writers.values())


def shards_of(writers: dict[str, ShardWriter]) -> int:
    return sum(len(writer.shards) for writer in writers.values())


def reached(writers: dict[str, ShardWriter], max_tokens: int | None) -> bool:
    return max_tokens is not None and tokens_of(writers) >= max_tokens


def finish(writers: dict[str, ShardWriter], config: Config, skipped: int) -> dict:
    """Close the shards.  Raises `UserError` where a split got no document."""
    documents = sum(writer.documents for writer in writers.values())
    check(documents > 0, f"no documents: the source holds no text ({skipped} empty documents)")
    check(documents > 1, "the source holds one document, and training and validation need one each: give more text")
    for split, writer in writers.items():
        direction = "larger" if split == "val" else "smaller"
        check(
            writer.documents > 0,
            f"none of the {documents} documents fell into the {split} split at --val_fraction"
            f" {config.val_fraction}: choose a {direction} one, or give more documents",
        )
    return {split: writer.close() for split, writer in writers.items()}


def summarise(config: Config, splits: dict, skipped: int, seconds: float) -> None:
    tokens = sum(split["tokens"] for split in splits.values())
    for name, split in splits.items():
        print(f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents, {len(split['files'])} shards")
    print(f"{tokens:,} tokens in all, {skipped} empty documents skipped, {seconds:.0f} s -> {config.out}")
    run = "" if config.out == Config.out else f" --data {shlex.quote(str(config.out))} --run {config.out.name}"
    print(f"next: python pretrain.py{run}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
