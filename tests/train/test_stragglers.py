"""The slowest rank is found by the time that it does not wait."""

import socket
from itertools import count

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm import waits as waits_module
from longnet_dist.comm.waits import COLLECTIVES, CollectiveWaits
from longnet_dist.telemetry.json_lines import read_jsonl
from longnet_dist.train.stragglers import EVERY, SAMPLES, Stragglers
from tests.distributed import run_distributed
from tests.train.runs import CPU, import_deepspeed, make_trainer, tiny_config


class OfRanks(Stragglers):
    """Those of rank 0, whose reports are given, on hosts that are named."""

    def __init__(self, hosts):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_rank", lambda: 0)
            patch.setattr(dist, "get_world_size", lambda: len(hosts))
            patch.setattr(dist, "all_gather_object", lambda names, _: names.__setitem__(slice(None), hosts))
            super().__init__(CollectiveWaits(CPU))


def said_of(reports, hosts=("a", "b", "c")):
    """The messages for reports of all ranks, one after another, and the last pace."""
    stragglers, said, pace = OfRanks(list(hosts)), [], None
    for report in reports:
        pace, message = stragglers.add(1.0, report)
        said.append(message)
    return said, pace


def test_a_rank_that_is_5_percent_behind_is_named_once_with_its_host():
    said, pace = said_of([(1.0, 1.06, 0.99)] * (2 * SAMPLES))
    assert [bool(text) for text in said] == [number == SAMPLES - 1 for number in range(2 * SAMPLES)]
    assert said[SAMPLES - 1].startswith("rank 1 on host b is slow: it works 1.06 s of a step, 7% more than the median")
    assert "longnet doctor" in said[SAMPLES - 1]
    assert pace == (1, 1.06, pytest.approx(0.995))


@pytest.mark.parametrize(
    "reports",
    [
        [(1.0, 1.04, 0.99)] * 20,
        [(1.0, 2.0 if number % SAMPLES == 0 else 1.0, 1.0) for number in range(20)],  # a pause now and then
        [(1.0, 9.0, 1.0)] * (SAMPLES - 1),
        [(0.0, 0.0, 0.0)] * 20,
    ],
    ids=["4 percent", "pauses", "too few", "no time"],
)
def test_nobody_is_named(reports):
    assert not any(said_of(reports)[0])


def test_a_rank_is_named_again_after_it_has_recovered():
    slow, even = [(1.0, 1.0, 2.0)] * SAMPLES, [(1.0, 1.0, 1.0)] * SAMPLES
    said, _ = said_of(slow + even + slow)
    assert [text[:6] for text in said if text] == ["rank 2", "rank 2"]


def test_two_slow_ranks_that_take_turns_are_each_named_once():
    turns = [(1.0, 1.0, 2.0, 1.9)] * SAMPLES, [(1.0, 1.0, 1.9, 2.0)] * SAMPLES
    said, _ = said_of((turns[0] + turns[1]) * 3, ("a", "b", "c", "d"))
    assert [text[:6] for text in said if text] == ["rank 2", "rank 3"]


def test_one_rank_measures_nothing():
    stragglers = OfRanks(["a"])
    for _ in range(3 * EVERY):
        with stragglers.step():
            assert stragglers.report() == []
        assert stragglers.add(1.0, ()) == (None, "")


def waits_of_ranks(asynchronous):
    """What a clock that ticks at each look says of two sums that are awaited; and whether torch has its own back."""
    before, found = {name: getattr(dist, name) for name in COLLECTIVES}, []
    with pytest.MonkeyPatch.context() as patch, CollectiveWaits(CPU) as waits:
        patch.setattr(waits_module.time, "perf_counter", count().__next__)
        for is_on in (False, True):
            with waits.measuring(is_on):
                for _ in range(2):
                    numbers = torch.ones(3)
                    work = dist.all_reduce(numbers, async_op=asynchronous)
                    if work is not None:
                        work.wait()
                        assert work.is_completed()
                    assert numbers.tolist() == [2, 2, 2]
            found.append(waits.seconds)
    return found, all(getattr(dist, name) is function for name, function in before.items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_waits_are_timed_while_measuring(asynchronous):
    assert run_distributed(waits_of_ranks, 2, asynchronous) == [([0, 2], True)] * 2


class Event:
    """A CUDA event by a clock that ticks once a record."""

    ticks = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.ticks += 1
        self.at = Event.ticks

    def elapsed_time(self, other):
        return 1000.0 * (other.at - self.at)


def test_on_a_gpu_events_take_the_times(monkeypatch):
    monkeypatch.setattr(waits_module.torch.cuda, "Event", Event)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, async_op=False: None)
    with CollectiveWaits(torch.device("cuda")) as waits, waits.measuring():
        for _ in range(3):
            dist.all_reduce(None)
        assert dist.all_reduce(None, async_op=True) is None
    assert waits.seconds == 3.0


def train_with_a_slow_rank(config, slow):
    """Train with a rank that works longer by the clock, each rank on a host of its own."""
    add = Stragglers.add

    def slower(self, seconds, reports):
        return add(self, self._waits.seconds + (1.5 if dist.get_rank() == slow else 1.0), reports)

    with pytest.MonkeyPatch.context() as patch, CollectiveWaits(CPU) as waits:
        patch.setattr(Stragglers, "add", slower)
        patch.setattr(socket, "gethostname", lambda: f"host{dist.get_rank()}")
        make_trainer(config, waits).run()


@pytest.mark.parametrize("settings", [("parallel.data=3", "train.batch_size=3"), ("parallel.sequence=3",)], ids=str)
def test_a_slow_rank_of_a_run_is_named_and_recorded(tmp_path, corpus, settings, capfd):
    import_deepspeed()
    steps = EVERY * SAMPLES + 2
    config = tiny_config(tmp_path / "run", corpus, f"train.steps={steps}", *settings, "deepspeed.zero_stage=2")
    run_distributed(train_with_a_slow_rank, 3, config, 2)
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "is slow" in line]
    assert "note: rank 2 on host host2 is slow: it works 1.5 s of a step, 50% more" in line
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    measured = [line for line in lines if "slowest_rank" in line]
    assert [line["step"] for line in measured] == [number * EVERY + 1 for number in range(1, SAMPLES + 1)]
    assert {line["slowest_rank"] for line in measured} == {2}
    assert measured[-1]["slowest_rank_seconds"] == pytest.approx(1.5)
    assert measured[-1]["median_rank_seconds"] == pytest.approx(1.0)


def count_collectives(config, is_measured):
    called = []
    with pytest.MonkeyPatch.context() as patch:
        for name in (*COLLECTIVES, "barrier", "all_gather_object"):
            function = getattr(dist, name)
            patch.setattr(dist, name, lambda *a, f=function, **o: (called.append(1), f(*a, **o))[1])
        trainer = make_trainer(config)
        if not is_measured:
            patch.setattr(Stragglers, "report", lambda self: [])
        trainer.run()
    return len(called)


def test_measuring_takes_no_collective_of_a_step(tmp_path, corpus):
    counts = []
    for name, is_measured in (("with", True), ("without", False)):
        config = tiny_config(tmp_path / name, corpus, f"train.steps={EVERY + 2}")
        counts.append(run_distributed(count_collectives, 2, config, is_measured))
    assert counts[0] == counts[1]
