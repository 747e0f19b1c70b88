"""Which stages are done, which are older than what they rest on, and where and how near the plan a run was."""

from __future__ import annotations

import math

import pytest

from loadmaster.report.curves import curves_of, series
from loadmaster.report.inputs import RunFiles
from loadmaster.report.overview import headlines, off_by, place, stages


def run(**files) -> RunFiles:
    empty = {"name": "r", "config_text": "", "metrics": []}
    empty |= {name: {} for name in ("config", "plan", "result", "stages", "evaluation", "manifests")}
    return RunFiles(**{**empty, **files})


def finished(**at: str) -> dict:
    return {name: {"seconds": 5, "finished": f"2026-11-24T08:00:{second}"} for name, second in at.items()}


def test_a_stage_is_stale_where_any_before_it_ended_later():
    files = run(stages=finished(plan="10", train="05", evaluate="07", export="10"), config={"stop_after": "export"})
    assert [(stage.name, stage.state) for stage in stages(files)] == [
        ("plan", "done"), ("train", "stale"), ("evaluate", "stale"), ("export", "done"), ("bundle", "waiting"),
    ]
    assert [stage.text for stage in stages(files)][-1] == "not asked for (stop_after=export)"
    texts = [stage.text for stage in stages(run(config={"stop_after": "train"}))]
    assert texts == ["not run yet"] * 2 + ["not asked for (stop_after=train)"] * 3


@pytest.mark.parametrize(("taken", "said"), [(None, False), (9, False), (4, True)])
def test_weights_of_an_earlier_step_than_the_last_are_said_to_be(taken, said: bool):
    train = stages(run(stages=finished(train="01"), result={"steps": 9, "taken_step": taken}))[1]
    assert train.text == "5.0 s" + ", the weights are those of step 4 of 9" * said


def test_machines_are_counted_where_there_are_several():
    hardware = {"gpu": "h100_80gb", "count": 8}
    node = "8 \N{MULTIPLICATION SIGN} h100_80gb"
    assert place({"hardware": hardware}) == place({"hardware": {**hardware, "nodes": 1}}) == node
    assert place({"hardware": {**hardware, "nodes": 2}}) == f"2 nodes of {node}"
    assert off_by(60.2, 60.0) == "0.3% too high"


def test_rows_of_a_task_are_those_that_were_answered_last():
    sides = {"before": {"task": {"metric": 0.5, "rows": 20}}, "after": {"task": {"metric": 0.75, "rows": 30}}}
    (figure,) = headlines(run(evaluation=sides))
    assert (figure.before, figure.value) == ("50.0%", "75.0%") and "30 held-out rows" in figure.note


def test_curves_leave_out_what_is_no_number_and_draw_the_clip_where_it_is_near():
    rows = [{"step": 1, "grad_norm": 0.2}, {"step": 2, "grad_norm": math.inf}, {"step": 3, "grad_norm": None}]
    assert series(rows, "grad_norm") == ((1,), (0.2,))
    for largest, shown in ((0.3, 0), (0.4, 1), (4.0, 1)):
        files = run(metrics=[{"step": 1, "grad_norm": largest}], config={"optimizer": {"max_grad_norm": 1.0}})
        (norm,) = (curve for curve in curves_of(files, ()) if curve.title == "Gradient norm")
        assert len(norm.lines) == shown
