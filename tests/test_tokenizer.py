"""Text to tokens and back, whole and streamed."""

import itertools
import json
import random
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import error_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minigpt.tokenizer
from minigpt.cli import UserError
from minigpt.tokenizer import CHAT_TOKENS, StreamDecoder, Tokenizer, encode_utf8, load_tokenizer

relaxed = settings(deadline=None, max_examples=60)

SPECIAL_NAMES = ("<|endoftext|>", *CHAT_TOKENS)
TEXTS = st.text() | st.text(alphabet="é€👍🏽 \r\nab", max_size=20)
SURROGATES = st.characters(categories=["Cs"])
ANY_TEXTS = st.text(alphabet=st.characters(codec="utf-8") | SURROGATES)
WITH_SPECIAL_NAMES = st.lists(st.sampled_from(SPECIAL_NAMES) | st.text(max_size=5), max_size=8).map("".join)


@pytest.fixture(scope="session", params=["bytes", "gpt2"])
def tokenizer(request) -> Tokenizer:
    """Run a test with both vocabularies."""
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("gpt2_tokenizer")


# ---- text ------------------------------------------------------------------------------------------------------------


@relaxed
@given(text=TEXTS | WITH_SPECIAL_NAMES)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@relaxed
@given(text=ANY_TEXTS)
@example(text="\ud83d")
@example(text="\udc4d\ud83d")
def test_lone_surrogates_become_replacement_characters(tokenizer, text):
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: utf16(pair.group()), text)
    expected = re.sub("[\ud800-\udfff]", "\ufffd", joined)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert encode_utf8(text) == expected.encode()


def utf16(pair: str) -> str:
    """Return the character that a surrogate pair encodes."""
    high, low = map(ord, pair)
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


@relaxed
@given(text=WITH_SPECIAL_NAMES)
@example(text="<|endoftext|>")
def test_text_never_becomes_a_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.end_of_text for token in tokens)
    assert all((document[1:] < tokenizer.end_of_text).all() for document in tokenizer.encode_documents([text]))


