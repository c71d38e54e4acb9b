"""The other launchers, on two nodes or as two containers would: what README and docker/compose.yaml say, for real."""

import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from longnet_dist.telemetry.json_lines import read_jsonl
from tests.train.runs import write_config

ROOT = Path(__file__).parents[2]
SECONDS = 300
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}

pytestmark = pytest.mark.slow


def run_all(commands, folder=ROOT, **environment):
    """Run these at the same time; all must succeed."""
    with ExitStack() as stack:
        options = {"cwd": folder, "env": ENVIRONMENT | environment, "stdout": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(words, stderr=subprocess.STDOUT, **options) for words in commands]
        for process in started:
            stack.callback(process.kill)
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)


def steps(run):
    return [line["step"] for line in read_jsonl(run / "metrics.jsonl")]


def test_torchrun_on_two_nodes_of_two_ranks(tmp_path, corpus):
    config = write_config(tmp_path, "run", corpus)
    nodes = ("--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=29611")
    run_all([["torchrun", f"--node-rank={node}", *nodes, "launch/train.py", config] for node in (0, 1)])
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.skipif(not shutil.which("deepspeed", path=ENVIRONMENT["PATH"]), reason="no launcher of DeepSpeed")
def test_the_launcher_of_deepspeed(tmp_path, corpus):
    config = write_config(tmp_path, "run", corpus)
    run_all([["deepspeed", "--no_local_rank", "--num_gpus=2", "launch/train.py", config]], DS_ACCELERATOR="cpu")
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.fixture
def containers(tmp_path):
    """The beginning of a command in each of two network namespaces, whose hosts know each other as node0 and node1."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names, hosts = ("longnet-c0", "longnet-c1"), tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n10.89.0.1 node0\n10.89.0.2 node1\n")
    script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        words = f"ip link add eth0 netns {names[0]} type veth peer name eth0 netns {names[1]}"
        subprocess.run(words.split(), check=True)
        for number, name in enumerate(names):
            for words in (f"addr add 10.89.0.{number + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        inside = ["unshare", "--uts", "--mount", "bash", "-c", script, "bash"]
        yield {f"node{n}": ["ip", "netns", "exec", name, *inside, f"node{n}", hosts] for n, name in enumerate(names)}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_the_commands_of_the_two_containers(tmp_path, corpus, containers):
    """The commands of compose.yaml, from a folder outside the checkout, with fewer steps and less text."""
    work = tmp_path / "work"
    work.mkdir()
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert services.keys() == containers.keys()
    fewer = ["train.steps=2", "train.batch_size=1", "train.validate_every=0", "train.sample_tokens=0"]
    commands = [
        [*containers[name], *shlex.split(service["command"]), *fewer, f"data.path={corpus}"]
        for name, service in services.items()
    ]
    run_all(commands, work, **services["node0"]["environment"])
    assert steps(work / "runs" / "compose") == [1, 2]
