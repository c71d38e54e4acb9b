"""This table has the data sheets of devices, and the measured shares of them that this package reaches.

A device is found by the name that ``torch.cuda.get_device_name`` returns. ``benchmarks/planner.py`` fits the measured
shares and prints them, to be copied into :class:`Rates`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from longnet_dist.errors import ConfigError
from longnet_dist.machine import host_memory_bytes, usable_cores

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """Rates are the shares of the data sheet that this package reaches, measured on an H100 SXM and used for all GPUs.

    The rates of matmul, attention and row-wise work, and the memory outside of tensors, are fitted to the steps of
    ``benchmarks/results/planner_h100.json``.

    Attributes:
        matmul: share of the peak in the matmuls of a block, with the work around them: 655 of 989 TFLOP/s.
        attention_forward: share of the peak at head dim 64: 357 of 989 TFLOP/s.
        attention_backward: the same for backward, counting 2.5 times the FLOPs of forward: 333 of 989 TFLOP/s.
        attention_seconds: seconds of a forward of attention that do not depend on its length, from the 32,768 tokens
            of ``benchmarks/results/attention_speed.json``.
        wide_heads: factor by which head dim 128 is faster than 64.
        bandwidth: share of the memory bandwidth in row-wise work: 3.0 of 3.35 TB/s.
        host_link: share of the link to the host in copies of pinned memory: 50 of 64 GB/s.
        step_seconds: seconds of a step that do not depend on its size: launches, host work, reading data.
        collective_seconds: latency of one exchange, seconds; NCCL on two H200: 41–102 µs up to 4 MiB for each rank.
        fabric_seconds: what another host adds to that latency, seconds; an assumption.
        network: share of the peak of links and adapters that collectives reach; an assumption.
        fragmentation: memory that the allocator reserves beyond the allocated bytes, as a share of them.
        context_bytes: memory of CUDA, NCCL and compiled kernels outside of torch's allocator, bytes.
    """

    matmul: float = 0.662
    attention_forward: float = 0.361
    attention_backward: float = 0.337
    attention_seconds: float = 2e-4
    wide_heads: float = 1.09
    bandwidth: float = 0.895
    host_link: float = 0.78
    step_seconds: float = 0.02
    collective_seconds: float = 80e-6
    fabric_seconds: float = 20e-6
    network: float = 0.8
    fragmentation: float = 0.01
    context_bytes: int = int(0.905 * GIB)


PORTABLE_SHARES = {64: (1.0, 0.65), 128: (0.84, 0.59)}
"""Rates of the portable attention kernels, forward and backward, as shares of :class:`Rates`, by head dim.

Measured on a Hopper GPU (``benchmarks/results/triton_versions.json``). At head dim 64 the forward of both is portable.
"""


@dataclass(frozen=True)
class Device:
    """A Device is one kind of device with its peak rates.

    Attributes:
        name: name for ``longnet plan --device``.
        pattern: regular expression that matches torch's name of the device; None for a CPU.
        memory_bytes: memory that torch reports, which is that of the data sheet less what the driver reserves.
        bf16_tflops: peak of dense bf16 with float32 accumulation, TFLOP/s; None if unknown.
        fp32_tflops: peak of float32, TFLOP/s; None if unknown.
        bandwidth: memory bandwidth, bytes/s.
        link: bandwidth to the other GPUs of the host, bytes/s in one direction.
        host_link: bandwidth to host memory, bytes/s in one direction.
        fabric: bandwidth of the GPU's adapter to other hosts, bytes/s in one direction.
        gpus_per_host: GPUs of a machine.
        rates: measured shares of these peaks.
    """

    name: str
    pattern: str | None
    memory_bytes: int
    bf16_tflops: float | None
    fp32_tflops: float | None
    bandwidth: float = 1e12
    link: float = 32e9
    host_link: float = 32e9
    fabric: float = 12.5e9
    gpus_per_host: int = 8
    rates: Rates = Rates()

    def with_kernels(self, forward: str, backward: str, head_dim: int) -> Device:
        """Return the device with the rates of the attention kernels that run there.

        Args:
            forward: ``"portable"`` where the kernel written for Hopper does not run, else any other name.
            backward: the same for the backward pass.
            head_dim: of the model; up to 64 it counts as 64, beyond as 128.
        """
        shares = PORTABLE_SHARES[64 if head_dim <= 64 else 128]
        slower = [share if name == "portable" else 1.0 for name, share in zip((forward, backward), shares, strict=True)]
        rates = replace(
            self.rates,
            attention_forward=self.rates.attention_forward * slower[0],
            attention_backward=self.rates.attention_backward * slower[1],
        )
        return replace(self, rates=rates)

    @property
    def type(self) -> str:
        """Return torch's device type, ``"cuda"`` or ``"cpu"``."""
        return "cpu" if self.pattern is None else "cuda"

    @property
    def peak_tflops(self) -> float | None:
        """Return the peak for the model FLOPs utilization, TFLOP/s: dense bf16 on a GPU, None on a CPU."""
        return self.bf16_tflops if self.type == "cuda" else None


