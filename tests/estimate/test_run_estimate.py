import json
import logging
from dataclasses import replace

import pytest

from longnet_dist.config.loading import load_config
from longnet_dist.config.packaged import find_config
from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import GIB, named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.remedies import remedies
from longnet_dist.estimate.run_estimate import MARGIN, Estimate
from longnet_dist.estimate.table import check_fits, slow_step, table
from longnet_dist.numerics import log_once
from tests.estimate.layouts import small_layout

PAPER = {"dim": 768, "layers": 12, "heads": 12, "segment_lengths": [2048, 4096], "dilation_rates": [1, 2]}


def estimate(rows=2**19, ranks=1, device="h100", local_ranks=1, host_limit=None, **sections):
    layout = small_layout(rows, ranks, "cpu" if device == "cpu" else "cuda", **({"model": PAPER} | sections))
    return Estimate.of(layout, named_device(device), local_ranks, host_limit)


def test_the_parts_make_up_the_peak():
    values = estimate(train={"activation_checkpointing": "selective"}).to_json()
    assert values["peak_gpu_bytes"] == sum(values["device_parts"].values()) > GIB
    assert values["peak_host_bytes"] == sum(values["host_parts"].values())
    assert values["step_seconds"] == sum(values["step_parts"].values())
    tokens_per_second = 2**19 / values["step_seconds"]
    assert values["mfu"] == pytest.approx(values["flops_per_token"] * tokens_per_second / 989.4e12)
    json.dumps(values)


def test_a_cpu_holds_everything_in_its_memory():
    values = estimate(1024, device="cpu", local_ranks=2).to_json()
    assert values["peak_gpu_bytes"] == 0
    ranks = 2 * (sum(values["device_parts"].values()) + values["overhead_bytes"])
    assert values["peak_host_bytes"] == ranks + values["host_parts"]["checkpoint"]
    assert values["mfu"] is None


def test_only_a_step_of_minutes_is_told_at_the_start():
    short = estimate(2**12, train={"steps": 4320})
    assert short.step_seconds < 300
    assert slow_step(short) == slow_step(replace(short, seconds={})) == ""
    slow = slow_step(replace(short, seconds={"blocks": 500.0, "head": 100.0}))
    assert "a step takes about 10 minutes on h100 by estimate, and all 4,320 steps 30 days" in slow


