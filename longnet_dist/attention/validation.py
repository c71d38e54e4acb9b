"""The checks before a call, made so that all ranks raise or none does."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.stream import LayerCache
from longnet_dist.errors import ShapeError
from longnet_dist.geometry.pattern import DilatedPattern
from longnet_dist.geometry.window import Shards

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ShapeError unless q is ``(B, n, H, D)`` and k, v are ``(B, n, Hkv, D)`` with ``H % Hkv == 0``."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ShapeError(f"q, k, v must be (batch, rows, heads, head_dim), but are {shapes}; reshape them")
    if min(q.numel(), k.numel()) == 0:
        raise ShapeError(f"q, k, v must not be empty, but are {shapes}; every rank needs at least one row")
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"k and v must have the batch, rows and head_dim of q, and a number of heads that divides q's, "
            f"but are {shapes}"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in _DTYPES:
        raise ShapeError(
            f"q, k, v must share one dtype of float64, float32, bfloat16, float16, "
            f"but are {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if len({x.device for x in (q, k, v)}) > 1:
        raise ShapeError(f"q, k, v must be on one device, but are on {q.device}, {k.device}, {v.device}; move them")


def agree_on_shards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    group: dist.ProcessGroup | None,
    total_rows: int | None,
    cache: LayerCache | None = None,
    merges: bool = False,
) -> tuple[Shards, int]:
    """The slices of the sequence and this rank's number; checks the inputs.

    With a group and no ``total_rows``, one all-gather of a few integers lets every rank see what the others were given,
    so that a fault on one rank is raised on all; ``merges``: whether its kernel merges overlaps, as all must.
    """
    if cache is not None:
        return _chunk_of(cache, q, k, v, pattern, causal)
    if group is None or dist.get_world_size(group) == 1:
        check_inputs(q, k, v)
        _check_total(total_rows, q.shape[1])
        return Shards(q.shape[1], q.shape[1], 1), 0
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if total_rows is None:
        counts = _compare_ranks(q, k, v, pattern, causal, merges, group)
        return Shards(sum(counts), counts[0], ranks), rank
    check_inputs(q, k, v)
    rows = q.shape[1]
    shards = Shards(total_rows, rows if rank < ranks - 1 else (total_rows - rows) // (ranks - 1), ranks)
    start, stop = shards.window(rank)
    if stop - start != rows:
        raise ShapeError(f"rank {rank} of {ranks} must hold {stop - start} of {total_rows} rows, but holds {rows}")
    return shards, rank


def _chunk_of(
    cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, causal: bool
) -> tuple[Shards, int]:
    """The present chunk of a stream, whose rows every rank knows."""
    check_inputs(q, k, v)
    stream = cache.stream
    if stream.shards is None or causal != stream.causal or pattern != stream.pattern:
        raise ShapeError(
            f"a stream needs its own pattern and mask and a present chunk, but the pattern is {pattern} (the stream's: "
            f"{stream.pattern}), causal is {causal} ({stream.causal}) and the chunk is {stream.shards}; "
            f"enter a chunk first"
        )
    start, stop = stream.shards.window(stream.rank)
    if q.shape[1] != stop - start:
        raise ShapeError(f"the present chunk of the stream has {stop - start} rows on this rank, but {q.shape[1]} came")
    return stream.shards, stream.rank


def _check_total(total_rows: int | None, rows: int) -> None:
    if total_rows is not None and total_rows != rows:
        raise ShapeError(
            f"without a sequence group this device holds the whole sequence, but it has {rows} rows and total_rows is "
            f"{total_rows}; pass the group, or leave total_rows out"
        )


def _compare_ranks(
    q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, causal: bool, merges: bool, group: dist.ProcessGroup
) -> list[int]:
    """Rows of every rank; ShapeError on all ranks if one rank's inputs are wrong or differ from the others'."""
    fault: ShapeError | None = None
    try:
        check_inputs(q, k, v)
    except ShapeError as error:
        fault = error
    facts = _facts(q, k, pattern, causal, merges) if fault is None else []
    mine = torch.tensor([*facts, *[-1] * (_NUM_FACTS - len(facts))], dtype=torch.int64, device=q.device)
    all_facts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_facts, mine, group=group)
    table = torch.stack(all_facts).tolist()
    if fault is not None:
        raise fault
    bad = [rank for rank, row in enumerate(table) if row[1:] != table[0][1:] or row[0] < 1]
    counts = [row[0] for row in table]
    if bad:
        raise ShapeError(
            f"all ranks of the sequence group must pass the same batch, heads, head_dim, dtype, pattern and causal and "
            f"have the same backend, but rank {bad[0]} differs from rank 0 or was refused: {table[bad[0]]} against "
            f"{table[0]}"
        )
    if any(count != counts[0] for count in counts[:-1]) or counts[-1] > counts[0]:
        raise ShapeError(
            f"all ranks must hold the same number of rows and the last at most as many, but they hold {counts}; "
            f"give every rank ceil(N / ranks) rows and the last what is left"
        )
    return counts


_NUM_FACTS = 9


def _facts(q: Tensor, k: Tensor, pattern: DilatedPattern, causal: bool, merges: bool) -> list[int]:
    batch, rows, heads, dim = q.shape
    lengths, rates = pattern.segment_lengths, pattern.dilation_rates
    digest = hash((lengths, rates, len(pattern.head_offsets)))  # of integers only: equal in all processes
    return [rows, batch, heads, k.shape[2], dim, _DTYPES.index(q.dtype), digest, int(causal), int(merges)]
