"""Throughput measures the speed and the memory of a run, step by step."""

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
    """A Speed has the measures of one step; unknown ones are None.

    Attributes:
        tokens_per_second: tokens for each second, over all ranks.
        tflops_per_gpu: model TFLOP/s of one rank, as ``estimate/model_cost.py`` counts them, without recomputation.
        mfu: share of ``tflops_per_gpu`` in the peak, which is ``train.peak_tflops`` or the data sheet's dense bf16;
            None if no peak is known.
        peak_memory_allocated: peak of the bytes of tensors on this rank's GPU so far. On a CPU the peak resident set of
            the process, or None if the system does not report it.
        peak_memory_reserved: peak of the bytes that torch's allocator reserved; None on a CPU.
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
    """A Throughput turns the duration of a step into the measures of this rank.

    Args:
        layout: how the run is split over ranks.
        device: device of this rank.
    """

    def __init__(self, layout: RunLayout, device: torch.device) -> None:
        config = layout.config
        self._device, self._ranks = device, layout.num_ranks
        self._tokens = config.train.batch_size * config.data.sequence_length
        self._model = config.model
        self._flops_per_token: dict[int, float] = {}
        self._length = config.data.sequence_length
        self._peak_tflops = config.train.peak_tflops or device_of(device).peak_tflops
        if self._peak_tflops is None and device.type == "cuda":
            _log.warning(
                "no peak is known of %s, so metrics have no mfu; set train.peak_tflops",
                torch.cuda.get_device_name(device),
            )

    def step(self, seconds: float, length: int | None = None, tokens: int | None = None) -> Speed:
        """Return the measures of a step that took ``seconds`` on all ranks.

        Args:
            seconds: of the step.
            length: tokens of a sequence in it; those of a sample if not given.
            tokens: of the step, where steps have unequal numbers.
        """
        tokens = self._tokens if tokens is None else tokens
        length = length or self._length
        if length not in self._flops_per_token:
            self._flops_per_token[length] = flops_per_token(self._model, length)
        tflops = tokens * self._flops_per_token[length] / seconds / self._ranks / 1e12
        mfu = None if self._peak_tflops is None else tflops / self._peak_tflops
        return Speed(tokens / seconds, tflops, mfu, *self._memory())

    def _memory(self) -> tuple[int | None, int | None]:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device)
        return peak_resident_bytes(), None
