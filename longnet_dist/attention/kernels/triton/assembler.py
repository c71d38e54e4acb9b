"""The assembler that the kernels of attention are compiled with on Hopper.

Triton 3.9 assembles for Hopper with the ptxas of CUDA 13. Inner loops then have up to a sixth more instructions than
with that of CUDA 12, and some spill (``benchmarks/triton_matrix.py``). Triton still brings the older one, for Ampere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton import knobs
from triton.runtime import JITFunction

from longnet_dist.attention.kernels.hopper.support import release_of

HOPPER = 90
FIRST_RELEASE = (3, 9)
"""The first release of Triton that assembles for Hopper with CUDA 13's ptxas."""


@contextmanager
def assembler(kernel: Any) -> Iterator[dict[str, Any]]:
    """Compile with Triton's older assembler inside, where that is for Hopper and Triton would take the newer one.

    An assembler that ``TRITON_PTXAS_BLACKWELL_PATH`` names is left as it is.

    Args:
        kernel: what is compiled; Triton's interpreter needs no assembler.

    Yields:
        options of the compiler to launch with.
    """
    if not _takes_newer(kernel):
        yield {}
        return
    from triton.backends.nvidia.compiler import ptx_get_version

    older = knobs.nvidia.ptxas
    with knobs.nvidia.scope():
        knobs.nvidia.ptxas_blackwell = older.path
        # By its version of PTX the result differs, in Triton's cache, from one of the other assembler.
        yield {"ptx_version": ptx_get_version(older.version)}


def _takes_newer(kernel: Any) -> bool:
    if release_of(triton.__version__) < FIRST_RELEASE or not isinstance(kernel, JITFunction):
        return False
    if "TRITON_PTXAS_BLACKWELL_PATH" in os.environ:
        return False
    return bool(triton.runtime.driver.active.get_current_target().arch == HOPPER)
