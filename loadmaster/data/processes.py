"""Work on the machine's other cores that ends with this process, and only with it, however that comes about."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from loadmaster.ending import STOPS, end_with
from loadmaster.errors import LoadmasterError

SILENT_S = 1800.0
"""A piece that takes longer is not worked on: pieces are small."""
LOOK_S = 5.0
"""Between looks at it. Looks are what is counted: time may pass while all of this is suspended (Ctrl-Z)."""


class _Process(SpawnProcess):
    """Heeds no request to stop, and the pool's own way to end it is SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _Spawn(SpawnContext):
    """Fork is unsafe beside torch's threads."""

    Process = _Process


def _start_worker() -> None:
    end_with(multiprocessing.parent_process().pid)  # who waits for the next chunk never hears that it was killed
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


@contextmanager
def in_processes(count: int, work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Iterator[Any]]:
    """work(piece) of every piece in turn. A request to stop that reaches the processes is for this one alone to heed.

    Raises LoadmasterError where one was killed, or gives nothing for SILENT_S.
    """
    pool = ProcessPoolExecutor(count, _Spawn(), _start_worker)
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # which they inherit: all of them begin here
        try:
            results = [pool.submit(work, piece) for piece in pieces]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield _in_turn(results)
    except BaseException as error:
        for process in multiprocessing.active_children():
            if isinstance(process, _Process):  # which may be stopped, and would be waited for
                process.kill()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise LoadmasterError(
            "a process that tokenises was ended; the host's memory may have run out (dmesg tells). "
            "The same command tokenises anew"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_turn(results: list[Future]) -> Iterator[Any]:
    results.reverse()
    while results:
        yield _awaited(results.pop())  # and is not held any longer


def _awaited(result: Future) -> Any:
    for _ in range(math.ceil(SILENT_S / LOOK_S)):
        with suppress(TimeoutError):
            return result.result(LOOK_S)
    raise LoadmasterError(
        f"a process that tokenises has given nothing for {SILENT_S:g} s: it was stopped, or its disk does not answer. "
        "The same command tokenises anew"
    )
