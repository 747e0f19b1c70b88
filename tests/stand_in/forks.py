"""Runs of train.py as forks of a process that has imported what they need: half of a short run's time.

    runs = Forks(environment)
    done = runs.run(words, folder, environment)
    runs.end()

They are processes as any other run's, with their own environment, folder and output; the processes that they start
themselves import everything anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    def __init__(self, environment: dict[str, str]):
        """environment: with which modules are imported."""
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, bufsize=1,
        )

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self, words: list[str], folder: Path, environment: dict[str, str], timeout_s: float = 600
    ) -> subprocess.CompletedProcess:
        written = [folder / name for name in ("stdout.txt", "stderr.txt")]
        told = {"words": words, "folder": str(folder), "environment": environment, "written": [*map(str, written)]}
        self._process.stdin.write(json.dumps(told) + "\n")
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(words, timeout_s)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text(encoding="utf-8") for path in written))


def _next_run() -> list[str]:
    """Of train.py, in a process of its own: this returns in each, and never in the one that they are forks of."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what is imported may print
    _import()
    for line in iter(sys.stdin.readline, ""):
        told = json.loads(line)
        child = os.fork()
        if not child:
            for number, path in enumerate([os.devnull, *told["written"]]):
                opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                os.dup2(opened, number)
                os.close(opened)
            answers.close()
            os.chdir(told["folder"])
            os.environ.clear()
            os.environ.update(told["environment"])
            return told["words"]
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    os._exit(0)


def _import() -> None:
    """What a run imports, and would in the state that train.py makes."""
    from loadmaster import collector, hub

    collector.pause()
    hub.quieten()
    with contextlib.suppress(ImportError):  # a run says what is missing
        import peft  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        import loadmaster.pipeline
        import loadmaster.report.page
        import loadmaster.training.loop  # noqa: F401

        if os.environ.get("TRITON_INTERPRET"):
            import torch._inductor.compile_fx
            import torch._inductor.lowering  # noqa: F401


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.argv = [str(ROOT / "train.py"), *_next_run()]
    runpy.run_path(sys.argv[0], run_name="__main__")
