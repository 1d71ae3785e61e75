"""Text to token ids and back.

One class serves every vocabulary: byte-level byte-pair encoding ranks in a `tiktoken.Encoding`. `gpt2` is OpenAI's
vocabulary; `bytes` has one token per byte and needs no download; prepare_tokenizer.py trains others, which are named by
the hash of their content. The special tokens (end of text, the chat roles, the end of a turn) have ids behind the text
vocabulary. Text is always encoded as ordinary text: a user who types "<|end|>" gets the ordinary tokens of seven
characters.
"""

import base64
import codecs
import functools
import hashlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from minigpt.cli import UserError
from minigpt.files import write_file
from minigpt.tokenizer_json import PATTERNS, build_tokenizer_json, read_vocabulary

BUILT_IN = {  # content hash -> name
    "d6a42a0ae6f4": "gpt2",
    "0635e32baa59": "bytes",
}
TOKENIZER_FILE = "tokenizer.json"  # beside the data or weights of a trained vocabulary
MAX_VOCAB_SIZE = 65_000  # tokens are stored as uint16, and the chat tokens follow
ROLES = ("system", "user", "assistant")
END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
MAX_SPACE = 100_000  # characters of white space in a row that tiktoken is given
LONG_SPACE = re.compile(  # the characters of \s in Rust
    rf"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{{{MAX_SPACE},}}"
)
MAX_CACHE_BYTES = 500_000_000  # of gigatoken; then it is built again, in 0.2 s
CHECK_EVERY = 512  # of each batch, every 512th text is encoded by tiktoken too and compared


