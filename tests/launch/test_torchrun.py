"""launch/torchrun.py: flags and environment of a node -> the torchrun command that it starts."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
NAMES = {"PRIMARY_ADDR": "a", "NUM_NODES": "2"}
STATIC = "--rdzv-backend=static"
CASES = [
    ("alone", [], {}, "torchrun --nproc-per-node=gpu --standalone", {}),
    ("alone, two processes", ["--nproc-per-node=2"], {}, "torchrun --nproc-per-node=2 --standalone", {}),
    ("alone, with a left-over NODE_RANK", [], {"NODE_RANK": "3"}, "torchrun --nproc-per-node=gpu --standalone", {}),
    (
        "Instant Cluster",
        [],
        CLUSTER,
        f"torchrun --nproc-per-node=8 --nnodes=2 --node-rank=1 {STATIC} --master-addr=10.65.0.2 --master-port=29500",
        {"NCCL_SOCKET_IFNAME": "ens1"},
    ),
    (
        "Instant Cluster, primary names only, interface set",
        [],
        {**NAMES, "PRIMARY_PORT": "1234", "NUM_TRAINERS": "4", "NCCL_SOCKET_IFNAME": "ib0"},
        f"torchrun --nproc-per-node=4 --nnodes=2 --node-rank=0 {STATIC} --master-addr=a --master-port=1234",
        {},
    ),
    (
        "Slurm",
        [],
        SLURM,
        f"torchrun --nproc-per-node=8 --nnodes=4 --node-rank=3 {STATIC} --master-addr=gpu07 --master-port=23456",
        {},
    ),
    ("Slurm, one node", [], {**SLURM, "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
        "torchrun --nproc-per-node=8 --standalone", {}),
    (
        "Slurm, GPUs as a list",
        [],
        {**SLURM, "SLURM_GPUS_ON_NODE": "0,1,2,3", "SLURM_JOB_ID": ""},
        f"torchrun --nproc-per-node=4 --nnodes=4 --node-rank=3 {STATIC} --master-addr=gpu07 --master-port=29500",
        {},
    ),
    (
        "flags",
        ["--nnodes", "2", "--node_rank=1", "--master_addr", "host", "--nproc_per_node=8"],
        {},
        f"torchrun --nproc-per-node=8 --nnodes=2 --node-rank=1 {STATIC} --master-addr=host --master-port=29500",
        {},
    ),
    (
        "flags win over the environment",
        ["--node-rank=0", "--master-port=4000"],
        CLUSTER,
        f"torchrun --nproc-per-node=8 --nnodes=2 --node-rank=0 {STATIC} --master-addr=10.65.0.2 --master-port=4000",
        {"NCCL_SOCKET_IFNAME": "ens1"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "env", "command", "extra"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_command_of_a_node(flags, env, command, extra):
    start = torchrun.plan([*flags, "train.py", "recipe=smoke"], env)
    assert " ".join(start.argv) == f"{command} train.py recipe=smoke"
    assert start.environment == extra


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        ([], {}, "no script"),
        (["--nnodes=2", "train.py"], {}, "no address of the first one"),
        (["--nnodes=2", "--node-rank=2", "--master-addr=a", "train.py"], {}, "ranks go from 0 to 1"),
        (["--nnodes=two", "train.py"], {}, "nnodes is 'two'"),
        (["--rdzv-backend=c10d", "train.py"], {}, "--rdzv-backend is none of"),
        (["--nnodes"], {}, "needs a value"),
        (["train.py"], {**CLUSTER, "NUM_TRAINERS": ""}, "nproc-per-node is ''"),
    ],
)
def test_what_cannot_work_is_said(arguments, env, said):
    with pytest.raises(torchrun.Wrong, match=re.escape(said)):
        torchrun.plan(arguments, env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[12,15]", "gpu12"),
        ("node1,node2", "node1"),
        ("node1", "node1"),
        ("a[3]", "a3"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist, host):
    assert torchrun._first_host(nodelist) == host


def test_words_after_the_script_are_the_scripts():
    assert torchrun.plan(["-m", "loadmaster.cli", "train", "--nnodes=7"], {}).argv[-4:] == [
        "-m",
        "loadmaster.cli",
        "train",
        "--nnodes=7",
    ]


def test_the_slurm_script_starts_one_task_a_node_and_goes_back_to_the_queue_when_stopped(tmp_path):
    """With srun and scontrol that write down what they were asked; no Slurm here."""
    for name, ending in (("srun", "exit 75"), ("scontrol", "")):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n{ending}\n')
        tool.chmod(0o755)
    done = subprocess.run(
        ["bash", str(PATH.with_name("slurm.sbatch")), "recipe=full_70b", "seed=1"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PYTHON": "python3"},
        timeout=20,
    )
    assert done.returncode == 75
    assert (tmp_path / "asked").read_text().splitlines() == [
        "srun --kill-on-bad-exit=1 python3 launch/torchrun.py train.py recipe=full_70b seed=1",
        "scontrol requeue 7",
    ]
