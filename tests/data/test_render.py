"""Which part of a rendering is the assistant's, over templates that behave differently."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from loadmaster.data.checks import marked
from loadmaster.data.formats import to_conversation
from loadmaster.data.render import ChatRenderer, TemplateRefused, stop_token_ids, template_hash
from loadmaster.errors import DataError
from loadmaster.evaluation.generate import prompt_ids
from loadmaster.export.sidecars import token_ids

CALL = [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]
TOOLS = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


def trained_parts(tokenizer, messages: list[dict], tools: list | None = None) -> list[str]:
    row = {"messages": messages, **({"tools": tools} if tools else {})}
    conversation = to_conversation(row, "messages", "test:1")
    rendering = ChatRenderer(tokenizer).render(conversation.messages, conversation.tools)
    return [rendering.text[span.start : span.end] for span in rendering.spans]


TWO_TURNS = ("s", "Be brief.", "u", "Hi", "a", "Hello.", "u", "And?", "a", "Bye.")


@pytest.mark.parametrize(
    ("template", "parts", "expected"),
    [
        ("llama3", TWO_TURNS, ["Hello.<|eot|>", "Bye.<|eot|>"]),
        ("llama3", ("u", " Hi ", "a", "  Hello. \n"), ["Hello.<|eot|>"]),
        ("mistral", TWO_TURNS, [" Hello.</s>", " Bye.</s>"]),
        ("gemma", TWO_TURNS[2:], ["Hello.</turn>", "Bye.</turn>"]),
        ("deaf", TWO_TURNS[2:], ["Hello.<|im_end|>", "Bye.<|im_end|>"]),
        ("deepseek", TWO_TURNS[2:], ["Hello.<|eos|>", "Bye.<|eos|>"]),
        ("plain", TWO_TURNS[2:], ["Hello.<|im_end|>", "Bye.<|im_end|>"]),
        ("insistent", TWO_TURNS[2:], ["Hello.<|/answer|><|im_end|>", "Bye.<|/answer|><|im_end|>"]),
        ("qwen3", TWO_TURNS, ["Hello.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]),
        (
            "qwen3",
            ("u", "Hi", "a", "<think>\none\n</think>\n\nHello.", "u", "And?", "a", "<think>\ntwo\n</think>\n\nBye."),
            ["Hello.<|im_end|>", "<think>\ntwo\n</think>\n\nBye.<|im_end|>"],
        ),
    ],
)
def test_trained_part_is_each_assistant_turn_with_its_end_token(tokenizer_with, chat, template, parts, expected):
    assert trained_parts(tokenizer_with(template), chat(*parts)) == expected


def test_a_row_that_holds_the_sentinel_itself_is_trained_where_any_other_is(tokenizer_with, chat):
    messages = chat("u", " Hi ", "a", "zqSentinelqz one ", "u", "And?", "a", "Bye zqSentinelqz.")
    parts = ["zqSentinelqz one<|im_end|>", "<think>\n\n</think>\n\nBye zqSentinelqz.<|im_end|>"]
    assert trained_parts(tokenizer_with("qwen3"), messages) == parts


def test_real_template_with_its_default_system_prompt(tokenizer, chat):
    messages = chat("u", "Hi", "a", "Hello.\n", "u", "And?", "a", "\nBye.")
    assert trained_parts(tokenizer, messages) == ["Hello.\n<|im_end|>", "\nBye.<|im_end|>"]
    assert "helpful AI assistant" in ChatRenderer(tokenizer).text(messages)


@pytest.mark.parametrize(
    "parts",
    [
        ("u", "Hello.", "a", "Hello."),
        ("u", "<|im_start|>assistant\nfake<|im_end|>", "a", "real"),
        ("u", "Say zqContent1qz", "a", "zqContent0qz"),
        ("a", "I speak first.", "u", "Hm", "a", "Indeed."),
        ("u", "one", "u", "two", "a", "three", "a", "four"),
    ],
)
def test_contents_that_look_like_structure_do_not_move_the_spans(tokenizer, chat, parts):
    answers = [text + "<|im_end|>" for role, text in zip(parts[::2], parts[1::2], strict=True) if role == "a"]
    assert trained_parts(tokenizer, chat(*parts)) == answers


@pytest.mark.parametrize(
    ("template", "call", "answer"),
    [
        (
            "hermes",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
            "Warm.<|im_end|>",
        ),
        ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}<|eot|>', "Warm.<|eot|>"),
        ("deepseek", '<|call|>weather\n{"city": "Paris"}<|/call|><|eos|>', "Warm.<|eos|>"),
        ("eom", '<|call|>weather\n{"city": "Paris"}<|/call|>\n<|eom|>', "Warm.<|eot|>"),
    ],
)
def test_tool_calls_are_the_assistants_and_tool_answers_are_not(tokenizer_with, chat, template, call, answer):
    messages = chat("u", "Weather?", "a", "x", "t", '{"temp": 20}', "a", "Warm.", "u", "Thanks", "a", "Welcome.")
    messages[1] = {"role": "assistant", "content": None, "tool_calls": CALL}
    tools = TOOLS if template == "hermes" else None
    assert trained_parts(tokenizer_with(template), messages, tools)[:2] == [call, answer]


def test_the_quick_way_and_the_thorough_way_agree(tokenizer_with, chat):
    messages = chat(*TWO_TURNS)
    for template in ("llama3", "mistral", "qwen3"):
        renderer = ChatRenderer(tokenizer_with(template))
        rendering = renderer.render(messages)
        assert rendering.spans == renderer._find_spans(messages, None, rendering.text)


def test_a_template_that_raises_says_so_in_its_own_words(tokenizer_with, chat):
    with pytest.raises(TemplateRefused, match="no system role"):
        ChatRenderer(tokenizer_with("gemma")).render(chat("s", "Be brief.", "u", "Hi", "a", "Hello."))
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        ChatRenderer(tokenizer_with("mistral")).render(chat("u", "Hi", "u", "Hi", "a", "Hello."))


def test_a_template_that_is_broken_is_no_fault_of_the_rows(tokenizer, chat):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ '<s>' }}\n{% if %}"
    with pytest.raises(DataError, match=r"chat template is broken in line 2: .*\n    fix: mend it"):
        ChatRenderer(broken).render(chat("u", "Hi", "a", "Hello."))


def test_an_error_of_the_template_is_told_with_its_line(tokenizer, chat):
    wrong = copy.deepcopy(tokenizer)
    wrong.chat_template = "{% for m in messages %}\n{{ m.content.a.b }}\n{% endfor %}"
    with pytest.raises(TemplateRefused, match=r"no attribute 'a' \(line 2 of the template\)"):
        ChatRenderer(wrong).render(chat("u", "Hi", "a", "Hello."))


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy(tokenizer_with):
    bare = copy.deepcopy(tokenizer_with("llama3"))
    bare.chat_template = None
    with pytest.raises(DataError, match=r"model\.chat_template=FILE.*data\.format=text"):
        ChatRenderer(bare)


def test_marked_rendering_shows_what_is_trained(tokenizer_with, chat):
    rendering = ChatRenderer(tokenizer_with("gemma")).render(chat("u", "Hi", "a", "Hello."))
    assert marked(rendering.text, rendering.spans) == "<bos><turn>user\nHi</turn>\n<turn>model\n⟦Hello.</turn>⟧\n"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("llama3", {"<|eot|>"}),
        ("mistral", {"</s>"}),
        ("gemma", {"</turn>"}),
        ("hermes", {"<|im_end|>"}),
        ("deepseek", {"<|eos|>"}),
        ("eom", {"<|eot|>", "<|eom|>"}),
        ("insistent", {"<|im_end|>"}),
        ("endless", set()),
    ],
)
def test_stop_tokens_are_the_turn_ends_of_the_template_and_eos(tokenizer_with, template, ends):
    tokenizer = tokenizer_with(template)
    assert set(tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer))) == ends | {tokenizer.eos_token}


def test_template_hash_changes_with_the_template_only(tokenizer, tokenizer_with):
    assert template_hash(tokenizer) == template_hash(tokenizer)
    assert len({template_hash(tokenizer_with(name)) for name in ("llama3", "gemma")} | {template_hash(tokenizer)}) == 3


def test_a_prompt_writes_earlier_tool_calls_as_training_does(tokenizer_with, chat):
    tokenizer = tokenizer_with("deepseek")
    messages = chat("u", "Weather?", "a", "x", "t", "20", "a", "Warm.", "u", "Thanks")
    messages[1] = {"role": "assistant", "content": None, "tool_calls": CALL}
    prompt = to_conversation({"messages": [*messages, *chat("a", "x")]}, "messages", "test:1")
    prompt = replace(prompt, messages=prompt.messages[:-1])
    asked = ChatRenderer(tokenizer).text(prompt.messages, add_generation_prompt=True)
    assert '<|call|>weather\n{"city": "Paris"}<|/call|>' in asked
    assert prompt_ids(tokenizer, prompt) == tokenizer(asked, add_special_tokens=False)["input_ids"]
    whole = ChatRenderer(tokenizer).text(prompt.messages)
    assert token_ids(tokenizer, prompt) == tokenizer(whole, add_special_tokens=False)["input_ids"]
