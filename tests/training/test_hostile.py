"""What users, schedulers and disks do to a run of two processes: it ends in bounded time, says why, and goes on."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import ROOT, environment, file_system, finish, metrics, start
from tests.training.test_workers import job, wait_for_step, workers_of

pytestmark = pytest.mark.slow
END_S = 150
"""Longest wait for an end: launch.grace_s, 120 s, and the time to end in."""


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def wait_for(process, what, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, "ended, or it took too long"
        time.sleep(0.02)


def ends(process, folder: Path) -> int:
    try:
        return process.wait(timeout=END_S)
    except Exception:
        process.kill()
        raise AssertionError(f"no end within {END_S} s\n{said(folder)}") from None


def phase(folder: Path, rank: int, words: str) -> bool:
    log = folder / "run" / "logs" / f"rank-{rank}.log"
    return log.is_file() and words in log.read_text()


MORE = {
    "compiling": ["compile=true", "launch.grace_s=20"],
    "evaluating": ["evaluation.every_steps=1", "data.max_rows=400"],
    "in the stage evaluate": [
        "max_steps=2", "stop_after=evaluate", "evaluation.task=json_fields", "evaluation.max_rows=60",
        "evaluation.max_new_tokens=400",
    ],
}


@pytest.mark.parametrize("when", ["starting", "loading", "rehearsing", *MORE])
def test_sigterm_to_one_rank_ends_all_of_them_with_75_in_every_phase(when, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    process = start(tmp_path, *job(tiny, "max_steps=2000", "checkpoint.every_steps=500", *MORE.get(when, [])))
    logs = tmp_path / "run" / "logs"
    wait_for(process, {
        "starting": lambda: True,
        "loading": (logs / "rank-1.log").is_file,
        "rehearsing": lambda: phase(tmp_path, 1, "doctor:"),
        "compiling": lambda: any((tmp_path / "compiled").rglob("*.cpp")),  # the rehearsal's first forward pass
        "evaluating": lambda: len(metrics(tmp_path / "run")) >= 1,
        "in the stage evaluate": lambda: "evaluate: started" in said(tmp_path) and (logs / "rank-1.stack").is_file(),
    }[when])
    wait_for(process, lambda: len(workers_of(process.pid)) == 2)
    os.kill(workers_of(process.pid)[-1], signal.SIGTERM)
    assert ends(process, tmp_path) == 75, said(tmp_path)
    assert "stopped on request; start the same command again to resume" in said(tmp_path)
    # Where compiling takes longer than launch.grace_s, torch warns with one of its own when its compilers are ended.
    assert "Traceback" not in said(tmp_path) or when == "compiling"
    done = len(metrics(tmp_path / "run"))
    if when == "evaluating":
        assert (tmp_path / "run" / "checkpoints" / f"step-{done}" / "checksums.json").is_file()
    elif when != "in the stage evaluate":
        assert done == 0


def test_a_disk_that_is_full_for_one_rank_ends_the_run_at_its_next_step_and_the_same_command_goes_on(tiny, tmp_path):
    words = job(tiny, "max_steps=2000", "checkpoint.every_steps=20", "method=full")
    process = start(tmp_path, *words)
    first = tmp_path / "run" / "checkpoints" / "step-20" / "checksums.json"
    wait_for(process, first.is_file)
    # From now on this rank cannot write a file of more than 100 kB: its part of a checkpoint fails.
    resource.prlimit(workers_of(process.pid)[-1], resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert ends(process, tmp_path) == 4, said(tmp_path)
    assert "could not be written" in said(tmp_path) and "Earlier checkpoints are whole" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    steps = len(metrics(tmp_path / "run"))
    assert steps % 20 < 15, "trained on for long after the checkpoint had failed"
    whole = max(int(p.name[5:]) for p in first.parent.parent.glob("step-*"))
    assert whole >= 20
    again = start(tmp_path, *words)
    wait_for(again, lambda: f"resuming after step {whole} of" in said(tmp_path))
    again.send_signal(signal.SIGTERM)
    assert ends(again, tmp_path) == 75, said(tmp_path)


@pytest.mark.parametrize("apart_s", [0.5, 3.0])
def test_ctrl_c_twice_ends_it_with_75(apart_s, tiny, tmp_path):
    process = start(tmp_path, *job(tiny, "max_steps=2000", "checkpoint.every_steps=500"))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    time.sleep(apart_s)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert ends(process, tmp_path) == 75, said(tmp_path)
    assert "Traceback" not in said(tmp_path)


def test_ctrl_c_again_and_again_while_it_ends_changes_nothing(tiny, tmp_path):
    process = start(tmp_path, *job(tiny, "max_steps=2000", "checkpoint.every_steps=500"))
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    while process.poll() is None:
        time.sleep(0.02)
        if "checkpoint saved" in said(tmp_path):
            process.send_signal(signal.SIGINT)
    assert process.returncode == 75, said(tmp_path)


def test_ctrl_c_in_the_moment_after_the_run_changes_nothing(tiny, tmp_path):
    """The one that is sent lands between the run's handlers and the end of the process, every time."""
    script = """
import os, signal, sys
from loadmaster import starting
starting.listen()
from loadmaster.training.stop import StopSignal
uninstall = StopSignal.uninstall
def and_once_more(stop):
    uninstall(stop)
    os.kill(os.getpid(), signal.SIGINT)
StopSignal.uninstall = and_once_more
import train
from loadmaster.ending import ended
sys.exit(ended(train.run_app(train.train)))
"""
    words = [sys.executable, "-c", script, *job(tiny, "max_steps=2000", "checkpoint.every_steps=500")]
    here = environment() | {"PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log, env=here)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    assert ends(process, tmp_path) == 75, said(tmp_path)
    assert said(tmp_path).count("stopped on request") == 1


def stand_still(processes: list[int], until: float) -> None:
    """As in a long step, but without the processors' time; not at all where it is late already."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(max(0.0, until - time.time()))
    for pid in processes:
        os.kill(pid, signal.SIGCONT)


def test_max_hours_saves_and_ends_before_they_are_over(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LOADMASTER_OVER", str(tmp_path / "over"))
    process = start(tmp_path, *job(tiny, "max_steps=100000", "checkpoint.every_steps=50000", "launch.max_hours=0.02"))
    wait_for_step(process, tmp_path, 3)
    stand_still(workers_of(process.pid), (tmp_path / "run" / "config.yaml").stat().st_mtime + 0.012 * 3600)
    assert process.wait(timeout=300) == 75, said(tmp_path)
    done = len(metrics(tmp_path / "run"))
    saved = tmp_path / "run" / "checkpoints" / f"step-{done}" / "checksums.json"
    began = (tmp_path / "run" / "config.yaml").stat().st_mtime
    assert done and saved.stat().st_mtime - began < 0.02 * 3600
    assert "launch.max_hours or launch.max_usd is used up: stopped" in said(tmp_path)
    assert "checkpoint saved" in said(tmp_path) and "nothing was saved" not in said(tmp_path)
    assert (tmp_path / "over").exists()  # or a batch script would start it again, for another such time


def test_kill_9_in_the_middle_of_a_checkpoint_loses_none_and_goes_on_bit_for_bit(tiny, tmp_path):
    words = job(tiny, "method=full", "max_steps=8", "checkpoint.every_steps=1", "checkpoint.keep_last=2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert finish(whole, *words).returncode == 0
    checkpoints = cut / "run" / "checkpoints"
    for least in (1, 3, 5):
        process = start(cut, *words)
        wait_for_step(process, cut, least)
        wait_for(process, lambda: any(checkpoints.glob(".step-*")))  # being written, under a name that does not count
        process.kill()
        process.wait()
        wait_for_none_of(cut)
    last = finish(cut, *words)
    assert last.returncode == 0, last.stderr
    assert "resuming after step" in last.stdout and "torn" not in last.stdout
    assert [row | {"step_s_by_rank": 0} for row in metrics(cut / "run")] == [
        row | {"step_s_by_rank": 0} for row in metrics(whole / "run")
    ]
    assert not any(checkpoints.glob(".*"))


def wait_for_none_of(folder: Path) -> None:
    """Until the workers of a lead that was killed are gone too."""
    deadline = time.monotonic() + 120
    while subprocess.run(["pgrep", "-f", f"loadmaster.worker .*{folder}"], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    with file_system(tmp_path / "disk", "900m") as folder:
        yield folder


def test_a_file_system_that_others_fill_up_ends_the_run_and_with_room_the_same_command_goes_on(tiny, disk):
    words = job(tiny, "method=full", "max_steps=400", "checkpoint.every_steps=10")
    process = start(disk, *words)
    wait_for(process, (disk / "run" / "checkpoints" / "step-10" / "checksums.json").is_file)
    fill = disk / "of somebody else"
    with open(fill, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - 5_000_000)
    assert ends(process, disk) == 4, said(disk)
    assert "could not be written" in said(disk) and "Traceback" not in said(disk)
    fill.unlink()
    again = start(disk, *words)
    wait_for(again, lambda: "resuming after step" in said(disk))
    again.send_signal(signal.SIGTERM)
    assert ends(again, disk) == 75, said(disk)
