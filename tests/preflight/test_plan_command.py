"""`loadmaster plan` as programs and people call it."""

from __future__ import annotations

import datetime
import gzip
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import islice

import pytest
from datasets import Dataset
from rich.console import Console

from loadmaster.cli import STAGE_HELP, _parser, main
from loadmaster.config.compose import compose
from loadmaster.data.reading import first_conversation
from loadmaster.data.tokens import answers
from loadmaster.dataset_size import dataset_tokens
from loadmaster.preflight import make_plan, print_plan
from loadmaster.preflight.dataset import text_tokens

ASKED = ["recipe=lora_8b", "hardware.gpu=h100_80gb", "hardware.count=1"]


def test_more_rows_than_can_be_counted_are_all_rows():
    asked, _ = _parser().parse_known_args(["data", "--rows", "9" * 30])
    assert list(islice("abc", asked.rows)) == ["a", "b", "c"]


@pytest.mark.parametrize("rows", ["-1", "-3", "1.5", "many"])
def test_a_number_of_rows_to_show_that_is_none_is_refused(rows: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["data", "--rows", rows])
    assert ended.value.code == 2
    assert f"argument --rows: '{rows}' is no number of rows: 0 or more" in capsys.readouterr().err


def test_json_is_the_plan_and_nothing_else_and_writes_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *ASKED, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True and plan["model"]["name"].startswith("meta-llama") and not list(tmp_path.iterdir())


def test_json_keeps_the_exit_codes(capsys) -> None:
    assert main(["plan", *ASKED, "--json", "micro_batch_size=16", "activation_checkpointing=none"]) == 3
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert main(["plan", *ASKED, "--json", "method=lorra"]) == 2
    seen = capsys.readouterr()
    assert seen.out == "" and "lora" in seen.err


def test_nodes_print_a_table_and_write_nothing(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "recipe=full_70b", "hardware=h100_80gb_x8", "--nodes", "1..4"]) == 0
    assert "efficiency" in capsys.readouterr().out and not list(tmp_path.iterdir())
    assert main(["plan", *ASKED, "--nodes", "4..1"]) == 2


def test_a_plan_does_not_take_another_last_stage_in_silence(capsys) -> None:
    assert main(["plan", *ASKED, "stop_after=train"]) == 2
    assert "loadmaster train" in capsys.readouterr().err


def test_prices_of_gpus_that_the_catalogue_does_not_know_are_refused(capsys) -> None:
    assert main(["plan", *ASKED, "--json", "plan.prices_usd_per_hour={h100: 2.5}"]) == 2
    assert "h100_80gb" in capsys.readouterr().err


def test_what_only_the_plan_can_refuse_is_located_too(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["--json"], [], ["--compare", "seed=1,2"], ["--nodes", "1,2"]):
        assert main(["plan", *ASKED, "lora.targets=[q_prj]", *arguments]) == 2
        assert "lora.targets = [q_prj]   on the command line" in capsys.readouterr().err


def test_what_memory_has_no_part_in_is_not_called_a_want_of_memory(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *ASKED[:2], "hardware.count=3"]) == 3
    seen = capsys.readouterr()
    assert "cannot run as asked: batch.global_size=16 does not divide over 3 GPUs; use batch.global_size=18" in seen.out
    set_at = r"batch.global_size=16 \(\S*recipes/lora_8b.yaml:\d+\)"
    assert re.search(rf"error: {set_at} does not divide over 3 GPUs; use batch.global_size=18;", seen.err)
    assert "nothing fits" not in seen.err
    assert "- the catalogue knows no 3x h100_80gb to rent" in seen.out  # which is priced below as what would fit