def test_the_longest_sequence_fits_and_little_more_does_not():
    short = estimate(2**12)
    rows = short.longest_sequence
    assert short.with_settings(data__sequence_length=rows).fits()
    assert not short.with_settings(data__sequence_length=rows + rows // 500).fits()
    assert estimate(2**19).longest_sequence == rows
    in_chunks, chunk = short.longest_in_chunks
    assert in_chunks > 10 * rows
    assert chunk < rows


@pytest.mark.parametrize(
    ("settings", "smaller"),
    [
        ({"train__activation_checkpointing": "selective"}, True),
        ({"train__chunk_length": 2**16}, True),
        ({"deepspeed__zero_stage": 2, "deepspeed__offload_optimizer": True}, True),
        ({"train__batch_size": 2}, False),
    ],
)
def test_what_makes_a_run_smaller(settings, smaller):
    before = estimate()
    assert (before.with_settings(**settings).memory.device_bytes < before.memory.device_bytes) == smaller


def test_offload_moves_activations_to_the_host():
    kept = estimate(train={"activation_checkpointing": "selective"})
    offloaded = kept.with_settings(train__offload_activations=True)
    gone = kept.memory.device["activations"] - offloaded.memory.device["activations"]
    assert 0 < gone < offloaded.memory.host["activations"] + 1
    assert offloaded.memory.host["activations"] * 12 == kept.memory.device["activations"] * 10
    resident = offloaded.with_settings(train__resident_blocks=5)
    assert resident.memory.device["activations"] * 2 == offloaded.memory.device["activations"] * 5
    assert resident.memory.host["activations"] * 10 == offloaded.memory.host["activations"] * 7


def test_a_run_that_cannot_fit_is_refused_with_the_table_and_what_fits():
    with pytest.raises(ConfigError, match="does not fit into the memory of h100") as error:
        check_fits(estimate())
    message = str(error.value)
    assert table(estimate()) in message
    assert "train.ignore_plan=true" in message
    for words, other in remedies(estimate()):
        assert words in message
        assert other.fits()
    seconds = [other.step_seconds for _, other in remedies(estimate())]
    assert seconds == sorted(seconds)
    check_fits(estimate(train={"ignore_plan": True}))


def test_the_margin_is_what_a_prediction_may_be_too_high():
    edge = estimate(estimate().longest_sequence)
    check_fits(edge)
    above = edge.with_settings(data__sequence_length=int(edge.longest_sequence * (1 + MARGIN / 2)))
    assert not above.fits()
    check_fits(above)
    with pytest.raises(ConfigError):
        check_fits(edge.with_settings(data__sequence_length=int(edge.longest_sequence * (1 + 2 * MARGIN))))


def test_a_host_that_is_too_small():
    assert estimate(2**12, local_ranks=8).fits()
    assert not estimate(2**12, local_ranks=8, host_limit=16 * GIB).fits()


def test_a_host_that_reports_too_little_is_a_warning_since_its_memory_may_grow(caplog):
    log_once.cache_clear()
    small = estimate(2**12, local_ranks=8, host_limit=16 * GIB)
    with caplog.at_level(logging.WARNING):
        check_fits(small)
    (message,) = (record.getMessage() for record in caplog.records)
    assert f"{small.peak_host_bytes / GIB:.2f} GiB" in message
    assert "--host-memory 16 lists settings" in message
    assert small.fits_device()
    assert not small.fits_host()
    with pytest.raises(ConfigError, match="does not fit into the memory of h100"):
        check_fits(estimate(host_limit=16 * GIB))


def test_an_8b_model_trains_a_million_tokens_on_two_gpus_in_chunks_without_host_memory():
    settings = {"activation_checkpointing": "selective", "chunk_length": 2**17, "checkpoint_async": False}
    config = load_config(
        find_config("paper"), ["model.name=8b", "model.vocab_size=151936", f"data.sequence_length={2**20}",
                               "train.batch_size=1", "train.micro_batch_size=1", "parallel.sequence=2"],
    )  # fmt: skip
    layout = RunLayout.of(config, 2, "cuda")
    whole = Estimate.of(layout, named_device("h200"), 2)
    chunked = whole.with_settings(**{f"train__{name}": value for name, value in settings.items()})
    assert not whole.fits()
    assert chunked.fits()
    assert chunked.memory.host["activations"] == 0
    assert chunked.tokens_per_second / 2 > 7000


def test_sizes_behind_all_numbers():
    with pytest.raises(ConfigError, match="beyond any machine"):
        estimate(model=PAPER | {"dim": 12 * 10**310})


def test_more_ranks_hold_a_longer_sequence():
    assert estimate(ranks=8).longest_sequence > 7 * estimate().longest_sequence


def test_free_memory_is_suggested_for_cache_qkv():
    selective = {"activation_checkpointing": "selective", "feed_forward_tile": 2**16}
    long = estimate(2**20, train=selective)
    kept = long.cache_qkv_that_fits
    assert 0 < kept < 12
    assert long.with_settings(train__cache_qkv=kept).fits(-0.05)
    assert not long.with_settings(train__cache_qkv=kept + 1).fits(-0.05)
    assert "room for train.cache_qkv" in table(long)
    assert long.with_settings(train__activation_checkpointing="full").cache_qkv_that_fits == 0


def test_offload_qkv_moves_bytes_from_the_device_to_the_host():
    selective = {"activation_checkpointing": "selective", "offload_activations": True}
    kept, waiting = (estimate(2**18, train=selective | {"cache_qkv": 8, "offload_qkv": number}) for number in (0, 5))
    block = 2**18 * 3 * 768 * 2  # bytes of q, k, v
    assert kept.to_json()["peak_gpu_bytes"] - waiting.to_json()["peak_gpu_bytes"] == 5 * block
    assert waiting.to_json()["peak_host_bytes"] - kept.to_json()["peak_host_bytes"] == 5 * block
