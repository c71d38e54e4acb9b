"""How fast a run is and how much memory it takes, step by step."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from longnet_dist.estimate.devices import device_of
from longnet_dist.estimate.layout import RunLayout
from longnet_dist.estimate.model_cost import flops_per_token
from longnet_dist.machine import peak_resident_bytes

_log = logging.getLogger(__name__)


class Speed(NamedTuple):
    """Measures of one step; what is unknown is None.

    Attributes:
        tokens_per_second: all ranks.
        tflops_per_gpu: model TFLOP/s of one rank, see ``planner/model_cost.py``: nothing that is computed again counts.
        mfu: their share of the peak, ``train.peak_tflops`` or the data sheet's dense bf16; None without a peak.
        peak_memory_allocated: bytes of tensors on rank 0's GPU at most until now; on a CPU its largest resident set,
            None where the system does not say.
        peak_memory_reserved: bytes that torch's allocator took for them; None on a CPU.
    """

    tokens_per_second: float
    tflops_per_gpu: float
    mfu: float | None
    peak_memory_allocated: int | None
    peak_memory_reserved: int | None

    def __str__(self) -> str:
        share = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
        memory = "" if self.peak_memory_allocated is None else f", {self.peak_memory_allocated / 2**30:.2f} GiB"
        return f"{self.tokens_per_second:,.0f} tokens/s{share}{memory}"


class Throughput:
    """Measures the steps of a run on one rank.

    Args:
        layout: of the run.
        device: of this rank.
    """

    def __init__(self, layout: RunLayout, device: torch.device) -> None:
        config = layout.config
        self._device, self._ranks = device, layout.num_ranks
        self._tokens = config.train.batch_size * config.data.sequence_length
        self._flops = self._tokens * flops_per_token(config.model, config.data.sequence_length)
        self._peak_tflops = config.train.peak_tflops or device_of(device).peak_tflops
        if self._peak_tflops is None and device.type == "cuda":
            _log.warning(
                "no peak is known of %s, so metrics have no mfu; set train.peak_tflops",
                torch.cuda.get_device_name(device),
            )

    def step(self, seconds: float) -> Speed:
        """The measures of a step of all ranks that took so many seconds."""
        tflops = self._flops / seconds / self._ranks / 1e12
        mfu = None if self._peak_tflops is None else tflops / self._peak_tflops
        return Speed(self._tokens / seconds, tflops, mfu, *self._memory())

    def _memory(self) -> tuple[int | None, int | None]:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        return peak_resident_bytes(), None
