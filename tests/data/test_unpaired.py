"""Unpaired preference rows: the shapes people write a labelled answer in, and the label's way to a batch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from loadmaster.config.schema import DataConfig, Job
from loadmaster.data import collate, describe, judged_alone, prepare
from loadmaster.data.formats import RowError, recognise_format, to_conversation
from loadmaster.errors import DataError
from tests.data.test_preview import printed

ASK, GOOD = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}
SHAREGPT = [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": "Blue."}]


@pytest.mark.parametrize(
    ("row", "under"),
    [
        ({"prompt": ASK["content"], "completion": "Blue.", "label": True}, "sft"),
        ({"prompt": [ASK], "completion": [GOOD], "label": True}, "sft"),
        ({"prompt": [ASK], "completion": GOOD, "label": 1}, "sft"),
        ({"messages": [ASK], "completion": "Blue.", "label": "True"}, "sft"),
        ({"conversations": SHAREGPT[:1], "completion": "Blue.", "label": "desirable"}, "sft"),
        ({"instruction": ASK["content"], "completion": "Blue.", "label": 1.0}, "sft"),
        ({"messages": [ASK, GOOD], "label": True}, "kto"),
        ({"conversations": SHAREGPT, "kto_tag": True}, "sft"),
        ({"instruction": ASK["content"], "input": "", "output": "Blue.", "kto_tag": True}, "sft"),
    ],
)
def test_every_way_of_writing_a_labelled_answer_is_the_same(row, under):
    assert recognise_format(row, under)[0] == "unpaired"
    conversation = to_conversation(row, "unpaired", "f:1", system="Be brief.")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, ASK, GOOD]
    assert conversation.label is True and conversation.rejected is None
    assert type(conversation).from_json(conversation.to_json()) == conversation
    worse = to_conversation({**row, "kto_tag" if "kto_tag" in row else "label": False}, "unpaired", "f:1", "Be brief.")
    assert worse.label is False and worse.messages == conversation.messages and worse.row_id != conversation.row_id


def test_a_label_beside_other_rows_is_no_feedback():
    chat = {"messages": [ASK, GOOD], "label": "billing"}
    assert recognise_format(chat)[0] == recognise_format(chat, "dpo")[0] == "messages"
    assert recognise_format({"text": "It rained.", "label": 1})[0] == "text"
    pair = {"prompt": "x", "chosen": "y", "rejected": "z", "label": True}
    assert recognise_format(pair, "kto")[0] == "preference"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "completion": "y"}, "lacks label: true \\(a desirable answer\\) or false"),
        ({"prompt": "x", "completion": "y", "label": None}, "label is null, not true"),
        ({"prompt": "x", "completion": "y", "label": "good?"}, "label is 'good\\?', not true"),
        ({"prompt": "x", "completion": "y", "label": 2}, "label is 2, not true"),
        ({"prompt": "x", "completion": "y", "label": 0.5}, "label is 0.5, not true"),
        ({"prompt": "x", "completion": "y", "label": float("nan")}, "label is nan, not true"),
        ({"prompt": "x", "completion": "y", "label": [True]}, r"label is \[True\], not true"),
        ({"prompt": "x", "label": True}, "lacks completion, the answer that its label is about"),
        ({"completion": "y", "label": True}, "completion has no prompt before its answer"),
        ({"messages": [GOOD, ASK], "label": True}, "the chat ends in a message of role user"),
        ({"prompt": "x", "completion": " ", "label": True}, "is empty"),
        ({"prompt": 5, "completion": "y", "label": True}, "the prompt is a number"),
        ({"prompt": "x", "completion": 5, "label": True}, "completion is a number"),
    ],
)
def test_a_row_that_is_no_labelled_answer_says_why(row, reason):
    with pytest.raises(RowError, match=reason):
        to_conversation(row, "unpaired", "f:1")


def answer(number: int, words: int = 3) -> dict:
    label = number % 3 != 0
    said = f"{number} it is, " if label else "No, I would rather not say that number. "
    return {"prompt": f"Say {number}.", "completion": said * words, "label": label}


def job(path, objective="kto", sequence_length=256, **data) -> Job:
    return Job(
        data=DataConfig(path=str(path), validation=data.pop("validation", None), **data),
        objective=objective,
        sequence_length=sequence_length,
    )


@pytest.mark.parametrize("packing", [True, False])
def test_each_packed_document_carries_the_label_of_its_row(tokenizer, write_jsonl, packing):
    rows = [answer(n) for n in range(20)]
    prepared = prepare(job(write_jsonl(rows), packing=packing), tokenizer)
    assert prepared.summary["format"] == "unpaired" and prepared.train.documents == 20
    assert len(prepared.train) == 20 if not packing else len(prepared.train) < 10
    seen = []
    for row in prepared.train:
        starts = [*np.flatnonzero(row.position_ids == 0).tolist(), len(row)]
        assert len(row.document_ids) == len(row.desirable) == len(starts) - 1
        for place, origin in enumerate(row.document_ids):
            line = int(origin.rpartition(":")[2])
            labels = row.labels[starts[place] : starts[place + 1]]
            assert tokenizer.decode(labels[labels != -100]).startswith(rows[line - 1]["completion"].strip())
            assert row.desirable[place] == rows[line - 1]["label"]
            seen.append(line)
    assert sorted(seen) == list(range(1, 21))
    figures = prepared.summary["train"]
    assert (figures["desirable"], figures["undesirable"]) == (13, 7)
    said = "13 desirable and 7 undesirable answers; preference.undesirable_weight=1.9 would weigh both alike"
    assert said in describe(prepared.summary)
    figures |= {"desirable": 240, "undesirable": 2}
    assert "preference.undesirable_weight=120 would" in describe(prepared.summary)
    held_out = describe(prepared.summary | {"validation": figures})  # what is not trained on asks for no weight
    assert held_out.count("240 desirable and 2") == 2 and held_out.count("undesirable_weight") == 1


def test_a_micro_batch_knows_the_label_of_each_document_and_padding_has_none(tokenizer, write_jsonl):
    train = prepare(job(write_jsonl([answer(n) for n in range(20)])), tokenizer).train
    rows = [train[0], train[1]]
    batch = collate(rows, 0, 300)
    begins = (batch.position_ids.reshape(-1) == 0).nonzero().squeeze(-1).tolist()
    assert len(batch.desirable) == len(begins) == sum(len(row.document_ids) for row in rows) + 2
    assert batch.desirable.tolist() == [*rows[0].desirable, False, *rows[1].desirable, False]
    whole = collate(rows[:1], 0, len(rows[0]))
    assert whole.desirable.tolist() == rows[0].desirable.tolist()


def test_only_the_labelled_answer_is_trained_and_one_too_long_is_left_out_whole(tokenizer, write_jsonl):
    turns = [ASK, {"role": "assistant", "content": "Which one?"}, {"role": "user", "content": "Any."}]
    rows = [{"prompt": turns, "completion": [GOOD], "label": True}, answer(3), answer(1, words=90)]
    prepared = prepare(job(write_jsonl(rows)), tokenizer)
    (row,) = prepared.train
    trained = tokenizer.decode(row.labels[row.labels != -100])
    assert "Blue." in trained and "Which one?" not in trained and "Which one?" in tokenizer.decode(row.input_ids)
    assert prepared.summary["train"]["long_rows"]["dropped"] == 1
    assert "1 answer longer than sequence_length, left out whole" in describe(prepared.summary)


def test_validation_is_a_share_or_a_file_and_each_has_its_labels(tokenizer, write_jsonl):
    path = write_jsonl([answer(n) for n in range(20)])
    prepared = prepare(job(path, validation=0.2), tokenizer)
    assert prepared.train.documents == 16 and prepared.validation.documents == 4
    held = {conversation.row_id: conversation.label for conversation in prepared.validation_conversations}
    assert sorted(held.values()) == sorted(label for row in prepared.validation for label in row.desirable.tolist())
    other = write_jsonl([answer(n) for n in range(30, 36)], "other.jsonl")
    prepared = prepare(job(path, validation=str(other)), tokenizer)
    assert sum(row.desirable.sum() for row in prepared.validation) == 4
    assert prepared.summary["validation"]["undesirable"] == 2 and prepared.summary["train"]["undesirable"] == 7


def test_micro_batches_with_one_answer_alone_are_told_what_gives_them_two(tokenizer, write_jsonl):
    path = write_jsonl([answer(n) for n in range(20)])
    single = prepare(job(path, packing=False), tokenizer).summary
    assert "has 1.0 labelled answers on average" in judged_alone(single, 1)
    assert "micro_batch_size=2 or more" in judged_alone(single, 1) and judged_alone(single, 2) is None
    assert judged_alone(single, 2, by_row=True).endswith("far the model moved: a longer sequence_length")
    assert judged_alone(prepare(job(path), tokenizer).summary, 1, by_row=True) is None  # packed: several a row


def test_labelled_chats_under_sft_are_told_the_shape_that_they_have(tokenizer, write_jsonl):
    chat = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
    path = write_jsonl([{"conversations": chat, "kto_tag": n > 1} for n in range(4)])
    with pytest.raises(DataError, match=r"fix: data\.format=sharegpt trains on these chats"):
        prepare(job(path, objective="sft", format="messages"), tokenizer)
    assert prepare(job(path, objective="sft", format="sharegpt"), tokenizer).train.documents == 4


def test_broken_labels_stop_the_run_with_their_lines_or_are_skipped(tokenizer, write_jsonl):
    rows = [answer(n) for n in range(6)]
    rows[1]["label"], rows[3]["label"], rows[4] = None, "maybe", {"prompt": "x", "completion": "y"}
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        prepare(job(path), tokenizer)
    said = str(caught.value)
    places = {line.rpartition(" (")[0].strip(): line.rpartition("/")[2] for line in said.splitlines()[1:-1]}
    meanings = "true (a desirable answer) or false (an undesirable one)"
    assert places == {
        f"label is null, not {meanings}": "rows.jsonl:2)",
        f"label is 'maybe', not {meanings}": "rows.jsonl:4)",
        f"lacks label: {meanings}": "rows.jsonl:5)",
    }
    assert "data.on_bad_row=skip" in said
    prepared = prepare(job(path, on_bad_row="skip"), tokenizer)
    assert prepared.train.documents == 3 and prepared.summary["bad_rows"] == 3


def test_answers_of_one_label_are_warned_of(tokenizer, write_jsonl):
    rows = [{**answer(n), "label": True} for n in range(4)]
    summary = prepare(job(write_jsonl(rows)), tokenizer).summary
    assert "no answer to train on is undesirable: kto tells the two kinds apart" in describe(summary)


@pytest.mark.parametrize("cached", [False, True])
def test_only_kto_takes_labelled_answers(tokenizer, write_jsonl, cached):
    path = write_jsonl([answer(1), answer(3)])
    if cached:  # dpo would find kto's entry
        prepare(job(path), tokenizer)
    for objective in ("dpo", "orpo"):
        said = rf"objective={objective} compares two[\s\S]*fix: use objective=kto, or write pairs"
        with pytest.raises(DataError, match=said):
            prepare(job(path, objective), tokenizer)
    pairs = write_jsonl([{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "no"} for n in range(4)], "pairs.jsonl")
    if cached:
        prepare(job(pairs, validation=str(path)), tokenizer)
    with pytest.raises(DataError, match="objective=dpo compares two"):
        prepare(job(pairs, "dpo", validation=str(path)), tokenizer)
    with pytest.raises(DataError, match="with objective=kto, or write the desirable ones as messages"):
        prepare(job(path, "sft"), tokenizer)
    with pytest.raises(DataError, match=r"objective=kto needs chosen and rejected \(or completion and label\)"):
        prepare(job(write_jsonl([{"text": "It rained."}], "plain.jsonl")), tokenizer)


def test_changed_labels_are_other_data_and_the_same_ones_come_from_the_cache(tokenizer, write_jsonl):
    first = prepare(job(write_jsonl([answer(1), answer(3)])), tokenizer)
    again = prepare(job(write_jsonl([answer(1), answer(3)])), tokenizer)
    assert again.summary["cache"] == "hit" and again.train.fingerprint == first.train.fingerprint
    assert again.train[0].desirable.tolist() == first.train[0].desirable.tolist()
    other = prepare(job(write_jsonl([answer(1), {**answer(3), "label": True}])), tokenizer)
    assert other.train.fingerprint != first.train.fingerprint and other.train[0].desirable.all()


def test_the_preview_says_which_label_an_answer_has(tokenizer, write_jsonl):
    prepared = prepare(job(write_jsonl([answer(1), answer(3)])), tokenizer)
    text = printed(False, prepared, tokenizer, 2)
    assert "rows.jsonl:1 (desirable)\n" in text and "rows.jsonl:2 (undesirable)\n" in text
    assert "read as unpaired (recognised by completion, label)" in text


def test_labelled_answers_may_be_held_out_beside_pairs_under_kto(tokenizer, write_jsonl, tmp_path):
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n} it is.", "rejected": "No."} for n in range(8)]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(answer(n)) for n in range(6)) + "\n")
    prepared = prepare(job(write_jsonl(pairs), validation=str(held)), tokenizer)
    assert collate([prepared.train[0]], 0).desirable is None
    figures = prepared.summary["validation"]
    assert figures["desirable"] + figures["undesirable"] == 6 and "desirable" not in prepared.summary["train"]
    with pytest.raises(DataError, match="compares two"):
        prepare(job(write_jsonl(pairs), "dpo", validation=str(held)), tokenizer)
