"""The launcher describes this process (rank, world size, address) in the environment, which is read here, once."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from longnet_dist.errors import ConfigError
from longnet_dist.machine import usable_cores, user_threads
from longnet_dist.private_interfaces import abort_process_group

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# mpirun sets the number of ranks: Open MPI under the first name, Hydra (MPICH, Intel MPI) under the second. SLURM's
# imitation of Hydra sets the second too, but not the third.
OPEN_MPI_SIZE, HYDRA_SIZE, HYDRA_ONLY = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"
# srun sets this for its tasks alone. A batch script, which is no rank, also sees SLURM_NTASKS.
SRUN_SIZE = "SLURM_STEP_NUM_TASKS"
# As in LaunchEnvironment: rank, world size, local rank, local world size.
SRUN_VARIABLES = ("SLURM_PROCID", SRUN_SIZE, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
# Linux takes ephemeral ports from 32768 upwards, so these are free of them.
FIRST_PORT, NUM_PORTS, LAST_PORT = 16384, 16384, 65535
# Clusters may start a rank some seconds before they know the name of rank 0's machine.
NAME_SECONDS = 60.0


@dataclass(frozen=True)
class LaunchEnvironment:
    """A LaunchEnvironment says which of the processes of a run this one is.

    Attributes:
        rank: index of this process among all processes.
        world_size: number of all processes.
        local_rank: index among the processes of this machine.
        local_world_size: number of processes on this machine.
        meeting_point: address at which rank 0 waits for the others, ``tcp://address:port``; None for one process.
        sees_one_gpu: the launcher hides the GPUs of the other ranks from this one.
        attempt: number of times that torchrun has restarted the ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    meeting_point: str | None = None
    sees_one_gpu: bool = False
    attempt: int = 0

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> LaunchEnvironment:
        """Detect the launcher from environment variables, in this order:

        1. ``RANK`` or ``WORLD_SIZE`` is set: torchrun or DeepSpeed's launcher, which mpirun or srun may have started.
        2. mpirun (Open MPI, MPICH, Intel MPI) has set its variables: MPI gives the ranks, through mpi4py.
        3. srun has set its variables: each task is a rank.
        4. Otherwise it is a run of one process, also in the batch script of a SLURM job.

        Under mpirun and srun, ``MASTER_ADDR`` and ``MASTER_PORT`` override the meeting point that is derived.

        Args:
            environ: the environment variables.

        Raises:
            ConfigError: a variable is missing, no number or no possible one; mpi4py is missing, or has loaded another
                MPI.
        """
        if _has_variables(environ):
            return _checked(_from_variables(environ), TORCHRUN_VARIABLES[:4])
        if _has_mpi(environ):
            return _from_mpi(environ)
        if SRUN_SIZE in environ:
            return _checked(_from_srun(environ), SRUN_VARIABLES)
        return cls()

    def device(self) -> torch.device:
        """Return the GPU that belongs to this rank alone, or the CPU if the machine has no GPU.

        Raises:
            ConfigError: the machine has more ranks than GPUs.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.sees_one_gpu and torch.cuda.device_count() == 1:
            return torch.device("cuda", 0)
        if self.local_world_size > torch.cuda.device_count():
            raise ConfigError(
                f"every rank needs a GPU of its own, but {self.local_world_size} ranks share a machine with "
                f"{torch.cuda.device_count()}; start fewer a machine (torchrun --nproc_per_node, mpirun -n, srun "
                "--ntasks-per-node), or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        return torch.device("cuda", self.local_rank)

    def share_cores(self) -> None:
        """Limit torch's threads to this rank's share of the cores, unless the user sets ``OMP_NUM_THREADS``.

        By default each rank would use all cores.
        """
        torch.set_num_threads(user_threads(os.environ) or max(1, usable_cores() // self.local_world_size))


def launcher_of(environ: Mapping[str, str]) -> str:
    """Return the name of the launcher that started this process as one of several ranks, or an empty string.

    Launchers are tried in the order of :meth:`LaunchEnvironment.read`. A single task of srun does not count: the shell
    of ``srun --pty bash`` is one, and a command in it may start its own ranks.
    """
    if _has_variables(environ):
        return "torchrun or DeepSpeed's launcher"
    if _has_mpi(environ):
        return "mpirun"
    return "srun" if environ.get(SRUN_SIZE, "1") != "1" else ""


def meeting_store(launch: LaunchEnvironment, timeout: timedelta) -> Any:
    """Return the key-value store through which the ranks exchange addresses; for one process, its own memory.

    torchrun keeps one store over all restarts (torch 2.13). It still has the dead addresses of earlier attempts, so
    each attempt uses a key prefix of its own.

    Args:
        launch: which process this one is.
        timeout: how long a request waits for the other ranks.

    Raises:
        ConfigError: the ranks do not meet at the meeting point, or its address is unknown here.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    meeting_point = launch.meeting_point or "env://"  # env:// if a caller made the launch environment
    _await_name(launch, min(NAME_SECONDS, timeout.total_seconds()))
    try:
        store, _, _ = next(rendezvous(meeting_point, launch.rank, launch.world_size, timeout=timeout))
    except dist.DistError as error:
        raise _not_met(launch, error) from None
    return dist.PrefixStore(f"attempt_{launch.attempt}", store)  # type: ignore[attr-defined]


