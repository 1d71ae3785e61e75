"""Conversations: a record in any known layout becomes messages, and messages become tokens with a loss mask.

The tokens of a conversation are

    <|endoftext|> <|user|> Why is the sky blue? <|end|> <|assistant|> Because ... <|end|>

where each name in brackets is one special token. The loss covers the assistant's text and the <|end|> after it.
"""

import math
from collections.abc import Sequence
from typing import Any

from minigpt.cli import UserError
from minigpt.tokenizer import ROLES, Tokenizer

# The fields of a question, and of its answer, in records of one question each.
QUESTION_FIELDS = {
    "instruction": ("response", "output"),
    "question": ("answer", "response"),
    "prompt": ("response", "completion"),
}
LAYOUTS = (
    "messages; conversations; prompt and completion; instruction and response or output; question and answer; prompt"
    " and response"
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def to_messages(location: str, record: dict) -> tuple[list[dict], int]:
    """Convert a record in any of the layouts that `prepare_dolly.py` lists.

    Returns (messages, n_prompt): {"role", "content"} each; the first `n_prompt` are context only, without loss.
    Raises `UserError`, naming the record's location, if the layout is unknown.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in fields:
            return parse_messages(location, name, fields[name]), 0
    if "prompt" in fields and "completion" in fields:
        prompt = parse_messages(location, "prompt", fields["prompt"], role="user")
        completion = parse_messages(location, "completion", fields["completion"], role="assistant")
        return prompt + completion, len(prompt)
    name = next((name for name in QUESTION_FIELDS if name in fields), None)
    if name is None:
        found = f"its fields are {', '.join(record)}" if record else "it has no fields"
        raise UserError(f"{location}: unknown layout: {found}; supported are {LAYOUTS}")
    question = get_text(location, record, name)
    context = get_text(location, record, "context", "input", optional=True)
    answer = get_text(location, record, *QUESTION_FIELDS[name])
    question = f"{question}\n\n{context}" if context else question
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], 0


def parse_messages(location: str, name: str, value: Any, role: str | None = None) -> list[dict]:
    """Return the messages of a field: a list of messages, or a text if `role` is given."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise UserError(f"{location}: {name} must be a list of messages")
    return [parse_message(f"{location}, message {number} of {name}", item) for number, item in enumerate(value, 1)]


def parse_message(location: str, item: Any) -> dict:
    """Return a message with "role" and "content", from these or from ShareGPT's "from" and "value"."""
    fields = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    role = fields.get("role", SHAREGPT_ROLES.get(str(fields.get("from")), fields.get("from")))
    content = fields.get("content", fields.get("value"))
    if isinstance(content, list):  # a list of text parts, as in OpenAI's API
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if role not in ROLES:
        raise UserError(f"{location}: role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{location}: the content of a message must be text, not {type(content).__name__}")
    return {"role": role, "content": content}


def get_text(location: str, record: dict, *names: str, optional: bool = False) -> str:
    """Return the text of the first of these fields that the record has."""
    value = next((record[name] for name in names if record.get(name) is not None), "" if optional else None)
    if not isinstance(value, str):
        fields = ", ".join(map(str, record))
        raise UserError(f"{location}: no text in field {' or '.join(map(repr, names))}; the record has: {fields}")
    return value


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    max_length: int | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]] | None:
    """Return the tokens of a conversation and their loss mask.

    A conversation that is too long loses its oldest exchanges first; the system message and the last answer are kept
    whole. If that is not enough, the last user message is truncated: at its end for training, where Dolly's questions
    have their context, and at its beginning before a reply, because people ask at the end.

    Args:
        messages: {"role": "system" | "user" | "assistant", "content": text} each.
        max_length: maximum number of tokens.
        add_generation_prompt: append the token that starts the assistant's reply.

    Returns:
        (tokens, loss_mask) of equal length, or None if the last answer alone is too long.
    """
    turns = [
        [tokenizer.role_tokens[message["role"]], *tokenizer.encode(message["content"]), tokenizer.end_of_turn]
        for message in messages
    ]
    roles = [message["role"] for message in messages]
    first = int(roles[:1] == ["system"])
    generation_prompt = [tokenizer.role_tokens["assistant"]] if add_generation_prompt else []
    excess = 1 + sum(map(len, turns)) + len(generation_prompt) - (max_length or math.inf)
    begin = first
    for i in range(first + 1, len(turns)):
        if excess > 0 and roles[i] == "user":  # the next exchange starts here: drop the one before it
            excess -= sum(map(len, turns[begin:i]))
            begin = i
    del turns[first:begin], roles[first:begin]
    if excess > 0 and "user" in roles:
        question = turns[roles.index("user", first)]
        n_cut = max(0, min(excess, len(question) - 3))  # keep the role, one token and the end of the turn
        begin = 1 if add_generation_prompt else len(question) - 1 - n_cut
        del question[begin : begin + n_cut]
        excess -= n_cut
    if excess > 0:
        return None
    tokens, loss_mask = [tokenizer.end_of_text], [False]
    for role, turn in zip(roles, turns, strict=True):
        tokens += turn
        loss_mask += [False] + [role == "assistant"] * (len(turn) - 1)
    return tokens + generation_prompt, loss_mask + [False] * len(generation_prompt)


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict], block_size: int, max_tokens: int
) -> tuple[list[int], int]:
    """Return the tokens before the assistant's reply, truncated to leave room for it.

    Args:
        messages: the conversation; the last message is the user's.
        block_size: the model's context.
        max_tokens: length of the reply, see `max_prompt_length`.

    Returns:
        (tokens, n_dropped), where `n_dropped` counts the tokens that were truncated.

    Raises:
        UserError: the system message alone fills the context.
    """
    max_length = max_prompt_length(block_size, max_tokens)
    tokens, _ = encode_chat(tokenizer, messages, add_generation_prompt=True)
    if len(tokens) <= max_length:
        return tokens, 0
    truncated = encode_chat(tokenizer, messages, max_length, add_generation_prompt=True)
    if truncated is None:
        raise UserError(f"the system message alone fills the context of {block_size} tokens: shorten it")
    return truncated[0], len(tokens) - len(truncated[0])


def max_prompt_length(block_size: int, max_tokens: int) -> int:
    """Return the number of tokens available before a reply, for which at most a quarter of the context is reserved."""
    return block_size - min(max_tokens, block_size // 4)
