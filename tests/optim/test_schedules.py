import math
from importlib import import_module

import pytest

from longnet_dist.config.schema import TrainConfig
from longnet_dist.optim.schedules import ScheduleStart, course, learning_rate, start_after


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


KINDS = ({"decay_power": 2.0}, {"schedule": "cosine"}, {"schedule": "wsd", "decay_fraction": 0.4})


def rates(*legs):
    """The rates of a run that is resumed, from pairs of the settings of a start and its last step."""
    found, start, before = [], None, legs[0][0]
    for train, last in legs:
        if found:
            start = start_after(
                len(found), before.model_copy(update={"learning_rate": train.learning_rate}), train, start
            )
        found += [learning_rate(step, train, start) for step in range(len(found) + 1, last + 1)]
        before = train
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped", [60, 80, 99, 100])
@pytest.mark.parametrize("steps", [105, 150, 1000])
def test_a_longer_run_goes_on_from_the_rate_it_had_and_falls_to_the_end(kind, stopped, steps):
    short, long = settings(steps=100, **kind), settings(steps=steps, **kind)
    found = rates((short, stopped), (long, steps))
    assert found[stopped] == pytest.approx(found[stopped - 1], rel=1e-9)
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] <= 0.2 * found[stopped] + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stopped", [10, 40, 70])
def test_a_shorter_run_falls_to_the_end_from_the_rate_it_had(kind, stopped):
    long, short = settings(steps=100, final_learning_rate=0.01, **kind), settings(steps=80, **kind)
    found = rates((long, stopped), (short, 80))
    assert found[stopped] == pytest.approx(found[stopped - 1], rel=0.1)
    assert found[4:] == sorted(found[4:], reverse=True)
    assert found[-1] < 0.1


def test_the_course_after_a_resume_has_the_shape_of_the_schedule():
    before, now = (
        settings(steps=100, schedule="cosine"),
        settings(steps=200, schedule="cosine", final_learning_rate=0.1),
    )
    found = rates((before, 52), (now, 200))
    rate = 0.5 * (1 + math.cos(math.pi * 47 / 96))
    expected = [0.1 + (rate - 0.1) * (1 + math.cos(math.pi * done / 148)) / 2 for done in range(148)]
    assert found[52:] == pytest.approx(expected)


def test_wsd_in_its_decay_stays_at_its_rate_and_then_decays():
    short, long = settings(schedule="wsd", steps=20, decay_fraction=0.25), settings(schedule="wsd", steps=40)
    found = rates((short, 18), (long, 40))
    assert found[16:18] == pytest.approx([0.8, 0.6])
    assert found[18:33] == pytest.approx([0.6] * 15)
    assert found[33:] == pytest.approx([0.6 * left / 8 for left in range(7, 0, -1)])
    assert rates((short, 18), (long, 30), (settings(schedule="wsd", steps=60), 48))[18:] == pytest.approx([0.6] * 30)


def test_wsd_before_its_decay_needs_no_start():
    short, long = settings(schedule="wsd", steps=100), settings(schedule="wsd", steps=200)
    assert start_after(80, short, long) is None
    assert start_after(80, short, settings(schedule="wsd", steps=90)) == ScheduleStart(step=80, share=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_with_its_settings_has_its_rates_in_every_bit(kind):
    train, longer = settings(steps=50, **kind), settings(steps=70, **kind)
    assert rates((train, 3), (train, 20), (train, 21), (train, 50)) == rates((train, 50))
    assert rates((train, 45), (longer, 50), (longer, 61), (longer, 70)) == rates((train, 45), (longer, 70))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_in_its_warm_up_has_the_rates_of_the_new_settings(kind):
    short, long = settings(steps=50, warmup_steps=20, **kind), settings(steps=90, warmup_steps=20, **kind)
    assert rates((short, 12), (long, 90)) == rates((long, 90))
    assert rates((short, 20), (long, 90)) == rates((long, 90))


def test_another_warm_up_rises_from_the_rate_of_the_run():
    found = rates((settings(steps=50, warmup_steps=20), 10), (settings(steps=50, warmup_steps=40), 50))
    assert found[9:40] == pytest.approx([0.5 + 0.5 * done / 30 for done in range(31)])
    assert found[40] == 1.0
    again = rates(
        (settings(steps=50), 50),
        (settings(steps=100, warmup_steps=60), 60),
        (settings(steps=100, warmup_steps=60), 100),
    )
    assert again[49:60] == pytest.approx([1 / 46 + 45 / 46 * done / 10 for done in range(11)])
    assert again[60:] == pytest.approx([left / 40 for left in range(40, 0, -1)])
    fewer = rates((settings(steps=50, warmup_steps=20), 10), (settings(steps=50, warmup_steps=5), 50))
    assert fewer[9:] == pytest.approx([0.5] + [0.5 * left / 40 for left in range(40, 0, -1)])


def test_another_schedule_goes_on_from_the_rate_too():
    found = rates((settings(steps=50), 30), (settings(steps=50, schedule="cosine"), 50))
    assert found[30] == pytest.approx(found[29])


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_another_peak_changes_the_rate_at_once(final):
    old, new = (settings(steps=50, learning_rate=peak, final_learning_rate=final) for peak in (1.0, 0.5))
    assert rates((old, 30), (new, 50))[30:] == rates((new, 50))[30:]
    found = rates((settings(steps=50), 30), (settings(steps=90, learning_rate=0.5), 90))
    assert found[30] == pytest.approx(found[29] / 2)


def test_the_course_is_told():
    start = ScheduleStart(step=1000, share=0.25)
    train = settings(steps=2000, schedule="cosine", final_learning_rate=0.1)
    told = "0.25 after step 1,000, then by train.schedule=cosine to 0.1 at step 2,000"
    assert course(train, start) == f"{told} (with train.warmup_steps above 1000 it rises to 1 first)"
    train = train.model_copy(update={"warmup_steps": 1500})
    assert course(train, start) == told.replace("0, then", "0, 1 at the end of the warm-up, step 1,500, then", 1)


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
