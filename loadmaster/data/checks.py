"""What must hold of every rendered conversation before it is trained on.

A chat template that drops a role, or a mask that trains nothing or everything, costs a whole run and
shows in no loss curve. So each row is checked, and what fails is shown as it would have been trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from loadmaster.data.formats import Conversation
from loadmaster.data.render import ChatRenderer, Rendering

TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"
LISTED = 20  # faults by name, and rows by name of one fault
EXAMPLES = 3  # rows by name of a fault that all rows have


@dataclass(frozen=True)
class Fault:
    """A row that must not be trained on: where it stands, why, for a wrong mask its rendering, and what would help."""

    origin: str
    reason: str
    rendering: str | None = None
    remedy: str | None = None


@dataclass(frozen=True)
class SourceFaults:
    """The faults of one source, the files that it reads, and how many rows these gave."""

    names: list[str]
    rows_read: int
    faults: list[Fault]

    @property
    def alike(self) -> bool:
        """Whether all rows have the same fault, which is then the file's or the job's and no row's."""
        return len(self.faults) == self.rows_read and len({fault.reason for fault in self.faults}) == 1

    def apart(self, rows_of: Mapping[str, int]) -> list[SourceFaults]:
        """The files whose rows all have one fault, by that fault, and the rest. rows_of: how many rows a file gave."""
        if self.alike:
            return [self]
        of_file: dict[str, list[Fault]] = {}
        for fault in self.faults:
            of_file.setdefault(_place(fault)[0], []).append(fault)
        files = [SourceFaults([name], rows_of[name], faults) for name, faults in of_file.items()]
        whole: dict[str, SourceFaults] = {}
        for file in files:
            if file.alike and (file.rows_read > 1 or file.faults[0].remedy):
                reason = file.faults[0].reason
                whole[reason] = whole[reason].with_those_of(file) if reason in whole else file
        told = {name for group in whole.values() for name in group.names}
        rest = [fault for fault in self.faults if _place(fault)[0] not in told]
        names = [name for name in self.names if name not in told]
        return [*whole.values(), SourceFaults(names, self.rows_read - sum(rows_of[name] for name in told), rest)]

    def with_those_of(self, other: SourceFaults) -> SourceFaults:
        return SourceFaults(self.names + other.names, self.rows_read + other.rows_read, self.faults + other.faults)


def check_conversation(
    conversation: Conversation, rendering: Rendering, trained: np.ndarray, renderer: ChatRenderer
) -> str | None:
    """Why this conversation's mask or rendering is wrong, or None. `trained` is the mask over its tokens."""
    return (
        _dropped_message(conversation, rendering.text, renderer)
        or _dropped_tools(conversation, rendering.text, renderer)
        or _wrong_mask(rendering, trained)
        or _trains_others(conversation, rendering)
        or _dropped_reasoning(conversation, rendering.text)
    )


def _wrong_mask(rendering: Rendering, trained: np.ndarray) -> str | None:
    if not trained.any():
        return "no token of this row is trained"
    if trained.all():
        return "every token of this row is trained, also what the assistant did not write"
    for number, span in enumerate(rendering.spans, 1):
        if span.end_token is None:
            return (
                f"the end of assistant turn {number} gets no loss: the chat template puts no special token behind it, "
                "so the model would not learn to stop; add one to the template (its EOS token, if nothing else)"
            )
    return None


def _trains_others(conversation: Conversation, rendering: Rendering) -> str | None:
    own = [message for message in conversation.messages if message["role"] == "assistant"]
    for index, message in enumerate(conversation.messages):
        content = message["content"].strip()
        if message["role"] == "assistant" or not content or rendering.text.count(content) != 1:
            continue
        if any(content in turn["content"] for turn in own):  # the assistant quotes it
            continue
        place = rendering.text.index(content)
        if any(span.start <= place and place + len(content) <= span.end for span in rendering.spans):
            return f"message {index + 1} (role {message['role']}) stands inside the trained part"
    return None


def _dropped_message(conversation: Conversation, text: str, renderer: ChatRenderer) -> str | None:
    messages = conversation.messages
    for index, message in enumerate(messages):
        content = message["content"].strip()
        # As often as all messages hold it: else what stands there may be another's, such as "5" inside "1995".
        shown = content in text and text.count(content) >= sum(other["content"].count(content) for other in messages)
        if content and not shown and not renderer.reaches_text(messages, index, conversation.tools):
            return (
                f"the chat template drops message {index + 1} (role {message['role']}): its content is not in the "
                "rendering; use a model whose template has this role, or take such messages out of the data"
            )
    return None


