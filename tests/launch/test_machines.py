"""Which machines nobody needs any more, and what they have cost: pure, without an account."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from loadmaster.launch.machines import age_hours, deadline, orphan, run_dir, usd_so_far
from loadmaster.launch.provider import Machine

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
JOB = {"deadline": (NOW - timedelta(hours=0.2)).timestamp(), "run_dir": "/workspace/x"}
POD = Machine(
    "id1", "loadmaster-x", "EXITED", True, "1x l40s", 2.0, NOW - timedelta(hours=0.9),
    {"LOADMASTER_JOB": json.dumps(JOB)},
)
CLUSTER = replace(POD, kind="Instant Cluster", nodes=2, members=("a", "b"))


def of(**facts: object) -> dict[str, str]:
    return {"LOADMASTER_JOB": json.dumps(JOB | facts)}


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (POD, None),  # its deadline has just passed: it is about to end itself
        (replace(POD, env=of(deadline=(NOW - timedelta(hours=0.3)).timestamp())), "past its deadline"),
        (replace(POD, env={}), "carries no job of this tool"),
        (replace(POD, env={"LOADMASTER_JOB": "{"}), "carries no job of this tool"),
        (replace(POD, alive=False), "EXITED: nothing runs, its disk goes on costing"),
        (replace(CLUSTER, alive=False), "EXITED: a node of it has ended"),
        (CLUSTER, None),
        (replace(CLUSTER, members=()), None),  # it may still get them
        (replace(CLUSTER, members=(), created=NOW - timedelta(hours=1.1)), "got no machines"),
        (replace(CLUSTER, created=NOW - timedelta(hours=1.1)), None),
    ],
)
def test_nobody_needs_what_is_past_its_end_or_runs_no_job(machine: Machine, why: str | None) -> None:
    assert orphan(machine, NOW) == why


def test_a_machine_has_cost_its_hours_at_its_rate() -> None:
    assert usd_so_far(POD, NOW) == pytest.approx(1.8)
    assert age_hours(POD, POD.created - timedelta(hours=1)) == 0  # the provider's clock is ahead
    assert run_dir(POD) == "/workspace/x" and deadline(POD) == datetime.fromtimestamp(JOB["deadline"], UTC)
    assert run_dir(replace(POD, env={})) is None and deadline(replace(POD, env=of(deadline=None))) is None
