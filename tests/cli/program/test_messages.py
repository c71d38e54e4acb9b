"""Warnings of a command do not run into its progress bar, and come from one rank."""

import logging
import warnings

import pytest
from tqdm import tqdm

from longnet_dist.cli.program import ranks
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.cli.program.messages import messages_beside_bars
from longnet_dist.numerics import log_once

OURS = str(ranks.__file__)


def warn(text, file=OURS):
    warnings.warn_explicit(text, UserWarning, file, 3)


def noisy():
    for step in tqdm(range(3), mininterval=0):
        warn(f"{step} of 9 tiles")
    log_once.cache_clear()
    log_once("slower kernels")


@pytest.fixture(autouse=True)
def shown_warnings():
    """Warnings of tests are errors; those of a command are shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def test_each_kind_is_a_line_of_its_own_once(capsys):
    run_cli(noisy)
    parts = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert [part for part in parts if "tiles" in part] == ["warning: 0 of 9 tiles"]
    assert "warning: slower kernels" in parts


def test_warnings_of_other_packages_keep_their_place(capsys):
    run_cli(lambda: warn("theirs", "/their/file.py"))
    assert "/their/file.py:3: UserWarning: theirs" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_leave_them_to_the_first(rank, monkeypatch, capsys):
    environ = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)

    def main():
        warn("of a rank")
        logging.getLogger("longnet_dist.numerics").warning("logged")

    run_cli(main)
    assert capsys.readouterr().err == ("warning: of a rank\nwarning: logged\n" if rank == 0 else "")


def test_what_was_there_comes_back():
    before = warnings.showwarning
    with messages_beside_bars():
        assert warnings.showwarning is not before
    assert warnings.showwarning is before
    assert not logging.getLogger("longnet_dist").handlers
