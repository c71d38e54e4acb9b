"""A search over the memory options of a run finds the settings under which it fits, and those that run fastest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from longnet_dist.config.hf_model import HuggingFaceConfig
from longnet_dist.estimate.run_estimate import SPARE, Estimate
from longnet_dist.optim.optimizers import OPTIMIZERS

MAX_SHOWN = 6
TILE = 65536
MAX_CHUNKS = 64
SAME_TIME = 1.005
"""Two predicted times are alike if they differ by less than this factor: the settings that change less are shown."""
Settings = dict[str, Any]
Found = list[tuple[str, Estimate]]


def remedies(estimate: Estimate) -> Found:
    """Search micro-batches, checkpointing, offload, chunks and ZeRO stages for settings that make a run smaller.

    What is computed stays: model, sequence length, sequences of a step, ranks and their mesh.

    Args:
        estimate: of the run as it is configured.

    Returns:
        at most ``MAX_SHOWN`` pairs of settings, as a command line has them, and the estimate under them. All need less
        memory than the run as it is configured: the fastest that fits, then slower ones that need still less. If none
        fits, those that need the least.
    """
    return _search(estimate, 0.0, estimate.memory.device_bytes)


def fastest(estimate: Estimate) -> Found:
    """Search the same settings for the fastest that fit, with room for an error of the prediction.

    Returns:
        as :func:`remedies`, also settings that need more memory than is configured; ``SPARE`` of the memory stays free.
        The words are empty for the run as it is configured. Empty if nothing fits.
    """
    return [pair for pair in _search(estimate, SPARE, None) if pair[1].fits(-SPARE)]


def _search(estimate: Estimate, spare: float, below: int | None) -> Found:
    """Return the fastest settings that fit, with a share ``spare`` left, or else the smallest; of ``below`` bytes."""
    tried = [Candidate.of(estimate, settings) for settings in _settings(estimate)]
    found = [one for one in tried if one is not None and (below is None or one.device_bytes < below)]
    fitting = [candidate for candidate in found if candidate.estimate.fits(-spare)]
    chosen = _front(fitting) if fitting else sorted(found, key=lambda candidate: candidate.device_bytes)
    return [(_words(candidate.changes), candidate.estimate) for candidate in chosen[:MAX_SHOWN]]


@dataclass(frozen=True)
class Candidate:
    """A Candidate is a run under changed settings.

    Attributes:
        changes: the settings that differ from what is configured.
        estimate: of the run under them.
        seconds: of a step; 0 if the speed of the device is unknown.
        device_bytes: peak of all tensors on a rank.
    """

    changes: Settings
    estimate: Estimate
    seconds: float
    device_bytes: int

    @classmethod
    def of(cls, configured: Estimate, settings: Settings) -> Candidate | None:
        """Estimate a run under other settings; return None if they do not fit together."""
        changes = {name: value for name, value in settings.items() if value != _configured(configured, name)}
        other = configured.with_settings(**changes)
        return None if other is None else cls(changes, other, other.step_seconds or 0.0, other.memory.device_bytes)


def _front(candidates: list[Candidate]) -> list[Candidate]:
    """Return the candidates than which no other is both faster and smaller, the fastest first.

    Of those whose times are alike, the one that changes the least stands for all.
    """
    ordered = sorted(candidates, key=lambda candidate: (candidate.seconds, candidate.device_bytes))
    seconds = [candidate.seconds for candidate in ordered]
    front: list[Candidate] = []
    for candidate in ordered:
        if front and candidate.device_bytes >= front[-1].device_bytes:
            continue
        alike = ordered[: bisect_right(seconds, SAME_TIME * candidate.seconds)]
        smaller = [other for other in alike if not front or other.device_bytes < front[-1].device_bytes]
        front.append(min(smaller, key=lambda other: (len(other.changes), other.device_bytes)))
    return front


def _settings(estimate: Estimate) -> Iterator[Settings]:
    """Yield every combination of memory options that is valid for a run."""
    for parts in product(_batches(estimate), _chunks(estimate), _states(estimate), _activations(estimate)):
        settings: Settings = {}
        for part in parts:
            settings |= part
        yield settings
        if settings["train__activation_checkpointing"] == "selective":
            yield from _with_qkv(estimate, settings)
        if settings["train__offload_activations"]:
            yield from _with_resident(estimate, settings)


def _batches(estimate: Estimate) -> Iterator[Settings]:
    """Yield every power of two that a rank can compute at once of its sequences, and the configured number."""
    sequences = estimate.layout.micro_batch_size * estimate.layout.accumulation
    sizes = {1 << power for power in range(sequences.bit_length())} | {estimate.layout.micro_batch_size}
    yield from ({"train__micro_batch_size": size} for size in sorted(sizes) if sequences % size == 0)


def _chunks(estimate: Estimate) -> Iterator[Settings]:
    """Yield a whole sequence, and chunks of a causal one: halves, quarters and so on."""
    config, ranks = estimate.layout.config, estimate.layout.mesh.sequence
    length = config.data.sequence_length
    yield {"train__chunk_length": None}
    parts = 2
    while config.model.causal and parts <= MAX_CHUNKS and length >= 2 * parts * ranks:
        yield {"train__chunk_length": -(-length // parts // ranks) * ranks}
        parts *= 2


def _states(estimate: Estimate) -> Iterator[Settings]:
    """Yield the optimizer's ZeRO stages that shard anything over the ranks, each without and with its offload."""
    optimizer = OPTIMIZERS[estimate.layout.config.train.optimizer]
    least = 1 if estimate.layout.precision == "bf16" else 0
    stages = range(least, 4) if estimate.layout.num_ranks > 1 else (least, 2)
    for stage in (stage for stage in stages if stage in optimizer.zero_stages):
        yield {"deepspeed__zero_stage": stage, "deepspeed__offload_optimizer": False}
        if stage and optimizer.host_offload and estimate.device.type == "cuda":
            yield {"deepspeed__zero_stage": stage, "deepspeed__offload_optimizer": True}


