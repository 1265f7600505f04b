"""combine: the gated sum of the three branches, Eq 5, o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win.

One program takes a few rows (token, head) and all their value columns. Forward reads three tensors and writes
one, backward reads four and writes three: both run at the speed of memory. Sums in float32 (float64 for
float64 inputs).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._tile import cdiv, load_rows, next_power_of_2, store_rows

VALUES = 4096  # of each tensor in one program: 32 per thread, enough loads in flight to fill the memory


@triton.jit
def _combine_kernel(
    O_CMP, O_SLC, O_WIN, GATES, O, num_rows, DVAL: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr
):
    """Output of BR rows (token, head): sum over the branches of gate * output (Eq 5)."""
    ACC: tl.constexpr = tl.float64 if O.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    o_v = tl.arange(0, BDV)
    p_g = GATES + o_r * 3
    # gates [BR], outputs [BR, BDV]
    g_cmp = tl.load(p_g, mask=m_r, other=0.0).to(ACC)[:, None]
    g_slc = tl.load(p_g + 1, mask=m_r, other=0.0).to(ACC)[:, None]
    g_win = tl.load(p_g + 2, mask=m_r, other=0.0).to(ACC)[:, None]
    b_o = g_cmp * load_rows(O_CMP, o_r, o_v, DVAL, m_r, DVAL).to(ACC)
    b_o += g_slc * load_rows(O_SLC, o_r, o_v, DVAL, m_r, DVAL).to(ACC)
    b_o += g_win * load_rows(O_WIN, o_r, o_v, DVAL, m_r, DVAL).to(ACC)
    store_rows(O, b_o, o_r, o_v, DVAL, m_r, DVAL)


def combine(o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor) -> Tensor:
    """Eq 5. See `nsattn.combine`."""
    o = torch.empty_like(o_cmp)
    grid, rows, shape = _launch(o)
    if rows:
        _combine_kernel[grid](o_cmp, o_slc, o_win, gates, o, rows, **shape, num_warps=4)
    return o


@triton.jit
def _branch_bwd(
    OB, DOB, GATES, DGATES, DELTA, b_do, o_r, m_r, BRANCH: tl.constexpr, DVAL: tl.constexpr, BDV: tl.constexpr
):
    """One branch b of BR rows: do_b = g_b * do, dg_b = do . o_b and, where asked for, delta_b = do_b . o_b."""
    o_v = tl.arange(0, BDV)
    b_o = load_rows(OB, o_r, o_v, DVAL, m_r, DVAL).to(b_do.dtype)
    b_g = tl.load(GATES + o_r * 3 + BRANCH, mask=m_r, other=0.0).to(b_do.dtype)
    b_dob = (b_g[:, None] * b_do).to(DOB.dtype.element_ty)
    store_rows(DOB, b_dob, o_r, o_v, DVAL, m_r, DVAL)
    tl.store(DGATES + o_r * 3 + BRANCH, tl.sum(b_o * b_do, 1).to(DGATES.dtype.element_ty), mask=m_r)
    if DELTA is not None:  # of the rounded do_b, since that is what meets the values
        tl.store(DELTA + o_r, tl.sum(b_o * b_dob.to(b_do.dtype), 1), mask=m_r)


@triton.jit
def _combine_bwd_kernel(
    DO, O_CMP, O_SLC, O_WIN, GATES, DO_CMP, DO_SLC, DO_WIN, DGATES, DELTA_CMP, DELTA_SLC, DELTA_WIN, num_rows,
    DVAL: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
):
    """Gradients of BR rows (token, head) with respect to the three outputs and gates (Eq 5)."""
    ACC: tl.constexpr = tl.float64 if DO.dtype.element_ty == tl.float64 else tl.float32
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    b_do = load_rows(DO, o_r, tl.arange(0, BDV), DVAL, m_r, DVAL).to(ACC)
    _branch_bwd(O_CMP, DO_CMP, GATES, DGATES, DELTA_CMP, b_do, o_r, m_r, 0, DVAL, BDV)
    _branch_bwd(O_SLC, DO_SLC, GATES, DGATES, DELTA_SLC, b_do, o_r, m_r, 1, DVAL, BDV)
    _branch_bwd(O_WIN, DO_WIN, GATES, DGATES, DELTA_WIN, b_do, o_r, m_r, 2, DVAL, BDV)


def combine_bwd(
    do: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor, gates: Tensor, deltas: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `combine` with respect to o_cmp, o_slc, o_win, gates.

    With `deltas`, `[3, T, Hq]`, it also fills in the `row_delta` of the three branches.
    """
    grads = tuple(torch.empty_like(x) for x in (o_cmp, o_slc, o_win, gates))
    grid, rows, shape = _launch(do)
    if rows:
        deltas = (None,) * 3 if deltas is None else deltas
        _combine_bwd_kernel[grid](do, o_cmp, o_slc, o_win, gates, *grads, *deltas, rows, **shape, num_warps=4)
    return grads


def _launch(o: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, number of rows (token, head) and tile sizes for outputs `[T, Hq, Dv]`."""
    T, Hq, Dv = o.shape
    BDV = next_power_of_2(Dv)
    BR = VALUES // BDV
    return (cdiv(T * Hq, BR),), T * Hq, {"DVAL": Dv, "BDV": BDV, "BR": BR}
