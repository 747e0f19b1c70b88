"""The fixtures `place`, a fake account whose machines run a stand-in for the job, and `s3`, its volume's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loadmaster.endpoint import command as endpoint_command
from loadmaster.launch import job as job_module
from loadmaster.launch import order, rented
from loadmaster.launch.runpod import Api, RunpodClient
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.fake_s3 import ACCESS, SECRET, FakeS3
from tests.launch.place import QUICK, STAND_IN, Place


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


@pytest.fixture
def s3(place, monkeypatch) -> Iterator[FakeS3]:
    """The account's volume has an S3 API, and this laptop its key."""
    with FakeS3(["vol0001"]) as s3:
        for name, value in {
            "RUNPOD_API_KEY": place.fake.key, "RUNPOD_S3_URL": s3.url, "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)
        client = lambda: RunpodClient(Api(place.fake.key, place.fake.url, QUICK))  # noqa: E731
        monkeypatch.setattr(endpoint_command, "_client", client)
        yield s3
