"""The commands around endpoints, through the real command line, over the fake account and data plane."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal

import pytest

from loadmaster.cli import main
from loadmaster.endpoint import command as endpoint_command
from loadmaster.endpoint.inference import Inference
from loadmaster.errors import ProviderError
from loadmaster.export.manifest import read_manifest, write_manifest
from loadmaster.files import write_json
from loadmaster.launch.runpod import Api, Patience, RunpodClient
from tests.launch.fake_inference import FakeInference
from tests.launch.fake_runpod import FAULTS, FakeRunpod
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
        }
        yield fake
        assert fake.violations == []


def test_a_run_is_deployed_tested_scaled_and_deleted(run_dir, account, capsys) -> None:  # noqa: F811
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "1 GPU a worker of pool ADA_48_PRO without NVIDIA L40" in said and "it is not there and is made" in said
    assert "at least $0.00/h, at most $3.82/h" in said and "first token after" in said and "/openai/v1" in said
    assert "3 files" in said and "checksums agree" in said and SECRET not in said
    assert f"{run_dir}/export/bf16 (0.00 GB) goes to" in said
    (made,) = account.endpoints.values()
    (shown,) = (line for line in said.splitlines() if line.startswith("environment: "))  # before it is agreed to
    assert dict(word.split("=", 1) for word in shlex.split(shown)[1:]) == made["env"]
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


def test_of_two_endpoints_of_one_name_neither_is_guessed(run_dir, account, capsys) -> None:  # noqa: F811
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 0
    ((id, made),) = account.endpoints.items()
    account.endpoints["twin"] = {**made, "id": "twin"}
    assert main(["endpoint", "delete", "loadmaster-tickets-bf16", "--yes"]) == 4
    assert f"several endpoints are called loadmaster-tickets-bf16: give the id, {id} or twin" in capsys.readouterr().err
    assert main(["endpoint", "delete", "twin", "--yes"]) == 0
    assert set(account.endpoints) == {id}


def test_a_dry_run_shows_what_is_sent_then(run_dir, account, capsys, monkeypatch) -> None:  # noqa: F811
    """The volume was given by its name; the API takes its id."""
    words = ["deploy", str(run_dir), "--volume", "loadmaster-v"]

    def dry() -> tuple[str, dict]:
        assert main([*words, "--dry-run"]) == 0
        said, brace, rest = capsys.readouterr().out.partition("{")
        return said, json.loads(brace + rest) if brace else {}

    said, shown = dry()
    assert said.endswith(f"POST {account.url}/serverless\n") and account.endpoints == {}
    assert (shown["networkVolumes"], shown["dataCenterIds"]) == (["vol1"], ["EU-RO-1"])
    assert main([*words, "--yes"]) == 0
    assert [sent for sent in account.bodies if "networkVolumes" in sent] == [shown]
    capsys.readouterr()
    said, shown = dry()
    assert "is as it should be; nothing would be sent" in said and shown == {}
    (id,) = account.endpoints
    account.endpoints[id]["workers"]["max"] = 7
    said, shown = dry()
    assert said.endswith(f"PATCH {account.url}/serverless/{id}\n") and shown["workers"]["max"] == 2
    monkeypatch.delenv("RUNPOD_API_KEY")
    said, shown = dry()
    assert "id and data center of volume loadmaster-v" in said and shown["networkVolumes"] == ["loadmaster-v"]


def test_what_another_job_deployed_is_named_before_it_is_replaced(bundled, tmp_path, account, capsys) -> None:  # noqa: F811
    def run(job_hash: str, data: str) -> str:
        folder = tmp_path / job_hash
        shutil.copytree(bundled, folder)
        for path in (folder / "export/bf16", folder / "bundle"):
            facts = {**read_manifest(path), "job_hash": job_hash, "data": {"sha256": data}}
            if path.name == "bf16":
                write_manifest(path, facts)
            else:
                write_json(path / "manifest.json", facts)
        return str(folder)

    def deploy(folder: str, *words: str) -> str:
        assert main(["deploy", folder, "--volume", "vol1", *words]) == 0
        return capsys.readouterr().out

    first, second = run("aaaa1111", "tea"), run("bbbb2222", "coffee")
    assert "replaces" not in deploy(first, "--yes")
    assert "replaces" not in deploy(first, "--yes") + deploy(first, "--dry-run")
    told = "ATTENTION: this replaces what job aaaa1111 (base org/base, data tea) deployed; --name NAME makes another"
    assert told in deploy(second, "--dry-run")
    assert "replaces" not in deploy(second, "--yes", "--name", "second")
    assert sorted(endpoint["name"] for endpoint in account.endpoints.values()) == [
        "loadmaster-second -fb", "loadmaster-tickets-bf16 -fb"
    ]
    assert main(["endpoint", "test", second]) == 0  # finds it by the name it was given
    capsys.readouterr()
    assert "replaces" not in deploy(second, "--yes") and len(account.endpoints) == 2  # and so does this
    assert told in deploy(second, "--yes", "--name", "tickets-bf16")
    (there,) = (e for e in account.endpoints.values() if "tickets" in e["name"])
    del there["env"]["LOADMASTER_SERVES"]  # an earlier version made it
    assert "it does not say which job deployed it" in deploy(first, "--dry-run")
    assert main(["deploy", first, "--volume", "vol1", "--name", "a/b", "--dry-run"]) == 2


def test_nothing_is_made_unless_agreed(run_dir, account, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert main(["deploy", str(run_dir), "--volume", "vol1"]) == 0
    assert account.endpoints == {}


def test_mistakes_are_sentences(run_dir, account, capsys, monkeypatch) -> None:  # noqa: F811
    for words, code, said in (
        (["deploy", str(run_dir), "--volume", "vol1", "gpu=l40s"], 2, "does not know gpu=l40s"),
        (["deploy", str(run_dir)], 2, f"`loadmaster deploy {run_dir} --volume NAME`"),
        (["endpoint", "review", "x", "--active-discount", "20"], 2, "0.2 is 20% off"),
        (["endpoint", "review", "x", "--hours", "9999"], 2, "2 to 2160 of them"),
        (["endpoint", "test", str(run_dir)], 4, "is not deployed"),
        (["endpoint", "scale", "x"], 2, "nothing to change"),
        (["endpoint", "scale", "x", "--max", "-1"], 2, "0 or more"),
        (["endpoint", "scale", "x", "--min", "3", "--max", "1"], 2, "cannot both hold: --min 1 --max 3"),
        (["endpoint", "delete", "x"], 4, "there is no endpoint x"),
    ):
        assert main(words) == code
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


def quick(fake: FakeRunpod) -> RunpodClient:
    return RunpodClient(Api(fake.key, fake.url, Patience(timeout_s=1.0, attempts=4, first_wait_s=0.01)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAULTS)
def test_every_call_of_every_command_may_fail_once(run_dir, account, capsys, monkeypatch, kind) -> None:  # noqa: F811
    """list, test, review, scale, delete: the result is the same, one change is made once, and no key is shown."""
    monkeypatch.setattr(endpoint_command, "_client", lambda: quick(account))
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 0
    (id,) = account.endpoints
    account.hourly_usd[id] = [1.91] * 80
    commands = (["list"], ["test", str(run_dir)], ["review", id], ["scale", id, "--max", "4"], ["delete", id, "--yes"])
    for words in commands:
        before = json.dumps(account.endpoints[id])
        account.calls.clear()
        assert main(["endpoint", *words]) == 0
        calls, after = len(account.calls), json.dumps(account.endpoints.get(id))
        for call in range(1, calls + 1):
            account.endpoints[id] = json.loads(before)
            account.calls.clear()
            account.deleted.clear()
            account.faults = {call: kind}
            assert main(["endpoint", *words]) == 0, (words, call)
            assert json.dumps(account.endpoints.get(id)) == after, (words, call)
            assert len(account.deleted) <= 1
            account.faults = {}
        if words[0] != "delete":
            assert id in account.endpoints
    said = "".join(capsys.readouterr())
    assert account.key not in said and "Traceback" not in said


def test_two_deployments_at_once_leave_one_endpoint(run_dir, account, capsys) -> None:  # noqa: F811
    """The other one is made between our look and our creation; ours gives way, and the next call updates that one."""
    made = account.createEndpoint

    def together(ids, query, body):
        account.createEndpoint = made
        made(ids, query, body)
        return made(ids, query, body)

    account.createEndpoint = together
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 4
    said = "".join(capsys.readouterr()).replace("\n", " ")
    first = account.created[0]
    assert "somebody else deployed" in said and len(account.endpoints) == 1 and len(account.created) == 2
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 0
    assert len(account.endpoints) == 1 and account.created == [first] * 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RUNPOD_API_KEY", "schlüssel", "RUNPOD_API_KEY holds characters that no key has"),
        ("RUNPOD_API_KEY", "two words", "RUNPOD_API_KEY holds characters that no key has"),
        ("RUNPOD_API_KEY", "line\nbreak", "RUNPOD_API_KEY holds characters that no key has"),
        ("RUNPOD_API_KEY", "wrong", "the key in RUNPOD_API_KEY is not accepted"),
        ("RUNPOD_API_KEY", "  ", "RUNPOD_API_KEY is not set"),
        ("RUNPOD_API_BASE_URL_V2", "http://[bad", "RUNPOD_API_BASE_URL_V2 is no address"),
        ("RUNPOD_API_BASE_URL_V2", "nonsense", "RUNPOD_API_BASE_URL_V2 is no address"),
        ("RUNPOD_S3_URL", "nonsense", "RUNPOD_S3_URL is no address"),
        ("RUNPOD_S3_URL", "http://host", "RUNPOD_S3_URL begins with http://"),
        ("AWS_ACCESS_KEY_ID", "schlüssel", "AWS_ACCESS_KEY_ID holds characters that no key has"),
    ],
)
def test_keys_and_addresses_that_can_be_none(run_dir, account, capsys, monkeypatch, name, value, said) -> None:  # noqa: F811
    monkeypatch.setenv(name, value)
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 4
    shown = "".join(capsys.readouterr()).replace("\n", " ")
    assert said in shown and account.endpoints == {}
    assert value not in ("wrong", "schlüssel") or value not in shown.replace("wrong or", "")


def test_the_key_is_sent_to_no_endpoint_without_https(monkeypatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "key")
    with pytest.raises(ProviderError, match="http://host/run as the endpoint's"):
        endpoint_command._connect({"health": "https://host/health", "run": "http://host/run"})
    endpoint_command._connect({"run": "https://host/run", "health": "http://127.0.0.1:1/health"}).__exit__()


def test_what_is_no_run_is_a_sentence(run_dir, account, capsys, tmp_path) -> None:  # noqa: F811
    """Missing, a file, unreadable JSON, another schema, read-only: never a traceback, and nothing is made."""
    file = tmp_path / "file"
    file.write_text("x")
    damaged = {
        "bundle/endpoint.json": "{", "bundle/serving.json": "[]", "bundle/smoke.json": "{}",
        "bundle/manifest.json": '{"schema": 1}', "export/bf16/manifest.json": "no",
    }
    for path in (run_dir / "bundle", run_dir / "export" / "bf16"):
        assert main(["deploy", str(path), "--volume", "vol1", "--yes"]) == 4
        assert f"give the run directory, {run_dir.resolve()}" in "".join(capsys.readouterr()).replace("\n", " ")
    for path in (tmp_path / "nowhere", tmp_path / ("long" * 99), file, tmp_path):
        assert main(["deploy", str(path), "--volume", "vol1", "--yes"]) == 4
        said = "".join(capsys.readouterr()).replace("\n", " ")
        assert ("has no bundle" if path == tmp_path else f"there is no folder {path}") in said
    for name, text in damaged.items():
        good = (run_dir / name).read_text()
        (run_dir / name).write_text(text)
        assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) in (4, 5), name
        said = "".join(capsys.readouterr()).replace("\n", " ")
        assert "error: " in said and "again" in said, name
        (run_dir / name).write_text(good)
    assert account.endpoints == {} and account.created == []


def test_a_run_that_cannot_be_written_is_said_before_anything_is_made(
    run_dir, account, capsys, monkeypatch  # noqa: F811
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 4
    assert "cannot be written" in "".join(capsys.readouterr()).replace("\n", " ")
    assert account.calls == []


def test_ctrl_c_sigterm_and_a_closed_terminal_take_back_what_was_made(run_dir, account, capsys, monkeypatch) -> None:  # noqa: F811
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(endpoint_command, "_connect", lambda urls, number=number: os.kill(os.getpid(), number))
        assert main(["deploy", str(run_dir), "--volume", "vol1", "--yes"]) == 75
        said = "".join(capsys.readouterr()).replace("\n", " ")
        assert account.endpoints == {} and "is deleted" in said and "Traceback" not in said
    monkeypatch.setattr("builtins.input", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert main(["deploy", str(run_dir), "--volume", "vol1"]) == 130
