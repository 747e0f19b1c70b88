"""What a job left on a volume, looked at and fetched there: by a volume that is a dict, without a service."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.export.manifest import NAME, write_manifest
from loadmaster.files import read_json, write_json
from loadmaster.launch.record import Left, away, where
from loadmaster.launch.volume import fetch as fetch_module
from loadmaster.launch.volume.bucket import Entry
from loadmaster.launch.volume.fetch import fetch, fetchable, look

FOLDER = "runs/x/export/bf16"
FILES = {"config.json": b"{}", "tokenizer/vocab.txt": b"a b c", "weights": b"w" * 100}
WRITTEN = datetime(2026, 11, 30, tzinfo=UTC)
SECOND = timedelta(seconds=1)


class Volume:
    """All files were written a second before their manifest."""

    volume = "vol1"

    def __init__(self, artifact: Path):
        self.read: list[str] = []
        self.files = {f"{FOLDER}/{path}": (data, WRITTEN - SECOND) for path, data in FILES.items()}
        self.files[f"{FOLDER}/{NAME}"] = ((artifact / NAME).read_bytes(), WRITTEN)

    def put(self, path: str, data: bytes, modified: datetime = WRITTEN - SECOND) -> None:
        self.files[f"{FOLDER}/{path}"] = (data, modified)

    def entries(self, folder: str) -> dict[str, Entry]:
        found = {name: facts for name, facts in self.files.items() if name.startswith(f"{folder}/")}
        return {name: Entry(len(data), modified) for name, (data, modified) in found.items()}

    def sha256(self, name: str) -> str:
        self.read.append(name.removeprefix(f"{FOLDER}/"))
        return hashlib.sha256(self.files[name][0]).hexdigest()

    def get(self, name: str, path: Path, file: dict, progress) -> int:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(self.files[name][0])
        progress(file["bytes"])
        return file["bytes"]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An export whose manifest alone came home."""
    artifact = tmp_path / "export/bf16"
    for name, data in FILES.items():
        (artifact / name).parent.mkdir(parents=True, exist_ok=True)
        (artifact / name).write_bytes(data)
    write_manifest(artifact, {"format": "bf16"})
    for name in FILES:
        (artifact / name).unlink()
    write_json(tmp_path / "launch.json", {"volume": "vol1", "run_dir": "/workspace/runs/x"})
    return artifact


@pytest.fixture
def volume(artifact: Path) -> Volume:
    return Volume(artifact)


def test_files_that_are_older_than_their_manifest_are_not_read_back(artifact, volume):
    said: list[str] = []
    look(artifact, FOLDER, volume, said.append)
    assert volume.read == [NAME]
    assert said == [f"{FOLDER} on volume vol1: 3 files, 0.00 GB, as exported (0 read back, 3 unchanged since their "
                    "manifest)"]


@pytest.mark.parametrize("later", [0 * SECOND, SECOND])
def test_a_file_as_old_as_its_manifest_or_younger_is_read_back(artifact, volume, later, monkeypatch):
    """S3 says when it was written to the second only."""
    monkeypatch.setattr(fetch_module, "LARGE_BYTES", 99)
    for name in ("weights", "config.json"):
        volume.put(name, FILES[name], WRITTEN + later)
    said: list[str] = []
    look(artifact, FOLDER, volume, said.append)
    assert sorted(volume.read) == ["config.json", NAME, "weights"]
    assert said[0].startswith("weights is not older than its manifest: reading") and len(said) == 2
    assert "(2 read back, 1 unchanged" in said[1]
    volume.put("weights", b"v" * 100, WRITTEN + later)
    with pytest.raises(ExportRejected, match=r"so it is not deployed:\n  weights: changed since it was"):
        look(artifact, FOLDER, volume, said.append)


@pytest.mark.parametrize("size", [99, 101])
def test_files_of_another_size_and_missing_ones_are_all_named(artifact, volume, size):
    volume.put("weights", b"w" * size)
    del volume.files[f"{FOLDER}/config.json"]
    said = rf"config.json: missing\n  weights: {size} bytes, the manifest says 100$"
    with pytest.raises(ExportRejected, match=said):
        look(artifact, FOLDER, volume)


