# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Multiplicities of pairs in the Hopper kernels: one matrix product more, of tiles in shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from longnet_dist.attention.kernels.triton.tiles import multiplicity_columns

ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # (64 rows, 16 columns)


@gluon.jit
def allocate_columns(DTYPE: gl.constexpr, COUNT: gl.constexpr):
    """Room for ``COUNT`` times the columns of 64 rows."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 16], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, 64, 16], layout)


@gluon.jit
def write_columns(tile, first, kv_head, r, factor, overlaps, WEIGHTED: gl.constexpr):
    """The columns of the 64 rows from index ``first`` on; a barrier of the group must follow."""
    index = first + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    column = gl.arange(0, 16, gl.SliceLayout(0, ROWS))
    tile.store(multiplicity_columns(index, column, kv_head, r, factor, overlaps, WEIGHTED, tile.dtype))
    fence_async_shared()


@gluon.jit
def multiplicity_product(left, right, scores, OVERLAPS: gl.constexpr):
    """The logarithms of multiplicities ``left · rightᵀ``, not waited for; ``scores`` as they are without overlaps."""
    if OVERLAPS:
        scores = warpgroup_mma(left, right.permute((1, 0)), scores, use_acc=False, is_async=True)
    return scores
