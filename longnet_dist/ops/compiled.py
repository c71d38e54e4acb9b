"""Functions of tensors that torch compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from longnet_dist import private_interfaces
from longnet_dist.caches import bounded_cache
from longnet_dist.numerics import log_once

WIDEST_ROW = 4096
"""Numbers of a row that a norm's kernel holds in registers."""


MOST_SHAPES = 64
"""Shapes for which a function is compiled; later ones run uncompiled."""


def run(function: Callable[..., Any], compile: bool, *given: Any) -> Any:
    """Return ``function(*given)``, compiled if ``compile`` is set.

    It is compiled once for each shape of its tensors, whatever weights it is given: all blocks share what is compiled.
    What torch cannot compile whole is an error. A function that meets more than :data:`MOST_SHAPES` shapes runs
    uncompiled for the rest, and says so once.
    """
    if not compile:
        return function(*given)
    limit_hit = private_interfaces.recompile_limit_error()
    with _whole_rows():
        try:
            return _compiled(function)(*given)
        except limit_hit:  # before anything was computed
            pass
        try:
            with private_interfaces.recompile_limit(MOST_SHAPES):
                return _compiled(function)(*given)
        except limit_hit:
            log_once(
                f"{function.__name__} met more than {MOST_SHAPES} shapes and runs uncompiled for the others; "
                f"set train.feed_forward_tile, so that all lengths share one shape"
            )
    return function(*given)


@bounded_cache(maxsize=16)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def _whole_rows() -> Any:
    """Let Inductor hold rows of up to ``WIDEST_ROW`` numbers in registers, where it would not go beyond 1,024.

    A norm then reads a row once, instead of twice forward and three times backward, and so does what is fused with it.
    """
    return private_interfaces.inductor_choices(_choices())


@bounded_cache(maxsize=1)
def _choices() -> Any:
    return private_interfaces.persistent_rows(WIDEST_ROW, f"longnet_dist rows of {WIDEST_ROW}")
