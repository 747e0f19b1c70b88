"""What this host does around torch's elastic agent, and makes of its end: without workers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from loadmaster.errors import LoadmasterError, StoppedOnRequest
from loadmaster.training import agent
from loadmaster.training.agent import Meeting, WorkerKilled, Workers, run_workers

WORKERS = Workers(2, ["-c", ""])
MEETING = Meeting(3, 1, "10.0.0.1", 400)


@pytest.fixture
def run(monkeypatch):
    """run_workers, with an agent that does what is given."""

    def run(does, workers=WORKERS):
        monkeypatch.setattr(api, "launch_agent", lambda config, interpreter, words: does(config))
        return run_workers(workers)

    monkeypatch.setattr(agent, "await_address", lambda address: None)
    return run


def failing(code: int):
    def does(config):
        raise ChildFailedError("", {1: ProcessFailure(local_rank=1, pid=7, exitcode=code, error_file="")})

    return does


@pytest.mark.parametrize("code", [1, 4, 75])
def test_the_first_workers_exit_code_is_the_hosts(run, code):
    assert run(lambda config: None) == 0
    assert run(failing(code)) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_worker_that_a_request_found_too_early_has_stopped(run, number):
    with pytest.raises(StoppedOnRequest, match="the processes were still starting"):
        run(failing(-number))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, "ended by SIGKILL; the host's memory may have run out (dmesg tells)"),
        (-signal.SIGSEGV, "ended by SIGSEGV"),
        (0, "ended by an unknown cause"),
    ],
)
def test_what_ended_a_worker_is_said(run, code, said):
    with pytest.raises(WorkerKilled) as killed:
        run(failing(code))
    assert (killed.value.rank, str(killed.value)) == (1, f"rank 1 on this host was {said}")


@pytest.mark.parametrize(("pid", "said"), [(7, "rank 1 on this host had not ended"), (8, "was ended by SIGKILL")])
def test_a_worker_that_was_killed_here_is_said_why(run, monkeypatch, pid, said):
    def logs(workers, over, lost):
        known.append(over)
        lost[pid] = "had not ended"

    known: list[threading.Event] = []
    monkeypatch.setattr(agent, "_logs", logs)
    with pytest.raises(WorkerKilled, match=said):
        run(failing(-signal.SIGKILL))
    assert known[0].is_set()  # nobody is looked at any more


@pytest.mark.parametrize(
    ("meeting", "error", "said"),
    [
        (MEETING, TimeoutError("late"), "node 0 did not answer at 10.0.0.1:400 within 5 s"),
        (replace(MEETING, rank=0), ConnectionError("a\nb"), r"not all of the 3 hosts came to .* 5 s.* \(a\)"),
        (MEETING, DistNetworkError("EADDRINUSE"), "port 400 of this host is in use"),
        (None, DistNetworkError("a\nb"), "the workers of this machine could not be started: a$"),
    ],
)
def test_hosts_that_do_not_meet_are_a_sentence(run, meeting, error, said):
    def does(config):
        raise error

    with pytest.raises(LoadmasterError, match=said):
        run(does, replace(WORKERS, meeting=meeting, rendezvous_s=5))


def test_what_is_for_the_workers_is_not_for_this_process(run, monkeypatch):
    def does(config):
        within.update(os.environ)
        os.environ["OF_THE_AGENT"] = "1"

    within: dict[str, str] = {}
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    before = dict(os.environ)
    run(does, replace(WORKERS, environment={"MINE": "1"}))
    assert (within["MINE"], within["TORCH_CPP_LOG_LEVEL"]) == ("1", "ERROR") and dict(os.environ) == before
    run(does, replace(WORKERS, environment={"TORCH_CPP_LOG_LEVEL": "INFO"}))  # what is asked for wins
    assert within["TORCH_CPP_LOG_LEVEL"] == "INFO" and dict(os.environ) == before
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "WARNING")  # and what is set
    run(does)
    assert within["TORCH_CPP_LOG_LEVEL"] == "WARNING"


def test_threads_are_shared_out_among_the_workers(monkeypatch):
    given = []
    monkeypatch.setattr(agent, "usable", lambda: 12)
    monkeypatch.setattr(agent, "shares", lambda threads: given.append(threads) or {})
    agent._defaults(replace(WORKERS, processes=3))
    assert given == [4]


@pytest.mark.parametrize("meeting", [None, MEETING])
def test_what_the_agent_is_told(run, meeting):
    configs = []
    run(configs.append, replace(WORKERS, meeting=meeting, rendezvous_s=5))
    (config,) = configs
    assert (config.nproc_per_node, config.max_restarts, config.signals_to_handle) == (2, 0, "SIGQUIT")
    nodes = meeting.nodes if meeting else 1
    assert (config.min_nodes, config.max_nodes) == (nodes, nodes)
    if meeting:
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("static", "10.0.0.1:400")
        assert (config.rdzv_configs["rank"], config.rdzv_configs["timeout"]) == (1, 5)


@pytest.mark.parametrize("meeting", [None, MEETING])
def test_signals_are_this_processs_own_again(run, meeting, monkeypatch):
    def mine(number, frame):
        """As a handler of who called."""

    def does(config):
        agent._pass_on_from_now(set(), lambda: None)
        assert mine not in map(signal.getsignal, agent.STOPS)

    before = {number: signal.signal(number, mine) for number in agent.STOPS}
    ears = socket.socketpair()
    ears[1].setblocking(False)
    fd = signal.set_wakeup_fd(ears[1].fileno())
    try:
        run(does, replace(WORKERS, meeting=meeting))
        assert {signal.getsignal(number) for number in agent.STOPS} == {mine}
        assert signal.set_wakeup_fd(fd) == ears[1].fileno()
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        for ear in ears:
            ear.close()


def test_the_first_hosts_address_is_waited_for_where_there_is_one(run, monkeypatch):
    awaited = []
    monkeypatch.setattr(agent, "await_address", awaited.append)
    run(lambda config: None)
    assert awaited == []
    run(lambda config: None, replace(WORKERS, meeting=MEETING))
    assert awaited == ["10.0.0.1"]


def test_what_runs_here_before_the_workers_is_none_of_them(run, monkeypatch):
    asked, watched, began = [], [], threading.Event()

    def end_the_lost(*given):
        watched.extend(given)
        began.set()

    monkeypatch.setattr(agent, "_leaders_under", lambda pid: [5])
    monkeypatch.setattr(agent, "_pass_on_from_now", lambda *given: asked.extend(given))
    monkeypatch.setattr(agent, "_end_the_lost", end_the_lost)
    run(lambda config: config.logs_specs.reify({}), WORKERS)
    assert began.wait(60) and watched[:2] == [2, {5}]
    assert asked == [{5}, WORKERS.on_request]


@pytest.fixture
def looked_at(monkeypatch):
    """Who is killed of two workers, for what is there at each look: {pid: whether it is stopped}."""

    def looked_at(*looks: dict[int, bool], gone: bool = False) -> list[int]:
        def kill(pid, number):
            killed.append(pid)
            assert number == signal.SIGKILL
            if gone:
                raise ProcessLookupError

        killed, lost, rest = [], {}, [RUN, *looks]
        monkeypatch.setattr(agent, "_leaders_under", lambda pid: [*rest[0]])
        monkeypatch.setattr(agent, "_is_stopped", lambda pid: rest[0][pid])
        monkeypatch.setattr(os, "kill", kill)
        agent._end_the_lost(2, {9}, SimpleNamespace(wait=lambda seconds: rest.pop(0) is not None and not rest), lost)
        assert lost.keys() == set(killed)
        return killed

    return looked_at


RUN, STOPPED, ALONE = {1: False, 2: False}, {1: False, 2: True}, {2: False}
LOOKS = int(agent.STOPPED_S / agent.LOOK_S)
LAST_LOOKS = int(agent.LAST_S / agent.LOOK_S)


@pytest.mark.parametrize(
    ("looks", "killed"),
    [
        ([STOPPED] * LOOKS, []),
        ([STOPPED] * (LOOKS + 1), [2]),
        ([*[STOPPED] * LOOKS, RUN, *[STOPPED] * LOOKS], []),  # it was let go on
        ([RUN, *[ALONE] * LAST_LOOKS], []),
        ([RUN, *[ALONE] * (LAST_LOOKS + 1)], [2]),
        ([*[ALONE] * (LAST_LOOKS + 1), *[RUN] * 2], []),  # the other is yet to be started
        ([{**RUN, 9: True}] * (LOOKS + 1), []),  # it is none of them
        ([RUN] * (LAST_LOOKS + 1), []),
    ],
)
def test_who_is_killed_after_how_many_looks(looked_at, looks, killed):
    assert looked_at(*looks) == killed


def test_who_is_gone_before_it_is_killed_does_not_end_the_looks(looked_at):
    assert looked_at(*[STOPPED] * (LOOKS + 3), gone=True) == [2, 2, 2]


def test_a_process_is_stopped_by_a_signal(monkeypatch):
    """Not by a debugger; psutil tells one from the other."""
    with subprocess.Popen(["sleep", "60"]) as process:
        assert not agent._is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert agent._is_stopped(process.pid)
        process.kill()
    assert not agent._is_stopped(process.pid)


@pytest.fixture
def told(monkeypatch):
    """What is sent to whom; 9 was there before the workers."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(agent, "AGAIN_S", 0.01)
    return sent


