"""The answers that an export carries for its endpoint: which prompts, and that they are greedy and end as generated."""

from __future__ import annotations

import copy

import pytest

from loadmaster.data import Conversation
from loadmaster.evaluation import generate
from loadmaster.export.answers import ANSWER_TOKENS, FIXED, PROMPTS, recorded_answers
from loadmaster.export.loading import load_export


@pytest.fixture(scope="module")
def model(tiny):
    return load_export(tiny, "cpu")


def chat(text: str, answer: str = "There.", **extra) -> Conversation:
    return Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": answer, **extra}])


def test_the_first_short_chats_are_asked_and_a_fixed_one(model, tokenizer) -> None:
    unfit = [
        Conversation([], text="plain text"),
        Conversation(chat("x").messages, tools=[{"type": "function"}]),
        chat("called", tool_calls=[{"function": {"name": "f"}}]),
        chat("word " * 600),
    ]
    fit = [chat(f"Where is crate {number}?") for number in range(PROMPTS + 2)]
    found = recorded_answers(model, tokenizer, [unfit[0], fit[0], *unfit[1:], *fit[1:]])
    assert [each["messages"][-1]["content"] for each in found] == [
        *(f"Where is crate {number}?" for number in range(PROMPTS)), FIXED.messages[0]["content"],
    ]
    for each in found:
        prompt = Conversation(each["messages"])
        assert each["text"].strip() == generate(model, tokenizer, [prompt], ANSWER_TOKENS, 1)[0].strip()
        ids = tokenizer.apply_chat_template(
            each["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        assert each["prompt_tokens"] == len(ids)
        assert each["finish_reason"] == ("stop" if each["tokens"] < ANSWER_TOKENS else "length")


def test_a_model_without_a_chat_template_records_nothing(model, tokenizer) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert recorded_answers(model, bare, [chat("a")]) == []
    assert len(recorded_answers(model, tokenizer, [])) == 1
