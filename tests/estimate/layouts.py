"""Helpers of the tests: layouts of small runs."""

from longnet_dist.config.loading import parse_config
from longnet_dist.estimate.layout import RunLayout

SMALL = {"dim": 128, "layers": 4, "heads": 4, "segment_lengths": [256, 512], "dilation_rates": [1, 2], "loss_chunk": 64}


def small_layout(rows=2048, ranks=1, device_type="cuda", model=None, train=None, **sections):
    """Return the layout of a run with one sequence for each step, on a GPU by default."""
    values = {
        "model": SMALL | (model or {}),
        "data": {"sequence_length": rows},
        "train": {"output_dir": "run", "steps": 1, "batch_size": 1} | (train or {}),
    }
    return RunLayout.of(parse_config(values | sections), ranks, device_type)
