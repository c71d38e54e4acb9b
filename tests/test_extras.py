import configparser
import sys
from pathlib import Path

import pytest

from longnet_dist import extras
from longnet_dist.cli.program.exit_status import run_cli
from longnet_dist.errors import MissingExtraError
from longnet_dist.extras import MODULES, require_extra

DISTRIBUTIONS = {"flash_attn": "flash-attn-4", "quack": "quack-kernels"}


def requirements(extra):
    """The distributions that setup.cfg gives to an extra, without versions."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    lines = setup["options.extras_require"][extra].split("\n")
    return {line.split(">")[0].split("[")[0].strip() for line in lines if line.strip()}


@pytest.mark.parametrize("extra", MODULES)
def test_modules_are_those_of_setup_cfg(extra):
    assert {DISTRIBUTIONS.get(name, name) for name in MODULES[extra]} == requirements(extra)


def test_what_is_there_is_not_asked_for(monkeypatch):
    monkeypatch.setitem(MODULES, "here", ("json", "torch"))
    require_extra("here", "this")


def test_an_absent_package_ends_a_command_with_status_2(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: require_extra("train", "training"))
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: training needs deepspeed, which this Python does not have; install the extra: "
        "pip install 'longnet-dist[train]'\n"
    )


def test_it_is_an_import_error_too(monkeypatch):
    monkeypatch.setitem(MODULES, "none", ("no_such_package",))
    with pytest.raises(MissingExtraError, match="no_such_package"):
        require_extra("none", "this")
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize("found", ["5.24.0", "5.30.0.dev0", "6.0.0"])
def test_a_release_that_is_right_is_taken(monkeypatch, found):
    monkeypatch.setattr(extras, "version", lambda name: found)
    require_extra("hf", "this", only="transformers")


@pytest.mark.parametrize("found", ["5.23.0", "5.9.0", "4.57.1"])
def test_a_release_with_wrong_results_is_refused(monkeypatch, found):
    monkeypatch.setattr(extras, "version", lambda name: found)
    with pytest.raises(MissingExtraError, match=rf"needs transformers 5\.24 or newer.*has {found}.*longnet-dist\[hf\]"):
        require_extra("hf", "this", only="transformers")
