"""launch/torchrun.py: flags and environment of a node -> the processes that it starts, and what becomes of them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from loadmaster.config.compose import compose
from loadmaster.errors import LoadmasterError
from loadmaster.training.agent import Meeting
from tests.runs import environment
from tests.training.processes import free_port

PATH = Path(__file__).parents[2] / "launch" / "torchrun.py"
spec = importlib.util.spec_from_file_location("launch_torchrun", PATH)
torchrun = importlib.util.module_from_spec(spec)
sys.modules["launch_torchrun"] = torchrun  # dataclasses look their module up
spec.loader.exec_module(torchrun)

CLUSTER = {
    "PRIMARY_ADDR": "10.65.0.2",
    "MASTER_ADDR": "10.65.0.2",
    "PRIMARY_PORT": "29500",
    "MASTER_PORT": "29500",
    "NODE_ADDR": "10.65.0.3",
    "NODE_RANK": "1",
    "NUM_NODES": "2",
    "NUM_TRAINERS": "8",
    "WORLD_SIZE": "16",
    "HOST_NODE_ADDR": "10.65.0.2:29500",
}
SLURM = {
    "SLURM_NNODES": "4",
    "SLURM_NODEID": "3",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_ID": "123456",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
ENS1 = {"NCCL_SOCKET_IFNAME": "ens1", "GLOO_SOCKET_IFNAME": "ens1"}
PRIMARY = {"PRIMARY_ADDR": "a", "NUM_NODES": "2", "PRIMARY_PORT": "1234", "NUM_TRAINERS": "4"}
CASES = [
    ("alone", [], {}, "gpu", None, {}),
    ("alone, two processes", ["--nproc-per-node=2"], {}, "2", None, {}),
    ("alone, with a left-over NODE_RANK", [], {"NODE_RANK": "3"}, "gpu", None, {}),
    ("Instant Cluster", [], CLUSTER, "8", Meeting(2, 1, "10.65.0.2", 29500), ENS1),
    ("Instant Cluster, primary names only, interface set", [], PRIMARY | {"NCCL_SOCKET_IFNAME": "ib0"},
        "4", Meeting(2, 0, "a", 1234), {}),
    ("Instant Cluster, processes from WORLD_SIZE", [], {**CLUSTER, "NUM_TRAINERS": "4", "WORLD_SIZE": "8"},
        "4", Meeting(2, 1, "10.65.0.2", 29500), ENS1),
    ("Instant Cluster, no NUM_TRAINERS", [], {k: v for k, v in CLUSTER.items() if k != "NUM_TRAINERS"},
        "8", Meeting(2, 1, "10.65.0.2", 29500), ENS1),
    ("SkyPilot", [], SKYPILOT, "8", Meeting(2, 1, "10.0.0.4", 29500), {}),
    ("SkyPilot, one node", [], {**SKYPILOT, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, "8", None, {}),
    ("Slurm", [], SLURM, "8", Meeting(4, 3, "gpu07", 23456), {}),
    ("Slurm, one node", [], {**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"}, "8", None, {}),
    ("Slurm, GPUs as a list", [], {**SLURM, "SLURM_GPUS_ON_NODE": "0,1,2,3", "SLURM_JOB_ID": ""},
        "4", Meeting(4, 3, "gpu07", 29500), {}),
    ("flags", ["--nnodes", "2", "--node_rank=1", "--master_addr", "host", "--nproc_per_node=8"], {},
        "8", Meeting(2, 1, "host", 29500), {}),
    ("flags, endpoint in one", ["--nnodes=2", "--node-rank=1", "--rdzv-endpoint=host:400", "--rdzv-backend=static"],
        {}, "gpu", Meeting(2, 1, "host", 400), {}),
    ("flags, endpoint without a port", ["--nnodes=2", "--rdzv_endpoint", "host"],
        {}, "gpu", Meeting(2, 0, "host", 29500), {}),
    ("flags win over the environment", ["--node-rank=0", "--master-port=4000"], CLUSTER,
        "8", Meeting(2, 0, "10.65.0.2", 4000), ENS1),
]


@pytest.mark.parametrize(
    ("flags", "env", "processes", "meeting", "extra"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_a_node_starts(flags, env, processes, meeting, extra):
    script = ["train.py", "recipe=smoke"]
    assert torchrun.plan([*flags, *script], env) == torchrun.Start(processes, script, meeting, extra)


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        ([], {}, "no script"),
        (["--nnodes=2", "train.py"], {}, "no address of the first one"),
        (["--nnodes=2", "--node-rank=2", "--master-addr=a", "train.py"], {}, "ranks go from 0 to 1"),
        (["--nnodes=two", "train.py"], {}, "nnodes is 'two'"),
        (["--rdzv-backend=c10d", "train.py"], {}, "static rendezvous only"),
        (["--max-restarts=3", "train.py"], {}, "--max-restarts is none of"),
        (["train.py"], {**CLUSTER, "NUM_TRAINERS": "4"}, "NUM_NODES=2 x NUM_TRAINERS=4 is not WORLD_SIZE=16"),
        (["--nnodes"], {}, "needs a value"),
        (["train.py"], {**CLUSTER, "NUM_TRAINERS": ""}, "nproc-per-node is ''"),
    ],
)
def test_what_cannot_work_is_said(arguments, env, said):
    with pytest.raises(LoadmasterError, match=re.escape(said)):
        torchrun.plan(arguments, env)


def test_help_is_the_description_of_its_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torchrun.py", "--help"])
    assert torchrun.main() == 0
    assert "--rdzv-endpoint=HOST:PORT" in capsys.readouterr().out


def test_words_after_the_script_are_the_scripts():
    words = ["-m", "loadmaster.cli", "train", "--nnodes=7"]
    assert torchrun.plan(words, {}).script == words


WORKER = """
import os, pathlib, signal, sys, time
how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
rank, asked = os.environ["RANK"], []
signal.signal(signal.SIGTERM, lambda *_: asked.append(time.time()))
signal.signal(signal.SIGHUP, lambda *_: asked.append(time.time()))
(folder / f"started-{rank}").touch()
if how == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
while how == "wait" and not asked:
    time.sleep(0.02)