def _activations(estimate: Estimate) -> Iterator[Settings]:
    """Yield the ways to keep or recompute activations, with neither queries, keys nor values kept."""
    plain: Settings = {
        "train__offload_activations": False,
        "train__resident_blocks": None,
        "train__cache_qkv": 0,
        "train__offload_qkv": 0,
    }
    yield plain | {"train__activation_checkpointing": "none", "train__feed_forward_tile": None}
    ours = not isinstance(estimate.layout.config.model, HuggingFaceConfig)
    offloads = (False, True) if ours and estimate.device.type == "cuda" else (False,)
    for mode, tile, offload in product(("selective", "full") if ours else ("full",), (None, TILE), offloads):
        yield plain | {
            "train__activation_checkpointing": mode,
            "train__feed_forward_tile": tile,
            "train__offload_activations": offload,
        }


def _with_qkv(estimate: Estimate, settings: Settings) -> Iterator[Settings]:
    """Yield the settings with the most blocks that can keep their queries, keys and values."""
    base = estimate.with_settings(**settings)
    if base is not None and (number := base.cache_qkv_that_fits):
        yield settings | {"train__cache_qkv": number}


def _with_resident(estimate: Estimate, settings: Settings) -> Iterator[Settings]:
    """Yield, where the host has too little memory, the settings with the most blocks that need none of it."""
    base = estimate.with_settings(**settings)
    if base is not None and base.fits_device(-SPARE) and not base.fits_host(-SPARE):
        yield settings | {"train__resident_blocks": base.resident_blocks_that_fit}


def _configured(estimate: Estimate, name: str) -> Any:
    section, _, key = name.partition("__")
    return getattr(getattr(estimate.layout.config, section), key)


def _words(settings: Settings) -> str:
    """Write settings as on a command line."""
    return " ".join(f"{name.replace('__', '.')}={_value(value)}" for name, value in settings.items())


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
