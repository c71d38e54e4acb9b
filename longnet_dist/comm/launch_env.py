"""Who this process is among those of a run: read once, from what the launcher left in the environment."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from longnet_dist.errors import ConfigError
from longnet_dist.machine import usable_cores

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How many ranks mpirun started: Open MPI's name, and that of MPICH's and Intel's process manager together with a name
# that SLURM's imitation of it does not set.
OPEN_MPI_SIZE, HYDRA_SIZE, HYDRA_ONLY = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"
# Set for the tasks of srun alone; SLURM_NTASKS is also seen by a batch script, which is no rank.
SRUN_SIZE = "SLURM_STEP_NUM_TASKS"
# Below the ports that Linux hands out by itself.
FIRST_PORT, NUM_PORTS = 16384, 16384


@dataclass(frozen=True)
class LaunchEnvironment:
    """The place of one process.

    Attributes:
        rank: number among all processes.
        world_size: how many there are.
        local_rank: number among those of its machine.
        local_world_size: how many there are on its machine.
        meeting_point: where rank 0 waits for the others, ``tcp://address:port``; None for a run of one process.
        sees_one_gpu: the launcher hides from each rank the GPUs of the others.
        attempt: how often torchrun has started the ranks anew.
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
        """The first of these that applies:

        1. ``RANK`` or ``WORLD_SIZE`` is set: torchrun or DeepSpeed's launcher, whatever started that in turn.
        2. mpirun started the process (Open MPI, MPICH, Intel MPI): MPI tells the ranks, through mpi4py.
        3. srun started it, a task for each rank.
        4. A run of one process, also in the batch script of a SLURM job.

        Under mpirun and srun ``MASTER_ADDR`` and ``MASTER_PORT`` replace the meeting point that is found otherwise.

        Raises:
            ConfigError: a launcher left less than it should have, or nonsense; or mpi4py is missing or of another MPI.
        """
        if _has_variables(environ):
            return _from_variables(environ)
        if _has_mpi(environ):
            return _from_mpi(environ)
        if SRUN_SIZE in environ:
            return _from_srun(environ)
        return cls()

    def device(self) -> torch.device:
        """The GPU of this rank's machine that is its own, or the CPU where there is none.

        Raises:
            ConfigError: more ranks on the machine than GPUs.
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
        """Let the ranks of a machine share its cores evenly; each would else start a thread on every core."""
        torch.set_num_threads(max(1, usable_cores() // self.local_world_size))


def launcher_of(environ: Mapping[str, str]) -> str:
    """Return the name of the launcher that started this process as one of several ranks, or an empty string.

    The order is that of :meth:`LaunchEnvironment.read`. A single task of srun counts as no launcher: it is also the
    shell of ``srun --pty bash``, whose commands may start ranks of their own.
    """
    if _has_variables(environ):
        return "torchrun or DeepSpeed's launcher"
    if _has_mpi(environ):
        return "mpirun"
    return "srun" if environ.get(SRUN_SIZE, "1") != "1" else ""


@contextmanager
def process_group(launch: LaunchEnvironment, device: torch.device, timeout: timedelta) -> Iterator[None]:
    """Join all processes of the run: NCCL between GPUs, gloo between CPUs. Every rank must enter.

    A run of one process needs neither an address nor a port.

    Raises:
        ConfigError: the ranks do not meet.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(launch, timeout),
            timeout=timeout,
            rank=launch.rank,
            world_size=launch.world_size,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise ConfigError(
            f"rank {launch.rank} of {launch.world_size} cannot meet the others at {launch.meeting_point}: {error}; "
            "check that every rank was started, that every machine reaches this address (else set MASTER_ADDR to one "
            "of rank 0's machine), and that nothing else uses the port (else set MASTER_PORT to a free one)"
        ) from None
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            # Destroying it would wait for collectives of this rank that the others, who still run, never join.
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store(launch: LaunchEnvironment, timeout: timedelta) -> Any:
    """Where the ranks leave their addresses. A run of one process needs none but its own memory.

    torchrun keeps one store over all restarts of the ranks (torch 2.13), in which those of an earlier attempt have left
    addresses that answer no more; hence each attempt has names of its own.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    meeting_point = launch.meeting_point or "env://"  # the latter only for a launch environment that a caller made
    store, _, _ = next(rendezvous(meeting_point, launch.rank, launch.world_size, timeout=timeout))
    return dist.PrefixStore(f"attempt_{launch.attempt}", store)  # type: ignore[attr-defined]


def _has_variables(environ: Mapping[str, str]) -> bool:
    return "RANK" in environ or "WORLD_SIZE" in environ


def _has_mpi(environ: Mapping[str, str]) -> bool:
    return OPEN_MPI_SIZE in environ or HYDRA_ONLY in environ


def _from_variables(environ: Mapping[str, str]) -> LaunchEnvironment:
    """What torchrun says, or DeepSpeed's launcher, which calls the ranks of a machine ``LOCAL_SIZE``."""
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
    """What MPI says. It is only asked; torch.distributed does the work."""
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
        # Left open until the process ends, MPI would make a rank that fails wait there for the others.
        machine.Free()
        MPI.Finalize()
    return launch


def _from_srun(environ: Mapping[str, str]) -> LaunchEnvironment:
    """What SLURM says to a task of srun."""
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
    # Every task must come to the same port without asking another.
    own_port = FIRST_PORT + (16 * _number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID")) % NUM_PORTS
    address = environ.get("MASTER_ADDR") or _node_address(head)
    meeting_point = _meeting_point(address, _number(environ, "MASTER_PORT", lambda: own_port))
    sees_one_gpu = environ.get("SLURM_GPUS_PER_TASK") == "1"
    return LaunchEnvironment(rank, world_size, local_rank, local_world_size, meeting_point, sees_one_gpu)


def _number(environ: Mapping[str, str], name: str, default: Callable[[], int] | None = None) -> int:
    text = environ.get(name)
    if text is None and default:
        return default()
    if text is None or not text.isdecimal():
        raise ConfigError(f"the launcher must set {name} to a number, but it is {text!r}; set it, or use torchrun")
    return int(text)


def _meeting_point(address: str, port: int) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def _own_address() -> str:
    """An address of this machine for the others: its name's, or where that only leads to itself, its way out's."""
    name = socket.gethostname()
    with suppress(OSError):
        address = socket.gethostbyname(name)
        if not address.startswith("127."):
            return address
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
        unsent.connect(("192.0.2.1", 9))  # an address that no machine has (RFC 5737); nothing is sent
        return str(unsent.getsockname()[0])
    return name


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node, from SLURM's ``2(x3),1``: two on each of the first three, one on the next."""
    tasks: list[int] = []
    for part in text.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """The first host of SLURM's ``gpu[03-07,9]-ib,login``, which is ``gpu03-ib``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not first:
        raise ValueError(f"no host in {nodes!r}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _node_address(node: str) -> str:
    """Where SLURM itself reaches a node; its name, which need not resolve, where ``scontrol`` cannot tell."""
    if not shutil.which("scontrol"):
        return node
    command = ["scontrol", "--oneliner", "show", "node", node]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    address = re.search(r"\bNodeAddr=(\S+)", answer)
    return address[1] if address else node
