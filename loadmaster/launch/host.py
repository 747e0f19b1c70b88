"""A host as the system's own ssh reaches it."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass

from loadmaster.config.shipped import local_path
from loadmaster.errors import LoadmasterError

OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
RECEIVE = (
    "import json,os,sys;r=sys.stdin.buffer;os.environ.update(json.loads(r.readline()));exec(r.read(int(r.readline())))"
)
"""What the remote command line holds: take the environment and the program from standard input."""
ANSWER_S = 60.0


@dataclass(frozen=True)
class Host:
    name: str
    """As given: user@host or user@host:port."""
    config: str | None

    @property
    def ssh(self) -> list[str]:
        name, _, port = self.name.partition(":")
        config = ["-F", str(local_path(self.config))] if self.config else []
        return ["ssh", *OPTIONS, *config, *(["-p", port] if port else []), name]

    def command(self, python: str) -> list[str]:
        return [*self.ssh[:-1], "--", self.ssh[-1], f"{for_shell(python)} {shlex.join(['-c', RECEIVE])}"]

    def address(self) -> str:
        """What ssh resolves the name to (ssh -G), for the others to meet at."""
        done = subprocess.run(["ssh", "-G", *self.ssh[1:]], capture_output=True, text=True, timeout=ANSWER_S)
        found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname ")]
        if done.returncode or not found:
            raise LoadmasterError(f"launch.hosts: ssh does not take {self.name} ({done.stderr.strip()})")
        return found[0]


def for_shell(path: str) -> str:
    """As a shell there takes it as one word, in which a ~ in front is the login's home."""
    home, slash, rest = path.partition("/")
    return f"{home}/{shlex.quote(rest)}" if home == "~" and slash else shlex.quote(path)
