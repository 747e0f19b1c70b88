"""Requests to stop: heard in time also where no Python runs, and limits of time and money as such requests."""

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from loadmaster import cli, starting, worker
from loadmaster.config.schema import DataConfig, Job, LaunchConfig
from loadmaster.ending import STOPS
from loadmaster.errors import LoadmasterError, StoppedOnRequest
from loadmaster.files import read_json, write_json
from loadmaster.training import workers
from loadmaster.training.stop import STARTED, StopSignal, deadline
from loadmaster.training.workers import Outcome, outcome_file, run_stage
from tests.runs import ROOT, environment

JOB = Job(data=DataConfig(path="x"))


@pytest.mark.parametrize(
    "launch, usd_per_hour, wanted",
    [
        ({}, 4.0, None),
        ({"max_hours": 2.0}, None, 7200 - 120),
        ({"max_usd": 6.0}, 4.0, 5400 - 120),
        ({"max_usd": 6.0, "max_hours": 1.0}, 4.0, 3600 - 120),
        ({"max_usd": 6.0}, None, None),
        ({"max_hours": 0.01}, None, 36 - 3.6),  # of a short one, a tenth
        ({"max_hours": 2.0, "grace_s": 10.0}, None, 7200 - 10),
    ],
)
def test_a_limit_asks_to_stop_so_early_that_it_is_kept(launch, usd_per_hour, wanted, monkeypatch):
    monkeypatch.setenv(STARTED, "1000")
    found = deadline(dataclasses.replace(JOB, launch=LaunchConfig(**launch)), usd_per_hour)
    assert found == (None if wanted is None else pytest.approx(1000 + wanted))


def test_a_limit_ends_what_one_process_does_alone():
    stop = StopSignal().install()
    try:
        stop.limit(time.time() + 0.2)
        with pytest.raises(StoppedOnRequest, match=r"launch\.max_hours or launch\.max_usd is used up"):
            time.sleep(20)
    finally:
        stop.uninstall()


def test_a_request_between_safe_points_is_noted_and_does_not_interrupt():
    stop = StopSignal(grace_s=100).install()
    try:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert stop.requested
    finally:
        stop.uninstall()


def test_what_a_request_interrupts_may_take_its_time_to_clear_up(monkeypatch):
    """A machine is given back on the way out; nothing may end the process before that."""
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code))
    ended, stop = [], StopSignal(grace_s=0.1).install()
    try:
        with pytest.raises(StoppedOnRequest):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        time.sleep(0.5)
        assert ended == []
    finally:
        stop.uninstall()


def test_a_closed_terminal_is_a_request_but_never_insists():
    """Ctrl-C, and a moment later the window is closed: the checkpoint is saved all the same."""
    stop = StopSignal(grace_s=100).install()
    try:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
            stop._first_s = float("-inf")  # long ago
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(StoppedOnRequest):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(20)
    finally:
        stop.uninstall()


def test_a_closed_terminal_is_none_of_what_nohup_started():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal().install()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        assert not stop.requested
        stop.uninstall()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the handler runs in here


def test_a_request_that_comes_while_an_object_is_dropped_is_not_lost():
    """Python swallows what is raised in a __del__, and a plan drops objects by the hundred thousand."""
    stop = StopSignal(grace_s=100).install()
    try:
        with pytest.raises(StoppedOnRequest):
            Dropped()
            time.sleep(20)
    finally:
        stop.uninstall()


def test_a_request_that_came_before_the_workers_did_starts_none(tmp_path):
    stop = StopSignal()
    stop.requested = True
    with pytest.raises(StoppedOnRequest):
        run_stage("train", tmp_path, 2, stop)


def test_a_request_that_finds_a_worker_done_spoils_nothing_of_what_it_leaves(tmp_path, monkeypatch):
    for name in ("settle_streams", "die_with_the_lead", "read_job", "log_to"):
        monkeypatch.setattr(worker, name, MagicMock())
    monkeypatch.setattr(worker, "Plan", MagicMock())
    monkeypatch.setattr(worker, "_run", lambda *_: Outcome(0, ""))
    monkeypatch.setenv("RANK", "0")
    left = []
    monkeypatch.setattr(worker, "leave_word", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), left.append(True)))
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        assert worker.main("train", tmp_path) == 0 and left
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (os error 28)"),
])
def test_a_worker_whose_disk_is_full_says_so_in_a_sentence_whoever_raised_it(error, tmp_path, monkeypatch):
    """safetensors raises an error of its own."""
    for name in ("settle_streams", "die_with_the_lead", "read_job", "log_to", "heed_no_more_requests", "StopSignal"):
        monkeypatch.setattr(worker, name, MagicMock())
    monkeypatch.setattr(worker, "Plan", MagicMock())
    monkeypatch.setattr(worker, "_run", MagicMock(side_effect=error))
    monkeypatch.setenv("RANK", "1")
    assert worker.main("train", tmp_path) == LoadmasterError.exit_code
    left = read_json(outcome_file(tmp_path, 1))["message"]
    assert left.startswith("rank 1: ") and "No space left" in left and "on a disk with room" in left
    monkeypatch.setattr(worker, "_run", MagicMock(side_effect=ValueError("a defect")))
    with pytest.raises(ValueError, match="a defect"):
        worker.main("train", tmp_path)


