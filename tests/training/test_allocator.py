"""Whether the allocator's segments grow: as the user says, else where it is known to work, and where it does."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from loadmaster.training import allocator
from loadmaster.training.allocator import settle, stays_fixed
from loadmaster.training.strategy import Strategy
from loadmaster.training.world import World

LINUX, WSL = "6.8.0-45-generic", "5.15.167.4-microsoft-standard-WSL2"
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("environment", "kernel", "said"),
    [
        ({}, LINUX, ""),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, LINUX, "PYTORCH_ALLOC_CONF is set"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, LINUX, "PYTORCH_CUDA_ALLOC_CONF is set"),
        ({"PYTORCH_ALLOC_CONF": ""}, LINUX, ""),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, LINUX, "PYTORCH_NO_CUDA_MEMORY_CACHING is set"),
        ({"TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "1"}, LINUX,
         "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK is set"),
        ({"TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK": "0"}, LINUX, ""),
        ({}, WSL, "this is Windows Subsystem for Linux"),
    ],
)
def test_segments_grow_where_nothing_speaks_against_it(environment, kernel, said) -> None:
    assert stays_fixed(environment, kernel) == said


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """What the allocator is told."""
    found = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    monkeypatch.setattr(allocator.platform, "release", lambda: LINUX)
    for name in (*allocator.VARIABLES, allocator.SHARING):
        monkeypatch.delenv(name, raising=False)
    return found


def test_the_setting_stays_in_this_process(told, monkeypatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    before = dict(os.environ)
    assert settle(GPU) == "expandable segments" and told == ["expandable_segments:True"]
    assert dict(os.environ) == before  # a server that is started later goes by its own


def test_nothing_is_set_on_a_cpu_or_over_the_users_own(told, monkeypatch) -> None:
    assert settle(torch.device("cpu")) == "" and told == []
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    assert settle(GPU) == "as it was: PYTORCH_CUDA_ALLOC_CONF is set" and told == []


def test_a_driver_that_has_no_such_memory_is_left_with_fixed_segments(told, monkeypatch) -> None:
    def refused(*_, **__):
        raise RuntimeError("CUDA driver error: operation not supported\nmore of it")

    monkeypatch.setattr(torch, "empty", refused)
    assert settle(GPU) == "fixed segments: the driver has no others (CUDA driver error: operation not supported)"
    assert told == ["expandable_segments:True", "expandable_segments:False"]


def test_this_build_of_pytorch_knows_the_setting_and_does_not_warn_of_it() -> None:
    """In a process of its own: it goes for all of one. The name below torch.cuda warns of its end (2.11 to 2.13)."""
    code = (
        "import torch; from loadmaster.training import allocator; torch.empty = lambda *_, **__: None; "
        "allocator.stays_fixed = lambda *_: ''; print(allocator.settle(torch.device('cuda', 0))); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    command = [sys.executable, "-W", "error::FutureWarning", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.stdout.split("\n")[:2] == ["expandable segments", "expandable_segments:True"], said.stderr


def test_it_is_settled_before_a_model_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(allocator, "settle", lambda device: f"asked of {device}")
    plan = SimpleNamespace(method="lora", precision="bf16")
    assert Strategy(None, plan, World(device=GPU)).allocator == "asked of cuda:0"
