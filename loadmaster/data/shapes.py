"""One row of a supervised data set -> chat messages and tools: each shape of chat, field by field.

A row that is not what it should be raises `RowError` with the reason; whoever reads the file adds the place.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SYNONYMS = {"developer": "system"}
"""What newer OpenAI files call a role, and what chat templates call it."""
KNOWN_ROLES = (*ROLES, *SYNONYMS)
SPEAKERS = ["human", "gpt", "bot", "ai", "model", "chatbot"]
"""What other files call user and assistant; a list, as a role that is none may be of any type."""

# What ShareGPT files call the speakers, and what chat templates call them.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}

# A question and its answer, by the names that people give them.
PROMPT_FIELDS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


class RowError(ValueError):
    """One row cannot be used; the message is the reason, without the place. remedy: what helps, where it is not to
    mend the row.
    """

    def __init__(self, reason: str, remedy: str | None = None):
        super().__init__(reason)
        self.remedy = remedy


# --- the shapes -------------------------------------------------------------------------------------


def _from_messages(row: dict) -> tuple[list[dict], list | None]:
    turns = row["messages"] if "messages" in row else row.get("conversations")
    messages = [message_of(turn, f"message {n}") for n, turn in enumerate(turns_of(turns, "messages"), 1)]
    return _chat_of(messages, row)


def _from_sharegpt(row: dict) -> tuple[list[dict], list | None]:
    messages = []
    for number, turn in enumerate(turns_of(row.get("conversations"), "conversations"), 1):
        where = f"turn {number}"
        if not isinstance(turn, dict):
            raise RowError(f"{where} is {kind_of(turn)}, not an object with from and value")
        if "from" not in turn or "value" not in turn:
            raise RowError(f"{where} lacks {' and '.join(k for k in ('from', 'value') if k not in turn)}")
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise RowError(f"{where}: from is {_named(turn['from'])}, known are {', '.join(SHAREGPT_ROLES)}")
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": tool_calls_of(turn["value"], where)})
        else:
            messages.append({"role": role, "content": filled(turn["value"], f"{where} ({turn['from']})")})
    return _chat_of(messages, row)


def _chat_of(messages: list[dict], row: dict) -> tuple[list[dict], list | None]:
    """The messages with the system message and the tools that stand beside them in the row."""
    system = row.get("system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text_of(system, "system")})
    return linked(messages), tools_of(row.get("tools"))


def _from_alpaca(row: dict) -> tuple[list[dict], list | None]:
    instruction, output = string_of(row, "instruction"), string_of(row, "output")
    extra = text_of(row["input"], "input") if row.get("input") is not None else ""
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": text_of(row["system"], "system")})
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"history is {kind_of(history)}, not a list of [question, answer] pairs")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {number} is not a [question, answer] pair")
        messages.append({"role": "user", "content": filled(pair[0], f"history {number}, question")})
        messages.append({"role": "assistant", "content": filled(pair[1], f"history {number}, answer")})
    messages.append({"role": "user", "content": f"{instruction}\n\n{extra}" if extra.strip() else instruction})
    messages.append({"role": "assistant", "content": output})
    return messages, None


def prompt_fields(row: dict) -> tuple[str, str] | None:
    """Which two fields of a row hold a prompt and what completes it; None where it has no such two."""
    return next((names for names in PROMPT_FIELDS if all(row.get(name) is not None for name in names)), None)


def _from_prompt_completion(row: dict) -> tuple[list[dict], list | None]:
    asked, answer = _prompt_fields_of(row)
    prompt, completion = said_turns(row, asked, "user"), said_turns(row, answer, "assistant")
    if completion[: len(prompt)] == prompt:  # a completion may repeat its prompt
        completion = completion[len(prompt) :]
    if not any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in completion):
        raise RowError(f"{answer} has no message of the assistant")
    return _from_messages({"messages": [*prompt, *completion], "system": row.get("system"), "tools": row.get("tools")})


def prompt_answers(row: dict) -> int:
    """How many assistant turns of a prompt/completion row belong to its prompt, which is not trained."""
    asked, _ = _prompt_fields_of(row)
    return sum(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in said_turns(row, asked, "user"))


def weightless_answers(row: dict) -> int:
    """How many of a chat's first answers have weight 0, as OpenAI's files write it: they are context, not trained."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    weights = [turn.get("weight") for turn in turns if turn["role"] == "assistant"]
    left = next((number for number, weight in enumerate(weights) if weight != 0), 0)
    if 0 in weights[left:]:
        which = "an answer behind one that is trained" if left or weights[0] != 0 else "every answer"
        raise RowError(f"has weight 0 on {which}", "end each row with an answer that is trained; those of 0 come first")
    return left


def said_turns(row: dict, field: str, role: str) -> list:
    """A text as one message of `role`, or the messages that the field holds."""
    value = row[field]
    if isinstance(value, str):
        return [{"role": role, "content": filled(value, field)}]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise RowError(f"{field} is {kind_of(value)}, not text or a list of messages")
    if not value:
        raise RowError(f"{field} is empty")
    return value


def _prompt_fields_of(row: dict) -> tuple[str, str]:
    """`prompt_fields`; raises RowError for what a row lacks of them."""
    if found := prompt_fields(row):
        return found
    names = next((names for names in PROMPT_FIELDS if any(name in row for name in names)), PROMPT_FIELDS[0])
    raise RowError(f"lacks {' and '.join(name for name in names if row.get(name) is None)}")


READERS = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
}


# --- one message ------------------------------------------------------------------------------------


