"""Train a vocabulary on your own text: byte-level byte-pair encoding, as GPT-2's.

    python prepare_tokenizer.py --files books/ --vocab_size 8192            # writes data/tokenizer
    python prepare_tokenizer.py --dataset roneneldan/TinyStories --vocab_size 4096 --out data/stories_tokenizer
    python prepare_fineweb.py --files books/ --tokenizer data/tokenizer --out data/books

A vocabulary of the text's own language needs fewer tokens for the same text, and a small one leaves a small model's
parameters to its layers. Every later script finds the vocabulary in the dataset folder or checkpoint. Writes
`tokenizer.json`, which transformers reads, and `vocab.tiktoken`, the ranks for tiktoken.
"""

import minigpt.interrupt  # noqa: F401 (first, for Ctrl-C)

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt import cli
from minigpt.cli import Progress, UserError
from minigpt.files import atomic_rename, read_json, write_file, write_json
from minigpt.sources import FINEWEB_EDU, FileSource, HubSource, TextSourceConfig, open_text_source, plural, text_batches
from minigpt.tokenizer import MAX_VOCAB_SIZE, Tokenizer, encode_utf8, load_tokenizer
from minigpt.tokenizer_json import build_pre_tokenizer, byte_characters

HELD_OUT_EVERY = 20  # the second of every 20 documents is not trained on, but measured
MAX_HELD_OUT_CHARS = 2_000_000


@dataclass(frozen=True)
class Config(TextSourceConfig):
    dataset: str = FINEWEB_EDU
    out: Path = Path("data/tokenizer")
    vocab_size: int = 8192
    """Number of text tokens, with end of text; at most 65,000."""
    pattern: Literal["gpt2", "gpt4"] = "gpt2"
    """How text is split into words: as for GPT-2, or as for GPT-4, which suits code and text without spaces."""
    max_chars: int = 100_000_000
    """Read documents until they have this number of characters in total."""


def main(config: Config) -> None:
    check_config(config)
    source = open_text_source(config)
    meta = {"kind": "tokenizer", "source": source.metadata(), "text_field": config.text_field}
    meta |= {"vocab_size": config.vocab_size, "pattern": config.pattern, "max_chars": config.max_chars}
    if is_complete(config.out, meta):
        print(f"{config.out} is already complete")
        print_next_command(config)
        return
    texts, held_out = read_and_hold_out(config, source)
    tokenizer = train_bpe(texts, config)
    write_tokenizer(config.out, tokenizer, meta)
    print_summary(config, tokenizer, held_out)
    print_next_command(config)


def check_config(config: Config) -> None:
    """Check the flags before any work starts. Raises `UserError`."""
    config.check()
    cli.check_range("vocab_size", config.vocab_size, 258, MAX_VOCAB_SIZE)  # 256 bytes, a merge, end of text
    cli.check_range("max_chars", config.max_chars, 1)


def is_complete(out: Path, meta: dict) -> bool:
    """Return whether the folder holds this vocabulary. Raises `UserError` if it holds something else."""
    if (out / "meta.json").is_file() and read_json(out / "meta.json") == meta:
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} already exists: delete it or choose another folder")
    return False


def read_and_hold_out(config: Config, source: FileSource | HubSource) -> tuple[list[str], list[str]]:
    """Return the training documents and the held-out documents."""
    documents = (text for batch, _ in text_batches(source, None, config.text_field) for text in batch if text.strip())
    texts: list[str] = []
    held_out: list[str] = []
    progress, n_held_out = Progress(None, "character"), 0
    for number, text in enumerate(documents, 1):
        if number % HELD_OUT_EVERY == 2 and n_held_out < MAX_HELD_OUT_CHARS:
            n_held_out += len(text)
            held_out.append(text)
        else:
            texts.append(text)
        progress.update(len(text))
        if progress.done >= config.max_chars:
            break
    progress.close()
    if not texts or not held_out:
        raise UserError(
            f"the source has {plural(len(texts), 'document')} in its first {config.max_chars:,} characters; at least"
            " two are needed: give more text, or raise --max_chars"
        )
    return texts, held_out


def train_bpe(texts: Sequence[str], config: Config) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016) and return it as ranks: the 256 bytes, then the merges in order."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, trainers

    hf_tokenizer = HFTokenizer(models.BPE())
    hf_tokenizer.pre_tokenizer = build_pre_tokenizer(config.pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - 1,  # end of text is added later
        initial_alphabet=list(byte_characters()),
        special_tokens=[],
        show_progress=False,
    )
    progress = Progress(len(texts), "document")

    def iterate() -> Iterator[str]:
        for text in texts:
            yield encode_utf8(text).decode("utf-8")  # without lone surrogates
            progress.update(1)

    hf_tokenizer.train_from_iterator(iterate(), trainer)
    progress.close()
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    vocab = hf_tokenizer.get_vocab()
    tokens = [bytes(byte_of[character] for character in token) for token in sorted(vocab, key=vocab.__getitem__)]
    tokens = sorted(token for token in tokens if len(token) == 1) + [token for token in tokens if len(token) > 1]
    return Tokenizer(config.pattern, {token: rank for rank, token in enumerate(tokens)})


def write_tokenizer(out: Path, tokenizer: Tokenizer, meta: dict) -> None:
    """Write the vocabulary as a folder that is whole or absent."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.", dir=out.parent))
    try:
        tokenizer.save(temporary)
        write_file(temporary / "vocab.tiktoken", [tokenizer.to_tiktoken()])
        write_json(temporary / "meta.json", meta)
        temporary.chmod(0o755)  # mkdtemp allows only the owner
        atomic_rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def print_summary(config: Config, tokenizer: Tokenizer, held_out: Sequence[str]) -> None:
    """Print the size of the vocabulary, and its bytes per token beside gpt2's."""
    print(f"{config.out}: {tokenizer.vocab_size:,} tokens, {tokenizer.name}")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"note: the text has no more pairs to merge: fewer tokens than --vocab_size {config.vocab_size:,}")
    n_bytes = sum(len(encode_utf8(text)) for text in held_out)
    print(
        f"bytes per token on {n_bytes:,} bytes of held-out text: {get_bytes_per_token(tokenizer, held_out):.2f}", end=""
    )
    try:
        print(f"; gpt2, with 50,257 tokens: {get_bytes_per_token(load_tokenizer('gpt2'), held_out):.2f}")
    except UserError:
        print("; the gpt2 vocabulary is not available to compare")


def print_next_command(config: Config) -> None:
    """Print the command that prepares the same text with the vocabulary."""
    names = ("files", "dataset", "name", "split", "text_field", "text_suffixes")
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(Config, name)}
    words = []
    for name, value in given.items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [value])]
    data = config.out.with_name(f"{config.out.name}_text")
    words += ["--tokenizer", str(config.out), "--out", str(data)]
    print(f"next: python {cli.script_path('prepare_fineweb.py')} {shlex.join(words)}")


def get_bytes_per_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the bytes per token on these texts."""
    return sum(len(encode_utf8(text)) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)


if __name__ == "__main__":
    cli.run(main, Config, __doc__)
