"""An exported artifact onto a network volume: every file that its manifest lists, and the manifest last.

So a folder on the volume that has a manifest.json is complete. Re-running sends what is missing or changed, and
nothing else; a file there that the manifest does not list stops it, because a server would load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loadmaster.errors import LoadmasterError
from loadmaster.export.manifest import NAME, read_manifest
from loadmaster.launch.volume.bucket import Bucket, Damaged, file_facts
from loadmaster.words import counted


def upload(artifact: Path, folder: str, bucket: Bucket, echo: Callable[[str], None] = print) -> int:
    """Bring `artifact` to `folder` (a path on the volume) and verify it there: names, sizes, checksums.

    Returns the bytes that were not there already.

    Raises LoadmasterError for foreign files there, ProviderError for what the service refuses (the same command goes
    on where it was), Damaged when the volume does not have what was sent.
    """
    files = [*read_manifest(artifact)["files"], file_facts(artifact / NAME)]
    total = sum(file["bytes"] for file in files)
    refuse_foreign({f"{folder}/{file['path']}" for file in files}, folder, bucket.volume, bucket.entries(folder))
    shown = Shown(total, echo, "are on the volume")
    sent = 0
    for file in files:
        sent += bucket.put(artifact / file["path"], f"{folder}/{file['path']}", file["sha256"], shown.add)
    there = bucket.entries(folder)
    if missing := [file["path"] for file in files if f"{folder}/{file['path']}" not in there]:
        raise Damaged(f"{folder} on volume {bucket.volume} lacks {', '.join(missing)} after it was sent; start again")
    echo(
        f"{folder} on volume {bucket.volume}: {counted(len(files), 'file')}, {total / 1e9:.2f} GB, checksums agree; "
        + (f"{sent / 1e9:.2f} GB were sent" if sent else "all of it was there")
    )
    return sent


def refuse_foreign(known: set[str], folder: str, volume: str, there: Iterable[str]) -> None:
    """Raises LoadmasterError for what lies there and is not `known`."""
    if foreign := sorted(set(there) - known):
        raise LoadmasterError(
            f"{folder} on volume {volume} holds files that this artifact does not have, and a server would "
            f"load them: {', '.join(foreign[:5])}{' ...' if len(foreign) > 5 else ''}. Delete them there, or bundle "
            "the run under another folder"
        )


class Shown:
    """A line for each tenth of the artifact."""

    def __init__(self, total: int, echo: Callable[[str], None], where: str):
        self.total, self.echo, self.where, self.done, self.tenths = total, echo, where, 0, 0

    def add(self, sent: int) -> None:
        self.done += sent
        tenths = 10 * self.done // max(1, self.total)
        if tenths > self.tenths and self.total > 10**9:
            self.tenths = tenths
            self.echo(f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB {self.where}")
