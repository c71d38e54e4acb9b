"""Windows and batches have the right labels, slices, order and masks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from longnet_dist.data.batches import IGNORE_INDEX, Batches, Windows
from longnet_dist.data.best_fit import best_fit
from longnet_dist.data.token_file import TokenFile
from longnet_dist.data.token_file_writer import TokenFileWriter
from longnet_dist.data.tokenizers import ByteTokenizer
from longnet_dist.errors import ConfigError, DataError
from tests.data.old_file import without_edges

LENGTH = 24


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Return a file of 1,000 tokens: 900 for training, 100 for validation."""
    path = tmp_path_factory.mktemp("data") / "text.tokens"
    text = np.random.default_rng(0).integers(1, 200, 1000, dtype=np.uint8).tobytes()
    with TokenFileWriter(path, ByteTokenizer(), validation=0.1) as writer:
        writer.add_document([text])
    return TokenFile.open(path)


def test_labels_are_the_next_tokens(file: TokenFile) -> None:
    batches = Batches(file, "train", LENGTH, batch_size=4, seed=1)
    tokens, labels = batches.local(step=2)
    assert tokens.shape == labels.shape == (4, LENGTH)
    assert tokens.dtype == labels.dtype == torch.int64
    for row, index in enumerate(batches.windows_of(range(8, 12))):
        first = index * LENGTH
        np.testing.assert_array_equal(tokens[row], file.tokens[first : first + LENGTH])
        np.testing.assert_array_equal(labels[row], file.tokens[first + 1 : first + LENGTH + 1])


def test_an_epoch_passes_over_every_window_once_in_its_own_order(file: TokenFile) -> None:
    batches = Batches(file, "train", LENGTH, batch_size=1, seed=1)
    assert batches.num_samples == 899 // LENGTH == 37
    epochs = np.reshape(batches.windows_of(range(3 * 37)), (3, 37)).tolist()
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Batches(file, "train", LENGTH, batch_size=1, seed=2)
    assert other.windows_of(range(37)) != epochs[0]


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_ranks_together_read_what_one_rank_reads(file: TokenFile, objective: str) -> None:
    batches = Batches(file, "train", LENGTH, 8, seed=3, objective=objective, mask_id=200)  # type: ignore[arg-type]
    whole = batches.local(5)
    edges = [0, 7, 7, 20, 24]
    for part in (0, 1):
        columns = []
        for start, stop in pairwise(edges):
            rows = [
                torch.stack(batches.local(5, data_rank, 2, (start, stop), micro_batch, 4))
                for data_rank in range(2)
                for micro_batch in range(4)
            ]
            assert all(piece.shape == (2, 1, stop - start) for piece in rows)
            columns.append(torch.cat([piece[part] for piece in rows]))
        torch.testing.assert_close(torch.cat(columns, dim=1), whole[part])


