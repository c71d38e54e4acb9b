import signal
import time

import pytest

from longnet_dist.cli.experiment import _train, main
from longnet_dist.cli.program import ranks
from longnet_dist.errors import REQUEUE_STATUS, USER_ERROR_STATUS, ConfigError
from longnet_dist.experiments import experiment_names
from longnet_dist.experiments.plan import Experiment, runs_of


def test_distances_are_counted_without_a_training(tmp_path, capsys):
    main(["distance", "--smoke", "--output", str(tmp_path), "--runs", "paper"])
    printed = capsys.readouterr().out
    assert "| paper | 32K | causal | 3 | 1.781 |" in printed
    assert "geometric" not in printed
    assert (tmp_path / "distance-smoke" / "distance.png").exists()
    main(["distance", "--smoke", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "paper-seed0 is finished" in printed
    assert "| geometric | 32K | causal |" in printed


def test_the_help_names_all_experiments(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(name in printed for name in experiment_names())


def test_it_starts_its_own_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="run it without a launcher, with --processes"):
        main(["distance", "--smoke"])


def test_it_ends_in_time_and_the_same_command_goes_on(tmp_path, capsys):
    words = ["distance", "--smoke", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--minutes", "0.1"])
    assert stopped.value.code == REQUEUE_STATUS
    assert "the 0.1 minutes are over; the same command goes on" in capsys.readouterr().out
    main([*words, "--minutes", "5"])
    assert "| geometric | 32K | causal |" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_that_are_none_are_refused(tmp_path, capsys, minutes):
    with pytest.raises(SystemExit) as stopped:
        main(["distance", "--smoke", "--output", str(tmp_path), "--minutes", minutes])
    assert stopped.value.code == USER_ERROR_STATUS
    assert f"argument --minutes: must be above 0 and finite, not {minutes}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_training_is_asked_to_stop_when_the_time_is_over(tmp_path, monkeypatch):
    """The launcher of the ranks is replaced by one that waits for the signal which it would hand on."""
    came = []

    def waiting(words, num_ranks):
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
        deadline = time.monotonic() + 20
        while not came and time.monotonic() < deadline:
            time.sleep(0.01)
        return REQUEUE_STATUS

    monkeypatch.setattr(ranks, "start_ranks", waiting)
    (run,) = runs_of(Experiment.read("context", smoke=True), ["full-2k-seed1"], tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            _train(run, 1, 0.3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stopped.value.code == REQUEUE_STATUS
    assert came == [signal.SIGTERM]
