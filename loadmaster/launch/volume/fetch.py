"""The exports that a launched job left: they lie on the network volume, and only their manifests came home.

    deploy    needs them on the volume and nowhere else, so it looks at them there: the manifest is the one that came
              home, every file has its size, none is besides, and all were written before the manifest, which an
              export writes last. A file that was not (to the second, which is what S3 says) is read back and hashed.
    fetch     brings them home, each file compared with its SHA-256; what was cut off goes on where it was
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected, LoadmasterError
from loadmaster.export.manifest import NAME, exported, read_manifest, stays_inside, verify_manifest
from loadmaster.files import sha256_file
from loadmaster.launch.record import Left, on_a_volume
from loadmaster.launch.volume.bucket import Bucket
from loadmaster.launch.volume.upload import Shown, refuse_foreign
from loadmaster.words import counted

LARGE_BYTES = 10**8
"""Reading back more than this is said."""

Echo = Callable[[str], None]


def look(artifact: Path, folder: str, bucket: Bucket, echo: Echo = print) -> None:
    """Whether `folder` on the volume is the export whose manifest is here. Raises ExportRejected where it is not."""
    at = f"{folder} on volume {bucket.volume}"
    there, manifest = bucket.entries(folder), f"{folder}/{NAME}"
    files = _listed(artifact)
    refuse_foreign({f"{folder}/{file['path']}" for file in files} | {manifest}, folder, bucket.volume, there)
    if manifest not in there or bucket.sha256(manifest) != sha256_file(artifact / NAME):
        raise ExportRejected(f"{at} does not hold the export that {artifact / NAME} describes: launch the job again")
    wrong, back = [], 0
    for file in files:
        name = f"{folder}/{file['path']}"
        entry = there.get(name)
        if entry is None:
            wrong.append(f"{file['path']}: missing")
        elif entry.bytes != file["bytes"]:
            wrong.append(f"{file['path']}: {entry.bytes} bytes, the manifest says {file['bytes']}")
        elif entry.modified >= there[manifest].modified:
            back += 1
            if file["bytes"] > LARGE_BYTES:
                echo(f"{file['path']} is not older than its manifest: reading {file['bytes'] / 1e9:.2f} GB of it back")
            if bucket.sha256(name) != file["sha256"]:
                wrong.append(f"{file['path']}: changed since it was exported (sha256 differs)")
    if wrong:
        raise ExportRejected(f"{at} is not what was exported, so it is not deployed:\n  " + "\n  ".join(wrong))
    total = sum(file["bytes"] for file in files)
    echo(
        f"{at}: {counted(len(files), 'file')}, {total / 1e9:.2f} GB, as exported ({back} read back, "
        f"{len(files) - back} unchanged since their manifest)"
    )


def fetch(run_dir: Path, formats: list[str], bucket: Bucket, left: Left, echo: Echo = print) -> list[Path]:
    """Bring these exports home, into the folders where their manifests are; returns the folders.

    Raises ProviderError for what the service refuses (the same call goes on where it was), Damaged for a file that is
    not what its manifest says.
    """
    done = []
    for name in formats:
        artifact = run_dir / "export" / name
        files = _listed(artifact)
        total = sum(file["bytes"] for file in files)
        shown = Shown(total, echo, f"of {name} are here")
        fetched = sum(
            bucket.get(f"{left.folder}/export/{name}/{file['path']}", artifact / file["path"], file, shown.add)
            for file in files
        )
        if problems := verify_manifest(artifact):
            raise ExportRejected(f"{artifact} is not what was exported:\n  " + "\n  ".join(problems))
        echo(f"{artifact}: {total / 1e9:.2f} GB, checksums agree; {fetched / 1e9:.2f} GB were fetched")
        done.append(artifact)
    return done


def _listed(artifact: Path) -> list[dict[str, Any]]:
    """The files of a manifest that a machine sent. Raises ExportRejected for what can be no entry of one."""
    files = read_manifest(artifact).get("files") or []
    kinds = {"bytes": int, "sha256": str}
    for file in files:
        whole = isinstance(file, dict) and all(isinstance(file.get(name), kind) for name, kind in kinds.items())
        if not whole or not stays_inside(file.get("path")):
            raise ExportRejected(
                f"{artifact / NAME} lists a file that is not inside its folder, or without its size and sha256: "
                "nothing of it is fetched or deployed; launch the job again"
            )
    return files


def fetchable(run_dir: Path, formats: list[str] | None) -> tuple[Left, list[str]]:
    """Where the run lies, and the formats to fetch: as asked for, else all that it has. Raises LoadmasterError."""
    left = on_a_volume(run_dir)
    there = exported(run_dir)
    if not there:
        raise LoadmasterError(f"the job of {run_dir} exported nothing; its log there says why")
    if missing := sorted(set(formats or ()) - set(there)):
        raise LoadmasterError(f"the job of {run_dir} did not export {', '.join(missing)}; it has {', '.join(there)}")
    return left, list(formats or there)
