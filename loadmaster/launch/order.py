"""From a job and a chosen machine to an Order: pure, so that --dry-run shows exactly what would be sent.

The job travels in the machine's environment: its resolved configuration and its small data files as
LOADMASTER_PAYLOAD (tar.gz, base64), what the bootstrap must know as LOADMASTER_JOB (JSON), the bootstrap itself
as LOADMASTER_BOOTSTRAP, and the code, where the image does not have it, as LOADMASTER_WHEEL_0, _1, ... Secrets
never do: only their names, for which the provider puts its references.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from loadmaster import __version__
from loadmaster.config.compose import Composed
from loadmaster.config.schema import HardwareConfig, LaunchConfig
from loadmaster.config.shipped import shipped_folder
from loadmaster.errors import ConfigError
from loadmaster.launch.choose import Choice, on
from loadmaster.launch.payload import by_volume, identity, payload
from loadmaster.launch.provider import MOUNT, Order, Upload, Volume
from loadmaster.launch.wheel import constraints, of_the_default_kind, travelling

ROOM = f"{MOUNT}/loadmaster"
PAYLOAD_BYTES = 96 << 10
"""Most that travels in one environment variable: Linux takes 128 KiB a variable."""
PACKED_AT_MOST = 20
"""Text does not shrink to less than a twentieth; more than that is not tried."""
BOOTSTRAP_ARGUMENTS = (
    "python3 -c \"import base64,gzip,os;exec(gzip.decompress(base64.b64decode(os.environ['LOADMASTER_BOOTSTRAP'])))\""
)
IMAGE_GB = 50
VOLUME_GB = (10, 4096)
"""What the provider makes."""
HOLD_S = 300
MARGIN_S = 60
"""Between the last moment for a checkpoint and the end of the machine."""
UNKNOWN_HOURS = 24.0
TORCHRUN, BOOTSTRAP, CONSTRAINTS = "torchrun.py", "pod_bootstrap.py", "constraints.txt"
PROGRESS_S = 10
FILES = (
    "config.yaml", "plan.json", "metrics.jsonl", "eval.json", "result.json", "stages.json", "report.html",
    "export/*/manifest.json", "smoke/*.json", "bundle/*", "bundle/*/*", "bundle/.*", "bundle/.*/*",
)


def is_small_file(name: str) -> bool:
    parts = PurePosixPath(name).parts
    patterns = [PurePosixPath(pattern).parts for pattern in FILES]
    return ".." not in parts and any(
        len(pattern) == len(parts) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns
    )


def run_folder(composed: Composed, choice: Choice) -> str:
    """Where the run lives on the machine: the same for the same job on the same data, so that it can go on."""
    job = on(composed.job, choice.offer)
    return f"{ROOM}/runs/{job.recipe.replace('/', '-')}-{identity(job)}"


def deadline_hours(launch: LaunchConfig, choice: Choice) -> float:
    """Hours after which the machine ends itself: max_hours, and what max_usd pays for."""
    planned = UNKNOWN_HOURS if choice.hours is None else 2 * choice.hours + 1
    hours = planned if launch.max_hours == "auto" else launch.max_hours
    return hours if launch.max_usd is None else min(hours, launch.max_usd / choice.offer.usd_per_hour)


def stop_before_s(launch: LaunchConfig) -> float:
    """How long before its end a job is told of it."""
    return launch.grace_s + MARGIN_S


def volume_gb(launch: LaunchConfig, choice: Choice) -> int:
    if launch.volume_gb != "auto":
        return launch.volume_gb
    weights_gb = choice.plan.model.parameters * 2 / 1e9
    return min(VOLUME_GB[1], max(VOLUME_GB[0], math.ceil(choice.plan.disk_gib * 1.074 + 2 * weights_gb)))


def disk_gb(launch: LaunchConfig, choice: Choice) -> int:
    if launch.disk_gb != "auto":
        return launch.disk_gb
    return IMAGE_GB + (0 if launch.volume else volume_gb(launch, choice))


def make_order(
    composed: Composed, choice: Choice, name: str, now: float, api: str, volume: Volume | None,
    places: tuple[str, ...], can_upload: bool = False,
) -> Order:
    """now: seconds since 1970. api: base URL under which the machine ends itself. can_upload: data that does not fit
    into the environment may go to the volume.

    Raises ConfigError when it does not fit and may not.
    """
    launch, folder, run_dir = composed.job.launch, f"{ROOM}/jobs/{name}", run_folder(composed, choice)
    hours, nodes = deadline_hours(launch, choice), choice.offer.nodes
    secrets = launch.secrets or {}
    wheel = travelling(launch)
    packed = wheel.variables(PAYLOAD_BYTES) if wheel else {}
    pins = constraints() if wheel else None
    job = {
        "name": name,
        "version": __version__,
        "package": None if launch.package == "auto" or wheel else launch.package,
        "wheel": wheel and {"name": wheel.name, "sha256": wheel.sha256, "parts": len(packed)},
        "constraints": pins and f"{folder}/{CONSTRAINTS}",
        "own_environment": of_the_default_kind(launch.image),
        "remedy": "launch.image or launch.package must match",
        "folder": folder,
        "run_dir": run_dir,
        "command": command(composed.job.stop_after, choice, folder, run_dir),
        "ends": ended_by(nodes, launch.force_pods),
        "deadline": round(now + hours * 3600, 1),
        "max_hours": round(hours, 4),
        "stop_before_s": min(stop_before_s(launch), hours * 360),
        "hold_s": HOLD_S,
        "progress_s": PROGRESS_S,
        "api": api,
        "files": list(FILES),
        "secrets": sorted(secrets),
    }
    more = ({TORCHRUN: launch_file(TORCHRUN)} if nodes > 1 else {}) | ({CONSTRAINTS: pins} if pins else {})
    hardware = on(composed.job, choice.offer).hardware
    travels, uploads = _data(composed, hardware, more, can_upload and launch.volume is not None)
    env = {
        "HF_HOME": f"{ROOM}/huggingface",
        **(launch.env or {}),
        "PYTHONUNBUFFERED": "1",
        "LOADMASTER_JOB": json.dumps(job),
        "LOADMASTER_PAYLOAD": travels,
        "LOADMASTER_BOOTSTRAP": _packed(launch_file(BOOTSTRAP)),
        **packed,
    }
    return Order(
        name, choice.offer, launch.image, BOOTSTRAP_ARGUMENTS, env, disk_gb(launch, choice), launch.cloud, volume,
        places, plain=launch.force_pods, secrets=secrets, uploads=uploads,
    )


def _data(
    composed: Composed, hardware: HardwareConfig, more: dict[str, bytes], can_upload: bool
) -> tuple[str, tuple[Upload, ...]]:
    """(LOADMASTER_PAYLOAD, what goes to the volume instead, as it does not fit)."""
    uploads = by_volume(composed.job, ROOM.removeprefix(f"{MOUNT}/")) if can_upload else ()
    if sum(upload.bytes for upload in uploads) <= PACKED_AT_MOST * PAYLOAD_BYTES:
        try:
            return payload(composed, hardware, PAYLOAD_BYTES, more), ()
        except ConfigError:
            if not uploads:
                raise
    return payload(composed, hardware, PAYLOAD_BYTES, more, uploads), uploads


def ended_by(nodes: int, plain: bool) -> str:
    """What a node ends when its time has come: its Pod, or the cluster that its Pod belongs to."""
    return "cluster" if nodes > 1 and not plain else "pod"


def command(stop_after: str, choice: Choice, folder: str, run_dir: str) -> list[str]:
    """What the bootstrap runs: the stages up to stop_after. On one node the job itself starts a process for each GPU;
    on several, torchrun does, where each node's environment says which it is."""
    several = [f"{folder}/{TORCHRUN}"] if choice.offer.nodes > 1 else []
    stages = ["-m", "loadmaster.cli", stop_after, "--config-dir", folder, "--config-name", "job", f"run_dir={run_dir}"]
    return ["python3", *several, *stages]


def launch_file(name: str) -> bytes:
    return (shipped_folder("launch") / name).read_bytes()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def dated(order: Order, now: float) -> Order:
    """Its hours count from now: the machine is about to be asked for."""
    job = order.job
    job["deadline"] = round(now + job["max_hours"] * 3600, 1)
    return replace(order, env={**order.env, "LOADMASTER_JOB": json.dumps(job)})


def with_volume(order: Order, volume: Volume) -> Order:
    return replace(order, volume=volume, places=(volume.place,))
