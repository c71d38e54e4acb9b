"""``longnet doctor`` on this machine."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from torch import Tensor

from longnet_dist.attention import functional
from longnet_dist.cli.diagnosis import facts, probes
from longnet_dist.cli.doctor import main
from longnet_dist.geometry.pattern import DilatedPattern
from tests.cli.diagnosis.machines import laptop, packages, server


@pytest.mark.slow
def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Not every package of the tests need be imported for this.
    monkeypatch.setattr(facts, "MODULES", {"tokenizers": ("tokenizers", "no_such_module")})
    main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= {"version", "host", "packages", "torch", "devices", "collectives", "findings"}
    for device in found["devices"]:
        assert {choice["dtype"] for choice in device["kernels"]} >= {"float32", "bfloat16"}
        assert {choice["head_dim"] for choice in device["kernels"]} >= {32, 64, 96, 128}
        assert all(check["right"] for check in device["checks"])
        assert all(check["error"] > 0 for check in device["checks"])
    assert found["collectives"][0] == {"backend": "gloo", "ranks": 2, "failure": ""}
    versions = {package["module"]: package["version"] for package in found["packages"]}
    assert versions["torch"]
    assert versions["no_such_module"] is None


def collected(monkeypatch: pytest.MonkeyPatch, found: facts.Facts) -> None:
    monkeypatch.setattr(facts, "collect", lambda: found)


def test_the_status_is_1_where_something_installed_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collected(monkeypatch, laptop(packages=packages(("cuda", "triton"), deepspeed="0.19.6")))
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 1
    text, values = capsys.readouterr().out.rsplit("\n{", 1)
    assert text.splitlines()[-1].startswith("  FAULT: DeepSpeed 0.19.6 makes")
    (finding,) = json.loads("{" + values)["findings"]
    assert finding["fault"]


@pytest.mark.parametrize("machine", [laptop, server])
def test_the_status_is_0_where_things_are_absent(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    collected(monkeypatch, machine(packages=packages(("train", "cuda", "tokenizers", "mpi", "hf"))))
    main([])
    assert "note: longnet train and quickstart need" in capsys.readouterr().out


def test_a_broken_torch_gives_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = packages(("triton", "cuda"), errors={"torch": "OSError: libc10.so: undefined symbol"})
    monkeypatch.setattr(facts, "packages", lambda: broken)
    monkeypatch.setattr(facts, "ask", lambda *questions, **_: pytest.fail(f"asked {questions} without a torch"))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "  none, for torch cannot be used\n" in text
    assert "FAULT: torch 2.11.0 is installed, but its import fails: OSError: libc10.so: undefined symbol" in text


def test_a_gpu_whose_kernels_crash_gives_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {
        "index": 0,
        "name": "NVIDIA H100",
        "memory_bytes": 2**36,
        "capability": [9, 0],
        "planned_as": "h100",
    }
    answers = {
        "torch_build": {"cuda": "13.0", "gloo": True, "nccl": True, "available": True, "warning": "", "gpus": [gpu]},
        "kernels": {"failure": "the process was killed by signal 6: LLVM ERROR"},
        "attention": {"failure": "the process was killed by signal 11"},
        "collective": {"sum": 3.0},
    }
    monkeypatch.setattr(facts, "packages", packages)
    monkeypatch.setattr(facts, "ask", lambda *questions, **_: [copy.copy(answers[words[0]]) for words in questions])
    found = facts.collect()
    (device,) = found.devices
    assert device.failure.endswith("LLVM ERROR")
    assert [check.failure for check in device.checks] == ["the process was killed by signal 11"] * 3
    gloo, nccl = found.collectives
    assert (gloo.ranks, gloo.failure) == (2, "")
    assert (nccl.ranks, nccl.failure) == (1, "rank 0 has the sum 3.0 in place of 1.0")
    json.dumps(found.to_json())


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An attention that leaves out a branch, and one whose gradient is not a number."""

    def check() -> facts.Check:
        probes.attention("cpu", "float32", "32")
        told = json.loads(capsys.readouterr().out.removeprefix(probes.ANSWER))
        return facts.Check("float32", 32, **told)

    attend = functional.dilated_attention

    def shorter(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern) -> Any:
        return attend(q, k, v, DilatedPattern(pattern.segment_lengths[:-1], pattern.dilation_rates[:-1]))

    def undefined(q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern) -> Any:
        return attend(q, k, v * float("nan"), pattern)

    assert check().right
    for wrong in (shorter, undefined):
        monkeypatch.setattr(functional, "dilated_attention", wrong)
        assert not check().right
