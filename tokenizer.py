"""Text to token ids and back, and the chat format: which tokens a conversation becomes and which of them are learned.

A conversation of messages becomes

    <|endoftext|> <|user|> Why is the sky blue? <|end|> <|assistant|> Because ... <|end|>

where everything in brackets is one special token.  They have ids of their own behind the text vocabulary, so no text
can ever become one: a user who types "<|end|>" gets the ordinary tokens of seven ordinary characters.
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

from cli import UserError, check

ROLES = ("system", "user", "assistant")
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SAMPLE_EVERY = 512  # of a batch's texts, one in so many is encoded by the reference too


class Tokenizer:
    """What both vocabularies share.  `vocab_size` counts the text tokens and end-of-text; the chat tokens follow.

    Attributes:
        name: "gpt2" or "bytes".
        vocab_size: 50,257 or 257.
        chat_vocab_size: `vocab_size` and the chat tokens.
        end_of_text: the token that begins every document.
        end_of_turn: the token that ends every message.
        role_tokens: the token that begins a message of each role.
    """

    name: str
    vocab_size: int

    def __init__(self):
        self.end_of_text = self.vocab_size - 1
        self.role_tokens = {role: self.vocab_size + i for i, role in enumerate(ROLES)}
        self.end_of_turn = self.vocab_size + len(ROLES)
        self.chat_vocab_size = self.vocab_size + len(CHAT_TOKENS)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, all of them ordinary, whatever the text says."""
        raise NotImplementedError

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text behind an end-of-text token, as uint16 arrays."""
        raise NotImplementedError

    def text_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of one text token."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that one token stands for: a fragment of a character, perhaps; a special token's name."""
        if token < self.end_of_text:
            return self.text_bytes(token)
        return ("<|endoftext|>", *CHAT_TOKENS)[token - self.end_of_text].encode()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")

    def encode_chat(
        self, messages: Sequence[dict], max_length: int | None = None, reply: bool = False
    ) -> tuple[list[int], list[bool]] | None:
        """The tokens of a conversation, and which of them the assistant learns to say.

        Too long a conversation loses its oldest exchanges first (the system message stays), never a part of the last
        answer.  Of its last user message then goes the end, where Dolly's questions have their context; before a reply
        it is the beginning, as a person asks last.

        Args:
            messages: {"role": "system" | "user" | "assistant", "content": text} each.
            max_length: the most tokens that the result may have.
            reply: end with the token that makes the assistant speak.

        Returns:
            (tokens, learned): of equal length.  Learned are the assistant's text and the token that ends its turn.
            None where the last answer alone is too long.
        """
        turns = [[self.role_tokens[m["role"]], *self.encode(m["content"]), self.end_of_turn] for m in messages]
        roles = [message["role"] for message in messages]
        first = int(roles[:1] == ["system"])
        ending = [self.role_tokens["assistant"]] if reply else []

        def excess() -> int:
            return 1 + sum(map(len, turns)) + len(ending) - (max_length or float("inf"))

        while excess() > 0 and (after := next_user_turn(roles, first)):
            del turns[first:after], roles[first:after]
        if excess() > 0 and "user" in roles:
            question = turns[roles.index("user", first)]
            cut = min(excess(), len(question) - 3)  # the role, one token and the end of the turn stay
            if cut > 0:
                begin = 1 if reply else len(question) - 1 - cut
                del question[begin : begin + cut]
        if excess() > 0:
            return None
        tokens, learned = [self.end_of_text], [False]
        for role, turn in zip(roles, turns, strict=True):
            tokens += turn
            learned += [False] + [role == "assistant"] * (len(turn) - 1)
        return tokens + ending, learned + [False] * len(ending)


def next_user_turn(roles: list[str], first: int) -> int | None:
    """Where the second exchange of a conversation begins; None where there is only one."""
    return next((i for i in range(first + 1, len(roles)) if roles[i] == "user"), None)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, by tiktoken; batches by gigatoken where it is installed, some 15 times faster.

    tiktoken stays the reference: of every batch the first text and some others are encoded by both.
    """

    name = "gpt2"
    vocab_size = 50_257

    def __init__(self):
        super().__init__()
        import tiktoken

        try:
            self.encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken downloads the vocabulary once; its HTTP client has many ways to fail
            raise UserError(
                f"the gpt2 vocabulary could not be downloaded ({type(error).__name__}): run once with network, or set"
                " TIKTOKEN_CACHE_DIR to a copy of another machine's tiktoken cache; --tokenizer bytes needs no download"
            ) from None

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.fast is None or not texts:
            batch = self.encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)
            return [np.array([self.end_of_text, *tokens], dtype=np.uint16) for tokens in batch]
        import awkward

        batch = self.fast.encode_batch([utf8(text) for text in texts])
        tokens, lengths = awkward.to_numpy(awkward.flatten(batch)), awkward.to_numpy(awkward.num(batch))
        ends = np.cumsum(lengths)
        tokens = np.insert(tokens.astype(np.uint16), ends - lengths, self.end_of_text)
        ends = [0, *(ends + np.arange(1, len(texts) + 1)).tolist()]
        documents = [tokens[begin:end] for begin, end in pairwise(ends)]
        for text, document in list(zip(texts, documents, strict=True))[::SAMPLE_EVERY]:
            check(
                document[1:].tolist() == self.encode(text),
                f"gigatoken and tiktoken encode a text differently, {text[:60]!r}: pip uninstall gigatoken, and run it"
                " again with tiktoken alone",
            )
        return documents

    @functools.cached_property
    def fast(self) -> Any:
        """gigatoken's tokenizer of the same ranks and of no special token; None where gigatoken is not installed."""
        try:
            import gigatoken
        except ImportError:
            print("note: gigatoken is not installed (pip install gigatoken): tiktoken alone is some 15 times slower")
            return None
        ranks = [self.text_bytes(token) for token in range(self.end_of_text)]
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)))
            file.flush()
            return gigatoken.Tokenizer.from_tiktoken(file.name, "gpt2", {})

    def text_bytes(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)


class BytesTokenizer(Tokenizer):
    """One token per UTF-8 byte: needs no download and no training; a text has about four times GPT-2's tokens."""

    name = "bytes"
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        return list(utf8(text))

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        start = np.array([self.end_of_text], dtype=np.uint16)
        return [np.concatenate([start, np.frombuffer(utf8(text), dtype=np.uint8)]) for text in texts]

    def text_bytes(self, token: int) -> bytes:
        return bytes([token])


def utf8(text: str) -> bytes:
    """The UTF-8 of any text.  JSON's escapes can make half a surrogate pair, which UTF-8 has not: it becomes U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode("utf-8")


TOKENIZERS = {"gpt2": GPT2Tokenizer, "bytes": BytesTokenizer}


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.  Raises `UserError`: no such name, or its vocabulary is out of reach."""
    check(name in TOKENIZERS, f"there is no tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


class TextStream:
    """Tokens to text as they come: a character of several tokens appears when its last one does."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that this token completes; "" in the middle of a character."""
        return self.decoder.decode(self.tokenizer.token_bytes(token))

    def end(self) -> str:
        """What is left: U+FFFD for an unfinished character."""
        return self.decoder.decode(b"", final=True)
