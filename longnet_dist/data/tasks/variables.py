"""A chain of assignments in a long text: the value of the last variable is that of the first."""

from __future__ import annotations

import numpy as np

from longnet_dist.data.tasks import DIGITS, LETTERS, TASKS, Sample, Task, buried, draw, with_answer

HOPS = 3
VALUE_DIGITS = 4


@TASKS.register("variables")
class Variables(Task):
    """Follow three assignments, the first at ``depth``, the others spread evenly behind it."""

    source = "variable tracking of RULER (arXiv 2404.06654), section 3.2"
    least = 256

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        value = draw(rng, DIGITS, VALUE_DIGITS)
        names = [LETTERS[place] for place in rng.choice(len(LETTERS), HOPS, replace=False).tolist()]
        values = [value, *names]
        parts = [f"Let {name} be {known}. " for name, known in zip(names, values, strict=False)]
        text = buried(rng, length, depth, parts, f"Now {names[-1]} is {value}")
        return with_answer(text, value)
