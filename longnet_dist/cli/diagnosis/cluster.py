"""What the ranks of a launcher measure of their devices, hosts and network, all at the same time."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longnet_dist.checkpoint.identity import code_versions
from longnet_dist.cli.diagnosis.facts import host
from longnet_dist.comm.launch_env import LaunchEnvironment, process_group

TIMEOUT = timedelta(minutes=5)
ROUNDS = 5  # of which the fastest counts
MATMUL_SIDE = {"cuda": 8192, "cpu": 768}
MATMULS = {"cuda": 20, "cpu": 1}  # of a round
MESSAGE_BYTES = {"cuda": 2**28, "cpu": 2**22}
FOLDER_SECONDS = 10.0  # for which a network file system may not show a new file
CLOCKS = "clocks.sm,clocks.max.sm,temperature.gpu,power.draw"


@dataclass(frozen=True)
class RankFacts:
    """The RankFacts are what one rank has found out.

    Attributes:
        rank: of the launch.
        host: name of its machine.
        device: title of its GPU, or of the CPU.
        versions: of Python, this package with a checksum of its sources, torch, DeepSpeed, NVIDIA's driver.
        clocks: of a GPU, as nvidia-smi says it; empty on a CPU.
        matmul_tflops: the fastest of some large matmuls, bf16 on a GPU and float32 on a CPU.
        local_gbytes: sent to the other ranks of the host in an all-to-all, GB/s of this rank; None if it is alone.
        network_gbytes: the same between the first ranks of this host and of a neighbouring one, whichever is faster.
        all_reduce_gbytes: GB/s of an all-reduce over all ranks, as NCCL's tests count them; None for one rank.
        seconds_ahead: of the host's clock before that of rank 0.
        sees_folder: whether a file that rank 0 has made in the folder appears here.
        failure: why something could not be measured.
    """

    rank: int
    host: str
    device: str
    versions: dict[str, str]
    clocks: str = ""
    matmul_tflops: float | None = None
    local_gbytes: float | None = None
    network_gbytes: float | None = None
    all_reduce_gbytes: float | None = None
    seconds_ahead: float = 0.0
    sees_folder: bool = True
    failure: str = ""


def measure_ranks(launch: LaunchEnvironment, folder: Path) -> list[RankFacts]:
    """Measure on every rank of a launch, all of which must call; return the facts of all ranks, on every rank.

    Args:
        launch: which process this one is.
        folder: that all ranks should share.

    Raises:
        ConfigError: the ranks do not meet.
    """
    device = launch.device()
    launch.share_cores()
    with process_group(launch, device, TIMEOUT):
        return measure(device, folder)


def measure(device: torch.device, folder: Path) -> list[RankFacts]:
    """Do what :func:`measure_ranks` does, where a process group exists already."""
    rank = dist.get_rank()
    names = _gathered(socket.gethostname())
    try:
        tflops, failure = matmul_tflops(device), ""
    except RuntimeError as error:
        tflops, failure = None, f"matmul: {str(error).splitlines()[0]}"
    facts = RankFacts(
        rank=rank,
        host=names[rank],
        device=_title(device),
        versions={"Python": platform.python_version(), **code_versions(), **_driver()},
        clocks=_clocks(device),
        matmul_tflops=tflops,
        local_gbytes=_local(names, device),
        network_gbytes=_network(names, device),
        all_reduce_gbytes=_all_reduce(device),
        seconds_ahead=_seconds_ahead(),
        sees_folder=_sees_folder(folder),
        failure=failure,
    )
    return _gathered(facts)


def matmul_tflops(device: torch.device) -> float:
    """Return the rate of the fastest round of matmuls on this device, in TFLOP/s."""
    side, number = MATMUL_SIDE[device.type], MATMULS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))

    def run() -> None:
        for _ in range(number):
            torch.mm(a, b)

    return 2 * side**3 * number / _fastest(run, device) / 1e12


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of some rounds, after one to warm up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _local(names: Sequence[str], device: torch.device) -> float | None:
    """Return the rate of an all-to-all among the ranks of this host; all hosts measure at the same time."""
    found = None
    for name in dict.fromkeys(names):
        ranks = [rank for rank, other in enumerate(names) if other == name]
        with _group(ranks) as group:
            if group is not None and len(ranks) > 1:
                found = _all_to_all(group, len(ranks), device)
    return found


def _network(names: Sequence[str], device: torch.device) -> float | None:
    """Return the faster rate between this host and its two neighbours in a ring; one pair measures at a time."""
    firsts = [names.index(name) for name in dict.fromkeys(names)]
    pairs = list(zip(firsts, firsts[1:] + firsts[:1], strict=True)) if len(firsts) > 2 else [firsts[:2]]
    rates: dict[str, list[float]] = {}
    for pair in pairs if len(firsts) > 1 else []:
        with _group(pair) as group:
            mine = _all_to_all(group, 2, device) if group is not None else None
        for name, rate in zip(names, _gathered(mine), strict=True):
            if rate is not None:
                rates.setdefault(name, []).append(rate)
    return max(rates.get(names[dist.get_rank()], [0.0])) if rates else None


def _all_to_all(group: Any, ranks: int, device: torch.device) -> float:
    size = MESSAGE_BYTES[device.type] // 4 // ranks * ranks
    sent, received = (torch.zeros(size, device=device) for _ in range(2))
    seconds = _fastest(lambda: dist.all_to_all_single(received, sent, group=group), device)
    return 4 * size * (ranks - 1) / ranks / seconds / 1e9


def _all_reduce(device: torch.device) -> float | None:
    ranks = dist.get_world_size()
    if ranks == 1:
        return None
    numbers = torch.zeros(MESSAGE_BYTES[device.type] // 4, device=device)
    seconds = _fastest(lambda: dist.all_reduce(numbers), device)
    return 4 * numbers.numel() * 2 * (ranks - 1) / ranks / seconds / 1e9


@contextmanager
def _group(ranks: Sequence[int]) -> Iterator[Any]:
    """Make a group of some ranks; every rank must call, and gets None if it is not one of them."""
    group = dist.new_group(list(ranks), timeout=TIMEOUT)
    is_member = dist.get_rank() in ranks
    yield group if is_member else None
    if is_member:
        dist.destroy_process_group(group)


def _seconds_ahead() -> float:
    dist.barrier()
    times = _gathered(time.time())
    return float(times[dist.get_rank()] - times[0])


def _sees_folder(folder: Path) -> bool:
    """Say whether a file that rank 0 makes in a folder appears on this rank."""
    made = [f".longnet_doctor_{secrets.token_hex(4)}"]
    dist.broadcast_object_list(made)
    file = folder / made[0]
    if dist.get_rank() == 0:
        with suppress(OSError):
            file.touch()
    dist.barrier()
    deadline = time.monotonic() + FOLDER_SECONDS
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    dist.barrier()
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    return seen


def _gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _driver() -> dict[str, str]:
    version = host(os.environ).driver
    return {"NVIDIA's driver": version} if version else {}


def _clocks(device: torch.device) -> str:
    """Return what nvidia-smi says of a GPU: its clock, the highest one, temperature and power; empty if nothing."""
    program = shutil.which("nvidia-smi")
    if device.type != "cuda" or program is None:
        return ""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = [program, f"--id={uuid}", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else ""
