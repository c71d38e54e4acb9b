"""The checks before a call, made so that all ranks raise an error or none does."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real

import torch
import torch.distributed as dist
from torch import Tensor

from longnet_dist.attention.packing import ONE_DOCUMENT, PackedBatch
from longnet_dist.attention.sink import check_sink
from longnet_dist.attention.stream import LayerCache
from longnet_dist.caches import bounded_cache
from longnet_dist.errors import ConfigError, LongNetError, ShapeError
from longnet_dist.geometry.documents import check_end
from longnet_dist.geometry.pattern import DilatedPattern, check_pattern
from longnet_dist.geometry.window import Shards

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_group(group: object) -> None:
    """Raise ConfigError unless ``group`` is None or a process group."""
    if not (group is None or isinstance(group, dist.ProcessGroup)):
        raise ConfigError(
            f"group must be a process group of torch.distributed, but is {group!r}; use dist.group.WORLD, "
            f"dist.new_group(), or mesh.get_group() of a device mesh"
        )


def check_types(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: object,
    causal: object,
    group: object,
    cache: object,
    sink: Tensor | None,
    forms: bool = False,
) -> None:
    """Raise an error for arguments of another type, which all ranks are given by the same mistake in the caller.

    With ``forms`` shapes are checked, too: before the items of a batch become calls of another form.
    """
    check_pattern(pattern)
    for name, x in (("q", q), ("k", k), ("v", v), ("sink", sink)):
        if not isinstance(x, Tensor) and not (name == "sink" and x is None):
            raise ShapeError(f"{name} must be a tensor, but is of type {type(x).__name__}; use torch.as_tensor")
        if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested):
            raise ShapeError(
                f"{name} must be a dense tensor, but is {'nested' if x.is_nested else x.layout}; use to_dense(), or "
                f"for sequences of unequal lengths a padded or packed tensor with cu_seqlens"
            )
    if causal not in (True, False):
        raise ConfigError(f"causal must be True or False, but is {causal!r}; give one of these")
    check_group(group)
    if not (cache is None or isinstance(cache, LayerCache)):
        raise ConfigError(
            f"cache must be that of a layer in a Stream, but is of type {type(cache).__name__}; use stream.layers[i]"
        )
    if forms:
        check_inputs(q, k, v, short=True)
        check_sink(sink, q)


def positive_scale(q: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    """Return queries and a scale that give the same scores, with a positive scale if ``scale`` is a number.

    Kernels find the largest score before they scale, and hide keys by a score of ``-inf``.
    """
    if not isinstance(q, Tensor) or not isinstance(scale, Real) or isinstance(scale, bool) or not float(scale) <= 0:
        return q, scale
    return (-q, -float(scale)) if float(scale) < 0 else (0 * q, 1.0)


def check_scale(scale: object) -> None:
    """Raise ConfigError unless ``scale`` is None or a finite number; see :func:`positive_scale`."""
    if scale is None or (isinstance(scale, Real) and not isinstance(scale, bool) and 0 < float(scale) < math.inf):
        return
    raise ConfigError(
        f"scale must be a finite number, such as head_dim ** -0.5, but is {scale!r}; for a factor that is a tensor "
        f"multiply q by it, and give scale=1.0"
    )


def check_inputs(q: Tensor, k: Tensor, v: Tensor, short: bool = False) -> None:
    """Raise ShapeError unless q is ``(B, n, H, D)`` and k, v are ``(B, n, Hkv, D)`` with ``H % Hkv == 0``.

    With ``short``, q may have fewer rows than k: the last ones of the sequence.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ShapeError(f"q, k, v must be (batch, rows, heads, head_dim), but are {shapes}; reshape them")
    if min(q.numel(), k.numel()) == 0:
        raise ShapeError(f"q, k, v must not be empty, but are {shapes}; every rank needs at least one row")
    if k.shape != v.shape or q.shape[::3] != k.shape[::3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            f"k and v must have the batch, rows and head_dim of q, and a number of heads that divides q's, "
            f"but are {shapes}"
        )
    if q.shape[1] > k.shape[1] or (q.shape[1] < k.shape[1] and not short):
        raise ShapeError(
            f"q must have as many rows as k, or, on one device and outside a stream, fewer: the last rows of the "
            f"sequence; but are {shapes}; over ranks give every rank the rows of its slice"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in _DTYPES:
        raise ShapeError(
            f"q, k, v must share one dtype of float64, float32, bfloat16, float16, "
            f"but are {q.dtype}, {k.dtype}, {v.dtype}; convert them"
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
    refusal: ConfigError | None = None,
    sink: Tensor | None = None,
    packed: PackedBatch = ONE_DOCUMENT,
) -> tuple[Shards, int]:
    """Check the inputs; return the slices of the sequence and this rank's number.

    With a group, one all-gather of a few integers lets every rank see what the others were given. So a fault on one
    rank is raised on all, also where ``total_rows`` is known: a rank that raised alone would leave the others waiting
    for it. The chunk of a stream is compared like a whole sequence, although every rank knows its rows.

    Args:
        q, k, v, pattern, causal, group, total_rows, cache: as in :func:`~longnet_dist.dilated_attention`.
        merges: whether the kernel of this rank merges overlaps; all ranks must do the same.
        refusal: why this rank has no kernel, to be raised once the other ranks know.
        sink: as in :func:`~longnet_dist.dilated_attention`.
        packed: the documents of the batch.

    Raises:
        ShapeError: shapes, dtypes, devices or rows that do not fit, on all ranks of the group alike.
        ConfigError: the ``refusal``; the other ranks of the group raise a ShapeError.
    """
    alone = group is None or dist.get_world_size(group) == 1
    fault: LongNetError | None = refusal or packed.fault
    if fault is not None and alone:
        raise fault
    if cache is not None:
        return _agree_on_chunk(q, k, v, pattern, causal, group, cache, merges, fault, sink, packed)
    if group is None or alone:
        check_inputs(q, k, v, short=True)
        check_sink(sink, q)
        queries, rows = q.shape[1], k.shape[1]
        _check_total(total_rows, rows)
        if not packed.rows:  # else the lists were checked against the rows of an item
            check_end(packed.last_row, rows)
        return Shards(rows, queries, 1, rows - queries), 0
    counts = _compare_ranks(q, k, v, pattern, causal, merges, total_rows, group, fault, sink, packed.digest)
    check_end(packed.last_row, sum(counts))
    return Shards(sum(counts), counts[0], len(counts)), dist.get_rank(group)


def _agree_on_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    group: dist.ProcessGroup | None,
    cache: LayerCache,
    merges: bool,
    fault: LongNetError | None,
    sink: Tensor | None,
    packed: PackedBatch,
) -> tuple[Shards, int]:
    """Return what :func:`_chunk_of` does; a fault on one rank is raised on all ranks of the group."""
    try:
        check_sink(sink, q)
        found = _chunk_of(cache, q, k, v, pattern, causal)
    except ShapeError as error:
        fault = fault or error
    if group is not None and dist.get_world_size(group) > 1:
        shards = cache.stream.shards
        chunk = _NO_CHUNK if shards is None else shards.start
        _compare_ranks(q, k, v, pattern, causal, merges, None, group, fault, sink, packed.digest, chunk)
    if fault is not None:
        raise fault
    return found


