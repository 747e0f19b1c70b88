"""Slurm's commands for one user on one machine: jobs are real processes, nodes are names.

`install(folder)` makes folder/bin with sbatch, squeue, sacct, scancel, srun and scontrol, each of which is this file
under that name. They keep their jobs in the folder that FAKE_SLURM names. Only what loadmaster calls is there, and an
option that is not known is an error, as it is with Slurm.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scancel", "srun", "scontrol")
LIVE = ("PENDING", "RUNNING")


def install(folder: Path) -> Path:
    """Folder to put first on PATH."""
    tools = folder / "bin"
    tools.mkdir()
    for name in COMMANDS:
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        tool.chmod(0o755)
    return tools


def room() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def change(id: str, **values: object) -> dict:
    """Update a job's record under a lock; the record. One that was cancelled stays so."""
    path = room() / f"{id}.json"
    with open(room() / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = json.loads(path.read_text())
        record |= {**values, "state": "CANCELLED"} if record["state"] == "CANCELLED" else values
        if values:
            keep(record)
    return record


def keep(record: dict) -> None:
    """Whole at any time, for those who read without the lock."""
    (room() / f"{record['id']}.new").write_text(json.dumps(record))
    os.replace(room() / f"{record['id']}.new", room() / f"{record['id']}.json")


def wait_until_seen(id: str, state: str) -> None:
    """A busy machine looks seldom, and a test's job is short; one that nobody follows goes on after a while."""
    end = time.monotonic() + 10
    while (record := change(id))["state"] == state != record["seen"] and time.monotonic() < end:
        time.sleep(0.05)


def note(words: list[str]) -> None:
    with open(room() / "asked", "a") as file:
        file.write(" ".join(words) + "\n")


def sbatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sbatch")
    for name in ("job-name", "nodes", "ntasks-per-node", "output", "open-mode", "signal", "time", "partition"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--gpus-per-node")
    parser.add_argument("--parsable", action="store_true")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("script")
    given = parser.parse_args(words)
    if given.partition == "none":
        print("sbatch: error: invalid partition specified: none", file=sys.stderr)
        return 1
    id = str(1000 + len(list(room().glob("*.json"))))
    record = {"id": id, "state": "PENDING", "seen": "", "again": False, "steps": [], **vars(given)}
    keep(record)
    subprocess.Popen(
        [sys.executable, __file__, "run", id], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    if os.environ.get("FAKE_SLURM_LOSE"):
        print("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", file=sys.stderr)
        return 1
    print(id)
    return 0


def run(words: list[str]) -> int:
    """The node daemon: the script, again as long as it goes back to the queue."""
    id = words[0]
    while True:
        wait_until_seen(id, "PENDING")
        while os.environ.get("FAKE_SLURM_FULL") and change(id)["state"] == "PENDING":  # no node is free
            time.sleep(0.05)
        record = change(id)
        if record["state"] == "CANCELLED":
            return 0
        nodes = int(record["nodes"])
        names = ",".join(["localhost", *(f"node{number}" for number in range(1, nodes))])
        env = os.environ | {"SLURM_JOB_ID": id, "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": names}
        with open(record["output"], "a") as log:
            batch = subprocess.Popen(
                ["bash", record["script"]], env=env, stdout=log, stderr=log, start_new_session=True
            )
            if change(id, state="RUNNING", batch=batch.pid)["state"] == "CANCELLED":
                os.killpg(batch.pid, signal.SIGKILL)
            code = batch.wait()
        wait_until_seen(id, "RUNNING")
        record = change(id)
        if record["state"] in ("CANCELLED", "TIMEOUT"):
            return 0
        if not record["again"]:
            change(id, state="COMPLETED" if code == 0 else "FAILED")
            return 0
        change(id, state="PENDING", again=False, steps=[])


def srun(words: list[str]) -> int:
    """One task a node; the worst exit code."""
    label = False
    while words[0].startswith("--"):
        option = words.pop(0)
        label = option == "--label"
        if not label:
            print(f"srun: error: unrecognized option {option}", file=sys.stderr)
            return 1
    id, nodes = os.environ["SLURM_JOB_ID"], int(os.environ["SLURM_NNODES"])
    tasks: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    for node in range(nodes):
        env = os.environ | {"SLURM_NODEID": str(node), "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"]}
        tasks.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        readers.append(threading.Thread(target=copy, args=(tasks[-1].stdout, f"{node}: " if label else "")))
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    change(id, steps=[task.pid for task in tasks])
    for reader in readers:  # from here on the log says that there are tasks to signal
        reader.start()
    for reader in readers:
        reader.join()
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def copy(lines, prefix: str) -> None:
    for line in lines:
        print(f"{prefix}{line}", end="", flush=True)


def squeue(words: list[str]) -> int:
    if os.environ.get("FAKE_SLURM_SHY") and int((room() / "asked").read_text().count("squeue")) % 2:
        print("slurm_load_jobs error: Unable to contact slurm controller", file=sys.stderr)
        return 1
    given = dict(word.lstrip("-").partition("=")[::2] for word in words)
    jobs = [json.loads(path.read_text()) for path in sorted(room().glob("*.json"))]
    jobs = [job for job in jobs if job["state"] in LIVE]
    jobs = [job for job in jobs if given.get("jobs", job["id"]) == job["id"]]
    jobs = [job for job in jobs if given.get("name", job["job_name"]) == job["job_name"]]
    for job in jobs:
        print({"%T": job["state"], "%i": job["id"]}[given["format"]])
        if given["format"] == "%T":
            change(job["id"], seen=job["state"])
    return 0


def sacct(words: list[str]) -> int:
    given = dict(word.lstrip("-").partition("=")[::2] for word in words)
    state = change(given["jobs"])["state"]
    print("CANCELLED by 1000" if state == "CANCELLED" else state)
    return 0


def scancel(words: list[str]) -> int:
    id = words[-1]
    record = change(id)
    if words[0] == "--signal=TERM":
        for pid in record["steps"]:
            os.kill(pid, signal.SIGTERM)
        return 0
    if record["state"] in LIVE:
        change(id, state="CANCELLED")
        for pid in [*record["steps"], *([record["batch"]] if "batch" in record else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return 0


def scontrol(words: list[str]) -> int:
    assert words[0] == "requeue", words
    change(words[1], again=True)
    return 0


if __name__ == "__main__":
    name = sys.argv[1]
    if name != "run":
        note(sys.argv[1:])
    sys.exit({f.__name__: f for f in (sbatch, run, srun, squeue, sacct, scancel, scontrol)}[name](sys.argv[2:]))
