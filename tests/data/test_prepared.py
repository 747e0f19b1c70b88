"""From files to packed rows: validation, long rows, bad rows together, and the cache."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from loadmaster.config.schema import ModelConfig
from loadmaster.data import build as build_module
from loadmaster.data import describe, prepare
from loadmaster.data import prepared as prepared_module
from loadmaster.data.prepared import _shaped_by
from loadmaster.data.sources import open_source
from loadmaster.errors import DataError, LoadmasterError


def row(number: int | str, words: int = 3) -> dict:
    return {"instruction": f"Say {number}", "output": " ".join([f"word{number}"] * words)}


def texts(rows, tokenizer) -> set[str]:
    """Every document of packed rows as text."""
    found = set()
    for packed in rows:
        starts = np.flatnonzero(packed.position_ids == 0)
        found |= {tokenizer.decode(piece) for piece in np.split(packed.input_ids, starts[1:])}
    return found


def test_prepare_gives_rows_conversations_and_figures(tokenizer, write_jsonl, job_for):
    prepared = prepare(job_for(write_jsonl([row(n) for n in range(100)]), validation=0.1), tokenizer)
    assert len(prepared.train_conversations) == 90 and len(prepared.validation_conversations) == 10
    assert len(texts(prepared.train, tokenizer)) == 90 and len(texts(prepared.validation, tokenizer)) == 10
    figures = prepared.summary["train"]
    assert figures["tokens"] == prepared.train.tokens == sum(len(packed) for packed in prepared.train)
    assert figures["trained_tokens"] == prepared.train.trained_tokens
    assert figures["trained_tokens"] == sum(int((packed.labels != -100).sum()) for packed in prepared.train)
    assert figures["fill"] == pytest.approx(figures["tokens"] / (len(prepared.train) * 256))
    assert prepared.summary["format"] == "alpaca"
    assert "recognised by instruction, output" in describe(prepared.summary)
    named = prepared.train[0].document_ids[0]
    assert named.endswith(tuple(f"rows.jsonl:{line}" for line in range(1, 101)))


def test_equal_rows_are_held_out_together(tokenizer, write_jsonl, job_for):
    rows = [row(n % 20) for n in range(100)]
    prepared = prepare(job_for(write_jsonl(rows), validation=0.2), tokenizer)
    held = {conversation.row_id for conversation in prepared.validation_conversations}
    kept = {conversation.row_id for conversation in prepared.train_conversations}
    assert len(held) == 4 and len(kept) == 16 and not held & kept
    assert "80 rows repeat another row word for word" in prepared.summary["notes"]
    once, again = write_jsonl(rows[:20], "once.jsonl"), write_jsonl(rows[:3], "again.jsonl")
    listed = prepare(job_for([once, again, again], validation=None), tokenizer).summary["notes"]
    assert [note for note in listed if "6 rows repeat" in note and f"those of {again} among them" in note]


@pytest.mark.parametrize(("held", "subset"), [("owner/name", "main"), ("owner/other", None)])
def test_held_out_rows_of_the_same_hub_dataset_are_of_the_same_subset(monkeypatch, tokenizer, job_for, held, subset):
    asked = []

    def opened(path, split, key, subset):
        asked.append((path, split, subset))
        if key == "data.validation":
            raise DataError("enough")

    monkeypatch.setattr(prepared_module, "open_source", opened)
    with pytest.raises(DataError, match="enough"):
        prepare(job_for("owner/name", validation=held, validation_split="test", subset="main"), tokenizer)
    assert asked == [("owner/name", "train", "main"), (held, "test", subset)]


def test_validation_can_be_a_file_or_nothing(tokenizer, write_jsonl, job_for):
    train = write_jsonl([row(n) for n in range(5)], "train.jsonl")
    held = write_jsonl([row("other"), row(3)], "held.jsonl")
    prepared = prepare(job_for(train, validation=str(held)), tokenizer)
    assert len(prepared.train_conversations) == 5 and len(prepared.validation_conversations) == 2
    assert any("1 of 2 validation rows also stand in the training data" in note for note in prepared.summary["notes"])
    without = prepare(job_for(train, validation=None), tokenizer)
    assert without.validation is None and len(without.validation_conversations) == 0


def test_bad_rows_of_both_passes_are_reported_together_with_their_lines(
    tokenizer_with, write_jsonl, job_for, chat
):
    good = {"messages": chat("u", "Hi", "a", "Hello.")}
    twice = {"messages": chat("u", "Hi", "u", "Hi", "a", "Hello.")}
    path = write_jsonl([good, '{"messages": [', {"messages": []}, twice, good, {"text": "x"}, {"messages": []}])
    with pytest.raises(DataError) as caught:
        prepare(job_for(path), tokenizer_with("mistral"))
    message = str(caught.value)
    assert message.startswith("5 of 7 rows cannot be trained on:")
    said = message.replace(str(path), path.name).splitlines()
    assert said[1].startswith("  broken JSON") and said[1].endswith(" (rows.jsonl:2)")
    assert said[2:5] == [
        "  messages is empty (rows.jsonl:3, rows.jsonl:7)",
        "  the chat template refuses this conversation: roles must alternate (rows.jsonl:4)",
        "  lacks messages; its shape is text (text), that of rows.jsonl:1 is messages (messages), and all rows of a "
        "file are to be of one (rows.jsonl:6)",
    ]
    assert message.index("rows.jsonl:2") < message.index("rows.jsonl:4") < message.index("rows.jsonl:6")
    assert "data.on_bad_row=skip" in message and "mend model.chat_template" not in message
    job = replace(job_for(path), model=ModelConfig(chat_template="mine.jinja"))
    with pytest.raises(DataError, match=r"; or mend model\.chat_template=mine\.jinja"):
        prepare(job, tokenizer_with("mistral"))
    skipped = prepare(job_for(path, on_bad_row="skip", validation=None), tokenizer_with("mistral"))
    assert skipped.summary["bad_rows"] == 5 and skipped.summary["train"]["conversations"] == 2
    assert "bad rows skipped: 5, the first" in describe(skipped.summary)


def test_long_lists_of_bad_rows_are_capped_and_counted(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"messages": [{"role": f"r{n}", "content": "x"}]} for n in range(50)] + [{"messages": []}] * 40)
    with pytest.raises(DataError) as caught:
        prepare(job_for(path), tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0] == "90 of 90 rows cannot be trained on:"
    assert len(lines) == 23 and lines[21] == "  ... and 70 rows more"
    assert lines[22] == "    fix: mend these rows: without them none is left"


def said_of(job, tokenizer, *paths) -> str:
    """What stops the preparation of the job's data, with file names for paths."""
    with pytest.raises(DataError) as caught:
        prepare(job, tokenizer)
    said = str(caught.value)
    for path in paths:
        said = said.replace(str(path), path.name)
    return said


