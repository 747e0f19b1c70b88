"""Workers of this host under torch's elastic agent (what torchrun is made of), with their exit code and their signals.

torchrun itself ends with 1 whatever its workers ended with, so that a scheduler cannot tell "stopped with a
checkpoint, start me again" from a failure, and on SIGTERM it kills after 30 s what may still be saving. Here the
first failed worker's code is the host's, and a request to stop is passed on once and waited for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from loadmaster.ending import STOPS
from loadmaster.errors import LoadmasterError, StoppedOnRequest, TrainingFailed
from loadmaster.processors import is_ours, shares, usable
from loadmaster.training.ranks import await_address
from loadmaster.training.stop import MESSAGE, heeded

RENDEZVOUS_S = 900
"""Longest wait for the other hosts to come."""
AGAIN_S = 0.1
"""A signal that finds no worker yet is looked at again after so long."""
STOPPED_S = 120.0
"""A worker that is stopped for so long is killed: the other hosts have missed it, and its own would wait for good."""
LAST_S = 300.0
"""Workers end together: one that is left so long after another's end is stopped, or stuck in its own."""
LOOK_S = 5.0
"""Between looks at them. Looks are what is counted: time may pass while the whole machine is suspended."""


class WorkerKilled(TrainingFailed):
    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Meeting:
    """Where several hosts meet: static rendezvous, each is told its rank and the first one's address."""

    nodes: int
    rank: int
    address: str
    port: int


@dataclass(frozen=True)
class Workers:
    """What to run on this host: `processes` of `command` (words after the interpreter)."""

    processes: int
    command: Sequence[str]
    meeting: Meeting | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    rendezvous_s: int = RENDEZVOUS_S
    on_request: Callable[[], object] = lambda: None
    """Called when a request to stop comes, which may be too late for the workers to hear of."""


def run_workers(workers: Workers) -> int:
    """Run them to their end; returns 0, or the exit code of the first that failed.

    SIGTERM, SIGINT and SIGHUP to this process go to every worker, once; their agreed end is waited for. A second one
    is passed on too, unless it is SIGHUP. Raises LoadmasterError when the other hosts do not come, or a worker was
    killed, and StoppedOnRequest when it was a SIGTERM that ended it: it had not come so far as to hear of one.
    One that is stopped for STOPPED_S, or still there LAST_S after another has ended, is killed.
    """
    if workers.meeting is not None:
        await_address(workers.meeting.address)
    kept = dict(os.environ)
    os.environ.update(_defaults(workers) | dict(workers.environment))  # before torch, which reads some at its import
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    # What the agent has to say is said here, in a sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    over, lost = threading.Event(), {}
    config = LaunchConfig(**_launch_config(workers), logs_specs=_logs(workers, over, lost))
    try:
        with _signals_kept(meeting=workers.meeting is not None):
            launch_agent(config, sys.executable, list(workers.command))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        if -failure.exitcode in STOPS:
            raise StoppedOnRequest(f"{MESSAGE} (the processes were still starting)") from None
        if failure.pid in lost:
            raise WorkerKilled(rank, f"rank {rank} on this host {lost[failure.pid]}") from None
        name = signal.Signals(-failure.exitcode).name if failure.exitcode else "an unknown cause"
        out_of_memory = "; the host's memory may have run out (dmesg tells)" if name == "SIGKILL" else ""
        raise WorkerKilled(rank, f"rank {rank} on this host was ended by {name}{out_of_memory}") from None
    except (DistError, TimeoutError, ConnectionError) as error:
        raise LoadmasterError(_not_met(workers, error)) from None
    finally:  # what is for the workers is not for this process
        over.set()
        os.environ.clear()
        os.environ.update(kept)


def _launch_config(workers: Workers) -> dict[str, Any]:
    meeting = workers.meeting
    common = {
        "nproc_per_node": workers.processes,
        "max_restarts": 0,
        # The agent's own handler gives workers 30 s and forgets their exit code: _pass_on_from_now instead.
        "signals_to_handle": "SIGQUIT",
    }
    if meeting is None:
        from loadmaster.training import loopback  # brings torch

        loopback.register()
        return common | {
            "min_nodes": 1, "max_nodes": 1, "run_id": uuid.uuid4().hex,
            "rdzv_backend": loopback.BACKEND, "rdzv_endpoint": loopback.ADDRESS,
        }
    return common | {
        "min_nodes": meeting.nodes, "max_nodes": meeting.nodes, "run_id": "loadmaster", "rdzv_backend": "static",
        "rdzv_endpoint": f"{meeting.address}:{meeting.port}",
        "rdzv_configs": {"rank": meeting.rank, "timeout": workers.rendezvous_s},
    }


