"""`launch=ssh`: run on hosts that are there, through the system's own ssh.

Each host runs launch/pod_bootstrap.py, which arrives over standard input together with the job, its files and
its environment: nothing of it is on a command line. The connection is the dead-man's switch: when standard input
ends, because this process closes it, dies, or loses the network, the job gets SIGTERM, time for a checkpoint, and
then SIGKILL with all that it started. Several hosts meet at the first one (static rendezvous, launch/torchrun.py).

Before anything starts, every host says whether it has this version of loadmaster, and whether it sees the folder
that the first one has just made: checkpoints of several hosts are one folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from loadmaster import __version__
from loadmaster.config.overrides import assigned
from loadmaster.config.schema import HardwareConfig, Job, LaunchConfig
from loadmaster.config.shipped import local_path
from loadmaster.errors import IN_THE_JOB, ConfigError, LoadmasterError, Problem, StoppedOnRequest
from loadmaster.files import write_json, write_text
from loadmaster.launch.board import Board, log_file
from loadmaster.launch.context import Launch, undisturbed
from loadmaster.launch.follow import MARK
from loadmaster.launch.host import ANSWER_S, Host
from loadmaster.launch.order import BOOTSTRAP, FILES, PROGRESS_S, TORCHRUN, launch_file, stop_before_s
from loadmaster.launch.payload import identity, payload
from loadmaster.launch.provider import LogLine
from loadmaster.preflight import make_plan, print_plan
from loadmaster.rundir import LAUNCH_RECORD

PROBE = f"""
import json, os, socket
base = os.path.realpath(os.path.expanduser(os.environ["LOADMASTER_FOLDER"]))
meeting = os.path.join(base, "jobs", os.environ["LOADMASTER_NAME"])
if os.environ["NODE_RANK"] == "0":
    os.makedirs(meeting)
try:
    from loadmaster import __version__ as version
except ImportError:
    version = None
with socket.socket() as free:
    free.bind(("", 0))
    port = free.getsockname()[1]
config = None
try:
    with open(os.path.join(os.environ["LOADMASTER_MODEL"] or os.devnull, "config.json"), encoding="utf-8") as file:
        config = file.read()
except (OSError, ValueError):
    pass
said = {{"base": base, "shared": os.path.isdir(meeting), "version": version, "port": port, "config": config}}
print({MARK!r} + json.dumps(said))
"""
POLL_S = 1.0
NODE_GRACE_S = 30
"""After one host has failed, so long for the others to end; then the bootstrap there kills what is left."""
LEAVE_S = 30
"""For it to say so."""


@dataclass(frozen=True)
class Meeting:
    """Where the run lies on the hosts, and where they meet."""

    base: str
    address: str
    port: str
    config: str | None = None
    """The model's config.json at model.path there."""


@contextmanager
def with_config(job: Job, config: str | None) -> Iterator[Job]:
    """The job as it can be planned here: a model's config.json from elsewhere in a folder of the same name."""
    with TemporaryDirectory() as room:
        folder = Path(room, PurePosixPath(str(job.model.path)).name or "model")
        write_text(folder / "config.json", config or "")
        try:
            yield replace(job, model=replace(job.model, path=str(folder)))
        except ConfigError as error:  # named as it is on the hosts
            raise ConfigError([_said_of(job.model.path, folder, problem) for problem in error.problems]) from None


def _said_of(path: str | None, here: Path, problem: Problem) -> Problem:
    texts = {name: text.replace(str(here), str(path)) for name, text in vars(problem).items() if isinstance(text, str)}
    return replace(problem, **texts)


def interpreter(settings: LaunchConfig) -> str:
    return "python3" if settings.python == "auto" else settings.python


