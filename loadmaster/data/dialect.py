"""Tool calls as a chat template wants them written: the same in training and in a prompt.

Most templates take an object as arguments and any content; DeepSeek's take null content and JSON text.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

DIALECTS = ((False, False), (True, False), (True, True), (False, True))
"""(null instead of empty content, arguments as JSON text)."""
MARK = "zqCallqz"


def in_dialect(tokenizer: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their tool calls as this tokenizer's template shows them."""
    if not any(message.get("tool_calls") for message in messages):
        return messages
    return written(messages, *_dialect_of(tokenizer, json.dumps(tokenizer.chat_template)))


@lru_cache(maxsize=8)
def _dialect_of(tokenizer: Any, template: str) -> tuple[bool, bool]:
    """The first in which name and arguments of a call are both rendered. template: the tokenizer's now."""
    function = {"name": MARK, "arguments": {"a": MARK}}
    call = {"type": "function", "id": "call00000", "function": function}
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]

    def shows_calls(dialect: tuple[bool, bool]) -> bool:
        try:
            return tokenizer.apply_chat_template(written(chat, *dialect), tokenize=False).count(MARK) >= 2
        except Exception:  # Jinja and the template's raise_exception share no base class
            return False

    return next(filter(shows_calls, DIALECTS), DIALECTS[0])


def written(messages: list[dict[str, Any]], null_content: bool, text_arguments: bool) -> list[dict[str, Any]]:
    """The messages in one dialect."""
    found = []
    for message in messages:
        if message.get("tool_calls"):
            calls = message["tool_calls"]
            if text_arguments:
                texts = [json.dumps(call["function"]["arguments"], ensure_ascii=False) for call in calls]
                calls = [
                    {**call, "function": {**call["function"], "arguments": text}}
                    for call, text in zip(calls, texts, strict=True)
                ]
            content = message["content"] or (None if null_content else "")
            message = {**message, "content": content, "tool_calls": calls}
        found.append(message)
    return found
