import json
from dataclasses import replace
from pathlib import Path

import pytest

from longnet_dist.estimate.devices import named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.network import Network
from longnet_dist.estimate.run_estimate import Estimate
from longnet_dist.estimate.traffic import exchange_of
from longnet_dist.geometry.exchange_plan import plan_exchange
from tests.estimate.layouts import small_layout

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
NETWORK = Network(gpus_per_host=8, link=400e9, fabric=40e9, link_seconds=1e-4, fabric_seconds=2e-5)


def test_bytes_take_the_slower_of_their_ways():
    assert NETWORK.exchange_seconds(4e9, 0, 8) == pytest.approx(1e-4 + 0.01)
    assert NETWORK.exchange_seconds(4e9, 4e9, 16) == pytest.approx(1e-4 + 2e-5 + 0.1)
    assert NETWORK.ring_seconds(8e9, 1) == 0
    assert NETWORK.ring_seconds(8e9, 8) == pytest.approx(1e-4 + 8e9 * 7 / 8 / 400e9)
    # 16 ranks on 2 hosts: a host sends through its eight adapters at once, 320 GB/s.
    assert NETWORK.ring_seconds(8e9, 16) == pytest.approx(1e-4 + 2e-5 + 8e9 * 15 / 16 / 320e9)
    assert [NETWORK.hosts(ranks) for ranks in (1, 8, 9, 1024)] == [1, 1, 2, 128]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gpus_per_host", [1, 2, 3, 8])
def test_records_from_other_hosts_are_those_of_the_plan(gpus_per_host, causal):
    model = {"segment_lengths": [100, 300, 5000], "dilation_rates": [1, 3, 7], "kv_heads": 2, "causal": causal}
    layout = small_layout(1000, 6, model=model)
    rank = 5 if causal else 3
    plan = plan_exchange(layout.config.model.pattern, layout.last_chunk, rank, 2, causal)
    distant = sum(n for other, n in enumerate(plan.receive_counts) if other // gpus_per_host != rank // gpus_per_host)
    counted = exchange_of(layout, gpus_per_host)
    assert counted.distant == distant
    assert (counted.distant == counted.foreign) == (gpus_per_host == 1 or counted.foreign == 0)


def estimate(ranks, rows=2**20, overlap=True):
    pattern = {"segment_lengths": [2048, 2**20, 2**25], "dilation_rates": [1, 64, 1024]}
    model = {"dim": 768, "layers": 12, "heads": 12} | pattern
    layout = small_layout(rows * ranks, ranks, model=model, parallel={"sequence": ranks, "overlap": overlap})
    return Estimate.of(layout, named_device("h200"))


def test_more_ranks_are_those_of_a_run_configured_so():
    for ranks in (1, 4, 16):
        scaled, configured = estimate(2).on_ranks(ranks), estimate(ranks)
        assert scaled.seconds == configured.seconds
        assert scaled.memory == configured.memory


def test_a_slow_fabric_slows_only_runs_on_several_hosts():
    slow = replace(named_device("h200"), fabric=1e8)
    one, two = (Estimate.of(estimate(ranks).layout, slow) for ranks in (8, 16))
    assert one.seconds == estimate(8).seconds
    assert two.seconds["exchange"] > 2 * estimate(16).seconds["exchange"]
    assert two.seconds["update"] > estimate(16).seconds["update"]


def test_overlap_hides_bytes_but_not_latency():
    hidden, exposed = (estimate(16, 2**14, overlap) for overlap in (True, False))
    assert 0 < hidden.seconds["exchange"] < exposed.seconds["exchange"]


def test_measured_steps_on_one_and_two_gpus():
    """The paper's model over 1,048,576 tokens a GPU, on two H200."""
    from longnet_dist.config.loading import load_config
    from longnet_dist.config.packaged import find_config

    record = json.loads((RESULTS / "training_scaling_2xh200.json").read_text())
    settings = "deepspeed.zero_stage=2 train.activation_checkpointing=selective train.micro_batch_size=1 "
    settings += "train.feed_forward_tile=65536 data.sequence_length=1048576 train.batch_size=1"
    config = load_config(find_config("paper"), settings.split())
    first = Estimate.of(RunLayout.of(config, 1, "cuda"), named_device("h200"))
    for point in record["points"]:
        predicted = first.on_ranks(point["gpus"]).step_seconds
        assert predicted == pytest.approx(point["median_seconds"], rel=0.1)
