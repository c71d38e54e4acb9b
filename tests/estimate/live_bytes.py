"""LiveBytes counts the bytes of all living tensors on the CPU, as CUDA's allocator does on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """LiveBytes counts the storages that operations inside its context make, until they are freed.

    Storages from before the context are counted if they are given to :meth:`add`.

    Attributes:
        now: living bytes after the last operation.
        peak: the largest ``now`` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(result)
        return result

    def add(self, tensors: Any) -> None:
        """Count the storages of the tensors in a nested structure."""
        for key in [key for key, (storage, _) in self._alive.items() if storage.expired()]:
            self._forget(key)
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                self._forget(storage._cdata)  # it may have been resized
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        _, size = self._alive.pop(key, (None, 0))
        self.now -= size
