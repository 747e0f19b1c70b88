"""A Pod of the fake provider as a real process."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from tests.launch.fake_runpod import FakeRunpod

CONTAINER = "FAKE_CONTAINER"


def kill_container(mark: str) -> None:
    """Kill every process that was started with `mark` in its environment, whatever session it has moved to."""
    found = True
    while found:  # one may have started another meanwhile
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True


class ProcessRunner:
    """Runs a Pod's args as a process, as its container would: env, Pod id and a key of its own, lines as its log.

    folder stands for the container's file system: /workspace in a value of env is folder/workspace.
    """

    def __init__(self, folder: Path, secrets: dict[str, str] | None = None, environment: dict[str, str] | None = None):
        self.folder, self.secrets, self.environment = folder, secrets or {}, environment or {}
        self.exit_codes: list[int] = []

    def __call__(self, fake: FakeRunpod, id: str) -> None:
        container = f"{CONTAINER}={uuid.uuid4().hex}"
        with fake.lock:
            pod = fake.pods[id]
            process = subprocess.Popen(
                shlex.split(pod["args"]),
                env=self._env(fake, id, pod["env"]) | pod.get("_own", {}) | dict([container.split("=")]),
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

            def end() -> None:
                process.kill()  # right after its start its environment is not yet to be seen
                kill_container(container)

            pod["_end"] = end
        assert process.stdout is not None
        for line in process.stdout:
            fake.say(id, line.rstrip("\n"))
        self.exit_codes.append(process.wait())

    def _env(self, fake: FakeRunpod, id: str, env: dict[str, str]) -> dict[str, str]:
        def secret(match: re.Match) -> str:
            return self.secrets[match.group(1)]

        kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
        # An image's python3 has loadmaster; here that is the one that runs the tests, also where it is not activated.
        # What pip installs in an image goes away with it; this Python's own packages are not to be touched.
        kept["PIP_TARGET"] = str(self.folder / "installed")
        kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        given = {
            name: re.sub(r"\{\{ RUNPOD_SECRET_(\w+) \}\}", secret, value).replace(
                "/workspace", str(self.folder / "workspace")
            )
            for name, value in env.items()
        }
        own = {"RUNPOD_POD_ID": id, "RUNPOD_API_KEY": fake.pod_key(id)}
        return {**kept, **self.environment, **given, **own}