def _logs(workers: Workers, over: threading.Event, lost: dict[int, str]) -> Any:
    """Workers write where this process writes. The agent asks for this right before it starts them."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest

    class Starting(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            before = set(_leaders_under(os.getpid()))
            _pass_on_from_now(before, workers.on_request)
            threading.Thread(target=_end_the_lost, args=(workers.processes, before, over, lost), daemon=True).start()
            return super().reify(envs)

    return Starting(log_dir=os.devnull)


def _defaults(workers: Workers) -> dict[str, str]:
    """Threads shared out among the workers, and C++ messages with stack traces left out, unless set.

    Of a machine's threads a Slurm job or a container may have a few.
    """
    defaults = {**shares(usable() // workers.processes), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return {name: value for name, value in defaults.items() if is_ours(name)}


def _not_met(workers: Workers, error: BaseException) -> str:
    meeting = workers.meeting
    if meeting is None:
        return f"the workers of this machine could not be started: {str(error).splitlines()[0]}"
    where = f"{meeting.address}:{meeting.port}"
    if "EADDRINUSE" in str(error):
        return f"port {meeting.port} of this host is in use; give all hosts another one: --master-port, or MASTER_PORT"
    if meeting.rank == 0:
        return (
            f"not all of the {meeting.nodes} hosts came to {where} within {workers.rendezvous_s} s; start the same "
            f"command on each, with its own --node-rank, and let them reach that port ({str(error).splitlines()[0]})"
        )
    return (
        f"node 0 did not answer at {where} within {workers.rendezvous_s} s; is it started, is that its address on "
        "the network that the hosts share, and is the port open?"
    )


def _end_the_lost(count: int, before: set[int], over: threading.Event, lost: dict[int, str]) -> None:
    """Kill what of `count` workers is stopped for STOPPED_S, or left LAST_S after the first has ended; `lost` says so
    by process."""
    begun, since_first_s = False, 0.0
    stopped_s: dict[int, float] = {}
    while not over.wait(LOOK_S):
        left = set(_leaders_under(os.getpid())) - before
        begun = begun or len(left) == count
        since_first_s += LOOK_S if begun and len(left) < count else 0.0
        stopped_s = {pid: stopped_s.get(pid, 0.0) + LOOK_S for pid in left if _is_stopped(pid)}
        for pid in left:
            if stopped_s.get(pid, 0.0) > STOPPED_S:
                lost[pid] = f"was stopped (SIGSTOP), and not let go on for {STOPPED_S:g} s"
            elif since_first_s > LAST_S:
                lost[pid] = f"had not ended {LAST_S:g} s after another"
            else:
                continue
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    import psutil

    with suppress(psutil.Error):
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return False


def _pass_on_from_now(before: set[int], on_request: Callable[[], object]) -> None:
    """What asks this process to stop goes to its workers, as SIGTERM: to those that are started from here on."""
    told = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        on_request()
        if told and number == signal.SIGHUP:
            return
        workers = [child for child in _leaders_under(os.getpid()) if child not in before]
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        told = told or bool(workers)
        if not workers:  # the first is about to be started: it would never hear of it
            timer = threading.Timer(AGAIN_S, again, (number,))
            timer.daemon = True
            timer.start()

    def again(number: int) -> None:
        if signal.getsignal(number) is pass_on:
            os.kill(os.getpid(), number)

    for number in heeded():
        signal.signal(number, pass_on)


@contextmanager
def _signals_kept(meeting: bool) -> Iterator[None]:
    """This process's own handlers are there again afterwards.

    While other hosts are waited for, a signal ends it at once, with the code of a stop on request: the wait is in C++,
    where no handler would run, so a thread hears of the signal.
    """
    previous = {number: signal.getsignal(number) for number in STOPS}
    ears = socket.socketpair()
    ears[1].setblocking(False)
    before = signal.set_wakeup_fd(ears[1].fileno(), warn_on_full_buffer=False) if meeting else -1
    try:
        if meeting:
            for number in heeded():
                signal.signal(number, _while_hosts_are_waited_for)
            threading.Thread(target=_end_when_asked, args=(ears[0],), name="signals", daemon=True).start()
        yield
    finally:
        if meeting:
            signal.set_wakeup_fd(before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        ears[1].close()  # ends the thread
        if not meeting:
            ears[0].close()


def _while_hosts_are_waited_for(number: int, frame: FrameType | None) -> None:
    """A handler only because Python tells a wakeup descriptor of no other signals."""


def _end_when_asked(ear: socket.socket) -> None:
    with ear:
        while numbers := ear.recv(64):
            waits = signal.getsignal(signal.SIGTERM) == _while_hosts_are_waited_for
            if waits and set(STOPS) & set(numbers):
                print(f"{MESSAGE} (not all hosts had come)", file=sys.stderr, flush=True)
                os._exit(StoppedOnRequest.exit_code)


def _leaders_under(pid: int) -> list[int]:
    """Children that lead a session of their own, as the agent starts its workers."""
    import psutil  # no plan waits for it

    return [child.pid for child in psutil.Process(pid).children() if _session(child.pid) == child.pid]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None
