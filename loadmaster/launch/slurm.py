"""`launch=slurm`: from a login node, submit a batch script, follow it, and cancel it when asked to.

The folder of the launch, the run directory and (unless launch.python names another) the environment of this very
program must be on a file system that the nodes share, as is usual where one submits from. The script starts one task a
node, launch/torchrun.py makes a process for each GPU. Slurm's SIGTERM
before the time limit lets every process save a checkpoint; the job ends with 75 then, goes back to the queue and
goes on from there. So it does after a failed node or a preemption. It is followed through all of that.

On Ctrl-C the tasks get SIGTERM first, and the job is cancelled once they have ended, or the time for a checkpoint
is over. A launcher that is killed leaves the job running: it costs what the cluster's owner says, and squeue has it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from loadmaster.config.overrides import assigned
from loadmaster.config.schema import HardwareConfig
from loadmaster.config.shipped import local_path, shipped_folder
from loadmaster.errors import LoadmasterError
from loadmaster.files import write_json, write_text
from loadmaster.launch.choose import nodes_of
from loadmaster.launch.context import Launch, undisturbed
from loadmaster.launch.order import TORCHRUN, stop_before_s
from loadmaster.launch.payload import identity, job_there
from loadmaster.launch.ssh import secret_values
from loadmaster.preflight import make_plan, print_plan
from loadmaster.rundir import LAUNCH_RECORD

POLL_S = 5.0
CALL_S = 60.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED")
"""Slurm's states of a job that will not run again. PREEMPTED and NODE_FAIL go back to the queue (--requeue)."""
GONE = ("PREEMPTED", "NODE_FAIL")
SPOKEN = re.compile(r"^sbatch: (error|fatal): ")
NO_CONTROLLER = re.compile(
    r"no answer|unable to contact slurm controller|configuration source|failed to fetch config|DNS SRV|slurm\.conf",
    re.IGNORECASE,
)
PATIENCE = 12
"""Answers in a row without the job before it counts as gone."""

UNANSWERED = re.compile(
    r"unable to contact|timed out|zero bytes|connection refused|communication|no route|network is|unreachable",
    re.IGNORECASE,
)
"""What squeue says where the controller does not answer; of a job that it does not know, `Invalid job id specified`."""
UNSURE = ("timed out", "Zero Bytes", "connect")
"""What sbatch says where its answer was lost: there may be a job, which is cancelled and finds its files."""


@dataclass(frozen=True)
class Batch:
    """What is submitted."""

    folder: Path
    run_dir: Path
    script: str
    options: list[str]

    @property
    def command(self) -> list[str]:
        return ["sbatch", "--parsable", *self.options, str(self.folder / "job.sbatch")]

    @property
    def log(self) -> Path:
        return self.folder / "slurm.log"

    @property
    def ended(self) -> Path:
        """Written by the script at its end: the job's exit code."""
        return self.folder / "exit_code"

    @property
    def cancelled(self) -> Path:
        """Its presence tells the script not to go back to the queue."""
        return self.folder / "cancelled"

    def discard(self) -> None:
        """Leave nothing of a job that never was."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self.folder.parents[:2]:  # runs/RECIPE and runs
            with suppress(OSError):  # other runs are there
                folder.rmdir()


def run_by_slurm(launch: Launch, tokens: int | None) -> int:
    """Submit the job and follow it; returns its exit code. Raises LoadmasterError when Slurm does not run it."""
    job = launch.composed.job
    secrets = secret_values(launch)
    hardware = replace(job.hardware, nodes=nodes_of(job))
    if hardware.gpu != "local" and job.model.path is not None and not os.path.exists(local_path(job.model.path)):
        launch.echo(f"no plan here: {job.model.path} is not on this machine; the nodes make theirs\n")
    elif hardware.gpu != "local":  # what the nodes have is theirs to say
        print_plan(make_plan(replace(job, hardware=hardware), tokens), launch.console)
    batch = make_batch(launch, hardware)
    if job.launch.dry_run:
        launch.console.out(shlex.join(batch.command) + f"\n\n# {batch.folder / 'job.sbatch'}\n" + batch.script)
        return 0
    if missing := [name for name in ("sbatch", "squeue", "scancel") if shutil.which(name) is None]:
        raise LoadmasterError(f"launch=slurm runs on a login node of a Slurm cluster; there is no {missing[0]} here")
    batch.folder.mkdir(parents=True)
    write_text(batch.folder / "job.yaml", yaml.safe_dump(job_there(launch.composed, hardware), sort_keys=False))
    write_text(batch.folder / "job.sbatch", batch.script)
    return _Submitted(launch, batch, secrets).to_the_end()


def make_batch(launch: Launch, hardware: HardwareConfig) -> Batch:
    """Pure: the script and the options of sbatch."""
    job = launch.composed.job
    folder = launch.folder.absolute()
    run_dir = launch.folder.parent / f"slurm-{identity(replace(job, hardware=hardware))}"
    run_dir = (run_dir if job.run_dir == "auto" else local_path(job.run_dir)).absolute()
    gpus = [] if hardware.count == "auto" or hardware.gpu == "cpu" else [f"--gpus-per-node={hardware.count}"]
    hours = job.launch.max_hours
    options = [
        f"--job-name={launch.name}", f"--nodes={hardware.nodes}", "--ntasks-per-node=1", *gpus,
        f"--output={str(folder / 'slurm.log').replace('%', '%%')}", "--open-mode=append", "--requeue",
        f"--signal=TERM@{round(stop_before_s(job.launch))}",
        *([] if hours == "auto" else [f"--time={max(1, round(hours * 60))}"]), *job.launch.sbatch,
    ]
    processes = hardware.count if hardware.count != "auto" else 1 if hardware.gpu == "cpu" else None
    task = [
        sys.executable if job.launch.python == "auto" else str(local_path(job.launch.python)),
        str(shipped_folder("launch").absolute() / TORCHRUN),
        *([] if processes is None else [f"--nproc-per-node={processes}"]),
        "-m", "loadmaster.cli", job.stop_after, "--config-dir", str(folder), "--config-name", "job",
        assigned("run_dir", str(run_dir)),
    ]
    # Without --kill-on-bad-exit: it would kill the first node, which still writes its report, because another one was
    # the first to end with 75. What a failed node leaves behind, the job's own watchdog ends.
    label = ["--label"] if hardware.nodes > 1 else []
    script = f"""#!/bin/bash
