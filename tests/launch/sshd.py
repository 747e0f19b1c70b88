"""A real OpenSSH server on loopback, without privileges, with keys of its own, and a client configuration for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from getpass import getuser
from pathlib import Path

from tests.launch.fake_runpod import free_port


class Sshd:
    """`with Sshd(folder) as sshd:`; sshd.config is for ssh -F, in which node0 and node1 are this machine."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = folder / "client"
        self.log = folder / "sshd.log"
        self.port = free_port()
        self.server = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
        assert self.server and shutil.which("ssh"), "these tests need OpenSSH: apt-get install openssh-server"

    def __enter__(self) -> Sshd:
        self.folder.mkdir()
        for name in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized")
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {public}")
        (self.folder / "server").write_text(
            f"""
            Port {self.port}
            ListenAddress 127.0.0.1
            HostKey {self.folder}/host_key
            AuthorizedKeysFile {self.folder}/authorized
            PidFile none
            StrictModes no
            UsePAM no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            MaxStartups 50
            """
        )
        self.config.write_text(
            f"""
            Host node0 node1 node2
              HostName 127.0.0.1
              Port {self.port}
            Host *
              User {getuser()}
              IdentityFile {self.folder}/user_key
              IdentitiesOnly yes
              UserKnownHostsFile {self.folder}/known
              StrictHostKeyChecking yes
            """
        )
        if os.geteuid() == 0:  # which sshd started by root wants for its privilege separation
            Path("/run/sshd").mkdir(exist_ok=True)
        log = self.log.open("w")
        self.process = subprocess.Popen(
            [self.server, "-D", "-e", "-f", str(self.folder / "server")], stderr=log, start_new_session=True
        )
        self._wait()
        return self

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while True:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)
