"""The commands around endpoints, through the real command line, over the fake account and data plane."""

from __future__ import annotations

import json

import pytest

from loadmaster.cli import main
from loadmaster.launch import endpoint_command
from loadmaster.launch.inference import Inference
from tests.launch.fake_inference import FakeInference
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.fake_s3 import ACCESS, SECRET, FakeS3
from tests.launch.test_deploy import SMOKE, bundled, run_dir  # noqa: F401


@pytest.fixture
def account(monkeypatch):
    with FakeRunpod() as fake, FakeInference(answers=SMOKE) as data_plane, FakeS3(["vol1"]) as s3:
        monkeypatch.setenv("RUNPOD_S3_URL", s3.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("RUNPOD_API_KEY", fake.key)
        monkeypatch.setenv("RUNPOD_API_BASE_URL_V2", fake.url)
        quick = lambda urls: Inference(urls, fake.key, poll_s=0.01)  # noqa: E731
        monkeypatch.setattr(endpoint_command, "_connect", quick)
        made = fake._endpoint
        fake._endpoint = lambda id, body: {**made(id, body), "requestUrls": data_plane.all_urls}
        fake.volumes["vol1"] = {
            "id": "vol1", "name": "loadmaster-v", "size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD",
        }  # fmt: skip
        yield fake
        assert fake.violations == []


def test_a_run_is_deployed_tested_scaled_and_deleted(run_dir, account, capsys) -> None:  # noqa: F811
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))["networkVolumes"] == ["vol1"]
    assert account.endpoints == {}
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "at least $0.00/h, at most $3.82/h" in said and "first token after" in said and "/openai/v1" in said
    assert "3 files" in said and "checksums agree" in said and SECRET not in said
    assert json.loads((run_dir / "deployment.json").read_text())["smoke"]["equal"] == 2
    (id,) = account.endpoints
    assert main(["endpoint", "list"]) == 0
    assert id in capsys.readouterr().out
    assert main(["endpoint", "test", str(run_dir)]) == 0
    assert "2 of 2 answers are word for word" in capsys.readouterr().out
    account.hourly_usd[id] = [0.0] * 20 + [1.91] * 80
    assert main(["endpoint", "review", id, "--active-discount", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "1 Active (endpoint scale ID --min 1)" in said and "now: jobs completed" in said
    assert main(["endpoint", "scale", id, "--max", "5"]) == 0
    assert account.endpoints[id]["workers"]["max"] == 5
    assert main(["endpoint", "delete", id, "--yes"]) == 0
    assert account.endpoints == {}
    assert main(["endpoint", "list"]) == 0
    assert "no endpoint" in capsys.readouterr().out


def test_nothing_is_made_unless_agreed(run_dir, account, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["deploy", str(run_dir), "--volume", "vol1"]) == 0
    assert account.endpoints == {}


def test_mistakes_are_sentences(run_dir, account, capsys, monkeypatch) -> None:  # noqa: F811
    for words, said in (
        (["deploy", str(run_dir), "--volume", "vol1", "gpu=l40s"], "does not know gpu=l40s"),
        (["deploy", str(run_dir)], "name one with --volume"),
        (["endpoint", "review", "x", "--active-discount", "20"], "0.2 is 20% off"),
        (["endpoint", "test", str(run_dir)], "is not deployed"),
        (["endpoint", "scale", "x"], "nothing to change"),
        (["endpoint", "delete", "x"], "there is no endpoint x"),
    ):
        assert main(words) == 4
        assert said in "".join(capsys.readouterr()).replace("\n", " ")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--dry-run"]) == 0  # needs no key
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 4
    assert "--no-upload goes on without" in "".join(capsys.readouterr()).replace("\n", " ")
    assert account.endpoints == {}
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes", "--no-upload"]) == 0
    assert len(account.endpoints) == 1
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert main(["endpoint", "list"]) == 4
    assert "RUNPOD_API_KEY is not set" in "".join(capsys.readouterr()).replace("\n", " ")
