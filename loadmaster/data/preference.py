"""Preference rows as people write them: a prompt with a chosen and a rejected answer, or with one labelled answer.

The prompt is `prompt`, `question` or `input` (text or messages), `conversations` or `messages` (turns before the
answer), or Alpaca's `instruction`; without any of them, or beside one that they repeat, `chosen` and `rejected` are
whole chats that differ in their last message.
An answer is text, one message, or a list that ends in it. A labelled answer is `completion`, or the last message of the
row's own chat; its label says whether it is desirable.
"""

from __future__ import annotations

from typing import Any

from loadmaster.data.shapes import READERS, RowError, kind_of, shortened

PAIR_FIELDS = ("chosen", "rejected")
ANSWER_FIELDS = (*PAIR_FIELDS, "completion")
PROMPTS = ("conversations", "messages", "prompt", "instruction", "question", "input")
LABEL_FIELDS = ("label", "kto_tag")
"""TRL's name of the label, and LLaMA-Factory's."""
LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}


def is_preference(row: dict[str, Any]) -> bool:
    return all(row.get(name) is not None for name in PAIR_FIELDS)


def unfit(shape: str, objective: str) -> tuple[str, str] | None:
    """Why rows of this shape are not trained on under `objective`, and the remedy; None where they are."""
    if shape == "preference" and objective == "sft":
        return (
            "has chosen and rejected: a preference row",
            "train on pairs with objective=dpo, orpo or kto, or write the chosen answer as the conversation's last "
            "assistant turn and leave rejected out",
        )
    if shape == "unpaired" and objective == "sft":
        return (
            "is one answer with a label, which objective=kto trains on",
            "train on labelled answers with objective=kto, or write the desirable ones as messages and leave out the "
            "others",
        )
    if shape == "unpaired" and objective != "kto":
        return (
            f"is one answer with a label, and objective={objective} compares two",
            "use objective=kto, or write pairs of chosen and rejected",
        )
    if shape not in ("preference", "unpaired") and objective != "sft":
        single = " (or completion and label)" if objective == "kto" else ""
        return (
            f"is no preference row: objective={objective} needs chosen and rejected{single}, with a prompt",
            "objective=sft trains on such rows; or give rows with chosen and rejected",
        )
    return None


def pair_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]:
    """(messages that end in the chosen answer, tools, the rejected answer). Raises RowError."""
    missing = [name for name in PAIR_FIELDS if row.get(name) is None]
    if missing:
        raise RowError(f"lacks {' and '.join(missing)}, which a preference row has")
    (messages, tools), (other, _) = (_chat(row, name) for name in PAIR_FIELDS)
    for name, chat in zip(PAIR_FIELDS, (messages, other), strict=True):
        _ends_in_an_answer(chat, name)
    if messages[:-1] != other[:-1]:
        raise RowError("chosen and rejected answer different prompts; only their last messages may differ")
    if messages[-1] == other[-1]:
        raise RowError("chosen and rejected are the same answer")
    return messages, tools, other[-1]


def is_unpaired(row: dict[str, Any], objective: str = "sft") -> bool:
    """Whether a row is one labelled answer. A `label` beside a whole chat may say anything, so only KTO takes it up."""
    labelled = "label" in row and ("completion" in row or objective == "kto")
    return not is_preference(row) and (labelled or row.get("kto_tag") is not None)


def labelled_answer_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]:
    """(messages that end in the answer, tools, whether it is desirable). Raises RowError."""
    label = _label(row)
    chats = ("messages", "conversations", "instruction")
    if row.get("completion") is None and all(row.get(name) is None for name in chats):
        raise RowError("lacks completion, the answer that its label is about")
    messages, tools = _chat(row, "completion")
    _ends_in_an_answer(messages, "the chat" if row.get("completion") is None else "completion")
    return messages, tools, label


def _label(row: dict[str, Any]) -> bool:
    name = next((name for name in LABEL_FIELDS if name in row), None)
    meanings = "true (a desirable answer) or false (an undesirable one)"
    if name is None:
        raise RowError(f"lacks label: {meanings}")
    value = row[name]
    known = str(int(value)) if isinstance(value, float) and value in (0, 1) else str(value).strip().lower()
    if known not in LABELS:
        said = "null" if value is None else shortened(value)
        raise RowError(f"{name} is {said}, not {meanings}")
    return LABELS[known]


def _ends_in_an_answer(chat: list[dict[str, Any]], name: str) -> None:
    if chat[-1]["role"] != "assistant":
        raise RowError(f"{name} ends in a message of role {chat[-1]['role']}, not in the assistant's answer")
    if all(message["role"] == "system" for message in chat[:-1]):
        raise RowError(f"{name} has no prompt before its answer")


def _chat(row: dict[str, Any], name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The chat that ends in the answer `name`, through the reader of the shape that the row is written in.

    A row without that field is the whole chat itself.
    """
    rest = {key: value for key, value in row.items() if key not in ANSWER_FIELDS}
    answer = row.get(name)
    asked = next((key for key in PROMPTS if rest.get(key) is not None), None)
    if asked == "instruction":
        return READERS["alpaca"](rest if answer is None else {**rest, "output": answer})
    prompt = rest.get(asked)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | None):
        raise RowError(f"the prompt is {kind_of(prompt)}, not text or a list of messages")
    sharegpt = _speaks_sharegpt(prompt) or _speaks_sharegpt(answer)
    if isinstance(answer, str):
        turns: Any = [{"from": "gpt", "value": answer} if sharegpt else {"role": "assistant", "content": answer}]
    elif answer is None:
        turns = []
    else:
        turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list):
        raise RowError(f"{name} is {kind_of(answer)}, not text, a message or a list of messages")
    if prompt is not None and turns[: len(prompt)] != prompt and not _repeats(turns, prompt):
        turns = [*prompt, *turns]
    shape = "sharegpt" if sharegpt else "messages"
    chat = {"tools": rest.get("tools"), "system": rest.get("system")}
    return READERS[shape]({**chat, ("conversations" if sharegpt else "messages"): turns})


def _repeats(turns: list[Any], prompt: list[Any]) -> bool:
    """Whether an answer is a whole chat, in which everything stands that the row asks elsewhere."""
    whole = any(_speaker(turn) in ("user", "human") for turn in turns)
    return whole and all(turn in turns for turn in prompt if _speaker(turn) not in ("assistant", "gpt"))


def _speaker(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None


def _speaks_sharegpt(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else turns
    return isinstance(first, dict) and "from" in first
