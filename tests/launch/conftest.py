"""The fixture `place`: a fake account whose machines run a stand-in for the job."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from loadmaster.launch import job as job_module
from loadmaster.launch import order, rented
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.place import STAND_IN, Place


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    monkeypatch.setattr(order, "command", lambda stop, choice, folder, run_dir: ["python3", str(stand_in), run_dir])
    monkeypatch.setattr(rented, "POLL_S", 0.02)
    made = order.make_order

    def without_pip(*arguments):
        """The stand-in needs no package; what launch.package says is checked in test_order.py."""
        ordered = made(*arguments)
        job = json.loads(ordered.env["LOADMASTER_JOB"]) | {"package": None, "hold_s": 5, "progress_s": 0.05}
        return replace(ordered, env={**ordered.env, "LOADMASTER_JOB": json.dumps(job)})

    monkeypatch.setattr(job_module, "make_order", without_pip)
    with FakeRunpod() as fake:
        yield Place(fake, tmp_path)
        assert fake.violations == []
