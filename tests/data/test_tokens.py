"""The token mask, exactly, and the checks on it with what they say."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loadmaster.data.cache import ConversationFile
from loadmaster.data.checks import check_conversation
from loadmaster.data.formats import to_conversation
from loadmaster.data.render import Rendering, Span
from loadmaster.data.tokens import Encoder, trained_mask

LETTERS = ["<unk>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyzDIY[]<>/|"]
METASPACE_WORDS = [*LETTERS, "▁Yes", "Yes", "▁please", "▁Do", "▁it", "Do", "user", "model", "assistant"]


def encode(tokenizer, row: dict, shape: str = "messages"):
    return Encoder(tokenizer).encode([to_conversation(row, shape, "rows.jsonl:7")])


def test_mask_over_tokens_is_exactly_the_answer_and_its_end(tokenizer, chat):
    encoded = encode(tokenizer, {"messages": chat("s", "Count.", "u", "1 2", "a", "3 4", "u", "5", "a", "6")})
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids.tolist())
    table = list(zip(tokens, encoded.trained.tolist(), strict=True))
    assert [token for token, trained in table if trained] == ["3", "Ġ", "4", "<|im_end|>", "6", "<|im_end|>"]
    assert table[-1] == ("Ċ", False)  # the newline behind the end of the turn
    assert table[: tokens.index("3")] == [(token, False) for token in tokens[: tokens.index("3")]]


@pytest.mark.parametrize("template", ["llama3", "mistral", "gemma", "qwen3", "hermes"])
def test_token_ids_are_those_of_the_template_and_trained_tokens_decode_to_the_answers(tokenizer_with, chat, template):
    tokenizer = tokenizer_with(template)
    messages = chat("u", "Grüße, 你好 🙂?", "a", "Schön 🙂 你好.", "u", "And?", "a", "Bye.")
    encoded = encode(tokenizer, {"messages": messages})
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    decoded = tokenizer.decode(encoded.ids[encoded.trained], clean_up_tokenization_spaces=False)
    end = tokenizer.convert_ids_to_tokens(int(encoded.ids[encoded.trained][-1]))
    thinking = "<think>\n\n</think>\n\n" if template == "qwen3" else ""
    space = " " if template == "mistral" else ""
    assert decoded == f"{space}Schön 🙂 你好.{end}{thinking}{space}Bye.{end}"


@pytest.mark.parametrize("form", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("text", ["a b", "<s> a b", "a b </s>", "<s> a b </s>"])
def test_plain_text_gets_no_second_bos_or_eos(form, text):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert encode(tokenizer, {"text": text}, "text").ids.tolist() == [1, 3, 4, 2]


def test_plain_text_is_trained_whole_with_eos_behind_it(tokenizer):
    encoded = encode(tokenizer, {"text": "Once upon a time"}, "text")
    assert encoded.ids.tolist() == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]
    assert encoded.trained.all()


def test_tokens_across_the_start_belong_to_the_assistant_only_with_its_own_letters():
    text, spans = "ab \n cd", (Span(4, 7, None),)
    offsets = np.array([[0, 2], [2, 5], [5, 7]])
    assert trained_mask(text, spans, offsets).tolist() == [False, False, True]
    assert trained_mask(text, spans, np.array([[0, 2], [2, 6], [6, 7]])).tolist() == [False, True, True]


def test_offsets_that_were_trimmed_of_white_space_still_map():
    # As byte-level post-processors give them: a newline before the span is empty at its start, one behind it too.
    text, spans = "user\nHi<end>\n", (Span(5, 12, "<end>"),)
    offsets = np.array([[0, 4], [5, 5], [5, 7], [7, 12], [13, 13]])
    assert trained_mask(text, spans, offsets).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("kind", ["byte level, trimmed offsets", "metaspace", "metaspace, each piece"])
@pytest.mark.parametrize("template", ["llama3", "mistral", "gemma", "hermes"])
def test_masks_hold_for_the_other_kinds_of_tokenizer(tokenizer_with, chat, kind, template):
    tokenizer = copy.deepcopy(tokenizer_with(template))
    backend = tokenizer.backend_tokenizer
    if kind.startswith("byte"):  # Llama 3, Mistral Nemo
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    else:  # Llama 2 and Gemma: a space is a letter, put before the text or before each piece of it
        backend = Tokenizer(models.Unigram([(word, -1.0) for word in METASPACE_WORDS], 0, byte_fallback=False))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if "each" in kind else "first")
        backend.decoder = decoders.Metaspace()
        special = list(tokenizer_with(template).extra_special_tokens)
        backend.add_special_tokens(["<|im_end|>", *special])
        template_text = tokenizer.chat_template
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.chat_template = template_text
    messages = chat("u", "Do it", "a", "Yes please", "u", "Do it", "a", "Yes")
    encoded = encode(tokenizer, {"messages": messages})
    assert not encoded.wrong and not encoded.refused
    trained = [token.strip("Ġ▁") for token in tokenizer.convert_ids_to_tokens(encoded.ids[encoded.trained].tolist())]
    end = trained[-1]
    assert "".join(trained) == f"Yesplease{end}Yes{end}"


@pytest.mark.parametrize(
    ("template", "parts", "reason"),
    [
        ("mute", ("u", "Hi", "a", "Hello."), "drops message 2 (role assistant)"),
        ("monologue", ("a", "Hello."), "every token of this row is trained"),
        ("endless", ("u", "Hi", "a", "Hello."), "the end of assistant turn 1 gets no loss"),
        ("endless", ("u", "Hi", "a", "Hello.", "u", "And?", "a", "Bye."), "the end of assistant turn 1 gets no loss"),
        ("deaf", ("s", "Be brief.", "u", "Hi", "a", "Hello."), "drops message 1 (role system)"),
    ],
)
def test_each_wrong_rendering_is_reported_with_place_and_marked_text(tokenizer_with, chat, template, parts, reason):
    encoded = encode(tokenizer_with(template), {"messages": chat(*parts)})
    assert len(encoded.ids) == 0 and len(encoded.wrong) == 1
    fault = encoded.wrong[0]
    assert fault.origin == "rows.jsonl:7"
    assert reason in fault.reason
    assert fault.rendering is not None and "⟦" in fault.rendering


def test_a_row_in_which_nothing_is_trained_is_reported(tokenizer_with, chat):
    messages = chat("u", "Hi", "a", "x")
    messages[1] = {"role": "assistant", "content": "", "reasoning_content": "only reasoning, which this template drops"}
    encoded = encode(tokenizer_with("mute"), {"messages": messages})
    assert encoded.wrong[0].reason == "no token of this row is trained"


def test_a_template_that_drops_the_reasoning_of_the_last_turn_is_reported(tokenizer, tokenizer_with, chat):
    messages = chat("u", "Hi", "a", "Hello.", "u", "And?", "a", "Bye.")
    messages[3]["reasoning_content"] = "They are leaving."
    fault = encode(tokenizer, {"messages": messages}).wrong[0].reason
    assert "drops the reasoning of message 4: 'They are leaving.' is not in" in fault and "<think>...</think>" in fault
    one, two = "<think>\nOne\n</think>\n\nHello.", "<think>\nTwo\n</think>\n\nBye."
    inside = {"messages": chat("u", "Hi", "a", one, "u", "And?", "a", two)}
    assert "drops the reasoning of message 4: 'Two' is not" in encode(tokenizer_with("silent"), inside).wrong[0].reason
    for shows in (tokenizer, tokenizer_with("qwen3")):  # which leaves out that of earlier turns
        assert not encode(shows, inside).wrong
    assert not encode(tokenizer, {"messages": [*messages, *chat("u", "Bye.")]}).wrong


def test_a_template_that_drops_tools_or_calls_is_reported_with_the_setting_that_helps(tokenizer, tokenizer_with, chat):
    messages = chat("u", "Weather?", "a", "x", "t", "20", "a", "Warm.")
    messages[1] = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {}}}],
    }
    call = encode(tokenizer, {"messages": messages}).wrong[0].reason
    assert "drops the tool call in message 2" in call and "data.tools=text" in call
    tools = [{"name": "weather", "parameters": {}}]
    definitions = encode(tokenizer, {"messages": chat("u", "Hi", "a", "Hello."), "tools": tools}).wrong[0].reason
    assert "drops the tool definitions (weather)" in definitions

    # The call's words all stand in the question, and so does the tool's name.
    messages[0]["content"] = "The weather in Paris?"
    messages[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Paris"}
    call = encode(tokenizer, {"messages": messages}).wrong[0].reason
    assert "drops the tool call in message 2: 'weather' is not in the rendering" in call
    asked = {"messages": chat("u", "The weather?", "a", "Warm."), "tools": tools}
    assert "drops the tool definitions (weather)" in encode(tokenizer, asked).wrong[0].reason
    shown = encode(tokenizer_with("hermes"), {"messages": messages, "tools": tools})
    assert not shown.wrong and len(shown.kept) == 1


def test_a_dropped_message_is_reported_though_its_text_stands_in_another(tokenizer_with, chat):
    messages = chat("s", "Paris", "u", "Is Paris large?", "a", "Yes.")
    assert "drops message 1 (role system)" in encode(tokenizer_with("deaf"), {"messages": messages}).wrong[0].reason
    assert not encode(tokenizer_with("llama3"), {"messages": messages}).wrong


def test_what_the_template_refuses_is_reported_in_its_words(tokenizer_with, chat):
    encoded = encode(tokenizer_with("mistral"), {"messages": chat("u", "a", "u", "b", "a", "c")})
    assert encoded.refused[0].reason == "the chat template refuses this conversation: roles must alternate"


def test_a_tool_answer_inside_the_trained_part_is_reported_but_a_quoted_one_is_not(chat):
    def reason(answer: str) -> str | None:
        text = "Weather? 20 degrees " + answer
        conversation = to_conversation(
            {"messages": chat("u", "Weather?", "t", "20 degrees", "a", answer)}, "messages", "f:1"
        )
        rendering = Rendering(text, (Span(9, len(text), "."),))
        return check_conversation(conversation, rendering, np.array([False, True]), renderer=None)

    assert reason("Warm.") == "message 2 (role tool) stands inside the trained part"
    assert reason("It is 20 degrees.") is None


def test_what_is_sent_to_such_a_process_grows_with_its_own_rows_alone(tmp_path):
    starts = np.arange(100_001) * 10
    everything = ConversationFile(tmp_path / "rows", starts, np.arange(100_000))
    piece = everything.piece(99_744, 100_000)
    assert len(piece) == 256 and len(pickle.dumps(piece)) < 6_000
    assert (piece.starts[piece.index] == starts[99_744:-1]).all() and piece.starts[piece.index[-1] + 1] == starts[-1]
