"""Tasks have the length asked for, and their answers follow from what stands further back."""

import re

import numpy as np
import pytest

from longnet_dist.data.batches import Windows
from longnet_dist.data.tasks import TASKS, make_sample, write_samples
from longnet_dist.data.token_file import TokenFile
from longnet_dist.errors import ConfigError


def answer_of(sample):
    return bytes(sample.text[place] for place in sample.answers).decode()


def solve(name, sample):
    """Return the answer as a reader would find it before the first answer."""
    text, first = sample.text.decode(), sample.answers[0]
    seen = text[:first]
    if name == "passkey":
        return re.search(r"Remember the key (\d+)\.", seen)[1]
    if name == "recall":
        pairs = dict(re.findall(r"<(\w\w)=(\w\w)>", text[: text.rindex("<", 0, first - 3)]))
        asked = re.findall(r"<(\w\w)=", text[first - 4 :])
        return "".join(pairs[key] for key in asked)
    if name == "copy":
        letters = text.split("|")[0]
        place = first - (len(text) - len(letters))
        return letters[place : place + len(sample.answers)]
    if name == "induction":
        place = seen.index("@")
        return seen[place + 1 : place + 1 + len(sample.answers)]
    variable = seen.split()[-2]
    while not variable.isdigit():
        variable = re.search(rf"Let {variable} be (\w+)\.", seen)[1]
    return variable


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("length", [256, 1001, 5000])
def test_answers_follow_from_the_text_before_them(name, length):
    for number, depth in enumerate((0.0, 0.3, 0.77, 1.0)):
        sample = make_sample(name, 3, number, length, depth)
        assert len(sample.text) == len(sample.tokens) == length
        assert solve(name, sample) == answer_of(sample)
        assert sample == make_sample(name, 3, number, length, depth)
        assert sample.text != make_sample(name, 4, number, length, depth).text


@pytest.mark.parametrize(
    ("name", "mark"), [("passkey", "Remember"), ("recall", "<"), ("induction", "@"), ("variables", "Let")]
)
def test_depth_says_where_to_look(name, mark):
    places = [make_sample(name, 0, 0, 4000, depth).text.decode().index(mark) / 4000 for depth in (0, 0.25, 0.5, 0.75)]
    assert places == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.03)


def test_every_task_states_its_source_and_refuses_less_than_its_least():
    for name in TASKS.names():
        task = TASKS[name]
        assert "arXiv" in task.source
        assert make_sample(name, 0, 0, task.least, 0.5)
        with pytest.raises(ConfigError, match="at least"):
            make_sample(name, 0, 0, task.least - 1, 0.5)
    with pytest.raises(ConfigError, match="did you mean passkey"):
        make_sample("paskey", 0, 0, 1000, 0.5)


def test_windows_of_a_written_file_are_samples(tmp_path):
    path = write_samples(tmp_path / "a.tokens", ["passkey", "copy"], 256, 9, seed=5, validation=0.25)
    windows = Windows(TokenFile.open(path), "train", 256)
    for number in range(windows.num_full):
        tokens, labels = windows.local([number])
        text = bytes(tokens[0].to(int).numpy().astype(np.uint8))
        assert text[-1] == 0
        assert (labels[0, :-1] == tokens[0, 1:]).all()
        assert (b"The key was" in text) == (number % 2 == 0)
    with pytest.raises(ConfigError, match="a task"):
        write_samples(tmp_path / "b.tokens", [], 256, 9)