def _gpu(
    name: str,
    pattern: str,
    peak_tflops: float,
    gib: float,
    tb_s: float,
    link_gb_s: float,
    pcie_gb_s: float,
    fp32: float,
) -> Device:
    memory = int(gib * GIB)
    # Machines with NVLink of 400 GB/s and more have an adapter of 400 Gbit/s for each GPU, those before them 200. For
    # cards on PCIe 100 Gbit/s is an assumption.
    fabric = 50e9 if link_gb_s >= 400 else 25e9 if link_gb_s >= 300 else 12.5e9
    return Device(name, pattern, memory, peak_tflops, fp32, tb_s * 1e12, link_gb_s * 1e9, pcie_gb_s * 1e9, fabric)


# Sources: NVIDIA's data sheets (H100, H200, A100, L40S, L4, A10, A40, RTX A6000; DGX B200) and white papers (GA102,
# Ada). Columns: dense bf16 TFLOP/s with float32 accumulation (half of the sheets' sparse figure), GiB that torch sees,
# TB/s of memory, GB/s of NVLink or else PCIe in one direction, GB/s of PCIe, float32 TFLOP/s. The first match counts,
# so variants come before the main model.
GPUS = (
    _gpu("h100-nvl", r"H100 NVL", 835.5, 93.0, 3.9, 300, 64, 60),
    _gpu("h100-pcie", r"H100 PCIe", 756.0, 79.1, 2.0, 64, 64, 51.2),
    _gpu("h100", r"H100", 989.4, 79.1, 3.35, 450, 64, 66.9),
    _gpu("h200-nvl", r"H200 NVL", 835.5, 139.7, 4.8, 450, 64, 60),
    _gpu("h200", r"H200", 989.4, 139.7, 4.8, 450, 64, 66.9),
    _gpu("b200", r"B200", 2250.0, 178.0, 8.0, 900, 64, 75),
    _gpu("a100-80gb-pcie", r"A100 80GB PCIe|A100-PCIE-80GB", 312.0, 79.1, 1.935, 32, 32, 19.5),
    _gpu("a100-80gb", r"A100-SXM4-80GB|A100-SXM-80GB", 312.0, 79.1, 2.039, 300, 32, 19.5),
    _gpu("a100-40gb-pcie", r"A100-PCIE-40GB", 312.0, 39.4, 1.555, 32, 32, 19.5),
    _gpu("a100-40gb", r"A100", 312.0, 39.4, 1.555, 300, 32, 19.5),
    _gpu("l40s", r"L40S", 362.05, 44.3, 0.864, 32, 32, 91.6),
    _gpu("l4", r"\bL4\b", 121.0, 22.0, 0.3, 32, 32, 30.3),
    _gpu("a40", r"\bA40\b", 149.7, 44.3, 0.696, 56, 32, 37.4),
    _gpu("a10", r"\bA10\b", 125.0, 22.0, 0.6, 32, 32, 31.2),
    _gpu("rtx-a6000", r"RTX A6000", 154.8, 47.4, 0.768, 56, 32, 38.7),
    _gpu("rtx-4090", r"RTX 4090", 165.2, 23.5, 1.008, 32, 32, 82.6),
    _gpu("rtx-3090", r"RTX 3090", 71.0, 23.5, 0.936, 32, 32, 35.6),
)

# This float32 rate of a core is an assumption: step times on a CPU are right in their order of magnitude only.
CPU_CORE_TFLOPS = 0.03
CPU_RATES = Rates(
    matmul=1.0, attention_forward=0.5, attention_backward=0.5, attention_seconds=0.0, wide_heads=1.0, bandwidth=0.5,
    step_seconds=0.01, fragmentation=0.05,
    # A process with torch's CUDA build loads more libraries, also where it finds no GPU: measured with torch 2.15.
    context_bytes=int((0.77 if torch.version.cuda else 0.45) * GIB),
)  # fmt: skip


def named_device(name: str) -> Device:
    """Return the device of a name in the table, or for ``"cpu"`` this machine without its GPUs.

    Raises:
        ConfigError: the table has no such name.
    """
    if name == "cpu":
        return this_machine()
    for device in GPUS:
        if device.name == name.lower():
            return device
    raise ConfigError(f"device must be cpu or one of {', '.join(d.name for d in GPUS)}, not {name!r}")


def match_device(torch_name: str) -> Device | None:
    """Return the device that matches torch's name of a GPU; None if the GPU is not in the table."""
    return next((device for device in GPUS if device.pattern and re.search(device.pattern, torch_name)), None)


def device_of(device: torch.device) -> Device:
    """Return a device of this machine, with the memory that it really has; an unknown GPU has no peak rates."""
    if device.type != "cuda":
        return this_machine()
    name = torch.cuda.get_device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory
    known = match_device(name)
    return replace(known, memory_bytes=memory) if known else Device(name, re.escape(name), memory, None, None)


def this_machine() -> Device:
    """Return the CPU of this machine, with its cores and its memory."""
    tflops = usable_cores() * CPU_CORE_TFLOPS
    return Device("cpu", None, host_memory_bytes(), tflops, tflops, 20e9, 10e9, 10e9, rates=CPU_RATES)
