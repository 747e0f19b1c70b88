"""A Slurm of two nodes on this machine: its own munged, slurmctld and slurmd, in a folder, on free ports.

Debian's packages slurm-wlm and munge, as root. Nodes are names that lead nowhere: jobs need MASTER_ADDR=127.0.0.1.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"


def missing() -> str | None:
    """Why there can be none here."""
    if absent := [name for name in DAEMONS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(absent)} not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands speak to it."""
    folder.chmod(0o755)
    key, socket_path, settings = folder / "munge.key", folder / "munge.socket", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (folder / "state").mkdir()
    settings.write_text(_settings(folder, socket_path))
    env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(settings)}
    with ExitStack() as stack:
        files = ("key-file", key), ("socket", socket_path), ("log-file", folder / "munged.log"), ("seed-file",
                 folder / "munge.seed"), ("pid-file", folder / "munged.pid")
        _start(stack, ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files)], env)
        _wait_until(socket_path.exists)
        _start(stack, ["slurmctld", "-D"], env)
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            _start(stack, ["slurmd", "-D", "-N", node], env)
        _wait_until(lambda: _idle(env) == len(NODES))
        yield env
        subprocess.run(["scancel", "--full", "--me"], env=env, check=False)
        _wait_until(lambda: not subprocess.run(["squeue", "-h"], env=env, capture_output=True, check=False).stdout)


def _settings(folder: Path, socket_path: Path) -> str:
    controller, first = _free_ports()
    return f"""ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={socket_path}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-2] NodeHostname=localhost Port=[{first}-{first + 1}] CPUs=1 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _start(stack: ExitStack, command: list[str], env: dict[str, str]) -> None:
    program = shutil.which(command[0], path=PATH)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([program, *command[1:]], env=env, **quiet)

    def end() -> None:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()

    stack.callback(end)


def _idle(env: dict[str, str]) -> int:
    said = subprocess.run(["sinfo", "-h", "-N", "-t", "idle"], env=env, capture_output=True, text=True, check=False)
    return len(said.stdout.splitlines())


def _wait_until(true, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "Slurm did not come up, or did not end its jobs"
        time.sleep(0.2)


def _free_ports() -> tuple[int, int]:
    """One, and the first of two in a row: Slurm takes nodes' ports as a range."""
    while True:
        with ExitStack() as stack:
            taken = [stack.enter_context(socket.socket()) for _ in range(3)]
            taken[0].bind(("127.0.0.1", 0))
            taken[1].bind(("127.0.0.1", 0))
            first = taken[1].getsockname()[1]
            try:
                taken[2].bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return taken[0].getsockname()[1], first
