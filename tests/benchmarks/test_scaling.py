import gzip
import json
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import Benchmark, _parser
from benchmarks.scaling_jobs import Problem, covered, hidden_shares, stubbed_exchange
from benchmarks.scaling_report import summary, table
from tests.distributed import run_distributed

CPU = torch.device("cpu")
SIZES = ["--weak-rows", "128", "--strong-rows", "64", "--peer-rows", "64", "--check-rows", "96"]
SIZES += ["--base", "16", "--heads", "4", "--dim", "8", "--repeats", "2"]


def measure(output):
    Benchmark(_parser().parse_args([*SIZES, "--output", str(output)]), CPU, timedelta(seconds=60)).run()


def test_every_part_is_measured_and_a_failing_one_does_not_stop_the_others(tmp_path):
    run_distributed(measure, 2, tmp_path / "scaling.json")
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert max(result["check"]["relative_difference"].values()) < 1e-6
    assert [(case["rows"], case["gpus"]) for case in result["cases"]] == [(64, 1), (64, 2), (128, 1), (256, 2)]
    assert all(case["overlapped"]["ms"] > 0 for case in result["cases"])
    assert set(result["cases"][1]) >= {"waited", "stubbed"}
    ulysses, ring = result["peers"]
    assert ulysses["exact"]["ms"] > 0
    assert "rank 0" in ring["exact"]["error"]  # context_parallel cannot do it on a CPU
    assert "error" in result["trace"]  # and NCCL does not run there
    assert set(result["summary"]["exchange"]) == {"64 rows on 2", "256 rows on 2"}
    assert "| 256 | 2 |" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").stat().st_size > 0


def sent_and_received():
    """Bytes that the exchange of this rank's forward and backward moves, as seen from outside, and as foretold."""
    problem, moved, real = Problem(64, 3, 2, 4, 16), [], dist.all_to_all_single

    def spy(received, sent, *args, **kwargs):
        moved.append((sent.nbytes, received.nbytes))
        return real(received, sent, *args, **kwargs)

    dist.all_to_all_single = spy
    problem.attend(problem.inputs(dist.get_rank(), CPU, torch.float32), dist.group.WORLD)
    traffic = {
        name: values[dist.get_rank()] for name, values in problem.traffic(torch.device("cpu"), torch.float32).items()
    }
    return moved, [(traffic[f"{way}_sent_bytes"], traffic[f"{way}_received_bytes"]) for way in ("forward", "backward")]


def test_the_traffic_is_what_is_sent():
    for moved, foretold in run_distributed(sent_and_received, 3):
        assert moved == foretold
        assert sum(moved[0]) > 0


def test_lean_is_the_same_attention():
    lean, plain = Problem(64, 1, 2, 4, 16, lean=True), Problem(64, 1, 2, 4, 16)
    inputs = lean.inputs(0, CPU, torch.float32)
    found = lean.attend(inputs, None)
    expected = plain.attend([*(x.clone().requires_grad_() for x in inputs), found[0]], None)
    torch.testing.assert_close(found, expected)


def stubbed_difference():
    problem = Problem(64, 2, 2, 4, 16)
    torch.manual_seed(dist.get_rank())
    inputs = problem.inputs(dist.get_rank(), CPU, torch.float32)
    real = problem.attend(inputs, dist.group.WORLD)
    with stubbed_exchange():
        stubbed = problem.attend(inputs, dist.group.WORLD)
    again = problem.attend(inputs, dist.group.WORLD)
    return [float((a - b).abs().max()) for a, b in ((real[0], stubbed[0]), (real[0], again[0]))]


def test_a_stub_keeps_the_rows_at_home():
    (_, first_again), (stubbed, again) = run_distributed(stubbed_difference, 2)
    assert first_again == again == 0
    assert stubbed > 0.01  # rank 1 attended to rows of its own in place of rank 0's


def test_covered_counts_overlaps_once():
    assert covered([(5, 7), (0, 2), (1, 3), (6, 6.5)]) == 5
    assert covered([]) == 0


def test_hidden_shares_of_a_trace(tmp_path):
    def event(name, start, duration, kind="kernel"):
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": duration}

    events = [
        event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 0, 10),
        event("nccl:all_to_all", 0, 10, "gpu_user_annotation"),
        event("forward_kernel", 4, 3),
        event("hopper_backward_kernel", 6, 2),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL(x)", 20, 5),
        {"ph": "M", "name": "process_name"},
    ]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    assert hidden_shares(tmp_path / "trace.json.gz") == {
        "SendRecv": {"microseconds": 10, "hidden_share": 0.4},
        "AllReduce": {"microseconds": 5, "hidden_share": 0},
    }


def test_summary():
    def times(ms):
        return {"ms": ms}

    cases = [
        {"rows": 100, "gpus": 1, "overlapped": times(10.0)},
        {"rows": 200, "gpus": 1, "overlapped": times(22.0)},
        {"rows": 200, "gpus": 2, "overlapped": times(11.0), "waited": times(14.0), "stubbed": times(10.5)},
        {"rows": 400, "gpus": 2, "overlapped": {"error": "no memory"}},
    ]
    found = summary({"cases": cases, "peers": [{"name": "A", "rows": 200, "gpus": 2, "exact": times(110.0)}]})
    assert found["weak"] == {"200 rows on 2": {"time_on_one": 10.0, "ratio": pytest.approx(1.1)}}
    assert found["strong"] == {"200 rows on 2": {"speedup": 2.0}}
    assert found["exchange"]["200 rows on 2"]["exposed_share"] == pytest.approx(0.5 / 11)
    assert found["exchange"]["200 rows on 2"]["exposed_share_without_overlap"] == pytest.approx(0.25)
    assert found["peers"] == {"A, 200 rows on 2": {"times_faster": 10.0}}
    environment = {"command": "c", "cpu": "x", "torch": "2", "commit": "abc", "date": "today"}
    shape = {"heads": 1, "dim": 2, "base": 4}
    text = table({"environment": environment, "shape": shape, "dtype": "torch.float32", "cases": cases})
    assert "| 200 | 2 | 11.00 | 14.00 | 10.50 | 4.5% | 2.00 | 1.100 |" in text
    assert "| 400 | 2 | failed |" in text
