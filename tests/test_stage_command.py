"""Stage commands given a run directory, or nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.cli import main
from loadmaster.config.compose import read_job
from loadmaster.given_run import checked_run, place_of_run


@pytest.mark.parametrize("stage", ["train", "evaluate", "export", "bundle"])
def test_a_stage_of_nothing_starts_no_job_and_names_what_to_give(stage, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loadmaster.pipeline.run", lambda composed: pytest.fail("a job was started"))
    assert main([stage]) == main([stage, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert f"loadmaster {stage} RUN" in told and f"loadmaster {stage} recipe=smoke" in told
    newest = tmp_path / "runs/smoke/2026-11-30_10-00-00"
    newest.mkdir(parents=True)
    (newest / "stages.json").write_text("{}")
    assert main([stage]) == 2
    assert f"loadmaster {stage} runs/smoke/2026-11-30_10-00-00 goes on with the newest run" in capsys.readouterr().err
    launched = tmp_path / "runs/smoke/2026-11-30_11-00-00"
    launched.mkdir()
    for name in ("stages.json", "launch.json"):  # its run is elsewhere, so this command could not go on with it
        (launched / name).write_text("{}")
    assert main([stage]) == 2
    assert f"loadmaster {stage} runs/smoke/2026-11-30_10-00-00 goes on with the newest run" in capsys.readouterr().err


def test_a_stage_goes_on_with_the_run_that_it_is_given_from_any_folder(tmp_path, monkeypatch):
    here, other = tmp_path / "here", tmp_path / "my other"
    here.mkdir(), other.mkdir()
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "a?", "completion": "b"}) + "\n")
    monkeypatch.chdir(here)
    words = ["recipe=lora_8b", "hardware=h200_x1", "data=file", "data.path=rows.jsonl", "seed=3"]
    assert main(["plan", *words, "run_dir='run,1'"]) == 0
    seen = []
    monkeypatch.setattr("loadmaster.pipeline.run", lambda composed: seen.append((Path.cwd(), composed.job)) or 0)
    monkeypatch.chdir(other)
    assert main(["evaluate", "../here/run,1"]) == main(["export", "../here/run,1", "export=fp8"]) == 0
    assert [folder for folder, _ in seen] == [here, here] and Path.cwd() == other and not list(other.iterdir())
    evaluated, exported = (job for _, job in seen)
    began = read_job(here / "run,1/config.yaml", to_run=False).job
    run_dir = str(here / "run,1")
    assert evaluated == replace(began, run_dir=run_dir, stop_after="evaluate")
    assert exported == replace(evaluated, stop_after="export", export=replace(began.export, formats=["bf16", "fp8"]))


@pytest.mark.parametrize("words, expected", [
    (["recipe=smoke"], None),
    (["runs/smoke/x"], 0),
    (["--dry-run", "~/runs/x", "seed=1"], 1),
    (["--config-dir", "/my/conf", "seed=1"], None),
    (["rank"], None),
    (["~tracker", "+a=b/c", "-x/y"], None),
])
def test_a_folder_is_told_from_settings_and_options(words, expected):
    assert place_of_run(words) == expected


def test_what_is_no_run_directory_is_refused_with_what_would_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bundle", "runs/nope"]) == 2
    assert "runs/nope: there is no such folder; give a run directory" in capsys.readouterr().err
    run = tmp_path / "runs/smoke/one"
    run.mkdir(parents=True)
    (run / "stages.json").write_text("{}")
    assert main(["bundle", "runs"]) == 2
    assert "runs is no run directory: give one of those in it, the newest is runs/smoke/one" in capsys.readouterr().err
    (run / "config.yaml").write_text("seed: 1\n")
    assert checked_run(run) == run
    assert main(["bundle", str(run), "recipe=smoke"]) == 2
    assert f"{run} recipe=smoke: a run has its own settings" in capsys.readouterr().err
    assert main(["bundle", str(run), "launch=runpod"]) == 2
    assert "launch=runpod: a run goes on where it lies; leave launch=runpod out" in capsys.readouterr().err
    for words in (["--config-name=train"], ["-cn", "train"], ["--config-dir", "conf"]):
        assert main(["bundle", *words, str(run)]) == 2
        assert f"{run} {words[0]}: a run has its own settings; give one of the two" in capsys.readouterr().err
    (run / "export/bf16").mkdir(parents=True)
    for part in ("export/bf16", "config.yaml"):
        assert main(["bundle", str(run / part)]) == 2
        assert f"{part} is a part of a run: give the run directory, {run}" in capsys.readouterr().err
    (run / "launch.json").write_text("{}")
    assert main(["bundle", str(run)]) == 2
    assert "is the folder of a launch" in capsys.readouterr().err


@pytest.fixture
def planned_run(tmp_path, monkeypatch) -> Path:
    """A run that was planned in tmp_path, with a path that is relative to it; the test is in another folder."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a?", "completion": "b"}) + "\n")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["recipe=lora_8b", "hardware=h200_x1", "data=file", "data.path=rows.jsonl", "lora.rank=8"]
    assert main(["plan", *words, "run_dir='out/lora.rank=8'"]) == 0
    monkeypatch.chdir(tmp_path / "other")
    return tmp_path / "out/lora.rank=8"


