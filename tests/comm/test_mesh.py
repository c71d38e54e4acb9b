from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longnet_dist.comm.mesh import Mesh, MeshShape
from longnet_dist.config.schema import ParallelConfig
from longnet_dist.errors import ConfigError
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("data", "sequence", "world_size", "expected"),
    [
        ("auto", "auto", 1, (1, 1)),
        ("auto", "auto", 6, (1, 6)),
        (2, "auto", 6, (2, 3)),
        ("auto", 2, 6, (3, 2)),
        (3, 2, 6, (3, 2)),
        ("auto", 1, 4, (4, 1)),
    ],
)
def test_shapes(data, sequence, world_size, expected):
    shape = MeshShape.of(ParallelConfig(data=data, sequence=sequence), world_size)
    assert (shape.data, shape.sequence) == expected


@pytest.mark.parametrize(
    ("data", "sequence", "world_size"), [(2, 2, 6), (4, "auto", 6), ("auto", 4, 6), ("auto", 8, 4), (8, "auto", 4)]
)
def test_a_mesh_makes_up_the_world(data, sequence, world_size):
    with pytest.raises(ConfigError, match=f"whose product is {world_size}, or start"):
        MeshShape.of(ParallelConfig(data=data, sequence=sequence), world_size)


def place(data, sequence):
    mesh = Mesh.build(MeshShape(data, sequence), timedelta(seconds=60))
    total = torch.tensor(float(dist.get_rank()))
    if mesh.sequence_group is not None:
        dist.all_reduce(total, group=mesh.sequence_group)
        assert dist.get_rank(mesh.sequence_group) == mesh.sequence_rank
    return mesh.data_rank, mesh.sequence_rank, mesh.sequence_group is None, total.item()


@pytest.mark.parametrize(
    ("data", "sequence", "expected"),
    [
        (2, 2, [(0, 0, False, 1), (0, 1, False, 1), (1, 0, False, 5), (1, 1, False, 5)]),
        (1, 3, [(0, 0, False, 3), (0, 1, False, 3), (0, 2, False, 3)]),
        (3, 1, [(0, 0, True, 0), (1, 0, True, 1), (2, 0, True, 2)]),
    ],
)
def test_the_sequence_axis_is_the_inner_one(data, sequence, expected):
    assert run_distributed(place, data * sequence, data, sequence) == expected


@pytest.mark.parametrize(("data", "sequence"), [(1, 8), (8, 8), (128, 8), (1, 4096)])
def test_every_rank_makes_the_same_groups_in_the_same_order(data, sequence, monkeypatch):
    """A run makes one group for each sequence and none for a branch, whatever the pattern."""
    made = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, *_, **__: made.append(ranks) or ranks)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    expected = np.arange(data * sequence).reshape(data, sequence).tolist()
    for rank in {0, 3, data * sequence // 2, data * sequence - 1}:
        made.clear()
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        mesh = Mesh.build(MeshShape(data, sequence), timedelta(seconds=1))
        assert made == expected
        assert mesh.sequence_group[mesh.sequence_rank] == rank
