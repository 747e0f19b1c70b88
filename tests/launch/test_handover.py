"""The whole way: train, export, bundle, upload, deploy, validate; and every call on that way failing, in every way.

The provider, its volumes and the endpoint are stand-ins over real HTTP; the endpoint says what the artifact said when
it was exported. In test_handover_served.py it is the real one. What of this needs no trained model: test_deploy.py.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from loadmaster.cli import main
from loadmaster.config.compose import compose
from loadmaster.endpoint import command as endpoint_command
from loadmaster.endpoint.inference import Inference
from loadmaster.files import read_json, write_json
from loadmaster.launch.runpod import Api, Patience, RunpodClient
from loadmaster.launch.volume import bucket
from loadmaster.pipeline import run
from tests.launch.fake_inference import FakeInference
from tests.launch.fake_runpod import FAULTS, FakeRunpod
from tests.launch.fake_s3 import ACCESS, SECRET, FakeS3

pytestmark = pytest.mark.slow

JOB = [
    "hardware=cpu", "precision=fp32", "sequence_length=256", "max_steps=1", "data=tickets", "data.max_rows=12",
    "evaluation.max_rows=2", "evaluation.max_new_tokens=4", "evaluation.task=none", "tracker=none", "export=bf16",
    "batch.global_size=2", "micro_batch_size=1", "endpoint.gpu=l40s", "endpoint.output_tokens=8",
    "endpoint.max_slowdown=1e6",  # a busy machine is no slow endpoint
]
PATIENT_S, QUICK_S = 20.0, 1.0
"""Until a call counts as not answered: on a machine that is busy, and where calls are not answered on purpose."""


@pytest.fixture(scope="module")
def trained(few_words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("handover") / "runs/tickets/one"
    console = Console(file=io.StringIO(), width=120)
    composed = compose([f"model.path={few_words}", f"run_dir={folder}", *JOB])
    assert run(composed, console) == 0, console.file.getvalue()
    return folder


class Account:
    """The provider, as a run meets it: control plane, volume, endpoint."""

    def __init__(self, fake: FakeRunpod, s3: FakeS3, endpoint: FakeInference):
        self.fake, self.s3, self.endpoint = fake, s3, endpoint

    def spoil(self, kind: str, at: int, every: int) -> None:
        """In each plane the call of number `at` from now on, and each `every` calls after it."""
        for plane in (self.fake, self.s3, self.endpoint):
            first = len(plane.calls) + at
            plane.faults = {number: kind for number in range(first, first + 200, every)}
        self.endpoint.spoilt.clear()
        self.fake.faults = {len(self.fake.calls) + at: kind}

    def heal(self) -> None:
        for plane in (self.fake, self.s3, self.endpoint):
            plane.faults = {}


@pytest.fixture
def account(request, trained, monkeypatch) -> Iterator[Account]:
    wait_s = getattr(request, "param", PATIENT_S)
    patience = Patience(timeout_s=wait_s, attempts=10, first_wait_s=0.01, longest_wait_s=0.05)
    recorded = read_json(trained / "bundle/smoke.json")
    endpoint = FakeInference(served=recorded["model"], answers=recorded["prompts"])
    with FakeRunpod() as fake, FakeS3(["vol1"]) as s3, endpoint:
        values = {
            "RUNPOD_API_KEY": fake.key, "RUNPOD_S3_URL": s3.url, "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        made = fake._endpoint
        fake._endpoint = lambda id, body: {**made(id, body), "requestUrls": endpoint.all_urls}
        fake.volumes["vol1"] = {
            "id": "vol1", "name": "loadmaster-v", "size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD",
        }
        monkeypatch.setattr(endpoint_command, "_client", lambda: RunpodClient(Api(fake.key, fake.url, patience)))
        connect = lambda urls: Inference(urls, fake.key, poll_s=0.01, timeout_s=wait_s)  # noqa: E731
        monkeypatch.setattr(endpoint_command, "_connect", connect)
        monkeypatch.setattr(bucket, "Bucket", partial(bucket.Bucket, read_timeout_s=wait_s))
        monkeypatch.setattr(bucket, "COMPLETE_TIMEOUT_S", wait_s)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)
        yield Account(fake, s3, endpoint)
        assert fake.violations == [] and s3.refused == []


def deploy(run_dir: Path) -> int:
    return main(["deploy", str(run_dir), "--volume", "loadmaster-v", "--yes"])


def no_secret(text: str, fake: FakeRunpod) -> bool:
    return SECRET not in text and fake.key not in text


def test_from_training_to_an_endpoint_that_says_what_was_exported(trained, account, capsys, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    recorded = read_json(trained / "bundle/smoke.json")["prompts"]
    assert len(recorded) >= 2 and recorded[-1]["messages"][0]["content"] == "What is in the hold?"
    assert "What is in the hold?" not in (trained / "export/bf16/manifest.json").read_text()
    assert deploy(trained) == 0
    said = "".join(capsys.readouterr())
    (endpoint,) = account.fake.endpoints.values()
    folder = endpoint["env"]["MODEL_NAME"].removeprefix("/runpod-volume/")
    assert folder == "runs/tickets/one/export/bf16"
    there = account.s3.objects("vol1")
    for path in (trained / "export/bf16").iterdir():
        assert there[f"{folder}/{path.name}"] == path.read_bytes()
    deployment = read_json(trained / "deployment.json")
    assert deployment["smoke"]["equal"] == len(recorded) and deployment["endpoint"] == endpoint["id"]
    assert no_secret(said + caplog.text + json.dumps(deployment), account.fake)
    sent = len(account.s3.calls)
    assert deploy(trained) == 0  # again: nothing is sent, nothing is made
    assert account.fake.created == [("endpoint", endpoint["name"].removesuffix(" -fb"))]
    assert not any(call.startswith(("Put", "Upload", "Create")) for call in account.s3.calls[sent:])


MODES = {"good": 0, "failed": 4}


@pytest.mark.parametrize(
    ("kind", "account"), [(kind, QUICK_S if kind == "timeout" else PATIENT_S) for kind in FAULTS], indirect=["account"]
)
def test_every_failure_of_every_call_leaves_one_endpoint_or_none(trained, account, capsys, caplog, kind) -> None:
    """Each plane fails at call n, and its data and volume at every eighth after it. The endpoint fails as well at every
    other n, which differs by the kind."""
    caplog.set_level(logging.DEBUG)
    every = 8
    for at, mode in product(range(1, every + 1), MODES):
        if mode == "failed" and (at + FAULTS.index(kind)) % 2:
            continue
        account.endpoint.mode = mode
        for name in list(account.s3.objects("vol1")):
            account.s3.remove("vol1", name)
        account.fake.created.clear()
        account.spoil(kind, at, every)
        assert deploy(trained) == MODES[mode], f"{kind} at call {at}, endpoint {mode}: {''.join(capsys.readouterr())}"
        account.heal()
        assert len(account.fake.endpoints) == (1 if mode == "good" else 0), f"{kind} at call {at}"
        assert len(account.fake.created) == 1, f"{kind} at call {at}: {account.fake.created}"
        assert account.s3.begun("vol1") == 0
        assert len(account.s3.objects("vol1")) == len(list((trained / "export/bf16").iterdir()))
        account.fake.endpoints.clear()
    assert no_secret("".join(capsys.readouterr()) + caplog.text, account.fake)


def test_a_network_that_is_gone_leaves_nothing_and_the_next_try_goes_on(trained, account, capsys) -> None:
    for stop_after in range(0, 60, 7):
        account.s3.stop_after = len(account.s3.calls) + stop_after
        code = deploy(trained)
        account.s3.stop_after = None
        if code == 0:
            break
        assert code == 4 and account.fake.endpoints == {}
        assert "it goes on where it was" in "".join(capsys.readouterr()).replace("\n", " ")
    else:
        raise AssertionError("it never ended")
    assert len(account.fake.endpoints) == 1


def test_two_deployments_of_one_bundle_are_the_same_request(trained, account) -> None:
    assert deploy(trained) == 0
    first = [body for body in account.fake.bodies if "scaling" in body]
    account.fake.endpoints.clear()
    write_json(trained / "deployment.json", {})
    assert deploy(trained) == 0
    assert [body for body in account.fake.bodies if "scaling" in body] == first * 2
