"""`tokenizer.json`, the file of Hugging Face's tokenizers library: a byte-level BPE vocabulary, read or built.

The library applies a list of merges in their order; tiktoken merges the pair whose result has the lowest rank. Both
give the same tokens if each merge follows from the ranks of the tokens before it, which `read_vocabulary` checks.
"""

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minigpt.cli import UserError
from minigpt.files import read_json

# How text is split before its bytes are merged. "gpt2" and "gpt4" are the patterns of OpenAI's vocabularies gpt2 and
# cl100k_base, as published in tiktoken. "bytes" splits anywhere: without merges, all splits give the same tokens.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "bytes": r"(?s:.{1,32})",
}


def read_vocabulary(file: Path) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Read a byte-level BPE vocabulary.

    Returns:
        the name of its pattern in `PATTERNS`, the rank of each token, and the ids of the special tokens.

    Raises:
        UserError: the file is corrupt, or its vocabulary is not one that ranks can express.
    """
    content = read_json(file)
    try:
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocab = {token: rank for token, rank in content["model"]["vocab"].items() if token not in special}
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in sorted(vocab.items(), key=lambda kv: kv[1])}
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]]
        pattern = parse_pattern(content["pre_tokenizer"])
        is_plain = content.get("normalizer") is None and content["model"].get("type", "BPE") == "BPE"
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{file} is corrupt or not a byte-level BPE vocabulary") from None
    if not is_plain:
        raise UserError(f"{file} normalises text, or is not BPE, which is not supported")
    if pattern is None:
        raise UserError(f"{file} splits text by another pattern; supported are those of {', '.join(PATTERNS)}")
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if not has_all_bytes or list(ranks.values()) != list(range(len(vocab))):
        raise UserError(f"{file} is not a byte-level BPE vocabulary: its ids have gaps, or bytes are missing")
    if merges != [(to_characters(left), to_characters(right)) for left, right in find_merges(ranks)]:
        raise UserError(f"{file} merges tokens in another order than that of their ids, which is not supported")
    return pattern, ranks, special


def build_tokenizer_json(pattern: str, ranks: dict[bytes, int], special_tokens: Sequence[str]) -> str:
    """Return the content of a tokenizer.json with this pattern, these ranks, and special tokens behind them.

    transformers' `TikTokenConverter` gives a different file, with 108,299 merges for GPT-2 instead of OpenAI's 50,000.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    vocab = {to_characters(token): rank for token, rank in ranks.items()}
    merges = [(to_characters(left), to_characters(right)) for left, right in find_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = build_pre_tokenizer(pattern)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer.to_str(pretty=True)


def build_pre_tokenizer(pattern: str) -> Any:
    """Return the `tokenizers` object that splits text by a pattern and writes its bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    if pattern in ("gpt2", "bytes"):  # GPT-2's pattern is the library's own
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def parse_pattern(pre_tokenizer: dict) -> str | None:
    """Return the name of the pattern in a file's "pre_tokenizer" entry; None if it is unknown."""
    if pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return "gpt2" if pre_tokenizer["use_regex"] else "bytes"
    if pre_tokenizer["type"] != "Sequence" or len(pre_tokenizer["pretokenizers"]) != 2:
        return None
    split, byte_level = pre_tokenizer["pretokenizers"]
    if (split["type"], split.get("behavior"), split.get("invert")) != ("Split", "Isolated", False):
        return None
    if parse_pattern(byte_level) != "bytes":
        return None
    return next((name for name, regex in PATTERNS.items() if split["pattern"] == {"Regex": regex}), None)


def find_merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the pair of tokens that each longer token is merged from, in the order of the ranks.

    The pair is what byte-pair encoding makes of the token's bytes when it may use only tokens of lower rank.
    """
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def to_characters(token: bytes) -> str:
    """Return the characters by which the library writes the bytes of a token."""
    return "".join(map(byte_characters().__getitem__, token))


@functools.cache
def byte_characters() -> tuple[str, ...]:
    """Return the character of each byte: itself if it is printable, else one from U+0100 on."""
    from tokenizers import pre_tokenizers

    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    replacements = iter(sorted(alphabet - set(map(chr, range(256)))))
    return tuple(chr(byte) if chr(byte) in alphabet else next(replacements) for byte in range(256))