# {launch.name}: written by loadmaster, submitted with the options in launch.json beside it.
set -uo pipefail
rm -f {shlex.quote(str(folder / "exit_code"))}
{shlex.join(["srun", *label, *task])}
code=$?
# 75: stopped on request with a checkpoint saved. Unless it was the launcher's request, it goes on later.
if [ "$code" -eq 75 ] && [ ! -e {shlex.quote(str(folder / "cancelled"))} ]; then
  scontrol requeue "$SLURM_JOB_ID" && exit 75
fi
echo "$code" > {shlex.quote(str(folder / "exit_code"))}
exit "$code"
"""
    return Batch(folder, run_dir, script, options)


def refusal(said: str) -> str:
    """What sbatch said, as a sentence; where it found no controller, with what would work."""
    reasons = [SPOKEN.sub("", line) for line in said.splitlines() if line.strip()]
    text = "; ".join(dict.fromkeys(reasons)) or "it gave no reason"
    if not NO_CONTROLLER.search(said):
        return text
    return (
        f"no controller of a cluster answers here ({text})\n"
        "fix: run this on a login node of the cluster, where `sinfo` lists its nodes"
    )


class _Submitted:
    """A batch job from its submission to its end."""

    def __init__(self, launch: Launch, batch: Batch, secrets: dict[str, str]):
        self.launch, self.batch, self.secrets = launch, batch, secrets
        self.id: str | None = None
        self.state = ""
        self.over = False
        self.silent = False
        """Whether nobody answered when the job was last asked for."""
        self.read_bytes = 0
        self.last_step: object = None

    def to_the_end(self) -> int:
        try:
            self._submit()
            return self._follow()
        finally:
            if not self.over:
                with undisturbed():
                    self._cancel()

    # ---------------------------------------------------------------- submit

    def _submit(self) -> None:
        """Once. Where sbatch's answer is lost, the job is looked for by its name, which is used once."""
        launch, settings = self.launch, self.launch.composed.job.launch
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **(settings.env or {}), **self.secrets}
        done = self._call(self.batch.command, env)
        id = done.stdout.strip().partition(";")[0] if done else ""
        if not id.isdigit():
            id = self._id_by_name() or ""
        if not id:
            said = done.stderr if done else "no answer"
            if done and done.returncode and not any(word in said for word in UNSURE):
                self.over = True
                self.batch.discard()
            raise LoadmasterError(f"sbatch did not take the job: {refusal(said)}")
        self.id = id
        write_json(self.batch.folder / LAUNCH_RECORD, {"name": launch.name, "id": id, "command": self.batch.command})
        launch.echo(f"submitted job {id}; its log is {self.batch.log}, its run directory {self.batch.run_dir}")
        if settings.max_hours != "auto":
            each = f"each of its runs has {settings.max_hours:g} h (launch.max_hours); stopped by that, it is requeued"
            launch.echo(f"  {each} and goes on until it is done")

    def _id_by_name(self) -> str | None:
        """Empty: there is no such job; None: nobody answers."""
        found = self._call(["squeue", "--noheader", "--me", f"--name={self.launch.name}", "--format=%i"])
        if found is None or found.returncode:
            return None
        return next(iter(found.stdout.split()), "")

    # ---------------------------------------------------------------- follow

    def _follow(self) -> int:
        missing = 0
        while True:
            state = self._state()
            self._show()
            if self.batch.ended.exists() and state not in ("RUNNING", "COMPLETING"):
                self.over = True
                self._show()
                code = int(self.batch.ended.read_text().strip() or 1)
                where = f"its run directory is {self.batch.run_dir}"
                self.launch.echo(f"job {self.id} ended with exit code {code}; {where}")
                return code
            missing = missing + 1 if state == "" and not self.silent else 0
            if state in OVER or missing >= PATIENCE:
                self._show()
                if self.batch.ended.exists():
                    continue
                self.over = True
                raise LoadmasterError(
                    f"Slurm ended job {self.id} ({state or 'it is in no list any more'}) before it could say its exit "
                    f"code; the log is {self.batch.log}. The same command goes on from the last checkpoint"
                )
            self.launch.sleep(POLL_S)

    def _state(self) -> str:
        """In Slurm's word; empty where neither the queue nor the accounts have it at the moment, or (self.silent) where
        nobody answers, which says nothing of the job."""
        done = self._call(["squeue", "--noheader", f"--jobs={self.id}", "--format=%T"])
        state = done.stdout.split()[0] if done and done.returncode == 0 and done.stdout.split() else ""
        silent = done is None or bool(done.returncode and UNANSWERED.search(done.stderr))
        if not state:
            done = self._call(["sacct", "-n", "-X", "-P", f"--jobs={self.id}", "--format=State"])
            lines = done.stdout.split("\n") if done and done.returncode == 0 else []
            state = next((line.split()[0].rstrip("+") for line in reversed(lines) if line.strip()), "")
        if silent and not state and not self.silent:
            self.launch.echo("  Slurm does not answer; the job is followed again once it does")
        self.silent = silent and not state
        if state and state != self.state:
            self.launch.echo(f"  job {self.id}: {state.lower()}")
            self.state = state
        return state

    def _show(self) -> None:
        """What the log and the metrics have gained."""
        try:
            with open(self.batch.log, "rb") as log:
                log.seek(self.read_bytes)
                text = log.read()
        except FileNotFoundError:
            text = b""
        whole = text[: text.rfind(b"\n") + 1]
        self.read_bytes += len(whole)
        for line in whole.decode("utf-8", "replace").splitlines():
            self.launch.echo(f"  | {line}")
        try:
            newest = json.loads((self.batch.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        except (OSError, ValueError, IndexError):
            return
        if newest.get("step") != self.last_step:
            self.last_step = newest.get("step")
            of = f" of {newest['steps']}" if newest.get("steps") else ""
            loss = "" if newest.get("loss") is None else f", loss {newest['loss']:.4f}"
            self.launch.echo(f"  step {self.last_step}{of}{loss}")

    # ---------------------------------------------------------------- cancel

    def _cancel(self) -> None:
        """SIGTERM to the tasks, the time for a checkpoint, then scancel; by name where the number is not known."""
        self.batch.cancelled.touch()
        found = self.id or self._id_by_name()
        if found is None:
            name = self.launch.name
            self.launch.echo(f"\nATTENTION: whether Slurm has a job {name} is not known: scancel --name={name} ends it")
        if not found:
            return
        self.id = found
        if self._state() == "RUNNING":
            self.launch.echo("asked the job to save a checkpoint and to end")
            self._call(["scancel", "--signal=TERM", self.id])
            end = time.monotonic() + stop_before_s(self.launch.composed.job.launch)
            while time.monotonic() < end and not self.batch.ended.exists() and self._state() == "RUNNING":
                self.launch.sleep(POLL_S)
                self._show()
        self._call(["scancel", self.id])
        left = self._state()
        if self.silent or (left and left not in (*OVER, "COMPLETING", *GONE)):
            said = "does not answer when asked for" if self.silent else f"still says {left.lower()} of"
            self.launch.echo(f"\nATTENTION: Slurm {said} job {self.id}; end it with scancel {self.id}")
        else:
            self.launch.echo(f"cancelled job {self.id}")

    def _call(self, command: list[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess | None:
        """None where no answer came; a session of its own, so that Ctrl-C here does not end it half way."""
        try:
            return subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=CALL_S, start_new_session=True, check=False
            )
        except (subprocess.TimeoutExpired, FileNotFoundError):
            return None
