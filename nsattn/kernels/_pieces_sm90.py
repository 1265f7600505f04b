"""Heads in pieces, for the kernels in Gluon: tiles are powers of two wide and heads of 192 are not.

A head is a piece of at most 128 columns and what is left, so scores are the sum of one product a piece, and an output
is made piece by piece.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

WIDEST = gl.constexpr(128)
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # of a tile of 16-bit numbers


@gluon.constexpr_function
def pieces(D):
    """Columns of the pieces of a head."""
    return tuple(columns for columns in (min(D, 128), D - 128) if columns > 0)


@gluon.constexpr_function
def sums_layout(rows, columns, warps):
    """Of the sums of a product [rows, columns], by `warps` warps: 16 rows each, then the columns shared out."""
    down = min(warps, rows // 16)
    return gl.NVMMADistributedLayout([3, 0], [down, warps // down], [16, columns * down // warps, 16])


@gluon.jit
def zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Sums for rows of a head: one tensor a piece."""
    left = _zeros(ROWS, COLUMNS[0], WARPS)
    if len(COLUMNS) == 1:
        return (left,)
    else:
        return (left, _zeros(ROWS, COLUMNS[1], WARPS))


@gluon.jit
def _zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    return gl.zeros([ROWS, COLUMNS], gl.float32, sums_layout(ROWS, COLUMNS, WARPS))


@gluon.jit
def allocate(TYPE: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Shared memory for rows of a head: one tile a piece."""
    left = gl.allocate_shared_memory(TYPE, [ROWS, COLUMNS[0]], SHARED)
    if len(COLUMNS) == 1:
        return (left,)
    else:
        return (left, gl.allocate_shared_memory(TYPE, [ROWS, COLUMNS[1]], SHARED))


@gluon.jit
def allocate_stages(TYPE: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The same, for several steps: the tiles of a piece, one a stage."""
    left = gl.allocate_shared_memory(TYPE, [STAGES, ROWS, COLUMNS[0]], SHARED)
    if len(COLUMNS) == 1:
        return (left,)
    else:
        return (left, gl.allocate_shared_memory(TYPE, [STAGES, ROWS, COLUMNS[1]], SHARED))
