"""Tasks have the length asked for, and their answers follow from what stands further back."""

import re

import numpy as np
import pytest

from longnet_dist.data.batches import Batches, Windows
from longnet_dist.data.tasks import TASKS, make_sample, write_samples
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import ConfigError, DataError


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


def texts_of(windows):
    for number in range(len(windows)):
        tokens, labels = windows.local([number])
        yield bytes(tokens[0].to(int).numpy().astype(np.uint8)), labels[0].numpy()


def test_windows_of_a_written_file_are_samples(tmp_path):
    path = write_samples(tmp_path / "a.tokens", ["passkey", "copy"], 256, 9, seed=5, validation=0.25)
    token_file = TokenFile.open(path, verify=True)
    for split, count in (("train", 7), ("validation", 2)):
        windows = Windows(token_file, split, 256)
        assert len(windows) == count
        for text, labels in texts_of(windows):
            assert len(text) in (254, 255, 256)  # the last tokens of a split are labels only
            assert (b"The key was" in text) != (b"|" in text)
            assert (labels != -100).sum() == (16 if b"|" in text else 5)
    with pytest.raises(ConfigError, match="a task"):
        write_samples(tmp_path / "b.tokens", [], 256, 9)


@pytest.mark.parametrize("documents", [False, True])
def test_answers_alone_are_labels(tmp_path, documents):
    path = write_samples(tmp_path / "a.tokens", ["passkey", "recall"], 1024, 6, seed=5, shortest=512)
    token_file = TokenFile.open(path, verify=True)
    samples = bytes(token_file.tokens).split(b"\0")
    assert 6 < len(samples) < 12
    expected, place = np.full(len(token_file.tokens), -100), 0
    for number, text in enumerate(samples):
        # The depth is unknown here, but a question has its place at the end whatever the depth is.
        name = ("passkey", "recall")[number % 2]
        answers = np.array(make_sample(name, 5, number, len(text), 0.5).answers)
        expected[place + answers - 1] = np.frombuffer(text, np.uint8)[answers]
        place += len(text) + 1
    windows = Windows(token_file, "all", 1024, documents=documents)
    for index in range(len(windows)):
        labels = windows.local([index])[1][0].numpy()
        assert (labels == expected[index * 1024 : index * 1024 + len(labels)]).all()
        for start, stop in ((0, 100), (480, 700), (700, 700), (511, 512), (900, len(labels))):
            tokens, part = windows.local([index], (start, stop))
            assert tokens.shape == part.shape == (1, stop - start)
            assert (part[0].numpy() == labels[start:stop]).all()
            assert windows.num_labels([index], (start, stop)) == (labels[start:stop] != -100).sum()


def test_a_window_has_one_sample_or_two_or_four(tmp_path):
    path = write_samples(tmp_path / "a.tokens", ["copy"], 1024, 60, shortest=256)
    counts = [text.count(b"|") for text, _ in texts_of(Windows(TokenFile.open(path), "all", 1024))]
    # A sample of copy has one or two bars, by the parity of its length; with its separator a length is even.
    assert set(counts) == {1, 2, 4}
    assert min(counts.count(number) for number in (1, 2, 4)) >= 12


def test_answers_need_a_causal_model_and_whole_windows(tmp_path):
    answers = TokenFile.open(write_samples(tmp_path / "a.tokens", ["copy"], 128, 4))
    assert Batches(answers, "train", 128, 1, 0).num_labels(0, 0, 1, (0, 128)) == 16
    with pytest.raises(DataError, match="names answers, which a causal model predicts"):
        Windows(answers, "train", 64, objective="masked", mask_id=256)
    with pytest.raises(DataError, match="packing=best_fit takes the windows"):
        Batches(answers, "train", 128, 1, 0, packing="best_fit")


def test_wrong_stretches_of_answers_are_refused(tmp_path):
    with TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer()) as writer:
        writer.add_document([b"a text"])
        writer.add_answers(2, 4)
        with pytest.raises(DataError, match="answers are stretches of tokens in order"):
            writer.add_answers(4, 5)
    path = write_samples(tmp_path / "b.tokens", ["copy"], 128, 4)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"answers of .* are damaged"):
        TokenFile.open(path, verify=True)