def test_a_second_request_is_passed_on_too_unless_it_is_a_terminals_end(told, monkeypatch):
    monkeypatch.setattr(agent, "_leaders_under", lambda pid: [1, 2, 9])
    asked, once = [], [(1, signal.SIGTERM), (2, signal.SIGTERM)]
    with agent._signals_kept(meeting=False):
        agent._pass_on_from_now({9}, lambda: asked.append(True))
        assert len({signal.getsignal(number) for number in agent.STOPS}) == 1
        pass_on = signal.getsignal(signal.SIGTERM)
    for number, times in ((signal.SIGHUP, 1), (signal.SIGHUP, 1), (signal.SIGTERM, 2), (signal.SIGINT, 3)):
        pass_on(number, None)
        assert told == times * once
    assert len(asked) == 4


def test_a_request_that_finds_no_worker_comes_again_while_there_may_be_one(told, monkeypatch):
    monkeypatch.setattr(agent, "_leaders_under", lambda pid: [9])
    with agent._signals_kept(meeting=False):
        agent._pass_on_from_now({9}, lambda: None)
        pass_on = signal.getsignal(signal.SIGHUP)
        for times in (1, 2):  # the first was passed on to nobody
            pass_on(signal.SIGHUP, None)
            deadline = time.monotonic() + 60
            while len(told) < times:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert told == [(os.getpid(), signal.SIGHUP)] * 2
    pass_on(signal.SIGHUP, None)
    time.sleep(0.1)
    assert len(told) == 2  # it would end this process, whose handlers are its own again


