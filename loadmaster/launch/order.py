"""From a job and a chosen machine to an Order: pure, so that --dry-run shows exactly what would be sent.

The job travels in the machine's environment: its resolved configuration and its small data files as
LOADMASTER_PAYLOAD (tar.gz, base64), what the bootstrap must know as LOADMASTER_JOB (JSON), the bootstrap itself
as LOADMASTER_BOOTSTRAP. Secrets never do: only the provider's references to them.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from loadmaster import __version__
from loadmaster.config.compose import Composed
from loadmaster.config.jobhash import job_hash
from loadmaster.config.schema import Job, LaunchConfig
from loadmaster.config.shipped import SCHEME, shipped_folder
from loadmaster.errors import ConfigError, Problem
from loadmaster.files import sha256_file, sha256_json
from loadmaster.launch.choose import Choice, on
from loadmaster.launch.provider import Order, Volume

ROOM = "/workspace/loadmaster"
"""On a Pod the network volume is mounted at /workspace; without one it is a folder of the container."""
PAYLOAD_BYTES = 96 << 10
"""Most that travels in one environment variable: Linux takes 128 KiB a variable."""
BOOTSTRAP_ARGUMENTS = (
    "python3 -c \"import base64,gzip,os;exec(gzip.decompress(base64.b64decode(os.environ['LOADMASTER_BOOTSTRAP'])))\""
)
IMAGE_GB = 50
HOLD_S = 300
STOP_BEFORE_S = 180
UNKNOWN_HOURS = 24.0
FILES = (
    "config.yaml", "plan.json", "metrics.jsonl", "eval.json", "result.json", "stages.json", "report.html",
    "export/*/manifest.json", "bundle/*", "bundle/*/*",
)  # fmt: skip
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE)
PINNED = re.compile(r"==[\w.!+]+$|@[0-9a-f]{40}\b|#sha256=[0-9a-f]{64}$")


def problems(job: Job) -> list[Problem]:
    """What of the job cannot be launched, each with its remedy."""
    launch, found = job.launch, []

    def wrong(key: str, value: object, message: str, remedy: str) -> None:
        found.append(Problem(key, value, "recipe or command line", message, remedy))

    if job.hardware.gpu == "cpu":
        wrong("hardware.gpu", "cpu", "a Pod is rented for its GPUs", "leave it out, or name a GPU of the catalogue")
    if job.hardware.nodes > 1:
        wrong(
            "hardware.nodes",
            job.hardware.nodes,
            "several plain Pods have no fast network between them and hang in the first collective",
            "hardware.nodes=1; for several nodes create an Instant Cluster and start launch/torchrun.py on each",
        )
    if job.stop_after == "plan":
        wrong("stop_after", "plan", "a plan needs no machine", "launch.dry_run=true, or launch=local")
    if job.run_dir != "auto":
        wrong("run_dir", job.run_dir, "the run directory there is launch's to choose", "leave run_dir out")
    if launch.package is None and launch.image == LaunchConfig().image:
        wrong(
            "launch.package",
            None,
            "the default image has no loadmaster in it",
            f"""'launch.package="loadmaster=={__version__}"' or a wheel's URL, or launch.image= one that you built""",
        )
    if launch.package is not None and not PINNED.search(launch.package):
        remedy = "name==1.2.3, git+https://...@<40 hex digits>, or https://...whl#sha256=<64 hex digits>"
        wrong("launch.package", launch.package, "is not pinned: it could be another one tomorrow", remedy)
    tag = launch.image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in launch.image and tag in ("", "latest"):
        wrong("launch.image", launch.image, "is not pinned", "give a tag (not latest) or a digest (@sha256:...)")
    if launch.cloud == "community" and launch.volume is not None:
        wrong("launch.cloud", "community", "other people's hosts have no network volumes", "launch.volume=null as well")
    for name in launch.env or {}:
        if SECRET_NAME.search(name):
            remedy = f"launch.secrets.{name}=NAME, after making a secret of that NAME in the provider's console"
            wrong(f"launch.env.{name}", None, "looks like a secret, and this would end up in files and logs", remedy)
    return found + _data_problems(job)


def _data_problems(job: Job) -> list[Problem]:
    found = []
    for key, path in _data_paths(job):
        if Path(path).expanduser().is_dir():
            message = "a folder does not travel with the job"
            found.append(Problem(key, path, "recipe or command line", message, "name files, or a Hub dataset"))
    return found


def _data_paths(job: Job) -> list[tuple[str, str]]:
    paths = [job.data.path] if isinstance(job.data.path, str) else list(job.data.path)
    named = [("data.path", path) for path in paths]
    if isinstance(job.data.validation, str):
        named.append(("data.validation", job.data.validation))
    return [(key, path) for key, path in named if not path.startswith(SCHEME)]


def run_folder(composed: Composed, choice: Choice) -> str:
    """Where the run lives on the machine: the same for the same job on the same data, so that it can go on."""
    job = on(composed.job, choice.offer)
    local = [Path(path).expanduser() for _, path in _data_paths(job)]
    digests = [sha256_file(path) if path.is_file() else str(path) for path in local]
    return f"{ROOM}/runs/{job.recipe.replace('/', '-')}-{sha256_json([job_hash(job), digests])[:12]}"