def test_a_fault_of_all_rows_is_said_once_with_a_few_rows_and_the_remedy(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"ask": f"Say {n}", "reply": "No."} for n in range(1200)])
    said = said_of(job_for(path), tokenizer, path).splitlines()
    assert said[:2] == [
        "1,200 of 1,200 rows cannot be trained on:",
        "  the fields ask, reply are no shape that is read (all 1,200 rows of rows.jsonl, such as rows.jsonl:1, "
        "rows.jsonl:2, rows.jsonl:3)",
    ]
    assert said[2].startswith("    fix: name the fields as one of these shapes does, or say by data.columns what")
    assert len(said) == 3
    assert "prompt_completion (prompt and completion" in said[2] and "on_bad_row" not in said[2]
    skipping = said_of(job_for(path, on_bad_row="skip"), tokenizer, path)
    assert "1,200 of them bad: the fields ask, reply are no shape" in skipping
    assert skipping.splitlines()[1] == said[2]


def test_rows_of_another_format_than_was_given_name_theirs(tokenizer, write_jsonl, job_for):
    path = write_jsonl([row(n) for n in range(5)])
    said = said_of(job_for(path, format="messages"), tokenizer, path)
    assert "lacks messages (all 5 rows of rows.jsonl" in said
    assert said.endswith("fix: data.format=alpaca, by the fields instruction, output; or data.format=auto")
    mixed = write_jsonl([{"messages": [{"role": "assistant", "content": "x"}]}, row(1)], "mixed.jsonl")
    said = said_of(job_for(mixed, format="messages"), tokenizer, mixed)
    assert "  lacks messages (mixed.jsonl:2)\n" in said and said.endswith("leave them out with data.on_bad_row=skip")


def test_files_whose_rows_are_all_bad_are_told_of_once(tokenizer, write_jsonl, job_for):
    chats = write_jsonl([{"messages": [{"role": "assistant", "content": f"x{n}"}]} for n in range(9)], "chats.jsonl")
    one, two = (write_jsonl([row(n) for n in range(30)], name) for name in ("one.jsonl", "two.jsonl"))
    job = job_for([str(path) for path in (chats, one, two)], format="messages")
    assert said_of(job, tokenizer, chats, one, two).splitlines() == [
        "60 of 69 rows cannot be trained on:",
        "  lacks messages (all 60 rows of one.jsonl, two.jsonl, such as one.jsonl:1, one.jsonl:2, one.jsonl:3)",
        "    fix: data.format=auto, which reads each file by its own fields: one.jsonl, two.jsonl as alpaca",
    ]
    bad = write_jsonl([{"messages": []}] * 2, "bad.jsonl")
    some = write_jsonl([{"messages": [{"role": "assistant", "content": "x"}]}, {"messages": 7}], "some.jsonl")
    said = said_of(job_for([str(chats), str(bad), str(some)]), tokenizer, chats, bad, some).splitlines()
    assert said[1:3] == [
        "  messages is empty (all 2 rows of bad.jsonl, such as bad.jsonl:1, bad.jsonl:2)",
        "  messages is a number, not a list (some.jsonl:2)",
    ]
    assert said[3].startswith("    fix: mend bad.jsonl, or leave it out; mend these rows, or leave them out")


