# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Forward of one piece in one launch on Hopper: two groups of four warps, each with 64 queries of its own.

Each group runs at its own pace, so that the exponentials of one stand beside the matrix products of the other, and the
scores of a tile of keys are computed beside the weighted sum of the tile before. A warp of its own fetches the tiles
ahead. A program takes several tiles of queries in turn: the end of one stands beside the first scores of the next.

The arithmetic is that of ``triton_forward.forward_kernel`` but for the earlier branches' ``(out, lse)``, which come in
at the end: the tiles of keys that are masked come first, the maximum that they leave is kept, and a group whose sum
overflows does its queries once more.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from longnet_dist.attention.kernels.hopper.forward.fetch import Form, Sources, Tiles, fetch
from longnet_dist.attention.kernels.hopper.forward.multiply import Results, multiply
from longnet_dist.attention.kernels.hopper.multiplicity import allocate_columns
from longnet_dist.attention.kernels.triton.tiles import UNSPECIALIZED


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "heads"))
def hopper_forward_kernel(
    q, k, v, running, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides, rows, key_rows,
    tiles, segments, heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, half, overlaps, scale, table, heads_before,
    D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    CAUSAL: gl.constexpr, COMPACT: gl.constexpr, FRESH: gl.constexpr, LIMIT: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """``TURNS`` tiles of 128 queries of a (batch, head, segment) against all keys that they see.

    ``q, k, v, running`` are descriptors of the view ``(B·rows / r, r·row_stride)`` in blocks ``(64, 64)``; ``running``
    is ``out``. With ``FRESH`` nothing was written there yet. ``table`` is a ``TileTable``, or None.
    """
    shape = (
        tiles, segments, heads, group, head_block, w, r, first_segment, window_start, query_start, query_stop, key_stop,
        half, overlaps, table, heads_before,
    )  # fmt: skip
    sources = Sources(q, k, v, running, q_strides, k_strides, v_strides, out_strides, rows, key_rows)
    results = Results(out, lse, lse_strides)
    _run(sources, results, shape, scale, Form(D, KEYS, STAGES, TURNS, CAUSAL, COMPACT, FRESH, LIMIT, OVERLAPS))


@gluon.jit
def _run(sources, results, shape, scale, form):
    memory = _allocate(sources, form)
    gl.warp_specialize(
        [
            (multiply, (sources, results, memory, shape, scale, form, 0)),
            (multiply, (sources, results, memory, shape, scale, form, 1)),
            (fetch, (sources, memory, shape, form)),
        ],
        [4, 1],
        [232, 40],  # registers of a thread of the second group and of the fetching warp; the first has the others
    )


@gluon.jit
def _allocate(sources, form):
    DTYPE: gl.constexpr = sources.q.dtype
    q = gl.allocate_shared_memory(DTYPE, [4, 64, form.D], sources.q.layout)
    k = gl.allocate_shared_memory(DTYPE, [form.STAGES, form.KEYS, form.D], sources.k.layout)
    v = gl.allocate_shared_memory(DTYPE, [form.STAGES, form.KEYS, form.D], sources.v.layout)
    out = gl.allocate_shared_memory(DTYPE, [2, 64, form.D], sources.out.layout)
    q_ready, q_free = _barriers(4), _barriers(4)
    out_ready, out_free = _barriers(2), _barriers(2)
    own, k_ready, v_ready = _barriers(2), _barriers(form.STAGES), _barriers(form.STAGES)
    query_columns, key_columns = out, out
    if form.OVERLAPS:
        query_columns, key_columns = allocate_columns(DTYPE, 2), allocate_columns(DTYPE, 2)
    fence_async_shared()
    return Tiles(q, k, v, out, q_ready, q_free, out_ready, out_free, own, k_ready, v_ready, query_columns, key_columns)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(bars.index(number), count=1)
    return bars
