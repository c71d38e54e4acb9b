"""Tensors that blocks save from forward to backward, on the device or in pinned host memory.

Copies to the host and back run on a CUDA stream of their own. torch's ``save_on_cpu`` waits for each copy and pins new
memory for it.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SLAB_BYTES = 2**26


class SavedTensors:
    """Hold the tensors that one block saves, by name; backward takes the blocks in reverse and empties them.

    Args:
        pool: pinned memory that the blocks of a model share; None if none of them offloads.
        offload: whether this block offloads.
        below: the saved tensors of the block before.
    """

    def __init__(
        self, pool: PinnedPool | None = None, offload: bool = False, below: SavedTensors | None = None
    ) -> None:
        self._pool, self._offload = pool, offload
        # The graph owns the saved tensors. If a forward has no backward, nothing here may keep them alive.
        self._below = weakref.ref(below) if below is not None else None
        self._kept: dict[str, Tensor | OffloadedTensor] = {}

    def put(self, name: str, tensor: Tensor, stays: bool = False) -> None:
        """Save a contiguous tensor, which the caller may forget; one that ``stays`` is not offloaded."""
        tensor = tensor.detach()  # an output that is kept with its graph would never be freed
        offload = self._pool is not None and self._offload and not stays
        self._kept[name] = OffloadedTensor(self._pool, tensor) if self._pool and offload else tensor

    def take(self, name: str) -> Tensor | None:
        """Hand out a saved tensor, once; None if it was not saved."""
        kept = self._kept.pop(name, None)
        return kept.take() if isinstance(kept, OffloadedTensor) else kept

    def fetch(self) -> None:
        """Start to bring offloaded tensors back. The first fetch of a backward releases all that was still copied."""
        if self._pool:
            self._pool.settle()
        for kept in self._offloaded():
            kept.fetch()

    def fetch_below(self) -> None:
        """Start to bring back what the block before offloaded, once."""
        below, self._below = self._below, None
        saved = below() if below else None
        if saved is not None:
            saved.fetch()

    def release(self) -> None:
        """Free the device's copies of offloaded tensors."""
        for kept in self._offloaded():
            kept.release()

    def _offloaded(self) -> list[OffloadedTensor]:
        return [kept for kept in self._kept.values() if isinstance(kept, OffloadedTensor)]


class PinnedPool:
    """Provide pinned memory in slabs of one size, used again and again: pinning takes longer than copying.

    On a CPU the same copies are made, from memory to memory.

    The compute stream waits for a copy before the copied tensor is forgotten, so that its memory is free at a known
    point of the computation. The allocator alone would give none of it back to a host that is a whole forward ahead of
    the GPU. The wait comes ``behind`` blocks later, and with the first backward.

    torch's allocator of pinned memory rounds up to a power of two, which a slab is already.

    Args:
        behind: blocks before the present one whose tensors may still be on their way to the host.
        slab_bytes: size of a slab, a power of two.
    """

    def __init__(self, behind: int = 1, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self.num_slabs = 0
        self._free: list[Tensor] = []
        self._top: weakref.ref[SavedTensors] | None = None
        self._behind, self._leaving = behind, deque[SavedTensors | None]()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def saved_tensors(self, offload: bool) -> SavedTensors:
        """Make the saved tensors of the next block, which may also keep them on the device."""
        saved = SavedTensors(self, offload, self._top() if self._top else None)
        self._top = weakref.ref(saved)
        self._leaving.append(saved if offload else None)
        self.settle(self._behind + 1)
        return saved

    def settle(self, most: int = 0) -> None:
        """Free the device memory of offloaded tensors, except for the last ``most`` blocks."""
        while len(self._leaving) > most:
            saved = self._leaving.popleft()
            if saved is not None:
                saved.release()

    def borrow(self, tensor: Tensor) -> list[Tensor]:
        """Lend slabs that hold ``tensor``."""
        number = -(-tensor.nbytes // self.slab_bytes)
        pinned = tensor.is_cuda
        while len(self._free) < number:
            self._free.append(torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=pinned))
            self.num_slabs += 1
        return [self._free.pop() for _ in range(number)]

    def give_back(self, slabs: list[Tensor]) -> None:
        """Take back slabs whose content was copied, or is being copied on the side stream."""
        self._free += slabs

    def side_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """Start work on the side stream of ``device``, where it waits for what the compute stream has been given."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


class OffloadedTensor:
    """Hold a contiguous tensor in host memory; the copy starts at once."""

    def __init__(self, pool: PinnedPool, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._pool, self._slabs = pool, list[Tensor]()
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._leaving: Tensor | None = tensor
        self._fetched: Tensor | None = None
        self._slabs = pool.borrow(tensor)
        with pool.side_stream(self._device):
            for part, slab in self._pairs(tensor):
                slab.copy_(part, non_blocking=True)
            self._copied = self._event()

    def __del__(self) -> None:
        # A forward without a backward. Later copies on the side stream may use the slabs again, and the compute stream
        # the memory of a tensor that was on its way back.
        if self._fetched is not None:
            self._await(self._copied)
        self._pool.give_back(self._slabs)

    def release(self) -> None:
        """Free the tensor on the device; later work on the compute stream waits for its copy to the host."""
        if self._leaving is not None:
            self._await(self._copied)
        self._leaving = None

    def fetch(self) -> None:
        """Start the copy back, unless it was started."""
        self.release()
        if self._fetched is not None or not self._slabs:
            return
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with self._pool.side_stream(self._device):
            for part, slab in self._pairs(tensor):
                part.copy_(slab, non_blocking=True)
            self._copied = self._event()
        self._pool.give_back(self._slabs)
        self._slabs, self._fetched = [], tensor

    def take(self) -> Tensor:
        """Hand out the tensor, once; later work on the compute stream waits for its copy to the device."""
        self.fetch()
        tensor, self._fetched = self._fetched, None
        assert tensor is not None
        self._await(self._copied)
        return tensor

    def _event(self) -> torch.cuda.Event | None:
        """Record an event on the present stream; None on a CPU."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _await(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _pairs(self, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Split the tensor's bytes into parts, each with as much of its slab."""
        parts = torch.split(tensor.view(-1).view(torch.uint8), self._pool.slab_bytes)
        return [(part, slab[: len(part)]) for part, slab in zip(parts, self._slabs, strict=True)]
