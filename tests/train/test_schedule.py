import pytest

from longnet_dist.config.schema import TrainConfig
from longnet_dist.train.schedule import learning_rate


def settings(**fields):
    defaults = {"output_dir": "run", "steps": 10, "learning_rate": 1.0, "warmup_steps": 4}
    return TrainConfig(**defaults | fields)


def test_warm_up_is_linear_and_reaches_the_peak():
    assert [learning_rate(step, settings()) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_decay_starts_at_the_peak_and_still_learns_at_the_end():
    rates = [learning_rate(step, settings()) for step in range(5, 11)]
    assert rates == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_decay_has_a_power_and_an_end():
    train = settings(decay_power=2.0, final_learning_rate=0.2)
    assert learning_rate(8, train) == pytest.approx(0.2 + 0.8 * 0.25)


def test_without_warm_up():
    assert learning_rate(1, settings(warmup_steps=0)) == 1.0


def test_a_warm_up_longer_than_the_run_only_warms_up():
    assert learning_rate(10, settings(warmup_steps=20)) == 0.5
