"""Variants measured by turns: the order of the turns, and ratios to the first variant."""

import argparse
from typing import ClassVar

import pytest

from benchmarks import turns
from benchmarks.turns import Variant, by_turns, summary, variant_of


class Fake:
    """A worker whose variant ``slow`` takes twice as long, on a card that grows slower with every measurement."""

    asked: ClassVar[list[str]] = []

    def __init__(self, variant, cache):
        self.variant, self.waiting = variant, []

    def ask(self, case):
        self.waiting.append(case)
        self.asked.append(self.variant.name)

    def answer(self):
        self.waiting.pop(0)
        time = (2.0 if self.variant.name == "slow" else 1.0) * (1 + len(self.asked))
        return {"triton": "9", "forward_ms": time, "backward_ms": time, "both_ms": 2 * time, "gpu": {}, "more": 1}

    def close(self):
        self.asked.append("closed")


def test_turns_reverse_and_every_worker_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "Worker", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    rows = by_turns([Variant("fast", tmp_path), Variant("slow", tmp_path)], ["one"], 2)
    assert Fake.asked == ["fast", "slow", "fast", "slow", "slow", "fast", "closed", "closed"]
    assert [(row["turn"], row["variant"]) for row in rows] == [(0, "fast"), (0, "slow"), (1, "slow"), (1, "fast")]
    assert set(rows[0]) == {"turn", "variant", "case", "triton", "forward_ms", "backward_ms", "both_ms", "gpu"}


def test_ratios_are_to_the_first_variant():
    measured = ((0, 10.0, 11.0), (1, 20.0, 22.0), (2, 12.0, 15.0))
    rows = [
        {"turn": turn, "variant": name, "case": "one", "forward_ms": ms / 4, "backward_ms": ms * 3 / 4, "both_ms": ms}
        for turn, *both in measured
        for name, ms in zip("ab", both, strict=True)
    ]
    found = summary(rows)["one"]
    assert found["a"] == {"forward_ms": 3.0, "backward_ms": 9.0, "both_ms": 12.0, "least_both_ms": 10.0}
    assert found["b"]["ratio_of_medians"] == 1.25
    assert found["b"]["ratio_of_least"] == found["b"]["median_ratio_of_turns"] == 1.1


def test_a_variant_is_a_name_a_checkout_and_a_folder(tmp_path):
    assert variant_of(f"new={tmp_path}:{tmp_path}/t") == Variant("new", tmp_path, tmp_path / "t")
    assert variant_of(f"new={tmp_path}").triton is None
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=CHECKOUT"):
        variant_of(str(tmp_path))
