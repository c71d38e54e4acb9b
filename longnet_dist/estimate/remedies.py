"""Remedies are settings that make a run smaller, each with an estimate of the run under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longnet_dist.estimate.run_estimate import Estimate

MAX_SHOWN = 6
TILE = 65536
Settings = dict[str, Any]


def remedies(estimate: Estimate) -> list[tuple[str, Estimate]]:
    """Find settings under which the run fits, the fastest first; if none fits, return the smallest runs.

    Two kinds of change are combined only if no single one suffices.

    Args:
        estimate: of the run as it is configured.

    Returns:
        pairs of settings, as a command line has them, and the estimate under them. Each needs less memory than
        ``estimate``.
    """
    ways, states, chunks = list(_activations(estimate)), list(_states(estimate)), list(_chunks(estimate))
    smaller = _smaller(estimate, ways + states + chunks)
    if not any(other.fits() for _, other in smaller):
        smaller += _smaller(estimate, [first | second for first in ways + chunks for second in states])
    fitting = [pair for pair in smaller if pair[1].fits()]
    if fitting:
        return sorted(fitting, key=lambda pair: pair[1].step_seconds or 0)[:MAX_SHOWN]
    return sorted(smaller, key=lambda pair: pair[1].memory.device_bytes)[:MAX_SHOWN]


def _smaller(estimate: Estimate, changes: list[Settings]) -> list[tuple[str, Estimate]]:
    estimates = [(_words(settings), estimate.with_settings(**settings)) for settings in changes]
    most = estimate.memory.device_bytes
    return [(words, other) for words, other in estimates if other is not None and other.memory.device_bytes < most]


def _activations(estimate: Estimate) -> Iterator[Settings]:
    """Yield settings that save fewer activations from forward to backward."""
    small: Settings = {"train__micro_batch_size": 1} if estimate.layout.micro_batch_size > 1 else {}
    if small:
        yield small
    for mode in ("selective", "full"):
        checkpointing = small | {"train__activation_checkpointing": mode}
        yield checkpointing
        yield checkpointing | {"train__feed_forward_tile": TILE}
        if estimate.device.type == "cuda":
            yield checkpointing | {"train__feed_forward_tile": TILE, "train__offload_activations": True}


def _states(estimate: Estimate) -> Iterator[Settings]:
    """Yield settings that shard more of the optimizer's state, or keep it in host memory."""
    stage = estimate.layout.config.deepspeed.zero_stage
    if estimate.layout.num_ranks > 1:
        yield from ({"deepspeed__zero_stage": higher} for higher in range(stage + 1, 4))
    if estimate.device.type == "cuda":
        yield {"deepspeed__zero_stage": max(2, stage), "deepspeed__offload_optimizer": True}


def _chunks(estimate: Estimate) -> Iterator[Settings]:
    """Yield settings that compute a causal sequence in chunks."""
    length, ranks = estimate.layout.chunk_length, estimate.layout.mesh.sequence
    for parts in (2, 8, 64):
        if estimate.layout.config.model.causal and length >= parts * ranks:
            yield {"train__chunk_length": -(-length // parts // ranks) * ranks}


def _words(settings: Settings) -> str:
    """Write settings as on a command line."""
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in settings.items()}
    return " ".join(f"{name.replace('__', '.')}={value}" for name, value in values.items())
