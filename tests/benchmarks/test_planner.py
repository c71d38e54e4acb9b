import json

import pytest

from benchmarks import planner
from benchmarks.planner import main, markdown, suggest


def result(name, fit, factors, planned=100.0, measured=104.0):
    parts = {"matmul": 3.0, "attention": 2.0, "row-wise": 1.0, "fixed": 0.5}
    seconds = sum(parts[part] * factor for part, factor in factors.items()) + 0.5
    return {
        "name": name,
        "fit": fit,
        "planned": {"step_parts": parts, "step_seconds": 6.5, "peak_gpu_bytes": planned},
        "seconds": [99.0, seconds, seconds],
        "measured": {"peak_memory_allocated": measured, "peak_memory_reserved": 1.1 * measured},
        "outside_of_torch_bytes": 7,
    }


def test_constants_come_from_the_cases_to_fit_alone():
    slow = dict.fromkeys(("matmul", "attention", "row-wise"), 2.0)
    suggested = suggest([result("a", True, slow), result("b", False, dict.fromkeys(slow, 9.0))])
    assert 1.3 < suggested["divide the rate of matmul by"] < 3
    assert suggested["fragmentation"] == pytest.approx(0.1)
    assert suggested["context_bytes"] == 7
    assert suggest([result("b", False, slow)]) == {}


def test_the_table_has_errors_in_per_cent():
    table = markdown([result("a", True, {"matmul": 1.0}), {"name": "b", "fit": False, "error": ["broken"]}])
    assert "| a | yes | 0.000 | 0.000 | -3.8% | 6.500 | 3.500 | +85.7% |" in table
    assert "broken" in table


@pytest.mark.slow
def test_a_case_is_measured_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(planner, "CPU_CASES", planner.CPU_CASES[:1])
    output = tmp_path / "planner.json"
    words = ["--cpu", "--output", str(output)]
    main(words)
    (result,) = json.loads(output.read_text())["cases"]
    assert len(result["seconds"]) == 5
    assert result["planned"]["peak_host_bytes"] == pytest.approx(result["measured"]["peak_memory_allocated"], rel=0.5)
    assert "tiny 1K" in output.with_suffix(".md").read_text()
    capsys.readouterr()
    main(words)  # nothing is left to measure
    assert "tiny 1K" not in capsys.readouterr().out.splitlines()
    main([*words, "--again"])
    (again,) = json.loads(output.read_text())["cases"]
    assert again["planned"]["peak_host_bytes"] == result["planned"]["peak_host_bytes"]
    assert again["seconds"] == result["seconds"]


def test_steps_of_the_training_benchmark_are_planned(tmp_path):
    def point(name, **others):
        peaks = {"peak_allocated_bytes": 7, "peak_reserved_bytes": 8}
        times = {"seconds": [9.0, 0.5, 0.7], "median_seconds": 0.6}
        return {"part": "gains", "name": name, "rows": 2**18, "settings": [], "dense": False} | peaks | times | others

    selective = "train.activation_checkpointing=selective"
    points = [point("none", settings=["train.activation_checkpointing=none"]), point("selective", settings=[selective])]
    points += [point("dense", dense=True)]
    points += [point("broken", error="out of memory"), point("curve", part="curves")]
    training, output = tmp_path / "training.json", tmp_path / "planner.json"
    training.write_text(json.dumps({"runs": [{"environment": {"gpu": "NVIDIA H100 80GB HBM3"}}], "points": points}))
    main(["--training", str(training), "--output", str(output)])
    none, selective = json.loads(output.read_text())["cases"]
    assert none["name"] == "gains: none, 262,144 tokens"
    assert none["planned"]["peak_gpu_bytes"] > 2 * selective["planned"]["peak_gpu_bytes"]
    assert "gains: selective, 262,144 tokens |  |" in output.with_suffix(".md").read_text()
    training.write_text(json.dumps({"runs": [{"environment": {"gpu": "Abacus"}}], "points": points}))
    with pytest.raises(SystemExit, match="no 'Abacus'"):
        main(["--training", str(training), "--output", str(output)])


def test_a_setting_of_a_case_replaces_the_one_that_all_cases_have():
    assert planner.case("a", "tiny", 64, "train.batch_size=8").settings.count("train.batch_size=8") == 1
    for case in planner.GPU_CASES + planner.CPU_CASES:
        keys = [word.partition("=")[0] for word in case.settings]
        assert len(keys) == len(set(keys))