def run_by_ssh(launch: Launch, tokens: int | None) -> int:
    """Run the job on launch.hosts; returns its exit code.

    Raises LoadmasterError when a host cannot be reached, has another version, or is lost on the way.
    """
    job = launch.composed.job
    hosts = [Host(name, job.launch.ssh_config) for name in job.launch.hosts]
    secrets = secret_values(launch)
    hardware = HardwareConfig(job.hardware.gpu, job.hardware.count, len(hosts))
    planned = replace(job, hardware=hardware) if job.hardware.gpu != "local" else None  # else it is theirs to say
    here = job.model.path is None or os.path.exists(local_path(job.model.path))
    if planned and here:
        print_plan(make_plan(planned, tokens), launch.console)
    if job.launch.dry_run:
        if planned and not here:
            launch.echo(f"no plan: {job.model.path} is not here, and a dry run asks no host for its config.json\n")
        meeting = Meeting(job.launch.folder, "<address of the first host>", "<a free port of it>")
        python = interpreter(job.launch)
        shown = [
            {"command": shlex.join(host.command(python)), "stdin": _job(launch, meeting, node, hardware)}
            for node, host in enumerate(hosts)
        ]
        launch.console.out(json.dumps(shown, indent=2), highlight=False)
        return 0
    meeting = _meet(launch, hosts)
    if planned and not here:
        with with_config(planned, meeting.config) as known:
            print_plan(make_plan(known, tokens), launch.console)
    more = {TORCHRUN: launch_file(TORCHRUN)} if len(hosts) > 1 else {}
    packed = payload(launch.composed, hardware, None, more)
    launch.folder.mkdir(parents=True, exist_ok=True)
    run_dir = _job(launch, meeting, 0, hardware)["run_dir"]
    record = {"name": launch.name, "kind": "ssh", "host": hosts[0].name, "run_dir": run_dir}
    config = job.launch.ssh_config and os.path.abspath(local_path(job.launch.ssh_config))
    write_json(launch.folder / LAUNCH_RECORD, record | {"ssh_config": config})
    nodes = []
    try:
        for node, host in enumerate(hosts):
            described = json.dumps(_job(launch, meeting, node, hardware))
            env = {**(job.launch.env or {}), **secrets, "NODE_RANK": str(node), "PYTHONUNBUFFERED": "1"}
            env |= {"LOADMASTER_JOB": described, "LOADMASTER_PAYLOAD": packed}
            nodes.append(_start(host, interpreter(job.launch), env, launch_file(BOOTSTRAP)))
        launch.echo(f"started on {', '.join(job.launch.hosts)}; the log goes to {launch.folder / 'node.log'}")
        code = _Hosts(launch, hosts, nodes).to_the_end()
        launch.echo(f"the job ended with exit code {code}; its run directory is {hosts[0].name}: {run_dir}")
        return code
    finally:
        with undisturbed():
            for process in nodes:
                _leave(process)


def secret_values(launch: Launch) -> dict[str, str]:
    """launch.secrets from the environment here: they travel over standard input, and into no file. A dry run says which
    are not there; else they are refused (ConfigError)."""
    settings = launch.composed.job.launch
    names = settings.secrets or {}
    missing = [name for name in names.values() if name not in os.environ]
    if missing and settings.dry_run:
        launch.echo(f"launch.secrets: {', '.join(missing)} must be in the environment here when it is started\n")
        return {}
    if missing:
        message = "is not set in the environment here"
        found = [Problem("launch.secrets", name, IN_THE_JOB, message, f"export {name}=...") for name in missing]
        raise ConfigError(found)
    return {variable: os.environ[name] for variable, name in names.items()}


