# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""dK, dV and dQ of one piece in one launch on Hopper: the asynchronous matrix units and the copy engine, by hand.

The arithmetic is that of ``triton_backward.key_gradient_kernel``; what differs is the order. The compiler's own
schedule waits for every matrix product before it goes on. Here two groups of four warps, each with 64 keys of its own,
run at their own pace, so that the exponentials of one stand beside the matrix products of the other. They meet where dQ
needs the dS of both: with two times 64 queries a step, group ``w`` computes dQ of the ``w``-th 64 queries; with 64 a
step, the ``w``-th 64 columns. A warp of its own fetches the tiles of queries ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from longnet_dist.attention.kernels.hopper.backward.fetch import FETCHERS, Form, Sources, Tiles, fetch
from longnet_dist.attention.kernels.hopper.backward.multiply import Results, multiply
from longnet_dist.attention.kernels.hopper.multiplicity import allocate_columns
from longnet_dist.attention.kernels.triton.tiles import UNSPECIALIZED


@gluon.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("r", "kv_heads"))
def hopper_backward_kernel(
    dout, q, k, v, statistics, dq, dk, dv,
    rows, key_rows,
    dout_strides, q_strides, k_strides, v_strides, statistics_strides, dq_strides, dk_strides, dv_strides,
    tiles, segments, kv_heads, group, head_block, w, r,
    first_segment, window_start, query_start, query_stop, key_stop, half, overlaps, scale, table, heads_before,
    D: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, COMPACT: gl.constexpr,
    GROUPED: gl.constexpr, FRESH: gl.constexpr, OVERLAPS: gl.constexpr, ADDS_DQ: gl.constexpr,
):  # fmt: skip
    """Adds to dK and dV of 128 keys of a (batch, kv head, segment); with ``ADDS_DQ`` to dQ through the copy engine.

    ``q, k, v, dout, dq`` are descriptors of the view ``(B·rows / r, r·row_stride)``. ``statistics`` ``(B, n, H, 2)``
    holds lse in units of log 2, and delta. With ``FRESH`` dK and dV were not written yet. ``table`` is a ``TileTable``,
    or None.
    """
    shape = (
        tiles, segments, kv_heads, head_block, w, r, first_segment, window_start, query_start, query_stop, key_stop,
        half, overlaps, table, heads_before,
    )  # fmt: skip
    sources = Sources(
        q, k, v, dout, statistics, q_strides, k_strides, v_strides, dout_strides, statistics_strides, rows, key_rows
    )
    results = Results(dq, dk, dv, dq_strides, dk_strides, dv_strides, rows)
    _run(  # a form with a name would be made of numbers that the compiler does not know
        sources, results, shape, group, scale,
        Form(D, QUERIES // 64, STAGES, CAUSAL, COMPACT, GROUPED, FRESH, OVERLAPS, ADDS_DQ),
    )  # fmt: skip


@gluon.jit
def _run(sources, results, shape, group, scale, form):
    memory = _allocate(sources, results, form)
    gl.warp_specialize(
        [
            (multiply, (results, memory, shape, group, scale, form, 0)),
            (multiply, (results, memory, shape, group, scale, form, 1)),
            (fetch, (sources, memory, shape, group, form)),
        ],
        [4, 1],
        [240, 24],  # registers of a thread of the second group and of the fetching warp; the first has the others
    )


@gluon.jit
def _allocate(sources, results, form):
    DTYPE: gl.constexpr = sources.q.dtype
    COUNT: gl.constexpr = form.STAGES * form.HALVES
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    key = gl.allocate_shared_memory(DTYPE, [2, 64, form.D], sources.k.layout)
    value = gl.allocate_shared_memory(DTYPE, [2, 64, form.D], sources.v.layout)
    q_tiles = gl.allocate_shared_memory(DTYPE, [COUNT, 64, form.D], sources.q.layout)
    dout_tiles = gl.allocate_shared_memory(DTYPE, [COUNT, 64, form.D], sources.dout.layout)
    early_ds = gl.allocate_shared_memory(DTYPE, [4 // form.HALVES, 64, 64], ds_layout)
    late_ds = early_ds
    if form.HALVES == 2:
        late_ds = gl.allocate_shared_memory(DTYPE, [2, 64, 64], ds_layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [2, 64, 64], results.dq.layout)
    key_columns, query_columns = dq_tiles, dq_tiles
    if form.OVERLAPS:
        key_columns, query_columns = allocate_columns(DTYPE, 2), allocate_columns(DTYPE, 2)
    lse = gl.allocate_shared_memory(gl.float32, [COUNT, 64], vector)
    delta = gl.allocate_shared_memory(gl.float32, [COUNT, 64], vector)
    key_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [form.STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(key_ready, count=1)
    for slot in gl.static_range(form.STAGES):
        mbarrier.init(ready.index(slot), count=1 + FETCHERS)  # the copy engine, and the copies of the threads
    fence_async_shared()
    return Tiles(
        key, value, q_tiles, dout_tiles, lse, delta, early_ds, late_ds, dq_tiles, key_columns, query_columns,
        key_ready, ready,
    )  # fmt: skip
