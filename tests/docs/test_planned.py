"""The planned figures of an 8B model are those of the planner."""

from __future__ import annotations

import pytest

from longnet_dist.config.loading import parse_config, set_override
from longnet_dist.estimate.devices import named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.geometry.pattern import DilatedPattern
from tests.docs.pages import ROOT, table_rows

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
ROWS = [cells for cells in table_rows(ROOT / "docs" / "huggingface.md") if cells[-1].endswith(" s")]


def test_there_are_planned_figures() -> None:
    assert len(ROWS) == 4


@pytest.mark.parametrize(("tokens", "settings", "memory", "seconds"), ROWS)
def test_planned_figures(tokens: str, settings: str, memory: str, seconds: str) -> None:
    length = int(tokens.replace(",", ""))
    pattern = DilatedPattern.geometric(2048, length, 4)
    branches = {"segment_lengths": pattern.segment_lengths, "dilation_rates": pattern.dilation_rates}
    train = {"output_dir": "x", "steps": 1, "batch_size": 8, "micro_batch_size": 1, "activation_checkpointing": "full"}
    values = {"model": {"config": LLAMA_8B, **branches}, "data": {"sequence_length": length}, "train": train}
    for setting in settings.strip("`").split():
        set_override(values, setting)
    estimate = Estimate.of(RunLayout.of(parse_config(values), 8, "cuda"), named_device("h100"), 8, None)
    assert estimate.fits()
    assert memory == f"{estimate.peak_gpu_bytes / 2**30:.0f} GiB"
    assert seconds == f"{estimate.step_seconds:.0f} s"
