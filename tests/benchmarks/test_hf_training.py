"""The benchmark of a Hugging Face model runs on a CPU, and counts the FLOPs of both patterns."""

import json
import subprocess
import sys

import pytest

from benchmarks import hf_training
from longnet_dist.estimate.model_cost import flops_per_token, num_parameters


def test_a_tiny_shape_is_measured_dilated_and_with_sdpa(tmp_path):
    output = tmp_path / "result.json"
    words = ["--shape", "tiny", "--rows", "64", "--first", "64", "--steps", "1", "--device", "cpu"]
    command = [sys.executable, hf_training.__file__, *words, "--seconds", "600", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["dilated"]["rows"] == 64
    assert result["dilated"]["step_seconds"] > 0
    assert result["dilated"]["loss"] == pytest.approx(5.5, abs=0.5)
    (dense,) = result["sdpa"]
    assert dense["rows"] == 64
    assert dense["tokens_per_second"] == pytest.approx(64 / dense["step_seconds"])


def test_the_shape_is_that_of_qwen3_and_dilated_attention_costs_less(tmp_path):
    model = hf_training.write_model(tmp_path, "qwen3-0.6b")
    dilated, dense = (hf_training.config_of(model, 262144, dense=dense) for dense in (False, True))
    assert num_parameters(dilated) == num_parameters(dense) == 596_049_920
    assert flops_per_token(dense, 262144) > 10 * flops_per_token(dilated, 262144)
