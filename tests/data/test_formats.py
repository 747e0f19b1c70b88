"""The shapes of rows that people have, as conversations, and what is said of rows that are none."""

from __future__ import annotations

from datetime import date

import pytest

from loadmaster.data.formats import (
    FORMAT_FIELDS,
    Conversation,
    RowError,
    in_turn,
    prompt_and_reference,
    recognise_format,
    renamed,
    to_conversation,
    unread_fields,
)

CALL = {"name": "weather", "arguments": {"city": "Paris"}}
CALL_JSON = '{"name": "weather", "arguments": {"city": "Paris"}}'
TOOL = {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}


def messages_of(row: dict, shape: str, **options) -> list[dict]:
    return to_conversation(row, shape, "f:1", **options).messages


def test_rows_of_files_come_in_turn_each_of_them_once_however_few_places_are_looked_at(monkeypatch):
    rows = [Conversation([], origin=f"{file}:{n}") for n, file in enumerate("aaaaabbbccd")]
    assert [row.origin[0] for row in in_turn(rows)] == list("abcd" "abc" "ab" "a" "a")
    monkeypatch.setattr("loadmaster.data.formats.PROBES", 3)
    assert sorted(row.origin for row in in_turn(rows)) == sorted(row.origin for row in rows)
    assert list(in_turn([])) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "messages"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "messages"),
        ({"instruction": "x", "input": "", "output": "y"}, "alpaca"),
        ({"text": "x", "url": "y"}, "text"),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, "preference"),
        ({"prompt": "x", "completion": "y"}, "prompt_completion"),
        ({"prompt": "x", "response": "y", "id": 3}, "prompt_completion"),
        ({"question": "x", "answer": "y"}, "prompt_completion"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": []}, "prompt_completion"),
        ({"prompt": "x", "completion": "y", "label": True}, "unpaired"),
        ({"text": "x", "question": "y", "answer": "z"}, "text"),
    ],
)
def test_the_format_is_recognised_by_the_fields(row, expected):
    assert recognise_format(row)[0] == expected


def test_unknown_fields_name_the_shapes_that_are_read():
    with pytest.raises(RowError, match="the fields ask, reply are no shape that is read") as caught:
        recognise_format({"ask": "x", "reply": "y"})
    assert all(f"{name} (" in caught.value.remedy for name in FORMAT_FIELDS)
    assert "'data.columns={prompt: YOURS, completion: YOURS}'" in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"messsages": [], "id": 3}, "rename 'messsages' to messages"),
        ({"Question": "x", " answer": "y"}, "rename 'Question' to question, ' answer' to answer"),
        ({"instruction": "x", "outputs": "y", "input": ""}, "rename 'outputs' to output"),
    ],
)
def test_misspelt_fields_are_answered_with_their_names(row, remedy):
    with pytest.raises(RowError, match="no shape that is read") as caught:
        recognise_format(row)
    assert caught.value.remedy == remedy


def test_a_field_near_to_one_that_alone_is_no_shape_names_the_shapes():
    with pytest.raises(RowError, match="the field prompts is no shape that is read") as caught:
        recognise_format({"prompts": "x"})
    assert caught.value.remedy.startswith("name the fields as")


@pytest.mark.parametrize(
    ("turn", "remedy"),
    [
        ({"role": "human", "content": "x"}, "write the roles as user and assistant"),
        ({"role": "User", "content": "x"}, "write the roles as user and assistant"),
        ({"from": "human", "value": "x"}, "name the list conversations: from and value are how sharegpt writes a turn"),
        ({"role": "robot", "content": "x"}, None),
        ({"role": ["human"], "content": "x"}, None),
    ],
)
def test_messages_written_as_other_files_do_are_answered_with_how_to_write_them(turn, remedy):
    with pytest.raises(RowError) as caught:
        to_conversation({"messages": [turn]}, "messages", "f:1")
    assert caught.value.remedy == remedy