def _chunk_of(
    cache: LayerCache, q: Tensor, k: Tensor, v: Tensor, pattern: DilatedPattern, causal: bool
) -> tuple[Shards, int]:
    """Return the present chunk of a stream, whose rows every rank knows, and this rank's number."""
    check_inputs(q, k, v)
    stream = cache.stream
    if stream.shards is None or causal != stream.causal or pattern.of_model != cache.pattern:
        raise ShapeError(
            f"a stream needs its own pattern and mask and a present chunk, but the pattern is {pattern} (the stream's: "
            f"{cache.pattern}), causal is {causal} ({stream.causal}) and the chunk is {stream.shards}; "
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


_FACTS = (
    *("rows", "batch", "heads", "kv_heads", "head_dim", "dtype"),
    *("pattern", "first_head", "total_heads", "causal", "backend", "total_rows", "sink", "documents", "chunk"),
)
"""What ranks tell each other, one integer each; all but the rows must be equal on all ranks."""
_REFUSED = -1
_NO_CHUNK = -1


def _compare_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    merges: bool,
    total_rows: int | None,
    group: dist.ProcessGroup,
    refusal: LongNetError | None,
    sink: Tensor | None,
    documents: int,
    chunk: int = _NO_CHUNK,
) -> list[int]:
    """Return the rows of every rank; raise on all ranks if one rank's inputs are wrong or differ from the others'."""
    fault: LongNetError | None = refusal
    facts = [_REFUSED] * len(_FACTS)
    try:
        check_inputs(q, k, v)
        check_sink(sink, q)
        facts = facts if fault else [*_facts(q, k, pattern, causal, merges, total_rows, sink, documents), chunk]
    except ShapeError as error:
        fault = error
    table = gather_facts(facts, q.device, group)
    if fault is not None:
        raise fault
    for rank, row in enumerate(table):
        names = [name for name, x, y in zip(_FACTS[1:], row[1:], table[0][1:], strict=True) if x != y]
        if row[0] == _REFUSED or names:
            what = "was refused" if _REFUSED in (row[0], table[0][0]) else f"differs from rank 0 in {', '.join(names)}"
            raise ShapeError(
                f"all ranks of the sequence group must pass the same batch, heads, head_dim, dtype, pattern, "
                f"first_head, total_heads, causal, total_rows, kind of sink, documents and chunk of a stream, and "
                f"have the same backend, but rank {rank} {what}: "
                f"{row} against {table[0]}"
            )
    counts = [row[0] for row in table]
    if any(count != counts[0] for count in counts[:-1]) or counts[-1] > counts[0]:
        raise ShapeError(
            f"all ranks must hold the same number of rows and the last at most as many, but they hold {counts}; "
            f"give every rank ceil(N / ranks) rows and the last what is left"
        )
    if total_rows not in (None, sum(counts)):
        raise ShapeError(
            f"total_rows must be the rows of all ranks together, but it is {total_rows} and they hold {counts}, "
            f"{sum(counts)} in all; pass total_rows={sum(counts)} or leave it out"
        )
    return counts


