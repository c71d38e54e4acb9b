"""Facts about machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from longnet_dist.attention.kernels.registry import describe_kernels
from longnet_dist.cli.diagnosis.facts import CORE, Check, Collective, Device, Facts, Host, Package
from longnet_dist.cli.diagnosis.probes import DTYPES, HEAD_DIMS
from longnet_dist.extras import MODULES

GIB = 2**30
HOST = Host(
    system="Linux 6.8 x86_64",
    python="3.12.3",
    cores=64,
    usable_cores=64,
    memory_bytes=512 * GIB,
    physical_bytes=512 * GIB,
    shared_memory_bytes=256 * GIB,
    open_files=1048576,
    free_disk_bytes=900 * GIB,
    compiler="/usr/bin/gcc",
)
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "deepspeed": "0.19.8", "quack": "0.6.5"}


def packages(absent: tuple[str, ...] = (), errors: dict[str, str] | None = None, **versions: str) -> list[Package]:
    """Every package, but for the absent extras and modules."""
    extras = {"core": CORE, "torch": ("triton",), **MODULES}
    return [
        Package(
            module,
            module,
            extra,
            None if {module, extra} & {*absent} else (VERSIONS | versions).get(module, "1.0"),
            (errors or {}).get(module, ""),
        )
        for extra, modules in extras.items()
        for module in modules
    ]


def cpu(*checks: Check) -> Device:
    """A processor whose attention is right, or has these results."""
    device = torch.device("cpu")
    kernels = [_choice(describe_kernels(device, getattr(torch, d), n), d, n) for d in DTYPES["cpu"] for n in HEAD_DIMS]
    matmul = {"backend": "torch", "reason": "runs on a Hopper GPU, not on cpu"}
    return Device("cpu", "x86_64", kernels=kernels, matmul=matmul, row_functions="torch", checks=_checks(checks))


def gpu(
    index: int = 0,
    title: str = "NVIDIA H100 80GB HBM3",
    capability: tuple[int, int] = (9, 0),
    planned_as: str | None = "h100",
    matmul_reason: str = "",
    checks: tuple[Check, ...] = (),
) -> Device:
    """A GPU with the kernels that it gets with the Triton that is installed here."""
    device = torch.device("cuda", index)
    kernels = [
        _choice(describe_kernels(device, getattr(torch, dtype), dim, capability=capability), dtype, dim)
        for dtype in DTYPES["cuda"]
        for dim in HEAD_DIMS
    ]
    return Device(
        f"cuda:{index}",
        title,
        80 * GIB,
        capability,
        planned_as,
        kernels,
        {"backend": "torch" if matmul_reason else "quack", "reason": matmul_reason},
        "triton",
        checks=_checks(checks),
    )


def laptop(**changes: Any) -> Facts:
    """A machine without a GPU, and without the extras that are for GPUs."""
    host = replace(HOST, usable_cores=8, cores=8, memory_bytes=16 * GIB, physical_bytes=16 * GIB)
    build: dict[str, Any] = {
        "cuda": None,
        "hip": None,
        "gloo": True,
        "nccl": False,
        "available": False,
        "warning": "",
        "gpus": [],
    }
    facts = Facts("0.2.0", host, packages(absent=("cuda", "triton")), build, [cpu()], [Collective("gloo", 2)])
    return replace(facts, **changes)


def server(*devices: Device, **changes: Any) -> Facts:
    """A machine with GPUs, an H100 if none is given."""
    devices = devices or (gpu(),)
    gpus = [
        {
            "index": index,
            "name": device.title,
            "memory_bytes": device.memory_bytes,
            "capability": list(device.capability or ()),
            "planned_as": device.planned_as,
        }
        for index, device in enumerate(devices)
    ]
    build = {"cuda": "13.0", "hip": None, "gloo": True, "nccl": True, "available": True, "warning": "", "gpus": gpus}
    collectives = [Collective("gloo", 2), Collective("nccl", len(devices))]
    host = replace(HOST, driver="580.65", gpu_nodes=len(devices))
    return replace(Facts("0.2.0", host, packages(), build, list(devices), collectives), **changes)


def _choice(choice: Any, dtype: str, head_dim: int) -> dict[str, Any]:
    return {"dtype": dtype, "head_dim": head_dim, **{name: getattr(choice, name) for name in choice.__slots__}}


def _checks(checks: tuple[Check, ...]) -> list[Check]:
    return list(checks) or [Check("float32", 32, 3e-7, 3.8e-6)]
