"""A reader that finds what is asked for solves every sample, and one that guesses solves as many as chance does."""

import re

import numpy as np
import pytest
import torch

from longnet_dist import LongNet, LongNetConfig
from longnet_dist.data.tasks import DIGITS, LETTERS, TASKS
from longnet_dist.errors import ConfigError
from longnet_dist.inference.retrieval import evaluate_retrieval, grid_of
from longnet_dist.model.longnet import LongNetOutput

CPU = torch.device("cpu")
CONFIG = LongNetConfig(dim=8, layers=1, heads=1, positions="rope", segment_lengths=(8,), dilation_rates=(1,))


class Reader:
    """Stands for a model: ``guess`` returns the next character of the text that it has seen so far."""

    def __init__(self, guess):
        self.guess, self.config, self.seen = guess, CONFIG, ""

    def stream(self, total_rows):
        self.seen = ""
        return LongNet(CONFIG).stream(total_rows)

    def __call__(self, ids, stream):
        logits = torch.zeros(1, ids.shape[1], 256)
        for place, token in enumerate(ids[0].tolist()):
            self.seen += chr(token)
            if not stream.recording:
                logits[0, place, ord(self.guess(self.seen))] = 1.0
        return LongNetOutput(None, logits, None, None)


def next_of(seen):
    """Return what must follow, for a text of any task; a space where nothing is asked."""
    if said := re.search(r"The key was (\d*)$", seen):
        return re.search(r"Remember the key (\d+)\.", seen)[1][len(said[1]) :][:1] or " "
    if asked := re.search(r"<(\w\w)=(\w?)$", seen):
        known = dict(re.findall(r"<(\w\w)=(\w\w)>", seen[: asked.start()]))
        return known.get(asked[1], "  ")[len(asked[2])]
    if asked := re.search(r"Now (\w) is (\d*)$", seen):
        name = asked[1]
        while not name.isdigit():
            name = re.search(rf"Let {name} be (\w+)\.", seen)[1]
        return name[len(asked[2]) :][:1] or " "
    if "|" in seen:
        first, _, second = seen.replace("||", "|").partition("|")
        return first[len(second)] if len(second) < len(first) else " "
    if asked := re.search(r"@(\w*)$", seen):
        return seen[: asked.start()].partition("@")[2][len(asked[1]) :][:1] or " "
    return " "


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("chunk", [97, 700])
def test_a_perfect_reader_solves_all(name, chunk):
    for depth in (0.0, 0.6, 1.0):
        found = evaluate_retrieval(Reader(next_of), name, 600, depth, 3, chunk, CPU)
        assert (found.solved, found.accuracy, found.tokens_right) == (3, 1.0, 1.0)


@pytest.mark.parametrize(("name", "alphabet"), [("passkey", DIGITS), ("variables", DIGITS), ("induction", LETTERS)])
def test_a_guessing_reader_is_right_as_often_as_chance(name, alphabet):
    rng = np.random.default_rng(0)
    samples = 150
    reader = Reader(lambda seen: alphabet[int(rng.integers(len(alphabet)))])
    found = evaluate_retrieval(reader, name, 256, 0.5, samples, 256, CPU)
    answers = samples * {"passkey": 5, "variables": 4, "induction": 2}[name]
    chance = 1 / len(alphabet)
    assert abs(found.tokens_right - chance) < 4 * (chance * (1 - chance) / answers) ** 0.5
    assert found.accuracy <= 0.02


def test_a_reader_of_the_last_tokens_solves_only_what_lies_there():
    reader = Reader(lambda seen: next_of(seen[-200:]) if "Remember" in seen[-200:] else "0")
    accuracies = [evaluate_retrieval(reader, "passkey", 1000, depth, 2, 256, CPU).accuracy for depth in (0.2, 0.9)]
    assert accuracies == [0.0, 1.0]


def test_a_grid_has_a_row_for_each_depth_and_a_column_for_each_length():
    places = [(256, 0.0), (256, 1.0), (512, 1.0)]
    results = [evaluate_retrieval(Reader(next_of), "copy", n, depth, 1, n, CPU) for n, depth in places]
    lengths, depths, grid = grid_of(results)
    assert (lengths, depths) == ([256, 512], [0.0, 1.0])
    assert grid[0][0] == grid[1][0] == grid[1][1] == 1.0
    assert np.isnan(grid[0][1])


def test_what_cannot_solve_tasks_is_refused():
    with pytest.raises(ConfigError, match="0 samples were asked for"):
        evaluate_retrieval(Reader(next_of), "copy", 256, 0.0, 0, 256, CPU)
