"""A random text that stands twice: the second half copies the first."""

from __future__ import annotations

import numpy as np

from longnet_dist.data.tasks import LETTERS, TASKS, Sample, Task, draw

ASKED = 16


@TASKS.register("copy")
class Copy(Task):
    """Copy random letters; the 16 that stand at ``depth`` in the first half are the answers.

    The distance of a letter to its copy is half of the text at every depth.
    """

    source = "the copy task of Neural Turing Machines (arXiv 1410.5401), section 4.1"
    least = 64

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        half = (length - 1) // 2
        letters = draw(rng, LETTERS, half)
        text = letters + "|" * (length - 2 * half) + letters
        # The first letter tells where the copy begins, so it is asked for as well.
        first = length - half + int(depth * (half - ASKED))
        return Sample(text.encode(), tuple(range(first, first + ASKED)))
