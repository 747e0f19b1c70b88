"""Tasks of lm-evaluation-harness: the judgement, and the harness as a process; the real one: test_serve_check.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_serve_check import checked, references, serve_as, stand_in  # noqa: F401 (fixtures)

from loadmaster.cli import main
from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked, UsageError
from loadmaster.export.served import harness
from loadmaster.export.served.check import serve_check
from loadmaster.export.served.harness import Asked, Harness, failures
from loadmaster.files import read_json

STAND_IN = """
import json, sys
from pathlib import Path
told = json.loads(Path(sys.argv[3]).read_text())
if "breaks" in told["tasks"]:
    sys.exit("Traceback (most recent call last):\\nConnectionError: no data")
answer = {"tasks": {}}
if "nothing" in told["tasks"]:
    answer = {"unknown": ["nothing"]}
elif told["model_args"] and "silent" not in told["tasks"]:
    folder = Path(told["model_args"]["tokenizer"])
    value = json.loads((folder / "scores").read_text()) if (folder / "scores").is_file() else 0.6
    figure = {"value": value, "stderr": 0.01, "higher_is_better": True, "answers": told["limit"]}
    answer["tasks"]["capitals"] = {"acc,none": figure}
Path(told["result"]).write_text(json.dumps(answer))
"""


def figure(value, higher=True):
    return {"t": {"m,none": {"value": value, "stderr": None, "higher_is_better": higher, "answers": 8}}}


@pytest.mark.parametrize(
    ("before", "after", "higher", "fails"),
    [
        (0.6, 0.55, True, False), (0.6, 0.54, True, True), (0.1, 0.9, True, False), (0.6, float("nan"), True, True),
        (20.0, 20.9, False, False), (20.0, 21.1, False, True), (20.0, 3.0, False, False),
    ],
)
def test_a_figure_that_is_worse_than_the_bases_by_more_than_the_limit_fails(before, after, higher, fails):
    found = failures(figure(before, higher), figure(after, higher), 0.05 + 1e-9)
    assert bool(found) is fails
    if fails:
        assert found[0].startswith(f"task: t m is {after:.4g}, the base has {before:.4g}")


def test_a_task_that_was_not_measured_fails():
    assert failures(figure(0.6), {}, 0.05) == ["task: t m was not measured"]


@pytest.fixture
def stand_in_harness(tmp_path, monkeypatch) -> Path:
    script = tmp_path / "harness_python"
    script.write_text(f"#!{sys.executable}\n{STAND_IN}")
    script.chmod(0o755)
    monkeypatch.setattr(harness, "environment_python", lambda *_: script)
    return script


def test_an_unknown_task_and_one_without_data_are_refused_before_any_server_starts(stand_in_harness, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(LoadmasterError, match=r"has no task nothing nor in .*mine"):
        Asked(Harness(("nothing",), tmp_path / "mine"), tmp_path, print)
    with pytest.raises(LoadmasterError, match=r"(?s)could not ask breaks .*ConnectionError: no data") as error:
        Asked(Harness(("breaks",)), tmp_path, print)
    assert "Traceback" not in str(error.value)


@pytest.mark.slow
def test_base_and_exports_are_asked_and_one_that_lost_too_much_fails(
    checked, stand_in, stand_in_harness, capsys  # noqa: F811
):
    export = checked.folder / "export"
    for name, score in (("bf16", 0.58), ("int4", 0.3)):
        (export / name / "scores").write_text(json.dumps(score))
        serve_as(export / name, "honest")
    command = ["serve-check", str(checked.folder), "--python", str(stand_in), "--formats", "bf16", "int4"]
    assert main([*command, "--tasks", "capitals", "--limit", "8"]) == 5
    record = read_json(checked.folder / "serve-check.json")
    assert record["tasks"]["before"]["capitals"]["acc,none"]["value"] == 0.6
    assert (record["tasks"]["limit"], record["tasks"]["max_drop"]) == (8, 0.05)
    assert record["formats"]["bf16"]["failures"] == []
    [lost] = record["formats"]["int4"]["failures"]
    assert lost == "task: capitals acc is 0.3, the base has 0.6: it may be worse by 0.05 at most (--max-drop)"
    shown = capsys.readouterr().out
    assert "before and after" in shown and "0.600 ± 0.010" in shown and "0.300 ± 0.010" in shown
    assert (checked.folder / "serve-check" / "base.log").is_file()


def test_a_figure_that_is_recorded_as_no_number_has_an_empty_cell():
    assert harness._cell({"value": None, "stderr": None}) == harness._cell(None) == ""


def test_tasks_without_a_figure_are_no_pass(stand_in_harness, tmp_path):
    with pytest.raises(ExportRejected, match="silent gave no figure"):
        Asked(Harness(("silent",)), tmp_path, print).of(1, "tiny", tmp_path, 128)


def test_options_of_tasks_without_tasks_are_refused(tmp_path, capsys):
    for options in (["--limit", "3"], ["--tasks", "x", "--limit", "0"], ["--tasks", "x", "--task-path", "nowhere"]):
        with pytest.raises(SystemExit):
            main(["serve-check", str(tmp_path), *options])
    said = capsys.readouterr().err
    assert "--limit without --tasks NAME says nothing" in said and "nowhere is not a folder" in said


def test_tasks_that_do_not_end_have_checked_nothing(stand_in_harness, tmp_path, monkeypatch):
    asked = Asked(Harness(("capitals",)), tmp_path, print)
    monkeypatch.setattr(harness, "TIMEOUT_S", 0.0)
    with pytest.raises(NotChecked, match=r"not checked: the tasks did not end within 0 h: ask fewer \(--limit\)"):
        asked.of(1, "tiny", tmp_path, 128)


def test_tasks_of_gguf_alone_are_refused(tmp_path):
    serve_as(tmp_path / "export" / "gguf", "honest")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "plan.json").touch()
    with pytest.raises(UsageError, match="name another format too"):
        serve_check(tmp_path, None, None, print, Harness(("x",)))


def test_a_base_that_cannot_be_asked_ends_the_check(checked, stand_in, stand_in_harness, monkeypatch):  # noqa: F811
    def refuse(*_):
        raise ExportRejected("the server answers 500")

    import loadmaster.export.served.check as module

    stand_in.with_name("answers.json").write_text("{}")
    monkeypatch.setattr(module, "_reference", lambda *_: {"broken": {}})
    monkeypatch.setattr(Asked, "of", refuse)
    with pytest.raises(ExportRejected, match="cannot be asked of the base: the server answers 500"):
        serve_check(checked.folder, ["adapter"], stand_in, print, Harness(("capitals",)))
