"""Processes that tokenise heed no signal, end with the one that began them, and are missed when they are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from loadmaster.data import processes
from loadmaster.data.processes import in_processes
from loadmaster.errors import LoadmasterError

KILLED = """
import multiprocessing, os, signal, time
from loadmaster.data.processes import in_processes

if __name__ == "__main__":
    with in_processes(2, time.sleep, [0.3, 0.3, 60, 60]) as results:
        workers = multiprocessing.active_children()
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
        next(results), next(results)
        print(*(worker.pid for worker in workers), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_tokenises_heeds_no_request_to_stop_and_ends_with_the_one_that_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    began = subprocess.Popen([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, env=env)
    workers = [Path(f"/proc/{int(pid)}") for pid in began.stdout.readline().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(worker.exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)
    assert began.wait() == -signal.SIGKILL


@pytest.mark.parametrize("begun", [False, True])
def test_a_process_that_tokenises_and_was_killed_is_an_error_with_a_sentence(begun):
    """The others end too, whatever they are at: nothing waits for them."""
    began = time.monotonic()
    with pytest.raises(LoadmasterError, match="a process that tokenises was ended"):  # noqa: SIM117
        with in_processes(2, time.sleep, [0, 600, 600]) as results:
            if begun:
                next(results)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            list(results)
    assert not multiprocessing.active_children() and time.monotonic() - began < 300


def test_a_process_that_tokenises_and_was_stopped_is_not_waited_for_for_good(monkeypatch):
    monkeypatch.setattr(processes, "SILENT_S", 0.5)
    monkeypatch.setattr(processes, "LOOK_S", 0.25)
    with pytest.raises(LoadmasterError, match="has given nothing for"):  # noqa: SIM117
        with in_processes(1, time.sleep, [60]) as results:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGSTOP)
            list(results)
    assert not multiprocessing.active_children()


def test_a_run_that_was_suspended_as_a_whole_goes_on():
    class Suspended(Future):
        def result(self, timeout=None):
            self.result = super().result
            raise TimeoutError  # however long that was

    piece = Suspended()
    piece.set_result("tokens")
    assert list(processes._in_turn([piece])) == ["tokens"]
