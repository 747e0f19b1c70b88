"""A Pod that ended itself while nobody listened: its volume says how its job ended, and has its small files."""

from __future__ import annotations

import contextlib
import json
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadmaster.cli import main
from loadmaster.errors import ProviderError
from loadmaster.export.manifest import write_manifest
from loadmaster.files import write_json
from loadmaster.launch.order import is_small_file
from loadmaster.launch.volume import ended as ended_module
from loadmaster.launch.volume.bucket import Bucket, Entry
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.fake_s3 import ACCESS, FAULTS, SECRET, FakeS3
from tests.launch.place import everything_written


class Unwatched:
    """A Pod that says that it is armed, leaves `files` on its volume, and is gone."""

    def __init__(self, s3: FakeS3, ends: dict[int, list], files: dict[str, bytes]):
        self.s3, self.ends, self.files = s3, ends, files

    def __call__(self, fake: FakeRunpod, id: str) -> None:
        self.leave(fake, id)
        threading.Timer(0.1, fake.end_pod, (id,)).start()

    def leave(self, fake: FakeRunpod, id: str) -> None:
        job = json.loads(fake.pods[id]["env"]["LOADMASTER_JOB"])
        for node, end in self.ends.items():
            self.put(f"{job['folder']}/ended-{node}.json", json.dumps(end).encode())
        for name, content in self.files.items():
            self.put(f"{job['run_dir']}/{name}", content)
        fake.say(id, '::loadmaster {"event": "armed", "deadline": 0}')

    def put(self, path: str, content: bytes) -> None:
        self.s3.direct("PUT", f"/vol0001/{path.removeprefix('/workspace/')}", content)


JOBS = "loadmaster/jobs/loadmaster-x"
FILES = {
    "result.json": b'{"steps": 3}', "bundle/.runpod/hub.json": b"{}", "export/bf16/manifest.json": b'{"files": []}',
    "export/bf16/model.safetensors": b"weights", "checkpoints/step-3/state.pt": b"state",
}


def test_a_job_that_ended_while_nobody_listened_has_its_own_code_and_hands_back_its_files(place, s3) -> None:
    place.fake.runner = Unwatched(s3, {0: [0, None]}, FILES)
    assert place.launch() == 0, place.said
    (run,) = (place.folder / "runs/qlora_8b").iterdir()
    assert (run / "result.json").read_bytes() == FILES["result.json"]
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        "bundle/.runpod/hub.json", "export/bf16/manifest.json", "launch.json", "pod.log", "result.json",
    ]
    assert "the Pod is gone" in place.said and "it had ended before, says the volume loadmaster" in place.said
    assert "the job ended with exit code 0; about $" in place.said and place.fake.pods == {}
    assert SECRET not in place.said + everything_written(place.folder)
    place.fake.runner = Unwatched(s3, {0: [5, "an export was rejected"]}, FILES)
    assert place.launch("seed=2") == 5 and "an export was rejected" in place.said


def test_after_the_deadline_the_volume_is_asked_too(place, s3, monkeypatch) -> None:
    """A laptop that wakes up after it, before anybody has said that the Pod is gone."""
    place.fake.runner = Unwatched(s3, {0: [0, None]}, FILES)
    monkeypatch.setattr(threading, "Timer", lambda *arguments: threading.Thread())  # the Pod is still there
    assert place.launch("launch.max_hours=0.0001") == 0, place.said
    assert "h are over" in place.said and place.fake.pods == {}


def test_a_pod_that_was_lost_before_its_job_had_ended_is_an_error(place, s3) -> None:
    place.fake.runner = Unwatched(s3, {}, FILES)
    with pytest.raises(ProviderError, match=r"is gone(.|\n)*has no end of it either: the same command goes on"):
        place.launch()
    assert list((place.folder / "runs").rglob("result.json")) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_a_volume_that_answers_badly_is_read_all_the_same(s3, kind, tmp_path) -> None:
    Unwatched(s3, {}, {}).put(f"{JOBS}/ended-0.json", b"[5, null]")
    with Bucket("vol0001", "EU-RO-1", read_timeout_s=1) as bucket:
        for call in (1, 2):
            s3.faults = {len(s3.calls) + call: kind}
            assert ended_module.ended(bucket, "loadmaster-x", 1).code == 5


