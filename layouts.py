"""Conversations in the layouts that instruction datasets have: Dolly's, Alpaca's, ShareGPT's and those of TRL.

A layout is recognised by a record's fields, as `prepare_dolly.py` shows them.
"""

from typing import Any

from cli import UserError, check
from tokenizer import ROLES

LAYOUTS = "messages, or conversations, or prompt and completion, or instruction and response or output"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def to_messages(place: str, record: dict) -> tuple[list[dict], int]:
    """A record as messages of "role" and "content", and how many of them, at the beginning, are prompt only.

    Raises `UserError`, naming the record, where it has no known layout.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    for name in ("messages", "conversations"):
        if name in fields:
            return as_messages(place, name, fields[name]), 0
    if "prompt" in fields and "completion" in fields:
        prompt = as_messages(place, "prompt", fields["prompt"], role="user")
        return prompt + as_messages(place, "completion", fields["completion"], role="assistant"), len(prompt)
    has = f"its fields are {', '.join(record)}" if record else "it has no fields"
    check("instruction" in fields, f"{place}: no known layout: {has}; known are {LAYOUTS}")
    instruction = text_of(place, record, "instruction")
    context = text_of(place, record, "context", "input", optional=True)
    response = text_of(place, record, "response", "output")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": response}], 0


def as_messages(place: str, name: str, value: Any, role: str | None = None) -> list[dict]:
    """The messages in a field: a list of them, or a text of this role."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    check(isinstance(value, list), f"{place}: {name} must be a list of messages")
    return [as_message(f"{place}, message {number} of {name}", item) for number, item in enumerate(value, start=1)]


def as_message(place: str, item: Any) -> dict:
    """A message of "role" and "content", or of ShareGPT's "from" and "value"."""
    said = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    role = said.get("role", SHAREGPT_ROLES.get(str(said.get("from")), said.get("from")))
    content = said.get("content", said.get("value"))
    if isinstance(content, list):  # a text in parts, as OpenAI's API has it
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    check(role in ROLES, f"{place}: role {role!r}; a message needs one of {', '.join(ROLES)}")
    check(isinstance(content, str), f"{place}: a message needs a content in text, not {type(content).__name__}")
    return {"role": role, "content": content}


def text_of(place: str, record: dict, *names: str, optional: bool = False) -> str:
    """The text in the first of these fields that the record has."""
    value = next((record[name] for name in names if record.get(name) is not None), "" if optional else None)
    if not isinstance(value, str):
        fields = ", ".join(map(str, record))
        raise UserError(f"{place}: no text in field {' or '.join(map(repr, names))}; the record has: {fields}")
    return value
