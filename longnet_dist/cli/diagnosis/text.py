"""Facts and findings as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from longnet_dist.cli.diagnosis.facts import Device, Facts, Package
from longnet_dist.cli.diagnosis.findings import Finding
from longnet_dist.extras import MODULES, install_command

GIB = 2**30


def report(facts: Facts, findings: Sequence[Finding]) -> str:
    """Return the whole report; the last lines are the findings.

    Args:
        facts: about the machine.
        findings: what to do about them.
    """
    sections = {
        "versions": _versions(facts),
        "extras": _extras(facts.packages),
        "devices": _devices(facts),
        "ranks": _ranks(facts),
        "machine": _machine(facts),
        "findings": _findings(findings),
    }
    return "\n\n".join("\n".join([name, *(f"  {line}" for line in lines)]) for name, lines in sections.items())


def _versions(facts: Facts) -> Iterator[str]:
    yield f"longnet-dist {facts.version}, Python {facts.host.python}, {facts.host.system}"
    cuda = facts.torch.get("cuda")
    yield f"NVIDIA driver {facts.host.driver or 'absent'}, torch's CUDA {cuda or 'absent'}"
    for _, group in groupby((p for p in facts.packages if p.extra in ("core", "torch")), lambda p: p.extra):
        yield ", ".join(map(_package, group))


def _package(package: Package) -> str:
    name = package.distribution
    if package.error:
        return f"{name} {package.version} (broken)"
    return f"{name} {package.version}" if package.version else f"{name} absent"


def _extras(packages: Sequence[Package]) -> Iterator[str]:
    for extra in MODULES:
        members = [package for package in packages if package.extra == extra]
        line = f"{extra:<11}{', '.join(map(_package, members))}"
        yield line if all(package.version for package in members) else f"{line}   {install_command(extra)}"


def _devices(facts: Facts) -> Iterator[str]:
    shown: set[Any] = set()
    for device in facts.devices:
        memory = f", {device.memory_bytes / GIB:,.1f} GiB" if device.memory_bytes else ""
        capability = f", compute capability {'.'.join(map(str, device.capability))}" if device.capability else ""
        yield f"{device.name}: {device.title}{memory}{capability}"
        if (kind := (device.title, device.capability)) not in shown:
            shown.add(kind)
            yield from (f"  {line}" for line in _kernels(device))
        for check in device.checks:
            result = check.failure or f"relative error {check.error:.1e}, rounding allows {check.allowed:.1e}"
            verdict = "right" if check.right else "WRONG"
            yield f"  check {check.dtype}, head dim {check.head_dim}, forward and backward: {verdict} ({result})"
    if not facts.devices:
        yield "none, for torch cannot be used"


def _kernels(device: Device) -> Iterator[str]:
    if device.failure:
        yield f"kernels unknown: {device.failure}"

    def same(choice: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(value) for key, value in choice.items() if key != "head_dim")

    for _, group in groupby(device.kernels, same):
        choices = list(group)
        first, dims = choices[0], ", ".join(str(choice["head_dim"]) for choice in choices)
        backend, forward, backward = (first[key] for key in ("backend", "forward", "backward"))
        kinds = backend if forward == backend == backward else f"{backend} (forward {forward}, backward {backward})"
        reason = f"; {first['reason']}" if first["reason"] else ""
        yield f"attention {first['dtype']}, head dim {dims}: {kinds}{reason}"
    if device.matmul:
        reason = f" (quack {device.matmul['reason']})" if device.matmul["reason"] else ""
        yield f"linear layers of compiled blocks: {device.matmul['backend']}{reason}"
    if device.row_functions:
        yield f"norms, activations and their gradients: {device.row_functions}"


def _ranks(facts: Facts) -> Iterator[str]:
    tried = {collective.backend: collective for collective in facts.collectives}
    for backend, title in (("gloo", "gloo (CPUs)"), ("nccl", f"NCCL {facts.torch.get('nccl_version', '')}".rstrip())):
        if collective := tried.get(backend):
            result = "a sum is right" if not collective.failure else f"FAILED, {collective.failure}"
            yield f"{title}: {collective.ranks} processes, {result}"
        else:
            yield f"{title}: {'no GPU to try it on' if facts.torch.get(backend) else 'absent'}"


def _machine(facts: Facts) -> Iterator[str]:
    host = facts.host
    memory = "unknown" if host.memory_bytes is None else f"{host.memory_bytes / GIB:,.1f} GiB"
    if host.memory_bytes and host.physical_bytes and host.memory_bytes < host.physical_bytes:
        memory += f" (limit of the control group; the machine has {host.physical_bytes / GIB:,.1f})"
    yield f"cores {host.usable_cores} of {host.cores}, memory {memory}"
    shared = "absent" if host.shared_memory_bytes is None else f"{host.shared_memory_bytes / GIB:,.2f} GiB"
    limit = "unknown" if host.open_files is None else "unlimited" if host.open_files < 0 else f"{host.open_files:,}"
    yield f"/dev/shm {shared}, open files {limit}, free disk here {host.free_disk_bytes / GIB:,.1f} GiB"
    yield f"C compiler {host.compiler or 'absent'}"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    for finding in findings:
        yield f"{'FAULT' if finding.fault else 'note'}: {finding.what}. Do: {finding.remedy}"
    if not findings:
        yield "none: nothing to do"
