"""What travels to other machines: the resolved job as job.yaml, and the files that it names and that lie here.

Data that is too large to travel along goes to the volume before the machine starts, under a name with its hash, so that
the same data goes there once. A job that arrives is a job for that hardware, launched locally; paths of data that
travels along are changed to where it will lie: from the folder that the job is started in, which each launch has its
own of, so that a later launch of the same job is the same job to its run directory. The same job gives the same bytes.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from loadmaster.config.compose import Composed
from loadmaster.config.jobhash import job_hash
from loadmaster.config.schema import HardwareConfig, Job
from loadmaster.config.shipped import SCHEME, local_path
from loadmaster.errors import ConfigError
from loadmaster.files import sha256_file, sha256_json
from loadmaster.launch.provider import MOUNT, Upload


def data_paths(job: Job) -> list[tuple[str, str]]:
    """(field, path) of data and chat template, but for what is shipped with loadmaster; a path may be a Hub id."""
    named = [("data.path", path) for path in job.data.paths]
    if isinstance(job.data.validation, str):
        named.append(("data.validation", job.data.validation))
    if job.model.chat_template is not None:
        named.append(("model.chat_template", job.model.chat_template))
    return [(key, path) for key, path in named if not path.startswith(SCHEME)]


THERE = ("grace_s", "hang_timeout_s")
"""Fields of launch that the job itself obeys; the others are the launcher's."""


COMPOSED_ONLY = {
    "defaults": ["_self_", {"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}],
    "hydra": {"run": {"dir": "."}, "output_subdir": None},
}
"""As in conf/train.yaml: without it Hydra makes a folder outputs/ there, and says each line of the log once more."""


def identity(job: Job) -> str:
    """The same for the same job on the same data: a second launch goes on in the first one's run directory."""
    local = [local_path(path) for _, path in data_paths(job)]
    digests = [sha256_file(path) if path.is_file() else str(path) for path in local]
    return sha256_json([job_hash(job), digests])[:12]


def job_there(composed: Composed, hardware: HardwareConfig) -> dict[str, Any]:
    resolved = json.loads(json.dumps(composed.resolved))
    resolved["hardware"] = asdict(hardware)
    resolved["launch"] = {"name": "local", **{name: resolved["launch"][name] for name in THERE}}
    return {**COMPOSED_ONLY, **resolved}


def by_volume(job: Job, room: str) -> tuple[Upload, ...]:
    """The local data files, as they go to the volume. room: the folder of this tool there."""
    found = []
    for _, path in data_paths(job):
        local = local_path(path)
        if local.is_file():
            digest = sha256_file(local)
            found.append(Upload(local, f"{room}/data/{digest[:16]}-{local.name}", digest, local.stat().st_size))
    return tuple(found)


def payload(
    composed: Composed, hardware: HardwareConfig, limit_bytes: int | None, more: dict[str, bytes],
    uploads: Sequence[Upload] = (),
) -> str:
    """tar.gz in base64: job.yaml for that hardware, the local data files under data/, and `more`, by name.

    uploads: data files that are on the volume instead. Raises ConfigError where it is more than limit_bytes of text.
    """
    on_volume = {upload.path: f"{MOUNT}/{upload.name}" for upload in uploads}
    files: dict[str, bytes] = dict(more)
    resolved = job_there(composed, hardware)

    def moved(path: Any) -> Any:
        local = local_path(path) if isinstance(path, str) and not path.startswith(SCHEME) else None
        if local is None or not local.is_file():
            return path
        if local in on_volume:
            return on_volume[local]
        inside = f"data/{len(files) - len(more)}-{local.name}"
        files[inside] = local.read_bytes()
        return inside

    data = resolved["data"]
    data["path"] = [moved(path) for path in data["path"]] if isinstance(data["path"], list) else moved(data["path"])
    data["validation"] = moved(data["validation"])
    resolved["model"]["chat_template"] = moved(resolved["model"]["chat_template"])
    if resolved["endpoint"]["arrivals"].endswith(".csv"):
        resolved["endpoint"]["arrivals"] = moved(resolved["endpoint"]["arrivals"])
    files["job.yaml"] = yaml.safe_dump(resolved, sort_keys=False).encode()
    text = tar(files)
    if limit_bytes is not None and len(text) > limit_bytes:
        key, given = "data.path", composed.job.data.path
        volume = "" if composed.job.launch.volume else "leave launch.volume=null out, and "
        remedy = (
            f"{volume}set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the provider's S3 API key, and it goes to the "
            "volume by itself; or publish it as a (private) Hub dataset"
        )
        arrivals = resolved["endpoint"]["arrivals"]
        if len(tar({name: content for name, content in files.items() if name != arrivals})) <= limit_bytes:
            key, given = "endpoint.arrivals", composed.job.endpoint.arrivals
            remedy = "its first thousands of requests, without columns besides their times, say as much of the load"
        message = f"packs to {len(text) >> 10} KiB, and a job takes {limit_bytes >> 10} KiB along"
        raise ConfigError.of(key, given, message, remedy)
    return text


def tar(files: dict[str, bytes]) -> str:
    """The same bytes for the same files: no times, no owners."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return base64.b64encode(buffer.getvalue()).decode()


def packed_files(text: str) -> dict[str, int]:
    """Names and bytes of what tar() packed."""
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text))) as archive:
        return {entry.name: entry.size for entry in archive}
