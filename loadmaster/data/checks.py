"""What must hold of every rendered conversation before it is trained on.

A chat template that drops a role, or a mask that trains nothing or everything, costs a whole run and
shows in no loss curve. So each row is checked, and what fails is shown as it would have been trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from loadmaster.data.formats import Conversation
from loadmaster.data.render import ChatRenderer, Rendering

TRAINED_OPEN, TRAINED_CLOSE = "⟦", "⟧"



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
