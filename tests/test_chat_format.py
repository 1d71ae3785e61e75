"""The chat format: records to messages, messages to tokens and loss mask, truncation, the prompt before a reply."""

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.chat import encode_chat, encode_prompt, to_messages
from minigpt.cli import UserError
from minigpt.tokenizer import CHAT_TOKENS, ROLES, Tokenizer, load_tokenizer

BYTES = load_tokenizer("bytes")
relaxed = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="session", params=["bytes", "gpt2"])
def tokenizer(request) -> Tokenizer:
    """Run a test with both vocabularies."""
    return BYTES if request.param == "bytes" else request.getfixturevalue("gpt2_tokenizer")


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def user(content: str) -> dict:
    return message("user", content)


def assistant(content: str) -> dict:
    return message("assistant", content)


# ---- records to messages ---------------------------------------------------------------------------------------------

YES = assistant("Yes.")
QUESTION = [user("Who?"), assistant("Jane.")]
QUESTION_WITH_CONTEXT = [user("Who?\n\nEmma, by Jane"), assistant("Jane.")]
TWO_TURNS = [message("system", "Be kind."), user("Hi"), assistant("Hello!"), user("Bye"), assistant("See you.")]
LAYOUTS = {  # name: (record, messages, number of messages that are context only)
    "dolly": ({"instruction": "Who?", "context": "", "response": "Jane.", "category": "open_qa"}, QUESTION, 0),
    "dolly with context": (
        {"instruction": "Who?", "context": "Emma, by Jane", "response": "Jane."},
        QUESTION_WITH_CONTEXT,
        0,
    ),
    "context null": ({"instruction": "Who?", "context": None, "response": "Jane."}, QUESTION, 0),
    "alpaca": ({"instruction": "Who?", "input": "Emma, by Jane", "output": "Jane."}, QUESTION_WITH_CONTEXT, 0),
    "alpaca without input": ({"instruction": "Who?", "output": "Jane."}, QUESTION, 0),
    "messages": ({"messages": TWO_TURNS}, TWO_TURNS, 0),
    "messages in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]},
                assistant("Jane."),
            ]
        },
        QUESTION,
        0,
    ),
    "question and answer": ({"id": 7, "question": "Who?", "answer": "Jane."}, QUESTION, 0),
    "question with context": (
        {"question": "Who?", "context": "Emma, by Jane", "answer": "Jane."},
        QUESTION_WITH_CONTEXT,
        0,
    ),
    "prompt and response": ({"prompt": "Who?", "response": "Jane."}, QUESTION, 0),
    "prompt and completion": ({"prompt": "Who?", "completion": "Jane."}, QUESTION, 1),
    "prompt and completion in messages": (
        {
            "prompt": [message("system", "Be kind."), user("Who?")],
            "completion": [assistant("Jane.")],
            "messages": None,
        },
        [message("system", "Be kind."), *QUESTION],
        2,
    ),
    "answers in the prompt": (
        {"prompt": [user("Hi"), YES, user("Who?")], "completion": [YES, user("Sure?"), assistant("No.")]},
        [user("Hi"), YES, user("Who?"), YES, user("Sure?"), assistant("No.")],
        3,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi", "weight": None},
                {"from": "gpt", "value": "Hello!"},
                {"from": "user", "value": "Bye"},
                {"from": "assistant", "value": "See you."},
            ]
        },
        TWO_TURNS,
        0,
    ),
    "conversations with roles": (
        {"conversations": [{"role": "user", "content": "Who?", "from": None}, YES]},
        [user("Who?"), YES],
        0,
    ),
    "messages beside a prompt": (
        {"prompt": "Who?", "prompt_id": "7", "messages": [user("Who?"), YES]},
        [user("Who?"), YES],
        0,
    ),
}


