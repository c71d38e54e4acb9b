"""An estimate is printed as a table of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longnet_dist.errors import ConfigError
from longnet_dist.estimate.devices import GIB
from longnet_dist.estimate.model_cost import num_parameters
from longnet_dist.estimate.remedies import Found, remedies
from longnet_dist.estimate.run_estimate import LONGEST, MARGIN, Estimate
from longnet_dist.estimate.traffic import exchange_of
from longnet_dist.numerics import log_once

NAME, NUMBER = 34, 14
SLOW_SECONDS = 300.0
"""Of a step from which on a run is told at its start how long it takes."""


def table(estimate: Estimate) -> str:
    """Return the estimate as lines of text: memory and time, part by part."""
    return "\n".join(_lines(estimate))


def check_fits(estimate: Estimate) -> None:
    """Refuse a run that would not fit even if it needed a share ``MARGIN`` less than predicted.

    Beside a GPU, too little memory of the host is only a warning: that of some machines grows as it is used.
    ``train.ignore_plan`` switches the check off.

    Raises:
        ConfigError: the run does not fit; the message has the table and settings that fit.
    """
    if estimate.layout.config.train.ignore_plan or estimate.fits(MARGIN):
        return
    if estimate.device.type == "cuda" and estimate.fits_device(MARGIN):
        assert estimate.host_limit is not None
        log_once(
            f"the ranks of this host will need about {_gib(estimate.peak_host_bytes)} GiB of its memory, of which the "
            f"system reports {_gib(estimate.host_limit)} GiB; if that cannot grow, they will be killed: longnet plan "
            f"--optimize --host-memory {estimate.host_limit // GIB} lists settings that need less"
        )
        return
    raise ConfigError(
        f"this run does not fit into the memory of {estimate.device.name}, by a margin of {MARGIN:.0%}; change "
        f"what the last lines say, or try it nevertheless with train.ignore_plan=true\n\n{table(estimate)}\n\n"
        f"{remedy_lines(estimate)}"
    )


def slow_step(estimate: Estimate) -> str:
    """Return what to say of a run whose steps take minutes; empty for others, or if the device's speed is unknown."""
    seconds, steps = estimate.step_seconds, estimate.layout.config.train.steps
    if seconds is None or seconds < SLOW_SECONDS:
        return ""
    return (
        f"a step takes about {seconds / 60:,.0f} minutes on {estimate.device.name} by estimate, and all {steps:,} "
        f"steps {seconds * steps / 86400:,.0f} days; a smaller model.name or train.batch_size, or GPUs, take less, and "
        f"longnet plan shows how much"
    )


def remedy_lines(estimate: Estimate) -> str:
    """Return lines with settings under which the run fits, the fastest first, or else with the smallest runs."""
    found = remedies(estimate)
    if not found:
        return "use a larger parallel.sequence, a smaller model or a shorter data.sequence_length"
    lines = ["it fits with" if found[0][1].fits() else "nothing tried fits; the smallest are"]
    lines += [f"  {words}: {_memory(other)}{_seconds(other)}" for words, other in found]
    return "\n".join(lines)


def fastest_lines(found: Found) -> str:
    """Return lines with settings and what a run under them takes, the fastest first."""
    if not found:
        return "no combination of the memory options fits; use a larger parallel.sequence or a smaller model"
    lines = ["the fastest settings that fit, then slower ones that need less memory"]
    lines += [
        f"  {words or 'as configured'}: {_memory(other)}{_seconds(other)}{_speed(other)}" for words, other in found
    ]
    return "\n".join(lines)


def scaling_lines(estimates: Sequence[Estimate]) -> str:
    """Return a table of a run on more and more ranks: time of a step, tokens a second, memory, exchange."""
    head = (
        f"{'ranks':>7}{'tokens a sequence':>20}{'s a step':>11}{'tokens/s':>15}{'a rank':>9}{'GiB':>9}{'MiB sent':>10}"
    )
    lines = ["each rank has as many tokens as configured", head]
    first = estimates[0].tokens_per_second / estimates[0].layout.num_ranks
    for estimate in estimates:
        ranks, speed = estimate.layout.num_ranks, estimate.tokens_per_second
        share = f"{speed / ranks / first:.1%}" if first else "-"
        seconds = "-" if estimate.step_seconds is None else f"{estimate.step_seconds:.3f}"
        sent = exchange_of(estimate.layout, estimate.device.gpus_per_host).bytes / 2**20
        size = _gib(estimate.memory.device_bytes + estimate.overhead_bytes)
        length = estimate.layout.config.data.sequence_length
        lines.append(f"{ranks:>7}{length:>20,}{seconds:>11}{speed:>15,.0f}{share:>9}{size:>9}{sent:>10,.1f}")
    return "\n".join(lines)


