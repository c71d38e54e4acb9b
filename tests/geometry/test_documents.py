"""Documents are cut where samples are."""

import numpy as np
import pytest

from longnet_dist.geometry.documents import Documents


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_ends_at_old_edges_and_at_every_length_of_a_period(seed):
    rng = np.random.default_rng(seed)
    period, samples = int(rng.integers(5, 40)), int(rng.integers(1, 5))
    length, rows = int(rng.integers(1, period + 1)), period * samples
    edges = np.unique(rng.integers(0, rows + 1, 8))
    starts, stops = edges[:-1][::2], edges[1:][::2]  # what lies between is padding
    found = Documents(tuple(starts.tolist()), tuple(stops.tolist())).cut(length, period)
    expected = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        inside = [row for row in range(start + 1, stop) if row % period % length == 0]
        expected += list(zip([start, *inside], [*inside, stop], strict=True))
    assert list(zip(found.starts, found.stops, strict=True)) == expected


def test_a_whole_sequence_is_cut_into_equal_parts():
    assert Documents.whole(12).cut(4, 12) == Documents((0, 4, 8), (4, 8, 12))
    assert Documents.whole(11).cut(4, 11) == Documents((0, 4, 8), (4, 8, 11))
