"""A kill or a full disk at any moment of publishing leaves a whole artifact: the earlier one, or the new one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadmaster import files
from loadmaster.export.manifest import read_manifest, verify_manifest, write_manifest

PUBLISH = """
import resource, sys
from pathlib import Path
from loadmaster.export.manifest import write_manifest
from loadmaster.files import publish_folder

target, first, most_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if most_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
print("ready", flush=True)
for version in range(first, first + 100_000):
    with publish_folder(target) as folder:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            (folder / name).write_bytes(str(version).encode() * 20_000)
        write_manifest(folder, {"format": "bf16", "recipe": str(version)})
"""


def publishing(target: Path, first: int, most_bytes: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, str(target), str(first), str(most_bytes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def publish(target: Path, version: str) -> None:
    with files.publish_folder(target) as folder:
        (folder / "model.safetensors").write_text(version)
        write_manifest(folder, {"format": "bf16", "recipe": version})


def test_killed_at_random_moments_there_is_always_one_whole_version(tmp_path):
    target, chance, seen = tmp_path / "bf16", random.Random(0), ["0"]
    publish(target, "0")
    for attempt in range(10):
        process = publishing(target, 1 + 100_000 * attempt)
        assert process.stdout.readline() == "ready\n"
        while attempt % 2 and read_manifest(target)["recipe"] == seen[-1]:  # every other time after a publication
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert verify_manifest(target) == []
        version = read_manifest(target)["recipe"]
        assert version == "0" or (target / "config.json").read_text() == version * 20_000
        seen.append(version)
    assert len(set(seen)) > 5
    publish(target, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"] and verify_manifest(target) == []


def test_a_disk_that_takes_no_more_bytes_leaves_the_earlier_version(tmp_path):
    target = tmp_path / "bf16"
    publish(target, "0")
    process = publishing(target, 10, most_bytes=30_000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "OSError" in errors
    assert read_manifest(target)["recipe"] == "0" and verify_manifest(target) == []
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_new_version_takes_the_place_of_the_earlier_one(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "_exchanged", lambda a, b: False)
    for version in ("1", "2"):
        publish(tmp_path / "bf16", version)
        assert read_manifest(tmp_path / "bf16")["recipe"] == version
        assert [path.name for path in tmp_path.iterdir()] == ["bf16"]


def test_where_folders_cannot_change_places_a_kill_between_the_renames_is_mended_by_the_next_call(tmp_path):
    target = tmp_path / "bf16"
    publish(target, "1")
    target.rename(tmp_path / ".bf16.previous")
    with pytest.raises(RuntimeError), files.publish_folder(target):
        assert read_manifest(target)["recipe"] == "1"
        raise RuntimeError("stopped")
    assert verify_manifest(target) == []
