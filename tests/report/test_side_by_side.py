"""Runs side by side: what sets them apart, how far they came, and which did best."""

import fcntl
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from loadmaster.cli import main
from loadmaster.config.compose import compose
from loadmaster.errors import ConfigError
from loadmaster.report.side_by_side import RECENT_STEPS, set_apart, show_runs, show_sweep
from loadmaster.training import metrics


def a_run(folder, stages=("plan", "train", "evaluate"), loss=1.0, before=2.0, steps=(3, 3), **config):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": "mine", "seed": 1, **config}))
    (folder / "stages.json").write_text(json.dumps({"identity": "x", "stages": {stage: {} for stage in stages}}))
    row = {"step": steps[0], "loss": loss, "lr": 1e-4, "tokens": 10, "steps": steps[1]}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    result = {"train_loss": loss + 0.1, "eval_loss": loss, "tokens_per_second": 1234.5, "wall_seconds": {"train": 65.0}}
    (folder / "result.json").write_text(json.dumps(result))
    if "evaluate" in stages:
        sides = {"before": {"held_out": {"loss": before}}, "after": {"held_out": {"loss": loss}}}
        (folder / "eval.json").write_text(json.dumps(sides))
    return folder


def test_a_setting_that_a_terminal_would_obey_is_shown(tmp_path, capsys):
    for number, name in enumerate(("plain", "\x1b[2J")):
        a_run(tmp_path / str(number), model={"name": name})
    show_runs([tmp_path], Console())
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u241b[2J" in said


def test_what_sets_runs_apart_and_what_came_of_each(tmp_path, capsys):
    a_run(tmp_path / "mine/2026-01-01", loss=1.5, optimizer={"lr": 0.001, "name": "adamw"}, run_dir="a")
    a_run(tmp_path / "mine/2026-01-02", loss=1.25, optimizer={"lr": 0.0001, "name": "adamw"}, run_dir="b")
    show_runs([tmp_path], Console())
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "run state train loss held-out loss tokens/s time set otherwise"
    assert lines[1] == "2026-01-01 evaluate done 1.6000 1.5000 1,234 1 min 05 s optimizer.lr=0.001"
    assert lines[2] == "2026-01-02 evaluate done 1.3500 1.2500 1,234 1 min 05 s optimizer.lr=0.0001"
    assert lines[3] == "lowest held-out loss: 1.2500, 2026-01-02"


def test_a_list_among_the_settings_is_shown_and_not_taken_for_markup(tmp_path, capsys):
    a_run(tmp_path / "a", data={"path": ["/here/a.jsonl", "/here/b.jsonl"]}, export={"formats": ["bf16", "fp8"]})
    a_run(tmp_path / "b", data={"path": "c.jsonl"}, export={"formats": ["bf16"]})
    show_runs([tmp_path], Console(width=200))
    said = capsys.readouterr().out
    assert "export.formats=[bf16,fp8]" in said and "data.path=[/here/a.jsonl,/here/b.jsonl]" in said


def wide_runs(tmp_path) -> None:
    for day, path in enumerate(("/a/rather/long/path/to/the/rows/of/one.jsonl", "other.jsonl"), 1):
        run = a_run(tmp_path / f"recipe_{day}/2026-01-0{day}_10-00-00", data={"path": path}, seed=day)
        result = json.loads((run / "result.json").read_text()) | {"peak_allocated_gib": 22.5}
        (run / "result.json").write_text(json.dumps(result | {"rejected_exports": {"adapter": {"passed": False}}}))


def screen(width: int, terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(80, "exports, GiB, tokens/s, train loss"), (100, "exports"), (120, ""), (200, "")],
)
def test_in_a_terminal_runs_take_its_width_and_say_what_has_no_room(tmp_path, width, left_out):
    wide_runs(tmp_path)
    console = screen(width, terminal=True)
    show_runs([tmp_path], console)
    said = console.file.getvalue()
    assert max(len(line) for line in said.splitlines()) <= width
    assert ("no room for" in said) == bool(left_out) and (f"for {left_out}: loadmaster" in said or not left_out)
    words = set(said.split())
    assert {"1.0000", "data.path=/a/rather/long/path/to/the/rows/of/one.jsonl", "data.path=other.jsonl"} <= words
    assert ("22.5" in words) == ("GiB" not in left_out)
    assert len(said.splitlines()) == (3 if width == 200 else 5 + bool(left_out))