def _meet(launch: Launch, hosts: list[Host]) -> Meeting:
    """Ask every host; the first one before the others, as it makes the folder that they must see."""
    settings = launch.composed.job.launch
    first = _probe(launch, hosts[0], 0)
    with ThreadPoolExecutor(max_workers=16) as pool:
        others = list(pool.map(lambda pair: _probe(launch, *pair), zip(hosts[1:], range(1, len(hosts)), strict=True)))
    wrong = [
        f"{host.name} has loadmaster {said['version'] or 'not at all'} in {interpreter(settings)}"
        for host, said in zip(hosts, [first, *others], strict=True)
        if said["version"] != __version__
    ]
    if wrong:
        raise LoadmasterError(
            f"loadmaster here is {__version__}, and {'; '.join(wrong)}. Install that version there, or name the "
            "interpreter that has it with launch.python"
        )
    for host, said in zip(hosts[1:], others, strict=True):
        if not said["shared"] or said["base"] != first["base"]:
            raise LoadmasterError(
                f"{host.name} does not see the folder {first['base']} of {hosts[0].name}; several hosts save their "
                "checkpoints in one: set launch.folder to a folder on a file system that all of them mount"
            )
    path = launch.composed.job.model.path
    if path is not None:
        remedy = "a folder that all hosts have, or model.name of a Hub model, which each of them fetches"
        without = [h.name for h, said in zip(hosts, [first, *others], strict=True) if said["config"] is None]
        message = f"has no config.json in it on {', '.join(without)}"
        if without:
            raise ConfigError.of("model.path", path, message, remedy)
    env = settings.env or {}
    address = env.get("MASTER_ADDR") or (hosts[0].address() if others else "localhost")
    return Meeting(first["base"], address, env.get("MASTER_PORT") or str(first["port"]), first["config"])


def _probe(launch: Launch, host: Host, node: int) -> dict[str, Any]:
    settings = launch.composed.job.launch
    env = {"LOADMASTER_FOLDER": settings.folder, "LOADMASTER_NAME": launch.name, "NODE_RANK": str(node)}
    env["LOADMASTER_MODEL"] = launch.composed.job.model.path or ""
    try:
        done = subprocess.run(
            host.command(interpreter(settings)), input=_message(env, PROBE.encode()), capture_output=True,
            timeout=ANSWER_S, start_new_session=True,
        )
    except FileNotFoundError:
        raise LoadmasterError("launch=ssh needs the program ssh (OpenSSH's client), which is not here") from None
    except subprocess.TimeoutExpired:
        raise LoadmasterError(f"{host.name} did not answer within {ANSWER_S:g} s") from None
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    reason = said[-1] if said else f"ssh ended with exit code {done.returncode}"
    raise LoadmasterError(
        f"{host.name}: {reason}. `{shlex.join([*host.ssh, interpreter(settings), '--version'])}` must work by itself, "
        "with a key and a known host key"
    )


def _job(launch: Launch, meeting: Meeting, node: int, hardware: HardwareConfig) -> dict[str, Any]:
    """What the bootstrap is to do on that host."""
    job, folder = launch.composed.job, f"{meeting.base}/jobs/{launch.name}"
    run_dir = f"{meeting.base}/runs/{job.recipe.replace('/', '-')}-{identity(replace(job, hardware=hardware))}"
    if job.run_dir != "auto":  # from the login's home, which is known there, or from the folder there
        run_dir = job.run_dir if job.run_dir.startswith("~/") else os.path.join(meeting.base, job.run_dir)
    torchrun = []
    if hardware.nodes > 1:
        processes = hardware.count if hardware.count != "auto" else 1 if hardware.gpu == "cpu" else "gpu"
        torchrun = [
            f"{folder}/{TORCHRUN}", f"--nnodes={hardware.nodes}", f"--node-rank={node}",
            f"--nproc-per-node={processes}", f"--master-addr={meeting.address}", f"--master-port={meeting.port}",
        ]
    stages = ["-m", "loadmaster.cli", job.stop_after, "--config-dir", folder, "--config-name", "job"]
    return {
        "name": launch.name,
        "version": __version__,
        "package": None,
        "remedy": "install that version there, or name the interpreter that has it with launch.python",
        "folder": folder,
        "run_dir": run_dir,
        "command": [interpreter(job.launch), *torchrun, *stages, assigned("run_dir", run_dir)],
        "ends": "with-input",
        "deadline": None,
        "stop_before_s": stop_before_s(job.launch),
        "progress_s": PROGRESS_S,
        "files": list(FILES),
        "secrets": sorted(job.launch.secrets or {}),
    }


def _message(env: dict[str, str], program: bytes) -> bytes:
    return json.dumps(env).encode() + b"\n" + str(len(program)).encode() + b"\n" + program


