import os
import signal

import pytest

from longnet_dist.resilience.stop_signals import STOP_SIGNALS, stop_requests


@pytest.fixture(autouse=True)
def handlers():
    """The handlers of signals, which are Python's own whoever started the tests: nohup ignores SIGHUP."""
    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_to_stop(number):
    with stop_requests() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
    assert signal.getsignal(number) is signal.SIG_IGN


def test_without_a_signal_all_is_as_before(handlers):
    with stop_requests():
        assert all(signal.getsignal(number) is not handlers[number] for number in STOP_SIGNALS)
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers


def test_only_a_second_interrupt_ends_at_once():
    with stop_requests() as stop_requested:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(number):
    """SIGHUP under nohup, SIGINT of a shell's background job."""
    signal.signal(number, signal.SIG_IGN)
    with stop_requests() as stop_requested:
        os.kill(os.getpid(), number)
        assert not stop_requested()
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_what_a_launcher_ignores_for_itself_still_stops_a_rank(number):
    """launch/slurm/torchrun.py ignores SIGUSR1, and so does ``trap '' USR1`` in a batch script."""
    signal.signal(number, signal.SIG_IGN)
    with stop_requests() as stop_requested:
        os.kill(os.getpid(), number)
        assert stop_requested()


def test_only_the_first_signal_is_answered(capfd):
    with stop_requests("asked to stop"):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert capfd.readouterr().err == "\nasked to stop\n"