@pytest.mark.parametrize(("record", "messages", "n_prompt"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout(record, messages, n_prompt):
    assert to_messages("chat.jsonl line 1", record) == (messages, n_prompt)


NOT_TEXT = "the content of a message must be text, not"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [{"role": "human", "content": "Hello?"}, YES]},
            ", message 1 of messages: role 'human'; expected",
        ),
        ({"messages": [YES, {"role": "tool", "content": "5"}, YES]}, ", message 2 of messages: role 'tool'; expected"),
        (
            {"conversations": [YES, {"from": "function_call", "value": "5"}]},
            ", message 2 of conversations: role 'function_call'; expected one of",
        ),
        (
            {"conversations": [YES, {"from": ["human"], "value": "5"}]},
            ", message 2 of conversations: role ['human']; expected one of",
        ),
        ({"messages": [{"role": "user", "content": None}, YES]}, f", message 1 of messages: {NOT_TEXT} NoneType"),
        ({"messages": [{"role": "user"}, YES]}, f", message 1 of messages: {NOT_TEXT} NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, YES]},
            f", message 1 of messages: {NOT_TEXT} list",
        ),
        (
            {"messages": [{"content": "Hello?"}, YES]},
            ", message 1 of messages: role None; expected one of system, user, assistant",
        ),
        ({"messages": ["Hello?", YES]}, ", message 1 of messages: role None; expected one of system, user, assistant"),
        ({"messages": "Hello?"}, ": messages must be a list of messages"),
        ({"prompt": "Who?", "completion": 5}, ": completion must be a list of messages"),
        (
            {"text": "Who?", "label": "Jane."},
            ": unknown layout: its fields are text, label; supported are messages; conversations; prompt and",
        ),
        ({"prompt": "Who?"}, ": no text in field 'response' or 'completion'; the record has: prompt"),
        ({"question": "Who?"}, ": no text in field 'answer' or 'response'; the record has: question"),
        ({}, ": unknown layout: it has no fields; supported are messages; conversations; prompt and completion;"),
        (
            {"instruction": "Who?", "answer": "Jane."},
            ": no text in field 'response' or 'output'; the record has: instruction, answer",
        ),
        ({"instruction": "Who?", "response": 5}, ": no text in field 'response' or 'output'"),
        ({"instruction": "Who?", "context": ["a"], "response": "Jane."}, ": no text in field 'context' or 'input'"),
    ],
)
def test_a_record_in_no_layout_is_named(record, message):
    with pytest.raises(UserError, match=f"^{re.escape('chat.jsonl line 2' + message)}"):
        to_messages("chat.jsonl line 2", record)


# ---- messages to tokens ----------------------------------------------------------------------------------------------

SPECIAL_NAMES = ("<|endoftext|>", *CHAT_TOKENS)
WITH_SPECIAL_NAMES = st.lists(st.sampled_from(SPECIAL_NAMES) | st.text(max_size=5), max_size=8).map("".join)
CONTENTS = st.text(max_size=8) | WITH_SPECIAL_NAMES
MESSAGES = st.builds(message, st.sampled_from(ROLES), CONTENTS)
EXCHANGES = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4)


def conversation(system: str | None, exchanges) -> list[dict]:
    messages = [] if system is None else [message("system", system)]
    for question, answer in exchanges:
        messages += [user(question), assistant(answer)]
    return messages


def test_tokens_and_loss_mask_of_two_turns(tokenizer):
    t = tokenizer
    turns = [
        ([t.end_of_text], [False]),
        ([t.role_tokens["system"], *t.encode("Be brief."), t.end_of_turn], None),
        ([t.role_tokens["user"], *t.encode("Why is the sky blue?"), t.end_of_turn], None),
        ([t.role_tokens["assistant"], *t.encode("Air scatters blue."), t.end_of_turn], True),
        ([t.role_tokens["user"], *t.encode("And red?"), t.end_of_turn], None),
        ([t.role_tokens["assistant"], *t.encode("Less."), t.end_of_turn], True),
    ]
    messages = conversation("Be brief.", [("Why is the sky blue?", "Air scatters blue."), ("And red?", "Less.")])
    tokens, loss_mask = encode_chat(t, messages)
    assert tokens == [token for turn, _ in turns for token in turn]
    assert loss_mask == [bool(answer) and i > 0 for turn, answer in turns for i in range(len(turn))]
    assert t.decode(tokens) == (
        "<|endoftext|><|system|>Be brief.<|end|><|user|>Why is the sky blue?<|end|><|assistant|>Air scatters blue."
        "<|end|><|user|>And red?<|end|><|assistant|>Less.<|end|>"
    )


@relaxed
@given(messages=st.lists(MESSAGES, max_size=6))
def test_messages_can_be_read_back(tokenizer, messages):
    """Any content: the special tokens alone separate the messages and decide the loss mask."""
    tokens, loss_mask = encode_chat(tokenizer, messages)
    assert tokens[0] == tokenizer.end_of_text and len(loss_mask) == len(tokens)
    roles = {token: role for role, token in tokenizer.role_tokens.items()}
    found, expected, role = [], [False], None
    for token in tokens[1:]:
        expected.append(role == "assistant")
        if role is None:
            role, content = roles[token], []
        elif token == tokenizer.end_of_turn:
            found.append(message(role, tokenizer.decode(content)))
            role = None
        else:
            assert token < tokenizer.end_of_text
            content.append(token)
    assert role is None and found == messages and loss_mask == expected


def test_generation_prompt_starts_the_reply(tokenizer):
    messages = [user("Hello")]
    tokens, loss_mask = encode_chat(tokenizer, messages)
    expected = [*tokens, tokenizer.role_tokens["assistant"]], [*loss_mask, False]
    assert encode_chat(tokenizer, messages, add_generation_prompt=True) == expected


