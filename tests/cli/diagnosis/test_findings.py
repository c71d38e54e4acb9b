"""What is said about machines that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longnet_dist.attention.kernels.hopper import support
from longnet_dist.cli.diagnosis.facts import Check, Collective, Facts
from longnet_dist.cli.diagnosis.findings import Finding, findings
from longnet_dist.cli.diagnosis.text import report
from tests.cli.diagnosis.machines import HOST, cpu, gpu, laptop, packages, server


@pytest.fixture(autouse=True)
def triton_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for Hopper compile on any Triton; a test may say otherwise."""
    monkeypatch.setattr(support, "release_obstacle", lambda version: "")


def only(facts: Facts) -> Finding:
    (finding,) = findings(facts)
    return finding


def test_there_is_nothing_to_do_on_a_good_machine() -> None:
    for facts in (laptop(), server(), server(gpu(0), gpu(1))):
        assert findings(facts) == []
        assert report(facts, []).endswith("findings\n  none: nothing to do")


def test_no_gpu_is_no_fault() -> None:
    behind_a_driver = replace(HOST, driver="580.65")  # as in a container of a machine that has one
    finding = only(laptop(host=behind_a_driver))
    assert not finding.fault
    assert "no GPU was given to this container" in finding.what


@pytest.mark.parametrize("version", ["0.19.5", "0.19.6", "0.19.7"])
def test_versions_of_deepspeed_that_destroy_a_model_are_a_fault(version: str) -> None:
    finding = only(laptop(packages=packages(("cuda", "triton"), deepspeed=version)))
    assert finding.fault
    assert f"DeepSpeed {version} makes every weight NaN" in finding.what
    assert finding.remedy == "pip install 'longnet-dist[train]'"


def test_a_package_whose_import_fails_is_a_fault() -> None:
    broken = packages(("cuda", "triton"), errors={"deepspeed": "AttributeError: no attribute 'x'"})
    finding = only(laptop(packages=broken))
    assert finding.fault
    assert finding.what.endswith("0.19.8 is installed, but its import fails: AttributeError: no attribute 'x'")
    assert finding.remedy == "pip install --force-reinstall deepspeed"


def test_absent_extras_are_no_fault_and_named_where_they_help() -> None:
    finding = only(laptop(packages=packages(("train", "cuda", "tokenizers", "mpi", "hf", "triton"))))
    assert finding == Finding(
        False,
        "longnet train and quickstart need deepspeed, matplotlib, tensorboard",
        "pip install 'longnet-dist[train]'",
    )
    hopper = server(packages=packages(("cuda",)))
    assert only(hopper).remedy == "pip install 'longnet-dist[cuda]'"
    ampere = gpu(title="NVIDIA A100-SXM4-80GB", capability=(8, 0), planned_as="a100-80gb", matmul_reason="runs on a …")
    assert findings(server(ampere, packages=packages(("cuda",)))) == []


def test_a_missing_package_of_the_core_is_a_fault() -> None:
    without_torch = laptop(packages=packages(("torch", "cuda", "triton")), torch={}, devices=[], collectives=[])
    assert [finding.what for finding in findings(without_torch) if finding.fault] == ["torch is not installed"]
    assert "torch absent" in report(without_torch, [])


def test_a_triton_that_cannot_compile_the_fast_kernels_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "release_obstacle", lambda version: "the kernels for Hopper need Triton 3.6")
    for facts in (server(), server(gpu(0), gpu(1))):  # once for all GPUs of a kind
        finding = only(facts)
        assert not finding.fault
        assert "attention on cuda:0 takes slower kernels for bfloat16 32, bfloat16 64," in finding.what
        assert finding.what.endswith("the kernels for Hopper need Triton 3.6")
        assert "float32" not in finding.what
        assert finding.remedy == support.REMEDY


def test_the_kernels_of_each_dtype_and_head_dim_are_shown_with_reasons() -> None:
    text = report(server(), [])
    assert "attention bfloat16, head dim 64: triton (forward portable, backward hopper)\n" in text
    assert "attention bfloat16, head dim 128: triton (forward hopper, backward hopper)\n" in text
    assert "attention bfloat16, head dim 96: triton (forward portable, backward portable); the kernels for Hop" in text
    assert "linear layers of compiled blocks: quack\n" in text
    ampere = gpu(title="NVIDIA A100", capability=(8, 0), matmul_reason="runs on a Hopper GPU, not on cuda:0")
    text = report(server(ampere), [])
    assert "need compute capability 9.x, not 8.0" in text
    assert "linear layers of compiled blocks: torch (quack runs on a Hopper GPU, not on cuda:0)\n" in text


