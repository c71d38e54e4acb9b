"""Functions of tensors that torch compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
    from torch._dynamo.exc import FailOnRecompileLimitHit  # torch's compiler takes a second to import

    with _whole_rows():
        try:
            return _compiled(function)(*given)
        except FailOnRecompileLimitHit:  # before anything was computed
            pass
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
                return _compiled(function)(*given)
        except FailOnRecompileLimitHit:
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
    from torch._inductor.virtualized import V

    return V.set_choices_handler(_choices())


@bounded_cache(maxsize=1)
def _choices() -> Any:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class WholeRows(InductorChoices):
        """Make Inductor's own choices, except for rows that fit in registers."""

        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction:
                return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, WIDEST_ROW))
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

        def uuid(self) -> str:
            """Return a part of the key of torch's cache, so that graphs of other choices are not reused."""
            return f"longnet_dist rows of {WIDEST_ROW}"

    return WholeRows()