ASKED, SAID = {"role": "user", "content": "Name a fish."}, {"role": "assistant", "content": "Cod."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a fish.", "completion": "Cod."},
        {"prompt": "Name a fish.", "response": "Cod."},
        {"question": "Name a fish.", "answer": "Cod."},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "completion": SAID},
        {"prompt": [ASKED], "completion": "Cod."},
        {"prompt": [ASKED], "completion": [ASKED, SAID]},
    ],
)
def test_every_way_of_writing_a_prompt_and_its_completion_is_the_same_chat(row):
    assert recognise_format(row)[0] == "prompt_completion"
    conversation = to_conversation({**row, "system": "Be brief."}, "prompt_completion", "f:1")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, ASKED, SAID]
    assert conversation.prompt_answers == 0


def test_assistant_turns_of_a_prompt_are_context():
    row = {"prompt": [ASKED, SAID, {"role": "user", "content": "Another."}], "completion": [SAID], "tools": [TOOL]}
    conversation = to_conversation(row, "prompt_completion", "f:1", system="Be brief.")
    assert [message["role"] for message in conversation.messages] == [
        "system", "user", "assistant", "user", "assistant",
    ]
    assert conversation.prompt_answers == 1 and conversation.tools
    assert Conversation.from_json(conversation.to_json()) == conversation
    whole = to_conversation({"messages": [*row["prompt"], SAID], "tools": [TOOL]}, "messages", "f:1", "Be brief.")
    assert whole.messages == conversation.messages and whole.row_id != conversation.row_id


@pytest.mark.parametrize(
    ("row", "shape", "unread"),
    [
        ({"question": "Who is it?", "answer": "Ann.", "context": "Ann is here.", "id": "a1"}, "prompt_completion",
         ["context"]),
        ({"instruction": "Say  a word", "input": " of two ", "output": "A word.", "topic": "words"}, "alpaca", []),
        ({"prompt": "Who is it?", "chosen": "It is Ann.", "rejected": "It is Bob."}, "preference", []),
        ({"text": "Some words.", "tools": "[1, 2]"}, "text", []),
    ],
)
def test_fields_with_words_that_are_not_read_are_found(row, shape, unread):
    assert unread_fields(row, to_conversation(row, shape, "f:1")) == unread


@pytest.mark.parametrize(
    ("weights", "context"), [((None, None, 1), 0), ((0, None, 1), 1), ((0, 0, None), 2), ((1, 1, 1), 0)]
)
def test_first_answers_of_weight_0_are_context(weights, context):
    turns = [turn for weight in weights for turn in (ASKED, {**SAID, "weight": weight})]
    conversation = to_conversation({"messages": turns}, "messages", "f:1")
    assert conversation.prompt_answers == context and conversation.messages == [ASKED, SAID] * 3
    assert to_conversation({"conversations": turns}, "messages", "f:1") == conversation


@pytest.mark.parametrize(("weights", "said"), [((0, 0), "on every answer"), ((0, 1, 0), "behind"), ((1, 0), "behind")])
def test_answers_of_weight_0_behind_the_trained_ones_are_refused(weights, said):
    turns = [turn for weight in weights for turn in (ASKED, {**SAID, "weight": weight})]
    with pytest.raises(RowError, match=f"weight 0 .*{said}"):
        to_conversation({"messages": turns}, "messages", "f:1")


def test_sharegpt_with_system_tools_calls_and_observations():
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": CALL_JSON},
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "Warm."},
        ],
        "system": "Help.",
        "tools": f"[{CALL_JSON.replace('arguments', 'parameters')}]",
    }
    conversation = to_conversation(row, "sharegpt", "f:1")
    assert conversation.messages == [
        {"role": "system", "content": "Help."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": CALL, "id": "call00000"}],
        },
        {"role": "tool", "content": "20", "tool_call_id": "call00000", "name": "weather"},
        {"role": "assistant", "content": "Warm."},
    ]
    assert conversation.tools == [
        {"type": "function", "function": {"name": "weather", "parameters": {"city": "Paris"}}}
    ]


