"""What a laptop is for goes without what Linux alone has: in processes that see none of it (stand_in/macos)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from loadmaster import processors
from loadmaster.export.manifest import verify_manifest, write_manifest
from loadmaster.launch.wheel import _below
from loadmaster.rundir import RunDir, file_fingerprint
from tests.runs import ROOT, environment

MACOS = ROOT / "tests" / "stand_in" / "macos"


def on_macos(folder: Path, *words: str) -> str:
    path = os.pathsep.join([str(MACOS), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60,
        env={**environment(), "PYTHONPATH": path, "LOADMASTER_PRICES": os.devnull},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stand_in_has_nothing_of_linux(tmp_path):
    script = """
        import multiprocessing, os, pathlib, sys, urllib.request
        print(sys.platform, multiprocessing.get_start_method(), hasattr(os, "sched_getaffinity"))
        print(*(pathlib.Path(path).exists() for path in ("/proc/meminfo", "/sys", "/dev/shm", "/dev/null")))
    """
    assert on_macos(tmp_path, "-c", textwrap.dedent(script)).split() == [
        "darwin", "spawn", "False", "False", "False", "False", "True"
    ]


def test_a_job_is_planned_for_this_machine(tmp_path):
    assert "on the CPU: fits" in on_macos(tmp_path, "-m", "loadmaster", "plan", "recipe=smoke", "run_dir=run")
    told = json.loads((tmp_path / "run/plan.json").read_text())["hardware"]["host_memory_gib"]
    assert told == pytest.approx(psutil.virtual_memory().total / 2**30, rel=0.01)


@pytest.mark.parametrize(
    ("launch", "asked"), [("runpod", "LOADMASTER_WHEEL_0"), ("ssh launch.hosts=[me@there]", "stdin")]
)
def test_a_job_is_launched_elsewhere(tmp_path, launch, asked):
    words = f"recipe=qlora_8b hardware=l40s_x1 launch={launch} --dry-run"
    assert asked in on_macos(tmp_path, str(ROOT / "train.py"), *words.split())


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    """Its output, which it inherits, is open for as long as it runs."""
    child = """
        import os, time
        from loadmaster import ending
        ending.LOOK_S = 0.05
        ending.end_with(os.getppid())
        print("here", flush=True)
        time.sleep(600)
    """
    script = f"""
        import os, subprocess, sys
        child = subprocess.Popen(
            [sys.executable, "-c", {textwrap.dedent(child)!r}], stdout=subprocess.PIPE, stderr=sys.stdout
        )
        os.write(1, child.stdout.readline())
        os._exit(0)
    """
    assert on_macos(tmp_path, "-c", textwrap.dedent(script)) == "here\n"


def test_all_processors_are_usable_where_a_system_knows_no_affinity(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(processors, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(processors, "QUOTA_V1", (tmp_path / "none", tmp_path / "none"))
    assert processors.usable() == 12


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_largest_resident_set_is_told_in_the_systems_unit(monkeypatch, system, unit):
    import torch

    from loadmaster.training.metrics import peak_memory

    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage(range(16)))
    assert peak_memory(torch.device("cpu"))["peak_allocated_gib"] == 2 * unit / 2**30


def test_the_end_of_a_world_and_a_compilers_cache_need_no_proc(monkeypatch, tmp_path):
    from loadmaster.models import compiled
    from loadmaster.training import world

    monkeypatch.setattr(world, "Path", lambda path: tmp_path / "none")
    monkeypatch.setattr(world, "QUIET_S", 0.02)
    world.quiet()
    monkeypatch.setattr(compiled, "Path", lambda path: tmp_path / "none")
    assert len(compiled._instructions()) == 16


def test_what_the_finder_leaves_in_a_folder_changes_nothing(tmp_path):
    (tmp_path / "weights").write_text("1")
    write_manifest(tmp_path, {"format": "bf16"})
    before = file_fingerprint(tmp_path), _below(tmp_path, "it")
    (tmp_path / ".DS_Store").write_text("icons")
    assert verify_manifest(tmp_path) == []
    assert (file_fingerprint(tmp_path), _below(tmp_path, "it")) == before
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.DS_Store").write_text("icons")
    RunDir.choose(str(tmp_path / "run"), "smoke", "a job")  # is refused where other things are in it