def test_a_file_of_another_format_is_not_told_to_name_its_list_as_it_does(tokenizer, write_jsonl, job_for):
    chats = write_jsonl([{"messages": [{"role": "assistant", "content": f"x{n}"}]} for n in range(3)], "chats.jsonl")
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    other = write_jsonl([{"conversations": turns}] * 2, "sharegpt.jsonl")
    said = said_of(job_for([str(chats), str(other)], format="messages"), tokenizer, chats, other)
    assert said.endswith("fix: data.format=auto, which reads each file by its own fields: sharegpt.jsonl as sharegpt")


def test_words_of_later_rows_that_are_not_read_are_named(tokenizer, write_jsonl, job_for):
    """Alpaca's input is empty in many first rows, and data.columns without it leaves it out of all the others."""
    rows = [{"instruction": f"Translate, {n}", "input": "", "output": f"Done {n}"} for n in range(4)]
    rows[1]["input"] = rows[3]["input"] = "Guten Tag, Welt"
    path = str(write_jsonl(rows, "alpaca.jsonl"))
    columns = {"prompt": "instruction", "completion": "output"}
    named = prepare(job_for(path, validation=None, columns=columns), tokenizer).summary["notes"]
    assert named == ["nothing is read from input (2 rows)"]
    assert prepare(job_for(path, validation=None), tokenizer).summary["notes"] == []


def test_every_file_is_read_by_its_own_fields(tokenizer, write_jsonl, job_for, chat):
    """And trained on as in a job of its own, as often as it stands in the list."""
    turns = [[{"from": "human", "value": f"Q {n}"}, {"from": "gpt", "value": f"A {n}"}] for n in range(3)]
    files = {
        "messages": [{"messages": chat("u", f"Ask {n}", "a", f"Told {n}")} for n in range(3)],
        "sharegpt": [{"conversations": each, "title": "A fine title"} for each in turns],
        "text": [{"text": f"Chapter {n}. It rained."} for n in range(3)],
        "alpaca": [row(n) for n in range(3)],
        "prompt_completion": [{"question": f"What is {n}?", "answer": f"It is {n}"} for n in range(3)],
    }
    paths = {name: str(write_jsonl(rows, f"{name}.jsonl")) for name, rows in files.items()}
    alone = {name: prepare(job_for(path, validation=None), tokenizer) for name, path in paths.items()}
    together = prepare(job_for([*paths.values(), paths["text"]], validation=None), tokenizer)
    assert together.summary["format"] == "messages, sharegpt, text, alpaca, prompt_completion"
    assert texts(together.train, tokenizer) == set().union(*(texts(each.train, tokenizer) for each in alone.values()))
    each = [*alone.values(), alone["text"]]
    for figure in ("tokens", "trained_tokens", "documents"):
        assert getattr(together.train, figure) == sum(getattr(one.train, figure) for one in each)
    described = describe(together.summary)
    assert "data: 18 rows read in 5 formats, " in described and "note: nothing is read from title (3 rows)" in described
    assert f"\n  6 rows of {paths['text']} as text (recognised by text)\n" in described
    assert f"\n  3 rows of {paths['alpaca']} as alpaca (recognised by instruction, output)\n" in described
    held = prepare(job_for([paths["messages"], paths["text"]], validation=paths["sharegpt"]), tokenizer)
    assert held.summary["format"] == "messages, text"
    assert [found["format"] for found in held.summary["formats"]] == ["messages", "text", "sharegpt"]


def test_a_bad_row_of_one_format_among_several_is_named_by_its_place(tokenizer, write_jsonl, job_for):
    first = write_jsonl([{"text": "It rained."}], "first.jsonl")
    second = write_jsonl([row(1), {"instruction": "x"}, {"text": "It snowed."}], "second.jsonl")
    said = said_of(job_for([str(first), str(second)]), tokenizer, first, second).splitlines()
    assert said[:3] == [
        "2 of 4 rows cannot be trained on:",
        "  lacks output (second.jsonl:2)",
        "  lacks instruction; its shape is text (text), that of second.jsonl:1 is alpaca (instruction, output), and "
        "all rows of a file are to be of one (second.jsonl:3)",
    ]