@contextmanager
def process_group(
    launch: LaunchEnvironment, device: torch.device, timeout: timedelta, store: Any = None
) -> Iterator[None]:
    """Join all processes of the run: with NCCL on GPUs, with gloo on CPUs.

    It is a collective: every rank must enter the context. A run of one process needs no address and no port.

    Args:
        launch: which process this one is.
        device: the device of this rank.
        timeout: how long a collective waits for the other ranks.
        store: from :func:`meeting_store`, if the caller has it already.

    Raises:
        ConfigError: the ranks do not meet at the meeting point.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meeting_store(launch, timeout) if store is None else store,
            timeout=timeout,
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise _not_met(launch, error) from None
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            # Destroying the group would wait for collectives of this rank that the others, still running, never join.
            abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _await_name(launch: LaunchEnvironment, seconds: float) -> None:
    """Refuse an address that this machine does not know, for which torch would wait until its time-out."""
    point = urlsplit(launch.meeting_point or "")
    deadline = time.monotonic() + seconds
    while point.hostname:
        try:
            socket.getaddrinfo(point.hostname, point.port)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that can be none, such as one of 64 letters
            if time.monotonic() > deadline or isinstance(error, UnicodeError):
                raise ConfigError(
                    f"rank {launch.rank} of {launch.world_size} cannot find the machine {point.hostname}, where rank 0 "
                    f"should wait ({error}); set MASTER_ADDR to a name or an address of rank 0's machine that every "
                    "machine knows"
                ) from None
        time.sleep(1.0)


def _not_met(launch: LaunchEnvironment, error: Exception) -> ConfigError:
    return ConfigError(
        f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.meeting_point}: {error}; "
        "check that every rank was started, that every machine reaches this address (else set MASTER_ADDR to one "
        "of rank 0's machine), and that nothing else uses the port (else set MASTER_PORT to a free one)"
    )


def _has_variables(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ or "WORLD_SIZE" in environ


def _has_mpi(environ: Mapping[str, str]) -> bool:
    return OPEN_MPI_SIZE in environ or HYDRA_ONLY in environ


def _from_variables(environ: Mapping[str, str]) -> LaunchEnvironment:
    """Read the variables of torchrun, or of DeepSpeed's launcher, whose name for LOCAL_WORLD_SIZE is LOCAL_SIZE."""
    if "LOCAL_SIZE" in environ:
        environ = {"LOCAL_WORLD_SIZE": environ["LOCAL_SIZE"]} | dict(environ)
    given = [name for name in TORCHRUN_VARIABLES if name in environ]
    if missing := [name for name in TORCHRUN_VARIABLES if name not in given]:
        raise ConfigError(
            f"the environment sets {', '.join(given)} but not {', '.join(missing)}; start the ranks with torchrun, "
            f"mpirun or srun, or unset {', '.join(given)} for a run of one process"
        )
    rank, world_size, local_rank, local_world_size = (_number(environ, name) for name in TORCHRUN_VARIABLES[:4])
    meeting_point = _meeting_point(environ["MASTER_ADDR"], _number(environ, "MASTER_PORT"))
    attempt = _number(environ, "TORCHELASTIC_RESTART_COUNT", lambda: 0)
    return LaunchEnvironment(rank, world_size, local_rank, local_world_size, meeting_point, attempt=attempt)


