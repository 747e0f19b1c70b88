"""Where the run of a launch lies, as its launch.json says: on a network volume, or on a host."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loadmaster.errors import LoadmasterError
from loadmaster.export.manifest import read_manifest
from loadmaster.files import read_json
from loadmaster.launch.provider import MOUNT
from loadmaster.rundir import LAUNCH_RECORD


@dataclass(frozen=True)
class Left:
    """Where a launched run lies."""

    volume: str | None
    """Id of the network volume; None: on hosts."""
    run_dir: str
    """As the machine saw it."""
    host: str | None = None
    ssh_config: str | None = None
    """With which the host is reached."""

    @property
    def folder(self) -> str:
        """Its path on the volume."""
        return str(PurePosixPath(self.run_dir).relative_to(MOUNT))


def where(run_dir: Path) -> Left | None:
    """Where the run of this launch's folder lies; None where it is no launch's folder, or nothing was kept."""
    found = record_of(run_dir)
    if not found.get("run_dir") or not (found.get("volume") or found.get("host")):
        return None
    return Left(found.get("volume"), found["run_dir"], found.get("host"), found.get("ssh_config"))


def on_a_volume(run_dir: Path) -> Left:
    """Where the run of this launch's folder lies on a volume. Raises LoadmasterError where it does not."""
    left = where(run_dir)
    if left is None:
        raise LoadmasterError(
            f"{run_dir} is no folder of a launch that left its exports elsewhere ({LAUNCH_RECORD} there would say so): "
            "give runs/<recipe>/loadmaster-..., which launch=runpod printed"
        )
    if left.volume is None:
        raise LoadmasterError(f"the exports of {run_dir} are on a host of yours: {copied_by(left, run_dir)}")
    return left


def record_of(run_dir: Path) -> dict[str, Any]:
    """What the launch wrote down; {} where it is no launch's folder. Raises LoadmasterError where it is damaged."""
    if not os.path.isfile(run_dir / LAUNCH_RECORD):
        return {}
    try:
        found = read_json(run_dir / LAUNCH_RECORD)
    except ValueError as error:
        raise LoadmasterError(f"{run_dir / LAUNCH_RECORD} is damaged ({error}); start the launch again") from None
    if not isinstance(found, dict):
        raise LoadmasterError(f"{run_dir / LAUNCH_RECORD} is no launch's record; start the launch again")
    return found


def away(run_dir: Path, artifact: Path) -> Left | None:
    """Where the files of this export are, when none of them is here; None: they are (or should be) here."""
    files = read_manifest(artifact).get("files") or []
    paths = [file.get("path") if isinstance(file, dict) else None for file in files]
    # One that is damaged counts as here, where verify_manifest says how.
    if any(not isinstance(path, str) or (artifact / path).exists() for path in paths):
        return None
    return where(run_dir)


def is_deployed_from_a_volume(run_dir: Path) -> bool:
    """Whether this run's bundle has an endpoint that finds the export on the volume that the launch left it on."""
    left, file = where(run_dir), run_dir / "bundle" / "endpoint.json"
    if left is None or left.volume is None or not file.is_file():
        return False
    wanted = read_json(file)
    return "volume_path" in wanted and wanted["request"].get("image") is not None


def copied_by(left: Left, run_dir: Path) -> str:
    """The command that brings a run home from a host."""
    host, _, port = str(left.host).partition(":")
    options = [*(["-F", left.ssh_config] if left.ssh_config else []), *(["-P", port] if port else [])]
    there = left.run_dir.removeprefix("~/")  # from the login's home, where a path begins there
    return shlex.join(["scp", "-r", *options, f"{host}:{there}/export", str(run_dir)])
