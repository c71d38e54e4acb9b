"""A plan in print."""

from __future__ import annotations

from collections.abc import Iterator

from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import GIB
from longnet_dist.estimate.model_cost import num_parameters
from longnet_dist.estimate.remedies import remedies
from longnet_dist.estimate.run_estimate import LONGEST, MARGIN, Estimate
from longnet_dist.estimate.traffic import exchange_of

NAME, NUMBER = 34, 14


def table(plan: Estimate) -> str:
    """The plan as lines of text: a prediction, part by part."""
    return "\n".join(_lines(plan))


def check_fits(plan: Estimate) -> None:
    """Refuse a run that cannot fit, even if it needs a share of ``MARGIN`` less than planned.

    Raises:
        ConfigError: with the table, and settings that fit.
    """
    if plan.layout.config.train.ignore_plan or plan.fits(MARGIN):
        return
    raise ConfigError(
        f"this run does not fit into the memory of {plan.device.name}, by a margin of {MARGIN:.0%}; change what the "
        f"last lines say, or try it nevertheless with train.ignore_plan=true\n\n{table(plan)}\n\n{remedy_lines(plan)}"
    )


def remedy_lines(plan: Estimate) -> str:
    """Settings under which the run fits, the fastest first, or else the smallest."""
    found = remedies(plan)
    if not found:
        return "use a larger parallel.sequence, a smaller model or a shorter data.sequence_length"
    lines = ["it fits with" if found[0][1].fits() else "nothing tried fits; the smallest are"]
    lines += [f"  {words}: {_memory(other)}{_seconds(other)}" for words, other in found]
    return "\n".join(lines)


def _lines(plan: Estimate) -> Iterator[str]:
    layout, config = plan.layout, plan.layout.config
    mesh, model = layout.mesh, config.model
    yield (
        f"{layout.num_ranks} × {plan.device.name} ({mesh.data} data × {mesh.sequence} sequence), {layout.precision}, "
        f"{config.data.sequence_length:,} tokens a sequence, {config.train.batch_size} sequences a step"
    )
    yield ""
    yield _row("parameters", f"{num_parameters(model):,}")
    yield _row("model FLOPs a token", f"{plan.flops_per_token:.3e}")
    yield ""
    yield f"memory of a rank, GiB (most: {plan.memory.moment})"
    for name, size in plan.memory.device.items():
        if size:
            yield _row("  " + name, _gib(size))
    yield _row("  all tensors", _gib(plan.memory.device_bytes))
    yield _row("  context, fragments" if plan.device.type == "cuda" else "  process", _gib(plan.overhead_bytes))
    if plan.device.type == "cuda":
        yield _row("  of", _gib(plan.device.memory_bytes))
    yield from _host_lines(plan)
    exchange = exchange_of(layout)
    if exchange.bytes:
        yield _row("exchanged a layer and rank, MiB", f"{exchange.bytes / 2**20:,.2f}")
    yield ""
    yield from _time_lines(plan)
    yield ""
    yield _row("longest sequence that fits", _rows(plan.longest_sequence))
    rows, chunk = plan.longest_in_chunks
    if rows > plan.longest_sequence:
        yield _row(f"  with train.chunk_length={chunk}", _rows(rows))
    if plan.projections_that_fit > config.train.cache_qkv:
        yield _row("room for train.cache_qkv", f"{plan.projections_that_fit}")
    if not plan.fits():
        yield "DOES NOT FIT"


def _host_lines(plan: Estimate) -> Iterator[str]:
    limit = plan.host_limit if plan.device.type == "cuda" else plan.device.memory_bytes
    yield f"memory of a host with {plan.local_ranks} ranks, GiB"
    if plan.device.type == "cpu":
        yield _row("  ranks", _gib(plan.local_ranks * (plan.memory.device_bytes + plan.overhead_bytes)))
    for name, size in plan.host_parts.items():
        if size:
            yield _row("  " + name, _gib(size))
    yield _row("  all", _gib(plan.peak_host_bytes))
    if limit is not None:
        yield _row("  of", _gib(limit))


def _time_lines(plan: Estimate) -> Iterator[str]:
    if plan.step_seconds is None:
        yield "seconds of a step: unknown for this device"
        return
    yield "seconds of a step"
    for name, seconds in plan.seconds.items():
        if seconds >= 5e-5:
            yield _row("  " + name, f"{seconds:,.4f}")
    yield _row("  all", f"{plan.step_seconds:,.4f}")
    yield _row("tokens a second", f"{plan.tokens_per_second:,.0f}")
    if plan.mfu is not None:
        yield _row("model FLOPs utilization", f"{plan.mfu:.1%}")


def _row(name: str, value: str) -> str:
    return f"{name:<{NAME}}{value:>{NUMBER}}"


def _rows(rows: int) -> str:
    return f"{rows:,}" + " or more" * (rows >= LONGEST)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _memory(plan: Estimate) -> str:
    host = f" and {_gib(plan.peak_host_bytes)} GiB of the host" if plan.device.type == "cuda" else ""
    return f"{_gib(plan.memory.device_bytes + plan.overhead_bytes)} GiB a rank{host}"


def _seconds(plan: Estimate) -> str:
    return "" if plan.step_seconds is None else f", {plan.step_seconds:,.3f} s a step"
