import pytest
import torch

from longnet_dist.config.loading import parse_config
from longnet_dist.errors import LongNetError
from longnet_dist.estimate.devices import named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.remedies import remedies
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.resilience.out_of_memory import explained


@pytest.fixture
def plan():
    config = parse_config(
        {
            "model": {"name": "paper"},
            "data": {"sequence_length": 2**19},
            "train": {"output_dir": "run", "steps": 1, "batch_size": 1},
        }
    )
    return Estimate.of(RunLayout.of(config, 1, "cuda"), named_device("h100"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()])
def test_the_message_has_the_table_and_what_to_change(plan, error):
    with pytest.raises(LongNetError, match=r"rank 3 is out of memory") as raised, explained(3, plan):
        raise error
    message = str(raised.value)
    assert "memory of a rank, GiB (most: last block)" in message
    assert "train.activation_checkpointing=selective train.feed_forward_tile=65536: " in message


def test_what_is_suggested_needs_less_memory_also_where_the_plan_fits(plan):
    small = plan.with_settings(data__sequence_length=2**16)
    assert small.fits()
    found = remedies(small)
    assert found
    assert all(other.memory.device_bytes < small.memory.device_bytes for _, other in found)


def test_a_cpu_that_is_full(plan):
    with pytest.raises(LongNetError, match="out of memory"), explained(0, plan):
        torch.empty(2**50, dtype=torch.float64)


def test_other_errors_pass(plan):
    with pytest.raises(RuntimeError, match="another"), explained(0, plan):
        raise RuntimeError("another")