def _from_mpi(environ: Mapping[str, str]) -> LaunchEnvironment:
    """Ask MPI for the ranks and broadcast the meeting point; all later communication is torch.distributed's."""
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=False)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"ranks that mpirun started find each other through mpi4py, which does not load ({error}); install it "
            "with its extra, pip install 'longnet-dist[mpi]', beside this mpirun's MPI, or start them with torchrun"
        ) from None
    mine = not MPI.Is_initialized()
    if mine:
        MPI.Init()
    world = MPI.COMM_WORLD
    started = _number(environ, OPEN_MPI_SIZE if OPEN_MPI_SIZE in environ else HYDRA_SIZE)
    if world.size != started:
        raise ConfigError(
            f"mpirun started {started} ranks, but mpi4py sees {world.size}: it has loaded another MPI "
            f"({MPI.Get_library_version().splitlines()[0]}); start with the mpirun of that one, or let mpi4py load the "
            "library of this mpirun (MPI4PY_LIBMPI=/path/to/libmpi.so)"
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    meeting_point = None
    if world.rank == 0:
        address = environ.get("MASTER_ADDR") or ("127.0.0.1" if machine.size == world.size else _own_address())
        meeting_point = _meeting_point(address, _number(environ, "MASTER_PORT", _free_port))
    meeting_point = world.bcast(meeting_point)
    launch = LaunchEnvironment(world.rank, world.size, machine.rank, machine.size, meeting_point)
    if mine:
        # If MPI stayed open, a rank that fails would wait for the others in MPI's own exit handler.
        machine.Free()
        MPI.Finalize()
    return launch


def _from_srun(environ: Mapping[str, str]) -> LaunchEnvironment:
    """Read the variables that SLURM sets for a task of srun."""
    rank, world_size, local_rank, node = (
        _number(environ, name) for name in ("SLURM_PROCID", SRUN_SIZE, "SLURM_LOCALID", "SLURM_NODEID")
    )
    try:
        local_world_size = _tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])[node]
        head = _first_host(environ["SLURM_STEP_NODELIST"])
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"srun must set SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST for {world_size} tasks ({error!r}); "
            f"start the ranks with srun, or unset {SRUN_SIZE} for a run of one process"
        ) from None
    # Every task must derive the same port without communication; jobs on one machine should get different ones.
    own_port = FIRST_PORT + (16 * _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")) % NUM_PORTS
    address = environ.get("MASTER_ADDR") or _node_address(head)
    meeting_point = _meeting_point(address, _number(environ, "MASTER_PORT", lambda: own_port))
    sees_one_gpu = environ.get("SLURM_GPUS_PER_TASK") == "1"
    return LaunchEnvironment(rank, world_size, local_rank, local_world_size, meeting_point, sees_one_gpu)


def _number(environ: Mapping[str, str], name: str, default: Callable[[], int] | None = None) -> int:
    text = environ.get(name)
    if text is None and default:
        return default()
    if text is None or not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"the launcher must set {name} to a number, but it is {text!r}; set it, or use torchrun")
    return int(text)


def _checked(launch: LaunchEnvironment, names: tuple[str, ...]) -> LaunchEnvironment:
    """Refuse numbers with which the ranks would wait for a rank that cannot come.

    Args:
        launch: as the launcher describes it.
        names: of the variables of rank, world size, local rank and local world size.
    """
    rank, world_size, local_rank, local_world_size = names
    rules = {
        f"{world_size} must be at least 1": launch.world_size >= 1,
        f"{rank} must be less than {world_size}": launch.rank < launch.world_size,
        f"{local_world_size} must be at least 1 and at most {world_size}": 1
        <= launch.local_world_size
        <= launch.world_size,
        f"{local_rank} must be less than {local_world_size}": launch.local_rank < launch.local_world_size,
    }
    for rule, holds in rules.items():
        if not holds:
            values = (launch.rank, launch.world_size, launch.local_rank, launch.local_world_size)
            given = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
            raise ConfigError(
                f"{rule}, but the environment says {given}; let torchrun, mpirun or srun set these, or unset "
                f"{', '.join(names)} for a run of one process"
            )
    return launch


def _meeting_point(address: str, port: int) -> str:
    if not 1 <= port <= LAST_PORT:
        raise ConfigError(f"MASTER_PORT must be a port from 1 to {LAST_PORT}, not {port}; set it to a free one")
    address = address.removeprefix("[").removesuffix("]") if address.count(":") > 1 else address
    if not address or re.search(r"[\s/?#@\\\[\]]", address) or (":" in address and not _is_ipv6(address)):
        raise ConfigError(
            f"MASTER_ADDR must be the name or address of rank 0's machine alone, not {address!r}; set it to that, and "
            "the port as MASTER_PORT"
        )
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _is_ipv6(address: str) -> bool:
    with suppress(ValueError):
        return bool(ipaddress.IPv6Address(address))
    return False


def _own_address() -> str:
    """Return an address of this machine for the others.

    It is the address of the host name, or if that is a loopback address, the source address of the default route.
    """
    name = socket.gethostname()
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect(
            ("192.0.2.1", 9)
        )  # no machine has this address (RFC 5737); connecting a UDP socket sends nothing
        return str(unsent.getsockname()[0])
    return name


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _tasks_of_nodes(text: str) -> list[int]:
    """Return the tasks of each node: SLURM's ``2(x3),1`` means two on each of three nodes, one on the fourth."""
    tasks: list[int] = []
    for part in text.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: ``gpu03-ib`` for ``gpu[03-07,9]-ib,login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        raise ValueError(f"no host in {nodes!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _node_address(node: str) -> str:
    """Return the address at which SLURM reaches a node, or the node's name if ``scontrol`` does not give one."""
    if not shutil.which("scontrol"):
        return node
    command = ["scontrol", "--oneliner", "show", "node", node]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    address = re.search(r"\bNodeAddr=(\S+)", answer)
    return address[1] if address else node