def test_without_its_key_what_is_not_known_is_said_and_fetch_brings_it_home_later(
    place, s3, monkeypatch, capsys
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    place.fake.runner = Unwatched(s3, {0: [0, None]}, {"result.json": FILES["result.json"]})
    with pytest.raises(ProviderError, match=r"with the S3 API key in AWS_ACCESS_KEY_ID(.|\n)*`loadmaster fetch runs/"):
        place.launch()
    (run,) = (place.folder / "runs/qlora_8b").iterdir()
    assert main(["fetch", str(run)]) == 4 and "are not set" in "".join(capsys.readouterr()).replace("\n", " ")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    assert main(["fetch", str(run)]) == 0
    assert "the job ended with exit code 0" in capsys.readouterr().out
    assert (run / "result.json").read_bytes() == FILES["result.json"]
    assert main(["fetch", str(run)]) == 4 and "exported nothing" in "".join(capsys.readouterr())
    with pytest.raises(ProviderError, match="without a volume nothing of it is kept"):
        place.launch("launch.volume=null")
    monkeypatch.setattr(ended_module, "reachable", lambda place: False)  # fetch would bring nothing
    with pytest.raises(ProviderError, match=r"have no S3 API\. The same command goes on") as unreachable:
        place.launch("seed=2")
    assert "loadmaster fetch" not in str(unreachable.value)


def test_exports_are_fetched_though_the_log_lost_the_small_files(place, s3, tmp_path) -> None:
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16/model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path / "bf16", {"format": "bf16"})
    exported = {f"export/bf16/{path.name}": path.read_bytes() for path in (tmp_path / "bf16").iterdir()}
    unwatched = Unwatched(s3, {0: [0, None]}, FILES | exported)

    def ended_with_a_part_lost(fake: FakeRunpod, id: str) -> None:
        unwatched.leave(fake, id)
        end = {"event": "end", "exit_code": 0, "said": None, "parts": 1, "sha256": "", "left": []}
        fake.say(id, f"::loadmaster {json.dumps(end)}")

    place.fake.runner = ended_with_a_part_lost
    assert place.launch("launch.fetch=true") == 0, place.said
    assert "did not come through the log whole" in place.said
    (run,) = (place.folder / "runs/qlora_8b").iterdir()
    assert (run / "export/bf16/model.safetensors").read_bytes() == b"weights"
    assert (run / "result.json").read_bytes() == FILES["result.json"]


def test_a_job_that_has_not_ended_is_not_fetched(place, s3, tmp_path, capsys) -> None:
    run: Path = tmp_path / "one"
    place.fake.volumes["vol0001"] = {
        "id": "vol0001", "name": "loadmaster", "size": 50, "dataCenter": "EU-RO-1", "type": "STANDARD",
    }
    record = {"name": "loadmaster-x", "run_dir": "/workspace/loadmaster/runs/x", "volume": "vol0001"}
    write_json(run / "launch.json", record)
    assert main(["fetch", str(run)]) == 4
    assert "has not ended, says the volume" in "".join(capsys.readouterr()).replace("\n", " ")


def test_of_several_nodes_the_one_that_failed_first_says_the_code(s3) -> None:
    def put(node: int, end: list) -> None:
        with contextlib.suppress(KeyError):
            s3.remove("vol0001", f"{JOBS}/ended-{node}.json")
        Unwatched(s3, {}, {}).put(f"{JOBS}/ended-{node}.json", json.dumps(end).encode())

    with Bucket("vol0001", "EU-RO-1") as bucket:
        assert ended_module.ended(bucket, "loadmaster-x", 2) is None
        put(1, [0, None])
        assert ended_module.ended(bucket, "loadmaster-x", 2) is None  # node 0 may still export
        put(1, [7, "lost its GPU"])
        assert ended_module.ended(bucket, "loadmaster-x", 2).code == 7
        put(0, [143, None])
        end = ended_module.ended(bucket, "loadmaster-x", 2)
        assert end.said == ("node 1: lost its GPU",)
        put(1, [0, None])
        put(0, [0, None])
        assert ended_module.ended(bucket, "loadmaster-x", 2).code == 0


class Nodes:
    """A volume on which each node has written its end: (code, what it said), minutes after the hour."""

    volume = "vol0001"

    def __init__(self, *ends: tuple[int, str | None, int]):
        self.ends = {f"{JOBS}/ended-{node}.json": end for node, end in enumerate(ends)}

    def entries(self, folder: str) -> dict[str, Entry]:
        hour = datetime(2026, 11, 30, 12, tzinfo=UTC)
        return {name: Entry(20, hour.replace(minute=end[2])) for name, end in self.ends.items()}

    def bring(self, name: str, path: Path, size: int) -> None:
        write_json(path, self.ends[name][:2])


def test_who_was_ended_for_another_node_s_failure_is_not_its_cause() -> None:
    def ended(*ends: tuple) -> ended_module.End:
        return ended_module.ended(Nodes(*ends), "loadmaster-x", len(ends))

    end = ended((143, None, 3), (9, "then this", 2), (1, "first this", 1))
    assert (end.code, end.said, end.at.minute) == (1, ("node 1: then this", "node 2: first this"), 3)
    assert ended((5, None, 2), (7, None, 1)).code == 5
    end = ended((137, "out of memory", 1), (0, None, 2))
    assert (end.code, end.said) == (137, ("node 0: out of memory",))
    assert ended((5, "rejected", 1)).said == ("rejected",)
    with pytest.raises(ProviderError, match=r"ended-1\.json on volume vol0001 is damaged"):
        ended((0, None, 1), (None, None, 1))


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("metrics.jsonl", True), ("export/bf16/manifest.json", True), ("bundle/.runpod/hub.json", True),
        ("export/bf16/model.safetensors", False), ("checkpoints/result.json", False), ("bundle/../x", False),
    ],
)
def test_what_counts_as_a_small_file(name: str, small: bool) -> None:
    assert is_small_file(name) is small
