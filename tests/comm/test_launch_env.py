import os
import socket
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm import launch_env
from longnet_dist.comm.launch_env import LaunchEnvironment, meeting_store, process_group
from longnet_dist.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
# The last of five tasks on two nodes, as srun 22.05 sets it.
SRUN = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "3,2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4"}
MPICH = {"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}


def fake_mpi(monkeypatch, size=4, rank=2, machine_size=2, machine_rank=0):
    """Install a fake mpi4py with these answers, whose broadcast returns what rank 0 sent; return its calls."""
    calls = []
    machine = SimpleNamespace(size=machine_size, rank=machine_rank, Free=lambda: calls.append("free"))
    world = SimpleNamespace(
        size=size, rank=rank, bcast=lambda mine: mine or "tcp://head:1", Split_type=lambda kind, key: machine
    )
    mpi = SimpleNamespace(
        COMM_WORLD=world,
        COMM_TYPE_SHARED=1,
        Is_initialized=lambda: False,
        Init=lambda: calls.append("init"),
        Finalize=lambda: calls.append("finalize"),
        Get_library_version=lambda: "Some MPI 1.0\nbuilt somewhere",
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi, rc=lambda **_: calls.append("rc")))
    return calls


@pytest.fixture
def no_scontrol(monkeypatch):
    monkeypatch.setattr(launch_env.shutil, "which", lambda _: None)


def test_nothing_set_is_a_run_of_one_process():
    assert LaunchEnvironment.read({}) == LaunchEnvironment(0, 1, 0, 1)


def test_a_leftover_local_rank_is_still_one_process():
    assert LaunchEnvironment.read({"LOCAL_RANK": "3", "MASTER_PORT": "1"}) == LaunchEnvironment()


def test_torchrun():
    assert LaunchEnvironment.read(TORCHRUN) == LaunchEnvironment(5, 8, 1, 4, "tcp://localhost:29500")


def test_a_restart_of_torchrun_is_counted():
    assert LaunchEnvironment.read(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}).attempt == 2


def test_an_ipv6_address_is_bracketed():
    launch = LaunchEnvironment.read(TORCHRUN | {"MASTER_ADDR": "fd00::2"})
    assert launch.meeting_point == "tcp://[fd00::2]:29500"


