"""Which rank or host is not like the others, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from longnet_dist.cli.diagnosis.cluster import RankFacts
from longnet_dist.cli.diagnosis.findings import Finding

LEAST_SHARE = 0.85  # of the median of the others, below which a rate is an outlier
MOST_SECONDS_APART = 5.0
RATES = {
    "matmul_tflops": (
        "matmuls on rank {rank}, {device}, run at {value:.3g} TFLOP/s, {share:.0%} of the others' {others:.3g}{clocks}",
        "look for another job on it, or for a throttled clock (nvidia-smi -q -d CLOCK,TEMPERATURE,PERFORMANCE)",
    ),
    "local_gbytes": (
        "the ranks of the host exchange {value:.3g} GB/s, {share:.0%} of the others' {others:.3g}",
        "compare nvidia-smi topo -m with another host, and see NCCL_DEBUG=INFO",
    ),
    "network_gbytes": (
        "the network of the host gives {value:.3g} GB/s, {share:.0%} of the others' {others:.3g}",
        "compare its network cards and cables with another host (ibstat, ethtool)",
    ),
}


def compare(ranks: Sequence[RankFacts], folder: Path) -> list[Finding]:
    """Judge the facts of all ranks; what is found is a fault that would slow or end a run.

    Args:
        ranks: their facts, in order.
        folder: that they should share.
    """
    return [*_failures(ranks), *_differences(ranks), *_outliers(ranks), *_clocks(ranks), *_folder(ranks, folder)]


def report_ranks(ranks: Sequence[RankFacts], findings: Sequence[Finding]) -> str:
    """Return the report of all ranks as text; the last lines are the findings."""
    lines = ["ranks"]
    for facts in ranks:
        rate = "no matmul" if facts.matmul_tflops is None else f"{facts.matmul_tflops:.3g} TFLOP/s"
        clocks = f", {facts.clocks}" if facts.clocks else ""
        lines.append(f"  rank {facts.rank} on {facts.host}: {facts.device}, {rate}{clocks}")
    lines += ["", "hosts"]
    for host, members in _hosts(ranks).items():
        local, network = _rate(members[0].local_gbytes), _rate(members[0].network_gbytes)
        many = f"{len(members)} rank{'s' * (len(members) > 1)}"
        lines.append(f"  {host}: {many}, all-to-all inside {local}, to another host {network}")
    lines.append(f"  all ranks: all-reduce {_rate(ranks[0].all_reduce_gbytes)}")
    lines += ["", "versions", f"  {', '.join(f'{name} {version}' for name, version in ranks[0].versions.items())}"]
    lines += ["", "findings"]
    lines += [f"  FAULT: {finding.what}. Do: {finding.remedy}" for finding in findings]
    return "\n".join(lines if findings else [*lines, "  none: the ranks are alike"])


def _rate(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g} GB/s"


def _hosts(ranks: Sequence[RankFacts]) -> Mapping[str, list[RankFacts]]:
    hosts: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def _leave_out(host: str) -> str:
    return f"else leave the host out (srun --exclude={host})"


def _failures(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    for facts in ranks:
        if facts.failure:
            what = f"host {facts.host}: rank {facts.rank}, {facts.device}, fails: {facts.failure}"
            yield Finding(True, what, f"run longnet doctor there alone, {_leave_out(facts.host)}")


def _differences(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Yield each version and kind of device that a host has and most others have not."""
    for name in dict.fromkeys(["device", *(key for facts in ranks for key in facts.versions)]):
        values = [facts.device if name == "device" else facts.versions.get(name, "absent") for facts in ranks]
        usual = max(dict.fromkeys(values), key=values.count)
        others = [facts for facts, value in zip(ranks, values, strict=True) if value != usual]
        for host, members in _hosts(others).items():
            value = values[members[0].rank]
            title = "the device" if name == "device" else f"the version of {name}"
            what = f"host {host}: {title} is {value}, and {usual} on the others"
            yield Finding(True, what, f"install the same on all hosts, {_leave_out(host)}")


def _outliers(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    for name, (what, remedy) in RATES.items():
        # Of a host each rank has the same rates but that of its own device.
        members = ranks if name == "matmul_tflops" else [group[0] for group in _hosts(ranks).values()]
        rates = {facts.rank: getattr(facts, name) for facts in members if getattr(facts, name) is not None}
        for facts in members:
            others = [rate for rank, rate in rates.items() if rank != facts.rank]
            value = rates.get(facts.rank)
            if value is None or not others or value >= LEAST_SHARE * median(others):
                continue
            clocks = f" ({facts.clocks})" if facts.clocks else ""
            shown = {"value": value, "others": median(others), "share": value / median(others), "clocks": clocks}
            text = what.format(rank=facts.rank, device=facts.device, **shown)
            yield Finding(True, f"host {facts.host}: {text}", f"{remedy}, {_leave_out(facts.host)}")


def _clocks(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    middle = median(facts.seconds_ahead for facts in ranks)
    for host, members in _hosts(ranks).items():
        ahead = members[0].seconds_ahead - middle
        if abs(ahead) > MOST_SECONDS_APART:
            how = "ahead of" if ahead > 0 else "behind"
            what = f"host {host}: its clock is {abs(ahead):.0f} s {how} the others"
            yield Finding(True, what, "synchronize the clocks of all hosts (chronyc tracking)")


def _folder(ranks: Sequence[RankFacts], folder: Path) -> Iterator[Finding]:
    if not ranks[0].sees_folder:
        what = f"host {ranks[0].host}: rank 0 cannot make a file in {folder}"
        yield Finding(True, what, "choose a folder that it may write: longnet doctor --folder DIR")
        return
    for host, members in _hosts(ranks).items():
        if not all(facts.sees_folder for facts in members):
            what = f"host {host}: a file that rank 0 makes in {folder} does not appear there"
            yield Finding(True, what, "mount the same file system on all hosts; a run's folder must be shared")
