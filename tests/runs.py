"""Real runs in real processes, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300
PLAIN = ["setpriv", "--bounding-set=-all"] if os.getuid() == 0 else []
"""Before a command: root too is held to permissions."""


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *overrides]


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    """Start train.py in `folder`; its output goes to folder/log.txt."""
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command(*overrides), cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environment()
        )


def finish(folder: Path, *overrides: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess:
    """Run train.py in `folder` to its end; stdout and stderr as text."""
    return subprocess.run(
        command(*overrides),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """Logged steps without what depends on the clock."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "save_stall_s")} for row in rows]


@contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """`folder` as a file system of its own, of `size`; the test is left out where none can be mounted."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