PAIRS, LABELS = {"prompt": "x", "chosen": "y", "rejected": "z"}, {"prompt": "x", "completion": "y", "label": True}


@pytest.mark.parametrize(("objective", "first", "second", "reason", "remedy"), [
    ("sft", row(1), PAIRS, "has chosen and rejected: a preference row",
     "leave second.jsonl out of this job, of objective=sft; train on pairs with objective=dpo"),
    ("sft", row(1), LABELS, "is one answer with a label",
     "leave second.jsonl out of this job, of objective=sft; train on labelled answers with objective=kto"),
    ("dpo", PAIRS, row(1), "is no preference row",
     "leave second.jsonl out of this job, of objective=dpo; objective=sft trains on such rows"),
    ("kto", PAIRS, LABELS, "is unpaired, and first.jsonl:1 is preference: a job trains on one of the two",
     "write a pair as two rows with a label each"),
    ("kto", LABELS, PAIRS, "is preference, and first.jsonl:1 is unpaired: a job trains on one of the two",
     "write a pair as two rows with a label each"),
])
def test_files_of_two_objectives_are_not_mixed(
    tokenizer, write_jsonl, job_for, objective, first, second, reason, remedy
):
    one, two = write_jsonl([first] * 2, "first.jsonl"), write_jsonl([second] * 2, "second.jsonl")
    job = replace(job_for([str(one), str(two)]), objective=objective)
    said = said_of(job, tokenizer, one, two).splitlines()
    assert said[1].startswith(f"  {reason}") and said[1].endswith("(all 2 rows of second.jsonl, such as "
                                                                  "second.jsonl:1, second.jsonl:2)")
    assert said[2].startswith(f"    fix: {remedy}")


def test_a_file_that_was_cut_off_is_the_fault_and_no_row(tokenizer, tmp_path, write_jsonl, job_for):
    rows, torn = write_jsonl([row(n) for n in range(3)]), tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1 torn")
    for given in (str(torn), [str(rows), str(torn)]):
        said = said_of(job_for(given), tokenizer, rows, torn).splitlines()
        assert said[1].startswith("  is not readable Parquet: ") and said[1].endswith(" (torn.parquet:1)")
        assert said[2:] == ["    fix: the file is damaged or was cut off: write it again, or fetch it again"]


def test_held_out_rows_that_all_have_the_same_fault_are_named_as_theirs(tokenizer, write_jsonl, job_for):
    train = write_jsonl([row(n) for n in range(4)] + [{"instruction": "x", "output": ""}], "train.jsonl")
    held = write_jsonl([{"prompt": "x", "chosen": "y", "rejected": "z"}] * 2, "held.jsonl")
    said = said_of(job_for(train, validation=str(held)), tokenizer, train, held).splitlines()
    assert said[0] == "3 of 7 rows cannot be trained on:"
    assert said[1].endswith("a preference row (all 2 rows of held.jsonl, such as held.jsonl:1, held.jsonl:2)")
    assert said[2] == "  output is empty (train.jsonl:5)"
    assert "objective=dpo" in said[3]
    assert said[3].endswith("; mend these rows, or leave them out with data.on_bad_row=skip")


def test_a_list_of_rows_in_a_jsonl_file_is_to_be_named_json(tokenizer, write_jsonl, job_for):
    path = write_jsonl([json.dumps([row(1), row(2)])])
    for shape in ("auto", "alpaca"):
        said = said_of(job_for(path, format=shape), tokenizer, path)
        assert "is a list, not an object with fields (rows.jsonl:1)\n    fix: name the file .json" in said


def test_a_file_in_another_encoding_is_to_be_saved_as_utf8(tokenizer, tmp_path, job_for):
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\nEin Fisch?,Döbel\nNoch einer?,Äsche\n".encode("latin-1"))
    said = said_of(job_for(path), tokenizer, path)
    assert "is not UTF-8 text (all 2 rows of rows.csv" in said and "fix: save the file as UTF-8" in said


def test_a_wrong_rendering_stops_the_run_also_when_bad_rows_are_skipped(
    tokenizer_with, write_jsonl, job_for, chat
):
    path = write_jsonl(["{broken", {"messages": chat("s", "Be brief.", "u", "Hi", "a", "Hello.")}])
    with pytest.raises(DataError) as caught:
        prepare(job_for(path, on_bad_row="skip", format="messages"), tokenizer_with("deaf"))
    message = str(caught.value)
    assert "the chat template drops message 1 (role system)" in message and "rows.jsonl:2)" in message
    assert "| ⟦Hello.<|im_end|>⟧" in message
    assert "bad rows skipped besides: 1" in message