class Tokenizer:
    """A vocabulary: its byte-level BPE ranks, and the name of the pattern in `PATTERNS` that splits text.

    Attributes:
        name: "gpt2", "bytes", or "bpe-" and the hash of pattern and ranks.
        vocab_size: text tokens and end of text: 50,257 for gpt2, 257 for bytes.
        chat_vocab_size: `vocab_size` and the chat tokens.
        end_of_text: the token at the start of every document.
        end_of_turn: the token at the end of every chat message.
        role_tokens: the token at the start of a chat message, by role.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int]):
        self.pattern, self.ranks = pattern, ranks
        digest = hash_vocabulary(pattern, ranks)
        self.name = BUILT_IN.get(digest, f"bpe-{digest}")
        self.end_of_text = len(ranks)
        self.vocab_size = self.end_of_text + 1
        self.chat_vocab_size = self.vocab_size + len(CHAT_TOKENS)
        special_tokens = {token: self.end_of_text + i for i, token in enumerate((END_OF_TEXT, *CHAT_TOKENS))}
        self.role_tokens = {role: special_tokens[f"<|{role}|>"] for role in ROLES}
        self.end_of_turn = special_tokens["<|end|>"]
        self.cache_bytes = 0  # memory that gigatoken has allocated
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=special_tokens
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Names of special tokens in it are ordinary text."""
        tokens: list[int] = []
        begin = 0
        for run in LONG_SPACE.finditer(text) if self.pattern != "bytes" and len(text) > MAX_SPACE else ():
            # tiktoken's regular expression overflows its stack on it.
            cuts = self._cut_space(text, run.start(), run.end())
            tokens += self.encoding.encode_ordinary(text[begin : cuts[0]])
            for left, right in pairwise(cuts):
                tokens += self.encoding._encode_single_piece(text[left:right])
            begin = cuts[-1]
        return tokens + self.encoding.encode_ordinary(text[begin:])

    def _cut_space(self, text: str, start: int, end: int) -> list[int]:
        """Return the start of the pattern's first piece in a long run of white space, and the ends of its pieces."""
        last = end if end == len(text) else end - 1  # the last character belongs to the next piece
        if self.pattern == "gpt2":
            return [start, last]
        previous, space = text[start - 1 : start], text[start:end]
        after_break = start + max(space.rfind("\r"), space.rfind("\n")) + 1  # a piece ends at the last line break
        if previous and unicodedata.category(previous)[0] not in "LN":  # punctuation takes the line breaks after it
            start += len(space) - len(space.lstrip("\r\n"))
        return [
            start,
            *(end for end, before in ((after_break, start), (last, max(start, after_break))) if end > before),
        ]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens. Invalid UTF-8 becomes U+FFFD, special tokens their names."""
        return self.encoding.decode(list(map(int, tokens)), errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, possibly a part of a character; for a special token, its name."""
        return self.encoding.decode_single_token_bytes(token)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's tokens, with end of text before them, as uint16 arrays."""
        if self.gigatoken is not None and texts:
            return self._encode_with_gigatoken(texts)
        if any(len(text) > MAX_SPACE for text in texts):
            batch = map(self.encode, texts)
        else:
            batch = self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array([self.end_of_text, *tokens], dtype=np.uint16) for tokens in batch]

    def _encode_with_gigatoken(self, texts: Sequence[str]) -> list[np.ndarray]:
        import awkward

        before = resident_bytes()
        batch = self.gigatoken.encode_batch([encode_utf8(text) for text in texts])
        self.cache_bytes += resident_bytes() - before
        if self.cache_bytes > MAX_CACHE_BYTES:  # gigatoken 0.10 keeps every different word
            del self.gigatoken
            self.cache_bytes = 0
        tokens, lengths = awkward.to_numpy(awkward.flatten(batch)), awkward.to_numpy(awkward.num(batch))
        ends = np.cumsum(lengths)
        tokens = np.insert(tokens.astype(np.uint16), ends - lengths, self.end_of_text)
        ends = [0, *(ends + np.arange(1, len(texts) + 1)).tolist()]
        documents = [tokens[begin:end] for begin, end in pairwise(ends)]
        for text, document in list(zip(texts, documents, strict=True))[::CHECK_EVERY]:
            if document[1:].tolist() != self.encode(text):
                raise UserError(
                    f"gigatoken and tiktoken encode a text differently, {text[:60]!r}: run pip uninstall gigatoken and"
                    " start again with tiktoken only"
                )
        return documents

    @functools.cached_property
    def gigatoken(self) -> Any:
        """The same vocabulary in gigatoken, about 15 times faster than tiktoken on gpt2; None if it is not installed or
        not needed."""
        if self.pattern == "bytes":
            return None
        try:
            import gigatoken
        except ImportError:
            print("note: gigatoken is not installed (pip install gigatoken); tiktoken is about 15 times slower")
            return None
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self.to_tiktoken())
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, self.pattern, {})

    def to_tiktoken(self) -> bytes:
        """Return the ranks in tiktoken's file format: a line for each token, in base64, with its rank."""
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items())

    def to_json(self, chat: bool = False) -> str:
        """Return the content of a tokenizer.json, for Hugging Face's libraries; `chat` adds the chat tokens."""
        return build_tokenizer_json(self.pattern, self.ranks, (END_OF_TEXT, *(CHAT_TOKENS if chat else ())))

    @functools.cached_property
    def text_json(self) -> str:
        """Return the tokenizer.json without chat tokens. It is built once, since every checkpoint contains it."""
        return self.to_json()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json beside data or weights that need it; the built-in vocabularies need none."""
        if self.name not in BUILT_IN.values():
            write_file(folder / TOKENIZER_FILE, self.text_json)


def load_tokenizer(name: str, folder: Path | None = None) -> Tokenizer:
    """Return a tokenizer, loaded once.

    Args:
        name: "gpt2", "bytes", the path of a trained vocabulary, or the name of one whose file is in `folder`.
        folder: a dataset folder or checkpoint.

    Raises:
        UserError: there is no such vocabulary, it is corrupt, or it cannot be downloaded.
    """
    if name == "gpt2":
        return load_gpt2()
    if name == "bytes":
        return load_bytes()
    path = Path(name) if folder is None else folder
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        if folder is not None:
            raise UserError(f"{file} is missing, the vocabulary {name}: prepare or copy the folder again")
        raise UserError(
            f"there is no tokenizer {name!r}: choose {', '.join(BUILT_IN.values())} or a folder with a tokenizer.json:"
            " of prepare_tokenizer.py, of a dataset or of a checkpoint"
        )
    tokenizer = read_tokenizer(file)
    if folder is not None and tokenizer.name != name:
        raise UserError(f"{file} is not the vocabulary {name}, but {tokenizer.name}: prepare or copy the folder again")
    return tokenizer


@functools.cache
def read_tokenizer(file: Path, vocab_size: int | None = None) -> Tokenizer:
    """Return the vocabulary of a tokenizer.json.

    `vocab_size` is that of the model; if it includes the chat tokens, the file must name them. Raises `UserError` if
    the file is corrupt, or if its special tokens are not ours.
    """
    pattern, ranks, special_tokens = read_vocabulary(file)
    if len(ranks) > MAX_VOCAB_SIZE:
        raise UserError(f"{file} has {len(ranks):,} tokens: at most {MAX_VOCAB_SIZE:,} are supported")
    tokenizer = Tokenizer(pattern, ranks)
    chat_tokens = {token: tokenizer.vocab_size + i for i, token in enumerate(CHAT_TOKENS)}
    if vocab_size == tokenizer.chat_vocab_size and not chat_tokens.items() <= special_tokens.items():
        raise UserError(f"{file} has another chat format: it lacks {', '.join(CHAT_TOKENS)}")
    return tokenizer


@functools.cache
def load_gpt2() -> Tokenizer:
    """Return GPT-2's vocabulary, which tiktoken downloads once."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken's HTTP client raises many types
        raise UserError(
            f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}): run once with network access, or"
            " set TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache; --tokenizer bytes needs no download"
        ) from None
    return Tokenizer("gpt2", encoding._mergeable_ranks)  # as tiktoken's README extends an encoding


@functools.cache
def load_bytes() -> Tokenizer:
    """Return the vocabulary of one token per byte."""
    return Tokenizer("bytes", {bytes([byte]): byte for byte in range(256)})


def hash_vocabulary(pattern: str, ranks: dict[bytes, int]) -> str:
    """Return 12 hexadecimal digits that identify a vocabulary by its content."""
    digest = hashlib.sha256(PATTERNS[pattern].encode())
    for token in ranks:  # in the order of their ranks
        digest.update(len(token).to_bytes(4, "big") + token)
    return digest.hexdigest()[:12]


def resident_bytes() -> int:
    """Return this process's resident memory; 0 on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def encode_utf8(text: str) -> bytes:
    """Return the UTF-8 of any text. Lone surrogates, which JSON escapes can contain, become U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")


class StreamDecoder:
    """Decodes tokens one by one. A character of several tokens appears with its last token."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int) -> str:
        """Return the text that this token completes; "" inside a character."""
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Return U+FFFD if a character is incomplete, else ""."""
        return self.decoder.decode(b"", final=True)
