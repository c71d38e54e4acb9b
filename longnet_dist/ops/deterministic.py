"""What repeats a computation in every bit: the algorithms of torch, cuBLAS and torch's compiler.

The gradients of attention have an argument of their own for it (``deterministic=True``).
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch

from longnet_dist import private_interfaces

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_algorithms(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Let operations choose algorithms that repeat in every bit; one that has none warns, by its name.

    Torch's compiler then takes no block sizes by their measured time, which differs from process to process. Enter it
    before the first operation on a GPU.

    Args:
        environment: gets cuBLAS's workspace of constant size, unless it names one.
    """
    environment.setdefault(WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would write to all memory once more; nothing here reads what was not written.
    memory.fill_uninitialized_memory = False
    try:
        with private_interfaces.compiling_by_rule():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