def _start(host: Host, python: str, env: dict[str, str], program: bytes) -> subprocess.Popen:
    """A session of its own: Ctrl-C here must reach the job as a request, not end its connection."""
    process = subprocess.Popen(
        host.command(python),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def send() -> None:
        try:
            process.stdin.write(_message(env, program))
            process.stdin.flush()
        except OSError:
            pass  # its output says why

    threading.Thread(target=send, daemon=True).start()
    return process


def _stop(process: subprocess.Popen, grace_s: float | None = None) -> None:
    """Close its input: the job there gets SIGTERM, and SIGKILL after grace_s (else the time for a checkpoint)."""
    try:
        if grace_s is not None:
            process.stdin.write(f"{grace_s:g}\n".encode())
        process.stdin.close()
    except (OSError, ValueError):
        pass  # it is gone, or has been told already


def _leave(process: subprocess.Popen) -> None:
    _stop(process)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Hosts:
    """The hosts while the job runs."""

    def __init__(self, launch: Launch, hosts: list[Host], nodes: list[subprocess.Popen]):
        self.launch, self.hosts, self.nodes = launch, hosts, nodes
        self.lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.gone: set[int] = set()
        self.told_at: float | None = None
        self.over_at: float | None = None
        self.number = 0

    def to_the_end(self) -> int:
        """The job's exit code, with its small files brought back."""
        launch = self.launch
        with (
            log_file(launch.folder / "node.log") as log,
            Board(launch, log, len(self.nodes), None) as self.board,
            launch.stop.deferred(),
        ):
            for node, process in enumerate(self.nodes):
                threading.Thread(target=self._read, args=(node, process), daemon=True).start()
            self._follow()
        if self.board.lead.ended is None:
            raise LoadmasterError(
                f"{self.hosts[0].name} was lost before the job had ended; the log is {launch.folder / 'node.log'}. The "
                "job there gets SIGTERM to save a checkpoint, and the same command goes on from that"
            )
        return self.board.result(launch.folder)

    def _read(self, node: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            self.lines.put((node, line.decode("utf-8", "replace").rstrip("\r\n")))
        self.lines.put((node, None))

    def _follow(self) -> None:
        """Until every host has ended; the moment one fails, or is lost, or the time is over, all are told to."""
        limit = self.launch.composed.job.launch.max_hours
        until = None if limit == "auto" else self.board.start + limit * 3600
        give_up = float("inf")
        while len(self.gone) < len(self.nodes) and time.monotonic() < give_up:
            with contextlib.suppress(queue.Empty):
                self._take(*self.lines.get(timeout=POLL_S))
            if self.told_at is not None:
                continue
            grace: float | None = None
            if self._some_must_go():
                grace = NODE_GRACE_S
            elif self.launch.stop.requested:
                self.launch.echo("asked the job to save a checkpoint and to end")
            elif until is not None and self.launch.clock() >= until:
                self.launch.echo(
                    f"{limit:g} h are over (launch.max_hours): asked the job to save a checkpoint and to end"
                )
            else:
                continue
            self.told_at = time.monotonic()
            give_up = (
                self.told_at + (stop_before_s(self.launch.composed.job.launch) if grace is None else grace) + LEAVE_S
            )
            for process in self.nodes:
                _stop(process, grace)
        while not self.lines.empty():  # what was said before the time to wait was over
            self._take(*self.lines.get())

    def _some_must_go(self) -> bool:
        """Whether a host failed, or was lost, without which the others cannot go on; those that end in their own
        time, because all is done or all stop together (75), are given it."""
        if any(self.board.readers[node].ended is None for node in self.gone):
            return True
        if not self.board.over(0):
            return False
        self.over_at = self.over_at or time.monotonic()
        lead = self.board.lead.ended
        code = lead["exit_code"] if lead else self.board.failed
        return code not in (0, StoppedOnRequest.exit_code) or time.monotonic() - self.over_at > LEAVE_S

    def _take(self, node: int, text: str | None) -> None:
        if text is None:
            self.gone.add(node)
            if self.board.readers[node].ended is None:
                self.launch.echo(f"  | {self.hosts[node].name}: the connection has ended")
            return
        self.number += 1
        at = datetime.fromtimestamp(self.launch.clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.board.take(node, LogLine(str(self.number), at, text))
