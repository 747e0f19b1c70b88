"""Several processes on a CPU: planned like GPUs over a slow link, and what no CPU does is a configuration error."""

from __future__ import annotations

import pytest

from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig
from loadmaster.errors import ConfigError
from loadmaster.preflight import make_plan
from loadmaster.preflight.plan import Plan

SMALL = ModelConfig(name="HuggingFaceTB/SmolLM2-135M-Instruct")


def plan(count: int, nodes: int = 1, **fields) -> Plan:
    machine = HardwareConfig(gpu="cpu", count=count, nodes=nodes)
    return make_plan(Job(**{"model": SMALL, "sequence_length": 256, "hardware": machine, "method": "lora", **fields}))


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("sharding", ["auto", "ddp", "fsdp", "zero3"])
def test_two_processes_train_in_fp32_as_asked(method: str, sharding: str) -> None:
    chosen = plan(2, method=method, sharding=sharding)
    assert chosen.fits and chosen.world_size == 2 and chosen.precision == "fp32"
    assert chosen.sharding == (sharding if sharding != "auto" else "ddp")
    assert chosen.micro_batch_size * chosen.gradient_accumulation_steps * 2 == 16


def test_two_nodes_of_processes_are_planned() -> None:
    assert plan(2, 2, sharding="ddp").world_size == 4


@pytest.mark.parametrize(
    ("count", "fields", "said"),
    [
        (1, {"precision": "bf16"}, "precision=fp32"),
        (2, {"precision": "fp8"}, "precision=fp32"),
        (1, {"sharding": "fsdp"}, "hardware.count=2"),
        (1, {"offload": "optimizer"}, "offload=none or auto"),
        (1, {"offload": "all"}, "offload=none or auto"),
        (2, {"sharding": "none"}, "sharding=ddp"),
        (2, {"batch": BatchConfig(global_size=3)}, "batch.global_size=4"),
    ],
)
def test_what_no_cpu_does_is_a_configuration_error_with_a_remedy(count: int, fields: dict, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(count, **fields)
    assert raised.value.exit_code == 2 and said in str(raised.value)


def test_host_memory_is_that_of_all_processes() -> None:
    chosen = plan(2, sharding="ddp", offload="none")
    assert chosen.host_memory_gib == pytest.approx(2 * chosen.memory_gib.total, rel=0.01)


def test_offload_under_fsdp_runs_as_written_and_is_not_said_to_help_gpus() -> None:
    chosen = plan(2, sharding="fsdp", offload="all", method="full")
    assert chosen.fits and chosen.offload == "all" and not any("GPUs" in text for text in chosen.reasons)
