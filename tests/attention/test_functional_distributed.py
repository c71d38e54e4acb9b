import re

import pytest
import torch
import torch.distributed as dist

from longnet_dist.attention.functional import dilated_attention
from longnet_dist.attention.kernels.reference import oracle
from longnet_dist.errors import LongNetError
from longnet_dist.geometry.pattern import DilatedPattern
from tests.cases import random_case
from tests.distributed import run_distributed


def worst_errors(num_cases):
    """Largest difference from the oracle of this rank's output, LSE and gradients, over random cases and backends."""
    worst = 0.0
    ranks, rank = dist.get_world_size(), dist.get_rank()
    for seed in range(num_cases):
        case = random_case(seed, ranks)
        whole = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        expected, expected_lse = oracle(*whole, case.pattern, causal=case.causal)
        wanted = [expected, *torch.autograd.grad(expected, whole, case.dout)]
        rows = slice(*case.shards.window(rank))
        local = [x.detach()[:, rows].clone().requires_grad_() for x in whole]
        out, lse = dilated_attention(
            *local,
            case.pattern,
            causal=case.causal,
            group=dist.group.WORLD,
            backend=("reference", "sdpa")[seed % 2],
            return_lse=True,
            overlap=seed % 5 > 0,
            total_rows=None if seed % 3 else case.shards.total_rows,
        )
        actual = [out, *torch.autograd.grad(out, local, case.dout[:, rows])]
        torch.testing.assert_close(lse, expected_lse[:, rows], rtol=0, atol=1e-9)
        for a, b in zip(actual, wanted, strict=True):
            worst = max(worst, (a - b[:, rows]).abs().max().item())
    return worst


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_agrees_with_the_oracle_on_every_rank(ranks):
    errors = run_distributed(worst_errors, ranks, 50)
    assert len(errors) == ranks
    assert max(errors) < 1e-9


def subgroup_errors():
    """Two data ranks, each with its own sequence group of two ranks and its own data."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    case = random_case(11 + rank // 2, 2)
    rows = slice(*case.shards.window(rank % 2))
    expected, _ = oracle(case.q, case.k, case.v, case.pattern, causal=case.causal)
    local = (x[:, rows] for x in (case.q, case.k, case.v))
    out = dilated_attention(*local, case.pattern, causal=case.causal, group=groups[rank // 2])
    return (out - expected[:, rows]).abs().max().item()


def test_groups_of_a_larger_world_do_not_mix():
    assert max(run_distributed(subgroup_errors, 4)) < 1e-9


def messages(rows_by_rank, heads_by_rank, total_rows_by_rank=None, offsets_by_rank=None, backends=None):
    """The error that each rank raises, or None."""
    rank = dist.get_rank()
    x = torch.zeros(1, rows_by_rank[rank], heads_by_rank[rank], 4)
    total_rows = total_rows_by_rank and total_rows_by_rank[rank]
    pattern = DilatedPattern([8], [1], offsets_by_rank[rank] if offsets_by_rank else "modulo")
    try:
        backend = backends[rank] if backends else "auto"
        dilated_attention(x, x, x, pattern, group=dist.group.WORLD, total_rows=total_rows, backend=backend)
    except LongNetError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("rows", "heads", "message"),
    [
        ((4, 4, 5), (2, 2, 2), r"hold \[4, 4, 5\]"),
        ((4, 3, 3), (2, 2, 2), "same number"),
        ((4, 4, 4), (2, 1, 2), "rank 1"),
    ],
)
def test_ranks_that_differ_all_raise_and_none_hangs(rows, heads, message):
    found = run_distributed(messages, 3, rows, heads, timeout_seconds=20)
    assert all(text is not None for text in found)
    assert all(re.search(message, text) for text in found)


@pytest.mark.parametrize(
    ("rows", "total_rows", "message"),
    [
        ((4, 4, 4), (11, 11, 11), r"total_rows.* is 11 and they hold \[4, 4, 4\], 12 in all; pass total_rows=12"),
        ((4, 4, 3), (12, 12, 12), r"is 12 and they hold \[4, 4, 3\]"),
        ((4, 5, 3), (12, 12, 12), "must hold the same number"),
        ((4, 4, 4), (12, 12, 13), "rank 2 differs from rank 0 in total_rows"),
        ((4, 4, 4), (12, None, 12), "rank 1 differs from rank 0 in total_rows"),
    ],
)
def test_total_rows_that_do_not_fit_raise_on_all_ranks(rows, total_rows, message):
    found = run_distributed(messages, 3, rows, (2, 2, 2), total_rows, timeout_seconds=20)
    assert all(text is not None for text in found), "a rank would wait for one that raised alone"
    assert all(re.search(message, text) for text in found)


def test_offset_rules_that_differ_raise_on_all_ranks():
    found = run_distributed(messages, 2, (4, 4), (2, 2), None, ("modulo", "blocked"), timeout_seconds=20)
    assert all("rank 1 differs from rank 0 in pattern" in text for text in found)


def test_a_backend_that_cannot_run_on_one_rank_raises_on_all():
    found = run_distributed(messages, 2, (4, 4), (2, 2), None, None, ("auto", "flash"), timeout_seconds=20)
    assert "rank 1 was refused" in found[0]
    assert "backend 'flash' runs on a GPU" in found[1]


def test_an_invalid_tensor_on_one_rank_raises_on_all():
    found = run_distributed(messages, 2, (4, 0), (2, 2), timeout_seconds=20)
    assert "refused" in found[0]
    assert "empty" in found[1]