@pytest.mark.parametrize("written, works", [
    (["hardware.count=6"], 18),
    (["hardware.count=3", "micro_batch_size=4"], 24),
    (["hardware.count=8", "hardware.nodes=3"], 24),
])
def test_a_batch_that_does_not_divide_is_shown_with_one_that_does_and_those_words_work(
    written, works, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["plan", *ASKED[:2], *written]
    assert main([*asked, "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)
    rows = plan["micro_batch_size"] * plan["gradient_accumulation_steps"]
    assert rows * plan["hardware"]["count"] * plan["hardware"]["nodes"] == works
    assert plan["planned_with"] == f"batch.global_size={works}" and plan["fits"] is False
    assert main([*asked, f"batch.global_size={works}", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["planned_with"] is None
    assert (other["memory_gib"], other["sharding"]) == (plan["memory_gib"], plan["sharding"])
    assert main(asked) == 3
    told = capsys.readouterr()
    verdict, said, settings = told.out.splitlines()[1:4]
    assert f"use batch.global_size={works}" in verdict and said == f"with batch.global_size={works} it is"
    assert settings.startswith("lora, ") and f"use batch.global_size={works};" in told.err


def test_what_is_refused_whatever_its_memory_shows_no_memory(capsys, tmp_path, monkeypatch) -> None:
    for word in ("precision=fp32", "sharding=ddp"):
        folder = tmp_path / word
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert main(["plan", *ASKED, word]) == 3
        told = capsys.readouterr()
        assert "cannot run as asked" in told.out and "would fit: " in told.out and "peaks in GiB" not in told.out
        assert "; what would fit is in " in told.err and "nearest" not in told.err
        (report,) = (path.read_text() for path in folder.rglob("report.html"))
        assert f"<b>It cannot run as asked</b>: {word}" in report and "came nearest; what" not in report
    assert main(["plan", *ASKED[:2], "--compare", "hardware.count=1,6"]) == 0
    one, six = capsys.readouterr().out.splitlines()[1:3]
    assert "batch.global_size=18" in six and "batch.global_size" not in one


def test_a_file_that_is_not_here_is_why_nobody_knows_how_long_it_takes(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    assert main(["plan", *ASKED, "data=file", "data.path=[a.jsonl,b.jsonl]"]) == 0
    said = "how much a.jsonl, b.jsonl holds is not known here, where there is no b.jsonl; max_steps would say it"
    assert said in capsys.readouterr().out


def test_hours_of_verification_are_named_where_they_are_most_of_a_run(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "recipe=qlora_70b", "hardware=h100_80gb_x1", "plan.objective=cost"]) == 0
    assert "h of them moving layers to verify exports: fewer with fewer export.formats, none" in capsys.readouterr().out
    job = compose(["recipe=qlora_70b", "hardware=h100_80gb_x1", "plan.objective=cost", "stop_after=train"]).job
    print_plan(make_plan(job, 100_000), Console())  # which has none of them in its hours
    assert "h of them moving layers" not in capsys.readouterr().out
    assert main(["plan", *ASKED]) == 0
    assert "h of them moving layers" not in capsys.readouterr().out


def test_rows_are_said_as_those_of_the_runners_up_are(capsys) -> None:
    plan = replace(make_plan(compose(ASKED).job), sequence_length=2048)
    expected = {(4, 2): "4 rows of 2048 tokens at a time, 2 times a step", (1, 1): "1 row of 2048 tokens at a time"}
    for (rows, times), said in expected.items():
        print_plan(replace(plan, micro_batch_size=rows, gradient_accumulation_steps=times), Console(width=200))
        assert capsys.readouterr().out.splitlines()[1].endswith(f", {said}")


def test_what_does_not_fit_has_no_speed_no_hours_and_no_price(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_l40s = ["plan", "recipe=lora_8b", "hardware=l40s_x1"]
    assert main([*on_l40s, "--compare", "sequence_length=2048,2000000"]) == 0
    fits, does_not = capsys.readouterr().out.splitlines()[1:3]
    assert "0.79" in fits.split() and does_not.rstrip().endswith(" of 43.1")
    for machine in ("hardware=l40s_x1", "hardware=cpu"):  # the card is known, so nothing is said of the catalogue
        assert main(["plan", "recipe=lora_8b", machine, "precision=auto", "sequence_length=2000000"]) == 3
        verdict = capsys.readouterr().out.partition("would fit")[0]
        assert "not predicted" not in verdict and "tokens/s" not in verdict and "$" not in verdict


def test_a_speed_that_is_not_predicted_is_not_laid_to_a_card_that_is_known(capsys) -> None:
    plan = replace(make_plan(compose(ASKED).job), tokens_per_second=None, hours=None, cost_usd=None)
    print_plan(plan, Console())
    assert "not predicted, that of the model's experts is not modelled" in capsys.readouterr().out
    print_plan(replace(plan, hardware=replace(plan.hardware, gpu="GTX 1080")), Console())
    assert "not predicted, the card is not in the catalogue" in capsys.readouterr().out
    print_plan(replace(plan, tokens_per_second=0.0), Console())
    assert "less than 1 token/s" in capsys.readouterr().out


def test_what_no_processor_does_is_not_tried_as_a_remedy(capsys) -> None:
    mixture = ["recipe=lora_8b", "hardware=cpu", "precision=fp32", "export=bf16", "model.name=Qwen/Qwen3-30B-A3B"]
    assert main(["plan", *mixture, "lora.targets=all-linear", "--json"]) == 3
    assert "mixture of experts" in json.loads(capsys.readouterr().out)["reasons"][0]


def test_the_doctor_of_a_machine_without_a_gpu_speaks_of_none_in_one_column(capsys, monkeypatch) -> None:
    monkeypatch.setattr("loadmaster.preflight.hardware.local_gpus", lambda: [])
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["device", "the", "CPU,", "host"] and " each" not in lines[0]
    assert {len(line) - len(line.split(maxsplit=1)[1]) for line in lines} == {15}


def test_words_that_a_command_does_not_know_are_refused(capsys) -> None:
    assert main(["prices", "recipe=smoke"]) == 2
    assert "prices does not know recipe=smoke; --help says what it takes" in capsys.readouterr().err
    assert main(["doctor", "recipe=smoke"]) == 2
    assert "launch/torchrun.py -m loadmaster.cli doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plna"], "there is no 'plna'; did you mean plan?"),
        (["endpoint", "lst"], "there is no 'lst'; did you mean list?"),
        (["zzz"], "choose from"),
        (["report", "runs/x"], "the run's command, given again, writes report.html"),
        (["resume"], "goes on from the newest checkpoint"),
    ],
)
def test_a_command_that_is_misspelt_is_told_the_nearest(words: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)
    assert raised.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(("words", "listed"), [([], ("plan", "verify", "doctor")), (["endpoint"], ("list", "scale"))])
def test_without_a_command_there_is_the_list_of_them(words, listed: tuple[str, ...], capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as raised:
        main(words)
    said = capsys.readouterr().err
    assert raised.value.code == 2 and all(f"\n    {name} " in said for name in listed)
    assert "required" not in said and "    ..." not in said and max(map(len, said.splitlines())) <= 80


def test_each_stage_in_the_list_of_commands_says_what_it_does_by_itself() -> None:
    assert not any(text.startswith("...") or text[0].isupper() for text in STAGE_HELP.values())


@pytest.mark.parametrize("stage", STAGE_HELP)
def test_the_help_of_a_stage_names_the_options_that_it_takes(stage: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([stage, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for option in ("--multirun, -m", "--cfg job", "--info", "--config-dir", "--config-name", "--resolve"):
        assert option in text
    assert ("--compare" in text) == (stage == "plan") != ("--dry-run" in text)  # a plan needs no machine


@pytest.mark.parametrize("option", [["--info"], ["--cfg", "job"], ["-c", "job", "--resolve"]])
def test_a_stage_is_looked_at_as_train_py_is(option: list[str]) -> None:
    asked = [sys.executable, "-m", "loadmaster", "plan", "lora.rank=3", *option]  # --info is said through logging
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0 and "rank: 3" in done.stdout


def test_a_comparison_plans_what_a_plan_by_itself_does_though_its_export_will_not_pass(capsys) -> None:
    asked = ["plan", "recipe=lora_8b", "model=llama2_13b", "endpoint.max_model_len=8192"]
    assert main([*asked, "hardware=h200_x1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert any("the export will not pass" in reason for reason in plan["reasons"])
    assert main([*asked, "--compare", "hardware=l40s_x1,h200_x1"]) == 0
    assert f"{plan['tokens_per_second']:,.0f}" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [["--compare", "hardware=l40s_x1,h200_x1"], ["--nodes", "1,2"]])
def test_plans_side_by_side_are_not_traced_and_say_so(flag, capsys) -> None:
    assert main(["plan", "recipe=lora_8b", "hardware=h100_80gb_x8", "plan.trace=true", *flag]) == 2
    assert f"{flag[0]} counts plans and traces none" in capsys.readouterr().err


def test_a_comparison_is_of_the_values_of_one_key(capsys) -> None:
    assert main(["plan", "recipe=full_70b", "--compare", "hardware=rtx4090_x1,l40s_x1"]) == 3
    assert "full, bf16, adafactor" in capsys.readouterr().out  # not in one precision everywhere
    assert main(["plan", "--compare", "l40s_x1"]) == 2
    assert "--compare hardware=l40s_x1,h200_x1" in capsys.readouterr().err
    assert main(["plan", *ASKED, "--compare", "lora.targets=all-linear,[q_proj,v_proj]"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()  # each row says the value that it is of
    assert heading.startswith("lora.targets") and [row.split()[0] for row in rows] == ["all-linear", "[q_proj,v_proj]"]


@pytest.mark.parametrize("other", [["--nodes", "1,2"], ["--compare", "seed=1,2"]])
def test_plans_are_shown_in_one_way_at_a_time(other: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *ASKED, "--json", *other])
    assert ended.value.code == 2 and f"--json and {other[0]}: one of them at a time" in capsys.readouterr().err


def test_more_tokens_than_the_model_knows_are_named(capsys) -> None:
    asked = ["plan", "model=smollm2_135m", "hardware=l40s_x1", "--json"]
    assert main([*asked, "sequence_length=9000"]) == 0
    said = json.loads(capsys.readouterr().out)["reasons"]
    assert any("rows of 9,000 tokens are longer than the 8,192 that the model knows" in reason for reason in said)
    assert main([*asked, "endpoint.max_model_len=9000"]) == 0
    said = json.loads(capsys.readouterr().out)["reasons"]
    assert any("endpoint.max_model_len: requests of 9,000 tokens" in reason for reason in said)


def test_a_wrong_word_is_said_before_torch_is_imported() -> None:
    code = "import sys; from loadmaster.cli import main; print(main(['data', 'lora.rnk=8']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"] and "lora.rank=8" in done.stderr


@pytest.mark.parametrize(("name", "content"), [("rows.jsonl", ""), ("rows.json", "[]"), ("rows.csv", "text\n")])
def test_data_without_rows_are_refused_by_the_plan_too(name, content, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    for words in (["data=file", f"data.path={name}"], ["data=tickets", f"data.validation={name}"]):
        assert main(["plan", *words]) == 2
        assert f"the data has no rows: {name}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no run directory


@pytest.mark.parametrize("words", [
    ["data.path=packed.jsonl"], ["data.path=[a/dataset,packed.jsonl]"],
    ["data.path=rows.jsonl", "data.validation=packed.jsonl"],
])
def test_files_that_no_reader_reads_are_refused_by_the_plan_too(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 30)
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert main(["plan", "data=file", *words]) == 2
    assert "packed.jsonl is packed by gzip\n    fix: unpack it first" in capsys.readouterr().err
    dataset_tokens(compose(["data=file", *words, "data.on_bad_row=skip"]).job)  # which leaves the file out


PAIR, CHAT = {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "completion": "a"}


@pytest.mark.parametrize(("words", "said"), [
    ([], "data.path: pairs.jsonl:1 has chosen and rejected: a preference row\n    fix: train on pairs with objective="),
    (["objective=kto", "data.path=[pairs.jsonl,labels.jsonl]"], ""),  # training's to say
    (["objective=dpo"], ""), (["data.on_bad_row=skip"], ""), (["data.path=a/hub_dataset"], ""),
    (["objective=dpo", "data.path=chats.csv"], "data.path: chats.csv:2 is no preference row: objective=dpo needs"),
    (["objective=dpo", "data.path=chats.json"], "data.path: chats.json:2 is no preference row"),
    (["objective=dpo", "data.validation=chats.csv"], "data.validation: chats.csv:2 is no preference row"),
    (["objective=orpo", "data.path=labels.jsonl"], "is one answer with a label, and objective=orpo compares two"),
    (["data.path=labels.jsonl"], "is one answer with a label, which objective=kto trains on"),
    (["data.path=renamed.jsonl", "data.columns={chosen: good, rejected: bad}"], "a preference row"),
    (["data.path=renamed.jsonl"], ""), (["data.path=broken.jsonl"], ""),
])
def test_rows_that_the_objective_does_not_train_on_are_told_by_the_plan(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labelled, other = {**CHAT, "label": True}, {"prompt": "p", "good": "a", "bad": "b"}
    for name, row in {"pairs": PAIR, "labels": labelled, "renamed": other}.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 30)
    (tmp_path / "chats.csv").write_text("prompt,completion\n" + "p,a\n" * 30)
    (tmp_path / "chats.json").write_text(json.dumps([CHAT] * 30, indent=0))
    (tmp_path / "broken.jsonl").write_text('{"nothing": 1}\n' * 30)
    code = main(["plan", "--json", "data=file", "data.path=pairs.jsonl", *words])
    assert code == (2 if said else 0) and said in capsys.readouterr().err


def test_a_plan_does_not_read_a_large_array_for_its_first_row(tmp_path, monkeypatch) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR] * 30_000))
    monkeypatch.setattr("loadmaster.data.readers._read_array", None)
    assert main(["plan", "--json", "data=file", f"data.path={tmp_path}/pairs.json"]) == 0


def test_files_that_are_read_are_what_hours_are_planned_for(tmp_path) -> None:
    def tokens() -> int | None:
        return dataset_tokens(compose(["data=file", f"data.path={tmp_path}"]).job)

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.jsonl").write_text('{"text": "a"}\n' * 30)
    both = tokens()
    (tmp_path / "sheet.csv").write_text("text\n" * 100)
    assert tokens() == both == round(2 * 30 * (1 / 5.1 + 1))  # a letter, and what ends a text
    elsewhere = compose(["data=file", "data.path=elsewhere.jsonl", "stop_after=plan"]).job
    assert dataset_tokens(elsewhere) is None


def test_a_file_that_is_named_twice_is_planned_for_twice(tmp_path) -> None:
    (file := tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 30)
    once, twice = (compose(["data=file", f"data.path={paths}"]).job for paths in (file, f"[{file},{file}]"))
    assert dataset_tokens(twice) == pytest.approx(2 * dataset_tokens(once), abs=1)


@pytest.mark.parametrize("words", [[], ["data.max_rows=5"], ["data.columns={prompt: q}"], ["data.format=messages"]])
def test_rows_that_cannot_be_trained_on_are_planned_for_as_they_are(words, tmp_path) -> None:
    lines = ("null", "[1]", "{", '{"messages": [{"role": 1}]}', '{"prompt": 1, "completion": null}',
             '{"\\ud800": "\\ud800"}')
    (file := tmp_path / "rows.jsonl").write_text("\n".join(lines))
    assert 1 <= dataset_tokens(compose(["data=file", f"data.path={file}", *words]).job) <= file.stat().st_size


SHORT = {"prompt": "Where is my parcel?", "completion": "On its way to you."}
JUDGED = {"prompt": "Where is my parcel, that should have been here on Monday? " * 5, "chosen": "On its way.",
          "rejected": "Nowhere."}  # fmt: skip


@pytest.mark.parametrize(("row", "name", "words"), [
    (SHORT, "rows.csv", []), (SHORT, "rows.jsonl", []), (SHORT, "rows.json", []),
    (SHORT, "rows.csv", ["data.system='" + "Answer in the words of the house. " * 20 + "'"]),
    (SHORT, "rows.csv", ["data.max_rows=1000"]),
    (JUDGED, "rows.jsonl", ["objective=dpo"]),
    ({"Asked": SHORT["prompt"], "Said": SHORT["completion"]}, "rows.csv",
     ["data.columns={prompt: Asked, completion: Said}"]),
    ({"messages": [{"role": role, "content": "A word or two about this. " * 20} for role in ("user", "assistant")]},
     "rows.jsonl", []),
])  # fmt: skip
def test_what_templates_and_pairs_add_is_planned_for(row, name, words, tmp_path, tokenizer) -> None:
    rows, file = [row] * 1000, tmp_path / name
    if file.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(file))
    else:
        lines = "".join(json.dumps(each) + "\n" for each in rows)
        file.write_text(json.dumps(rows) if file.suffix == ".json" else lines)
    job = compose(["data=file", f"data.path={file}", "data.validation=null", *words]).job
    texts = [tokenizer.apply_chat_template(each.messages, tokenize=False) for each in answers(first_conversation(job))]
    assert dataset_tokens(job) == pytest.approx(1000 * sum(len(ids) for ids in tokenizer(texts).input_ids), rel=0.25)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_rows_that_are_left_out_are_not_planned_for(name, tmp_path) -> None:
    rows, file = [{"text": "a word or two " * (1 + i % 3)} for i in range(3000)], tmp_path / name
    day = datetime.date(2026, 11, 30)  # which JSON does not hold
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write = "to_csv" if file.suffix == ".csv" else "to_parquet"
        dated = [{**row, "day": day} for row in rows] if file.suffix == ".parquet" else rows
        getattr(Dataset.from_list(dated), write)(str(file))

    def tokens(most: int | str) -> int | None:
        return dataset_tokens(compose(["data=file", f"data.path={file}", f"data.max_rows={most}"]).job)

    each = sum(text_tokens(row["text"]) + 1 for row in rows) / 3000
    assert tokens(30) == pytest.approx(30 * each, rel=0.02)
    assert tokens(2000) == pytest.approx(2000 * each, rel=0.02)
    assert tokens(9000) == tokens("null") == pytest.approx(3000 * each, rel=0.02)