def test_a_terminals_end_that_is_ignored_stays_so(run):
    """nohup's."""

    def does(config):
        seen.append(signal.getsignal(signal.SIGHUP))
        agent._pass_on_from_now(set(), lambda: None)
        seen.append(signal.getsignal(signal.SIGHUP))

    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(does, replace(WORKERS, meeting=MEETING))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [signal.SIG_IGN] * 2


@pytest.mark.parametrize(
    ("waits", "number", "ends"),
    [
        (True, signal.SIGTERM, True),
        (True, signal.SIGCHLD, False),
        (False, signal.SIGTERM, False),  # workers are there: they are told, and waited for
    ],
)
def test_a_request_ends_this_process_only_while_other_hosts_are_waited_for(monkeypatch, capsys, waits, number, ends):
    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    here, there = socket.socketpair()
    there.send(bytes([number]))
    there.close()
    before = signal.getsignal(signal.SIGTERM)
    if waits:
        signal.signal(signal.SIGTERM, agent._while_hosts_are_waited_for)
    try:
        with pytest.raises(Ended, match="75") if ends else nullcontext():
            agent._end_when_asked(here)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ("not all hosts had come" in capsys.readouterr().err) == ends


def test_workers_are_those_of_all_threads_children_that_lead_a_session():
    started: list[subprocess.Popen] = []
    before = agent._leaders_under(os.getpid())

    def start():
        started.extend(subprocess.Popen(["sleep", "60"], start_new_session=leads) for leads in (True, False))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    try:
        assert set(agent._leaders_under(os.getpid())) - {*before} == {started[0].pid}
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_process_that_is_gone_leads_no_session():
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert agent._session(gone.pid) is None and agent._session(os.getpid()) == os.getsid(0)
