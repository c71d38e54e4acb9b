"""What a machine and its Python have, as far as it matters here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from longnet_dist import __version__
from longnet_dist.cli.diagnosis.ask import ask
from longnet_dist.cli.diagnosis.probes import CHECKED
from longnet_dist.errors import ConfigError
from longnet_dist.extras import MODULES
from longnet_dist.machine import host_memory_bytes, usable_cores

CORE = ("torch", "numpy", "einops", "pydantic", "yaml", "safetensors", "tqdm")
# Modules whose distributions have other names, the likeliest first.
DISTRIBUTIONS = {
    "yaml": ("PyYAML",),
    "flash_attn": ("flash-attn-4", "flash-attn"),
    "quack": ("quack-kernels",),
    "triton": ("triton", "pytorch-triton", "triton-windows"),
}
WITH_TORCH = "torch"  # the "extra" of what torch's GPU builds bring
IMPORT_SECONDS, COLLECTIVE_SECONDS = 180, 120
GLOO_RANKS, MOST_NCCL_RANKS = 2, 8
DRIVER_FILE, DEVICE_NODES = Path("/proc/driver/nvidia/version"), Path("/dev")
SHARED_MEMORY = DEVICE_NODES / "shm"


@dataclass(frozen=True)
class Package:
    """A package that is needed, or that an extra brings.

    Attributes:
        module: the name under which it is imported.
        distribution: the name under which it is installed.
        extra: of this distribution that brings it; ``core`` for what everything needs, ``torch`` for what torch brings.
        version: None where it is absent.
        error: of its import; an empty string where that works.
    """

    module: str
    distribution: str
    extra: str
    version: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Check:
    """A small attention, forward and backward, against its definition.

    Attributes:
        dtype: of the tensors.
        head_dim: of the tensors.
        error: norm of the largest error as a share of the result's norm; None where nothing came back.
        allowed: above this share the kernel computes something else.
        failure: why nothing came back.
    """

    dtype: str
    head_dim: int
    error: float | None = None
    allowed: float = 0.0
    failure: str = ""

    @property
    def right(self) -> bool:
        """Say whether the result is within the rounding of its dtype."""
        return not self.failure and self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class Device:
    """A device and what runs there.

    Attributes:
        name: as torch calls it.
        title: of its maker.
        memory_bytes: None for a CPU.
        capability: compute capability; None for a CPU.
        planned_as: its name in the planner's table; None for a CPU or an unknown GPU.
        kernels: for each dtype and head dim the fields of a ``KernelChoice``.
        matmul: ``backend`` of the linear layers in compiled blocks, and ``reason`` why it is not quack's.
        row_functions: ``triton`` or ``torch``: whose norms, activations and their gradients run.
        failure: why the kernels are not known.
        checks: small attentions.
    """

    name: str
    title: str
    memory_bytes: int | None = None
    capability: tuple[int, int] | None = None
    planned_as: str | None = None
    kernels: list[dict[str, Any]] = field(default_factory=list)
    matmul: dict[str, str] = field(default_factory=dict)
    row_functions: str = ""
    failure: str = ""
    checks: list[Check] = field(default_factory=list)

    @property
    def is_gpu(self) -> bool:
        """Say whether it is a GPU."""
        return self.capability is not None

    @property
    def major(self) -> int | None:
        """Return the generation of a GPU: 9 is Hopper."""
        return self.capability[0] if self.capability else None


@dataclass(frozen=True)
class Collective:
    """A sum over ranks of this machine.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        ranks: how many took part.
        failure: an empty string where the sum was right.
    """

    backend: str
    ranks: int
    failure: str = ""


@dataclass(frozen=True)
class Host:
    """A machine without its GPUs; None stands for what the system does not say.

    Attributes:
        system: operating system and architecture.
        python: version.
        cores: of the machine.
        usable_cores: that this process may run on.
        memory_bytes: of the machine, or what its control group leaves.
        physical_bytes: of the machine.
        shared_memory_bytes: size of ``/dev/shm``.
        open_files: the limit of this process.
        free_disk_bytes: in the current folder.
        compiler: path of a C compiler.
        driver: version of NVIDIA's driver.
        gpu_nodes: NVIDIA GPUs that the system, or its container, lets this process open.
        hidden_gpus: ``CUDA_VISIBLE_DEVICES`` hides all GPUs.
        launch_variables: of a launcher, found in the environment.
    """

    system: str
    python: str
    cores: int
    usable_cores: int
    memory_bytes: int | None
    physical_bytes: int | None
    shared_memory_bytes: int | None
    open_files: int | None
    free_disk_bytes: int
    compiler: str | None = None
    driver: str | None = None
    gpu_nodes: int = 0
    hidden_gpus: bool = False
    launch_variables: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """All that was found out.

    Attributes:
        version: of this package.
        torch: the answers of the probe ``torch_build``.
    """

    version: str
    host: Host
    packages: list[Package]
    torch: dict[str, Any]
    devices: list[Device]
    collectives: list[Collective]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as nested values; of each check also whether it is right."""
        values = asdict(self)
        for device, facts in zip(values["devices"], self.devices, strict=True):
            device["checks"] = [asdict(check) | {"right": check.right} for check in facts.checks]
        return values


