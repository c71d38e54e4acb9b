import logging

import pytest
import torch

from longnet_dist.attention.kernels import registry as choice
from longnet_dist.attention.kernels.registry import choose_kernel
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
