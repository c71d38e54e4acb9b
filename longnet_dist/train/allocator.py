"""torch's allocators of memory, as long sequences need them."""

from __future__ import annotations

from collections.abc import MutableMapping

_SETTINGS = {
    "expandable_segments": True,  # tensors of many sizes near the limit leave no holes
    "pinned_use_cuda_host_register": True,  # by several threads: offloading pins as much as it moves
    "pinned_num_register_threads": 8,
}
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_allocator(environment: MutableMapping[str, str]) -> None:
    """Set torch's allocators in ``environment``, unless the user has; call before the first use of a GPU."""
    if not any(name in environment for name in _VARIABLES):
        environment[_VARIABLES[0]] = ",".join(f"{name}:{value}" for name, value in _SETTINGS.items())
