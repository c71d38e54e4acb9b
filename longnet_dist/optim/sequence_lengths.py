"""Sequences grow in the first steps of a run (sequence-length warm-up, arXiv 2108.06084).

A sample keeps its tokens and is cut into shorter sequences, so every step has the same tokens, in the same order, as
without the warm-up. The length doubles; each length has as many steps.
"""

from __future__ import annotations


def lengths_of(shortest: int, longest: int) -> list[int]:
    """Return the lengths of the warm-up, ascending: halves of ``longest``, rounded up, down to ``shortest``."""
    found: list[int] = []
    length = -(-longest // 2)
    while shortest <= length < longest and (not found or length < found[-1]):
        found.append(length)
        length = -(-length // 2)
    return found[::-1]


def length_of(step: int, steps: int, shortest: int, longest: int) -> int:
    """Return the tokens of a sequence in a step: a function of the step alone, so that a resumed run has the same.

    Args:
        step: counted from 0.
        steps: of the warm-up.
        shortest: fewest tokens of a sequence.
        longest: tokens of a sample, which a sequence has after the warm-up.
    """
    lengths = lengths_of(shortest, longest)
    return lengths[step * len(lengths) // steps] if step < steps and lengths else longest


def growth(steps: int, shortest: int, longest: int) -> str:
    """Return the lengths of the warm-up and their steps, for people."""
    lengths = lengths_of(shortest, longest)
    # Length k has the steps s with s · K // W = k.
    firsts = [-(-place * steps // len(lengths)) for place in range(len(lengths))]
    parts = [f"{length:,} tokens from step {first + 1:,}" for first, length in zip(firsts, lengths, strict=True)]
    return ", ".join([*parts, f"{longest:,} from step {steps + 1:,}"])
