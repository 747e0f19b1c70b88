"""Runs of train.py as forks of a process that has imported what they need: half of a short run's time.

    runs = Forks(environment)
    done = runs.run(words, folder, environment)
    process = runs.start(words, folder, environment)
    runs.end()

They are processes as any other run's, with their own environment, folder and output, and so are their ranks, which are
forks of them in turn (`fork_ranks`). How a rank is started as what it is, a process that imports everything, is left to
the tests whose runs are no forks (tests/training/test_workers.py has both).
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
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Forks:
    def __init__(self, environment: dict[str, str]):
        """environment: with which modules are imported."""
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0,
        )
        self._told, self._last = b"", None

    def end(self) -> None:
        self._end_last()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self, words: list[str], folder: Path, environment: dict[str, str], timeout_s: float = 600
    ) -> subprocess.CompletedProcess:
        written = [folder / name for name in ("stdout.txt", "stderr.txt")]
        for path in written:
            path.write_bytes(b"")
        code = self._begin(words, folder, environment, written).wait(timeout_s)
        return subprocess.CompletedProcess(words, code, *(path.read_text(encoding="utf-8") for path in written))

    def start(self, words: list[str], folder: Path, environment: dict[str, str]) -> Run:
        """Its output goes to folder/log.txt. Until its end there is no other run."""
        return self._begin(words, folder, environment, [folder / "log.txt"] * 2)

    def _begin(self, words: list[str], folder: Path, environment: dict[str, str], written: list[Path]) -> Run:
        self._end_last()
        told = {"words": words, "folder": str(folder), "environment": environment, "written": [*map(str, written)]}
        self._process.stdin.write(json.dumps(told).encode() + b"\n")
        self._last = Run(self, self.number(600))  # it imports first
        return self._last

    def _end_last(self) -> None:
        """Of a test that failed in the middle of its run."""
        if self._last and self._process.poll() is None and self._last.poll() is None:
            self._last.send_signal(signal.SIGKILL)
            self._last.wait(60)

    def number(self, timeout_s: float) -> int | None:
        """That the process tells next; None if it takes longer."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._told:
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                return None
            read = os.read(self._process.stdout.fileno(), 100)
            if not read:
                raise ChildProcessError("the process that runs are forks of is gone")
            self._told += read
        line, _, self._told = self._told.partition(b"\n")
        return int(line)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Run:
    """One that is at work, as much as a test asks of subprocess.Popen."""

    def __init__(self, forks: Forks, pid: int):
        self.pid, self.returncode, self._forks = pid, None, forks

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.number(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = self._forks.number(timeout)
        if self.returncode is None:
            self._forks.kill()
            raise subprocess.TimeoutExpired("train.py", timeout)
        return self.returncode


class Rank(subprocess.Popen):
    """`python -m MODULE WORDS` as a fork of this process, in a session of its own."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *_):
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(list(args), env)
        self._child_created = True


def _become(words: list[str], environment: dict[str, str]) -> None:
    """What the interpreter does that is started so, to its end."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = words[words.index("-m") + 1 :]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextlib.contextmanager
def fork_ranks() -> Iterator[None]:
    """Ranks that this process starts are forks of it: two of them would import for longer than a short run takes."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def popen(self, args: tuple, env: dict[str, str]) -> Rank:
        return Rank(args=args, env=env, stdout=self._stdout, stderr=self._stderr)

    kept, SubprocessHandler._popen = SubprocessHandler._popen, popen
    try:
        yield
    finally:
        SubprocessHandler._popen = kept


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
                opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(opened, number)
                os.close(opened)
            answers.close()
            os.chdir(told["folder"])
            os.environ.clear()
            os.environ.update(told["environment"])
            return told["words"]
        answers.write(f"{child}\n")
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
    os._exit(0)


def _import() -> None:
    """What a run imports, and would in the state that train.py makes."""
    from loadmaster import collector, hub

    collector.pause()
    hub.quieten()
    with contextlib.suppress(ImportError):  # a run says what is missing
        import peft  # noqa: F401
        import torch.distributed.launcher.api
        import transformers.models.llama.modeling_llama  # noqa: F401

        import loadmaster.pipeline
        import loadmaster.report.page
        import loadmaster.training.loop  # noqa: F401

        if int(os.environ.get("STAND_IN_GPUS", 0)) > 1:
            import deepspeed  # noqa: F401
        if os.environ.get("TRITON_INTERPRET"):
            import torch._inductor.compile_fx
            import torch._inductor.lowering  # noqa: F401


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.argv = [str(ROOT / "train.py"), *_next_run()]
    with fork_ranks():
        runpy.run_path(sys.argv[0], run_name="__main__")
