import logging

import pytest
import torch

from longnet_dist.attention.kernels import planning
from longnet_dist.attention.kernels.backends import BACKENDS
from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.planning import planned_device
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import PORTABLE_SHARES, named_device
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.numerics import log_once
from tests.estimate.layouts import small_layout

triton = pytest.importorskip("triton")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def this_machine(monkeypatch):
    """Make this machine one with an H100 and a Triton that the kernels for Hopper were tried on."""
    monkeypatch.setattr(planning, "device_of", lambda device: named_device("h100"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton, "__version__", ".".join(map(str, (*support.LAST_RELEASE, 0))))
    log_once.cache_clear()
    return monkeypatch


def layout_of(head_dim):
    return small_layout(model={"dim": 256, "heads": 256 // head_dim})


def attention_seconds(device, head_dim):
    return Estimate.of(layout_of(head_dim), device).seconds["attention"]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_for_hopper_are_planned_with_the_measured_rates(this_machine, head_dim, caplog):
    with caplog.at_level(logging.WARNING):
        device = planned_device(CUDA, layout_of(head_dim))
    if head_dim == 128:
        assert device == named_device("h100")
    assert attention_seconds(device, head_dim) == attention_seconds(named_device("h100"), head_dim)
    assert not caplog.records


@pytest.mark.parametrize("settings", [{"data": {"documents": True}}, {"model": {"layer_shift": True}}])
def test_documents_and_shifted_grids_are_planned_with_the_kernels_that_take_them(this_machine, settings):
    layout = small_layout(**{"model": {"dim": 256, "heads": 2, **settings.pop("model", {})}, **settings})
    taken = planned_device(CUDA, layout)
    this_machine.setattr(support, "TABLES", False)
    assert attention_seconds(taken, 128) < attention_seconds(planned_device(CUDA, layout), 128)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_triton_without_them_is_planned_slower_and_says_why_once(this_machine, head_dim, caplog):
    this_machine.setattr(triton, "__version__", "9.9.0")
    fast = named_device("h100").rates
    with caplog.at_level(logging.WARNING):
        devices = [planned_device(CUDA, layout_of(head_dim)) for _ in range(2)]
    forward, backward = PORTABLE_SHARES[head_dim]
    assert devices[0].rates.attention_forward == pytest.approx(forward * fast.attention_forward)
    assert devices[0].rates.attention_backward == pytest.approx(backward * fast.attention_backward)
    assert attention_seconds(devices[0], head_dim) > attention_seconds(named_device("h100"), head_dim)
    (record,) = caplog.records
    assert "9.9.0 is installed" in record.getMessage()
    assert support.REMEDY in record.getMessage()


def test_the_backend_of_the_run_is_planned(this_machine):
    slow = named_device("h100").with_kernels("hopper", "portable", 128)
    assert planned_device(CUDA, small_layout(model={"heads": 1}, train={"deterministic": True})) == slow
    with pytest.raises(ConfigError, match="'sdpa' runs on the CPU"):
        planned_device(CUDA, small_layout(train={"attention_backend": "sdpa"}))
    merges = [small_layout(train={"attention_backend": name}).merges_overlaps for name in ("auto", *BACKENDS.names())]
    assert merges == [True, *(type(BACKENDS[name].kernel()).merges_overlaps for name in BACKENDS.names())]


def test_other_gpus_and_the_cpu_keep_their_rates(this_machine):
    this_machine.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert planned_device(CUDA, layout_of(64)) == named_device("h100")
    assert planned_device(torch.device("cpu"), small_layout(device_type="cpu")) == named_device("h100")
