"""A mark that stood once before: what followed it?"""

from __future__ import annotations

import numpy as np

from longnet_dist.data.tasks import LETTERS, TASKS, Sample, Task, draw

MARK = "@"
FOLLOWING = 2


@TASKS.register("induction")
class Induction(Task):
    """Give the two letters that followed a mark among random letters; the mark stood at ``depth``."""

    source = "induction heads (arXiv 2209.11895), section 2"
    least = 32

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        answer = draw(rng, LETTERS, FOLLOWING)
        rest = length - 2 * (len(MARK) + FOLLOWING)
        before = int(depth * rest)
        text = f"{draw(rng, LETTERS, before)}{MARK}{answer}{draw(rng, LETTERS, rest - before)}{MARK}{answer}"
        return Sample(text.encode(), tuple(range(length - FOLLOWING, length)))
