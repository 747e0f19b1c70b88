import pytest

from loadmaster.config.schema import OptimizerConfig
from loadmaster.training.schedule import learning_rate

STEPS = 99


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 1, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", STEPS + 1, 0.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", STEPS + 1, 0.0),
        ("constant", 10, 1.0),
        ("constant", STEPS, 1.0),
    ],
)
def test_rate_rises_then_follows_its_schedule(schedule, step, expected):
    config = OptimizerConfig(schedule=schedule, warmup_ratio=0.1)
    assert learning_rate(step, STEPS, config, 1.0) == pytest.approx(expected, abs=1e-12)


def test_a_warm_up_may_be_so_many_steps_and_none():
    config = OptimizerConfig(schedule="constant", warmup_ratio=0.5, warmup_steps=4)
    assert [learning_rate(step, STEPS, config, 1.0) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(1, STEPS, OptimizerConfig(schedule="constant", warmup_steps=0), 1.0) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_last_step_still_trains(schedule):
    config = OptimizerConfig(schedule=schedule, warmup_ratio=0.1)
    assert 0 < learning_rate(STEPS, STEPS, config, 1.0) < learning_rate(STEPS - 1, STEPS, config, 1.0)


def test_rate_falls_to_the_floor():
    config = OptimizerConfig(warmup_ratio=0, min_lr_ratio=0.1)
    assert learning_rate(STEPS + 1, STEPS, config, 2.0) == pytest.approx(0.2)
