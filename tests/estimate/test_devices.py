import pytest
import torch

from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import GIB, GPUS, device_of, match_device, named_device


@pytest.mark.parametrize(
    ("torch_name", "name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989.4),
        ("NVIDIA H100 PCIe", "h100-pcie", 756.0),
        ("NVIDIA H100 NVL", "h100-nvl", 835.5),
        ("NVIDIA H200", "h200", 989.4),
        ("NVIDIA H200 NVL", "h200-nvl", 835.5),
        ("NVIDIA B200", "b200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb", 312.0),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie", 312.0),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312.0),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb-pcie", 312.0),
        ("NVIDIA L40S", "l40s", 362.05),
        ("NVIDIA L4", "l4", 121.0),
        ("NVIDIA A10", "a10", 125.0),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2),
        ("NVIDIA GeForce RTX 3090", "rtx-3090", 71.0),
    ],
)
def test_a_device_is_found_by_torchs_name_of_it(torch_name, name, tflops):
    device = match_device(torch_name)
    assert (device.name, device.peak_tflops, device.type) == (name, tflops, "cuda")
    assert named_device(name) == device


def test_an_unknown_device_is_in_no_row():
    assert match_device("NVIDIA GeForce RTX 9999") is None
    with pytest.raises(ConfigError, match=r"one of h100-nvl, .* not 'tpu'"):
        named_device("tpu")


def test_names_are_unique_and_memory_is_that_of_one_device():
    assert len({device.name for device in GPUS}) == len(GPUS)
    assert all(20 * GIB < device.memory_bytes < 200 * GIB for device in GPUS)


def test_the_machine_has_memory_but_no_peak_to_be_a_share_of():
    device = device_of(torch.device("cpu"))
    assert device.type == "cpu"
    assert device.peak_tflops is None
    assert device.memory_bytes > GIB
