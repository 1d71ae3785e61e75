"""Text to tokens and back, streaming, and the tokens of a conversation."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import error_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cli import UserError
from tokenizer import CHAT_TOKENS, ROLES, GPT2Tokenizer, TextStream, Tokenizer, load_tokenizer, utf8

relaxed = settings(deadline=None, max_examples=60)

SPECIAL_NAMES = ("<|endoftext|>", *CHAT_TOKENS)
TEXTS = st.text() | st.text(alphabet="é€👍🏽 \r\nab", max_size=20)
SURROGATES = st.characters(categories=["Cs"])
ANY_TEXTS = st.text(alphabet=st.characters(codec="utf-8") | SURROGATES)
FORGERIES = st.lists(st.sampled_from(SPECIAL_NAMES) | st.text(max_size=5), max_size=8).map("".join)


@pytest.fixture(scope="session", params=["bytes", "gpt2"])
def tokenizer(request) -> Tokenizer:
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("gpt2_tokenizer")


# ---- text ----------------------------------------------------------------------------------------------------------


@relaxed
@given(text=TEXTS | FORGERIES)
def test_decode_undoes_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@relaxed
@given(text=ANY_TEXTS)
@example(text="\ud83d")
@example(text="\udc4d\ud83d")
def test_half_surrogate_pairs_become_replacement_characters(tokenizer, text):
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: utf16(pair.group()), text)
    expected = re.sub("[\ud800-\udfff]", "\ufffd", joined)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert utf8(text) == expected.encode()


def utf16(pair: str) -> str:
    high, low = map(ord, pair)
    return chr(0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00))


@relaxed
@given(text=FORGERIES)
@example(text="<|endoftext|>")
def test_no_text_becomes_a_special_token(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.end_of_text for token in tokens)
    assert all((document[1:] < tokenizer.end_of_text).all() for document in tokenizer.encode_documents([text]))


@relaxed
@given(text=ANY_TEXTS)
def test_gpt2_is_tiktoken(gpt2_tokenizer, text):
    import tiktoken

    assert gpt2_tokenizer.encode(text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_gpt2_has_the_published_ids(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello world") == [15496, 995]
    assert (gpt2_tokenizer.end_of_text, gpt2_tokenizer.vocab_size) == (50_256, 50_257)
    assert [*gpt2_tokenizer.role_tokens.values(), gpt2_tokenizer.end_of_turn] == [50_257, 50_258, 50_259, 50_260]
    assert gpt2_tokenizer.chat_vocab_size == 50_261


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("é!") == [0xC3, 0xA9, 0x21]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (256, 257)
    assert [*tokenizer.role_tokens.values(), tokenizer.end_of_turn] == [257, 258, 259, 260]
    assert tokenizer.chat_vocab_size == 261


@relaxed
@given(texts=st.lists(ANY_TEXTS, max_size=6))
def test_documents_equal_one_by_one(tokenizer, texts):
    documents = tokenizer.encode_documents(texts)
    assert [tokens.tolist() for tokens in documents] == [[tokenizer.end_of_text, *tokenizer.encode(t)] for t in texts]
    assert all(tokens.dtype == np.uint16 and tokens.ndim == 1 for tokens in documents)


def test_fast_encoding_of_long_texts_is_tiktoken(gpt2_tokenizer):
    """Source code and documentation by the megabyte, letters of all scripts, and runs of every kind of space."""
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
    assert gpt2_tokenizer.fast is not None
    for text, tokens in zip(texts, gpt2_tokenizer.encode_documents(texts), strict=True):
        assert tokens[1:].tolist() == gpt2_tokenizer.encode(text)


def test_without_gigatoken_tiktoken_encodes_and_says_so(gpt2_tokenizer, monkeypatch, capsys):
    texts = ["Some words.", "", "<|endoftext|>", "half a pair \ud800"]
    expected = [tokens.tolist() for tokens in gpt2_tokenizer.encode_documents(texts)]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    slow = GPT2Tokenizer()
    assert [tokens.tolist() for tokens in slow.encode_documents(texts)] == expected
    assert slow.fast is None and capsys.readouterr().out.count("gigatoken is not installed") == 1


def test_a_difference_between_the_encoders_stops(gpt2_tokenizer, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(gpt2_tokenizer, "encode", lambda text: [1, 2, 3])
    with pytest.raises(UserError, match="gigatoken and tiktoken encode a text differently, 'Some words"):
        gpt2_tokenizer.encode_documents(["Some words."])


def test_special_tokens_are_shown_by_name(tokenizer):
    special = [tokenizer.end_of_text, *tokenizer.role_tokens.values(), tokenizer.end_of_turn]
    assert [tokenizer.decode([token]) for token in special] == list(SPECIAL_NAMES)


def test_bytes_that_are_no_text_decode_to_replacement_characters():
    assert load_tokenizer("bytes").decode([0xFF, ord("a"), 0xC3]) == "\ufffda\ufffd"


def test_unknown_tokenizer():
    with pytest.raises(UserError, match=r"there is no tokenizer 'gpt3': choose one of gpt2, bytes"):
        load_tokenizer("gpt3")


def test_gpt2_out_of_reach_is_one_line(run_script, tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "cache").mkdir()
    closed = "http://127.0.0.1:9"
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "https_proxy": closed, "HTTPS_PROXY": closed, "NO_PROXY": ""}
    done = run_script("prepare_fineweb.py", "--files", "a.txt", "--out", "out", env=env | {"no_proxy": ""}, expect=2)
    assert re.search("gpt2 vocabulary could not be downloaded.*--tokenizer bytes", error_of(done))
    assert not (tmp_path / "out").exists()


# ---- streaming -----------------------------------------------------------------------------------------------------


@relaxed
@given(text=TEXTS)
@example(text="👩‍👩‍👧‍👦 und 🇫🇷")
def test_stream_shows_whole_characters(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text and stream.end() == ""


@relaxed
@given(data=st.data())
def test_stream_equals_decode_for_any_tokens(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.chat_vocab_size - 1), max_size=12))
    stream = TextStream(tokenizer)
    assert "".join(map(stream.add, tokens)) + stream.end() == tokenizer.decode(tokens)


# ---- conversations -------------------------------------------------------------------------------------------------

CONTENTS = st.text(max_size=8) | FORGERIES
MESSAGES = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(ROLES), CONTENTS)
EXCHANGES = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4)


def conversation(system: str | None, exchanges) -> list[dict]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def test_layout_of_two_turns(tokenizer):
    t = tokenizer
    system, user, assistant = t.role_tokens["system"], t.role_tokens["user"], t.role_tokens["assistant"]
    turns = [
        ([t.end_of_text], [False]),
        ([system, *t.encode("Be brief."), t.end_of_turn], None),
        ([user, *t.encode("Why is the sky blue?"), t.end_of_turn], None),
        ([assistant, *t.encode("Air scatters blue."), t.end_of_turn], True),
        ([user, *t.encode("And red?"), t.end_of_turn], None),
        ([assistant, *t.encode("Less."), t.end_of_turn], True),
    ]
    messages = conversation("Be brief.", [("Why is the sky blue?", "Air scatters blue."), ("And red?", "Less.")])
    tokens, learned = t.encode_chat(messages)
    assert tokens == [token for turn, _ in turns for token in turn]
    assert learned == [bool(answer) and i > 0 for turn, answer in turns for i in range(len(turn))]
    assert t.decode(tokens) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>Why is the sky blue?<|end|><|assistant|>Air scatters blue."
        "<|end|><|user|>And red?<|end|><|assistant|>Less.<|end|>"
    )


@relaxed
@given(messages=st.lists(MESSAGES, max_size=6))
def test_a_conversation_can_be_read_back(tokenizer, messages):
    """Whatever people write, the special tokens alone tell the messages apart, and which parts are learned."""
    tokens, learned = tokenizer.encode_chat(messages)
    assert tokens[0] == tokenizer.end_of_text and len(learned) == len(tokens)
    roles = {token: role for role, token in tokenizer.role_tokens.items()}
    found, expected, role = [], [False], None
    for token in tokens[1:]:
        expected.append(role == "assistant")
        if role is None:
            role, content = roles[token], []
        elif token == tokenizer.end_of_turn:
            found.append({"role": role, "content": tokenizer.decode(content)})
            role = None
        else:
            assert token < tokenizer.end_of_text
            content.append(token)
    assert role is None and found == messages and learned == expected


def test_reply_makes_the_assistant_speak(tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    tokens, learned = tokenizer.encode_chat(messages)
    assert tokenizer.encode_chat(messages, reply=True) == (
        [*tokens, tokenizer.role_tokens["assistant"]],
        [*learned, False],
    )


def shortened(tokenizer: Tokenizer, system: str | None, exchanges, limit: int):
    """The slow, obvious way: without the oldest exchanges; if that is not enough, with less of the question."""
    for oldest in range(len(exchanges)):
        tokens, learned = tokenizer.encode_chat(conversation(system, exchanges[oldest:]))
        if len(tokens) <= limit:
            return tokens, learned
    begin = tokens.index(tokenizer.role_tokens["user"]) + 1
    end = tokens.index(tokenizer.end_of_turn, begin)
    cut = end - (len(tokens) - limit)
    if cut <= begin:
        return None
    del tokens[cut:end], learned[cut:end]
    return tokens, learned


@settings(deadline=None, max_examples=200)
@given(system=st.none() | CONTENTS, exchanges=EXCHANGES, limit=st.integers(1, 80))
@example(system="S", exchanges=[("", "A")], limit=7)
@example(system=None, exchanges=[("Q", "A")], limit=6)
@example(system=None, exchanges=[("QQ", "A")], limit=7)
def test_shortening(tokenizer, system, exchanges, limit):
    result = tokenizer.encode_chat(conversation(system, exchanges), max_length=limit)
    assert result == shortened(tokenizer, system, exchanges, limit)
    assert result is None or len(result[0]) == len(result[1]) <= limit


def test_shortening_keeps_system_and_answer():
    tokenizer = load_tokenizer("bytes")
    messages = conversation("S", [("old", "old"), ("mid", "mid"), ("question", "answer")])

    def at(limit: int) -> str | None:
        result = tokenizer.encode_chat(messages, max_length=limit)
        return result and tokenizer.decode(result[0])

    system, last = "<|endoftext|><|system|>S<|end|>", "<|user|>question<|end|><|assistant|>answer<|end|>"
    middle = "<|user|>mid<|end|><|assistant|>mid<|end|>"
    assert at(42) == system + middle.replace("mid", "old") + middle + last
    assert at(41) == at(32) == system + middle + last
    assert at(31) == at(22) == system + last
    assert at(21) == system + last.replace("question", "questio")
    assert at(15) == system + last.replace("question", "q")
    assert at(14) is None


def test_a_chat_that_waits_for_an_answer_is_shortened_too(tokenizer):
    messages = [*conversation("S", [("old", "old")]), {"role": "user", "content": "new"}]
    whole, _ = tokenizer.encode_chat(messages, reply=True)
    tokens, _ = tokenizer.encode_chat(messages, max_length=len(whole) - 1, reply=True)
    assert tokens == tokenizer.encode_chat([messages[0], messages[-1]], reply=True)[0]
    fewer, _ = tokenizer.encode_chat([{"role": "user", "content": "a b c d"}], max_length=5, reply=True)
    assert len(fewer) == 5 and fewer[-2:] == [tokenizer.end_of_turn, tokenizer.role_tokens["assistant"]]
