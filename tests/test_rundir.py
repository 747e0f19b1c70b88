"""What a run directory keeps, forgets and removes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from loadmaster.cli import main
from loadmaster.errors import ConfigError, LoadmasterError
from loadmaster.rundir import RunDir, file_fingerprint, is_at_work, newest_in, started_in


def test_only_what_this_process_made_is_discarded(tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "mine").touch()
    for name, made in (("old", False), ("new/recipe/run", True)):
        run = RunDir(tmp_path / "runs" / name, "a")
        with run.locked():
            assert run.discard() is made
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["old"]
    assert (tmp_path / "runs" / "old" / "mine").exists()


def test_a_run_is_at_work_while_its_process_holds_it(tmp_path: Path) -> None:
    assert not is_at_work(tmp_path)
    with RunDir(tmp_path, "a").locked():
        assert is_at_work(tmp_path)
    assert not is_at_work(tmp_path)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "logs/rank-1.log"])
def test_a_run_does_not_wait_for_a_pipe_in_the_place_of_a_file_that_it_writes(tmp_path: Path, name: str) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / name)
    assert not is_at_work(tmp_path)
    with pytest.raises(LoadmasterError, match=f"{name} is no regular file"), RunDir(tmp_path, "a").locked():
        pass


def test_stages_are_done_for_what_they_were_made_from_and_for_their_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "a")
    run.claim()
    run.mark_done("plan", "x", 1.5)
    run.mark_done("train", "y", 2.5)
    run.update_result(steps=3)
    run.claim()
    assert run.is_done("plan", "x") and not run.is_done("plan", "y") and run.result() == {"steps": 3}
    assert run.seconds_by_stage() == {"plan": 1.5, "train": 2.5}
    run.forget("train")
    assert run.seconds_by_stage() == {"plan": 1.5}
    RunDir(tmp_path, "b").claim()
    assert not run.is_done("plan", "x") and run.result() == {}


def test_runs_of_one_second_have_folders_of_their_own_and_the_newest_is_found(tmp_path: Path) -> None:
    runs = []
    for identity in "abc":
        run = RunDir.choose("auto", "smoke", identity, tmp_path)
        run.path.mkdir(parents=True)
        run.claim()
        os.utime(run.path / "stages.json", (5, 9 - len(runs)))
        runs.append(run.path)
    assert len(set(runs)) == 3
    assert newest_in(tmp_path) == newest_in(tmp_path / "smoke") == runs[0] and newest_in(runs[0] / "none") is None
    (runs[2] / "adapter").mkdir()
    assert newest_in(tmp_path, holds=("adapter", "model")) == runs[2] and newest_in(tmp_path, holds=("export",)) is None


@pytest.mark.parametrize(("command", "made", "said"), [
    (["chat"], "adapter", "the newest that was trained is"), (["chat"], "model", "the newest that was trained is"),
    (["verify"], "export", "the newest run of that recipe with an export is"),
    (["push", "--repo", "a/b"], "export", "the newest run of that recipe with an export is"),
    (["serve-check"], "export", "the newest run of that recipe with an export is"),
    (["deploy"], "bundle", "the newest run of that recipe with a bundle is"),
])
def test_where_a_recipe_is_named_for_a_run_its_newest_that_will_do_is_told(
    command, made, said, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("2026-01-01", "2026-01-02"):
        folder = Path("runs/smoke") / name
        folder.mkdir(parents=True)
        (folder / "stages.json").write_text("{}")
    told = f"{said} runs/smoke/2026-01-01"
    for recipe in ("smoke", "other", "x" * 300):
        main([command[0], recipe, *command[1:]])
        assert told not in capsys.readouterr().err  # a plan alone
    Path("runs/smoke/2026-01-01", made).mkdir()
    for recipe in ("smoke", "recipe=smoke"):
        assert main([command[0], recipe, *command[1:]]) != 0
        assert told in capsys.readouterr().err


def test_a_folder_s_fingerprint_is_that_of_its_files_and_their_names(tmp_path: Path) -> None:
    found = set()
    for name, text in (("a", "1"), ("a", "2"), ("sub/b", "2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        found |= {file_fingerprint(tmp_path), file_fingerprint(tmp_path / name)}
    assert len(found) == 5  # the last file is like the one before


@pytest.mark.parametrize("record", ['{"plan": 3}', '{"plan": {}}', '["plan"]'])
def test_of_stages_that_are_no_record_nothing_is_known(record: str, tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(f'{{"identity": "i", "started_in": "{"x" * 5000}", "stages": {record}}}')
    run = RunDir.choose(str(tmp_path), "smoke", "i")
    assert not run.is_done("plan", "hash") and set(run.seconds_by_stage().values()) <= {0.0}
    assert started_in(tmp_path) == Path.cwd()


def test_runs_that_may_not_be_looked_into_are_a_problem_of_run_dir(tmp_path: Path, monkeypatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))  # root may look into all

    (tmp_path / "smoke").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ConfigError, match=r"(?s)no run can be kept in .*smoke: permission denied.*run_dir=FOLDER"):
        RunDir.choose("auto", "smoke", "i", tmp_path)


def test_what_a_stopped_stage_took_counts_and_counts_on_when_it_is_done(tmp_path: Path) -> None:
    run = RunDir(tmp_path, "a")
    run.claim()
    run.mark_done("plan", "x", 1.0)
    run.mark_unfinished("train", 60.0)
    assert RunDir(tmp_path, "a").seconds_by_stage() == {"plan": 1.0, "train": 60.0}
    assert not run.is_done("train", "x")
    run.claim()
    run.forget("train")
    run.mark_unfinished("train", 40.0)
    run.mark_done("train", "x", 5.0)
    assert run.seconds_by_stage() == {"plan": 1.0, "train": 105.0}
    run.forget("train")
    run.mark_done("train", "y", 2.0)
    assert run.seconds_by_stage() == {"plan": 1.0, "train": 2.0}
    other = RunDir(tmp_path, "b")
    other.claim()
    assert other.seconds_by_stage() == {}


def test_a_folder_that_may_not_be_entered_is_none_that_paths_count_from(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "stages.json").write_text(json.dumps({"identity": "i", "started_in": str(home)}))
    assert started_in(tmp_path) == home
    monkeypatch.setattr("loadmaster.rundir.os.access", lambda folder, mode: folder != home)  # root may enter any
    assert started_in(tmp_path) == Path.cwd()
