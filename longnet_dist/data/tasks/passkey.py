"""A number hidden in a long text: the passkey, or needle in a haystack."""

from __future__ import annotations

import numpy as np

from longnet_dist.data.tasks import DIGITS, TASKS, Sample, Task, buried, draw, with_answer

KEY_DIGITS = 5


@TASKS.register("passkey")
class Passkey(Task):
    """Repeat the five digits that stand once in the filler, at ``depth``."""

    source = "Landmark Attention (arXiv 2305.16300), section 4.2"
    least = 48

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        key = draw(rng, DIGITS, KEY_DIGITS)
        text = buried(rng, length, depth, [f"Remember the key {key}. "], f"The key was {key}")
        return with_answer(text, key)
