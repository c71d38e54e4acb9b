import logging
from importlib import import_module

import pytest
import torch

from longnet_dist.attention.kernels import registry as choice
from longnet_dist.attention.kernels.backends import BACKENDS
from longnet_dist.attention.kernels.backends import triton as triton_backend
from longnet_dist.attention.kernels.hopper import support
from longnet_dist.attention.kernels.registry import choose_kernel, describe_kernels
from longnet_dist.errors import ConfigError


def test_auto_on_a_cpu():
    assert choose_kernel("auto", torch.device("cpu"), torch.float64).name == "sdpa"


def test_auto_says_why_it_passes_over_a_backend(caplog):
    choice.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        kernel = choose_kernel("auto", torch.device("cuda"), torch.float64)
    assert kernel.name == "reference"
    assert "passes over backend 'flash': it takes bfloat16 and float16" in caplog.text


@pytest.mark.parametrize(
    ("backend", "device", "rule"),
    [("fast", "cpu", "must be one of"), ("sdpa", "cuda", "runs on the CPU"), ("flash", "cpu", "runs on a GPU")],
)
def test_refuses_with_the_rule(backend, device, rule):
    with pytest.raises(ConfigError, match=rule):
        choose_kernel(backend, torch.device(device), torch.bfloat16)


def test_flash_refuses_determinism():
    with pytest.raises(ConfigError, match="deterministic"):
        choose_kernel("flash", torch.device("cuda"), torch.bfloat16, deterministic=True)


HALF, CUDA = torch.bfloat16, torch.device("cuda")


@pytest.fixture
def tried_triton(monkeypatch):
    """The installed Triton counts as the last that the kernels for Hopper were tried on."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", ".".join(map(str, (*support.LAST_RELEASE, 0))))
    return triton


@pytest.mark.parametrize(
    ("head_dim", "dtype", "deterministic", "kernels", "reason"),
    [
        (64, HALF, False, ("portable", "hopper"), ""),
        (128, torch.float16, False, ("hopper", "hopper"), ""),
        (128, HALF, True, ("hopper", "portable"), "adds dQ in no fixed order"),
        (96, HALF, False, ("portable", "portable"), "take head dims (64, 128), not 96"),
        (64, torch.float32, False, ("portable", "portable"), "take bfloat16 and float16, not torch.float32"),
    ],
)
def test_describes_the_kernels_of_a_hopper_gpu(tried_triton, head_dim, dtype, deterministic, kernels, reason):
    found = describe_kernels(CUDA, dtype, head_dim, deterministic=deterministic, capability=(9, 0))
    assert (found.backend, found.forward, found.backward) == ("triton", *kernels)
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)


@pytest.mark.parametrize(
    ("deterministic", "taken", "kernels", "reason"),
    [
        (False, True, ("hopper", "hopper"), ""),
        (True, True, ("portable", "portable"), "must be bitwise what it is alone"),
        (False, False, ("portable", "portable"), "segments of one length and all heads of a model"),
    ],
)
def test_describes_the_kernels_of_packed_documents(tried_triton, monkeypatch, deterministic, taken, kernels, reason):
    monkeypatch.setattr(triton_backend.support, "TABLES", taken)
    found = describe_kernels(CUDA, HALF, 128, deterministic=deterministic, capability=(9, 0), tables=True)
    assert (found.forward, found.backward) == kernels
    assert reason in found.reason
    assert bool(reason) == bool(found.reason)


def test_another_gpu_gets_the_portable_kernels(tried_triton):
    found = describe_kernels(CUDA, HALF, 64, capability=(8, 6))
    assert (found.forward, found.backward, found.remedy) == ("portable", "portable", "")
    assert "compute capability 9.x, not 8.6" in found.reason


def test_an_unknown_triton_gets_the_portable_kernels_and_a_remedy(tried_triton, monkeypatch):
    monkeypatch.setattr(tried_triton, "__version__", "9.9.1")
    found = describe_kernels(CUDA, HALF, 64, capability=(9, 0))
    assert (found.forward, found.backward, found.remedy) == ("portable", "portable", support.REMEDY)
    assert "9.9.1 is installed" in found.reason


def test_without_triton_a_gpu_is_told_to_install_it(monkeypatch):
    for module in (choice, triton_backend):
        monkeypatch.setattr(module, "has_triton", lambda: False)
    found = describe_kernels(CUDA, HALF, 64)
    assert (found.backend, found.forward, found.remedy) == ("flash", "flash", "install triton")
    assert "needs the package triton" in found.reason


def test_describes_a_cpu_and_refuses_what_a_call_would():
    found = describe_kernels(torch.device("cpu"), torch.float64, 64)
    assert (found.backend, found.forward, found.backward, found.reason) == ("sdpa", "sdpa", "sdpa", "")
    with pytest.raises(ConfigError, match="runs on a GPU"):
        describe_kernels(torch.device("cpu"), torch.bfloat16, 64, backend="flash")


NEW_BACKEND = """
from longnet_dist.attention.kernels.backends import BACKENDS, Backend
from longnet_dist.attention.kernels.reference import ReferenceKernel


class Kernel(ReferenceKernel):
    name = "mine"


@BACKENDS.register("mine")
class Mine(Backend):
    @staticmethod
    def rank(device_type):
        return 1 if device_type == "cpu" else None

    @staticmethod
    def obstacle(device, dtype, deterministic):
        return "" if dtype == torch.float64 else f"takes float64, not {dtype}"

    @staticmethod
    def kernel():
        return Kernel()
"""


def test_a_new_backend_is_one_file(tmp_path, monkeypatch, caplog):
    (tmp_path / "new_backend.py").write_text("import torch" + NEW_BACKEND)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(BACKENDS, "_entries", dict(BACKENDS._entries))
    import_module("new_backend")
    cpu = torch.device("cpu")
    assert choose_kernel("auto", cpu, torch.float64).name == "mine"
    assert describe_kernels(cpu, torch.float64, 64).backend == "mine"
    choice.log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert choose_kernel("auto", cpu, torch.float32).name == "sdpa"
    assert "passes over backend 'mine': it takes float64, not torch.float32" in caplog.text
    with pytest.raises(ConfigError, match="backend 'mine' takes float64"):
        choose_kernel("mine", cpu, torch.float32)
    with pytest.raises(ConfigError, match="must be one of auto, flash, mine, reference, sdpa, triton, not 'fast'"):
        choose_kernel("fast", cpu, torch.float32)
