"""From a laptop to an endpoint: a Pod trains, exports and bundles, its files stay on the volume and are served there.

The Pod is a process that runs the real job on a tiny model; what it leaves in /workspace is then what the volume's S3
API has. Nothing of the weights passes through this machine, unless they are fetched.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from loadmaster.cli import main
from loadmaster.endpoint import command as endpoint_command
from loadmaster.endpoint.inference import Inference
from loadmaster.errors import ExportRejected, LoadmasterError, StoppedOnRequest
from loadmaster.export.manifest import verify_manifest
from loadmaster.files import read_json, write_json
from loadmaster.launch import order
from loadmaster.launch.job import _with_a_way_home
from loadmaster.launch.record import where
from loadmaster.launch.volume import bucket
from loadmaster.launch.volume.fetch import fetch
from tests.launch.fake_inference import FakeInference
from tests.launch.fake_s3 import FAULTS, SECRET, FakeS3
from tests.launch.place import SECRET as HF_SECRET
from tests.launch.place import everything_written

ROOT = Path(__file__).resolve().parents[2]
JOB = [
    "sequence_length=256", "max_steps=1", "data=tickets", "data.max_rows=12", "evaluation.max_rows=2",
    "evaluation.max_new_tokens=4", "evaluation.task=none", "tracker=none", "export=bf16", "batch.global_size=2",
    "endpoint.gpu=l40s", "endpoint.output_tokens=8", "endpoint.max_slowdown=1e6", "launch.secrets.HF_TOKEN=hf",
]
EXPORTER = """
import json, pathlib, sys
from loadmaster.export.manifest import write_manifest
folder = pathlib.Path(sys.argv[1]) / "export/bf16"
folder.mkdir(parents=True)
(folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
write_manifest(folder, {"format": "bf16", "verification": {"passed": True}})
"""
real = order.command


class Trip:
    """What is known on the laptop once a job has come back."""

    def __init__(self, place, s3: FakeS3, endpoint: FakeInference, run: Path):
        self.place, self.fake, self.s3, self.endpoint, self.run = place, place.fake, s3, endpoint, run
        self.record = read_json(run / "launch.json")
        self.folder = self.record["run_dir"].removeprefix("/workspace/") + "/export/bf16"

    def put_on_volume(self, name: str, data: bytes) -> None:
        if name in self.s3.objects("vol0001"):
            self.s3.remove("vol0001", name)  # moto leaves what is there to those who sign
        self.s3.direct("PUT", f"/vol0001/{name}", data)

    def writes(self, since: int = 0) -> list[str]:
        return [call for call in self.s3.calls[since:] if call.startswith(("Put", "Upload", "Create", "Complete"))]


def leave_on_volume(workspace: Path, s3: FakeS3) -> None:
    """The manifest of a folder last, as the job wrote it."""
    files = [path for path in workspace.rglob("*") if path.is_file() and "/export/" in str(path)]
    for path in sorted(files, key=lambda path: path.name == "manifest.json"):
        if path.name == "manifest.json":
            time.sleep(1.1)  # S3 says when a file was written to the second
        s3.direct("PUT", f"/vol0001/{path.relative_to(workspace)}", path.read_bytes())


@pytest.fixture
def there(place, s3, monkeypatch) -> FakeS3:
    """Machines that run this code, and calls that do not wait long."""
    place.runner.environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(bucket, "Bucket", partial(bucket.Bucket, read_timeout_s=1))
    return s3


@pytest.fixture
def trip(place, there, few_words, monkeypatch) -> Iterator[Trip]:
    """Pods run the real job on what they have here: a CPU, a tiny model, and another folder for /workspace."""
    mounted = f"from loadmaster.endpoint import settings as s; s.POD_MOUNT = type(s.POD_MOUNT)({str(place.folder)!r})"
    mounted += " / 'workspace'; import sys; from loadmaster.cli import main; sys.exit(main())"

    def on_a_cpu(stop, choice, folder, run_dir):
        fits = [f"model.path={few_words}", "hardware.gpu=cpu", "precision=fp32", "method=lora", "micro_batch_size=1"]
        return [sys.executable, "-c", mounted, *real(stop, choice, folder, run_dir)[3:], *fits]

    monkeypatch.setattr(order, "command", on_a_cpu)
    assert place.launch(*JOB) == 0, place.said
    (run,) = (place.folder / "runs/qlora_8b").iterdir()
    assert f"next: loadmaster deploy {run.relative_to(place.folder)} --dry-run" in place.said
    recorded = read_json(run / "bundle/smoke.json")
    leave_on_volume(place.folder / "workspace", there)
    with FakeInference(served=recorded["model"], answers=recorded["prompts"]) as endpoint:
        connect = lambda urls: Inference(urls, place.fake.key, poll_s=0.01, timeout_s=5)  # noqa: E731
        monkeypatch.setattr(endpoint_command, "_connect", connect)
        made = place.fake._endpoint
        place.fake._endpoint = lambda id, body: {**made(id, body), "requestUrls": endpoint.all_urls}
        yield Trip(place, there, endpoint, run)


@pytest.mark.slow
def test_what_a_pod_exported_is_deployed_from_its_volume_and_fetched(trip: Trip, capsys, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    # Everything small came home, the weights did not.
    assert {path.name for path in (trip.run / "export/bf16").iterdir()} == {"manifest.json"}
    for name in ("handler.py", "endpoint.json", ".runpod/hub.json", ".runpod/tests.json", "smoke.json", "Dockerfile"):
        assert (trip.run / "bundle" / name).is_file(), name
    assert read_json(trip.run / "bundle/smoke.json")["prompts"]
    assert trip.record["volume"] == "vol0001" and trip.fake.pods == {}

    assert main(["deploy", str(trip.run), "--yes"]) == 0  # the volume is the launch's
    said = "".join(capsys.readouterr())
    (made,) = trip.fake.endpoints.values()
    assert made["networkVolumes"] == ["vol0001"]
    assert made["env"]["MODEL_NAME"] == f"/runpod-volume/{trip.folder}"
    assert trip.writes() == [] and "as exported (0 read back" in said and "was left in" in said
    assert main(["endpoint", "test", str(trip.run)]) == 0
    assert main(["endpoint", "delete", made["id"], "--yes"]) == 0

    refused(trip, capsys)

    cut_and_fetched(trip, capsys)
    assert verify_manifest(trip.run / "export/bf16") == []
    assert main(["deploy", str(trip.run), "--volume", "loadmaster", "--yes"]) == 0  # now they are here, and there
    assert len(trip.fake.endpoints) == 1

    written = everything_written(trip.place.folder) + trip.place.said + caplog.text + said
    written += "".join(capsys.readouterr()) + json.dumps(trip.fake.bodies) + json.dumps(trip.fake.logs)
    for secret in (SECRET, HF_SECRET, trip.fake.key, "podkey_"):
        assert secret not in written


def refused(trip: Trip, capsys) -> None:
    """What is on the volume is not what came out of the job, in every way that it can be so."""
    weights, config = f"{trip.folder}/model.safetensors", f"{trip.folder}/config.json"
    good = {name: trip.s3.objects("vol0001")[name] for name in (weights, config)}
    manifest = trip.s3.objects("vol0001")[f"{trip.folder}/manifest.json"]
    flipped = good[weights][:-1] + bytes([good[weights][-1] ^ 1])

    def deployed(code: int, said: str) -> None:
        assert main(["deploy", str(trip.run), "--yes"]) == code
        assert said in "".join(capsys.readouterr()).replace("\n", " ")
        assert len(trip.fake.endpoints) == (1 if code == 0 else 0)
        trip.fake.endpoints.clear()

    trip.put_on_volume(weights, flipped)
    deployed(5, "model.safetensors: changed since it was exported")
    trip.put_on_volume(weights, good[weights])  # written again, and the same: only reading it back can tell
    deployed(0, "read back")
    trip.put_on_volume(config, good[config] + b" ")
    deployed(5, "config.json:")
    trip.s3.remove("vol0001", config)
    deployed(5, "config.json: missing")
    trip.put_on_volume(config, good[config])
    trip.put_on_volume(f"{trip.folder}/manifest.json", manifest + b" ")
    deployed(5, "does not hold the export that")
    trip.put_on_volume(f"{trip.folder}/manifest.json", manifest)
    trip.put_on_volume(f"{trip.folder}/model-00002-of-00002.safetensors", b"old")
    deployed(4, "model-00002-of-00002.safetensors")
    trip.s3.remove("vol0001", f"{trip.folder}/model-00002-of-00002.safetensors")
    trip.fake.volumes["other"] = {**trip.fake.volumes["vol0001"], "id": "other", "name": "other"}
    assert main(["deploy", str(trip.run), "--volume", "other", "--yes"]) == 4
    assert "the files are on volume vol0001, not on other" in "".join(capsys.readouterr()).replace("\n", " ")


def cut_and_fetched(trip: Trip, capsys) -> None:
    """Cut off at every few calls; then damaged; then whole."""
    weights = trip.run / "export/bf16/model.safetensors"
    size = len(trip.s3.objects("vol0001")[f"{trip.folder}/model.safetensors"])
    for stop_after in range(0, 20, 2):
        trip.s3.stop_after = len(trip.s3.calls) + stop_after
        code = main(["fetch", str(trip.run)])
        trip.s3.stop_after = None
        if code == 0:
            break
        assert code == 4 and "goes on where it was" in "".join(capsys.readouterr()).replace("\n", " ")
    else:
        raise AssertionError("it never ended")
    assert "checksums agree" in capsys.readouterr().out and weights.stat().st_size == size
    weights.rename(weights.with_name(".model.safetensors.partial"))  # cut off in the middle of a file
    os.truncate(weights.with_name(".model.safetensors.partial"), size // 2)
    assert main(["fetch", str(trip.run)]) == 0
    assert f"{(size - size // 2) / 1e9:.2f} GB were fetched" in capsys.readouterr().out
    weights.unlink()
    weights.with_name(".model.safetensors.partial").write_bytes(b"x" * (size // 2))  # of another file
    assert main(["fetch", str(trip.run), "--formats", "bf16"]) == 0
    weights.unlink()
    good = trip.s3.objects("vol0001")[f"{trip.folder}/model.safetensors"]
    trip.put_on_volume(f"{trip.folder}/model.safetensors", good[:-1] + bytes([good[-1] ^ 1]))
    capsys.readouterr()
    assert main(["fetch", str(trip.run)]) == 4
    assert "is not what its manifest says" in "".join(capsys.readouterr()).replace("\n", " ")
    assert not weights.exists()
    trip.put_on_volume(f"{trip.folder}/model.safetensors", good)
    for kind in FAULTS:
        for call in range(1, 4):
            weights.unlink(missing_ok=True)
            trip.s3.faults = {len(trip.s3.calls) + call: kind}
            assert main(["fetch", str(trip.run)]) == 0, (kind, call)
    trip.s3.faults = {}


def record_of(folder: Path, **facts) -> Path:
    (folder / "export/bf16").mkdir(parents=True)
    write_json(folder / "launch.json", {"name": "loadmaster-x", "run_dir": "/workspace/loadmaster/runs/x", **facts})
    return folder


def test_what_cannot_be_fetched_is_a_sentence(tmp_path, capsys, monkeypatch) -> None:
    def said(*words) -> str:
        assert main(["fetch", *words]) == 4
        return "".join(capsys.readouterr()).replace("\n", " ")

    assert "is no folder of a launch" in said(str(tmp_path / "nowhere"))
    ssh = record_of(tmp_path / "ssh", host="ada@gpu1:2222", kind="ssh")
    assert "scp -r -P 2222 ada@gpu1:/workspace/loadmaster/runs/x/export" in said(str(ssh))
    home = record_of(tmp_path / "a run", host="gpu1", ssh_config="/home/ada/ssh config")
    write_json(home / "launch.json", read_json(home / "launch.json") | {"run_dir": "~/runs/x"})
    assert f"scp -r -F '/home/ada/ssh config' gpu1:runs/x/export '{home}'" in said(str(home))
    empty = record_of(tmp_path / "empty", volume="vol1")
    write_json(empty / "result.json", {})  # its small files came home
    assert "exported nothing" in said(str(empty))
    write_json(empty / "export/bf16/manifest.json", {"schema": 1, "files": []})
    assert "did not export fp8; it has bf16" in said(str(empty), "--formats", "fp8")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set" in said(str(empty))


@pytest.mark.parametrize("path", ["../../../stolen", "/tmp/stolen", None])
def test_a_manifest_from_a_pod_writes_nowhere_but_in_its_folder(tmp_path, path) -> None:
    class Anything:
        def get(self, name, path, file, progress):
            raise AssertionError(f"{path} would have been written")

    folder = record_of(tmp_path / "run", volume="vol1")
    files = [{"path": path, "bytes": 1, "sha256": "0" * 64}]
    write_json(folder / "export/bf16/manifest.json", {"schema": 1, "files": files, "bytes": 1})
    with pytest.raises(ExportRejected, match="not inside its folder"):
        fetch(folder, ["bf16"], Anything(), where(folder))


def test_a_launch_that_is_to_fetch_asks_for_its_keys_before_anything_is_rented(place, monkeypatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    with pytest.raises(LoadmasterError, match="are not set"):
        place.launch("launch.fetch=true")
    assert place.fake.created == []
    monkeypatch.delenv("RUNPOD_S3_URL", raising=False)
    assert _with_a_way_home(("US-TX-3", "EU-RO-1"), []) == ("EU-RO-1",)
    with pytest.raises(LoadmasterError, match="volumes in US-TX-3 have no S3 API"):
        _with_a_way_home(("US-TX-3",), [])


def test_large_data_is_on_the_volume_before_the_machine_starts(place, there, monkeypatch) -> None:
    data = place.folder / "mine.jsonl"
    rows = ({"prompt": f"Count to {n}.", "completion": os.urandom(100).hex()} for n in range(1200))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    created = place.fake.createPod
    seen: list[dict[str, bytes]] = []

    def after_the_data(ids, query, body):
        seen.append(there.objects("vol0001"))
        return created(ids, query, body)

    monkeypatch.setattr(place.fake, "createPod", after_the_data)
    words = ("data=file", f"data.path={data}")
    assert place.launch(*words) == 0, place.said
    ((name, content),) = seen[0].items()
    assert name.startswith("loadmaster/data/") and name.endswith("-mine.jsonl") and content == data.read_bytes()
    assert "mine.jsonl (0.3 MB) goes to the volume first" in place.said
    puts = sum(call.startswith("PutObject") for call in there.calls)
    assert place.launch(*words, "seed=3") == 0
    assert sum(call.startswith("PutObject") for call in there.calls) == puts == 1
    there.stop_after = len(there.calls)  # the network is gone: nothing is rented
    with pytest.raises(LoadmasterError, match="goes on where it was"):
        place.launch(*words, "seed=4")
    assert place.fake.pods == {} and len(place.fake.created) == 3


def test_launch_fetch_brings_the_exports_home_after_the_machine_has_ended(place, there, monkeypatch) -> None:
    exporter = place.folder / "exporter.py"
    exporter.write_text(EXPORTER)
    run_job = lambda stop, choice, folder, run_dir: [sys.executable, str(exporter), run_dir]  # noqa: E731
    monkeypatch.setattr(order, "command", run_job)
    seen: list[bool] = []
    provider = place.provider
    opened = type(provider).bucket

    def after(self, volume):
        seen.append(place.fake.pods == {})
        leave_on_volume(place.folder / "workspace", there)
        return opened(self, volume)

    monkeypatch.setattr(type(provider), "bucket", after)
    assert place.launch("launch.fetch=true") == 0, place.said
    (run,) = (place.folder / "runs/qlora_8b").iterdir()
    assert seen == [True] and verify_manifest(run / "export/bf16") == []

    def broken(self, volume):
        raise StoppedOnRequest("now")

    monkeypatch.setattr(type(provider), "bucket", broken)
    with pytest.raises(StoppedOnRequest, match=r"loadmaster fetch runs/qlora_8b/loadmaster-\S+` goes on"):
        place.launch("launch.fetch=true", "seed=1")
    assert place.fake.pods == {}