def message_of(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(f"{where} is {kind_of(turn)}, not an object with role and content")
    if "role" not in turn:
        other = "from" in turn and "value" in turn
        remedy = "name the list conversations: from and value are how sharegpt writes a turn" if other else None
        raise RowError(f"{where} lacks role, known are {', '.join(KNOWN_ROLES)}", remedy)
    role = turn["role"]
    role = SYNONYMS.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        meant = (role.lower() if isinstance(role, str) else role) in (*SPEAKERS, *KNOWN_ROLES)
        remedy = "write the roles as user and assistant" if meant else None
        raise RowError(f"{where}: role is {_named(role)}, known are {', '.join(KNOWN_ROLES)}", remedy)
    where = f"{where} ({role})"
    calls = turn.get("tool_calls")
    if calls and role != "assistant":
        raise RowError(f"{where} has tool_calls, which only the assistant makes")
    reasoning = turn.get("reasoning_content")
    content = turn.get("content")
    if calls or (reasoning and role == "assistant"):
        message = {"role": role, "content": "" if content is None else text_of(content, where)}
    elif "content" not in turn:
        raise RowError(f"{where} lacks content")
    else:
        message = {"role": role, "content": filled(content, where)}
    if calls:
        message["tool_calls"] = tool_calls_of(calls, where)
    if reasoning:
        message["reasoning_content"] = text_of(reasoning, f"{where}, reasoning_content")
    for key in ("tool_call_id", "name"):
        if turn.get(key):
            message[key] = text_of(turn[key], f"{where}, {key}")
    return message


def tool_calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as chat templates take them, `arguments` an object; from a JSON string, one call or a list."""
    value = json_of(value, f"{where}: the function call") if isinstance(value, str) else value
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, str):  # {"function": name, "arguments": ...}, seen in the wild
            function = {"name": function, "arguments": call.get("arguments")}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{where}: a function call needs a name and arguments, this is {shortened(call)}")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = json_of(arguments, f"{where}: the arguments of {function['name']}")
        if not isinstance(arguments, dict | None):
            raise RowError(f"{where}: the arguments of {function['name']} are {kind_of(arguments)}, not an object")
        _as_json(arguments, f"{where}: the arguments of {function['name']}")
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        calls.append({"id": call["id"], **entry} if isinstance(call.get("id"), str) and call["id"] else entry)
    if not calls:
        raise RowError(f"{where} has an empty list of function calls")
    return calls


def linked(messages: list[dict]) -> list[dict]:
    """Give every tool call an id and every tool answer the id and name of its call, where the data has none.

    Some templates demand them (Mistral's: nine letters or digits), and ShareGPT has no place for them.
    """
    number, open_calls = 0, []
    for message in messages:
        if message.get("tool_calls"):
            open_calls = []
            for call in message["tool_calls"]:
                call.setdefault("id", f"call{number:05d}")
                number += 1
                open_calls.append(call)
        elif message["role"] == "tool" and open_calls:
            wanted = message.get("tool_call_id")
            call = next((c for c in open_calls if c["id"] == wanted), open_calls[0])
            open_calls.remove(call)
            message.setdefault("tool_call_id", call["id"])
            message.setdefault("name", call["function"]["name"])
    return messages


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Tool definitions from a list or a JSON string; bare functions are wrapped as templates expect."""
    if isinstance(value, str):
        value = json_of(value, "tools") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"tools is {kind_of(value)}, not a list of function definitions")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for tool in wrapped:
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if not isinstance(name, str) or not name:
            raise RowError(f"a tool has no name: {shortened(tool)}")
    _as_json(wrapped, "tools")
    return wrapped


def written_as_text(messages: list[dict], tools: list[dict] | None) -> list[dict]:
    """The same chat without tool fields: definitions in the system message, calls and answers as tagged JSON."""
    written = []
    for message in messages:
        if message["role"] == "tool":
            written.append({"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"})
            continue
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        parts = [plain["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
        written.append({**plain, "content": "\n".join(part for part in parts if part)})
    if tools:
        definitions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        block = f"You can call these tools:\n<tools>\n{definitions}\n</tools>"
        if written[0]["role"] == "system":
            written[0] = {**written[0], "content": f"{written[0]['content']}\n\n{block}"}
        else:
            written.insert(0, {"role": "system", "content": block})
    return written


# --- checks on values -------------------------------------------------------------------------------


def turns_of(value: Any, field: str) -> list:
    if value is None:
        raise RowError(f"lacks {field}")
    if isinstance(value, str):
        value = json_of(value, field)
    if not isinstance(value, list):
        raise RowError(f"{field} is {kind_of(value)}, not a list")
    if not value:
        raise RowError(f"{field} is empty")
    return value


def text_of(value: Any, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(text_of(part.get("text"), where) for part in value)
    if isinstance(value, list) and any(isinstance(part, dict) and "type" in part for part in value):
        raise RowError(f"{where}: content parts other than text cannot be trained on here")
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind_of(value)}, not text")
    return value


def filled(value: Any, where: str) -> str:
    text = text_of(value, where)
    if not text.strip():
        raise RowError(f"{where} is empty")
    return text


def string_of(row: dict, field: str) -> str:
    if field not in row:
        raise RowError(f"lacks {field}")
    return filled(row[field], field)


def json_of(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(f"{what} is not JSON: {error}") from None


def _as_json(value: Any, what: str) -> None:
    """Raise RowError for dates, decimals and bytes, which columns have and templates cannot write."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise RowError(f"{what} cannot be written as JSON: {error}", "write such values as text") from None


def kind_of(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _named(value: Any) -> str:
    return shortened(value) if isinstance(value, str) else kind_of(value)


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
