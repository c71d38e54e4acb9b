import pytest

from longnet_dist.cli.experiment import main
from longnet_dist.errors import ConfigError
from longnet_dist.experiments import experiment_names


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