def test_in_a_pipe_each_run_is_one_whole_line_without_padding(tmp_path):
    wide_runs(tmp_path)
    console = screen(40, terminal=False)
    show_runs([tmp_path], console)
    heading, *rows = console.file.getvalue().splitlines()
    assert len(rows) == 2 and all("22.5" in row and "adapter failed" in row and " data.path=" in row for row in rows)
    assert all(line == line.rstrip() for line in (heading, *rows)) and len(rows[0]) > len(rows[1])


def test_plans_alone_are_told_by_their_number_unless_asked_for(tmp_path, capsys):
    for name, stages in (("a", ("plan", "train")), ("b", ("plan",)), ("c", ()), ("d", ("plan",))):
        a_run(tmp_path / name, stages, stop_after="plan" if name in "abc" else "train")
        if name != "a":
            (tmp_path / name / "metrics.jsonl").unlink()
    told = "2 plans without training left out: --all shows them too"
    for folders, with_plans, names, says in (
        ([""], False, "ad", True), ([""], True, "abcd", False), (["a", "b"], False, "ab", False),
        (["b", "c"], False, "bc", False),
    ):
        show_runs([tmp_path / name for name in folders], Console(), with_plans)
        said = capsys.readouterr().out
        assert "".join(line[0] for line in said.splitlines() if line[1:2] == " " and line[0] in "abcd") == names
        assert (told in said) is says
    assert main(["runs", str(tmp_path)]) == main(["runs", "--all", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(told) == 1
    for name in "ad":
        shutil.rmtree(tmp_path / name)
    show_runs([tmp_path], Console())
    assert "left out" not in (said := capsys.readouterr().out) and "\nb " in said and "\nc " in said


def test_losses_of_other_held_out_data_are_not_compared(tmp_path, capsys):
    a_run(tmp_path / "a", loss=1.5, before=2.0)
    a_run(tmp_path / "b", loss=1.25, before=2.5)
    show_runs([tmp_path], Console())
    assert "lowest" not in capsys.readouterr().out


def test_losses_of_preferences_are_compared_where_the_rows_and_beta_are_the_same(tmp_path, capsys):
    same = {"objective": "dpo", "preference": {"beta": 0.1}, "data": {"path": "a.jsonl"}}  # log 2 before, of any rows
    for name, other in (("a", {}), ("b", {"seed": 2}), ("c", {"data": {"path": "b.jsonl"}}), ("d", {"preference": {}})):
        a_run(tmp_path / name, before=0.6931, **same | other)
    for folders, told in ((["a", "b"], True), (["a", "c"], False), (["a", "d"], False)):
        show_runs([tmp_path / name for name in folders], Console())
        assert ("lowest" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    "stages, result, words",
    [
        ((), {}, "stopped, step 1 of 3"),
        (("plan",), {"failure": {"stage": "train", "message": "nan"}}, "train failed"),
        (("plan", "train", "evaluate", "export"), {}, "export done"),
    ],
)
def test_how_far_a_run_is(tmp_path, capsys, stages, result, words):
    (a_run(tmp_path / "a", stages, steps=(1, 3)) / "result.json").write_text(json.dumps(result))
    show_runs([tmp_path / "a"], Console())
    assert words in capsys.readouterr().out


def test_a_run_that_a_process_holds_is_running(tmp_path, capsys):
    run = a_run(tmp_path / "a", ("plan",), steps=(1, 3))
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (run / "result.json").write_text('{"wall_seconds": {"plan": 1.0}}')
        row = {"steps": 90, "eval_loss": 9.5, "tokens_per_second": 77.0}
        rows = [{"step": n, "loss": float(n), **row} for n in range(50)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        show_runs([run], Console())
    said = " ".join(capsys.readouterr().out.split())
    assert "running, step 49 of 90 39.5000 9.5000 77 " in said and RECENT_STEPS == metrics.RECENT_STEPS


def test_files_that_are_torn_or_missing_cost_their_own_figures_alone(tmp_path, capsys):
    whole, torn = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    for name in ("result.json", "eval.json", "metrics.jsonl", "config.yaml"):
        (torn / name).write_text('{"train_loss": [')
    a_run(tmp_path / "c", ("plan",))
    for name in ("result.json", "metrics.jsonl", "config.yaml"):
        (tmp_path / "c" / name).unlink()
    show_runs([tmp_path], Console())
    out = capsys.readouterr().out
    assert all(name in out for name in "abc") and "1.0000" in out and whole.name in out


def test_settings_are_written_as_on_a_command_line():
    jobs = ({"targets": ["q", "v"], "dora": True}, {"targets": "all-linear", "dora": False})
    apart = set_apart([{"lora": lora} for lora in jobs])
    assert apart == ["lora.targets=[q,v] lora.dora=true", "lora.targets=all-linear lora.dora=false"]


def test_a_field_that_a_run_does_not_have_is_as_it_was_before_it_came():
    said = ({}, {"load_best": False}, {"load_best": True})
    old, new, taken = ({"checkpoint": {"keep_last": 2, **more}} for more in said)
    assert set_apart([old, new, {}]) == ["", "", ""]
    assert set_apart([{}, old, taken]) == ["", "checkpoint.load_best=false", "checkpoint.load_best=true"]


def test_of_several_recipes_what_they_say_themselves_is_left_out():
    runs = (["recipe=smoke"], ["recipe=qlora_8b", "optimizer.lr=1e-5"], ["recipe=fp8_8b", "optimizer.lr=2e-5"])
    configs = [compose(words).resolved for words in runs]
    assert set_apart(configs[:2])[1] == "recipe=qlora_8b optimizer.lr=1e-05"
    assert [" ".join(words).replace("e-5", "e-05") for words in runs[1:]] == set_apart(configs)[1:]
    for unknown in ("../mine", ["a"], "a b", "smoke,auto", "", None):
        said = set_apart([configs[0], {**configs[1], "recipe": unknown}])[1]
        assert said.startswith("recipe=") and "sequence_length=" in said


def test_of_several_recipes_a_run_on_data_of_its_own_says_its_path_and_what_was_set(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text('{"text": "x"}\n')
    own = ["data=file", f"data.path={path}"]
    runs = (["recipe=smoke"], ["recipe=lora_8b", *own], ["recipe=smoke", *own, "optimizer.lr=0.001"],
            ["recipe=auto", "data.validation=0.05"])
    said = [" ".join(words).replace("data=file ", "") for words in runs]
    assert [set(each.split()) for each in set_apart([compose(list(words)).resolved for words in runs])] == [
        set(each.split()) for each in said
    ]


def test_a_folder_without_runs_is_refused(tmp_path):
    for folder, words in ((tmp_path, "holds no run"), (tmp_path / "x", "is no folder")):
        with pytest.raises(ConfigError, match=words):
            show_runs([folder], Console())


def test_runs_are_one_whichever_way_their_folders_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other"):
        a_run(tmp_path / "mine" / name)
    show_runs([Path("mine"), tmp_path / "mine/other", Path("mine/../mine")], Console())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "one", "other", "lowest"]


def test_where_nothing_was_trained_yet_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0 and capsys.readouterr().out.startswith("no runs yet")
    a_run(tmp_path / "runs/smoke/a")
    assert main(["runs"]) == 0 and "evaluate done" in capsys.readouterr().out


def test_a_sweep_shows_its_own_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    old, new = a_run(tmp_path / "runs/smoke/old"), a_run(tmp_path / "runs/smoke/new")
    os.utime(old / "stages.json", (1, 1))
    jobs = [compose(["recipe=smoke", f"seed={seed}"]).job for seed in (1, 2)]
    show_sweep(jobs, time.time() - 60)
    out = capsys.readouterr().out
    assert "new" in out and "old" not in out
    (new / "metrics.jsonl").unlink()  # planned alone
    show_sweep(jobs, time.time() - 60)
    assert not capsys.readouterr().out