def test_deepspeeds_launcher():
    variables = {key: value for key, value in TORCHRUN.items() if key != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert LaunchEnvironment.read(variables).local_world_size == 2


@pytest.mark.parametrize("name", TORCHRUN)
def test_half_an_environment_is_refused(name):
    with pytest.raises(ConfigError, match=f"but not {name}; start the ranks with torchrun, mpirun or srun, or unset "):
        LaunchEnvironment.read({key: value for key, value in TORCHRUN.items() if key != name})


def test_ranks_are_numbers():
    with pytest.raises(ConfigError, match="must set RANK to a number, but it is 'first'"):
        LaunchEnvironment.read(TORCHRUN | {"RANK": "first"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must be a port from 1 to 65535, not 99999"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT must be a port from 1 to 65535, not 0"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR must be the name or address of rank 0's machine alone, not ''"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be at least 1 and at most WORLD_SIZE, but .*WORLD_SIZE=8"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE must be at least 1 and at most WORLD_SIZE"),
        ({"RANK": "8"}, "RANK must be less than WORLD_SIZE, but the environment says RANK=8, WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK must be less than LOCAL_WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be at least 1"),
        ({"RANK": "-1"}, "must set RANK to a number, but it is '-1'"),
        ({"RANK": "٣"}, "must set RANK to a number"),
        ({"WORLD_SIZE": ""}, "must set WORLD_SIZE to a number"),
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_at_once(changes, message):
    with pytest.raises(ConfigError, match=message):
        LaunchEnvironment.read(TORCHRUN | changes)


def test_impossible_numbers_of_srun_are_refused(no_scontrol):
    for changes in ({"SLURM_PROCID": "5"}, {"SLURM_LOCALID": "2"}, {"MASTER_PORT": "70000"}):
        with pytest.raises(ConfigError, match="must be"):
            LaunchEnvironment.read(SRUN | changes)


def test_srun(no_scontrol):
    assert LaunchEnvironment.read(SRUN) == LaunchEnvironment(4, 5, 1, 2, "tcp://gpu07:22274")


def test_all_tasks_of_srun_meet_at_the_same_point_and_steps_at_different_ones(no_scontrol):
    first = LaunchEnvironment.read(SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert first == LaunchEnvironment(0, 5, 0, 3, LaunchEnvironment.read(SRUN).meeting_point)
    assert LaunchEnvironment.read(SRUN | {"SLURM_STEP_ID": "3"}).meeting_point != first.meeting_point


def test_the_meeting_point_can_be_said(no_scontrol):
    launch = LaunchEnvironment.read(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"})
    assert launch.meeting_point == "tcp://10.0.0.7:4000"


def test_scontrol_knows_the_address(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\necho "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.42 NodeHostName=$4"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert LaunchEnvironment.read(SRUN).meeting_point.startswith("tcp://10.0.0.42:")
    program.write_text("#!/bin/sh\necho 'slurm_load_node error' >&2\nexit 1\n")
    assert LaunchEnvironment.read(SRUN).meeting_point.startswith("tcp://gpu07:")


def test_a_batch_script_is_no_rank():
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert LaunchEnvironment.read(batch) == LaunchEnvironment()


@pytest.mark.parametrize("name", ["SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST"])
def test_srun_must_say_where_tasks_are(name, no_scontrol):
    for rest in (SRUN | {name: ""}, {key: value for key, value in SRUN.items() if key != name}):
        with pytest.raises(ConfigError, match="srun must set SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST"):
            LaunchEnvironment.read(rest)


@pytest.mark.parametrize(("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8])])
def test_tasks_of_nodes(text, tasks):
    assert launch_env._tasks_of_nodes(text) == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,m[2-3]", "n1"),
        ("gpu[03-07,9]-ib,login", "gpu03-ib"),
        ("rack[1-2]node[08,11]", "rack1node08"),
    ],
)
def test_first_host(nodes, first):
    assert launch_env._first_host(nodes) == first


@pytest.mark.parametrize("environ", [OPEN_MPI, MPICH])
def test_mpi(monkeypatch, environ):
    calls = fake_mpi(monkeypatch)
    assert LaunchEnvironment.read(environ | SRUN) == LaunchEnvironment(2, 4, 0, 2, "tcp://head:1")
    assert calls == ["rc", "init", "free", "finalize"]


def test_rank_0_of_mpi_says_where_to_meet(monkeypatch):
    fake_mpi(monkeypatch, rank=0, machine_size=4)
    address, port = LaunchEnvironment.read(OPEN_MPI).meeting_point.removeprefix("tcp://").rsplit(":", 1)
    assert address == "127.0.0.1"
    with socket.create_server(("", int(port))):
        pass
    fake_mpi(monkeypatch, rank=0, machine_size=2)
    monkeypatch.setattr(launch_env, "_own_address", lambda: "10.1.2.3")
    assert LaunchEnvironment.read(OPEN_MPI | {"MASTER_PORT": "77"}).meeting_point == "tcp://10.1.2.3:77"
    assert LaunchEnvironment.read(OPEN_MPI | {"MASTER_ADDR": "h", "MASTER_PORT": "7"}).meeting_point == "tcp://h:7"


def test_an_address_of_others_is_no_loopback(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "10.5.5.5")
    assert launch_env._own_address() == "10.5.5.5"
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.1.1")
    assert not launch_env._own_address().startswith("127.")


def test_mpi_needs_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"through mpi4py.*pip install 'longnet-dist\[mpi\]'"):
        LaunchEnvironment.read(OPEN_MPI)


def test_an_mpi4py_of_another_mpi_is_noticed(monkeypatch):
    fake_mpi(monkeypatch, size=1, rank=0)
    with pytest.raises(ConfigError, match=r"mpirun started 4 ranks, but mpi4py sees 1: .* \(Some MPI 1\.0\)"):
        LaunchEnvironment.read(OPEN_MPI)


def test_torchrun_comes_before_mpi_and_mpi_before_srun(monkeypatch, no_scontrol):
    fake_mpi(monkeypatch)
    assert LaunchEnvironment.read(TORCHRUN | OPEN_MPI | SRUN).world_size == 8
    assert LaunchEnvironment.read(OPEN_MPI | SRUN).world_size == 4
    assert LaunchEnvironment.read(SRUN | {"PMI_SIZE": "5"}).world_size == 5


def test_the_device_is_the_ranks_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LaunchEnvironment().device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert LaunchEnvironment(5, 8, 1, 4).device() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ConfigError, match="4 ranks share a machine with 3"):
        LaunchEnvironment(5, 8, 1, 4).device()


def test_srun_can_show_a_rank_its_gpu_alone(monkeypatch, no_scontrol):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert LaunchEnvironment.read(SRUN | {"SLURM_GPUS_PER_TASK": "1"}).device() == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="2 ranks share a machine with 1"):
        LaunchEnvironment.read(SRUN).device()


def test_cores_are_shared(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    LaunchEnvironment(0, 4, 0, 4).share_cores()
    LaunchEnvironment(0, 2, 0, 2).share_cores()
    LaunchEnvironment(0, 16, 0, 16).share_cores()
    assert chosen == [1, 3, 1]


@pytest.mark.parametrize("meeting_point", [None, "tcp://nowhere.invalid:1"])
def test_one_process_needs_no_address(monkeypatch, meeting_point):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with process_group(LaunchEnvironment(meeting_point=meeting_point), torch.device("cpu"), timedelta(seconds=10)):
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()


def test_a_taken_port_is_named(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        point = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        launch = LaunchEnvironment(0, 2, 0, 2, point)
        with (
            pytest.raises(ConfigError, match=f"rank 0 of 2 cannot meet the others at {point}: .*set MASTER_PORT"),
            process_group(launch, torch.device("cpu"), timedelta(seconds=2)),
        ):
            pass


@pytest.mark.parametrize("address", ["no-such-host.invalid", "x" * 64, "nobody.invalid."])
def test_an_unknown_machine_is_refused_before_the_time_out(monkeypatch, address):
    monkeypatch.setattr(launch_env, "NAME_SECONDS", 0.0)
    launch = LaunchEnvironment(1, 2, 1, 2, f"tcp://{address}:29500")
    with pytest.raises(ConfigError, match=rf"rank 1 of 2 cannot find the machine {address}.*set MASTER_ADDR to"):
        meeting_store(launch, timedelta(minutes=30))


@pytest.mark.parametrize("address", ["node1:29500", "tcp://node1", "user@node1", "node1/", "[node1]", "1:2:3", ""])
def test_an_address_with_more_than_a_machine_is_refused(address):
    with pytest.raises(ConfigError, match="name or address of rank 0's machine alone"):
        LaunchEnvironment.read(TORCHRUN | {"MASTER_ADDR": address})


@pytest.mark.parametrize("address", ["::1", "[::1]", "fe80::1%eth0"])
def test_an_ipv6_address_may_have_brackets(address):
    point = LaunchEnvironment.read(TORCHRUN | {"MASTER_ADDR": address}).meeting_point
    assert point == f"tcp://[{address.strip('[]')}]:29500"