def collect() -> Facts:
    """Look at this machine; what is broken is a fact, too."""
    found = packages()
    torch = next(package for package in found if package.module == "torch")
    usable = torch.version is not None and not torch.error
    build = ask(["torch_build"])[0] if usable else {}
    return Facts(
        version=__version__,
        host=host(os.environ),
        packages=found,
        torch=build,
        devices=list(devices(build)) if usable else [],
        collectives=list(collectives(build)) if usable else [],
    )


def packages() -> list[Package]:
    """Return every package of the core and of the extras, imported where it is installed."""
    extras = {"core": CORE, WITH_TORCH: ("triton",), **MODULES}
    listed = [_installed(module, extra) for extra, modules in extras.items() for module in modules]
    left = [package.module for package in listed if package.version is not None]
    errors: dict[str, str] = {}
    while left:
        (answers,) = ask(["imports", *left], seconds=IMPORT_SECONDS)
        failure = answers.pop("failure", "")
        errors |= answers
        # The process died of the first that it has not told of.
        left = [module for module in left if module not in answers]
        if left:
            errors[left.pop(0)] = failure or "its import gave no answer"
    return [Package(p.module, p.distribution, p.extra, p.version, errors.get(p.module, "")) for p in listed]


def _installed(module: str, extra: str) -> Package:
    names = DISTRIBUTIONS.get(module, (module,))
    for name in names:
        try:
            return Package(module, name, extra, version(name))
        except PackageNotFoundError:
            continue
    return Package(module, names[0], extra)


def devices(build: Mapping[str, Any]) -> Iterator[Device]:
    """Yield every GPU, or the CPU where there is none, with what runs there.

    Args:
        build: the answers of the probe ``torch_build``.
    """
    gpus = build.get("gpus") or []
    for gpu in gpus:
        name = f"cuda:{gpu['index']}"
        title, memory, capability = gpu["name"], gpu["memory_bytes"], tuple(gpu["capability"])
        yield Device(name, title, memory, capability, gpu["planned_as"], **_runs(name))
    if not gpus:
        yield Device("cpu", platform.processor() or platform.machine(), **_runs("cpu"))


def _runs(name: str) -> dict[str, Any]:
    """What runs on a device."""
    (told,) = ask(["kernels", name])
    checks = []
    checked = CHECKED[name.partition(":")[0]]
    answers = ask(*(["attention", name, dtype, str(head_dim)] for dtype, head_dim in checked))
    for (dtype, head_dim), answer in zip(checked, answers, strict=True):
        checks.append(Check(dtype, head_dim, **answer))
    return {key: told[key] for key in ("kernels", "matmul", "row_functions", "failure") if key in told} | {
        "checks": checks
    }


def collectives(build: Mapping[str, Any]) -> Iterator[Collective]:
    """Yield a sum over two processes by gloo, and one over all GPUs by NCCL.

    Args:
        build: the answers of the probe ``torch_build``.
    """
    if build.get("gloo"):
        yield _sum_over_ranks("gloo", GLOO_RANKS)
    if build.get("nccl") and build.get("gpus"):
        yield _sum_over_ranks("nccl", min(len(build["gpus"]), MOST_NCCL_RANKS))


def _sum_over_ranks(backend: str, ranks: int) -> Collective:
    with tempfile.TemporaryDirectory() as folder:
        questions = [["collective", backend, str(rank), str(ranks), f"{folder}/meeting"] for rank in range(ranks)]
        answers = ask(*questions, seconds=COLLECTIVE_SECONDS)
    expected = ranks * (ranks + 1) / 2
    for rank, answer in enumerate(answers):
        if "failure" in answer:
            return Collective(backend, ranks, f"rank {rank}: {answer['failure']}")
        if answer.get("sum") != expected:
            return Collective(backend, ranks, f"rank {rank} has the sum {answer.get('sum')} in place of {expected}")
    return Collective(backend, ranks)


def host(environ: Mapping[str, str]) -> Host:
    """Look at the machine without its GPUs.

    Args:
        environ: the environment variables of this process.
    """
    try:
        memory = host_memory_bytes()
    except ConfigError:
        memory = None
    sysconf = getattr(os, "sysconf", None)
    return Host(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=memory,
        physical_bytes=sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE") if sysconf else None,
        shared_memory_bytes=shutil.disk_usage(SHARED_MEMORY).total if SHARED_MEMORY.is_dir() else None,
        open_files=_open_files(),
        free_disk_bytes=shutil.disk_usage(Path.cwd()).free,
        compiler=_first_on_path(filter(None, (environ.get("CC"), "cc", "gcc", "clang"))),
        driver=_driver(),
        gpu_nodes=len(list(DEVICE_NODES.glob("nvidia[0-9]*"))) + (DEVICE_NODES / "dxg").exists(),  # the latter: WSL
        hidden_gpus=environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"),
        launch_variables=[name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in environ],
    )


def _first_on_path(names: Iterable[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _driver() -> str | None:
    """The version of NVIDIA's driver, from the kernel or else from its own program."""
    text = ""
    if DRIVER_FILE.exists():
        text = DRIVER_FILE.read_text(encoding="utf-8", errors="replace")
    elif program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        text = answer.stdout if answer.returncode == 0 else ""
    number = re.search(r"\d+\.\d+(\.\d+)?", text)
    return number[0] if number else None
