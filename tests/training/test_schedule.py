import math

import pytest
import torch
from transformers import get_wsd_schedule

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


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1])
@pytest.mark.parametrize("decay_ratio", [0.01, 0.1, 0.35, 0.9])
def test_wsd_is_transformers_warmup_stable_decay_at_every_step(decay_ratio, min_lr_ratio):
    config = OptimizerConfig(schedule="wsd", warmup_steps=9, decay_ratio=decay_ratio, min_lr_ratio=min_lr_ratio)
    warmup, decay = 9, math.ceil(decay_ratio * STEPS)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    # One step more, which nothing trains: the rate comes to its end there. Theirs begins its warm-up at the minimum.
    theirs = get_wsd_schedule(
        optimizer, warmup, decay + 1, STEPS + 1, decay_type="linear", min_lr_ratio=min_lr_ratio
    ).lr_lambdas[0]
    expected = [2.0 * (step / warmup if step <= warmup else theirs(step)) for step in range(1, STEPS + 2)]
    assert [learning_rate(step, STEPS, config, 2.0) for step in range(1, STEPS + 2)] == pytest.approx(expected)
    if not min_lr_ratio:
        assert expected[:warmup] == pytest.approx([2.0 * theirs(step) for step in range(1, warmup + 1)])


def test_a_warm_up_into_the_decay_is_finished_first():
    config = OptimizerConfig(schedule="wsd", warmup_steps=3, decay_ratio=0.9)
    assert [learning_rate(step, 5, config, 1.0) for step in range(1, 6)] == pytest.approx([1/3, 2/3, 1, 2/3, 1/3])


def test_a_warm_up_may_be_so_many_steps_and_none():
    config = OptimizerConfig(schedule="constant", warmup_ratio=0.5, warmup_steps=4)
    assert [learning_rate(step, STEPS, config, 1.0) for step in range(1, 6)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(1, STEPS, OptimizerConfig(schedule="constant", warmup_steps=0), 1.0) == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
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
