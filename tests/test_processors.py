"""A container's quota of processor time, which neither the number of processors nor an affinity shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadmaster import processors
from tests.runs import environment


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Sixteen processors and no quota; what is written to this folder is the container's."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(processors, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(processors, "QUOTA_V1", (tmp_path / "cfs_quota_us", tmp_path / "cfs_period_us"))
    monkeypatch.setattr(processors, "settled", {})
    for name in (processors.THREADS, processors.COMPILERS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "765000 100000\n"}, 7),  # eight would use up the quota before the period is over
        ({"cpu.max": "3200000 100000\n"}, 16),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "400000"}, 16),
        ({"cfs_quota_us": "-1\n", "cfs_period_us": "100000\n"}, 16),
        ({"cfs_quota_us": "765000\n", "cfs_period_us": "100000\n"}, 7),
        ({"cfs_quota_us": "765000\n", "cfs_period_us": "0\n"}, 16),
    ],
)
def test_whole_processors_of_the_quota_are_usable(machine, files, count):
    for name, text in files.items():
        (machine / name).write_text(text)
    assert processors.usable() == count


def test_libraries_are_told_of_a_quota_that_binds_and_of_nothing_else(machine, monkeypatch):
    processors.settle()
    assert processors.THREADS not in os.environ and processors.is_ours(processors.THREADS)
    (machine / "cpu.max").write_text("765000 100000")
    monkeypatch.setenv(processors.COMPILERS, "3")
    processors.settle()
    assert (os.environ[processors.THREADS], os.environ[processors.COMPILERS]) == ("7", "3")
    assert processors.is_ours(processors.THREADS) and not processors.is_ours(processors.COMPILERS)


@pytest.mark.parametrize(
    ("asked", "count"), [(None, 16), ("", 16), ("3", 3), ("4,2", 4), (" 5 ", 5), ("0", 16), ("x", 16), ("²", 16)]
)
def test_a_users_number_of_threads_is_read_as_openmp_reads_it(monkeypatch, asked, count):
    if asked is not None:
        monkeypatch.setenv(processors.THREADS, asked)
    assert processors.threads() == count


def test_workers_share_what_the_quota_leaves_though_their_parent_was_told_of_all_of_it(machine):
    from loadmaster.training.agent import Workers, _defaults

    (machine / "cpu.max").write_text("765000 100000")
    processors.settle()
    told = _defaults(Workers(3, []))
    assert (told[processors.THREADS], told[processors.COMPILERS]) == ("2", "2")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core only: no quota of one and a half binds")
def test_pytorch_starts_no_more_threads_than_the_quota_has_processors(tmp_path):
    quota = tmp_path / "of one"
    quota.write_text("150000 100000")
    script = (
        f"import pathlib; from loadmaster import processors; processors.QUOTA = pathlib.Path({str(quota)!r})\n"
        "processors.settle()\n"
        "import torch, torch._inductor.config as compiler; print(torch.get_num_threads(), compiler.compile_threads)"
    )
    env = {name: value for name, value in environment().items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "2"], done.stderr
