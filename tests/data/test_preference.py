"""Preference pairs: the shapes people write them in, and both answers packed side by side."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from loadmaster.config.schema import DataConfig, Job
from loadmaster.data import prepare
from loadmaster.data.formats import RowError, to_conversation
from loadmaster.data.preview import describe
from loadmaster.errors import DataError

ASK = {"role": "user", "content": "Name a colour."}
GOOD, BAD = {"role": "assistant", "content": "Blue."}, {"role": "assistant", "content": "Seven."}
SYSTEM = {"role": "system", "content": "Be brief."}
SHAREGPT = [{"from": "human", "value": ASK["content"]}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASK["content"], "chosen": "Blue.", "rejected": "Seven."},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"messages": [ASK], "chosen": GOOD, "rejected": BAD},
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Seven."},
        },
        {"conversations": SHAREGPT, "chosen": "Blue.", "rejected": "Seven."},
        {"instruction": ASK["content"], "input": "", "chosen": "Blue.", "rejected": "Seven."},
        {"system": "Be brief.", "question": ASK["content"], "chosen": "Blue.", "rejected": "Seven."},
        {"system": "Be brief.", "input": ASK["content"], "chosen": "Blue.", "rejected": "Seven."},
        {"prompt": ASK["content"], "messages": [ASK, GOOD], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": ASK["content"], "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        {
            "conversations": [*SHAREGPT, {"from": "gpt", "value": "Blue."}],
            "chosen": [*SHAREGPT, {"from": "gpt", "value": "Blue."}],
            "rejected": [*SHAREGPT, {"from": "gpt", "value": "Seven."}],
        },
    ],
)
def test_every_way_of_writing_a_pair_is_the_same_pair(row):
    conversation = to_conversation(row, "preference", "f:1", system="Be brief.")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, ASK, GOOD]
    assert conversation.rejected == BAD
    assert type(conversation).from_json(conversation.to_json()) == conversation


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "y"}, "lacks rejected"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "the same answer"),
        ({"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "Else"}, BAD]}, "different prompts"),
        (
            {"prompt": "x", "chosen": "y", "rejected": {"role": "user", "content": "z"}},
            "ends in a message of role user",
        ),
        ({"chosen": "y", "rejected": "z"}, "chosen has no prompt before its answer"),
        ({"system": "s", "q": "x", "chosen": "y", "rejected": "z"}, "chosen has no prompt before its answer"),
        ({"prompt": 5, "chosen": "y", "rejected": "z"}, "the prompt is a number"),
        ({"prompt": "x", "chosen": 5, "rejected": "z"}, "chosen is a number"),
        ({"prompt": "x", "chosen": " ", "rejected": "z"}, "is empty"),
    ],
)
def test_a_row_that_is_no_pair_says_why(row, reason):
    with pytest.raises(RowError, match=reason):
        to_conversation(row, "preference", "f:1")


def pair(number: int, words: int = 3) -> dict:
    return {
        "prompt": f"Say {number}.",
        "chosen": f"{number} it is, " * words,
        "rejected": "No, I would rather not say that number. " * words,
    }


def job(path, objective="dpo", sequence_length=256, **data) -> Job:
    return Job(
        data=DataConfig(path=str(path), validation=data.pop("validation", None), **data),
        objective=objective,
        sequence_length=sequence_length,
    )


def test_both_answers_lie_side_by_side_in_one_row_and_only_they_are_trained(tokenizer, write_jsonl):
    rows = [pair(n) for n in range(12)]
    prepared = prepare(job(write_jsonl(rows)), tokenizer)
    assert prepared.summary["format"] == "preference"
    seen = []
    for row in prepared.train:
        starts = [*np.flatnonzero(row.position_ids == 0).tolist(), len(row)]
        assert len(starts) % 2 == 1, "an odd number of documents would part a pair"
        assert row.document_ids[::2] == row.document_ids[1::2]
        for place in range(0, len(starts) - 1, 2):
            texts = []
            for begin, end in ((starts[place], starts[place + 1]), (starts[place + 1], starts[place + 2])):
                labels = row.labels[begin:end]
                texts.append(tokenizer.decode(labels[labels != -100]))
            line = int(row.document_ids[place].rpartition(":")[2])
            assert texts[0].startswith(rows[line - 1]["chosen"].strip()), texts
            assert texts[1].startswith(rows[line - 1]["rejected"].strip()), texts
            seen.append(line)
    assert sorted(seen) == list(range(1, 13))
    assert prepared.train.documents == 24


def test_only_the_answer_of_a_pair_is_trained_not_earlier_turns(tokenizer, write_jsonl):
    turns = [ASK, {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": "Any."}]
    path = write_jsonl([{"prompt": turns, "chosen": GOOD, "rejected": BAD}])
    (row,) = prepare(job(path), tokenizer).train
    assert "Which one?" not in tokenizer.decode(row.labels[row.labels != -100])
    assert "Which one?" in tokenizer.decode(row.input_ids)


def test_a_pair_too_long_for_a_row_is_left_out_whole_and_counted(tokenizer, write_jsonl):
    asked = job(write_jsonl([pair(1), pair(2, words=40)]))
    for policy in ("cut", "drop"):  # the same, for pairs
        asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, on_long_row=policy))
        prepared = prepare(asked, tokenizer)
        assert prepared.train.documents == 2
        assert prepared.summary["train"]["long_rows"]["dropped"] == 1


def test_a_refused_pair_is_told_its_length_and_only_of_what_pairs_may_have(tokenizer, write_jsonl):
    refusing = job(write_jsonl([pair(1), pair(2, words=40)]))
    refusing = dataclasses.replace(refusing, data=dataclasses.replace(refusing.data, on_long_row="refuse"))
    with pytest.raises(DataError, match=r"has \d+ tokens, .*jsonl:2\)\n .*on_long_row to drop$"):
        prepare(refusing, tokenizer)


def test_where_many_pairs_are_too_long_the_length_that_holds_nearly_all_is_named(tokenizer, write_jsonl):
    path = write_jsonl([pair(n, words=40 if n > 5 else 5) for n in range(20)])
    said = describe(prepare(job(path), tokenizer).summary)
    found = re.search(r"14 pairs longer than .*, left out whole: 70% of them; sequence_length=(\d+) would hold", said)
    assert found, said
    kept = prepare(job(path, sequence_length=int(found[1])), tokenizer)
    assert kept.summary["train"]["long_rows"]["dropped"] <= 2


def test_pairs_that_are_all_too_long_are_told_the_length_that_holds_one(tokenizer, write_jsonl):
    path = write_jsonl([pair(n, words=40) for n in range(3)])
    with pytest.raises(DataError, match=r"the shortest of the rest has \d+ tokens[\s\S]*fix: seq") as caught:
        prepare(job(path), tokenizer)
    works = int(re.search(r"fix: sequence_length=(\d+)", str(caught.value))[1])
    assert prepare(job(path, sequence_length=works), tokenizer).train.documents >= 2


def test_pairs_are_held_out_whole(tokenizer, write_jsonl):
    prepared = prepare(job(write_jsonl([pair(n) for n in range(20)]), validation=0.2), tokenizer)
    assert prepared.train.documents == 32 and prepared.validation.documents == 8


def test_data_and_objective_must_go_together(tokenizer, write_jsonl):
    with pytest.raises(DataError, match=r"preference row[\s\S]*fix: .*objective=dpo.*leave rejected out"):
        prepare(job(write_jsonl([pair(1)]), objective="sft"), tokenizer)
    plain = write_jsonl([{"instruction": "x", "output": "y"}], "plain.jsonl")
    with pytest.raises(DataError, match=r"objective=dpo needs chosen and rejected[\s\S]*fix: objective=sft"):
        prepare(job(plain), tokenizer)
