import pytest
import torch

from longnet_dist.config.loading import parse_config
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import flops_per_token
from longnet_dist.telemetry.throughput import Throughput


def layout(**train):
    values = {"output_dir": "run", "steps": 1, "batch_size": 4} | train
    config = parse_config({"model": {"name": "tiny"}, "data": {"sequence_length": 512}, "train": values})
    return RunLayout.of(config, 2, "cpu")


def test_the_share_of_a_given_peak():
    split = layout(peak_tflops=0.5)
    speed = Throughput(split, torch.device("cpu")).step(seconds=2.0)
    assert speed.tokens_per_second == 4 * 512 / 2
    per_rank = 4 * 512 * flops_per_token(split.config.model, 512) / 2 / 2 / 1e12
    assert speed.tflops_per_gpu == pytest.approx(per_rank)
    assert speed.mfu == pytest.approx(per_rank / 0.5)
    assert speed.peak_memory_allocated > 50 * 2**20
    assert speed.peak_memory_reserved is None


def test_without_a_peak_there_is_no_share():
    speed = Throughput(layout(), torch.device("cpu")).step(seconds=2.0)
    assert speed.mfu is None
    assert "MFU" not in str(speed)


def test_an_unknown_gpu_is_told_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Graphics 1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 2**30}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    throughput = Throughput(layout(), torch.device("cuda", 0))
    first, second = throughput.step(1.0), throughput.step(1.0)
    assert first == second
    assert (first.mfu, first.peak_memory_allocated, first.peak_memory_reserved) == (None, 5, 7)
    assert [record.message for record in caplog.records] == [
        "no peak is known of Graphics 1, so metrics have no mfu; set train.peak_tflops"
    ]
