"""Two hosts train together over gloo, for real; one is stopped, lost or cut off, and the job ends, says why, goes on.

The hosts are network namespaces joined by a veth pair where the privileges allow it, else two loopback addresses; the
test says which. A job of a tiny model: what is tested is how it ends, not what it learns.
"""

import itertools
import os
import re
import signal
from pathlib import Path

import pytest

from loadmaster.files import read_json
from tests.runs import finish, metrics
from tests.training.hosts import torchrun, two_hosts, wait_until

pytestmark = pytest.mark.slow

STEPS = 300
HANG_S = 20
START_S, END_S = 150, 90
"""Longest waits for a first step and for an end: what is tested is that there is an end."""


def job(model, **fields):
    words = {
        "model": "smollm2_135m", "model.path": model, "method": "lora", "sequence_length": 128, "batch.global_size": 4,
        "max_steps": STEPS, "checkpoint.every_steps": 5, "evaluation.every_steps": "null", "data.validation": "null",
        "evaluation.task": "none", "tracker": "none", "stop_after": "train", "hardware": "cpu", "hardware.count": 1,
        "hardware.nodes": 2, "run_dir": "run", "launch.hang_timeout_s": HANG_S,
    }
    return [f"{name}={value}" for name, value in (words | fields).items()]


@pytest.fixture
def hosts(capsys, record_property):
    with two_hosts() as made:
        record_property("hosts", made[0].kind)
        with capsys.disabled():
            print(f"\n  two hosts: {made[0].kind}")
        yield made


class Cluster:
    """One launch of the job on both hosts."""

    def __init__(self, hosts, folder: Path, name: str, words: list[str]):
        self.run = folder / "run"
        self.before = len(metrics(self.run))
        self.logs = tuple(folder / f"{name}-{host.name}.log" for host in hosts)
        self.processes = [
            host.start(torchrun(host, rank, hosts[0], *words), folder, log)
            for rank, (host, log) in enumerate(zip(hosts, self.logs, strict=True))
        ]

    def trains(self, steps: int = 4):
        """Until so many steps are done that were not before."""
        wait_until(lambda: len(metrics(self.run)) >= self.before + steps, START_S, *self.processes, logs=self.logs)

    def ends(self, *ranks: int) -> list[int]:
        """Exit codes of the hosts with these ranks, within bounded time."""
        for rank in ranks:
            try:
                self.processes[rank].wait(timeout=END_S)
            except Exception:
                raise AssertionError("\n".join([f"node {rank} did not end", *map(self.said, ranks)])) from None
        return [self.processes[rank].returncode for rank in ranks]

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()


def newest(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_stopped_on_one_host_gone_on_with_then_one_is_lost_and_the_other_finishes_alone(tmp_path, few_words, hosts):
    words = job(few_words)
    first = Cluster(hosts, tmp_path, "first", words)
    first.trains()
    worker = max(pid for pid in hosts[1].pids() if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGTERM)  # a process of the host that does not lead
    assert first.ends(0, 1) == [75, 75], first.said(0) + first.said(1)
    stopped = newest(tmp_path / "run")
    assert "checkpoint saved" in first.said(0)
    assert len(metrics(tmp_path / "run")) == stopped < STEPS

    second = Cluster(hosts, tmp_path, "second", words)
    second.trains(steps=12)
    hosts[1].lose()
    assert second.ends(0) == [4], second.said(0)
    assert f"resuming after step {stopped} of {STEPS}" in second.said(0)
    assert re.search(r"error: node 1 \(host lm-beta, rank 1\) has given no sign of life for \d+ s", second.said(0))
    lost_after = newest(tmp_path / "run")
    assert lost_after > stopped

    third = finish(tmp_path, *job(few_words, **{"hardware.nodes": 1}))  # one command, on half of the hardware
    assert third.returncode == 0, third.stdout + third.stderr
    assert f"resuming after step {lost_after} of {STEPS}" in third.stdout
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(before["tokens"] < after["tokens"] for before, after in itertools.pairwise(rows))
    assert read_json(tmp_path / "run" / "result.json")["steps"] == STEPS
    assert "Traceback" not in first.said(0) + first.said(1) + second.said(0) + third.stderr


def test_the_lead_s_launcher_is_killed_its_processes_end_with_it_and_the_other_host_says_so(tmp_path, few_words, hosts):
    cluster = Cluster(hosts, tmp_path, "only", job(few_words))
    cluster.trains()
    cluster.processes[0].kill()
    cluster.processes[0].wait()
    wait_until(lambda: hosts[0].pids() == [], 20)  # nobody is left to hold a GPU
    assert cluster.ends(1) == [4], cluster.said(1)
    assert "node 0 (host lm-alpha, rank 0) has given no sign of life" in cluster.said(1)
    assert "Traceback" not in cluster.said(1)


def test_a_network_that_is_gone_without_a_word_ends_both_hosts(tmp_path, few_words, hosts):
    """No connection is closed: nothing tells a host that the other one is away, but that it hears nothing."""
    cluster = Cluster(hosts, tmp_path, "only", job(few_words))
    cluster.trains()
    hosts[1].unplug()
    both = hosts[0].kind == "network namespaces"  # else the other one's processes are stopped, and say nothing
    assert cluster.ends(*((0, 1) if both else (0,))) == [4] * (1 + both), cluster.said(0) + cluster.said(1)
    assert "node 1 (host lm-beta, rank 1) has given no sign of life" in cluster.said(0)
    if both:
        assert "node 0 (host lm-alpha, rank 0) has given no sign of life" in cluster.said(1)
    assert "Traceback" not in cluster.said(0) + cluster.said(1)
