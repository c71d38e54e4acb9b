"""Ranks that compare what they see, as threads with one store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from longnet_dist.comm import agreement
from longnet_dist.comm.agreement import agreed, settle
from longnet_dist.comm.launch_env import LaunchEnvironment
from longnet_dist.errors import ConfigError, DataError

ALIKE = {"data": "12", "train.seed": "0"}


@pytest.fixture(autouse=True)
def hosts(monkeypatch):
    monkeypatch.setattr(agreement, "READ_SECONDS", 5.0)
    monkeypatch.setattr(agreement.socket, "gethostname", lambda: "host")


def meet(*prepared):
    """What each rank gets that prepares this, or the error that it ends with."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))

    def rank(number):
        def prepare():
            if isinstance(prepared[number], BaseException):
                raise prepared[number]
            return prepared[number]

        try:
            return agreed(store, LaunchEnvironment(number, len(prepared)), "test", prepare, dict)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(len(prepared)) as threads:
        return list(threads.map(rank, range(len(prepared))))


def messages(results, kind=ConfigError):
    """The one message of all ranks."""
    assert all(type(result) is kind for result in results), results
    (message,) = {str(result) for result in results}
    return message


def test_ranks_that_see_the_same_go_on():
    assert meet(ALIKE, ALIKE, ALIKE) == [ALIKE] * 3
    assert meet(ALIKE) == [ALIKE]


@pytest.mark.parametrize(
    ("different", "expected"),
    [
        (ALIKE | {"data": "34"}, "data is 34 for rank 1 on host host and 12 for rank 0 on host host"),
        (ALIKE | {"train.seed": "7"}, "train.seed is 7 for rank 1 on host host and 0 for rank 0"),
        ({"data": "12"}, "train.seed is missing for rank 1 on host host and 0 for rank 0"),
        (ALIKE | {"more": "x" * 99}, f"more is {'x' * 60}… for rank 1 on host host and missing for rank 0"),
    ],
)
def test_a_difference_ends_all_ranks_with_one_message(different, expected):
    message = messages(meet(ALIKE, different))
    assert expected in message
    assert message.startswith("all ranks must start with the same settings, data, checkpoint and code, but ")


def test_the_first_of_several_ranks_is_named():
    message = messages(meet(ALIKE, ALIKE, ALIKE | {"data": "3"}, ALIKE | {"data": "4"}))
    assert "data is 3 for rank 2 and 1 more on host host" in message


def test_an_error_of_one_rank_ends_all():
    message = messages(meet(ALIKE, DataError("there is no token file")))
    assert message == "rank 1 on host host cannot start: there is no token file"
    assert messages(meet(OSError("gone"), ALIKE)) == "rank 0 on host host cannot start: gone"


def test_an_error_of_all_ranks_stays_what_it_is():
    assert messages(meet(DataError("no file"), DataError("no file")), DataError) == "no file"
    assert messages(meet(DataError("no file")), DataError) == "no file"


def test_a_fault_of_this_package_keeps_its_type():
    fault, other = meet(ZeroDivisionError("oops"), ALIKE)
    assert type(fault) is ZeroDivisionError
    assert str(other) == "rank 0 on host host cannot start: oops"


def test_a_rank_that_does_not_come_is_an_error():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(ConfigError, match="rank 0 of 2 waits for ranks that do not come"):
        settle(store, LaunchEnvironment(0, 2), "test", 1, lambda _: None)