def test_a_quack_that_does_not_load_is_told() -> None:
    finding = only(server(gpu(matmul_reason="cannot use quack-kernels 0.7.0 (ImportError: no name)")))
    assert not finding.fault
    assert "linear layers on cuda:0 take torch's kernels: quack cannot use quack-kernels 0.7.0" in finding.what


def test_wrong_results_and_kernels_that_fail_are_faults() -> None:
    wrong = Check("bfloat16", 64, error=0.4, allowed=0.03)
    broken = Check("float32", 32, failure="CompilationError: at 3:1")
    found = findings(server(gpu(0), gpu(1, checks=(wrong, broken))))
    assert [finding.fault for finding in found] == [True, True]
    assert "cuda:1, bfloat16, head dim 64, is wrong: relative error 0.4, where rounding gives 0.03" in found[0].what
    assert "cuda:1, float32, head dim 32, fails: CompilationError: at 3:1" in found[1].what
    assert "gcc" in found[1].remedy
    assert "WRONG (relative error 4.0e-01" in report(server(gpu(checks=(wrong,))), found)
    assert only(laptop(devices=[cpu(Check("float32", 32))])).what.endswith("fails: no result")


def test_a_gpu_that_torch_cannot_use() -> None:
    with_gpu = replace(HOST, driver="470.1", gpu_nodes=1)
    without_cuda = only(laptop(host=with_gpu))
    assert not without_cuda.fault
    assert "this torch was built without CUDA" in without_cuda.what
    cuda = laptop().torch | {"cuda": "13.0", "warning": "The NVIDIA driver on your system is too old"}
    too_old = only(laptop(host=with_gpu, torch=cuda))
    assert too_old.fault
    assert too_old.what.endswith("though NVIDIA's driver 470.1 is here: The NVIDIA driver on your system is too old")
    hidden = only(laptop(host=replace(with_gpu, hidden_gpus=True), torch=cuda))
    assert (hidden.fault, hidden.remedy) == (False, "unset CUDA_VISIBLE_DEVICES")


def test_a_gpu_that_the_planner_does_not_know() -> None:
    assert "train.peak_tflops" in only(server(gpu(title="NVIDIA Z1", planned_as=None))).remedy


def test_ranks_that_cannot_meet_are_faults() -> None:
    failed = [Collective("gloo", 2, "rank 1: RuntimeError: no route"), Collective("nccl", 2, "rank 0: no answer")]
    found = findings(server(gpu(0), gpu(1), collectives=failed))
    assert [finding.fault for finding in found] == [True, True]
    assert "GLOO_SOCKET_IFNAME" in found[0].remedy
    assert "NCCL_DEBUG" in found[1].remedy
    assert "NCCL: 2 processes, FAILED, rank 0: no answer" in report(server(collectives=failed), [])


def test_a_container_as_it_comes() -> None:
    host = replace(
        HOST,
        driver="580.65",
        gpu_nodes=2,
        shared_memory_bytes=64 * 2**20,
        open_files=256,
        free_disk_bytes=2**30,
        compiler=None,
        launch_variables=["RANK"],
        memory_bytes=2**35,
    )
    found = findings(server(gpu(0), gpu(1), host=host))
    assert not any(finding.fault for finding in found)
    remedies = " | ".join(finding.remedy for finding in found)
    for part in ("gcc", "--shm-size", "ulimit -n 1024", "output_dir", "unset RANK"):
        assert part in remedies
    assert "memory 32.0 GiB (limit of the control group; the machine has 512.0)" in report(server(host=host), found)
    # Without GPUs, NCCL's shared memory is of no concern.
    assert not any("shm" in finding.remedy for finding in findings(laptop(host=replace(host, driver=None))))


def test_faults_come_first_and_end_the_report() -> None:
    facts = laptop(packages=packages(("train", "cuda", "triton"), errors={"numpy": "ImportError: x"}))
    found = findings(facts)
    assert [finding.fault for finding in found] == [True, False]
    first, second = report(facts, found).splitlines()[-2:]
    assert first.startswith("  FAULT: numpy 1.0 is installed, but its import fails: ImportError: x. Do: pip install")
    assert second.startswith("  note: longnet train and quickstart need deepspeed")
