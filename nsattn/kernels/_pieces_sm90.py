"""Heads in pieces, for the kernels in Gluon: tiles are powers of two wide and heads of 192 are not.

A head is a piece of at most 128 columns, in the backward 256, and what is left, so scores are the sum of one product a
piece, and an output is made piece by piece.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

WIDEST = gl.constexpr(128)
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # of a tile of 16-bit numbers
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # pieces of 16 bytes, 128 bytes a warp and row


@gluon.constexpr_function
def pieces(D, most=128):
    """Columns of the pieces of a head, of which none has more than `most`: 128, or 256 where D is a power of two."""
    first = D if D in (64, 128, 256) and most >= D else 128
    return (first, D - first) if D > first else (first,)


@gluon.constexpr_function
def sums_layout(rows, columns, warps):
    """Of the sums of a product [rows, columns], by `warps` warps: 16 rows each, then the columns shared out."""
    down = min(warps, rows // 16)
    return gl.NVMMADistributedLayout([3, 0], [down, warps // down], [16, columns * down // warps, 16])


@gluon.jit
def zeros_of(ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Sums for rows of one piece of a head."""
    return gl.zeros([ROWS, COLUMNS], gl.float32, sums_layout(ROWS, COLUMNS, WARPS))


@gluon.jit
def zeros(ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Sums for rows of a head, one tensor a piece."""
    left = zeros_of(ROWS, COLUMNS[0], WARPS)
    if len(COLUMNS) == 1:
        return (left,)
    else:
        return (left, zeros_of(ROWS, COLUMNS[1], WARPS))


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


@gluon.jit
def copy(P, tile, o_row, m):
    """Start to copy the columns of a tile from rows that begin at o_row elements, by eight warps. Rows outside of the
    mask, if there is one, become zeros."""
    o = o_row[:, None] + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, COPY))[None, :]
    if m is None:
        async_copy.async_copy_global_to_shared(tile, P + o)
    else:
        async_copy.async_copy_global_to_shared(tile, P + o, mask=m[:, None])