def test_only_the_rows_of_the_window_are_read(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[slice] = []

    class Recorder:
        def __getitem__(self, rows: slice) -> np.ndarray:
            read.append(rows)
            return np.zeros(rows.stop - rows.start, dtype=np.uint8)

    batches = Batches(file, "train", LENGTH, 1, seed=0)
    monkeypatch.setattr(file, "tokens", Recorder())
    batches.local(0, window=(6, 12))
    first = batches.windows_of([0])[0] * LENGTH
    assert read == [slice(first + 6, first + 13)]


def test_masks(file: TokenFile) -> None:
    windows = Windows(file, "train", 300, objective="masked", mask_id=256, seed=4)
    tokens, labels = windows.local([0, 1])
    hidden = tokens == 256
    original = torch.from_numpy(file.tokens[:600].astype(np.int64)).reshape(2, 300)
    assert 0.1 < hidden.float().mean() < 0.2
    assert torch.equal(labels != IGNORE_INDEX, hidden)
    assert torch.equal(torch.where(hidden, labels, tokens), original)
    assert not torch.equal(hidden[0], hidden[1])
    again = Windows(file, "train", 300, objective="masked", mask_id=256, seed=5).local([0, 1])[0]
    assert not torch.equal(again, tokens)


def test_a_window_is_masked_anew_in_each_epoch(file: TokenFile) -> None:
    batches = Batches(file, "train", 899, 1, seed=0, objective="masked", mask_id=256)
    assert batches.num_samples == 1
    assert not torch.equal(batches.local(0)[0], batches.local(1)[0])


@pytest.mark.parametrize("length", [1, 7, 33, 98, 99, 100, 5000])
def test_windows_in_order_label_every_token_but_the_first(file: TokenFile, length: int) -> None:
    windows = Windows(file, "validation", length)
    ranges = list(windows.batches(3))
    assert [index for indices in ranges for index in indices] == list(range(len(windows)))
    parts = [windows.local(indices) for indices in ranges]
    tokens = torch.cat([tokens.flatten() for tokens, _ in parts]).numpy()
    labels = torch.cat([labels.flatten() for _, labels in parts]).numpy()
    np.testing.assert_array_equal(tokens, file.tokens[900:999])
    np.testing.assert_array_equal(labels, file.tokens[901:])


def test_short_last_window(file: TokenFile) -> None:
    windows = Windows(file, "validation", 33 + 7)
    assert (len(windows), windows.num_full, windows.length_of(1), windows.length_of(2)) == (3, 2, 40, 19)
    assert list(windows.batches(8)) == [range(2), range(2, 3)]
    tokens, _ = windows.local([2], (12, 19))
    np.testing.assert_array_equal(tokens[0], file.tokens[992:999])
    with pytest.raises(DataError, match=r"rows \[12, 20\) .* \[19\] rows"):
        windows.local([2], (12, 20))


def test_vocabulary_too_small(file: TokenFile) -> None:
    highest = int(file.tokens.max())
    Batches(file, "train", LENGTH, 1, 0, vocab_size=highest + 1)
    with pytest.raises(DataError, match=rf"id {highest}, .* ends at {highest - 1}; set model\.vocab_size=256"):
        Batches(file, "train", LENGTH, 1, 0, vocab_size=highest)


def test_split_too_short(file: TokenFile, tmp_path: Path) -> None:
    Batches(file, "validation", 99, 1, 0)
    with pytest.raises(DataError, match=r"100 tokens.* = 101; use at most data\.sequence_length=99"):
        Batches(file, "validation", 100, 1, 0)
    with TokenFileWriter(tmp_path / "a.tokens", ByteTokenizer(), validation=0) as writer:
        writer.add_document([b"text"])
    with pytest.raises(DataError, match=r"validation split of .* has 0 tokens"):
        Windows(TokenFile.open(tmp_path / "a.tokens"), "validation", 1)


def test_batch_that_does_not_divide(file: TokenFile) -> None:
    batches = Batches(file, "train", LENGTH, 6, 0)
    with pytest.raises(ConfigError, match=r"multiple of the 2 data ranks times 2 micro-batches, but 6 is not; use 8"):
        batches.local(0, 0, 2, num_micro_batches=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"objective": "next"}, "causal or masked"),
        ({"objective": "masked"}, "mask_id"),
    ],
)
def test_impossible_options(file: TokenFile, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Batches(file, "train", **({"sequence_length": LENGTH, "batch_size": 1, "seed": 0} | options))  # type: ignore[arg-type]


def test_an_id_that_the_header_denies_is_refused_where_it_is_read(file: TokenFile, tmp_path: Path) -> None:
    """The checksum is not compared at every start, and a GPU would only report an index out of range."""
    damaged = tmp_path / "damaged.tokens"
    data = bytearray(file.path.read_bytes())
    data[-8 * len(file.edges) - 3] = 0xFF  # type: ignore[arg-type]
    damaged.write_bytes(data)
    windows = Windows(TokenFile.open(damaged), "validation", LENGTH, vocab_size=file.header.max_id + 1)
    windows.local([0])
    with pytest.raises(DataError, match=r"promises ids up to 199, and there is a 255; copy it again"):
        windows.local([len(windows) - 1])


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_labels_are_counted_without_reading(file: TokenFile, objective: str) -> None:
    batches = Batches(file, "train", LENGTH, 8, seed=3, objective=objective, mask_id=200)  # type: ignore[arg-type]
    for place in ((0, 0, 1, (0, 24)), (5, 1, 2, (7, 20), 3, 4), (5, 1, 2, (7, 7), 3, 4)):
        _, labels = batches.local(*place)  # type: ignore[arg-type]
        assert batches.num_labels(*place) == (labels != IGNORE_INDEX).sum()  # type: ignore[arg-type]


TEXTS = [b"abcdefg", b"h", b"ijklmnopqrstuvwxyz" * 3, b"A", b"BC", b"DEFG" * 6 + b"H"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    """Return a file of six documents, all of it for training."""
    path = tmp_path_factory.mktemp("data") / "documents.tokens"
    with TokenFileWriter(path, ByteTokenizer(), validation=0) as writer:
        for text in TEXTS:
            writer.add_document([text])
    return TokenFile.open(path)


def expected_rows(file: TokenFile, first: int, length: int) -> tuple[list[int], list[int], list[int]]:
    """Return tokens, labels and edges of a window, from the zero bytes that separate the texts."""
    text = file.tokens.tolist()
    ends = [place for place, byte in enumerate(text) if byte == 0]
    labels = [-100 if place in ends else text[place + 1] for place in range(first, first + length)]
    edges = [0, *(end + 1 - first for end in ends if 0 < end + 1 - first < length), length]
    return text[first : first + length], labels, edges


@pytest.mark.parametrize("length", [1, 5, 24, 60, 94])
def test_no_label_crosses_an_edge_of_documents(packed: TokenFile, length: int) -> None:
    windows = Windows(packed, "train", length, documents=True)
    indices = range(windows.num_full)
    tokens, labels = windows.local(indices)
    assert tokens.shape == labels.shape == (1, length * len(indices))
    found = windows.documents_of(indices)
    assert found is not None
    place, starts, stops = 0, [], []
    for index in indices:
        rows, targets, edges = expected_rows(packed, index * length, length)
        assert tokens[0, place : place + length].tolist() == rows
        assert labels[0, place : place + length].tolist() == targets
        starts += [place + edge for edge in edges[:-1]]
        stops += [place + edge for edge in edges[1:]]
        place += length
    assert (list(found.starts), list(found.stops)) == (starts, stops)
    for start, stop in ((0, 0), (0, place), (place // 3, place - 1), (place - 1, place)):
        assert windows.num_labels(indices, (start, stop)) == int((labels[0, start:stop] != IGNORE_INDEX).sum())
        torch.testing.assert_close(windows.local(indices, (start, stop))[1], labels[:, start:stop])


@pytest.mark.parametrize("length", [1, 4, 16, 55, 200])
@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_best_fit_packs_every_token_once(packed: TokenFile, length: int, objective: str) -> None:
    options = {"objective": objective, "mask_id": 256, "documents": True, "packing": "best_fit"}
    batches = Batches(packed, "train", length, 1, seed=3, **options)  # type: ignore[arg-type]
    windows, seen = batches.windows, []
    for index in range(len(windows)):
        (tokens, labels), found = windows.local([index]), windows.documents_of([index])
        assert found is not None
        assert found.starts[0] == 0
        end = found.stops[-1]
        assert (labels[0, end:] == IGNORE_INDEX).all()
        if objective == "causal":
            for start, stop in zip(found.starts, found.stops, strict=True):
                piece = bytes(tokens[0, start:stop].tolist())
                assert packed.tokens.tobytes().count(piece) >= 1
                assert len(piece) <= length
                torch.testing.assert_close(labels[0, start : stop - 1], tokens[0, start + 1 : stop])
                # Only a cut goes on, and only a separator, or the end of the file, ends.
                assert (labels[0, stop - 1] == IGNORE_INDEX) == piece.endswith((b"\0", b"H"))
                seen.append(piece)
        for start, stop in ((0, length), (length // 3, length - 1), (length // 2, length // 2)):
            if start <= stop:
                assert windows.num_labels([index], (start, stop)) == int((labels[0, start:stop] != -100).sum())
                torch.testing.assert_close(windows.local([index], (start, stop))[1], labels[:, start:stop])
    if objective == "causal" and length >= 55:
        assert sorted(seen) == sorted([*(text + b"\0" for text in TEXTS[:-1]), TEXTS[-1]])
        assert "0.00% of the documents are cut" in batches.packing_report


def test_best_fit_is_repeatable_and_follows_the_seed(packed: TokenFile) -> None:
    rows = [
        torch.cat(
            [Batches(packed, "train", 9, 2, seed, documents=True, packing="best_fit").local(k)[0] for k in (0, 1)]
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("room", [1, 7, 100, 2048])
def test_best_fit_decreasing_is_that_of_a_plain_loop(room: int) -> None:
    lengths = np.random.default_rng(room).integers(1, room + 1, 500)
    windows = best_fit(lengths, room, seed=5)
    filled = np.bincount(windows, lengths)
    assert filled.max() <= room
    left: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [place for place, rest in enumerate(left) if rest >= length]
        if fitting:
            left[min(fitting, key=lambda place: left[place])] -= length
        else:
            left.append(room - length)
    assert sorted((room - filled).astype(int).tolist()) == sorted(left)


def test_documents_need_edges(packed: TokenFile, tmp_path: Path) -> None:
    old = without_edges(packed.path, tmp_path / "old.tokens")
    file = TokenFile.open(old, verify=True)
    assert file.edges is None
    Windows(file, "train", 8).local([0])
    for options in ({"documents": True}, {"documents": True, "packing": "best_fit"}):
        with pytest.raises(DataError, match=r"none, .*again: longnet prepare INPUT --output .*old\.tokens"):
            Batches(file, "train", 8, 1, 0, **options)  # type: ignore[arg-type]


def test_bytes_of_labels(packed: TokenFile) -> None:
    windows = Windows(packed, "train", 24, documents=True)
    _, labels = windows.local([0])
    assert windows.num_bytes(labels) == int((labels != IGNORE_INDEX).sum())
