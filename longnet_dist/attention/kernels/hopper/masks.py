# Device code: Triton's compiler gives its values their types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
"""Masks over the columns of a tile of scores.

A thread holds two of every eight columns. Compared with ``arange(0, COLUMNS)``, each of its columns is a number in a
register, all through the loop. Here the eights are numbers in the instructions, and only the two places within an eight
depend on the thread.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def keep_columns(tile, first, stop, OTHER: gl.constexpr):
    """``tile (rows, columns)`` in the columns ``first <= j < stop``, elsewhere ``OTHER``.

    ``first`` and ``stop`` are int32 in the layout of the rows, ``SliceLayout(1, layout of the tile)``, or None.
    """
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    eights = tile.reshape(ROWS, COLUMNS // 8, 8)
    LAYOUT: gl.constexpr = eights.type.layout
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))
    place = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    eight = 8 * gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    if first is not None:
        first = gl.convert_layout(first, row_layout, assert_trivial=True)[:, None, None]
        eights = gl.where(first - place <= eight, eights, OTHER)
    if stop is not None:
        stop = gl.convert_layout(stop, row_layout, assert_trivial=True)[:, None, None]
        eights = gl.where(stop - place > eight, eights, OTHER)
    return gl.convert_layout(eights.reshape(ROWS, COLUMNS), tile.type.layout, assert_trivial=True)


@gluon.jit
def keep_before(vector, stop, OTHER: gl.constexpr):
    """``vector (columns,)`` before ``stop``, an integer, and ``OTHER`` from there on."""
    COLUMNS: gl.constexpr = vector.shape[0]
    eights = vector.reshape(COLUMNS // 8, 8)
    LAYOUT: gl.constexpr = eights.type.layout
    place = gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))[None, :]
    eight = 8 * gl.arange(0, COLUMNS // 8, gl.SliceLayout(1, LAYOUT))[:, None]
    eights = gl.where(stop - place > eight, eights, OTHER)
    return gl.convert_layout(eights.reshape(COLUMNS), vector.type.layout, assert_trivial=True)
