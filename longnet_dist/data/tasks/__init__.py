"""Tasks that ask for something far back in a text, each in a file of its own; samples are generated, not downloaded.

A task registers an object with the attributes of :class:`Task` under its name::

    @TASKS.register("first_letter")
    class FirstLetter(Task):
        ...

A sample is a text of an exact number of bytes, which are its tokens. Some of them are answers: what a model must
predict from what stands further back.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import ConfigError, DataError
from longnet_dist.registry import Registry

LETTERS = string.ascii_lowercase
DIGITS = string.digits
FILLER = "Clouds pass over the hill. The river runs to the sea. Nobody is in a hurry. The day is long. "


@dataclass(frozen=True)
class Sample:
    """A text and what a model must know of it.

    Attributes:
        text: bytes, which are the tokens.
        answers: positions of the answers in the text, ascending. The model predicts each from the tokens before it, and
            a sample is solved if it predicts all.
    """

    text: bytes
    answers: tuple[int, ...]

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Return the text as token ids."""
        return np.frombuffer(self.text, np.uint8).astype(np.int64)


class Task:
    """Generate samples of a task.

    Attributes:
        source: where the task was described.
        least: fewest tokens of a sample.
    """

    source: ClassVar[str]
    least: ClassVar[int]

    @staticmethod
    def sample(rng: np.random.Generator, length: int, depth: float) -> Sample:
        """Return a sample of exactly ``length`` tokens.

        Args:
            rng: source of randomness.
            length: tokens, at least ``least``.
            depth: where in the text the model must look, from 0 (the beginning) to 1 (just before the question).
        """
        raise NotImplementedError


TASKS: Registry[type[Task]] = Registry("task", __name__)


def make_sample(name: str, seed: int, number: int, length: int, depth: float) -> Sample:
    """Return sample ``number`` of a task: a function of the arguments alone.

    Args:
        name: of the task.
        seed: of all samples.
        number: of the sample.
        length: tokens.
        depth: from 0 to 1.

    Raises:
        ConfigError: an unknown task, too few tokens, or a depth outside ``[0, 1]``.
    """
    task = TASKS[name]
    if length < task.least or not 0 <= depth <= 1:
        raise ConfigError(
            f"a sample of the task {name} has at least {task.least} tokens and a depth from 0 to 1, but {length} "
            f"tokens at depth {depth} were asked for; use more tokens"
        )
    rng = np.random.default_rng([seed, number, length, *name.encode()])
    sample = task.sample(rng, length, depth)
    assert len(sample.text) == length, f"{name} made {len(sample.text)} tokens instead of {length}"
    return sample


def write_samples(
    path: str | Path,
    tasks: Sequence[str],
    length: int,
    num_windows: int,
    seed: int = 0,
    validation: float = 0.05,
    shortest: int | None = None,
) -> Path:
    """Write a token file of samples, for training, in windows of ``length`` tokens.

    A sample is a document, which a separator ends, and its answers are the answers of the file. Tasks take turns, and
    depths are uniform. With ``shortest`` a window has 1, 2, 4, … samples of one length each, each number as often, so
    that a model learns from short samples what it then does over long ones.

    Args:
        path: of the file; an existing one is replaced.
        tasks: names.
        length: tokens of a window.
        num_windows: number of windows.
        seed: of the samples.
        validation: share of the windows for the validation split.
        shortest: fewest tokens of a sample and its separator; None: a window is one sample.

    Raises:
        ConfigError: no task, an unknown one, or too few tokens.
        DataError: the file cannot be written.
    """
    if not tasks or num_windows < 1:
        raise ConfigError(f"samples need a task and a number of at least 1, not {list(tasks)} and {num_windows}")
    counts = [1]
    while shortest and length % (2 * counts[-1]) == 0 and length // (2 * counts[-1]) >= shortest:
        counts.append(2 * counts[-1])
    rng = np.random.default_rng([seed, num_windows])
    source = f"{num_windows} windows of {length} tokens with samples of {', '.join(tasks)}; seed {seed}"
    # The last sample of the file has no separator.
    held_out = min(max(int(num_windows * validation), 1), num_windows - 1) if validation else 0
    share = (held_out * length - 0.5) / (num_windows * length - 1) if held_out else 0.0
    number = 0
    with TokenFileWriter(path, ByteTokenizer(), validation=share, overwrite=True, source=source) as writer:
        for window in range(num_windows):
            count = counts[int(rng.integers(len(counts)))]
            for place, depth in enumerate(rng.random(count).tolist()):
                name = tasks[number % len(tasks)]
                sample = make_sample(name, seed, number, length // count - 1, depth)
                writer.add_document([sample.text])
                first = window * length + place * (length // count)
                for answer in stretches(sample.answers):
                    writer.add_answers(first + answer.start, first + answer.stop)
                number += 1
    if writer.num_tokens != num_windows * length - 1:
        raise DataError(f"{path} has {writer.num_tokens} tokens instead of {num_windows * length - 1}")
    return Path(path)


def stretches(places: Sequence[int]) -> list[range]:
    """Return the runs of neighbours among ascending places."""
    found: list[range] = []
    for place in places:
        if found and found[-1].stop == place:
            found[-1] = range(found[-1].start, place + 1)
        else:
            found.append(range(place, place + 1))
    return found


def draw(rng: np.random.Generator, alphabet: str, number: int) -> str:
    """Return ``number`` random characters."""
    return np.frombuffer(alphabet.encode(), np.uint8)[rng.integers(len(alphabet), size=number)].tobytes().decode()


def fill(rng: np.random.Generator, length: int) -> str:
    """Return ``length`` characters of the filler, from a random place of it on."""
    start = int(rng.integers(len(FILLER)))
    return (FILLER * (length // len(FILLER) + 2))[start : start + length]


def buried(rng: np.random.Generator, length: int, depth: float, parts: Sequence[str], question: str) -> str:
    """Return a text of ``length`` characters: filler with ``parts`` from ``depth`` on, spread evenly, and a question.

    Args:
        rng: source of randomness.
        length: characters.
        depth: share of the filler before the first part.
        parts: what is buried, in order.
        question: at the end.
    """
    filler = length - sum(map(len, parts)) - len(question)
    before = int(depth * filler)
    gaps = np.diff(np.linspace(before, filler, len(parts) + 1).astype(int)).tolist()
    pieces = [
        fill(rng, before),
        *(piece for part, gap in zip(parts, gaps, strict=True) for piece in (part, fill(rng, gap))),
    ]
    return "".join([*pieces, question])


def with_answer(text: str, answer: str) -> Sample:
    """Return the sample of a text that ends with its answer."""
    return Sample(text.encode(), tuple(range(len(text) - len(answer), len(text))))