def test_nothing_left_and_nothing_there_are_errors(tokenizer, write_jsonl, job_for, cache):
    with pytest.raises(DataError, match="no row is left to train on: 1 read, 1 of them bad"):
        prepare(job_for(write_jsonl([{"messages": []}]), on_bad_row="skip"), tokenizer)
    with pytest.raises(DataError, match=r"the data has no rows: .*empty\.jsonl"):
        prepare(job_for(write_jsonl([], "empty.jsonl")), tokenizer)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_long_rows_are_cut_split_dropped_or_refused_and_counted(tokenizer, write_jsonl, job_for):
    path = write_jsonl([row(1), row(2, words=100)])

    def prepared(policy: str):
        job = job_for(path, sequence_length=64, on_long_row=policy, validation=None)
        return prepare(job, tokenizer)

    cut, split = prepared("cut"), prepared("split")
    whole = prepare(job_for(path, sequence_length=4096, validation=None), tokenizer)
    assert cut.summary["train"]["long_rows"] == {
        "long": 1,
        "pieces": 1,
        "cut_tokens": whole.train.tokens - cut.train.tokens,
        "dropped": 0,
    }
    assert split.train.tokens == whole.train.tokens
    assert max(cut.train.lengths) <= 64 and max(split.train.lengths) <= 64
    assert "1 row longer than sequence_length (data.on_long_row=split)" in describe(split.summary)
    assert ": 1 piece kept, " in describe(cut.summary) and "keeps it" not in describe(cut.summary)  # a chat
    dropped = prepared("drop")
    assert dropped.train.documents == 1 and dropped.summary["train"]["long_rows"]["dropped"] == 1
    said = "1 row longer than sequence_length, left out whole: 50% of them; sequence_length="
    assert said in describe(dropped.summary)
    with pytest.raises(DataError, match=r"has \d+ tokens, sequence_length is 64 \(.*rows.jsonl:2\)"):
        prepared("refuse")
    path = write_jsonl([row(2, words=100)], "long.jsonl")
    with pytest.raises(DataError, match=r"none has all of it within sequence_length=64"):
        prepared("drop")


def test_held_out_rows_that_are_all_left_out_are_told(tokenizer, write_jsonl, job_for):
    path = write_jsonl([row(1), row(2)])
    held = write_jsonl([row(n, words=100) for n in (3, 4)], "held.jsonl")

    for policy, told in (("drop", 1), ("cut", 0)):
        job = job_for(path, sequence_length=64, on_long_row=policy, validation=str(held))
        notes = prepare(job, tokenizer).summary["notes"]
        assert sum("all 2 held-out rows are left out, so no held-out loss is taken" in note for note in notes) == told


def test_text_of_which_much_is_cut_off_is_advised_to_be_split(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"text": "It rained on. " * 100}, {"text": "It rained."}])

    def said(policy: str, length: int) -> str:
        job = job_for(path, sequence_length=length, on_long_row=policy, validation=None)
        return describe(prepare(job, tokenizer).summary)

    (advice,) = [line for line in said("cut", 64).splitlines() if "keeps it" in line]
    assert advice.startswith("  train: 8") or advice.startswith("  train: 9")  # per cent
    assert advice.endswith("% of the text is cut off; data.on_long_row=split keeps it, in rows of sequence_length")
    assert "keeps it" not in said("split", 64) + said("cut", 4096)

    chats = write_jsonl([row(n, words=100) for n in range(4)], "chats.jsonl")
    mixed = job_for([path, chats], sequence_length=64, on_long_row="cut", validation=None)
    advice = "% of all tokens is cut off; data.on_long_row=split keeps plain text, in rows of sequence_length"
    assert advice in describe(prepare(mixed, tokenizer).summary)


def test_a_missing_validation_file_is_named_by_its_own_key(tokenizer, write_jsonl, job_for):
    with pytest.raises(DataError, match=r"data\.validation = './none\.jsonl': no such file"):
        prepare(job_for(write_jsonl([row(1)]), validation="./none.jsonl"), tokenizer)