def test_openai_calls_with_arguments_as_text_become_objects_and_keep_their_ids():
    calls = [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    row = {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "2", "tool_call_id": "b"},
            {"role": "tool", "content": "1"},
        ]
    }
    _, assistant, first, second = messages_of(row, "messages")
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"n": 1}, {}]
    assert (first["tool_call_id"], first["name"]) == ("b", "g")
    assert (second["tool_call_id"], second["name"]) == ("a", "f")


def test_alpaca_with_input_history_and_system():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Sum.", "history": [["Hi", "Hello"]]}
    assert [(m["role"], m["content"]) for m in messages_of(row, "alpaca")] == [
        ("system", "Sum."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]
    assert messages_of({"instruction": "Add", "input": "", "output": "3"}, "alpaca")[0]["content"] == "Add"


def test_the_jobs_system_message_goes_only_where_there_is_none():
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    own = [{"role": "system", "content": "own"}, *chat]
    assert messages_of({"messages": chat}, "messages", system="given")[0] == {"role": "system", "content": "given"}
    assert messages_of({"messages": own}, "messages", system="given") == own


def test_a_developer_message_is_the_system_message():
    turns = [{"role": "developer", "content": "own"}, ASKED, SAID]
    rows = {"messages": {"messages": turns}, "prompt_completion": {"prompt": turns[:2], "completion": SAID}}
    for shape, row in rows.items():
        assert messages_of(row, shape, system="given") == [{"role": "system", "content": "own"}, ASKED, SAID]
    pair = {"prompt": turns[:2], "chosen": "Cod.", "rejected": "Seven."}
    assert messages_of(pair, "preference")[0]["role"] == "system"


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
    assert messages_of(row, "messages")[0]["content"] == "one two"
    row["messages"][0]["content"] = [{"type": "image_url", "image_url": "x"}]
    with pytest.raises(RowError, match="content parts other than text"):
        messages_of(row, "messages")


@pytest.mark.parametrize("answer", [["x"], [], [{"name": "x"}]])
def test_a_list_where_text_belongs_is_said_to_be_one(answer: list):
    with pytest.raises(RowError, match=r"^output is a list, not text$"):
        messages_of({"instruction": "a", "output": answer}, "alpaca")
    with pytest.raises(RowError, match=r"is a list, not text$"):
        messages_of({"messages": [{"role": "user", "content": answer or ["x"]}]}, "messages")


def test_tools_as_text_leave_only_roles_that_every_template_has():
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [{"function": CALL}]},
            {"role": "tool", "content": "20"},
            {"role": "assistant", "content": "Warm."},
        ],
        "tools": [TOOL],
    }
    conversation = to_conversation(row, "messages", "f:1", tools_as="text")
    assert conversation.tools is None
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert '"name": "weather"' in conversation.messages[0]["content"]
    assert conversation.messages[2]["content"] == f"Let me look.\n<tool_call>\n{CALL_JSON}\n</tool_call>"
    assert conversation.messages[3]["content"] == "<tool_response>\n20\n</tool_response>"


