"""Text to token ids and back.

One class serves every vocabulary: byte-level byte-pair encoding ranks in a `tiktoken.Encoding`. `gpt2` is OpenAI's
vocabulary; `bytes` has one token per byte and needs no download. The special tokens (end of text, the chat roles, the
end of a turn) have ids behind the text vocabulary. Text is always encoded as ordinary text: a user who types "<|end|>"
gets the ordinary tokens of seven characters.
"""

import base64
import codecs
import functools
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken

from minigpt.cli import UserError

TOKENIZER_NAMES = ("gpt2", "bytes")
ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHECK_EVERY = 512  # of each batch, every 512th text is encoded by tiktoken too and compared


class Tokenizer:
    """A vocabulary. Raises `UserError` for an unknown name, or if the vocabulary cannot be downloaded.

    Attributes:
        name: "gpt2" or "bytes".
        vocab_size: text tokens and end of text: 50,257 or 257.
        chat_vocab_size: `vocab_size` and the chat tokens.
        end_of_text: the token at the start of every document.
        end_of_turn: the token at the end of every chat message.
        role_tokens: the token at the start of a chat message, by role.
    """

    def __init__(self, name: str):
        if name not in TOKENIZER_NAMES:
            raise UserError(f"there is no tokenizer {name!r}: choose one of {', '.join(TOKENIZER_NAMES)}")
        self.name = name
        if name == "gpt2":
            pattern, ranks = load_gpt2_ranks()
        else:  # every byte is a token, so any split pattern gives the same tokens
            pattern, ranks = r"(?s:.{1,32})", {bytes([byte]): byte for byte in range(256)}
        self.end_of_text = len(ranks)
        self.vocab_size = self.end_of_text + 1
        self.chat_vocab_size = self.vocab_size + len(CHAT_TOKENS)
        special_tokens = {token: self.end_of_text + i for i, token in enumerate(("<|endoftext|>", *CHAT_TOKENS))}
        self.role_tokens = {role: special_tokens[f"<|{role}|>"] for role in ROLES}
        self.end_of_turn = special_tokens["<|end|>"]
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text. Names of special tokens in it are ordinary text."""
        return self.encoding.encode_ordinary(text)

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
        batch = self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
        return [np.array([self.end_of_text, *tokens], dtype=np.uint16) for tokens in batch]

    def _encode_with_gigatoken(self, texts: Sequence[str]) -> list[np.ndarray]:
        import awkward

        batch = self.gigatoken.encode_batch([encode_utf8(text) for text in texts])
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
        if self.name == "bytes":
            return None
        try:
            import gigatoken
        except ImportError:
            print("note: gigatoken is not installed (pip install gigatoken); tiktoken is about 15 times slower")
            return None
        tokens = [self.token_bytes(token) for token in range(self.end_of_text)]
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, "gpt2", {})


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of that name, loaded once. Raises `UserError` as `Tokenizer` does."""
    return Tokenizer(name)


def load_gpt2_ranks() -> tuple[str, dict[bytes, int]]:
    """Return the split pattern and the ranks of GPT-2's vocabulary, which tiktoken downloads once."""
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken's HTTP client raises many types
        raise UserError(
            f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}): run once with network access, or"
            " set TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache; --tokenizer bytes needs no download"
        ) from None
    return encoding._pat_str, encoding._mergeable_ranks  # as tiktoken's README extends an encoding


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
