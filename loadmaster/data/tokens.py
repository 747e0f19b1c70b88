"""Conversations -> token ids and the mask of trained tokens.

A chat is rendered once and tokenised once, whole; the assistant's character spans become tokens
through the tokenizer's offsets. Plain text gets the EOS token behind it and is trained everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from loadmaster.data.checks import check_conversation, marked
from loadmaster.data.faults import Fault
from loadmaster.data.formats import Conversation
from loadmaster.data.render import ChatRenderer, Rendering, Span, TemplateRefused
from loadmaster.errors import DataError


@dataclass
class Encoded:
    """Tokens of many conversations, end to end.

    ids [tokens] int32 and trained [tokens] bool; lengths [conversations] int64; kept [conversations]
    the index of each in what was encoded; splits [conversations] int64, of a preference pair the tokens of its
    chosen document, which the rejected one follows (the whole length of anything else). refused: rows that the
    template raised on. wrong: rows whose rendering or mask failed a check.
    """

    ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    kept: np.ndarray
    splits: np.ndarray
    refused: list[Fault] = field(default_factory=list)
    wrong: list[Fault] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Sequence[Encoded], sizes: Sequence[int]) -> Encoded:
        """The parts as one; `sizes` is how many conversations each was made from."""
        firsts = np.cumsum([0, *sizes[:-1]]) if sizes else []

        def cat(arrays: Iterable[np.ndarray], dtype: type) -> np.ndarray:
            return np.concatenate([np.empty(0, dtype), *arrays])

        return cls(
            cat((part.ids for part in parts), np.int32),
            cat((part.trained for part in parts), np.bool_),
            cat((part.lengths for part in parts), np.int64),
            cat((part.kept + first for part, first in zip(parts, firsts, strict=True)), np.int64),
            cat((part.splits for part in parts), np.int64),
            [fault for part in parts for fault in part.refused],
            [fault for part in parts for fault in part.wrong],
        )


REFUSED = "the chat template refuses this conversation"


class Encoder:
    """Encodes conversations with one tokenizer; pickles, so that worker processes can have one each."""

    def __init__(self, tokenizer: Any):
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} does not say where in the text its tokens stand, so the assistant's "
                "tokens cannot be found\n    fix: use a model that ships tokenizer.json (a fast tokenizer)"
            )
        self.tokenizer = tokenizer
        self.renderer: ChatRenderer | None = None

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """Tokenise a chunk; rows that fail are reported in the result, not raised."""
        refused: list[Fault] = []
        rendered: list[tuple[int, Conversation, Rendering]] = []
        for index, conversation in enumerate(conversations):
            try:
                rendered += [(index, answer, self._render(answer)) for answer in answers(conversation)]
            except TemplateRefused as error:
                refused.append(Fault(conversation.origin, f"{REFUSED}: {error}"))

        faulty: dict[int, Fault] = {}
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        tokens = self._tokens(rendered)
        for (index, answer, rendering), (ids, trained) in zip(rendered, tokens, strict=True):
            reason = None
            if answer.text is None:
                reason = check_conversation(answer, rendering, trained, self.renderer)
            if reason:
                faulty.setdefault(index, Fault(answer.origin, reason, marked(rendering.text, rendering.spans)))
            parts.setdefault(index, []).append((ids, trained))
        kept = [index for index in parts if index not in faulty]
        documents = [document for index in kept for document in parts[index]]
        lengths = [sum(len(ids) for ids, _ in parts[index]) for index in kept]
        return Encoded(
            np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in documents)]),
            np.concatenate([np.empty(0, np.bool_), *(trained for _, trained in documents)]),
            np.array(lengths, dtype=np.int64),
            np.array(kept, dtype=np.int64),
            np.array([len(parts[index][0][0]) for index in kept], dtype=np.int64),
            refused,
            list(faulty.values()),
        )

    def _render(self, conversation: Conversation) -> Rendering:
        if conversation.text is not None:
            return Rendering(conversation.text, ())
        self.renderer = self.renderer or ChatRenderer(self.tokenizer)
        return render_trained(self.renderer, conversation)

    def _tokens(self, rendered: list[tuple[int, Conversation, Rendering]]):
        """(ids, trained) of each rendering, in order; plain text and chats, of a file each, lie behind one another."""
        for plain, group in groupby(rendered, lambda each: each[1].text is not None):
            yield from self._tokens_of([rendering for _, _, rendering in group], plain)

    def _tokens_of(self, rendered: list[Rendering], plain: bool):
        # Templates write their own BOS; plain text gets the one that the tokenizer adds, if any.
        batch = self.tokenizer(
            [rendering.text for rendering in rendered],
            add_special_tokens=plain,
            return_offsets_mapping=not plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for row, rendering in enumerate(rendered):
            if plain:
                yield self._bounded(batch["input_ids"][row])
            else:
                offsets = np.array(batch["offset_mapping"][row], dtype=np.int64).reshape(-1, 2)
                yield (
                    np.array(batch["input_ids"][row], dtype=np.int32),
                    trained_mask(rendering.text, rendering.spans, offsets),
                )

    def _bounded(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """One BOS (where the tokenizer puts one) and one EOS, also around a text that holds them itself."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no EOS token to put behind plain text, so a model trained on it would never stop"
            )
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if ids[-2:] == [eos, eos]:
            ids = ids[:-1]
        if not ids or ids[-1] != eos:
            ids = [*ids, eos]
        return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_)


def render_trained(renderer: ChatRenderer, conversation: Conversation) -> Rendering:
    """A chat's text and what is trained of it: every assistant turn, but those of a prompt that has its completion
    apart, or of weight 0; of a preference row the last one alone.
    """
    rendering = renderer.render(conversation.messages, conversation.tools)
    judged = conversation.rejected is not None or conversation.label is not None
    return replace(rendering, spans=rendering.spans[-1:] if judged else rendering.spans[conversation.prompt_answers :])


def answers(conversation: Conversation) -> list[Conversation]:
    """The conversation; of a preference pair, the chosen and the rejected one, each marked as half of a pair."""
    if conversation.rejected is None:
        return [conversation]
    worse = [*conversation.messages[:-1], conversation.rejected]
    return [conversation, replace(conversation, messages=worse)]


def trained_mask(text: str, spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Which tokens, given their character offsets [tokens, 2], lie in the assistant's spans.

    A token over the start of a span is the assistant's if it holds any of its characters but white
    space: a space or newline there belongs to the prompt, which ends in the same token when generating.
    Some tokenizers trim white space from offsets, so a token may be empty; it then counts by its end.
    """
    trained = np.zeros(len(offsets), dtype=np.bool_)
    begins, ends = offsets[:, 0], offsets[:, 1]
    for span in spans:
        inside = (ends > span.start) & (ends <= span.end)
        for token in np.flatnonzero(inside & (begins < span.start)):
            inside[token] = bool(text[span.start : ends[token]].strip())
        trained |= inside
    return trained
