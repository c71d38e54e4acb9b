"""What facts mean, and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from longnet_dist.cli.diagnosis.facts import Device, Facts
from longnet_dist.extras import DESTRUCTIVE_DEEPSPEED, MODULES, install_command

GIB = 2**30
HOPPER = 9  # major compute capability
LEAST_SHARED_MEMORY = GIB  # NCCL takes tens of MiB for each pair of GPUs, and containers have 64 MiB by default
LEAST_OPEN_FILES = 1024
LEAST_FREE_DISK = 2 * GIB
PURPOSES = {
    "train": "longnet train and quickstart",
    "cuda": "the fastest linear layers on Hopper GPUs",
}
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Finding:
    """Something that a person can mend.

    Attributes:
        fault: what is installed is broken; else it works, but slower, or something is absent.
        what: was found.
        remedy: what to do.
    """

    fault: bool
    what: str
    remedy: str


def findings(facts: Facts) -> list[Finding]:
    """Judge facts: faults first."""
    found = [*_packages(facts), *_gpus(facts), *_kernels(facts), *_checks(facts), *_collectives(facts), *_host(facts)]
    return sorted(found, key=lambda finding: not finding.fault)


def _packages(facts: Facts) -> Iterator[Finding]:
    for package in facts.packages:
        if package.error:
            title = f"{package.distribution} {package.version}"
            reinstall = f"pip install --force-reinstall {package.distribution}"
            yield Finding(True, f"{title} is installed, but its import fails: {package.error}", reinstall)
        elif package.extra == "core" and package.version is None:
            yield Finding(True, f"{package.distribution} is not installed", "pip install longnet-dist")
        elif package.module == "deepspeed" and package.version in DESTRUCTIVE_DEEPSPEED:
            harm = "makes every weight NaN after one gradient that is not finite"
            yield Finding(True, f"DeepSpeed {package.version} {harm}", install_command("train"))
    if absent := _absent(facts, "train"):
        yield Finding(False, f"{PURPOSES['train']} need {', '.join(absent)}", install_command("train"))
    hopper = any(device.major == HOPPER for device in facts.devices)
    if hopper and "quack" in _absent(facts, "cuda"):
        yield Finding(False, f"{PURPOSES['cuda']} need quack", install_command("cuda"))


def _absent(facts: Facts, extra: str) -> list[str]:
    installed = {package.module for package in facts.packages if package.version is not None}
    return [module for module in MODULES[extra] if module not in installed]


def _gpus(facts: Facts) -> Iterator[Finding]:
    driver, torch = facts.host.driver, facts.torch
    if failure := torch.get("failure"):
        yield Finding(
            True, f"torch does not say what it was built for: {failure}", "pip install --force-reinstall torch"
        )
    elif driver and not torch.get("gpus") and torch:
        if facts.host.hidden_gpus:
            yield Finding(False, "CUDA_VISIBLE_DEVICES hides the GPUs of this machine", "unset CUDA_VISIBLE_DEVICES")
        elif not facts.host.gpu_nodes:
            what = f"NVIDIA's driver {driver} is here, but no GPU was given to this container"
            yield Finding(False, what, "if one is meant: docker run --gpus all, or srun --gpus=1")
        elif not torch.get("cuda"):
            what = f"NVIDIA's driver {driver} is here, but this torch was built without CUDA"
            yield Finding(False, what, "install torch's CUDA build: pip install --force-reinstall torch")
        else:
            why = f": {torch['warning']}" if torch.get("warning") else ""
            what = f"torch (CUDA {torch['cuda']}) sees no GPU, though NVIDIA's driver {driver} is here{why}"
            yield Finding(True, what, "update the driver, or install a torch that was built for an older CUDA")
    for title, _ in groupby(device.title for device in facts.devices if device.is_gpu and device.planned_as is None):
        what = f"longnet plan does not know the {title}, so it predicts no times and training shows no MFU"
        yield Finding(False, what, "give its dense bf16 peak: train.peak_tflops=…")


def _kinds(facts: Facts) -> list[Device]:
    """One device of each kind."""
    return list({(device.title, device.capability): device for device in reversed(facts.devices)}.values())[::-1]


def _kernels(facts: Facts) -> Iterator[Finding]:
    for device in _kinds(facts):
        if device.failure:
            yield Finding(True, f"no kernels can be chosen on {device.name}: {device.failure}", _reinstall(facts))
        slower: dict[tuple[str, str], list[str]] = {}
        for choice in device.kernels:
            # float32 is a choice of the caller's, and slow everywhere.
            if choice["remedy"] and (choice["dtype"] in HALVES or not device.is_gpu):
                where = f"{choice['dtype']} {choice['head_dim']}"
                slower.setdefault((choice["reason"], choice["remedy"]), []).append(where)
        for (reason, remedy), calls in slower.items():
            what = f"attention on {device.name} takes slower kernels for {', '.join(calls)}: {reason}"
            yield Finding(False, what, remedy)
        reason = device.matmul.get("reason", "")
        if reason and device.major == HOPPER and "quack" not in _absent(facts, "cuda"):
            what = f"linear layers on {device.name} take torch's kernels: quack {reason}"
            yield Finding(False, what, install_command("cuda"))
        if device.is_gpu and device.row_functions == "triton" and not facts.host.compiler:
            yield Finding(False, "Triton needs a C compiler, and none is on PATH", "install gcc and Python's headers")


def _reinstall(facts: Facts) -> str:
    return f"pip install --force-reinstall --no-deps longnet-dist=={facts.version}"


def _checks(facts: Facts) -> Iterator[Finding]:
    report_it = "report it with the output of longnet doctor --json, and use backend='reference' until then"
    for device in facts.devices:
        compiler = "Triton needs gcc and Python's headers (python3-dev); else " if device.is_gpu else ""
        for check in device.checks:
            where = f"attention on {device.name}, {check.dtype}, head dim {check.head_dim},"
            if check.failure or check.error is None:
                yield Finding(True, f"{where} fails: {check.failure or 'no result'}", compiler + report_it)
            elif not check.right:
                what = f"{where} is wrong: relative error {check.error:.2g}, where rounding gives {check.allowed:.2g}"
                yield Finding(True, what, report_it)


def _collectives(facts: Facts) -> Iterator[Finding]:
    for collective in facts.collectives:
        if collective.failure:
            what = f"{collective.ranks} ranks cannot add by {collective.backend}: {collective.failure}"
            if collective.backend == "gloo":
                yield Finding(True, what, "name an interface that reaches this machine: export GLOO_SOCKET_IFNAME=lo")
            else:
                yield Finding(True, what, "see what NCCL says: NCCL_DEBUG=INFO longnet doctor")
    if facts.torch and not facts.torch.get("failure") and not facts.torch.get("gloo"):
        yield Finding(False, "this torch was built without gloo, which joins ranks on CPUs", "pip install torch")
    if len(facts.torch.get("gpus") or []) > 1 and not facts.torch.get("nccl"):
        yield Finding(False, "this torch was built without NCCL, which joins GPUs", "train on one GPU, or on Linux")


def _host(facts: Facts) -> Iterator[Finding]:
    host, many = facts.host, len(facts.torch.get("gpus") or []) > 1
    if many and host.shared_memory_bytes is not None and host.shared_memory_bytes < LEAST_SHARED_MEMORY:
        what = f"/dev/shm has {host.shared_memory_bytes / 2**20:,.0f} MiB, in which NCCL's ranks exchange data"
        yield Finding(False, what, "start the container with --shm-size 8g")
    if host.open_files is not None and 0 < host.open_files < LEAST_OPEN_FILES:
        what = f"a process may open {host.open_files} files, and ranks, checkpoints and compilers want more"
        yield Finding(False, what, f"ulimit -n {LEAST_OPEN_FILES}")
    if host.free_disk_bytes < LEAST_FREE_DISK:
        what = (
            f"the current folder has {host.free_disk_bytes / GIB:.1f} GiB left; checkpoints take 12 bytes a parameter"
        )
        yield Finding(False, what, "make room, or write elsewhere: train.output_dir=…")
    half_set = {"RANK", "WORLD_SIZE"} & set(host.launch_variables)
    if half_set and len(host.launch_variables) < 3:
        what = f"the environment has {', '.join(sorted(half_set))} of a launcher, but not all that it sets"
        yield Finding(False, what, f"unset {' '.join(sorted(half_set))}")
