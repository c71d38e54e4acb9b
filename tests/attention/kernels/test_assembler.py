"""On Hopper the kernels of attention are assembled with the older of Triton's assemblers."""

import importlib
import os
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
knobs = triton.knobs
assembler = importlib.import_module("longnet_dist.attention.kernels.triton.assembler").assembler
NAME = "TRITON_PTXAS_BLACKWELL_PATH"


def function():
    pass


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    return triton.runtime.JITFunction(function)


def use(monkeypatch, release, arch):
    monkeypatch.setattr(triton, "__version__", release)
    target = SimpleNamespace(arch=arch)
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))


def test_inside_it_is_the_older_one_and_outside_what_it_was(kernel, monkeypatch):
    use(monkeypatch, "3.9.0", 90)
    before = knobs.nvidia.ptxas_blackwell
    with assembler(kernel) as options:
        assert knobs.nvidia.ptxas_blackwell.path == knobs.nvidia.ptxas.path
        assert 80 <= options["ptx_version"] < 90
    assert knobs.nvidia.ptxas_blackwell == before
    assert NAME not in os.environ


def test_it_is_as_before_after_an_error(kernel, monkeypatch):
    use(monkeypatch, "3.9.0", 90)
    before = knobs.nvidia.ptxas_blackwell
    with pytest.raises(ZeroDivisionError), assembler(kernel):
        raise ZeroDivisionError
    assert knobs.nvidia.ptxas_blackwell == before


@pytest.mark.parametrize(("release", "arch"), [("3.8.0", 90), ("3.9.0", 80), ("3.9.0", 100)])
def test_other_releases_and_gpus_keep_their_own(kernel, monkeypatch, release, arch):
    use(monkeypatch, release, arch)
    before = knobs.nvidia.ptxas_blackwell
    with assembler(kernel) as options:
        assert (options, knobs.nvidia.ptxas_blackwell) == ({}, before)


def test_one_that_the_user_names_stays(kernel, monkeypatch):
    use(monkeypatch, "3.9.0", 90)
    monkeypatch.setenv(NAME, knobs.nvidia.ptxas_blackwell.path)
    with assembler(kernel) as options:
        assert options == {}


def test_the_interpreter_needs_none(monkeypatch):
    use(monkeypatch, "3.9.0", 90)
    monkeypatch.delenv(NAME, raising=False)
    with assembler(function) as options:
        assert options == {}
