"""What a run records of an export that was not published."""

from __future__ import annotations

import io
from unittest.mock import Mock

import pytest
from rich.console import Console

import loadmaster.export.stage
from loadmaster.errors import ExportRejected
from loadmaster.export import report_table
from loadmaster.pipeline import Pipeline
from loadmaster.rundir import RunDir

FIGURES = {
    "bytes": 1.13e8, "perplexity_ratio": 1.0077, "mean_kl": float("nan"), "p99_kl": float("inf"),
    "top1_agreement": 0.9977, "flipped_answers": 0.0833, "task": {"metric": 0.883}, "task_retention": 0.93,
    "candidate": "int4-gptq", "candidates": {"int4-gptq": {"mean_kl": 0.00405}, "int4-rtn": {"mean_kl": 0.0071}},
    "passed": False, "failures": ["mean_kl is nan"],
}


def shown(results) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(report_table(results))
    return console.file.getvalue()


def test_the_lab_report_has_a_row_for_each_format_and_one_for_each_candidate_that_was_not_taken():
    text = shown({"int4": FIGURES, "fp8": {"error": "strict_load: torn", "checks": {}, "passed": False}})
    assert max(map(len, text.splitlines())) <= 80
    cells = next(line for line in text.splitlines() if line.startswith(" int4")).split()
    assert cells == ["int4", "113.0", "1.0077", "nan", "inf", "99.8%", "8.3%", "88.3%", "93.0%", "no"]
    assert "   int4-rtn " in text and "0.00710" in text and "   int4-gptq" not in text and " fp8 " in text


def test_a_rejected_export_is_recorded_beside_the_one_that_is_in_place(tmp_path, monkeypatch):
    run_dir = RunDir(tmp_path, "identity")
    run_dir.update_result(exports={"int4": {"passed": True}})
    console = Console(file=io.StringIO(), width=80)
    run = Pipeline.__new__(Pipeline)
    run.__dict__ |= {"run_dir": run_dir, "console": console, "job": None, "plan": None, "materials": Mock()}

    def rejects(*_):
        raise ExportRejected("not what was trained", {"int4": FIGURES})

    monkeypatch.setattr(loadmaster.export.stage, "export_all", rejects)
    with pytest.raises(ExportRejected):
        run.export()
    result = run_dir.result()
    assert result["exports"] == {"int4": {"passed": True}}
    rejected = result["rejected_exports"]["int4"]
    assert (rejected["passed"], rejected["mean_kl"], rejected["p99_kl"]) == (False, None, None)
    assert rejected["top1_agreement"] == 0.9977
    assert " int4 " in console.file.getvalue()

    good = {"int4": {**FIGURES, "mean_kl": 0.1, "p99_kl": 1.0, "passed": True}}
    monkeypatch.setattr(loadmaster.export.stage, "export_all", lambda *_: good)
    run.export()
    result = run_dir.result()
    assert result["rejected_exports"] is None and result["exports"]["int4"]["passed"]
