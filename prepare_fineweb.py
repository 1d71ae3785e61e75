"""Tokenise text into shards for pretraining.

    python prepare_fineweb.py                                       # FineWeb-Edu's 10-billion-token sample, streamed
    python prepare_fineweb.py --max_tokens 100_000_000              # a part of it
    python prepare_fineweb.py --files books/ 'mine/*.txt' more.jsonl.gz --out data/mine --val_fraction 0.05

Writes `.npy` shards and `meta.json` into `--out`, which `pretrain.py` reads. FineWeb-Edu's 10 billion tokens take
20 GB of disk and a few hours, most of it for the download. Memory use does not depend on the size of the corpus. If
the script is interrupted, run the same command again to resume at the last finished shard.
"""

import math
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from minigpt import cli, shards
from minigpt.cli import Progress
from minigpt.prefetch import prefetch
from minigpt.shards import FORMAT_VERSIONS, SPLITS, ShardWriter
from minigpt.sources import (
    FINEWEB_EDU,
    DatasetConfig,
    FileSource,
    HubSource,
    TextSourceConfig,
    open_text_source,
    text_batches,
)
from minigpt.tokenizer import Tokenizer, encode_utf8, load_tokenizer


@dataclass(frozen=True)
class Config(DatasetConfig, TextSourceConfig):
    dataset: str = FINEWEB_EDU
    out: Path = Path("data/fineweb_edu")
    val_fraction: float = 0.005
    shard_tokens: int = 100_000_000
    """Tokens per shard, two bytes each."""
    max_tokens: int | None = None
    """Stop after the document that reaches this number of tokens."""


def main(config: Config) -> None:
    check_config(config)
    tokenizer = load_tokenizer(config.tokenizer)
    source = open_text_source(config)
    meta = dataset_meta(config, tokenizer, source)
    progress = shards.begin_dataset(config.out, meta)
    if progress is None:
        print(f"{config.out} is already complete")
        return

    tokenizer.save(config.out)
    started, n_empty = time.perf_counter(), progress.get("skipped_empty", 0)
    writers = {split: ShardWriter(config.out, split, config.shard_tokens, progress.get(split)) for split in SPLITS}
    initial = done = count_tokens(writers)
    limit = config.max_tokens or math.inf
    bar = Progress(config.max_tokens, "token", initial=initial)
    for texts, position in prefetch(text_batches(source, progress.get("position"), config.text_field)):
        documents = [text for text in texts if text.strip()]
        n_empty += len(texts) - len(documents)
        n_shards = sum(len(writer.shards) for writer in writers.values())
        for text, tokens in zip(documents, tokenizer.encode_documents(documents), strict=True):
            writers["val" if shards.is_validation(encode_utf8(text), config.val_fraction) else "train"].add(tokens)
            if count_tokens(writers) >= limit:
                break
        done, previous = count_tokens(writers), done
        bar.update(done - previous, f"{(done - initial) / (time.perf_counter() - started) / 1e6:.2f} M tokens/s")
        if done >= limit:
            break
        if sum(len(writer.shards) for writer in writers.values()) > n_shards:
            states = {split: writer.state_dict() for split, writer in writers.items()}
            shards.save_progress(config.out, meta, states | {"position": position, "skipped_empty": n_empty})
    bar.close()
    sizes = {split: writer.documents for split, writer in writers.items()}
    shards.check_splits(sizes, "documents", config.val_fraction, f"{n_empty} empty ones skipped")
    splits = {split: writer.close() for split, writer in writers.items()}
    shards.finish_dataset(config.out, meta | splits | {"skipped_empty": n_empty})
    print_summary(config, splits, n_empty, time.perf_counter() - started)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    config.check()
    cli.check_range("shard_tokens", config.shard_tokens, 1, 2**31)
    cli.check_range("max_tokens", config.max_tokens, 1)


def dataset_meta(config: Config, tokenizer: Tokenizer, source: FileSource | HubSource) -> dict:
    """Return the metadata that is fixed before the work starts. The same metadata gives the same bytes."""
    return {
        "version": FORMAT_VERSIONS["text"],
        "kind": "text",
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "source": source.metadata(),
        "text_field": config.text_field,
        "shard_tokens": config.shard_tokens,
        "val_fraction": config.val_fraction,
        "max_tokens": config.max_tokens,
    }


def count_tokens(writers: dict[str, ShardWriter]) -> int:
    return sum(writer.tokens for writer in writers.values())


def print_summary(config: Config, splits: dict, n_empty: int, seconds: float) -> None:
    """Print the size of each split and the next command."""
    for name, split in splits.items():
        print(f"{name}: {split['tokens']:,} tokens in {split['documents']:,} documents, {len(split['files'])} shards")
    n_tokens = sum(split["tokens"] for split in splits.values())
    print(f"{config.out}: {n_tokens:,} tokens in total, {n_empty} empty documents skipped, {seconds:.0f} s")
    flags = f" --data {shlex.quote(str(config.out))} --out {shlex.quote(f'runs/{config.out.name}')}"
    print(f"next: python pretrain.py{'' if config.out == Config.out else flags}")


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
