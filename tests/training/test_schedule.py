import pytest

from loadmaster.config.schema import CheckpointConfig, EvaluationConfig, Job, OptimizerConfig
from loadmaster.training.schedule import HeldOutLosses, checkpoint_interval, evaluation_interval, learning_rate

STEPS = 99


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 1, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 40, 0.75),
        ("cosine", 55, 0.5),
        ("cosine", STEPS + 1, 0.0),
        ("linear", 10, 1.0),
        ("linear", 40, 2 / 3),
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


def test_the_lowest_held_out_loss_is_kept_and_evaluations_in_vain_are_counted():
    losses = HeldOutLosses()
    for step, loss in enumerate([None, 2.0, 1.0, 1.0, None, 1.5], 1):
        losses.add(loss, step)
    assert losses == HeldOutLosses(lowest=1.0, step=3, in_vain=3)


@pytest.mark.parametrize(
    ("steps", "saved", "evaluated", "expected"),
    [
        (50, "auto", "auto", (10, 10)),
        (1239, "auto", "auto", (123, 123)),
        (1239, 7, "auto", (7, 7)),
        (1239, 7, 3, (7, 3)),
        (1239, 7, None, (7, None)),
    ],
)
def test_steps_between_checkpoints_and_evaluations(steps, saved, evaluated, expected):
    job = Job(checkpoint=CheckpointConfig(every_steps=saved), evaluation=EvaluationConfig(every_steps=evaluated))
    assert (checkpoint_interval(job, steps), evaluation_interval(job, steps)) == expected
