"""Rows as people have them -> `Conversation`, the one shape that the rest of the data room knows.

Five shapes are read: `messages` (role/content), ShareGPT (`conversations` of from/value), Alpaca
(instruction/input/output), prompt and completion, and plain `text`; and preference rows, written as any of the chats:
pairs (chosen, rejected) or single answers with a label.
A row that is not what it should be raises `RowError` with the reason; whoever reads the file adds the place.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from loadmaster.data.preference import (
    LABEL_FIELDS,
    PAIR_FIELDS,
    PROMPTS,
    is_preference,
    is_unpaired,
    labelled_answer_of,
    pair_of,
    unfit,
)
from loadmaster.data.shapes import (
    PROMPT_FIELDS,
    READERS,
    RowError,
    kind_of,
    prompt_answers,
    prompt_fields,
    string_of,
    weightless_answers,
    written_as_text,
)
from loadmaster.errors import DataError

FORMAT_FIELDS = {
    "messages": "messages: [{role, content}, ...]",
    "sharegpt": "conversations: [{from, value}, ...], optional system, tools",
    "alpaca": "instruction, output, optional input, system, history",
    "prompt_completion": "prompt and completion, prompt and response, or question and answer",
    "text": "text",
    "preference": "chosen and rejected, with a prompt; for objective=dpo, orpo or kto",
    "unpaired": "completion and label, with a prompt; for objective=kto",
}
PROBES = 1000
"""Rows that are read to learn which files a data set is of."""
_CHAT = {"system", "tools"}
_JUDGED = {*PROMPTS, "history", *_CHAT}
_READ = {
    "messages": {"messages", *_CHAT},
    "sharegpt": {"conversations", *_CHAT},
    "alpaca": {"instruction", "input", "output", "system", "history"},
    "prompt_completion": {*(name for pair in PROMPT_FIELDS for name in pair), *_CHAT},
    "text": {"text"},
    "preference": {*PAIR_FIELDS, *_JUDGED},
    "unpaired": {"completion", "output", *LABEL_FIELDS, *_JUDGED},
}
FIELD_NAMES = (
    "messages", "conversations", "instruction", "output", "text", *(name for pair in PROMPT_FIELDS for name in pair),
    "chosen", "rejected", *LABEL_FIELDS,
)
_SHAPES = "; ".join(f"{name} ({what})" for name, what in FORMAT_FIELDS.items())


@dataclass(frozen=True)
class Conversation:
    """One row: a chat (`messages`, with `tools` if it has any) or, for continued pretraining, `text`.

    messages: chat-template messages (role, content, tool_calls, ...); empty when `text` is set.
    tools: JSON schemas of the tools the chat may call, as chat templates take them.
    origin: where it was read, "file:line".
    row_id: hash of the content alone, so identical rows share it wherever they stand.
    rejected: of a preference row, the assistant message that is worse than the last of `messages`.
    label: of an unpaired preference row, whether the last of `messages` is desirable.
    prompt_answers: how many of the first assistant messages belong to the prompt of a prompt/completion row, or have
    weight 0, and are not trained.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    origin: str = ""
    row_id: str = ""
    rejected: dict[str, Any] | None = None
    label: bool | None = None
    prompt_answers: int = 0

    @property
    def is_words_alone(self) -> bool:
        """Whether it is a chat without tools, and without calls and answers of any."""
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in self.messages)
        return self.text is None and not self.tools and not calls

    def to_json(self) -> str:
        fields = {"messages": self.messages, "tools": self.tools, "text": self.text, "rejected": self.rejected}
        fields |= {} if self.label is None else {"label": self.label}
        fields |= {"prompt_answers": self.prompt_answers} if self.prompt_answers else {}
        return json.dumps({**fields, "origin": self.origin, "row_id": self.row_id}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Conversation:
        return cls(**json.loads(line))


def prompt_and_reference(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages before the last assistant message, that message): what to generate from, what to compare with."""
    last = max(n for n, message in enumerate(conversation.messages) if message["role"] == "assistant")
    return conversation.messages[:last], conversation.messages[last]


def in_turn(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """All of them, one of each file in turn: the first rows of several files show the first file alone.

    Where a file begins is looked for at PROBES places; rows of one that is missed come with those before it.
    """
    count, step = len(conversations), max(1, len(conversations) // PROBES)
    begins: dict[str, int] = {}
    for number, conversation in enumerate(conversations[::step]):
        begins.setdefault(conversation.origin.rpartition(":")[0], number * step)
    seen: set[int] = set()
    for turn in range(count):
        for place in (begin + turn for begin in begins.values()):
            if place < count and place not in seen:
                seen.add(place)
                yield conversations[place]


def with_fields(row: Any) -> None:
    """Raise RowError for a row that is no object."""
    if not isinstance(row, dict):
        remedy = "name the file .json, from which lists of rows are read" if isinstance(row, list) else None
        raise RowError(f"is {kind_of(row)}, not an object with fields", remedy)


def recognise_format(row: Any, objective: str = "sft") -> tuple[str, str]:
    """(format, the fields that gave it away) of a row; the remedy of its RowError names the shapes that are read."""
    with_fields(row)
    fields = [name for name in row if row[name] is not None]
    if is_preference(row):
        return "preference", "chosen, rejected"
    if is_unpaired(row, objective):
        return "unpaired", ", ".join(name for name in ("completion", *LABEL_FIELDS) if name in row)
    if "messages" in row:
        return "messages", "messages"
    if "conversations" in row:
        turns = row["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
            return "messages", "conversations with role/content"
        return "sharegpt", "conversations"
    if "instruction" in row and "output" in row:
        return "alpaca", "instruction, output"
    if "text" in row:
        return "text", "text"
    if names := prompt_fields(row):
        return "prompt_completion", ", ".join(names)
    what, verb = ("field", "is") if len(fields) == 1 else ("fields", "are")
    reason = f"the {what} {', '.join(fields) or '(none)'} {verb} no shape that is read"
    called = "say by data.columns what they are called, such as 'data.columns={prompt: YOURS, completion: YOURS}'"
    shapes = f"name the fields as one of these shapes does, or {called}: {_SHAPES}"
    raise RowError(reason, _renamed(row, objective) or shapes)


def _renamed(row: dict, objective: str) -> str | None:
    """Which misspelt fields to rename, where a row is of some shape then."""
    misspelt = {}
    for name in row:
        near = _nearest_field(str(name))
        if near and near not in (*row, *misspelt.values()):
            misspelt[name] = near
    if not misspelt:
        return None
    try:
        recognise_format({misspelt.get(name, name): value for name, value in row.items()}, objective)
    except RowError:
        return None
    return f"rename {', '.join(f'{name!r} to {right}' for name, right in misspelt.items())}"


def fits_objective(row: Any, shape: str, recognised_by: str, objective: str) -> None:
    """Raise RowError for a row that `objective` does not train on. recognised_by: fields, where data.format is auto."""
    if objective == "sft" and isinstance(row, dict):
        if is_preference(row):
            shape = "preference"
        elif shape == "prompt_completion" and recognised_by and is_unpaired(row):
            shape = "unpaired"  # told apart by its label alone, which the first row had not
    if found := unfit(shape, objective):
        raise RowError(*found)


def renamed(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row whose fields are called as they are here. columns: our names -> the row's own."""
    taken = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    return {name: value for name, value in row.items() if name not in columns.values()} | taken


def to_conversation(
    row: Any, shape: str, origin: str, system: str | None = None, tools_as: str = "template"
) -> Conversation:
    """One row as a Conversation; `system` is put before chats that have none. Raises RowError."""
    with_fields(row)
    if shape == "text":
        return _identified(Conversation([], text=string_of(row, "text"), origin=origin))
    rejected = label = None
    if shape == "preference":
        messages, tools, rejected = pair_of(row)
    elif shape == "unpaired":
        messages, tools, label = labelled_answer_of(row)
    else:
        messages, tools = READERS[shape](row)
    if system is not None and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("has no assistant message: nothing in it is trained")
    if tools_as == "text":
        if rejected is not None:
            rejected = written_as_text([*messages[:-1], rejected], tools)[-1]
        messages, tools = written_as_text(messages, tools), None
    count = {"prompt_completion": prompt_answers, "messages": weightless_answers}.get(shape)
    untrained = count(row) if count else 0
    return _identified(
        Conversation(messages, tools, origin=origin, rejected=rejected, label=label, prompt_answers=untrained)
    )


def refuse_unread(row: dict[str, Any], shape: str, columns: Collection[str], known: str) -> None:
    """Raise DataError for fields that data.columns names and this row has, and that are not read of its shape: another
    field gave that away. known: how, where data.format did not say it."""
    read = _READ[shape]
    if shape == "prompt_completion":
        read = {*(prompt_fields(row) or read), *_CHAT}
    elif shape == "messages" and "messages" not in row:
        read = {"conversations", *_CHAT}
    if not (unread := [name for name in columns if row.get(name) is not None and name not in read]):
        return
    others = [each for each in (*READERS, "text") if each != shape]
    meant = next((each for each in others if {*columns} <= _READ[each]), None)
    said = f"data.columns says what {', '.join(unread)} is called, and that is not read of rows that are {shape}"
    said += f" (recognised by {known})" if known else ""
    raise DataError(f"{said}\n    fix: " + (f"data.format={meant}" if meant else "leave it out of data.columns"))


def unread_fields(row: dict[str, Any], conversation: Conversation) -> list[str]:
    """Fields that say something in words which stands nowhere in what was read of the row."""
    answers = [*conversation.messages, *([conversation.rejected] if conversation.rejected else [])]
    said = [conversation.text or "", *(str(message.get("content")) for message in answers)]
    words = {name: text.strip() for name, text in row.items() if isinstance(text, str) and name != "tools"}
    return [name for name, text in words.items() if " " in text and not any(text in each for each in said)]


def _identified(chat: Conversation) -> Conversation:
    """With the hash of what it holds; raises RowError for half a character."""
    parts = [chat.messages, chat.tools, chat.text]
    parts += [part for part in (chat.rejected, chat.label, chat.prompt_answers or None) if part is not None]
    content = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    try:
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise RowError(f"holds half a character ({content[error.start]!r}, a lone surrogate)") from None
    return replace(chat, row_id=digest)


@lru_cache(1024)  # a million rows may all be misspelt alike
def _nearest_field(name: str) -> str | None:
    return next(iter(difflib.get_close_matches(name.strip().lower(), FIELD_NAMES, 1, 0.8)), None)