@relaxed
@given(text=ANY_TEXTS)
def test_gpt2_equals_tiktoken(gpt2_tokenizer, text):
    import tiktoken

    assert gpt2_tokenizer.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_gpt2_has_the_published_ids(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello world") == [15496, 995]
    assert (gpt2_tokenizer.end_of_text, gpt2_tokenizer.vocab_size) == (50_256, 50_257)
    assert [*gpt2_tokenizer.role_tokens.values(), gpt2_tokenizer.end_of_turn] == [50_257, 50_258, 50_259, 50_260]
    assert gpt2_tokenizer.chat_vocab_size == 50_261


@relaxed
@given(text=ANY_TEXTS | WITH_SPECIAL_NAMES)
@example(text="\n é👍" * 40)  # longer than a piece of the split pattern
@example(text="a" * 31 + "\r\n" + "👍" * 70)
@example(text="a" * 31 + "\ud83d")
def test_bytes_tokens_are_the_utf8_bytes(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(text) == list(encode_utf8(text))
    (document,) = tokenizer.encode_documents([text])
    assert document.tobytes() == np.array([256, *encode_utf8(text)], dtype=np.uint16).tobytes()


def test_bytes_has_one_id_per_byte():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert [tokenizer.token_bytes(token) for token in range(256)] == [bytes([byte]) for byte in range(256)]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (256, 257)
    assert [*tokenizer.role_tokens.values(), tokenizer.end_of_turn] == [257, 258, 259, 260]
    assert tokenizer.chat_vocab_size == 261


@relaxed
@given(texts=st.lists(ANY_TEXTS, max_size=6))
def test_documents_of_a_batch_equal_single_ones(tokenizer, texts):
    documents = tokenizer.encode_documents(texts)
    assert [tokens.tolist() for tokens in documents] == [[tokenizer.end_of_text, *tokenizer.encode(t)] for t in texts]
    assert all(tokens.dtype == np.uint16 and tokens.ndim == 1 for tokens in documents)


def test_gigatoken_equals_tiktoken_on_long_texts(gpt2_tokenizer):
    """A megabyte of source code, letters of all scripts, and long runs of whitespace."""
    pytest.importorskip("gigatoken")
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    letters = random.Random(0).choices([chr(i) for i in range(0x3000) if chr(i).isprintable()], k=100_000)
    texts += [
        "".join(letters),
        " ".join(letters),
        "\n \t\r\u00a0\u3000" * 5000,
        "0123456789" * 999,
        "don't we'LL " * 999,
    ]
    assert gpt2_tokenizer.gigatoken is not None
    for text, tokens in zip(texts, gpt2_tokenizer.encode_documents(texts), strict=True):
        assert tokens[1:].tolist() == gpt2_tokenizer.encode(text)


def test_without_gigatoken_tiktoken_encodes_and_a_note_is_printed(gpt2_tokenizer, monkeypatch, capsys):
    texts = ["Some words.", "", "<|endoftext|>", "lone surrogate \ud800"]
    expected = [tokens.tolist() for tokens in gpt2_tokenizer.encode_documents(texts)]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    slow = Tokenizer("gpt2", gpt2_tokenizer.ranks)
    assert [tokens.tolist() for tokens in slow.encode_documents(texts)] == expected
    assert slow.gigatoken is None and capsys.readouterr().out.count("gigatoken is not installed") == 1


def test_bytes_does_not_use_gigatoken(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = Tokenizer("bytes", load_tokenizer("bytes").ranks)
    assert tokenizer.encode_documents(["é"])[0].tolist() == [256, 0xC3, 0xA9]
    assert tokenizer.gigatoken is None and capsys.readouterr().out == ""


def test_a_difference_between_gigatoken_and_tiktoken_is_an_error(gpt2_tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(gpt2_tokenizer, "encode", lambda text: [1, 2, 3])
    with pytest.raises(UserError, match="gigatoken and tiktoken encode a text differently, 'Some words"):
        gpt2_tokenizer.encode_documents(["Some words."])


def test_special_tokens_decode_to_their_names(tokenizer):
    special = [tokenizer.end_of_text, *tokenizer.role_tokens.values(), tokenizer.end_of_turn]
    assert [tokenizer.decode([token]) for token in special] == list(SPECIAL_NAMES)
    assert [tokenizer.token_bytes(token).decode() for token in special] == list(SPECIAL_NAMES)


@relaxed
@given(text=ANY_TEXTS)
def test_token_bytes_joined_are_the_text(tokenizer, text):
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == encode_utf8(text)


def test_invalid_utf8_decodes_to_replacement_characters():
    assert load_tokenizer("bytes").decode([0xFF, ord("a"), 0xC3]) == "\ufffda\ufffd"


def test_unknown_tokenizer():
    with pytest.raises(UserError, match=r"there is no tokenizer 'gpt3': choose gpt2, bytes or a folder"):
        load_tokenizer("gpt3")


def test_a_failed_download_of_gpt2_is_one_line(run_script, tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "cache").mkdir()
    closed = "http://127.0.0.1:9"
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "https_proxy": closed, "HTTPS_PROXY": closed, "NO_PROXY": ""}
    done = run_script("prepare_fineweb.py", "--files", "a.txt", "--out", "out", env=env | {"no_proxy": ""}, expect=2)
    assert re.search("gpt2 vocabulary could not be downloaded.*--tokenizer bytes", error_of(done))
    assert not (tmp_path / "out").exists()


# ---- streaming -------------------------------------------------------------------------------------------------------


@relaxed
@given(text=TEXTS)
@example(text="👩‍👩‍👧‍👦 und 🇫🇷")
def test_a_stream_decodes_whole_characters(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.decode(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and stream.flush() == ""


@relaxed
@given(data=st.data())
def test_a_stream_equals_decode_for_any_tokens(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.chat_vocab_size - 1), max_size=12))
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.decode, tokens)) + stream.flush() == tokenizer.decode(tokens)


AROUND = (st.sampled_from(["", "a", "a.", "'", "1", "é_", ".\n\n"]), st.sampled_from(["", "b", ".", "'s", "é"]))


# Each pair of these characters is a token, so that the tokens show where the pattern cuts.
RANKS = {bytes([byte]): byte for byte in range(256)}
RANKS |= {bytes(pair): 256 + i for i, pair in enumerate(itertools.product(b" \n\t.ab", repeat=2))}
SPACE_TOKENIZERS = {pattern: Tokenizer(pattern, RANKS) for pattern in ("gpt2", "gpt4")}


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
@given(before=AROUND[0], after=AROUND[1], data=st.data())
@settings(max_examples=300, deadline=None)
def test_long_white_space_is_encoded_as_in_one_piece(pattern, before, after, data):
    """Below the limit of tiktoken's regular expression, the parts give the tokens of the whole."""
    space = data.draw(st.text("  \n\t\r\u3000\xa0", min_size=20, max_size=60))
    text = before + space + after + " " * 30 + "end"
    long_space = re.compile(minigpt.tokenizer.LONG_SPACE.pattern.replace("100000", "20"))
    tokenizer = SPACE_TOKENIZERS[pattern]
    with mock.patch.multiple(minigpt.tokenizer, LONG_SPACE=long_space, MAX_SPACE=20):
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_millions_of_spaces(pattern):
    """tiktoken's regular expression overflows its stack above about a million."""
    tokenizer = SPACE_TOKENIZERS[pattern]
    space, lines = " " * 1_500_000, "\n" * 1_500_000
    for text in (f"a{space}b{lines}", f".{lines}a{space}\n{space}."):
        [document] = tokenizer.encode_documents([text])
        assert document[1:].tolist() == tokenizer.encode(text) and tokenizer.decode(document[1:]) == text


def test_memory_does_not_grow_with_the_number_of_different_words(gpt2_tokenizer, monkeypatch):
    """gigatoken keeps each: it is built again, and the tokens stay the same."""
    rng = random.Random(0)
    monkeypatch.setattr(minigpt.tokenizer, "MAX_CACHE_BYTES", 20_000_000)
    built = set()
    for _ in range(5):
        texts = [" ".join(f"{rng.getrandbits(60):x}" for _ in range(60_000)) for _ in range(4)]  # 4 MB
        documents = gpt2_tokenizer.encode_documents(texts)
        built.add(id(gpt2_tokenizer.__dict__.get("gigatoken")))
    assert len(built) > 1 and gpt2_tokenizer.cache_bytes < 40_000_000
    assert documents[0][1:].tolist() == gpt2_tokenizer.encode(texts[0])
