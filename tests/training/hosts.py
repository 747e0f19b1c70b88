"""Two hosts for a test: network namespaces joined by a veth pair where that is permitted, else two loopback addresses.

A namespace has its own interfaces, addresses, ports and host name; only the disk is shared, as a cluster's would be.
Taking its link down is a network that fails; killing all of its processes is a host that is lost.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.runs import ROOT, environment

PORT = 29611
NAMES = ("lm-alpha", "lm-beta")
MARK = "LOADMASTER_TEST_HOST"


@dataclass
class Host:
    """A place to run commands in. kind: `network namespaces` or `loopback addresses`."""

    name: str
    address: str
    interface: str
    kind: str
    namespace: str | None = None
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, command: list[str], folder: Path, log: Path, **more: str) -> subprocess.Popen:
        """Run a command on this host; its output goes to `log`."""
        enter = []
        if self.namespace is not None:
            rename = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
            enter = ["ip", "netns", "exec", self.namespace, *rename]
        env = environment() | more
        if self.namespace is None:
            # Else the host's name is its own, and leads nowhere.
            env |= {"NODE_ADDR": self.name, "GLOO_SOCKET_IFNAME": self.interface}
            env[MARK] = self.mark
        with open(log, "a", encoding="utf-8") as file:
            process = subprocess.Popen([*enter, *command], cwd=folder, env=env, stdout=file, stderr=file)
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        if self.namespace is not None:
            listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
            return [int(word) for word in listed.stdout.split()]
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._is_mine(path)]

    @property
    def mark(self) -> str:
        return f"{self.name}-{os.getpid()}"

    def _is_mine(self, environment: Path) -> bool:
        """Whether a process was started here, by whomever: what a killed launcher leaves has another parent by then."""
        try:
            return f"{MARK}={self.mark}".encode() in environment.read_bytes().split(b"\0")
        except OSError:
            return False

    def lose(self) -> None:
        """The host is gone: kill -9 for everything that runs on it."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Its network is gone, without a word to anybody; processes run on (on loopback, they stop instead)."""
        if self.namespace is not None:
            _ip("-n", self.namespace, "link", "set", self.interface, "down")
            return
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)


def torchrun(host: Host, rank: int, first: Host, *words: str, nodes: int = 2, processes: int = 1) -> list[str]:
    """launch/torchrun.py's command line for one of the hosts."""
    return [
        sys.executable, str(ROOT / "launch" / "torchrun.py"), f"--nnodes={nodes}", f"--node-rank={rank}",
        f"--nproc-per-node={processes}", f"--master-addr={first.address}", f"--master-port={PORT}",
        str(ROOT / "train.py"), *words,
    ]


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Namespaces where the privileges allow it. Whatever still runs on the hosts at the end is killed."""
    hosts = _namespaces() or _loopback()
    try:
        yield hosts
    finally:
        for host in hosts:
            host.lose()
            for process in host.started:
                process.wait(timeout=20)
            host.started.clear()
            if host.namespace is not None:
                _ip("netns", "del", host.namespace)


def wait_until(what, seconds: float, *processes: subprocess.Popen, logs: tuple[Path, ...] = ()) -> None:
    """Until `what()` is true; fails with the logs when it takes longer, or when one of the processes ends."""
    deadline = time.monotonic() + seconds
    while not what():
        ended = [process.returncode for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            said = "\n".join(f"--- {log.name}\n{log.read_text()}" for log in logs)
            raise AssertionError(f"ended {ended} or not within {seconds} s\n{said}")
        time.sleep(0.05)


def _namespaces() -> tuple[Host, Host] | None:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return None
    spaces = [f"lm{os.getpid()}{letter}" for letter in "ab"]
    ends = [f"lmv{os.getpid()}{letter}"[-15:] for letter in "ab"]
    made = []
    try:
        for space in spaces:
            _ip("netns", "add", space)
            made.append(space)
        _ip("link", "add", ends[0], "netns", spaces[0], "type", "veth", "peer", "name", ends[1], "netns", spaces[1])
        for number, (space, end) in enumerate(zip(spaces, ends, strict=True), 1):
            _ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            _ip("-n", space, "link", "set", end, "up")
            _ip("-n", space, "link", "set", "lo", "up")
    except subprocess.CalledProcessError:  # a container without the privilege
        for space in made:
            _ip("netns", "del", space)
        return None
    kind = "network namespaces"
    return tuple(
        Host(name, f"10.77.0.{number}", end, kind, space)
        for number, (name, end, space) in enumerate(zip(NAMES, ends, spaces, strict=True), 1)
    )


def _loopback() -> tuple[Host, Host]:
    kind = "loopback addresses"
    return tuple(Host(name, f"127.0.0.{number}", "lo", kind) for number, name in enumerate(NAMES, 1))


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
