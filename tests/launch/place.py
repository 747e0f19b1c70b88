"""A fake account to launch from, with machines that are real processes; the fixture `place` is in conftest.py."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

from rich.console import Console

from loadmaster.config.compose import Composed, compose
from loadmaster.launch.job import launch_job
from loadmaster.launch.runpod import Api, Patience, RunpodClient
from loadmaster.launch.runpod.provider import Runpod
from tests.launch.fake_runpod import FakeRunpod
from tests.launch.pod_process import ProcessRunner

QUICK = Patience(timeout_s=2.0, attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
SECRET = "hf_THE0SECRET0VALUE"
STAND_IN = """
import json, os, pathlib, signal, sys, time
node = os.environ.get("NODE_RANK", "0")
def given(name, default):  # STAND_IN_S_1 is for node 1, STAND_IN_S for all
    return os.environ.get(f"STAND_IN_{name}_{node}", os.environ.get(f"STAND_IN_{name}", default))
if given("DEAF", ""):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
run = pathlib.Path(sys.argv[1]).expanduser(); run.mkdir(parents=True, exist_ok=True)
print("token is", os.environ.get("HF_TOKEN"), flush=True)
if "NUM_NODES" in os.environ:
    print("node", node, "of", os.environ["NUM_NODES"], "at", os.environ["MASTER_ADDR"], flush=True)
assert pathlib.Path("job.yaml").exists()
if node == "0":
    with open(run / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": 3, "loss": 1.5, "steps": 6, "tokens_per_second": 1200.0}), file=file)
time.sleep(float(given("S", "0.15")))
while given("UNTIL", "") and not pathlib.Path(given("UNTIL", "")).exists():
    time.sleep(0.05)
if node == "0":
    (run / "result.json").write_text(json.dumps({"steps": 3, "noise": os.urandom(3000).hex()}))
sys.exit(int(given("CODE", "0")))
"""
PACKAGE = 'launch.package="loadmaster==0.1.0"'


class Place:
    """A fake account, a folder to launch from, and a console that remembers."""

    def __init__(self, fake: FakeRunpod, folder: Path):
        self.fake, self.folder = fake, folder
        self.runner = ProcessRunner(folder, {"hf": SECRET})
        fake.runner = self.runner
        self.text = io.StringIO()
        self.console = Console(file=self.text, width=200)
        self.provider = Runpod(RunpodClient(Api(fake.key, fake.url, QUICK)))
        (folder / "workspace").mkdir()

    def composed(self, *words: str) -> Composed:
        return compose(["recipe=qlora_8b", "launch=runpod", "launch.yes=true", PACKAGE, *words])

    def launch(self, *words: str) -> int:
        return launch_job(self.composed(*words), self.console, self.provider, tokens=200_000)

    @property
    def said(self) -> str:
        return self.text.getvalue()


def everything_written(folder: Path) -> str:
    files = [path for path in (folder / "runs").rglob("*") if path.is_file()]
    return "\n".join(path.read_text(errors="replace") for path in files)


def when(true, act) -> None:
    """Beside the test: wait, then act."""

    def wait() -> None:
        wait_until(true)
        act()

    threading.Thread(target=wait, daemon=True).start()


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def wait_until(true, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(0.05)