def test_another_manifest_or_none_is_not_what_is_here_and_more_files_would_be_served(artifact, volume):
    volume.put("more", b"")
    with pytest.raises(LoadmasterError, match=r"a server would load them: .*/more"):
        look(artifact, FOLDER, volume)
    del volume.files[f"{FOLDER}/more"]
    volume.put(NAME, b"{}", WRITTEN)
    for _ in range(2):
        with pytest.raises(ExportRejected, match="does not hold the export that"):
            look(artifact, FOLDER, volume)
        volume.files.pop(f"{FOLDER}/{NAME}", None)


def test_what_is_fetched_is_compared_with_its_manifest(artifact, volume):
    run, said = artifact.parents[1], []
    assert fetchable(run, None) == (where(run), ["bf16"])
    assert fetch(run, ["bf16"], volume, where(run), said.append) == [artifact]
    assert {name: (artifact / name).read_bytes() for name in FILES} == FILES
    assert said == [f"{artifact}: 0.00 GB, checksums agree; 0.00 GB were fetched"]
    volume.put("weights", b"v" * 100)  # that Bucket.get would not let come
    with pytest.raises(ExportRejected, match=r"bf16 is not what was exported:\n  weights: changed"):
        fetch(run, ["bf16"], volume, where(run), said.append)


@pytest.mark.parametrize("lost", ["path", "bytes", "sha256", None])
def test_a_damaged_manifest_is_a_sentence_and_nothing_is_taken_by_it(artifact, volume, lost):
    run, manifest = artifact.parents[1], read_json(artifact / NAME)
    first, *others = manifest["files"]
    damaged = {name: value for name, value in first.items() if name != lost} if lost else "config.json"
    write_json(artifact / NAME, manifest | {"files": [*others, damaged]})
    for take in (lambda: look(artifact, FOLDER, volume), lambda: fetch(run, ["bf16"], volume, where(run))):
        with pytest.raises(ExportRejected, match=r"without its size and sha256.*launch the job again"):
            take()
    assert volume.read == [] and [path for path in artifact.rglob("*") if path.is_file()] == [artifact / NAME]
    del manifest["files"]
    write_json(artifact / NAME, manifest)
    with pytest.raises(ExportRejected, match="is not what was exported"):
        fetch(run, ["bf16"], volume, where(run))


def test_what_takes_long_is_shown_as_it_comes(artifact, volume):
    run, manifest = artifact.parents[1], read_json(artifact / NAME)
    large = [file | {"bytes": 10**9} for file in manifest["files"]]
    write_json(artifact / NAME, manifest | {"files": large})
    said: list[str] = []
    with pytest.raises(ExportRejected, match="bytes, the manifest says 1000000000"):
        fetch(run, ["bf16"], volume, where(run), said.append)
    assert said == [f"{done}.0 of 3.0 GB of bf16 are here" for done in (1, 2, 3)]


def test_the_formats_that_are_asked_for_are_fetched_and_no_others(artifact):
    run = artifact.parents[1]
    write_json(run / "export/fp8" / NAME, {})
    assert [fetchable(run, formats)[1] for formats in (None, [], ["fp8"])] == [["bf16", "fp8"]] * 2 + [["fp8"]]


def test_an_export_is_away_only_where_none_of_its_files_is_here(artifact):
    run = artifact.parents[1]
    assert away(run, artifact) == Left("vol1", "/workspace/runs/x")
    (artifact / "weights").touch()
    assert away(run, artifact) is None
    (artifact / "weights").unlink()
    for damaged in (7, {"path": None}, {}):
        manifest = read_json(artifact / NAME)
        write_json(artifact / NAME, manifest | {"files": [*manifest["files"], damaged]})
        assert away(run, artifact) is None  # verify_manifest says what is wrong
        write_json(artifact / NAME, manifest)