time.sleep(0.3)  # for a second signal, which would be one too many
(folder / f"asked-{rank}").write_text(str(len(asked)))
while how == "wait" and len(list(folder.glob("asked-*"))) < 2:  # the agent ends whoever is left behind
    time.sleep(0.02)
sys.exit(int(how) if how.isdigit() else 75)
"""


def start(folder, how, *flags):
    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(PATH), "--nproc-per-node=2", *flags, str(script), how, str(folder)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), **streams)


def test_the_exit_code_is_the_workers_own(tmp_path):
    """torchrun's is 1 whatever they ended with, and a scheduler could not tell 75 from a failure."""
    process = start(tmp_path, "75")
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (75, "")


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_a_request_goes_to_every_worker_once_and_is_waited_for(numbers, tmp_path):
    """A shell sends SIGHUP to what it started, and the kernel once more when the shell itself is gone."""
    process = start(tmp_path, "wait")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("started-*"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output) == (75, "")
    assert {file.name: file.read_text() for file in tmp_path.glob("asked-*")} == {"asked-0": "1", "asked-1": "1"}


ENTRY = """
import runpy, signal, sys
del sys.argv[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end.code, signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
"""


def test_a_request_that_comes_once_more_while_python_ends_changes_no_75(tmp_path):
    """Slurm sends several; ended by one of them it would count as failed, and not be queued again."""
    (tmp_path / "job.py").write_text("raise SystemExit(75)")
    command = [sys.executable, "-c", ENTRY, str(PATH), "--nproc-per-node=1", str(tmp_path / "job.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.stdout == "75 True\n", done.stderr


def test_a_sigterm_that_comes_right_before_the_workers_is_kept_for_them():
    from loadmaster.training import agent

    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)  # was there before, and is no worker
    asked = []
    with agent._signals_kept(meeting=False):
        agent._pass_on_from_now(set(agent._leaders_under(os.getpid())), lambda: asked.append(True))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        worker = subprocess.Popen(["sleep", "300"], start_new_session=True)
        assert worker.wait(timeout=60) == -signal.SIGTERM
    assert asked  # for who started them: they may have been done
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_that_is_stopped_or_does_not_end_with_the_others_is_ended(stopped, monkeypatch):
    """Alone on its host nobody else would end it; stuck in the driver as it leaves Python it has no watchdog."""
    from loadmaster.training import agent

    monkeypatch.setattr(agent, "STOPPED_S" if stopped else "LAST_S", 0.2)
    monkeypatch.setattr(agent, "LOOK_S", 0.1)
    before, over, lost = set(agent._leaders_under(os.getpid())), threading.Event(), {}
    first, last = (subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(2))
    thread = threading.Thread(target=agent._end_the_lost, args=(2, before, over, lost))
    thread.start()
    time.sleep(1)
    assert last.poll() is None and not lost  # both are there
    if stopped:
        last.send_signal(signal.SIGSTOP)
    else:
        first.kill()
        first.wait()
    assert last.wait(timeout=60) == -signal.SIGKILL and lost.keys() == {last.pid}
    assert ("was stopped" if stopped else "had not ended") in lost[last.pid]
    over.set()
    thread.join()
    first.kill()
    first.wait()


@pytest.mark.slow
def test_a_killed_worker_is_a_sentence_and_not_a_traceback(tmp_path):
    process = start(tmp_path, "kill")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4
    assert output.startswith("error: rank 1 on this host was ended by SIGKILL") and len(output.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGHUP)])
