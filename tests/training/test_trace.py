"""plan.trace: the engine's own step on the meta device beside the preflight's replay of it."""

from __future__ import annotations

from dataclasses import replace

from loadmaster.config.schema import HardwareConfig, Job, ModelConfig
from loadmaster.preflight import make_plan
from loadmaster.training.trace import trace_plan


def test_a_trace_of_the_chosen_plan_stands_beside_its_replay() -> None:
    job = Job(model=ModelConfig(name="meta-llama/Llama-3.2-1B"), method="lora", hardware=HardwareConfig(gpu="rtx4090"))
    plan = make_plan(job)
    found = trace_plan(job, plan)
    assert found["traced_gib"] > 1 and abs(found["difference"]) < 0.001
    assert "fp32" in trace_plan(job, replace(plan, precision="fp32"))["skipped"]