def test_plans_that_are_shown_are_of_the_run_that_is_given(planned_run, capsys):
    before = (planned_run / "plan.json").read_bytes()
    capsys.readouterr()
    assert main(["plan", str(planned_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before)
    assert main(["plan", "--json", str(planned_run), "hardware=l40s_x1"]) == 0
    assert json.loads(capsys.readouterr().out)["hardware"]["gpu"] == "l40s"
    assert main(["plan", str(planned_run), "--nodes", "1,2"]) == 0
    assert "would pay up to 2 nodes" in capsys.readouterr().out
    assert main(["plan", str(planned_run), "--compare", "hardware=l40s_x1,h200_x1"]) == 0
    assert "l40s_x1" in capsys.readouterr().out
    assert (planned_run / "plan.json").read_bytes() == before


def test_a_run_whose_settings_are_damaged_or_cut_off_is_not_gone_on_with(planned_run, monkeypatch, capsys):
    """Cut off, it would go on by the defaults of what is lost: other formats, another server."""
    monkeypatch.setattr("loadmaster.pipeline.run", lambda composed: pytest.fail("a job was started"))
    file = planned_run / "config.yaml"
    whole = file.read_bytes()
    cut = [whole[: whole.index(section)] for section in (b"formats:", b"endpoint:", b"tracker:")]
    for damaged in (*cut, b"", b"3", b"[1]", b"text", b"seed: \0", b"\xff"):
        file.write_bytes(damaged)
        for command in (["bundle"], ["plan", "--json"]):
            assert main([command[0], str(planned_run), *command[1:]]) == 2, damaged[-20:]
            said = capsys.readouterr().err
            assert f"in {file}" in said and "fix: the command that began the run writes it" in said
    file.write_bytes(whole)
    assert main(["plan", str(planned_run), "--json"]) == 0


def test_a_run_behind_a_link_or_in_a_folder_named_as_a_setting_keeps_its_own_place(planned_run, monkeypatch):
    seen = []
    monkeypatch.setattr("loadmaster.pipeline.run", lambda composed: seen.append(composed.job.run_dir) or 0)
    Path("link").symlink_to(planned_run)
    for given in ("link", "../out/lora.rank=8"):
        assert main(["train", given]) == 0
    assert seen == 2 * [str(planned_run)]


def test_a_sweep_over_a_run_is_told_what_gives_each_job_a_folder(planned_run, capsys):
    assert main(["plan", str(planned_run), "--multirun", "seed=1,2"]) == 2
    assert "run_dir=auto: each job then gets its own" in capsys.readouterr().err


def test_of_a_group_that_is_given_twice_over_a_run_the_last_one_counts(planned_run, capsys):
    for words in (["hardware=a100_80gb_x1", "hardware=l40s_x1"], ["hardware=a100_80gb_x1", "+hardware=l40s_x1"]):
        capsys.readouterr()
        assert main(["plan", str(planned_run), "--json", *words]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["hardware"]["gpu"] == "l40s"
        assert said.err == "note: hardware is given as a100_80gb_x1 and l40s_x1: the last one counts\n"
    words = ["hardware=l40s_x1", "--compare", "hardware=a100_80gb_x1,h200_x1"]
    assert main(["plan", str(planned_run), *words]) == 0
    assert "h200" in capsys.readouterr().out


def test_a_path_over_a_run_counts_from_where_it_is_typed(planned_run, monkeypatch):
    seen = []
    monkeypatch.setattr("loadmaster.pipeline.run", lambda composed: seen.append(composed.job.data.path) or 0)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "c?", "completion": "d"}) + "\n")
    for path in ("rows.jsonl", "../other/rows.jsonl", "../rows.jsonl", "shipped:tickets/train.jsonl"):
        assert main(["train", str(planned_run), f"data.path={path}"]) == 0
    other, own = str(Path("rows.jsonl").absolute()), str(Path("../rows.jsonl").resolve())
    assert seen == [other, other, own, "shipped:tickets/train.jsonl"]
    Path("rows.jsonl").unlink()
    assert main(["train", str(planned_run), "data.path=rows.jsonl"]) == 0 and seen[-1] == "rows.jsonl"
