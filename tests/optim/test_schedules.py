import math
from importlib import import_module

import pytest

from longnet_dist.config.schema import TrainConfig
from longnet_dist.optim.schedules import learning_rate


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


def test_cosine_starts_at_the_peak_and_ends_at_the_final_rate():
    train = settings(schedule="cosine", final_learning_rate=0.2)
    rates = [learning_rate(step, train) for step in range(5, 11)]
    assert rates == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * done / 6)) for done in range(6)])
    assert rates[0] == 1.0
    assert rates[3] == pytest.approx(0.6)


def test_wsd_is_stable_and_then_decays():
    train = settings(schedule="wsd", steps=20, decay_fraction=0.25)
    assert [learning_rate(step, train) for step in range(5, 17)] == [1.0] * 12
    assert [learning_rate(step, train) for step in range(17, 21)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_longer_run_of_wsd_goes_on_without_a_jump():
    """Before the decay, the rate does not depend on the number of steps."""
    short, long = settings(schedule="wsd", steps=20), settings(schedule="wsd", steps=200)
    assert [learning_rate(step, short) for step in range(1, 17)] == [learning_rate(step, long) for step in range(1, 17)]


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "wsd"])
def test_every_schedule_stays_between_final_rate_and_peak(schedule):
    train = settings(schedule=schedule, steps=50, final_learning_rate=0.1)
    rates = [learning_rate(step, train) for step in range(4, 51)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert rates[-1] >= 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "cosin"}, r"train.schedule must be one of .*cosine, polynomial, wsd.*; did you mean cosine\?"),
        ({"schedule": "cosine", "decay_power": 2.0}, "train.decay_power belongs to train.schedule=polynomial"),
        ({"decay_fraction": 0.5}, "train.decay_fraction belongs to train.schedule=wsd"),
    ],
)
def test_unknown_names_and_options_without_effect_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        settings(**fields)


def test_a_new_schedule_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "constant_schedule.py").write_text(
        "from longnet_dist.optim.schedules import SCHEDULES\n\n"
        "@SCHEDULES.register('constant')\n"
        "def constant(done, total, train):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import_module("constant_schedule")
    assert learning_rate(10, settings(schedule="constant")) == 1.0
