"""The plan of a run: what it needs on a device, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longnet_dist.config.schema import Config
from longnet_dist.errors import ConfigError, ShapeError
from longnet_dist.estimate.devices import Device
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.memory import Memory, memory_of
from longnet_dist.estimate.model_cost import flops_per_token, num_parameters
from longnet_dist.estimate.step_time import step_seconds
from longnet_dist.estimate.traffic import exchange_of

MARGIN = 0.10
"""A prediction may be this much too high: the trainer refuses only what would not fit even then."""
SPARE = 0.05
"""More than planned, as a share, for which a suggestion must leave room."""
LONGEST = 2**34
"""Rows behind which no search for the longest sequence goes."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs, by arithmetic alone.

    Attributes:
        layout: of the run.
        device: that each rank has.
        local_ranks: ranks of one machine.
        host_limit: memory of that machine, bytes; None if it is not known.
        memory: of the rank that needs most.
        seconds: of a step by part; empty if the device's speed is unknown.
    """

    layout: RunLayout
    device: Device
    local_ranks: int
    host_limit: int | None
    memory: Memory
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, layout: RunLayout, device: Device, local_ranks: int = 1, host_limit: int | None = None) -> Estimate:
        """Estimate a run.

        Args:
            layout: of the run.
            device: that each rank has; a CPU's memory is that of the whole machine.
            local_ranks: ranks of one machine, which share its memory.
            host_limit: memory of the machine, bytes, if it is known.

        Raises:
            ConfigError: sizes behind all numbers of the machine.
        """
        try:
            return cls(layout, device, local_ranks, host_limit, memory_of(layout), step_seconds(layout, device))
        except OverflowError:
            raise ConfigError("the sizes of this configuration are beyond any machine; use smaller ones") from None

    @property
    def peak_gpu_bytes(self) -> int:
        """What torch's allocator hands out at most on a rank's GPU; 0 on a CPU."""
        return self.memory.device_bytes if self.device.type == "cuda" else 0

    @property
    def peak_host_bytes(self) -> int:
        """Memory of a machine that all its ranks take together."""
        beside = sum(self.host_parts.values())
        if self.device.type == "cuda":
            return beside
        return beside + self.local_ranks * (self.memory.device_bytes + self.overhead_bytes)

    @property
    def host_parts(self) -> dict[str, int]:
        """What a machine's ranks take of its memory beside their devices', by part."""
        return self.memory.host_parts(self.local_ranks)

    @property
    def overhead_bytes(self) -> int:
        """What a process takes on the device beyond its tensors: the context, and what the allocator cannot use."""
        rates = self.device.rates
        return rates.context_bytes + int(rates.fragmentation * self.memory.device_bytes)

    @property
    def step_seconds(self) -> float | None:
        """Of an optimizer step; None if the device's speed is unknown."""
        return sum(self.seconds.values()) or None

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a training step for each token."""
        return flops_per_token(self.layout.config.model, self.layout.config.data.sequence_length)

    @property
    def mfu(self) -> float | None:
        """Share of the peak in model FLOPs; None without a peak."""
        if self.step_seconds is None or self.device.peak_tflops is None:
            return None
        return self.flops_per_token * self.tokens_per_second / self.layout.num_ranks / (1e12 * self.device.peak_tflops)

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks; 0 if the device's speed is unknown."""
        config = self.layout.config
        return config.train.batch_size * config.data.sequence_length / (self.step_seconds or float("inf"))

    def fits(self, margin: float = 0.0) -> bool:
        """Whether device and host hold the run, if it needs less than planned by a share of ``margin``."""
        device = self.memory.device_bytes + self.overhead_bytes if self.device.type == "cuda" else 0
        limit = self.host_limit if self.device.type == "cuda" else self.device.memory_bytes
        host = limit is None or (1 - margin) * self.peak_host_bytes <= limit
        return host and (1 - margin) * device <= self.device.memory_bytes

    def having(self, **settings: Any) -> Estimate | None:
        """The plan of the same run with other settings (``section__key=value``); None where that cannot be."""
        try:
            layout = RunLayout.of(_changed(self.layout.config, settings), self.layout.num_ranks, self.device.type)
            return Estimate.of(layout, self.device, self.local_ranks, self.host_limit)
        except (ConfigError, ShapeError):
            return None

    @cached_property
    def longest_sequence(self) -> int:
        """Rows of the longest sequence that fits with these settings, to a thousandth, up to ``LONGEST``; 0: none."""
        return self._longest()

    @cached_property
    def longest_in_chunks(self) -> tuple[int, int]:
        """The longest sequence that fits in chunks (train.chunk_length), and the length of these; 0, 0: none."""
        if not self.layout.config.model.causal or not self.longest_sequence:
            return 0, 0
        chunk = 1 << max(0, (self.longest_sequence // 2).bit_length() - 1)
        chunk -= chunk % self.layout.mesh.sequence
        return self._longest(train__chunk_length=chunk), chunk

    @cached_property
    def projections_that_fit(self) -> int:
        """Blocks of a selective model that can keep their projections and leave ``SPARE`` of the memory free."""
        if self.layout.config.train.activation_checkpointing != "selective":
            return 0
        fitting = (
            number
            for number in range(self.layout.config.model.layers, 0, -1)
            if (plan := self.having(train__cache_qkv=number)) and plan.fits(-SPARE)
        )
        return next(fitting, 0)

    def _longest(self, **settings: Any) -> int:
        """Search by doubling, then by halving the interval."""

        def fits(rows: int) -> bool:
            plan = self.having(data__sequence_length=rows, **settings)
            return plan is not None and plan.fits()

        low = self.layout.mesh.sequence
        if not fits(low):
            return 0
        while low < LONGEST and fits(2 * low):
            low = min(2 * low, LONGEST)
        high = min(2 * low, LONGEST)
        while high - low > max(self.layout.mesh.sequence, low // 1000):
            middle = (low + high) // 2
            middle -= middle % self.layout.mesh.sequence
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        longest_in_chunks, chunk = self.longest_in_chunks
        exchange = exchange_of(self.layout)
        return {
            "parameters": num_parameters(self.layout.config.model),
            "flops_per_token": self.flops_per_token,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "peak_host_bytes": self.peak_host_bytes,
            "step_seconds": self.step_seconds,
            "longest_sequence": self.longest_sequence,
            "fits": self.fits(),
            "projections_that_fit": self.projections_that_fit,
            "mfu": self.mfu,
            "longest_sequence_in_chunks": {"rows": longest_in_chunks, "chunk_length": chunk},
            "peak_moment": self.memory.moment,
            "device_parts": dict(self.memory.device),
            "host_parts": self.host_parts,
            "overhead_bytes": self.overhead_bytes,
            "exchange": {"records_received": exchange.foreign, "bytes_a_layer": exchange.bytes},
            "step_parts": dict(self.seconds),
            "device": {"name": self.device.name, "memory_bytes": self.device.memory_bytes},
            "ranks": {"data": self.layout.mesh.data, "sequence": self.layout.mesh.sequence},
        }


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with other values of ``section__key``."""
    for name, value in settings.items():
        section, _, key = name.partition("__")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
    return config
