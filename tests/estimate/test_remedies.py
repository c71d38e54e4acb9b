import pytest

from longnet_dist.config.loading import load_config
from longnet_dist.config.packaged import find_config
from longnet_dist.estimate.devices import GIB, named_device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.remedies import SAME_TIME, fastest, remedies
from longnet_dist.estimate.run_estimate import SPARE, Estimate
from longnet_dist.estimate.table import fastest_lines

LONG = ("data.sequence_length=1048576", "train.batch_size=2", "train.micro_batch_size=1")


def estimate(*settings, ranks=1, device="h200", host_limit=None):
    last = {word.partition("=")[0]: word for word in settings}
    layout = RunLayout.of(
        load_config(find_config("paper"), list(last.values())), ranks, "cpu" if device == "cpu" else "cuda"
    )
    return Estimate.of(layout, named_device(device), ranks, host_limit)


@pytest.mark.parametrize(
    ("settings", "ranks", "device"),
    [
        (LONG, 1, "h200"),
        ((*LONG, "model.name=1.3b"), 1, "h100"),
        ((*LONG, "model.name=2.7b"), 2, "a100-40gb"),
        ((*LONG, "train.offload_activations=true", "train.cache_qkv=6", "train.offload_qkv=3"), 1, "h100"),
        (("model.causal=false", "model.positions=rope"), 4, "l4"),
        ((), 2, "cpu"),
        (("train.optimizer=adafactor", "train.precision=fp32", "deepspeed.zero_stage=0"), 2, "h200"),
        ((*LONG, "train.optimizer=muon"), 2, "h100"),
    ],
)
def test_what_is_suggested_is_a_valid_configuration_and_fits_as_said(settings, ranks, device):
    found = fastest(estimate(*settings, ranks=ranks, device=device))
    assert found
    for words, predicted in found:
        again = estimate(*settings, *words.split(), ranks=ranks, device=device)
        assert again.memory == predicted.memory
        assert again.step_seconds == predicted.step_seconds
        assert again.fits(-SPARE)
    seconds = [predicted.step_seconds for _, predicted in found]
    sizes = [predicted.memory.device_bytes for _, predicted in found]
    assert seconds == sorted(seconds)
    assert sizes == sorted(sizes, reverse=True)


def test_nothing_that_fits_is_faster():
    run = estimate(*LONG, "model.name=1.3b")
    best = fastest(run)[0][1].step_seconds
    others = [
        run.with_settings(
            train__activation_checkpointing=mode,
            train__cache_qkv=number if mode == "selective" else 0,
            train__offload_activations=offload and mode != "none",
            train__feed_forward_tile=tile,
            train__chunk_length=chunk,
        )
        for mode in ("none", "selective", "full")
        for number in range(0, 25, 4)
        for offload in (False, True)
        for tile in (None, 65536)
        for chunk in (None, 2**19, 2**17)
    ]
    assert best <= SAME_TIME * min(other.step_seconds for other in others if other.fits(-SPARE))


def test_a_run_that_is_already_the_fastest_is_left_alone():
    found = fastest(estimate("train.activation_checkpointing=none", "train.micro_batch_size=8"))
    assert found[0][0] == ""
    assert "  as configured: " in fastest_lines(found)


def test_no_setting_makes_a_model_fit_that_is_too_large():
    run = estimate("model.dim=16384", "model.heads=64", "model.layers=96", host_limit=64 * GIB)
    assert fastest(run) == []
    assert "no combination" in fastest_lines([])
    smallest = remedies(run)
    assert not any(other.fits() for _, other in smallest)
    assert smallest[0][1].memory.device_bytes < run.memory.device_bytes


def test_host_memory_bounds_what_is_offloaded():
    settings = (*LONG, "model.name=2.7b")
    rich, poor = (fastest(estimate(*settings, host_limit=size * GIB)) for size in (2048, 64))
    assert any("offload" in words for words, _ in rich)
    assert all(other.peak_host_bytes <= 64 * GIB for _, other in poor)
    assert rich[0][1].step_seconds < poor[0][1].step_seconds


def test_blocks_stay_on_the_gpu_where_the_host_has_too_little_memory_for_all():
    settings = ("data.sequence_length=1048576", "train.batch_size=1", "train.micro_batch_size=1", "model.name=1.3b")
    run = estimate(*settings, "train.checkpoint_every=0", host_limit=128 * GIB)
    words, best = fastest(run)[0]
    assert "train.resident_blocks=" in words
    assert best.peak_host_bytes <= 128 * GIB / (1 + SPARE)
    more = best.with_settings(train__resident_blocks=best.layout.config.train.resident_blocks + 1)
    assert not more.fits_device(-SPARE)
    without = estimate(
        *settings, *words.split(), "train.resident_blocks=2", "train.checkpoint_every=0", host_limit=128 * GIB
    )
    assert without.step_seconds == best.step_seconds
    assert not without.fits_host()