def test_a_request_that_finds_the_workers_done_is_kept_by_who_started_them(tmp_path, monkeypatch):
    def run_workers(told):
        write_json(outcome_file(tmp_path, 0), vars(Outcome(0, "", {"steps": 3})))
        told.on_request()
        return 0

    monkeypatch.setenv(STARTED, "1000")
    monkeypatch.setattr(workers, "run_workers", run_workers)
    stop = StopSignal()
    assert run_stage("train", tmp_path, 1, stop) == {"steps": 3} and stop.requested


def test_deferral_within_deferral_ends_with_the_outer_one():
    stop = StopSignal().install()
    try:
        with stop.deferred():
            with stop.deferred():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        stop.uninstall()


def test_a_process_that_is_stuck_in_c_ends_when_its_time_is_over():
    """It waits in a store's C++, as a rank waits for another that does not come; no Python handler ever runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = (
        "import datetime, torch.distributed as d; from loadmaster.training.stop import StopSignal\n"
        "stop = StopSignal(grace_s=1.0).install()\n"
        "with stop.deferred():\n"
        f"    store = d.TCPStore('127.0.0.1', {port}, is_master=True, wait_for_workers=False)\n"
        "    print('waits', flush=True)\n"
        "    store.wait(['never'], datetime.timedelta(seconds=300))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", words], env=environment() | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    killer = threading.Timer(250, process.kill)
    killer.start()
    assert process.stdout.readline() == "waits\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    killer.cancel()
    assert process.returncode == 75 and time.monotonic() - began < 200
    assert "nothing was saved within 1 s" in said


def test_a_signal_that_comes_as_a_stopped_run_leaves_changes_nothing_of_its_code():
    """Between the handler of its run and the last words of its process; who imports this program gets its own back."""
    script = """
import os, signal, sys
from loadmaster import starting
if sys.argv[1] == "enters": starting.listen()
from loadmaster.ending import ended
from loadmaster.training.stop import StopSignal
stop = StopSignal().install()
with stop.deferred():
    os.kill(os.getpid(), signal.SIGINT)
assert stop.requested
stop.uninstall()
os.kill(os.getpid(), signal.SIGINT)
sys.exit(ended(75))
"""
    codes = [
        subprocess.run([sys.executable, "-c", script, how], capture_output=True, check=False).returncode
        for how in ("enters", "imports")
    ]
    assert codes == [75, -signal.SIGINT]


@pytest.mark.parametrize("when", ["cli._parser = lambda: os.kill(os.getpid(), signal.SIGINT)", "atexit.register(stop)"])
def test_ctrl_c_before_a_command_begins_and_as_it_leaves_is_no_traceback(when: str, tmp_path):
    script = f"""
import atexit, os, signal, sys
from loadmaster import starting
starting.listen()
from loadmaster import cli
from loadmaster.ending import ended
def stop(): os.kill(os.getpid(), signal.SIGINT)
{when}
sys.exit(ended(cli.main(["runs"])))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(starting.__file__).parents[1])}
    left = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert left.returncode == -signal.SIGINT and "Traceback" not in left.stderr and "Exception" not in left.stderr


def test_ctrl_c_that_a_library_makes_an_error_of_its_own_is_still_one(monkeypatch, capsys):
    for gives_way in (lambda: len(None), lambda: os.stat("/no/such/file")):  # as OmegaConf, or a client, does

        def stumbles(arguments, gives_way=gives_way):
            try:
                raise KeyboardInterrupt
            finally:
                gives_way()

        monkeypatch.setattr(cli, "_runs", stumbles)
        assert cli.main(["runs"]) == 130 and capsys.readouterr().err == "\nstopped\n"
    monkeypatch.setattr(cli, "_runs", lambda arguments: len(None))
    with pytest.raises(TypeError):
        cli.main(["runs"])


@pytest.mark.parametrize("entry", ["train.py", "launch/torchrun.py", "loadmaster/__main__.py", "loadmaster/cli.py"])
def test_an_entry_point_takes_the_signals_before_it_imports_what_takes_long(entry: str):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from loadmaster import starting
def listen(): sys.exit(" ".join(sys.modules))
starting.listen = listen
exec(compile(open({str(ROOT / entry)!r}).read(), {entry!r}, "exec"), {{"__name__": "__main__"}})
"""
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not {"argparse", "dataclasses", "pathlib", "re", "typing"} & {*done.stderr.split()}
