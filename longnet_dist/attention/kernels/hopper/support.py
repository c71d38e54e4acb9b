"""Which calls the kernels for Hopper are written for, and which releases of Triton compile them."""

from __future__ import annotations

import re

FORWARD_DIMS = (128,)
"""Head dims of the forward kernel. At 64 the portable kernel is as fast (benchmarks/results/attention_kernels.md)."""
BACKWARD_DIMS = (64, 128)
"""Head dims of the backward kernel."""
TABLES = True
"""Whether the kernels take segments of unequal lengths (documents, padding, shifted grids), and some heads of a model.

Where it is False these run on the portable kernels. It is the only switch.
"""
COMPUTE_CAPABILITY = 9
FIRST_RELEASE, LAST_RELEASE = (3, 6), (3, 9)
"""Releases of Triton that ``tests/attention/kernels/test_compile.py`` was run on. Gluon changes with each."""
REMEDY = "install a torch from 2.11 to 2.15, which bring Triton 3.6 to 3.9"


def release_of(version: str) -> tuple[int, ...]:
    """Return major and minor number of a version of Triton."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def release_obstacle(version: str) -> str:
    """Say why the Triton of ``version`` cannot compile the kernels; an empty string where it can."""
    if FIRST_RELEASE <= release_of(version) <= LAST_RELEASE:
        return ""
    known = " to ".join(dict.fromkeys(f"{major}.{minor}" for major, minor in (FIRST_RELEASE, LAST_RELEASE)))
    return f"the kernels for Hopper need Triton {known}, but {version} is installed"
