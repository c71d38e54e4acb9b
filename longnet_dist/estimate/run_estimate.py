"""An Estimate predicts the memory and the time of a run on a device, and whether it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
"""The share by which a prediction may be too high: the trainer refuses only runs that would not fit even then."""
SPARE = 0.05
"""The share of the predicted memory that a suggestion must leave free in addition."""
LONGEST = 2**34
"""The most tokens that a search for the longest sequence tries."""


@dataclass(frozen=True)
class Estimate:
    """An Estimate predicts what a run needs, by arithmetic alone: nothing is allocated.

    Attributes:
        layout: how the run is split over ranks.
        device: the device of each rank.
        local_ranks: ranks on one machine.
        host_limit: memory of that machine, bytes; None if unknown.
        memory: peak memory of the rank that needs most.
        seconds: seconds of a step by part; empty if the speed of the device is unknown.
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
            layout: how the run is split over ranks.
            device: the device of each rank; a CPU has the memory of the whole machine.
            local_ranks: ranks on one machine, which share its memory.
            host_limit: memory of the machine, bytes; None if unknown.

        Raises:
            ConfigError: the sizes are so large that floating-point numbers overflow.
        """
        try:
            return cls(layout, device, local_ranks, host_limit, memory_of(layout), step_seconds(layout, device))
        except OverflowError:
            raise ConfigError("the sizes of this configuration are beyond any machine; use smaller ones") from None

    @property
    def peak_gpu_bytes(self) -> int:
        """Return the peak of the bytes that torch's allocator hands out on a rank's GPU; 0 on a CPU."""
        return self.memory.device_bytes if self.device.type == "cuda" else 0

    @property
    def peak_host_bytes(self) -> int:
        """Return the bytes of host memory that all ranks of a machine need together."""
        parts = sum(self.host_parts.values())
        if self.device.type == "cuda":
            return parts
        return parts + self.local_ranks * (self.memory.device_bytes + self.overhead_bytes)

    @property
    def host_parts(self) -> dict[str, int]:
        """Return the bytes of host memory by part, for all ranks of a machine, without the tensors of CPU ranks."""
        return self.memory.host_parts(self.local_ranks)

    @property
    def overhead_bytes(self) -> int:
        """Return the bytes that a process needs on the device beyond its tensors: CUDA's context and fragmentation."""
        rates = self.device.rates
        return rates.context_bytes + int(rates.fragmentation * self.memory.device_bytes)

    @property
    def step_seconds(self) -> float | None:
        """Return the seconds of an optimizer step; None if the speed of the device is unknown."""
        return sum(self.seconds.values()) or None

    @property
    def flops_per_token(self) -> float:
        """Return the model FLOPs of a training step for each token."""
        return flops_per_token(self.layout.config.model, self.layout.config.data.sequence_length)

    @property
    def mfu(self) -> float | None:
        """Return the model FLOPs utilization, a share of the device's peak; None if the peak is unknown."""
        if self.step_seconds is None or self.device.peak_tflops is None:
            return None
        return self.flops_per_token * self.tokens_per_second / self.layout.num_ranks / (1e12 * self.device.peak_tflops)

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens that all ranks train in a second; 0 if the speed of the device is unknown."""
        config = self.layout.config
        return config.train.batch_size * config.data.sequence_length / (self.step_seconds or float("inf"))

    def fits(self, margin: float = 0.0) -> bool:
        """Say whether device and host have enough memory, if the run needs a share ``margin`` less than predicted."""
        return self.fits_host(margin) and self.fits_device(margin)

    def fits_device(self, margin: float = 0.0) -> bool:
        """Say whether the GPU has enough memory, as :meth:`fits`; a CPU has that of its host."""
        size = self.memory.device_bytes + self.overhead_bytes if self.device.type == "cuda" else 0
        return (1 - margin) * size <= self.device.memory_bytes

    def fits_host(self, margin: float = 0.0) -> bool:
        """Say whether the host has enough memory, as :meth:`fits`."""
        limit = self.host_limit if self.device.type == "cuda" else self.device.memory_bytes
        return limit is None or (1 - margin) * self.peak_host_bytes <= limit

    def with_settings(self, **settings: Any) -> Estimate | None:
        """Estimate the same run with other settings (``section__key=value``); return None if they are invalid."""
        try:
            layout = RunLayout.of(_changed(self.layout.config, settings), self.layout.num_ranks, self.device.type)
            return Estimate.of(layout, self.device, self.local_ranks, self.host_limit)
        except (ConfigError, ShapeError):
            return None

    def on_ranks(self, sequence_ranks: int) -> Estimate:
        """Estimate the run with other sequence ranks, each with as many tokens of a sequence as now.

        Raises:
            ConfigError: the ranks and the sequence do not fit together.
        """
        config, mesh = self.layout.config, self.layout.mesh
        length = -(-config.data.sequence_length // mesh.sequence) * sequence_ranks
        settings = {"data__sequence_length": length, "parallel__sequence": sequence_ranks, "parallel__data": mesh.data}
        if config.train.chunk_length is not None and config.train.chunk_length < config.data.sequence_length:
            settings["train__chunk_length"] = -(-config.train.chunk_length // mesh.sequence) * sequence_ranks
        ranks = mesh.data * sequence_ranks
        layout = RunLayout.of(_changed(config, settings), ranks, self.device.type)
        local_ranks = min(ranks, self.device.gpus_per_host)
        return Estimate.of(layout, self.device, local_ranks, self.host_limit)

    @cached_property
    def longest_sequence(self) -> int:
        """Return the longest sequence that fits, in tokens, to a thousandth and up to ``LONGEST``; 0 if none fits."""
        return self._longest()

    @cached_property
    def longest_in_chunks(self) -> tuple[int, int]:
        """Return the longest sequence that fits in chunks, and ``train.chunk_length`` for it; 0, 0 if none fits."""
        if not self.layout.config.model.causal or not self.longest_sequence:
            return 0, 0
        chunk = 1 << max(0, (self.longest_sequence // 2).bit_length() - 1)
        chunk -= chunk % self.layout.mesh.sequence
        return self._longest(train__chunk_length=chunk), chunk

    @cached_property
    def cache_qkv_that_fits(self) -> int:
        """Return the largest ``train.cache_qkv`` that leaves ``SPARE`` free; 0 without selective checkpointing."""
        if self.layout.config.train.activation_checkpointing != "selective":
            return 0
        return self._most_blocks("train__cache_qkv", 0, Estimate.fits)

    @cached_property
    def resident_blocks_that_fit(self) -> int:
        """Return the largest ``train.resident_blocks`` that leaves ``SPARE`` of the device free, or its least."""
        return self._most_blocks(
            "train__resident_blocks", self.layout.config.train.least_resident, Estimate.fits_device
        )

    def _most_blocks(self, name: str, least: int, fits: Callable[[Estimate, float], bool]) -> int:
        """Return the largest value of a setting that counts blocks, each of which takes memory."""
        low, high = least, self.layout.config.model.layers
        while low < high:
            middle = (low + high + 1) // 2
            estimate = self.with_settings(**{name: middle})
            low, high = (middle, high) if estimate and fits(estimate, -SPARE) else (low, middle - 1)
        return low

    def _longest(self, **settings: Any) -> int:
        """Search the longest sequence by doubling, then by bisection."""

        def fits(length: int) -> bool:
            estimate = self.with_settings(data__sequence_length=length, **settings)
            return estimate is not None and estimate.fits()

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
        """Return the estimate as plain values, the output of ``longnet plan --json``."""
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
            "projections_that_fit": self.cache_qkv_that_fits,
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
    """Return the configuration with other values of ``section__key``."""
    for name, value in settings.items():
        section, _, key = name.partition("__")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={key: value})})
    return config
