"""What of a job cannot be launched, each with its remedy: pure, and asked before any machine is."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from loadmaster import __version__
from loadmaster.config.compose import Composed
from loadmaster.config.origins import DEFAULT, origin_of
from loadmaster.config.rule_table import Found
from loadmaster.config.schema import Job, LaunchConfig
from loadmaster.config.shipped import local_path
from loadmaster.errors import IN_THE_JOB, Problem
from loadmaster.launch.choose import nodes_of
from loadmaster.launch.order import VOLUME_GB
from loadmaster.launch.payload import THERE, data_paths
from loadmaster.launch.wheel import is_file, of_the_default_kind

SECRET_NAME = re.compile(
    r"TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|(^|_)KEY$"
    r"|(^|_)(PAT|PASS|AUTH|DSN)($|_)",
    re.IGNORECASE,
)
TOKEN = r"(hf|sk|rpa|rps|ghp|gho|github_pat|glpat|xox[abp]|AKIA)[-_]?\w*[A-Za-z0-9]{14,}"
TOKEN += r"|(sk-(ant|or|proj|svcacct)|xox[abp])-[\w-]{20,}"
GIVEN_AWAY = re.compile(rf"{TOKEN}|.*://[^/@\s]*:[^/@\s]+@.*")
"""A variable's value that is one: a token by its beginning, or an address with a password."""
SECRET_VALUE = re.compile(rf"{TOKEN}|[0-9a-fA-F]{{32,}}|.{{48,}}|.*[^\w.-].*")
"""What no name of a secret looks like: the usual beginnings of tokens, long hexadecimal, long or odd text."""
PINNED = re.compile(r"==[\w.!+]+$|@[0-9a-f]{40}\b|#sha256=[0-9a-f]{64}$")
WITH_KEY = re.compile(r"(https?://|ssh://(?=[^/@\s]*:))[^/@\s]+@", re.IGNORECASE)
"""An address with a password in it, or over https with anything before the @; ssh://git@ is no key."""
QUERIED = re.compile(r"([?&][\w.-]*(?:token|key|secret|sig|password|credential)[\w.-]*=)[^&#\s]+", re.IGNORECASE)
"""The same in what an address asks for: ?private_token=..., a signed link."""
OWN = ("name", "nodes", *THERE, "env", "secrets", "dry_run", "max_hours")
"""Fields of launch that mean something wherever the job goes."""
FIELDS = {
    "runpod": (
        "force_pods", "gpus", "objective", "max_usd_per_hour", "max_usd", "cloud", "data_centers", "image", "package",
        "disk_gb", "volume", "volume_gb", "yes", "fetch",
    ),
    "ssh": ("hosts", "ssh_config", "python", "folder"),
    "slurm": ("python", "sbatch"),
}


def is_given_away(value: str) -> bool:
    """Whether the value of a variable is a secret, whatever the variable is called."""
    return bool(GIVEN_AWAY.fullmatch(value) or WITH_KEY.search(value) or QUERIED.search(value))


def problems(composed: Composed) -> list[Problem]:
    job = composed.job
    where = {"runpod": _rented, "ssh": _by_ssh, "slurm": _by_slurm}[job.launch.name]
    found = [Problem(key, value, IN_THE_JOB, *said) for key, value, *said in (*_anywhere(job), *where(job))]
    return _unused(composed, (*OWN, *FIELDS[job.launch.name])) + found


def _anywhere(job: Job) -> Found:
    given, planned = job.launch.nodes, job.hardware.nodes
    if given not in ("auto", planned) and planned != 1:
        yield "launch.nodes", given, f"hardware.nodes={planned} says otherwise", "give one of the two"
    if job.stop_after == "plan":
        remedy = "launch=local; or another stage, with launch.dry_run=true"
        yield "stop_after", "plan", "a plan needs no machine", remedy
    for name, value in (job.launch.env or {}).items():
        if SECRET_NAME.search(name) or is_given_away(value):
            message = "looks like a secret, and this would end up in files and logs"
            yield f"launch.env.{name}", None, message, _secret_remedy(job.launch.name, name)
    for name, secret in (job.launch.secrets or {}).items():
        if not secret or SECRET_VALUE.fullmatch(secret):
            message = "wants the name of a secret, and this "
            message += "looks like one itself (it is in your shell's history now)" if secret else "is empty"
            yield f"launch.secrets.{name}", None, message, _secret_remedy(job.launch.name, name)


