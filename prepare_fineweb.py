"""Tokenise text into shards for pretraining.

    python prepare_fineweb.py                                       # FineWeb-Edu's 10-billion-token sample, streamed
    python prepare_fineweb.py --max_tokens 100_000_000              # a part of it
    python prepare_fineweb.py --files books/ 'mine/*.txt' more.jsonl.gz --out data/mine
    python prepare_fineweb.py --files reviews.csv --text_field review --out data/reviews
    python prepare_fineweb.py --files project/ --text_suffixes .py .c --out data/code
    python prepare_fineweb.py --name default --out data/large --part 3/64       # one of 64 jobs, see docs/scaling.md

`--files` takes .txt, .md, .jsonl, .csv and .parquet files, and folders saved by datasets.save_to_disk. The shards and
`meta.json` go into `--out`, which `pretrain.py` reads. FineWeb-Edu's 10 billion tokens take 20 GB of disk and a few
hours, most of it for the download. Memory use does not depend on the size of the corpus. If the script is interrupted,
run the same command again to resume at the last finished shard.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import math
import shlex
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from minigpt import cli, shards
from minigpt.cli import Progress, UserError
from minigpt.parts import Part, merge_parts, parse_part
from minigpt.prefetch import prefetch
from minigpt.shards import FORMAT_VERSIONS, MIN_SPLIT_TOKENS, SPLITS, ShardWriter, SplitChooser
from minigpt.sources import (
    FINEWEB_EDU,
    DatasetConfig,
    FileSource,
    HubSource,
    NetworkError,
    TextSourceConfig,
    open_text_source,
    plural,
    text_batches,
)
from minigpt.tokenizer import Tokenizer, encode_utf8, load_tokenizer

MIN_VAL_TOKENS = 1025  # for the validation split of a small corpus: a row of GPT-2's context and its targets


@dataclass(frozen=True)
class Config(DatasetConfig, TextSourceConfig):
    dataset: str = FINEWEB_EDU
    out: Path = Path("data/fineweb_edu")
    val_fraction: float = 0.005
    shard_tokens: int = 100_000_000
    """Tokens per shard, two bytes each."""
    max_tokens: int | None = None
    """Stop after the document that reaches this number of tokens."""
    part: str | None = None
    """INDEX/COUNT: prepare every COUNT-th input file, for several jobs; the last to end completes --out."""


class SuggestedRun(NamedTuple):
    """Flags of pretrain.py for a corpus of at least `min_tokens` tokens, with or without a GPU."""

    on_gpu: bool
    min_tokens: int
    flags: str
    block_size: int
    batch_tokens: int
    max_steps: float


SUGGESTED_EPOCHS, MIN_STEPS = 8, 50
SUGGESTED_RUNS = (  # the first that fits
    SuggestedRun(True, 200_000_000, "--batch_tokens 131072", 1024, 131_072, math.inf),
    SuggestedRun(True, 0, "--model small --batch_tokens 16384 --lr 4e-3", 256, 16_384, math.inf),
    SuggestedRun(False, 0, "--model demo --batch_tokens 4096 --lr 1e-2", 256, 4096, 2500),
)
GPT2_TOKENS = 1_000_000_000  # from here on pretrain.py's defaults suit a GPU


def main(config: Config) -> None:
    check_config(config)
    source = open_text_source(config)
    if config.part:
        part = parse_part(config.part)
        check_other_parts(config.out, part)
        source.take_part(part.index, part.count)
        write_dataset(replace(config, out=config.out / part.folder_name), source)
        finish_part(config, part)
    else:
        started = time.perf_counter()
        is_new = write_dataset(config, source)
        meta = shards.read_meta(config.out, "text")
        shards.open_arrays(config.out, meta)  # checks their lengths
        print_summary(config, meta, f", {time.perf_counter() - started:.0f} s" if is_new else "")


def write_dataset(config: Config, source: FileSource | HubSource) -> bool:
    """Write a dataset folder, unless it is complete; return whether it was not."""
    tokenizer = load_tokenizer(config.tokenizer)
    meta = dataset_meta(config, source, tokenizer)
    progress = shards.begin_dataset(config.out, meta)
    if progress is None:
        print(f"{config.out} is already complete")
        return False
    tokenizer.save(config.out)
    try:
        meta |= write_splits(config, source, tokenizer, meta, progress)
    except NetworkError:
        raise
    except UserError:  # would occur again
        shards.discard_dataset(config.out)
        raise
    shards.finish_dataset(config.out, meta)
    return True


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    config.check()
    cli.check_range("shard_tokens", config.shard_tokens, 1, 2**31)
    cli.check_range("max_tokens", config.max_tokens, 1)
    if config.part is not None:
        parse_part(config.part)
        if config.max_tokens is not None:
            raise UserError("--part and --max_tokens cannot be combined: limit the input files instead")


def finish_part(config: Config, part: Part) -> None:
    """Complete the whole dataset if this was its last part."""
    meta = merge_parts(config.out, part.count, load_tokenizer(config.tokenizer))
    if meta is None:
        print(f"part {part.index} of {part.count} is complete; the last one to finish completes {config.out}")
        print(f"if all parts are complete and {config.out} is not, run any of them again")
    else:
        print_summary(config, meta)


def check_other_parts(folder: Path, part: Part) -> None:
    """Raise `UserError` if the folder holds another dataset, or parts of another number."""
    other_counts = [path for path in folder.glob("part_*_of_*") if not path.name.endswith(f"_of_{part.count:03d}")]
    if other_counts or ((folder / "meta.json").exists() and not (folder / part.folder_name).exists()):
        raise UserError(f"{folder} already holds another dataset: choose another --out or delete it")


def dataset_meta(config: Config, source: FileSource | HubSource, tokenizer: Tokenizer) -> dict:
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
    } | ({"part": config.part} if config.part else {})


def write_splits(
    config: Config, source: FileSource | HubSource, tokenizer: Tokenizer, meta: dict, progress: dict
) -> dict:
    """Write the shards of both splits and return their entries for meta.json.

    If the validation split of a small corpus comes out too small, all is written again with a larger fraction.
    Raises `UserError` for too little text, or text that cannot be used.
    """
    while True:
        progress = {"val_fraction_used": config.val_fraction} | progress
        val_fraction = progress["val_fraction_used"]
        writers, chooser, n_empty = tokenize(config, source, tokenizer, meta, progress)
        if config.part or (writers["val"].tokens >= MIN_VAL_TOKENS and writers["train"].tokens):
            break
        skipped = f"{plural(n_empty, 'empty one')} skipped"
        progress = {"val_fraction_used": chooser.choose(config.val_fraction, "document", skipped)}
        if progress["val_fraction_used"] == val_fraction:
            break
        shards.save_progress(config.out, meta, progress)
    for split, writer in writers.items():
        if writer.tokens < MIN_SPLIT_TOKENS and not config.part:
            n_tokens = plural(writer.tokens, "token")
            raise UserError(f"the {split} split has {n_tokens}, expected at least {MIN_SPLIT_TOKENS}: give more text")
    entries = {split: writer.close() for split, writer in writers.items()} | {"skipped_empty": n_empty}
    return entries | ({"val_fraction_used": val_fraction} if val_fraction != config.val_fraction else {})


def tokenize(
    config: Config, source: FileSource | HubSource, tokenizer: Tokenizer, meta: dict, progress: dict
) -> tuple[dict[str, ShardWriter], SplitChooser, int]:
    """Tokenise the source from the saved progress to its end; return also the number of empty documents."""
    started, n_empty = time.perf_counter(), progress.get("skipped_empty", 0)
    writers = {split: ShardWriter(config.out, split, config.shard_tokens, progress.get(split)) for split in SPLITS}
    val_fraction, chooser = progress["val_fraction_used"], SplitChooser(MIN_VAL_TOKENS, progress.get("chooser"))
    initial = done = count_tokens(writers)
    limit = config.max_tokens or math.inf
    bar = Progress(config.max_tokens, "token", initial=initial)
    for texts, position in prefetch(text_batches(source, progress.get("position"), config.text_field)):
        documents = [text for text in texts if text.strip()]
        n_empty += len(texts) - len(documents)
        n_shards = sum(len(writer.shards) for writer in writers.values())
        for text, tokens in zip(documents, tokenizer.encode_documents(documents), strict=True):
            document_hash = shards.hash_document(encode_utf8(text))
            writers["val" if document_hash < val_fraction else "train"].add(tokens)
            chooser.add(document_hash, len(tokens))
            if count_tokens(writers) >= limit:
                break
        done, previous = count_tokens(writers), done
        bar.update(done - previous, f"{(done - initial) / (time.perf_counter() - started) / 1e6:.2f} M tokens/s")
        if done >= limit:
            break
        if sum(len(writer.shards) for writer in writers.values()) > n_shards:
            states = {split: writer.state_dict() for split, writer in writers.items()}
            states |= {"position": position, "skipped_empty": n_empty, "chooser": chooser.state_dict()}
            shards.save_progress(config.out, meta, states | {"val_fraction_used": val_fraction})
    bar.close()
    return writers, chooser, n_empty


def count_tokens(writers: dict[str, ShardWriter]) -> int:
    return sum(writer.tokens for writer in writers.values())


def print_summary(config: Config, meta: dict, seconds: str = "") -> None:
    """Print the size of each split and the next command."""
    tokens = {split: meta[split]["tokens"] for split in SPLITS}
    for split in SPLITS:
        sizes = f"{plural(meta[split]['documents'], 'document')}, {plural(len(meta[split]['files']), 'shard')}"
        print(f"{split}: {plural(tokens[split], 'token')} in {sizes}")
    if explanation := shards.explain_val_fraction(meta, "document"):
        print(explanation)
    n_empty = plural(meta["skipped_empty"], "empty document")
    print(f"{config.out}: {sum(tokens.values()):,} tokens in total, {n_empty} skipped{seconds}")
    command = f"python {cli.script_path('pretrain.py')}"
    if config.out == Config.out and sum(tokens.values()) >= GPT2_TOKENS:
        print(f"next: {command}")
    else:
        paths = f"--data {shlex.quote(str(config.out))} --out {shlex.quote(f'runs/{config.out.resolve().name}')}"
        flags = suggest_training(tokens["train"], tokens["val"], on_gpu=shutil.which("nvidia-smi") is not None)
        print(f"next: {command} {paths} {flags}".rstrip())


def suggest_training(n_tokens: int, n_val_tokens: int, on_gpu: bool) -> str:
    """Return flags of pretrain.py that suit the sizes of the training and validation splits; "" for its defaults."""
    if on_gpu and n_tokens >= GPT2_TOKENS:
        return ""
    run = next(run for run in SUGGESTED_RUNS if run.on_gpu == on_gpu and n_tokens >= run.min_tokens)
    steps = max(MIN_STEPS, min(math.ceil(SUGGESTED_EPOCHS * n_tokens / run.batch_tokens), run.max_steps))
    flags = f"{run.flags} --steps {steps}"
    longest = min(n_tokens, n_val_tokens) - 1  # targets are one token ahead
    if longest < run.block_size:
        flags += f" --block_size {2 ** int(math.log2(longest))}"  # divides batch_tokens
    return flags


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