def test_rows_are_read_by_the_names_that_their_columns_have(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"query": f"Say {n}", "reply": f"{n}"} for n in range(4)])
    columns = {"prompt": "query", "completion": "reply"}
    prepared = prepare(job_for(path, columns=columns, validation=None), tokenizer)
    assert prepared.summary["format"] == "prompt_completion"
    assert "Say 3<|im_end|>" in "".join(texts(prepared.train, tokenizer))
    typed = {"prompt": "qeury", "completion": "reply"}
    lacking = write_jsonl([{"query": "2 and 2?"}, {"query": "3 and 3?", "reply": " "}], "lacking.jsonl")
    with pytest.raises(DataError) as caught:
        prepare(job_for(lacking, columns=columns, format="prompt_completion"), tokenizer)
    assert "lacks completion; by data.columns completion is reply (" in str(caught.value)
    assert "completion is empty; by data.columns completion is reply (" in str(caught.value)
    with pytest.raises(DataError, match=r"data\.columns names qeury, and no row has(.|\n)*fields: query, reply"):
        prepare(job_for(path, columns=typed, validation=None), tokenizer)


@pytest.mark.parametrize(("besides", "shape"), [
    ({"text": "Q: Say 1 A: 1"}, "text"), ({"messages": [{"role": "user", "content": "Hm"}]}, "messages"),
])
def test_columns_that_are_named_are_not_passed_over(tokenizer, write_jsonl, job_for, besides, shape):
    path = write_jsonl([{"instruction": f"Say {n}", "output": f"{n}", **besides} for n in range(4)])
    columns = {"prompt": "instruction", "completion": "output"}
    job = job_for(path, columns=columns, validation=None)
    said = rf"prompt, completion is called, .*are {shape} \(recognised.*\n +fix: data.format=prompt_completion"
    with pytest.raises(DataError, match=said):
        prepare(job, tokenizer)
    named = job_for(path, columns=columns, validation=None, format="prompt_completion")
    assert "Say 3<|im_end|>" in "".join(texts(prepare(named, tokenizer).train, tokenizer))


def test_a_column_may_be_absent_from_the_held_out_rows(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"query": "Say 1", "reply": "1", "persona": "Terse."}])
    held = write_jsonl([{"query": "Say 2", "reply": "2"}], "held.jsonl")
    columns = {"prompt": "query", "completion": "reply", "system": "persona"}
    prepared = prepare(job_for(path, columns=columns, validation=str(held)), tokenizer)
    assert "Terse." in "".join(texts(prepared.train, tokenizer))


def test_rows_that_are_broken_are_not_taken_for_rows_without_a_column(tokenizer, tmp_path, job_for):
    path = tmp_path / "rows.jsonl"
    path.write_text("{'query': 'Say 1'}\n")
    with pytest.raises(DataError, match="broken JSON"):
        prepare(job_for(path, columns={"prompt": "query"}, validation=None), tokenizer)


def test_only_columns_that_are_renamed_make_another_entry(tokenizer, write_jsonl, job_for):
    """A run that was begun before they could be named goes on with its rows."""
    path = write_jsonl([row(0)])
    plain, named = job_for(path, validation=None), job_for(path, validation=None, columns={"text": "body"})
    shaped = [_shaped_by(job, tokenizer, open_source(str(path)), None) for job in (plain, named)]
    assert [set(each) & {"columns"} for each in shaped] == [set(), {"columns"}]


def test_a_file_that_is_skipped_whole_is_no_format_of_the_data(tokenizer, write_jsonl, job_for):
    pairs = write_jsonl([{**PAIRS, "prompt": f"x{n}"} for n in range(3)], "pairs.jsonl")
    paths = [str(pairs), str(write_jsonl([row(1)], "other.jsonl"))]
    job = replace(job_for(paths, validation=None, on_bad_row="skip"), objective="dpo")
    summary = prepare(job, tokenizer).summary
    assert (summary["format"], summary["bad_rows"], len(summary["formats"])) == ("preference", 1, 1)


def test_only_several_files_of_formats_of_their_own_make_another_entry(tokenizer, write_jsonl, job_for):
    """A run that was begun before each file had its own goes on with its rows, where they are the same."""
    one, two = str(write_jsonl([row(0)])), str(write_jsonl([row(1)], "two.jsonl"))
    given = [(one, "auto"), ([one, one], "auto"), ([one, two], "alpaca"), ([one, two], "auto")]
    shaped = [_shaped_by(job_for(path, format=said), tokenizer, open_source(path), None) for path, said in given]
    assert ["format_of" in each for each in shaped] == [False, False, False, True]


def test_max_rows_and_system_reach_the_rows(tokenizer, write_jsonl, job_for):
    path = write_jsonl([row(n) for n in range(9)])
    prepared = prepare(job_for(path, max_rows=4, system="Be a parrot.", validation=None), tokenizer)
    assert len(prepared.train_conversations) == 4
    assert all("system\nBe a parrot.<|im_end|>" in text for text in texts(prepared.train, tokenizer))