def _rented(job: Job) -> Found:
    launch = job.launch
    if job.hardware.gpu == "cpu":
        yield "hardware.gpu", "cpu", "a Pod is rented for its GPUs", "leave it out, or name a GPU of the catalogue"
    if nodes_of(job) > 1:
        if launch.volume is None:
            message = "several nodes save their checkpoints in one folder"
            yield "launch.volume", None, message, "leave launch.volume out"
        if launch.cloud == "community":
            yield "launch.cloud", "community", "other people's hosts are joined by no fast network", "leave it out"
    if launch.volume is not None and not launch.volume.strip():
        yield "launch.volume", launch.volume, "is no name", "a name; or launch.volume=null for none"
    if launch.volume_gb != "auto" and not VOLUME_GB[0] <= launch.volume_gb <= VOLUME_GB[1]:
        message = f"a network volume has {VOLUME_GB[0]} to {VOLUME_GB[1]} GB"
        yield "launch.volume_gb", launch.volume_gb, message, "leave it out, or a number in between"
    if launch.fetch and launch.volume is None:
        yield "launch.fetch", True, "the exports come from the volume, and there is none", "leave launch.volume out"
    if launch.fetch and job.stop_after not in ("export", "bundle"):
        yield "launch.fetch", True, f"the job ends after {job.stop_after} and exports nothing", "stop_after=bundle"
    if launch.force_pods and nodes_of(job) == 1:
        yield "launch.force_pods", True, "has no effect on one machine", "leave it out, or launch.nodes=2"
    if launch.force_pods and launch.max_hours == "auto":
        message = "nobody can plan how slow several plain Pods are, whose network carries 100 Mbit/s"
        yield "launch.max_hours", "auto", message, "launch.max_hours=HOURS, after which they are ended"
    if job.run_dir != "auto":
        yield "run_dir", job.run_dir, "the run directory there is launch's to choose", "leave run_dir out"
    if job.model.path is not None:
        remedy = "model.name of a Hub model (private ones with launch.secrets.HF_TOKEN=NAME)"
        yield "model.path", job.model.path, "a folder here does not travel with the job", remedy
    if launch.package is None and of_the_default_kind(launch.image):
        message = "the default image has no loadmaster in it"
        yield "launch.package", None, message, "leave it out: this very code travels; or launch.image= one that has it"
    if launch.package is not None and is_file(launch.package):
        if not os.path.isfile(local_path(launch.package)):
            yield "launch.package", launch.package, "there is no such file", "python -m build --wheel, or leave it out"
        elif not Path(launch.package).name.startswith(f"loadmaster-{__version__}-"):
            message = f"is no wheel of loadmaster {__version__}, which is what runs here"
            yield "launch.package", launch.package, message, "leave it out: this very code travels"
    elif launch.package is not None and (WITH_KEY.search(launch.package) or QUERIED.search(launch.package)):
        remedy = "a wheel here, which travels along (launch.package=FILE.whl), or an image that has it"
        shown = QUERIED.sub(r"\1...", WITH_KEY.sub(r"\1...@", launch.package))
        yield "launch.package", shown, "carries a key in its URL, which the machine's log would show", remedy
    elif launch.package not in (None, "auto") and not PINNED.search(launch.package):
        remedy = "name==1.2.3, git+https://...@<40 hex digits>, https://...whl#sha256=<64 hex digits>, or auto"
        yield "launch.package", launch.package, "is not pinned: it could be another one tomorrow", remedy
    tag = launch.image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in launch.image and tag in ("", "latest"):
        yield "launch.image", launch.image, "is not pinned", "give a tag (not latest) or a digest (@sha256:...)"
    if launch.cloud == "community" and launch.volume is not None and nodes_of(job) == 1:
        yield "launch.cloud", "community", "other people's hosts have no network volumes", "launch.volume=null as well"
    yield from _folders(job)


def _by_ssh(job: Job) -> Found:
    yield from _folders(job)
    config = job.launch.ssh_config
    if config is not None and (not os.path.exists(local_path(config)) or os.path.isdir(local_path(config))):
        remedy = "a file like ~/.ssh/config, /dev/null for none, or null: your own"
        yield "launch.ssh_config", config, "is no file", remedy
    if not job.launch.hosts:
        yield "launch.hosts", [], "names no host", "launch.hosts=[user@host,user@host:2222]"
    for host in job.launch.hosts:
        name, _, port = host.partition(":")
        if host.startswith("-") or not re.fullmatch(r"[^\s:]+(:\d+)?", host):
            remedy = "user@host, user@host:port, or a name of ssh_config"
            yield "launch.hosts", host, "is no host", remedy
        elif port and not 0 < int(port) < 65536:
            yield "launch.hosts", host, "ports go from 1 to 65535", f"{name}:22, or {name}"
    if len(set(job.launch.hosts)) < len(job.launch.hosts):
        yield "launch.hosts", job.launch.hosts, "names a host twice", "each host once"
    if job.launch.hosts and job.launch.nodes not in ("auto", len(job.launch.hosts)):
        message = f"launch.hosts names {len(job.launch.hosts)}"
        yield "launch.nodes", job.launch.nodes, message, "leave launch.nodes out"
    if job.model.path is not None and not job.model.path.startswith("/"):
        message = "is looked for on the hosts, and is relative to a folder of this machine"
        yield "model.path", job.model.path, message, "an absolute path that exists on the hosts"


def _by_slurm(job: Job) -> Found:
    for option in job.launch.sbatch:
        if not re.match(r"--?[A-Za-z]", option):
            yield "launch.sbatch", option, "is no option with its value", "--partition=gpu, one entry each"


def _folders(job: Job) -> Found:
    for key, path in data_paths(job):
        if os.path.isdir(local_path(path)):
            yield key, path, "a folder does not travel with the job", "name files, or a Hub dataset"


def _unused(composed: Composed, used: Collection[str]) -> list[Problem]:
    """What was written and has no effect where the job goes is refused: it was meant to have one."""
    found = []
    for field in fields(LaunchConfig):
        key = f"launch.{field.name}"
        value, origin = getattr(composed.job.launch, field.name), origin_of(composed.origins, key)
        if field.name not in used and value != getattr(LaunchConfig(), field.name) and origin != DEFAULT:
            message = f"has no effect with launch={composed.job.launch.name}"
            found.append(Problem(key, value, origin, message, "leave it out"))
    return found


def _secret_remedy(where: str, name: str) -> str:
    if where == "runpod":
        return f"launch.secrets.{name}=NAME, after making a secret of that NAME in the provider's console"
    return f"launch.secrets.{name}={name}, with {name} set in the environment here"
