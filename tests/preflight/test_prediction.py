"""A prediction that is off is told with the part that is off; one that is right is recorded and not mentioned."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadmaster.config.schema import BatchConfig, HardwareConfig, Job, ModelConfig
from loadmaster.preflight import make_plan
from loadmaster.preflight.prediction import Measured, held_against, sentence, sentence_of_steps

JOB = Job(
    model=ModelConfig(name="meta-llama/Llama-3.1-8B"), method="lora", micro_batch_size=2,
    batch=BatchConfig(global_size=4), hardware=HardwareConfig(gpu="h100_80gb"),
)
PLAN = make_plan(JOB)
MEMORY, PEAK = PLAN.memory_gib, PLAN.peak_gib
MASTERS = 4 * PLAN.model.trainable_parameters / 2**30


def measured(extra_step: float = 0.0, extra_context: float = 0.0, extra_weights: float = 0.0) -> Measured:
    """The prediction itself, with something more in one part."""
    loaded = MEMORY.weights + MASTERS + extra_weights
    resting = loaded + MEMORY.optimizer - MASTERS
    more = extra_step + extra_weights
    return Measured(
        PEAK.allocated + more, PEAK.reserved + more, PEAK.device + more + extra_context, loaded, resting
    )


def test_a_prediction_that_is_right_is_recorded_part_by_part_and_not_mentioned() -> None:
    found = held_against(PLAN, measured())
    assert [found[name]["difference"] for name in ("allocated", "reserved", "device")] == [0, 0, 0]
    assert all(abs(part["off_gib"]) < 0.001 for part in found["parts"].values())
    assert sum(part["measured_gib"] for part in found["parts"].values()) == pytest.approx(PEAK.device, abs=0.01)
    assert sentence(found) is None


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"extra_step": 3.0}, "gradients, activations and loss"),
        ({"extra_context": 4.0}, "CUDA context"),
        ({"extra_weights": 5.0}, "weights"),
    ],
)
def test_one_that_is_more_than_five_per_cent_off_is_told_with_its_part(extra: dict[str, float], part: str) -> None:
    found = held_against(PLAN, measured(**extra))
    assert "too low" in sentence(found) and f"most of it in {part}" in sentence(found)
    assert found["device"]["difference"] < -0.05


def test_nothing_is_held_against_a_cpu() -> None:
    on_cpu = make_plan(Job(model=JOB.model, method="lora", hardware=HardwareConfig(gpu="cpu")))
    assert held_against(on_cpu, measured()) is None and sentence(None) is None


def test_steps_that_the_data_make_are_told_where_the_plan_expected_far_more_or_fewer() -> None:
    for_hours = make_plan(JOB, dataset_tokens=60 * 4 * JOB.sequence_length)
    assert for_hours.steps == 60 * JOB.epochs and for_hours.hours
    plan = replace(for_hours, steps=60)
    assert sentence_of_steps(plan, 48) == (
        "the data make 48 steps; the plan expected about 60 by their size, and its hours and dollars are those of "
        "training for so many"
    )
    assert sentence_of_steps(replace(plan, hours=None), 90) == (
        "the data make 90 steps; the plan expected about 60 by their size"
    )
    for near in (49, 60, 79):
        assert sentence_of_steps(plan, near) is None
    assert PLAN.steps is None and sentence_of_steps(PLAN, 90) is None
    assert make_plan(replace(JOB, max_steps=7)).steps == 7