def test_plain_text_is_trained_on_whole(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"text": f"Chapter {n}. It rained."} for n in range(4)])
    prepared = prepare(job_for(path, validation=None), tokenizer)
    assert prepared.train.trained_tokens == prepared.train.tokens - 4
    assert texts(prepared.train, tokenizer) == {f"Chapter {n}. It rained.<|im_end|>" for n in range(4)}


def test_of_a_prompt_and_its_completion_only_the_completion_is_trained(tokenizer, write_jsonl, job_for, chat):
    turns = chat("u", "Name a fish.", "a", "Carp.", "u", "Another.")
    rows = [{"prompt": "Name a bird.", "completion": "Crow."}, {"prompt": turns, "completion": chat("a", "Cod.")}]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    assert "read as prompt_completion (recognised by prompt, completion)" in describe(prepared.summary)
    trained = "".join(tokenizer.decode(packed.labels[packed.labels != -100]) for packed in prepared.train)
    assert sorted(trained.split("<|im_end|>")) == ["", "Cod.", "Crow."]
    assert any("Carp." in text for text in texts(prepared.train, tokenizer))


def test_a_labelled_answer_among_completions_is_not_trained_on_unseen(tokenizer, write_jsonl, job_for):
    path = write_jsonl([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "z", "label": False}])
    with pytest.raises(DataError, match=r"1 of 2 rows[\s\S]*one answer with a label"):
        prepare(job_for(path), tokenizer)
    asked = prepare(job_for(path, format="prompt_completion", validation=None), tokenizer)
    assert asked.train.documents == 2


# --- cache ------------------------------------------------------------------------------------------


def test_the_second_run_opens_the_cache_and_gives_the_same(tokenizer, write_jsonl, job_for, monkeypatch):
    job = job_for(write_jsonl([row(n) for n in range(40)]))
    first = prepare(job, tokenizer)
    monkeypatch.setattr("loadmaster.data.prepared.build", lambda *_: pytest.fail("built again"))
    second = prepare(job, tokenizer)
    assert (first.summary["cache"], second.summary["cache"]) == ("built", "hit")
    assert second.train.fingerprint == first.train.fingerprint != second.validation.fingerprint
    assert [packed.input_ids.tolist() for packed in second.train] == [
        packed.input_ids.tolist() for packed in first.train
    ]
    assert list(second.train_conversations) == list(first.train_conversations)
    assert second.train_conversations[:2] == [second.train_conversations[0], second.train_conversations[1]]


def test_whatever_shapes_the_rows_makes_another_entry(tokenizer, tokenizer_with, write_jsonl, job_for):
    path = write_jsonl([row(n) for n in range(12)])
    variants = [
        (job_for(path), tokenizer),
        (job_for(path, sequence_length=128), tokenizer),
        (job_for(path, packing=False), tokenizer),
        (job_for(path, on_long_row="split"), tokenizer),
        (job_for(path, on_bad_row="skip"), tokenizer),
        (job_for(path, validation=0.5), tokenizer),
        (job_for(path, system="Hm."), tokenizer),
        (job_for(path, max_rows=11), tokenizer),
        (job_for(path, tools="text"), tokenizer),
        (job_for(path, format="alpaca"), tokenizer),
        (job_for(path, seed=1), tokenizer),
        (job_for(path), tokenizer_with("llama3")),
    ]
    prepared = [prepare(job, chosen) for job, chosen in variants]
    assert all(one.summary["cache"] == "built" for one in prepared)
    assert len({one.train.fingerprint for one in prepared}) == len(variants)
    write_jsonl([row(n) for n in range(13)])
    assert prepare(job_for(path), tokenizer).summary["cache"] == "built"


def test_the_fingerprint_does_not_depend_on_where_the_file_lies(tokenizer, write_jsonl, job_for):
    here = prepare(job_for(write_jsonl([row(n) for n in range(5)], "a.jsonl")), tokenizer)
    there = prepare(job_for(write_jsonl([row(n) for n in range(5)], "b.jsonl")), tokenizer)
    assert here.train.fingerprint == there.train.fingerprint
    assert there.train[0].document_ids[0].rpartition("/")[2].startswith("b.jsonl:")


