import json

import pytest
import torch

from benchmarks import training
from benchmarks.trials import OUT_OF_MEMORY, Trial, isolated, measure
from tests.distributed import run_distributed
from tests.train.runs import import_deepspeed, write_corpus

TINY = (
    "model.dim=16", "model.layers=2", "model.heads=2", "model.segment_lengths=[16,64]", "model.dilation_rates=[1,2]",
    "train.warmup_steps=1", "train.steps=100",
)  # fmt: skip
SIZES = [
    "--rows", "256", "--tiles", "40", "64", "--gain-rows", "64", "--start", "64", "--resolution", "32",
    "--baseline-rows", "64", "128", "--curve-rows", "64", "--curve-steps", "3", "--curve-precision", "fp32",
    "--models", "paper", "dense",
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    write_corpus(tmp_path / "text.tokens")
    return tmp_path / "text.tokens"


@pytest.fixture
def here(monkeypatch):
    """Trials in forked processes, which begin at once; those above 150 rows find the memory full."""
    import_deepspeed()
    seen = []

    def forked(trial, seconds):
        seen.append(trial)
        if trial.name in ("paper", "dense") and trial.rows > 150:
            return {"error": OUT_OF_MEMORY}
        return run_distributed(measure, 1, trial, torch.device("cpu"))[0]

    monkeypatch.setattr(training, "isolated", forked)
    monkeypatch.delitem(training.OPTIONS, "compiled")  # takes a minute on a CPU; tests/model compiles
    return seen


def points(output, part):
    return [point for point in json.loads(output.read_text())["points"] if point["part"] == part]


def test_every_part(tmp_path, data, here, capsys):
    output = tmp_path / "results" / "training.json"
    words = ["--data", str(data), "--output", str(output), "--settings", *TINY]
    training.main([*words, *SIZES, "--parts", "throughput", "gains", "longest", "baseline", "curves"])
    speeds = points(output, "throughput")
    assert [point["name"] for point in speeds[:2]] == ["tile 40", "tile 64"]
    for point in speeds:
        assert point["tokens_per_second"] == pytest.approx(point["rows"] / sorted(point["seconds"][3:])[2])
        assert point["losses"][0] == pytest.approx(speeds[0]["losses"][0], rel=1e-5) or point["rows"] != 256
    gains = points(output, "gains")
    assert [point["name"] for point in gains] == list(training.GAINS)
    for point in gains:
        same = gains[0]["losses"] if "ids" not in point["name"] else gains[-1]["losses"]
        assert point["losses"] == pytest.approx(same, rel=1e-4)
    _, _, first, *others = output.with_suffix(".md").read_text().splitlines()
    assert first.startswith("| selective | 64 | ")
    assert first.split(" | ")[3] == "1.000"
    assert len(others) == len(training.GAINS) - 1
    longest = [(point["rows"], "error" in point) for point in points(output, "longest") if point["name"] == "paper"]
    assert longest == [(64, False), (128, False), (256, True), (192, True), (160, True)]
    dilated, dense = points(output, "baseline")[:2]
    assert dense["dense"]
    assert dilated["losses"] != dense["losses"]
    for point in points(output, "curves"):
        assert len(point["losses"]) == 3
        assert point["difference"] < 1e-5
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    number = len(here)
    training.main([*words, *SIZES, "--parts", "throughput", "curves"])
    assert len(here) == number  # nothing twice
    training.main([*words, *SIZES, "--parts", "throughput", "--rows", "128", "--seconds", "0"])
    assert len(here) == number
    assert "no time left" in capsys.readouterr().out


def test_a_trial_in_a_process_of_its_own(data):
    trial = Trial("tiny", 64, str(data), (*TINY, "train.activation_checkpointing=full"), warmup=0, steps=1)
    result = isolated(trial, 300)
    assert len(result["losses"]) == 1
    assert isolated(trial, 0.01) == {"error": "no answer within 0 s"}


def test_a_trial_that_fails_says_why(data):
    result = isolated(Trial("tiny", 64, str(data), ("model.heads=5",)), 300)
    assert result["error"] == "status 1"
    assert "heads must divide dim" in result["said"]
