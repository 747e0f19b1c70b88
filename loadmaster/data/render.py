"""Chat template -> text, and the character spans in it that the assistant wrote.

The text is what the tokenizer's own Jinja template renders, nothing else. Which part of it the
assistant wrote is found from the rendering alone, without `{% generation %}` tags, by writing a
sentinel in place of one message's content and comparing:

    start of a turn   put the sentinel in the message before it. What follows the sentinel in the whole
                      conversation begins with what follows it in the generation prompt; where that
                      prompt ends, the assistant begins.
    end of a turn     put the sentinel in the turn itself. What follows the sentinel begins with the
                      token that ends the turn; the span ends behind that token, so that its loss
                      teaches the model to stop, and before the newline that some templates add.

Everything is measured from the end of the text, so templates that rewrite earlier turns (Qwen3 drops
their reasoning, Mistral moves the system message) need no prefix property. One conversation of
sentinels per sequence of roles gives a skeleton; a row whose text equals the skeleton with its own
contents filled in takes its spans from it, and pays for one rendering.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from loadmaster.data.dialect import in_dialect
from loadmaster.errors import DataError

SENTINEL = "zqSentinelqz"
OWN = "zqSentinelqy"
"""What stands for the sentinel in a row that holds it itself, as a row with this file does: it is as long."""


class TemplateRefused(ValueError):
    """The chat template raised on this conversation; the message is the template's own, or the error with its line."""


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of one assistant turn; `end_token` is the token that ends it, if it has one."""

    start: int
    end: int
    end_token: str | None


@dataclass(frozen=True)
class Rendering:
    """The rendered text and, in order, the span of each assistant message."""

    text: str
    spans: tuple[Span, ...]


@dataclass
class ChatRenderer:
    """Renders conversations with one tokenizer's chat template.

    Raises DataError when the tokenizer has no chat template or cannot tell where its tokens stand.
    """

    tokenizer: Any
    _skeletons: dict[tuple, _Skeleton | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokenizer.chat_template:
            raise DataError(
                "the model's tokenizer has no chat template, so conversations cannot be rendered\n"
                "    fix: choose the instruct version of the model, give it a template "
                "(model.chat_template=FILE), or train on plain text (data.format=text)"
            )
        self._special, self._added = special_token_pattern(self.tokenizer), added_token_pattern(self.tokenizer)
        self._usual_end: str | None = None
        self._openers = self._probe_openers()
        self._usual_end = self._probe_turn_end()

    def text(self, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = False) -> str:
        """What the template renders. Raises TemplateRefused with the template's own complaint."""
        written = in_dialect(self.tokenizer, messages)
        try:
            return self.tokenizer.apply_chat_template(
                written, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the model's chat template is broken in line {error.lineno}: {error}\n"
                "    fix: mend it, or fetch it again (chat_template.jinja, or chat_template in tokenizer_config.json)"
            ) from error
        except Exception as error:  # Jinja and the template's raise_exception share no base class
            raise TemplateRefused(f"{str(error) or type(error).__name__}{_line_of(error)}") from error

    def render(self, messages: list[dict], tools: list | None = None) -> Rendering:
        """Text and assistant spans of a conversation. Raises TemplateRefused."""
        text = self.text(messages, tools)
        skeleton = self._skeleton(messages, tools)
        spans = skeleton.fill(messages, text) if skeleton else None
        if spans is None:
            chat = json.dumps([messages, tools]).replace(SENTINEL, OWN)
            spans = self._find_spans(*json.loads(chat), text.replace(SENTINEL, OWN))
        return Rendering(text, spans)

    def reaches_text(self, messages: list[dict], index: int, tools: list | None = None) -> bool:
        """Whether the content of message `index` takes part in the rendering at all."""
        try:
            return SENTINEL in self.text(_with_content(messages, index), tools)
        except TemplateRefused:
            return False

    def dropped_tools(self, messages: list[dict], tools: list | None = None) -> set[tuple[int | None, int]]:
        """(message, number) of each tool call and (None, number) of each definition whose name shows nowhere."""
        names: dict[tuple[int | None, int], str] = {}

        def marked(tool: dict, index: int | None, number: int) -> dict:
            name = names[index, number] = f"zqTool{len(names)}qz"
            return {**tool, "function": {**tool["function"], "name": name}}

        chat = [
            {**message, "tool_calls": [marked(call, index, n) for n, call in enumerate(message["tool_calls"])]}
            if message.get("tool_calls") else message
            for index, message in enumerate(messages)
        ]
        defined = [marked(tool, None, number) for number, tool in enumerate(tools)] if tools else tools
        if not names:
            return set()
        try:
            text = self.text(chat, defined)
        except TemplateRefused:  # it takes known names alone, so it knows them
            return set()
        return {place for place, name in names.items() if name not in text}

    # --- finding spans ------------------------------------------------------------------------------

    def _find_spans(self, messages: list[dict], tools: list | None, text: str) -> tuple[Span, ...]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                floor = spans[-1].end if spans else 0
                end, end_token = self._turn_end(messages, tools, text, index)
                start = min(max(self._turn_start(messages, tools, text, index), floor), end)
                spans.append(Span(start, end, end_token))
        return tuple(spans)

    def _turn_start(self, messages: list[dict], tools: list | None, text: str, index: int) -> int:
        if index > 0:
            marked = _with_content(messages, index - 1)
            whole = self._after_sentinel(marked, tools)
            prompt = self._after_sentinel(marked[:index], tools, add_generation_prompt=True)
            if whole is not None and prompt is not None and text.endswith(whole):
                shared = _shared_length(whole, prompt)
                if shared < len(prompt):  # the prompt opens reasoning that this turn has not: back to a whole token
                    shared = max((m.end() for m in self._added.finditer(whole, 0, shared)), default=0)
                return len(text) - len(whole) + shared
        # No message before it, or none that shows: the turn begins where its own content does.
        own = _with_content(messages, index)
        try:
            before, found, _ = self.text(own, tools).partition(SENTINEL)
        except TemplateRefused:
            return len(text)
        return _shared_length(before, text) if found else len(text)

    def _turn_end(self, messages: list[dict], tools: list | None, text: str, index: int) -> tuple[int, str | None]:
        """(end of the turn including its end token, that token); (end of the text, None) without one."""
        for marked, behind_calls in _marked_turns(messages, index):
            after = self._after_sentinel(marked, tools)
            if after is None:
                continue
            alone = self._after_sentinel(marked[: index + 1], tools) or ""
            end = self._end_token(after[: _shared_length(after, alone)], behind_calls)
            if end is None:  # some templates end a turn differently when others follow
                end = self._end_token(after, behind_calls=False)
            if end is None:
                # Where the content ends, as far as the text agrees with that.
                return (len(text) - len(after), None) if text.endswith(after) else (len(text), None)
            if text.endswith(after[end[0] :]):
                return len(text) - len(after) + end[1], end[2]
        return len(text), None

    def _end_token(self, part: str, behind_calls: bool) -> tuple[int, int, str] | None:
        """(start, end, token) of what ends a turn in `part`, the text between the sentinel and the turn's end.

        That is the token that usually does; else the first special token, or the last where tool calls
        are closed by special tokens of their own; and the special tokens that follow without a gap.
        """
        found = [match for match in self._special.finditer(part)]
        opener = next((n for n, match in enumerate(found) if match[0] in self._openers), len(found))
        found = found[:opener]
        if not found:
            return None
        usual = (n for n, match in enumerate(found) if match[0] == self._usual_end)
        first = last = next(usual, len(found) - 1 if behind_calls else 0)
        ends = (self._usual_end, self.tokenizer.eos_token)  # what follows these without a gap is the next turn's
        while found[last][0] not in ends and last + 1 < len(found) and found[last + 1].start() == found[last].end():
            last += 1
        return found[first].start(), found[last].end(), found[last][0]

    def _after_sentinel(
        self, marked: list[dict], tools: list | None, add_generation_prompt: bool = False
    ) -> str | None:
        """What follows the sentinel in the rendering of `marked`; None when it is not in there."""
        try:
            _, found, after = self.text(marked, tools, add_generation_prompt).rpartition(SENTINEL)
        except TemplateRefused:
            return None
        return after if found else None

    # --- what the template does in general ----------------------------------------------------------

    def _probe_turn_end(self) -> str | None:
        """The special token behind a plain assistant message, such as <|im_end|>."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        end = self._end_token(self._after_sentinel(turns, None) or "", behind_calls=False)
        return end[2] if end else None

    def _probe_openers(self) -> set[str]:
        """Special tokens that begin a turn, which therefore cannot be what ends the turn before; never the EOS token,
        which ends a system prompt of the template's own before a header without any.
        """
        user = [{"role": "user", "content": SENTINEL}]
        try:
            plain, prompted = self.text(user), self.text(user, add_generation_prompt=True)
        except TemplateRefused:
            return set()
        header = prompted[_shared_length(plain, prompted) :]
        found = {*self._special.findall(header), *self._special.findall(plain.split(SENTINEL)[0])[-1:]}
        return found - {self.tokenizer.eos_token}

    def _skeleton(self, messages: list[dict], tools: list | None) -> _Skeleton | None:
        if any(message.keys() != {"role", "content"} for message in messages):
            return None
        key = (tuple(message["role"] for message in messages), json.dumps(tools) if tools else None)
        if key not in self._skeletons:
            names = [f"zqContent{index}qz" for index in range(len(messages))]
            marked = [{**message, "content": name} for message, name in zip(messages, names, strict=True)]
            try:
                text = self.text(marked, tools)
            except TemplateRefused:
                self._skeletons[key] = None
            else:
                spans = self._find_spans(marked, tools, text)
                whole = all(text.count(name) == 1 for name in names)
                self._skeletons[key] = _Skeleton(text, names, spans) if whole else None
        return self._skeletons[key]


class _Skeleton:
    """The rendering of a sequence of roles, cut at its contents."""

    def __init__(self, text: str, names: list[str], spans: tuple[Span, ...]):
        placed = sorted((text.index(name), index) for index, name in enumerate(names))
        self.spans = spans
        self.pieces: list[str] = []
        self.order: list[int] = []
        self.starts: list[tuple[int, int]] = []  # (position of the content, length of its name)
        cursor = 0
        for position, index in placed:
            self.pieces.append(text[cursor:position])
            self.order.append(index)
            self.starts.append((position, len(names[index])))
            cursor = position + len(names[index])
        self.pieces.append(text[cursor:])

    def fill(self, messages: list[dict], text: str) -> tuple[Span, ...] | None:
        """Spans in `text` if it is this skeleton with these contents, as they are or stripped; else None."""
        contents = [messages[index]["content"] for index in self.order]
        for version in (contents, [content.strip() for content in contents]):
            filled = "".join(part for pair in zip(self.pieces, [*version, ""], strict=True) for part in pair)
            if filled == text:
                return tuple(
                    Span(self._moved(span.start, version), self._moved(span.end, version), span.end_token)
                    for span in self.spans
                )
        return None

    def _moved(self, position: int, contents: list[str]) -> int:
        pairs = zip(self.starts, contents, strict=True)
        return position + sum(len(content) - length for (at, length), content in pairs if at < position)


def _line_of(error: Exception) -> str:
    if type(error) is TemplateError:  # raise_exception: in the template's own words
        return ""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f" (line {lines[-1]} of the template)" if lines else ""


def _with_content(messages: list[dict], index: int) -> list[dict]:
    """The conversation with nothing but the sentinel as content of message `index`."""
    kept = {key: messages[index][key] for key in ("role", "tool_call_id", "name") if key in messages[index]}
    return [*messages[:index], {**kept, "content": SENTINEL}, *messages[index + 1 :]]


def _marked_turns(messages: list[dict], index: int) -> Iterator[tuple[list[dict], bool]]:
    """(conversation with the sentinel in turn `index`, whether tool calls stand behind it), the closest first."""
    calls = messages[index].get("tool_calls")
    if calls:
        marked = {**calls[-1], "function": {**calls[-1]["function"], "arguments": {"a": SENTINEL}}}
        turn = {**messages[index], "tool_calls": [*calls[:-1], marked]}
        yield [*messages[:index], turn, *messages[index + 1 :]], True
    yield _with_content(messages, index), False


def _shared_length(first: str, second: str) -> int:
    """Characters that two texts have in common from the start."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def special_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches any special token of the tokenizer in a text, the longest first."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens |= set(tokenizer.all_special_tokens)
    return _any_of(tokens)


def added_token_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches what is never split into smaller tokens, special or not, such as <think>; and line ends."""
    return _any_of({str(token) for token in tokenizer.added_tokens_decoder.values()} | {"\n"})


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted((token for token in tokens if token), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template (of all of them, where a tokenizer has several by name)."""
    template = tokenizer.chat_template
    written = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(written.encode()).hexdigest()


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end the assistant's turn: what the template renders behind a turn, and the EOS token.

    Tool-calling turns may end differently (Llama 3.1: <|eom_id|>); their end is included where the
    template renders them.
    """
    ends: list[int] = []
    if tokenizer.chat_template:
        renderer = ChatRenderer(tokenizer)
        call = {"type": "function", "id": "call00000", "function": {"name": "look", "arguments": {}}}
        turns = ({"content": "b"}, {"content": "", "tool_calls": [call]})
        for turn in turns:
            try:
                rendering = renderer.render([{"role": "user", "content": "a"}, {"role": "assistant", **turn}])
            except TemplateRefused:
                continue
            ends += [tokenizer.convert_tokens_to_ids(span.end_token) for span in rendering.spans if span.end_token]
    ids = [*ends, tokenizer.eos_token_id]
    return sorted({token_id for token_id in ids if token_id is not None})
