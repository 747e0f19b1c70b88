"""Preference rows: one prompt with a chosen and a rejected answer, as people write them.

The prompt is `prompt` (text or messages), `conversations` or `messages` (turns before the answer), or Alpaca's
`instruction`; without any of them `chosen` and `rejected` are whole chats that differ in their last message.
An answer is text, one message, or a list that ends in it.
"""

from __future__ import annotations

from typing import Any

from loadmaster.data.shapes import READERS, RowError, kind_of

PAIR_FIELDS = ("chosen", "rejected")


def is_preference(row: dict[str, Any]) -> bool:
    return all(row.get(name) is not None for name in PAIR_FIELDS)


def pair_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    """(messages that end in the chosen answer, tools, the rejected answer). Raises RowError."""
    missing = [name for name in PAIR_FIELDS if row.get(name) is None]
    if missing:
        raise RowError(f"lacks {' and '.join(missing)}, which a preference row has")
    (messages, tools), (other, _) = (_chat(row, name) for name in PAIR_FIELDS)
    for name, chat in zip(PAIR_FIELDS, (messages, other), strict=True):
        if chat[-1]["role"] != "assistant":
            raise RowError(f"{name} ends in a message of role {chat[-1]['role']}, not in the assistant's answer")
        if len(chat) < 2:
            raise RowError(f"{name} has no prompt before its answer")
    if messages[:-1] != other[:-1]:
        raise RowError("chosen and rejected answer different prompts; only their last messages may differ")
    if messages[-1] == other[-1]:
        raise RowError("chosen and rejected are the same answer")
    return messages, tools, other[-1]


def _chat(row: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The chat that ends in the answer `name`, through the reader of the shape that the row is written in."""
    rest = {key: value for key, value in row.items() if key not in PAIR_FIELDS}
    answer = row[name]
    prompt = next((rest[key] for key in ("conversations", "messages", "prompt") if rest.get(key) is not None), None)
    if prompt is None and rest.get("instruction") is not None:
        return READERS["alpaca"]({**rest, "output": answer})
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | None):
        raise RowError(f"the prompt is {kind_of(prompt)}, not text or a list of messages")
    sharegpt = _speaks_sharegpt(prompt) or _speaks_sharegpt(answer)
    if isinstance(answer, str):
        turns: Any = [{"from": "gpt", "value": answer} if sharegpt else {"role": "assistant", "content": answer}]
    else:
        turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list):
        raise RowError(f"{name} is {kind_of(answer)}, not text, a message or a list of messages")
    if prompt is not None and turns[: len(prompt)] != prompt:
        turns = [*prompt, *turns]
    shape = "sharegpt" if sharegpt else "messages"
    chat = {"tools": rest.get("tools"), "system": rest.get("system")}
    return READERS[shape]({**chat, ("conversations" if sharegpt else "messages"): turns})


def _speaks_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict) and "from" in first
