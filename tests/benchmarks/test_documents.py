import torch

from benchmarks import documents


def test_edges_fill_the_rows():
    edges = documents.document_edges(5000, 40)
    assert edges[0] == 0
    assert edges[-1] == 5000
    assert edges == sorted(set(edges))
    assert 5000 / 80 < len(edges) < 5000 / 20


def test_every_case_is_measured():
    points = documents.measured(rows=128, dim=64, device=torch.device("cpu"), repeats=1)
    assert [point["case"] for point in points] == ["undivided", "lognormal", "long", "one by one", "padded"]
    assert all(point["both_ms"] > 0 for point in points)
    assert points[3]["rows"] == points[4]["rows"] == sum(documents.sequence_lengths(8))