def test_a_request_while_other_hosts_are_waited_for_is_a_stop_and_not_a_failure(rank, number, tmp_path):
    """A batch script puts what ends with 75 back into the queue; 143 it would give up."""
    flags = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
    process = start(tmp_path, "wait", *flags)
    deadline = time.monotonic() + 60
    for awaited in (number, signal.SIGINT):  # that one is left alone while modules load
        while not caught(process.pid, awaited):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.1)
    time.sleep(1.0)  # into the wait itself
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "not all hosts had come" in output and len(output.splitlines()) == 1


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    mask = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_hosts_that_do_not_come_are_a_sentence(tmp_path, monkeypatch, capfd):
    """Node 1 of 2, and nobody is node 0."""
    from loadmaster.training import agent

    meeting = Meeting(2, 1, "127.0.0.1", 9)
    with pytest.raises(LoadmasterError, match=r"node 0 did not answer at 127\.0\.0\.1:9 within 2 s"):
        agent.run_workers(agent.Workers(1, ["-c", "pass"], meeting, rendezvous_s=2))


@pytest.mark.slow
def test_a_port_that_is_taken_is_a_sentence(tmp_path):
    from loadmaster.training import agent

    with socket.socket() as taken, pytest.raises(LoadmasterError, match=r"port \d+ of this host is in use"):
        taken.bind(("", 0))
        taken.listen()
        meeting = Meeting(2, 0, "127.0.0.1", taken.getsockname()[1])
        agent.run_workers(agent.Workers(1, ["-c", "pass"], meeting, rendezvous_s=10))


@pytest.mark.slow
def test_a_process_that_is_asked_to_stop_before_it_can_listen_was_stopped_not_broken(tmp_path):
    from loadmaster.errors import StoppedOnRequest
    from loadmaster.training import agent

    words = "import os, signal; os.kill(os.getpid(), signal.SIGTERM) if os.environ['RANK'] == '1' else None"
    with pytest.raises(StoppedOnRequest, match="still starting"):
        agent.run_workers(agent.Workers(2, ["-c", words]))


@pytest.mark.parametrize("limit", [False, True])
def test_the_slurm_script_starts_one_task_a_node_and_goes_back_to_the_queue_when_stopped(limit, tmp_path):
    """With srun and scontrol that write down what they were asked; no Slurm here. A limit of the job's is its end."""
    for name, ending in (("srun", 'touch "$LOADMASTER_OVER"; exit 75' if limit else "exit 75"), ("scontrol", "")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n{ending}\n')
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", str(PATH.with_name("slurm.sbatch")), "recipe=full_70b", "seed=1"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "python3"},
        timeout=60,
    )
    assert done.returncode == 75
    assert (tmp_path / "asked").read_text().splitlines() == [
        "srun python3 launch/torchrun.py train.py recipe=full_70b seed=1",
        *([] if limit else ["scontrol requeue 7"]),
    ]


def test_the_skypilot_task_starts_every_node_with_the_variables_that_it_gets():
    """The file was held against SkyPilot 0.14.1's own schema (docs/multi-gpu.md); here, against what we start."""
    task = yaml.safe_load(PATH.with_name("skypilot.yaml").read_text())
    gpu, count = task["resources"]["accelerators"].split(":")
    words = shlex.split(task["run"].strip().replace("$JOB", task["envs"]["JOB"]))
    assert words[:2] == [".venv/bin/python", "launch/torchrun.py"]
    start = torchrun.plan(words[2:], SKYPILOT)
    assert (start.processes, start.meeting.nodes) == (count, task["num_nodes"])
    job = compose(start.script[1:]).job
    assert (job.hardware.gpu, job.hardware.count, job.hardware.nodes) == ("h100_80gb", 8, task["num_nodes"])
    assert job.run_dir.startswith(f"{next(iter(task['volumes']))}/")
    assert gpu == "H100" and task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
