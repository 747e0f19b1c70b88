import pytest

from loadmaster.config.schema import OptimizerConfig
from loadmaster.training.schedule import learning_rate


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 1, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 100, 0.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 100, 0.0),
        ("constant", 10, 1.0),
        ("constant", 100, 1.0),
    ],
)
def test_rate_rises_then_follows_its_schedule(schedule, step, expected):
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_ratio=0.1)
    assert learning_rate(step, 100, config) == pytest.approx(expected, abs=1e-12)


def test_rate_ends_at_the_floor():
    assert learning_rate(100, 100, OptimizerConfig(lr=2.0, warmup_ratio=0, min_lr_ratio=0.1)) == pytest.approx(0.2)
