"""Several pairs of a key and a value, and later several keys whose values are asked for."""

from __future__ import annotations

import numpy as np

from longnet_dist.data.tasks import LETTERS, TASKS, Sample, Task, buried, draw

PAIRS = 8
QUERIES = 4
VALUE_LETTERS = 2


@TASKS.register("recall")
class Recall(Task):
    """Give the values of four of eight keys, whose pairs stand together at ``depth``."""

    source = "multi-query associative recall of Zoology (arXiv 2312.04927), section 4"
    least = 256

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        numbers = rng.choice(len(LETTERS) ** 2, PAIRS, replace=False).tolist()
        keys = [LETTERS[number // len(LETTERS)] + LETTERS[number % len(LETTERS)] for number in numbers]
        values = [draw(rng, LETTERS, VALUE_LETTERS) for _ in keys]
        asked = rng.choice(PAIRS, QUERIES, replace=False).tolist()
        pairs = "".join(f"<{key}={value}>" for key, value in zip(keys, values, strict=True))
        question = "".join(f"<{keys[number]}={values[number]}>" for number in asked)
        text = buried(rng, length, depth, [pairs], question)
        size = len(question) // QUERIES
        firsts = (len(text) - len(question) + size * place + size - 1 - VALUE_LETTERS for place in range(QUERIES))
        return Sample(text.encode(), tuple(first + letter for first in firsts for letter in range(VALUE_LETTERS)))