ROWS_WITH_REASONS = [
    ("messages", 7, "is a number, not an object with fields"),
    ("messages", {}, "lacks messages"),
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": "hello"}, "messages is not JSON"),
    ("messages", {"messages": [{"role": "user", "content": "x"}]}, "has no assistant message"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "message 1: role is 'robot', known are"),
    ("messages", {"messages": [{"content": "x"}]}, "known are system, user, assistant, tool, developer"),
    ("messages", {"messages": [{"role": None, "content": "x"}]}, "message 1: role is null, known are"),
    ("messages", {"messages": [{"role": ["user"], "content": "x"}]}, "message 1: role is a list, known are"),
    ("messages", {"messages": [{"role": "user"}]}, r"message 1 \(user\) lacks content"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, r"message 1 \(user\) is a number, not text"),
    ("messages", {"messages": [{"role": "user", "content": " \n"}]}, r"message 1 \(user\) is empty"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, r"message 1 \(user\) is null, not text"),
    ("messages", {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only the assistant makes"),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "a function call needs a name"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 1 lacks value"),
    (
        "sharegpt",
        {"conversations": [{"from": "bard", "value": "x"}]},
        "turn 1: from is 'bard', known are system, human",
    ),
    ("sharegpt", {"conversations": [{"from": None, "value": "x"}]}, "turn 1: from is null, known are"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": ""}]}, r"turn 1 \(gpt\) is empty"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "look()"}]}, "the function call is not JSON"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "tools": "{oops"}, "tools is not JSON"),
    ("alpaca", {"instruction": "x"}, "lacks output"),
    ("alpaca", {"instruction": "x", "output": ""}, "output is empty"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [["one"]]}, "history 1 is not a"),
    ("prompt_completion", {"prompt": "x"}, "lacks completion"),
    ("prompt_completion", {"question": "x", "answer": None}, "lacks answer"),
    ("prompt_completion", {"messages": []}, "lacks prompt and completion"),
    ("prompt_completion", {"prompt": "x", "completion": " "}, "completion is empty"),
    ("prompt_completion", {"prompt": [], "completion": "y"}, "prompt is empty"),
    ("prompt_completion", {"prompt": 3, "completion": "y"}, "prompt is a number, not text or a list of messages"),
    ("prompt_completion", {"prompt": [SAID], "completion": [ASKED]}, "completion has no message of the assistant"),
    ("prompt_completion", {"prompt": ["x"], "completion": "y"}, "message 1 is text, not an object with role"),
    ("text", {"text": None}, "text is null, not text"),
    ("text", {"text": "half a \ud83d"}, "lone surrogate"),
    (
        "messages",
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"on": date(2026, 1, 1)}}]}]},
        r"message 1 \(assistant\): the arguments of f cannot be written as JSON: Object of type date",
    ),
    ("messages", {"messages": [SAID], "tools": [{"name": 5}]}, "a tool has no name: {'type': 'function', "),
    ("messages", {"messages": [SAID], "tools": [{"name": "f", "n": b"x"}]}, "tools cannot be written as JSON"),
]


@pytest.mark.parametrize(("shape", "row", "reason"), ROWS_WITH_REASONS)
def test_bad_rows_say_what_is_wrong_with_them(shape, row, reason):
    with pytest.raises(RowError, match=reason):
        to_conversation(row, shape, "f:1")


def test_row_id_depends_on_the_content_and_not_on_the_place():
    row = {"instruction": "x", "output": "y"}
    first, second = to_conversation(row, "alpaca", "f:1"), to_conversation(row, "alpaca", "g:9")
    assert first.row_id == second.row_id
    assert first.row_id != to_conversation({**row, "output": "z"}, "alpaca", "f:1").row_id


def test_conversations_survive_the_way_through_json():
    conversation = to_conversation(
        {"messages": [{"role": "assistant", "content": "ü 🙂"}], "tools": [TOOL]}, "messages", "f:1"
    )
    assert Conversation.from_json(conversation.to_json()) == conversation


def test_prompt_ends_before_the_last_answer():
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant", "user")]
    prompt, reference = prompt_and_reference(to_conversation({"messages": chat}, "messages", "f:1"))
    assert prompt == chat[:3] and reference == chat[3]


def test_fields_that_have_other_names_are_read_by_ours():
    row = {"query": "2 and 2?", "context": "sums", "reply": "4", "id": 7}
    columns = {"instruction": "query", "input": "context", "output": "reply"}
    assert renamed(row, columns) == {"instruction": "2 and 2?", "input": "sums", "output": "4", "id": 7}
    assert renamed({"input": 1, "output": 2}, {"input": "output", "output": "input"}) == {"input": 2, "output": 1}
    assert renamed({"query": "q"}, columns) == {"instruction": "q"}  # a null that a columnar file left out