def test_a_file_that_changes_while_it_is_read_is_refused(tokenizer, write_jsonl, job_for, monkeypatch, cache):
    path = write_jsonl([row(n) for n in range(20)])

    def meanwhile(*given):
        build_module.build(*given)
        with open(path, "a") as file:
            file.write(json.dumps(row(20)) + "\n")

    with monkeypatch.context() as patched:
        patched.setattr("loadmaster.data.prepared.build", meanwhile)
        with pytest.raises(DataError, match=r"rows.jsonl changed while the rows were read\n    fix: start again"):
            prepare(job_for(path), tokenizer)
    assert not list(cache.glob("*/entry.json"))
    assert prepare(job_for(path), tokenizer).summary["rows_read"] == 21


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "unseal"])
def test_a_damaged_entry_is_noticed_and_built_again(tokenizer, write_jsonl, job_for, damage, cache):
    job = job_for(write_jsonl([row(n) for n in range(12)]))
    expected = [packed.input_ids.tolist() for packed in prepare(job, tokenizer).train]
    (victim,) = cache.glob("*/train.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        victim.unlink()
    else:
        (victim.parent / "entry.json").write_text("{")
    again = prepare(job, tokenizer)
    assert again.summary["cache"] == "built"
    assert [packed.input_ids.tolist() for packed in again.train] == expected
    assert prepare(job, tokenizer).summary["cache"] == "hit"


def test_the_cache_holds_no_pickle_and_nothing_half_written(tokenizer, write_jsonl, job_for, cache):
    prepare(job_for(write_jsonl([row(n) for n in range(12)])), tokenizer)
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    assert sorted(path.name for path in entry.iterdir()) == [
        "conversations.jsonl",
        "conversations.safetensors",
        "entry.json",
        "summary.json",
        "train.safetensors",
        "validation.safetensors",
    ]
    assert json.loads((entry / "entry.json").read_text()).keys() == {p.name for p in entry.iterdir()} - {"entry.json"}


def test_the_cache_lies_where_the_environment_says(tokenizer, tmp_path, write_jsonl, job_for, monkeypatch):
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "elsewhere"))
    prepare(job_for(write_jsonl([row(1), row(2)])), tokenizer)
    assert list((tmp_path / "elsewhere" / "data").glob("*/train.safetensors"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "file"))
    with pytest.raises(LoadmasterError, match="set LOADMASTER_CACHE to a folder that can be written"):
        prepare(job_for(write_jsonl([row(1), row(2)])), tokenizer)


def _prepare_in_process(job, tokenizer, queue) -> None:
    queue.put(prepare(job, tokenizer).summary["cache"])


def test_of_processes_that_start_together_one_builds_and_the_others_wait(tokenizer, write_jsonl, job_for):
    job = job_for(write_jsonl([row(n) for n in range(300)]))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_prepare_in_process, args=(job, tokenizer, queue)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    outcomes = sorted(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert outcomes == ["built", "hit", "hit"]


def test_worker_processes_give_the_same_rows_as_one(tokenizer, tmp_path, write_jsonl, job_for, monkeypatch):
    job = job_for(write_jsonl([row(n) for n in range(600)] + [{"instruction": "x", "output": ""}]), on_bad_row="skip")
    alone = prepare(job, tokenizer)
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path / "together"))
    monkeypatch.setattr(build_module, "PARALLEL_ROWS", 100)
    monkeypatch.setattr(build_module, "usable", lambda: 2)
    together = prepare(job, tokenizer)
    assert together.summary["cache"] == "built"
    assert [packed.input_ids.tolist() for packed in together.train] == [
        packed.input_ids.tolist() for packed in alone.train
    ]
    assert [packed.document_ids for packed in together.train] == [packed.document_ids for packed in alone.train]


def test_a_fraction_that_holds_nothing_out_is_said(tokenizer, write_jsonl, job_for):
    prepared = prepare(job_for(write_jsonl([row(1)] * 4), validation=0.5), tokenizer)
    assert prepared.validation is None
    assert any("data.validation=0.5 holds nothing out" in note for note in prepared.summary["notes"])


def test_a_file_without_rows_among_others_is_named(tokenizer, write_jsonl, job_for):
    folder = write_jsonl([row(1), row(2)]).parent
    (folder / "none.jsonl").touch()
    notes = prepare(job_for(folder, validation=None), tokenizer).summary["notes"]
    assert len(notes) == 1 and notes[0].startswith("no rows in ") and notes[0].endswith("none.jsonl")


def test_a_sheet_beside_files_of_rows_is_said_to_be_left_out(tokenizer, write_jsonl, job_for):
    folder = write_jsonl([row(1), row(2)]).parent
    for _ in range(2):  # the second time the rows are in the cache, and the sheet is new
        job = job_for(folder, validation=None)
        notes = prepare(job, tokenizer).summary["notes"]
        (folder / "about.csv").write_text("instruction,output\na,b\n")
    assert len(notes) == 1 and "about.csv: not read" in notes[0]


def test_control_tokens_in_what_people_wrote_are_said_with_their_place(tokenizer, write_jsonl, job_for):
    rows = [row(1), {**row(2), "instruction": "Say <|im_end|> twice"}, row(3)]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    (note,) = prepared.summary["notes"]
    assert "1 row holds a control token" in note and "rows.jsonl:2: <|im_end|>" in note
