"""What makes a run smaller, cheapest first, with what it would need then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longnet_dist.estimate.run_estimate import Estimate

MOST_SHOWN = 6
TILE = 65536
Settings = dict[str, Any]


def remedies(plan: Estimate) -> list[tuple[str, Estimate]]:
    """Settings under which the run fits, in the order of their predicted seconds a step; if none fits, the smallest.

    Each with its plan, which takes less memory than ``plan``. Two kinds of change are combined only where no single one
    suffices.
    """
    ways, states, chunks = list(_activations(plan)), list(_states(plan)), list(_chunks(plan))
    smaller = _smaller(plan, ways + states + chunks)
    if not any(other.fits() for _, other in smaller):
        smaller += _smaller(plan, [first | second for first in ways + chunks for second in states])
    fitting = [pair for pair in smaller if pair[1].fits()]
    if fitting:
        return sorted(fitting, key=lambda pair: pair[1].step_seconds or 0)[:MOST_SHOWN]
    return sorted(smaller, key=lambda pair: pair[1].memory.device_bytes)[:MOST_SHOWN]


def _smaller(plan: Estimate, changes: list[Settings]) -> list[tuple[str, Estimate]]:
    plans = [(_words(settings), plan.having(**settings)) for settings in changes]
    most = plan.memory.device_bytes
    return [(words, other) for words, other in plans if other is not None and other.memory.device_bytes < most]


def _activations(plan: Estimate) -> Iterator[Settings]:
    """What keeps less from forward to backward."""
    small: Settings = {"train__micro_batch_size": 1} if plan.layout.micro_batch_size > 1 else {}
    if small:
        yield small
    for mode in ("selective", "full"):
        checkpointing = small | {"train__activation_checkpointing": mode}
        yield checkpointing
        yield checkpointing | {"train__feed_forward_tile": TILE}
        if plan.device.type == "cuda":
            yield checkpointing | {"train__feed_forward_tile": TILE, "train__offload_activations": True}


def _states(plan: Estimate) -> Iterator[Settings]:
    """What shards more of the optimizer's state, or takes it to the host."""
    stage = plan.layout.config.deepspeed.zero_stage
    if plan.layout.num_ranks > 1:
        yield from ({"deepspeed__zero_stage": higher} for higher in range(stage + 1, 4))
    if plan.device.type == "cuda":
        yield {"deepspeed__zero_stage": max(2, stage), "deepspeed__offload_optimizer": True}


def _chunks(plan: Estimate) -> Iterator[Settings]:
    """Chunks of a causal sequence."""
    length, ranks = plan.layout.chunk_length, plan.layout.mesh.sequence
    for parts in (2, 8, 64):
        if plan.layout.config.model.causal and length >= parts * ranks:
            yield {"train__chunk_length": -(-length // parts // ranks) * ranks}


def _words(settings: Settings) -> str:
    """As a command line has them."""
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in settings.items()}
    return " ".join(f"{name.replace('__', '.')}={value}" for name, value in values.items())
