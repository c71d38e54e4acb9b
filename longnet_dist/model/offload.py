"""What blocks keep from forward to backward, on the device or in the memory of the host.

Copies there and back run beside the computation; torch's ``save_on_cpu`` waits for each and pins new memory for it.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SLAB_BYTES = 2**26


class Shelf:
    """What one block keeps, by name; shelves are emptied in the opposite order of their making.

    Args:
        memory: of the host, which the blocks of a model share; None if none of them offloads.
        offload: whether this block does.
        below: the shelf that was made before.
    """

    def __init__(self, memory: HostMemory | None = None, offload: bool = False, below: Shelf | None = None) -> None:
        self._memory, self._offload, self._below = memory, offload, below
        self._kept: dict[str, Tensor | Offloaded] = {}

    def put(self, name: str, tensor: Tensor, stays: bool = False) -> None:
        """Keep a contiguous tensor, which the caller may forget; one that ``stays`` is not offloaded."""
        tensor = tensor.detach()  # an output that is kept with its graph would never be freed
        self._kept[name] = Offloaded(self._memory, tensor) if self._memory and self._offload and not stays else tensor

    def take(self, name: str) -> Tensor | None:
        """Hand out a tensor that was put, once; None if it was not."""
        kept = self._kept.pop(name, None)
        return kept.take() if isinstance(kept, Offloaded) else kept

    def fetch(self) -> None:
        """Start to bring back what waits on the host. The first fetch lets all that is still on its way there leave."""
        if self._memory:
            self._memory.settle()
        for kept in self._offloaded():
            kept.fetch()

    def fetch_below(self) -> None:
        """Start it for the shelf below, once."""
        if self._below:
            self._below.fetch()
        self._below = None

    def leave(self) -> None:
        """Let go of what was copied to the host."""
        for kept in self._offloaded():
            kept.leave()

    def _offloaded(self) -> list[Offloaded]:
        return [kept for kept in self._kept.values() if isinstance(kept, Offloaded)]


class HostMemory:
    """Pinned memory in slabs of one size, used again and again: to pin memory takes longer than to copy into it.

    On a CPU the same copies are made, from memory to memory.

    The computation itself waits for a copy before the copied tensor is forgotten, so that its memory is free at a known
    place of the computation. (Had the allocator to find out, it would give none of it back to a host that is a whole
    forward ahead of the GPU.) It waits ``behind`` blocks later, and with the first backward.

    torch's allocator of pinned memory rounds up to a power of two, which a slab is already.

    Args:
        behind: blocks before the present one whose tensors may still be on their way to the host.
        slab_bytes: size of a slab, a power of two.
    """

    def __init__(self, behind: int = 1, slab_bytes: int = SLAB_BYTES) -> None:
        self.slab_bytes = slab_bytes
        self._free: list[Tensor] = []
        self._top: Shelf | None = None
        self._behind, self._leaving = behind, deque[Shelf]()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def shelf(self, offload: bool) -> Shelf:
        """The shelf of the next block, which may also keep its tensors on the device."""
        self._top = Shelf(self, offload, self._top)
        self._leaving.append(self._top)
        self.settle(self._behind + 1)
        return self._top

    def settle(self, most: int = 0) -> None:
        """Let go of what was copied to the host, but for that of the last ``most`` shelves."""
        while len(self._leaving) > most:
            self._leaving.popleft().leave()

    def borrow(self, tensor: Tensor) -> list[Tensor]:
        """Slabs with room for ``tensor``."""
        number = -(-tensor.nbytes // self.slab_bytes)
        pinned = tensor.is_cuda
        while len(self._free) < number:
            self._free.append(torch.empty(self.slab_bytes, dtype=torch.uint8, pin_memory=pinned))
        return [self._free.pop() for _ in range(number)]

    def give_back(self, slabs: list[Tensor]) -> None:
        """Slabs whose content was copied, or is being copied on the side stream."""
        self._free += slabs

    def beside(self, device: torch.device) -> AbstractContextManager[object]:
        """Let the side stream of ``device`` go on from here; what is started inside runs on it."""
        if device.type != "cuda":
            return nullcontext()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(stream)


class Offloaded:
    """A contiguous tensor that waits in the memory of the host; its copy starts at once."""

    def __init__(self, memory: HostMemory, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self._memory, self._slabs = memory, memory.borrow(tensor)
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._leaving: Tensor | None = tensor
        self._fetched: Tensor | None = None
        with memory.beside(self._device):
            for part, slab in self._pairs(tensor):
                slab.copy_(part, non_blocking=True)
            self._copied = self._event()

    def leave(self) -> None:
        """Forget the tensor on the device; what is computed from now on waits for its copy."""
        if self._leaving is not None:
            self._await(self._copied)
        self._leaving = None

    def fetch(self) -> None:
        """Start the copy back, if it was not yet."""
        self.leave()
        if self._fetched is not None or not self._slabs:
            return
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with self._memory.beside(self._device):
            for part, slab in self._pairs(tensor):
                part.copy_(slab, non_blocking=True)
            self._copied = self._event()
        self._memory.give_back(self._slabs)
        self._slabs, self._fetched = [], tensor

    def take(self) -> Tensor:
        """The tensor, once; what is computed from now on waits for it."""
        self.fetch()
        tensor, self._fetched = self._fetched, None
        assert tensor is not None
        self._await(self._copied)
        return tensor

    def _event(self) -> torch.cuda.Event | None:
        """Behind what runs on the present stream."""
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _await(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _pairs(self, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The bytes of the tensor in parts, each with as much of its slab."""
        parts = torch.split(tensor.view(-1).view(torch.uint8), self._memory.slab_bytes)
        return [(part, slab[: len(part)]) for part, slab in zip(parts, self._slabs, strict=True)]
