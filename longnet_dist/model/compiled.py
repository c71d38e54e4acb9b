"""Functions of tensors through torch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch


def run(function: Callable[..., Any], compile: bool, *given: Any) -> Any:
    """``function(*given)``, compiled if ``compile`` says so.

    It is compiled once for each shape of its tensors, whatever weights it is given: all blocks share what is compiled.
    What torch cannot compile whole is an error.
    """
    return (_compiled(function) if compile else function)(*given)


@lru_cache(maxsize=16)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)