def _dropped_reasoning(conversation: Conversation, text: str) -> str | None:
    """Of the last message alone: of earlier ones many templates leave it out, as they do when the model is asked."""
    last = conversation.messages[-1]
    if last["role"] != "assistant":
        return None
    apart = last.get("reasoning_content", "")
    before, closed, _ = last["content"].partition("</think>")
    for reasoning in (apart, before.rpartition("<think>")[2] if closed else ""):
        if reasoning.strip() and not _shown(reasoning, text):
            inside = ", write it into its content as <think>...</think>" if reasoning == apart else ""
            return (
                f"the chat template drops the reasoning of message {len(conversation.messages)}: "
                f"{reasoning.strip()[:60]!r} is not in the rendering; use a model whose template shows it{inside}, or "
                "take it out of the data"
            )
    return None


def _dropped_tools(conversation: Conversation, text: str, renderer: ChatRenderer) -> str | None:
    if not conversation.tools and not any(message.get("tool_calls") for message in conversation.messages):
        return None
    remedy = "use a model whose template has tools, or set data.tools=text to write them as plain text"
    dropped = renderer.dropped_tools(conversation.messages, conversation.tools)
    for index, message in enumerate(conversation.messages):
        for number, call in enumerate(message.get("tool_calls", ())):
            function = call["function"]
            values = [function["name"], *(value for value in function["arguments"].values() if isinstance(value, str))]
            lost = next((value for value in values if not _shown(value, text)), None)
            if lost is None and (index, number) in dropped:  # the name is a word that stands elsewhere in the row
                lost = function["name"]
            if lost is not None:
                what = f"{lost[:60]!r} is not in the rendering"
                return f"the chat template drops the tool call in message {index + 1}: {what}; {remedy}"
    for number, tool in enumerate(conversation.tools or ()):
        if tool["function"]["name"] not in text or (None, number) in dropped:
            return f"the chat template drops the tool definitions ({tool['function']['name']}); {remedy}"
    return None


def _shown(value: str, text: str) -> bool:
    """Whether a value stands in the text, as it is or as JSON writes it."""
    forms = (value.strip(), json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    return any(form in text for form in forms)


def marked(text: str, spans: Sequence) -> str:
    """The rendering with the trained parts between ⟦ and ⟧."""
    parts, cursor = [], 0
    for span in spans:
        parts += [text[cursor : span.start], TRAINED_OPEN, text[span.start : span.end], TRAINED_CLOSE]
        cursor = span.end
    return "".join([*parts, text[cursor:]])


def fault_report(sources: Sequence[SourceFaults], hint: str) -> str:
    """All faults together, rows with the same fault in one line; the first rendering is shown in full."""
    faults = [fault for source in sources for fault in source.faults]
    lines = [f"{len(faults):,} of {sum(source.rows_read for source in sources):,} rows cannot be trained on:"]
    lines += [f"  {source.faults[0].reason} ({_all_of(source)})" for source in sources if source.alike]
    places: dict[str, list[str]] = {}
    for fault in sorted((f for source in sources if not source.alike for f in source.faults), key=_place):
        said = f"{fault.reason}; {fault.remedy}" if fault.remedy else fault.reason
        places.setdefault(said, []).append(fault.origin)
    for said, origins in islice(places.items(), LISTED):
        more = f" and {len(origins) - LISTED:,} more" if len(origins) > LISTED else ""
        lines.append(f"  {said} ({', '.join(origins[:LISTED])}{more})")
    if len(places) > LISTED:
        rest = sum(len(origins) for origins in islice(places.values(), LISTED, None))
        lines.append(f"  ... and {rest:,} rows more")
    shown = next((fault for fault in faults if fault.rendering is not None), None)
    if shown:
        rendering = shown.rendering if len(shown.rendering) <= 4000 else shown.rendering[:4000] + " ... (cut here)"
        indented = "\n".join(f"  | {line}" for line in rendering.splitlines())
        lines += [f"rendering of {shown.origin}, trained part between {TRAINED_OPEN} and {TRAINED_CLOSE}:", indented]
    return "\n".join([*lines, f"    fix: {hint}"])


def _all_of(source: SourceFaults) -> str:
    """Where a fault of all rows of a source stands: the files, and a few rows."""
    origins = list(dict.fromkeys(fault.origin for fault in sorted(source.faults, key=_place)))[:EXAMPLES]
    if source.rows_read == 1:
        return origins[0]
    return f"all {source.rows_read:,} rows of {listed(source.names)}, such as {', '.join(origins)}"


def listed(names: list[str]) -> str:
    """The first few files by name."""
    more = f" and {len(names) - EXAMPLES:,} more files" if len(names) > EXAMPLES else ""
    return ", ".join(names[:EXAMPLES]) + more


def _place(fault: Fault) -> tuple[str, int]:
    name, _, line = fault.origin.rpartition(":")
    return name, int(line)