def _facts(
    q: Tensor,
    k: Tensor,
    pattern: DilatedPattern,
    causal: bool,
    merges: bool,
    total_rows: int | None,
    sink: Tensor | None,
    documents: int,
) -> list[int]:
    batch, rows, heads, dim = q.shape
    dtype, total = _DTYPES.index(q.dtype), 0 if total_rows is None else total_rows
    kind = 0 if sink is None else sink.dim()
    shape = [rows, batch, heads, k.shape[2], dim, dtype]
    grid = [_digest(pattern), pattern.first_head, pattern.total_heads or k.shape[2]]
    return [*shape, *grid, int(causal), int(merges), total, kind, documents]


@bounded_cache(maxsize=64)
def _digest(pattern: DilatedPattern) -> int:
    """Return an integer that is equal in all processes for equal patterns; Python's own hash of a name is not."""
    return int.from_bytes(hashlib.sha256(repr(pattern).encode()).digest()[:8], "big", signed=True)


def gather_facts(facts: list[int], device: torch.device, group: dist.ProcessGroup) -> list[list[int]]:
    """Return the facts of every rank; all ranks of the group must call, with the same number of integers."""
    with _stream_of_its_own(device):
        mine = torch.tensor(facts, dtype=torch.int64, device=device)
        all_facts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_facts, mine, group=group)
        table: list[list[int]] = torch.stack(all_facts).tolist()
        return table


@contextmanager
def _stream_of_its_own(device: torch.device) -> Iterator[None]:
    """Use another CUDA stream on a GPU, so that the host waits for the facts but not for what is being computed."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_side_stream(device)):
        yield


@bounded_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