def deadline_hours(launch: LaunchConfig, choice: Choice) -> float:
    """Hours after which the machine ends itself: max_hours, and what max_usd pays for."""
    planned = UNKNOWN_HOURS if choice.hours is None else 2 * choice.hours + 1
    hours = planned if launch.max_hours == "auto" else launch.max_hours
    return hours if launch.max_usd is None else min(hours, launch.max_usd / choice.offer.usd_per_hour)


def volume_gb(launch: LaunchConfig, choice: Choice) -> int:
    if launch.volume_gb != "auto":
        return launch.volume_gb
    weights_gb = choice.plan.model.parameters * 2 / 1e9
    return min(4096, max(10, math.ceil(choice.plan.disk_gib * 1.074 + 2 * weights_gb)))


def disk_gb(launch: LaunchConfig, choice: Choice) -> int:
    if launch.disk_gb != "auto":
        return launch.disk_gb
    return IMAGE_GB + (0 if launch.volume else volume_gb(launch, choice))


def make_order(
    composed: Composed, choice: Choice, name: str, now: float, api: str, volume: Volume | None, places: tuple[str, ...]
) -> Order:
    """now: seconds since 1970. api: base URL under which the machine ends itself.

    Raises ConfigError when the data does not fit into the environment.
    """
    launch, folder, run_dir = composed.job.launch, f"{ROOM}/jobs/{name}", run_folder(composed, choice)
    hours = deadline_hours(launch, choice)
    secrets = launch.secrets or {}
    job = {
        "name": name,
        "version": __version__,
        "package": launch.package,
        "folder": folder,
        "run_dir": run_dir,
        "command": command(composed.job.stop_after, choice, folder, run_dir),
        "deadline": round(now + hours * 3600, 1),
        "max_hours": round(hours, 4),
        "stop_before_s": min(STOP_BEFORE_S, hours * 360),
        "hold_s": HOLD_S,
        "progress_s": 10,
        "api": api,
        "files": list(FILES),
        "secrets": sorted(secrets),
    }
    env = {
        "HF_HOME": f"{ROOM}/huggingface",
        **(launch.env or {}),
        **{variable: f"{{{{ RUNPOD_SECRET_{secret} }}}}" for variable, secret in secrets.items()},
        "PYTHONUNBUFFERED": "1",
        "LOADMASTER_JOB": json.dumps(job),
        "LOADMASTER_PAYLOAD": payload(composed, choice, folder),
        "LOADMASTER_BOOTSTRAP": _packed((shipped_folder("launch") / "pod_bootstrap.py").read_bytes()),
    }
    return Order(
        name,
        choice.offer,
        launch.image,
        BOOTSTRAP_ARGUMENTS,
        env,
        disk_gb(launch, choice),
        launch.cloud,
        volume,
        places,
    )


def command(stop_after: str, choice: Choice, folder: str, run_dir: str) -> list[str]:
    """What the bootstrap runs: the stages up to stop_after, with a process for each GPU."""
    count = choice.offer.count
    python = (
        ["python3"]
        if count == 1
        else ["python3", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    )
    return [
        *python,
        "-m",
        "loadmaster.cli",
        stop_after,
        "--config-dir",
        folder,
        "--config-name",
        "job",
        f"run_dir={run_dir}",
    ]


def payload(composed: Composed, choice: Choice, folder: str) -> str:
    """tar.gz in base64: job.yaml, and the local data files under data/."""
    resolved = json.loads(json.dumps(composed.resolved))
    resolved["hardware"] = asdict(on(composed.job, choice.offer).hardware)
    resolved["launch"] = {"name": "local"}
    files: dict[str, bytes] = {}

    def moved(path: Any) -> Any:
        local = Path(path).expanduser() if isinstance(path, str) and not path.startswith(SCHEME) else None
        if local is None or not local.is_file():
            return path
        inside = f"data/{len(files)}-{local.name}"
        files[inside] = local.read_bytes()
        return f"{folder}/{inside}"

    data = resolved["data"]
    data["path"] = [moved(path) for path in data["path"]] if isinstance(data["path"], list) else moved(data["path"])
    data["validation"] = moved(data["validation"])
    files["job.yaml"] = yaml.safe_dump(resolved, sort_keys=False).encode()
    text = _tar(files)
    if len(text) > PAYLOAD_BYTES:
        raise ConfigError(
            [
                Problem(
                    "data.path",
                    composed.job.data.path,
                    "recipe or command line",
                    f"packs to {len(text) >> 10} KiB, and a job takes {PAYLOAD_BYTES >> 10} KiB along",
                    "publish it as a (private) Hub dataset, or copy it to the volume and name it /workspace/...",
                )
            ]
        )
    return text


def _tar(files: dict[str, bytes]) -> str:
    """The same bytes for the same files: no times, no owners."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return base64.b64encode(buffer.getvalue()).decode()


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def with_volume(order: Order, volume: Volume) -> Order:
    return replace(order, volume=volume, places=(volume.place,))