def _lines(estimate: Estimate) -> Iterator[str]:
    layout, config = estimate.layout, estimate.layout.config
    mesh, model = layout.mesh, config.model
    yield (
        f"{layout.num_ranks} × {estimate.device.name} ({mesh.data} data × {mesh.sequence} sequence), "
        f"{layout.precision}, {config.data.sequence_length:,} tokens a sequence, "
        f"{config.train.batch_size} sequences a step"
    )
    yield ""
    yield _row("parameters", f"{num_parameters(model):,}")
    yield _row("model FLOPs a token", f"{estimate.flops_per_token:.3e}")
    yield ""
    yield f"memory of a rank, GiB (most: {estimate.memory.moment})"
    for name, size in estimate.memory.device.items():
        if size:
            yield _row("  " + name, _gib(size))
    yield _row("  all tensors", _gib(estimate.memory.device_bytes))
    yield _row("  context, fragments" if estimate.device.type == "cuda" else "  process", _gib(estimate.overhead_bytes))
    if estimate.device.type == "cuda":
        yield _row("  of", _gib(estimate.device.memory_bytes))
    yield from _host_lines(estimate)
    exchange = exchange_of(layout)
    if exchange.bytes:
        yield _row("exchanged a layer and rank, MiB", f"{exchange.bytes / 2**20:,.2f}")
    yield ""
    yield from _time_lines(estimate)
    yield ""
    yield _row("longest sequence that fits", _tokens(estimate.longest_sequence))
    length, chunk = estimate.longest_in_chunks
    if length > estimate.longest_sequence:
        yield _row(f"  with train.chunk_length={chunk}", _tokens(length))
    if estimate.cache_qkv_that_fits > config.train.cache_qkv:
        yield _row("room for train.cache_qkv", f"{estimate.cache_qkv_that_fits}")
    if not estimate.fits():
        yield "DOES NOT FIT"


def _host_lines(estimate: Estimate) -> Iterator[str]:
    limit = estimate.host_limit if estimate.device.type == "cuda" else estimate.device.memory_bytes
    yield f"memory of a host with {estimate.local_ranks} ranks, GiB"
    if estimate.device.type == "cpu":
        yield _row("  ranks", _gib(estimate.local_ranks * (estimate.memory.device_bytes + estimate.overhead_bytes)))
    for name, size in estimate.host_parts.items():
        if size:
            yield _row("  " + name, _gib(size))
    yield _row("  all", _gib(estimate.peak_host_bytes))
    if limit is not None:
        yield _row("  of", _gib(limit))


def _time_lines(estimate: Estimate) -> Iterator[str]:
    if estimate.step_seconds is None:
        yield "seconds of a step: unknown for this device"
        return
    yield "seconds of a step"
    for name, seconds in estimate.seconds.items():
        if seconds >= 5e-5:
            yield _row("  " + name, f"{seconds:,.4f}")
    yield _row("  all", f"{estimate.step_seconds:,.4f}")
    yield _row("tokens a second", f"{estimate.tokens_per_second:,.0f}")
    if estimate.mfu is not None:
        yield _row("model FLOPs utilization", f"{estimate.mfu:.1%}")


def _row(name: str, value: str) -> str:
    return f"{name:<{NAME}}{value:>{NUMBER}}"


def _tokens(length: int) -> str:
    return f"{length:,}" + " or more" * (length >= LONGEST)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _memory(estimate: Estimate) -> str:
    host = f" and {_gib(estimate.peak_host_bytes)} GiB of the host" if estimate.device.type == "cuda" else ""
    return f"{_gib(estimate.memory.device_bytes + estimate.overhead_bytes)} GiB a rank{host}"


def _speed(estimate: Estimate) -> str:
    mfu = "" if estimate.mfu is None else f", MFU {estimate.mfu:.1%}"
    return "" if estimate.step_seconds is None else f", {estimate.tokens_per_second:,.0f} tokens/s{mfu}"


def _seconds(estimate: Estimate) -> str:
    return "" if estimate.step_seconds is None else f", {estimate.step_seconds:,.3f} s a step"