def truncated(tokenizer: Tokenizer, system: str | None, exchanges, limit: int):
    """The slow, obvious way: drop the oldest exchanges; if that is not enough, the end of the question."""
    for oldest in range(len(exchanges)):
        tokens, loss_mask = encode_chat(tokenizer, conversation(system, exchanges[oldest:]))
        if len(tokens) <= limit:
            return tokens, loss_mask
    begin = tokens.index(tokenizer.role_tokens["user"]) + 1
    end = tokens.index(tokenizer.end_of_turn, begin)
    cut = end - (len(tokens) - limit)
    if cut <= begin:
        return None
    del tokens[cut:end], loss_mask[cut:end]
    return tokens, loss_mask


@settings(deadline=None, max_examples=200)
@given(system=st.none() | CONTENTS, exchanges=EXCHANGES, limit=st.integers(1, 80))
@example(system="S", exchanges=[("", "A")], limit=7)
@example(system=None, exchanges=[("Q", "A")], limit=6)
@example(system=None, exchanges=[("QQ", "A")], limit=7)
def test_truncation_equals_the_obvious_way(tokenizer, system, exchanges, limit):
    result = encode_chat(tokenizer, conversation(system, exchanges), max_length=limit)
    assert result == truncated(tokenizer, system, exchanges, limit)
    assert result is None or len(result[0]) == len(result[1]) <= limit


def test_truncation_keeps_system_message_and_answer():
    messages = conversation("S", [("old", "old"), ("mid", "mid"), ("question", "answer")])

    def at(limit: int) -> str | None:
        result = encode_chat(BYTES, messages, max_length=limit)
        return result and BYTES.decode(result[0])

    system, last = "<|endoftext|><|system|>S<|end|>", "<|user|>question<|end|><|assistant|>answer<|end|>"
    middle = "<|user|>mid<|end|><|assistant|>mid<|end|>"
    assert at(42) == system + middle.replace("mid", "old") + middle + last
    assert at(41) == at(32) == system + middle + last
    assert at(31) == at(22) == system + last
    assert at(21) == system + last.replace("question", "questio")
    assert at(15) == system + last.replace("question", "q")
    assert at(14) is None


def test_truncation_before_a_reply(tokenizer):
    messages = [*conversation("S", [("old", "old")]), user("new")]
    whole, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    tokens, _ = encode_chat(tokenizer, messages, max_length=len(whole) - 1, add_generation_prompt=True)
    assert tokens == encode_chat(tokenizer, [messages[0], messages[-1]], add_generation_prompt=True)[0]
    question = tokenizer.encode("a b c d")
    fewer, _ = encode_chat(tokenizer, [user("a b c d")], max_length=5, add_generation_prompt=True)
    assert len(fewer) == 5 and fewer[-2:] == [tokenizer.end_of_turn, tokenizer.role_tokens["assistant"]]
    assert fewer[2] == question[-1]  # the beginning is cut, because people ask at the end


# ---- the prompt before a reply ---------------------------------------------------------------------------------------


def prompt_of(*messages: tuple[str, str], max_tokens: int = 256) -> tuple[str, int]:
    tokens, n_dropped = encode_prompt(BYTES, [message(*pair) for pair in messages], 64, max_tokens)
    return BYTES.decode(tokens), n_dropped


def test_a_conversation_that_fits_is_the_prompt():
    text, n_dropped = prompt_of(("system", "Be."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    turns = "<|system|>Be.<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert text == "<|endoftext|>" + turns and n_dropped == 0


def test_the_oldest_turns_are_dropped_from_the_prompt():
    """A quarter of the 64 tokens is reserved for the reply, or less if the reply is shorter."""
    messages = (("system", "Be."), ("user", "1" * 14), ("assistant", "2" * 14), ("user", "3" * 14))
    whole = 1 + 5 + 3 * 16 + 1
    newest = f"<|endoftext|><|system|>Be.<|end|><|user|>{'3' * 14}<|end|><|assistant|>"
    assert prompt_of(*messages) == (newest, 32)
    assert prompt_of(*messages, max_tokens=64 - whole)[1] == 0
    assert [prompt_of(("user", "1" * n))[1] for n in (44, 45)] == [0, 1]  # with 4 special tokens: 48 and 49
    with pytest.raises(UserError, match="system message alone fills the context of 64 tokens"):
        prompt_of(("system", "Be." * 30), ("user", "a"))


def test_the_time_of_encoding_grows_linearly():
    """A conversation of 40,000 messages would take minutes if each dropped one cost the length of the rest."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(40_000)]
    started = time.process_time()
    tokens, _ = encode_chat(BYTES, messages, max_length=100)
    assert time.process_time() - started < 4
    assert BYTES.decode(tokens).count("<|user|>") == 3 and "message 39999" in BYTES.decode(tokens)
