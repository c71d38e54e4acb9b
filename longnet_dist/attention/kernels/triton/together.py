"""The kernels of a call are compiled side by side, before the first of them is launched.

Compiled one after another, as they are launched, they let the first step of a run wait for the sum of their times.
Only Python's part of a compilation, about a sixth, has to be done by one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.runtime import JITFunction

from longnet_dist.attention.kernels.triton.assembler import assembler
from longnet_dist.attention.kernels.triton.launch import Geometry, Launch
from longnet_dist.machine import usable_cores
from longnet_dist.numerics import log_once

Waiting = tuple[Launch, tuple[Geometry, ...]]
"""A launch, and the geometry of the tensors that it is given."""


def compile_together(waiting: Sequence[Waiting]) -> None:
    """Compile one launch of each kind; nothing is launched.

    What cannot be compiled so is compiled when it is launched, after a warning.
    """
    new = {launch.kind: (launch, buffers) for launch, buffers in waiting if isinstance(launch.kernel, JITFunction)}
    if len(new) < 2 or usable_cores() < 2:
        return
    kernel = next(iter(new.values()))[0].kernel
    try:
        with (
            ThreadPoolExecutor(min(len(new), usable_cores())) as pool,
            assembler(kernel) as options,
            triton.AsyncCompileMode(pool),
        ):
            for launch, buffers in new.values():
                launch.compile(buffers, options)
    except Exception as error:
        log_once(f"kernels are compiled one by one, which takes longer: {type(error).__name__}: {error}")
