"""``longnet doctor`` under a launcher: what ranks measure, and which host is named."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longnet_dist.cli.diagnosis import cluster
from longnet_dist.cli.diagnosis.cluster import RankFacts, measure
from longnet_dist.cli.diagnosis.comparison import compare, report_ranks
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
FOLDER = Path("runs")


def alike(ranks=4, hosts=2):
    """Ranks of hosts that differ in nothing."""
    names = [f"node{rank * hosts // ranks}" for rank in range(ranks)]
    values = {"device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "clocks": "1980 MHz, 1980 MHz, 45, 600 W"}
    rates = {"matmul_tflops": 700.0, "local_gbytes": 300.0, "network_gbytes": 45.0, "all_reduce_gbytes": 40.0}
    return [RankFacts(rank, name, **values, **rates) for rank, name in enumerate(names)]


def changed(ranks, which, **values):
    return [replace(facts, **values) if facts.rank in which else facts for facts in ranks]


@pytest.mark.parametrize(
    ("which", "values", "message"),
    [
        ([5], {"matmul_tflops": 500.0}, "host node2: matmuls on rank 5, NVIDIA H200, run at 500 TFLOP/s, 71% of"),
        ([5], {"matmul_tflops": 500.0}, r"1980 MHz, 45, 600 W\)"),
        ([2, 3], {"local_gbytes": 30.0}, "host node1: the ranks of the host exchange 30 GB/s, 10% of the others' 300"),
        ([6, 7], {"network_gbytes": 5.0}, "host node3: the network of the host gives 5 GB/s, 11% of the others' 45"),
        ([4, 5], {"versions": {"torch": "2.12.1"}}, r"host node2: the version of torch is 2\.12\.1, and 2\.13\.0 on"),
        ([1], {"versions": {}}, "host node0: the version of torch is absent"),
        ([0, 1], {"device": "NVIDIA H100"}, "host node0: the device is NVIDIA H100, and NVIDIA H200 on the others"),
        ([6, 7], {"seconds_ahead": -90.0}, "host node3: its clock is 90 s behind the others"),
        ([2, 3], {"sees_folder": False}, "host node1: a file that rank 0 makes in runs does not appear there"),
        ([*range(8)], {"sees_folder": False}, "host node0: rank 0 cannot make a file in runs"),
        ([3], {"matmul_tflops": None, "failure": "matmul: ECC error"}, "host node1: rank 3, .* fails: matmul: ECC"),
    ],
)
def test_the_host_of_an_outlier_is_named_with_what_to_do(which, values, message):
    (finding,) = compare(changed(alike(8, 4), which, **values), FOLDER)
    assert finding.fault
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(finding.what)
    assert finding.remedy
    text = report_ranks(changed(alike(8, 4), which, **values), [finding])
    assert text.splitlines()[-1] == f"  FAULT: {finding.what}. Do: {finding.remedy}"


@pytest.mark.parametrize(("ranks", "hosts"), [(1, 1), (2, 1), (2, 2), (8, 4), (9, 3)])
def test_ranks_that_are_alike_have_no_findings(ranks, hosts):
    facts = [replace(f, matmul_tflops=700.0 - 5 * f.rank, seconds_ahead=0.1 * f.rank) for f in alike(ranks, hosts)]
    assert compare(facts, FOLDER) == []
    text = report_ranks(facts, [])
    assert text.splitlines()[-1] == "  none: the ranks are alike"
    assert f"rank {ranks - 1} on node{hosts - 1}: NVIDIA H200" in text


def measured(folders, hosts, slow):
    """Facts as on several hosts; one rank computes slowly and sees another folder."""
    rank = int(os.environ["RANK"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: hosts[rank])
        patch.setattr(cluster, "ROUNDS", 1)
        patch.setattr(cluster, "MATMUL_SIDE", {"cpu": 32})
        patch.setattr(cluster, "MESSAGE_BYTES", {"cpu": 2**14})
        patch.setattr(cluster, "FOLDER_SECONDS", 0.3)
        if rank == slow:
            multiply = torch.mm
            patch.setattr(torch, "mm", lambda a, b: (time.sleep(2), multiply(a, b))[1])
        return measure(CPU, folders[rank])


@pytest.mark.parametrize("hosts", [("a", "a", "b"), ("a", "b", "c")], ids="".join)
def test_a_slow_rank_and_a_folder_that_is_not_shared_are_found(tmp_path, hosts):
    folders = [tmp_path / "shared", tmp_path / "shared", tmp_path / "own"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    results = run_distributed(measured, 3, folders, hosts, 2)
    assert results[0] == results[1] == results[2]
    ranks = results[0]
    assert [facts.host for facts in ranks] == list(hosts)
    assert [facts.sees_folder for facts in ranks] == [True, True, False]
    assert [facts.local_gbytes is not None for facts in ranks] == [hosts.count(name) > 1 for name in hosts]
    assert all(facts.network_gbytes > 0 and facts.all_reduce_gbytes > 0 for facts in ranks)
    told = [finding.what for finding in compare(ranks, tmp_path) if "network" not in finding.what]
    slow = [what for what in told if "matmuls on rank 2" in what]
    assert len(slow) == 1
    assert slow[0].startswith(f"host {hosts[2]}: ")
    assert any(what.startswith(f"host {hosts[2]}: a file that rank 0 makes") for what in told)
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def test_under_torchrun_one_report_is_printed(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "longnet_dist", "doctor", "--json", "--folder", str(tmp_path)]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=given, capture_output=True, text=True, cwd=tmp_path, check=False)
    found = json.loads(done.stdout)
    assert [facts["rank"] for facts in found["ranks"]] == [0, 1]
    assert all(facts["matmul_tflops"] > 0 for facts in found["ranks"])
    # Another process of this machine may slow one of two ranks down; torchrun says 1 of any status.
    assert {finding["what"].split(":")[1][:8] for finding in found["findings"]} <= {" matmuls"}
    assert done.returncode == bool(found["findings"])
    assert list(tmp_path.iterdir()) == []
