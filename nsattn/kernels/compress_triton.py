"""Compression of key and value blocks (Eq 7) in Triton: y_i = phi(x[i*d : i*d + l]) per KV head, any packing.

All kernels walk the *units* of `Plan.units`, d tokens each that begin a compressed row and lie in it and in those
before. The table lists those of all sequences, so a tile of units may span sequences and short ones fill it.

`linear` and the layers of `mlp` are one product, y_i = sum_j x[i*d + j] @ w[j] + b, with no unfolded copy:

* forward: one program per tile of units and of columns, loop over j < l and chunks of D;
* dx: tokens of equal residue c form a tile, dx[u*d + c] = sum_n dy[u - n] @ w[c + n*d]^T, loop over n, Dout;
* dw: one program per j and tile of w[j], loop over units; where those are few, cut along the units.

The second layer of `mlp` is the same product with l = d = 1 over compressed rows. `mean` and `gated` are
pooled in one pass over x with an online softmax (equal weights for `mean`), a tile of units with all of D on
chip; the backward recomputes the weights from the log-sum-exp. Parts of a sum that several programs make are
added up in a fixed order: no atomics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._tile import LOG2E, cdiv, dot, load_rows, lse_dtype, next_power_of_2, shared_memory, store_rows
from nsattn.plan import Plan

POOL_TILE = 2048  # elements of a pooling tile: the gated backward holds four, 16 registers of a thread each
DW_UNITS = 64  # units of one step of the dw loop
DW_PROGRAMS = 512  # cut the dw loop up to this many programs: four per SM of an H200, 32 MiB of partials
DW_STEPS = 8  # but leave at least this many steps to each


def compress(x: Tensor, params: tuple[Tensor, ...], plan: Plan, *, method: str) -> Tensor:
    """Eq 7: x [total_k, Hkv, D] -> y [total_cmp, Hkv, Dout]. See `nsattn.compress`."""
    if plan.total_cmp == 0:
        width = params[-1].shape[-1] if method in ("linear", "mlp") else x.shape[-1]
        return x.new_zeros(0, x.shape[1], width)
    units = plan.units
    if method == "linear":
        return _product(x, *params, units, plan.total_cmp)
    if method == "mlp":
        *_, w2, b2 = params
        act = F.silu(_hidden(x, params, units, plan)).to(x.dtype)
        return _product(act, w2[:, None], b2, _row_units(units), plan.total_cmp)
    return _pool(x, params, units, plan, x.dtype)[0]


def compress_bwd(
    dy: Tensor, x: Tensor, params: tuple[Tensor, ...], plan: Plan, *, method: str
) -> tuple[Tensor, ...]:
    """Gradients of `compress`: (dx, *dparams), each in the dtype of what it belongs to."""
    if plan.total_cmp == 0:
        return x.new_zeros(x.shape), *(torch.zeros_like(p) for p in params)
    units = plan.units
    if method == "linear":
        dx, dw = _product_bwd(dy, x, params[0], units, plan.config.cmp_stride, x.dtype)
        dparams = (dw, _sum_rows(dy, plan))
    elif method == "mlp":
        dx, *dparams = _mlp_bwd(dy, x, params, units, plan)
    else:
        dx, *dparams = _pool_bwd(dy, x, params, units, plan)
    return dx, *(grad.to(p.dtype) for grad, p in zip(dparams, params, strict=True))


def _hidden(x: Tensor, params: tuple[Tensor, ...], units: Tensor, plan: Plan) -> Tensor:
    """First layer of `mlp` before its activation, not rounded to x.dtype: few rows, and its rounding would add up in
    the bias gradients. sum_j pe[j] @ w1[j] is the same for every row: a bias."""
    pe, w1, b1, *_ = params
    acc = lse_dtype(x)
    bias = b1.to(acc) + torch.einsum("hji,hjif->hf", pe.to(acc), w1.to(x.dtype).to(acc))
    return _product(x, w1, bias, units, plan.total_cmp, acc)


def _mlp_bwd(
    dy: Tensor, x: Tensor, params: tuple[Tensor, ...], units: Tensor, plan: Plan
) -> tuple[Tensor, ...]:
    """(dx, dpe, dw1, db1, dw2, db2), all but dx in the accumulator's dtype. Recomputes the hidden layer."""
    pe, w1, _, w2, _ = params
    acc = lse_dtype(x)
    hidden = _hidden(x, params, units, plan)
    dact, dw2 = _product_bwd(dy, F.silu(hidden).to(x.dtype), w2[:, None], _row_units(units), 1, acc)
    dhidden = torch.ops.aten.silu_backward(dact, hidden)
    dx, dw1 = _product_bwd(dhidden.to(x.dtype), x, w1, units, plan.config.cmp_stride, x.dtype)
    db1 = _sum_rows(dhidden, plan)
    # pe[j] adds to every block: its gradient and its part of dw1 need only the sum over rows, which is db1.
    dpe = torch.einsum("hjif,hf->hji", w1.to(x.dtype).to(acc), db1)
    dw1.addcmul_(pe.to(acc)[..., None], db1[:, None, None])
    return dx, dpe, dw1, db1, dw2[:, 0], _sum_rows(dy, plan)


# Units


@triton.jit
def load_units(units, o_unit, num_units):
    """First token (int64), compressed row, first and end row of the sequence of each unit; unused: all 0."""
    m = o_unit < num_units
    token = tl.load(units + o_unit, mask=m, other=0).to(tl.int64)
    row = tl.load(units + num_units + o_unit, mask=m, other=0)
    begin = tl.load(units + 2 * num_units + o_unit, mask=m, other=0)
    end = tl.load(units + 3 * num_units + o_unit, mask=m, other=0)
    return token, row, begin, end


def _row_units(units: Tensor) -> Tensor:
    """Units for a product with l = d = 1 over compressed rows: the token of a unit is its compressed row."""
    return torch.cat([units[1:2], units[1:]])


# linear, mlp


@triton.jit(do_not_specialize=["num_units"])
def _product_fwd(
    x, w, b, y, units, num_units, stride_row, stride_head,
    HKV: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[u] = sum_j x[token_u + j] @ w[j] + b for BM units, BN columns, one KV head."""
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_h = tl.program_id(2).to(tl.int64)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (D + BK - 1) // BK
    token, row, _, end = load_units(units, tl.program_id(0) * BM + tl.arange(0, BM), num_units)
    m_row = row < end
    acc = tl.zeros([BM, BN], ACC)
    for step in range(L * CHUNKS):
        j = step // CHUNKS
        o_k = step % CHUNKS * BK + tl.arange(0, BK)
        # x [BM, BK] and w [BK, BN]
        b_x = load_rows(x + i_h * stride_head, token + j, o_k, stride_row, m_row, D)
        b_w = load_rows(w, (i_h * L + j) * D + o_k, o_n, DOUT, o_k < D, DOUT)
        acc += dot(b_x, b_w)
    acc += tl.load(b + i_h * DOUT + o_n, mask=o_n < DOUT, other=0.0).to(ACC)[None, :]
    store_rows(y + i_h * DOUT, acc, row.to(tl.int64), o_n, HKV * DOUT, m_row, DOUT)


@triton.jit(do_not_specialize=["num_units"])
def _product_dx(
    dy, w, dx, units, num_units,
    HKV: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, DOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dx[token_u + c] = sum_n dy[u - n] @ w[c + n*d]^T for BM units, one c, BN columns, one KV head."""
    i_c = tl.program_id(1) % STRIDE
    o_n = tl.program_id(1) // STRIDE * BN + tl.arange(0, BN)
    i_h = tl.program_id(2).to(tl.int64)
    ACC: tl.constexpr = tl.float64 if dy.dtype.element_ty == tl.float64 else tl.float32
    CHUNKS: tl.constexpr = (DOUT + BK - 1) // BK
    token, row, begin, end = load_units(units, tl.program_id(0) * BM + tl.arange(0, BM), num_units)
    acc = tl.zeros([BM, BN], ACC)
    for step in range(L // STRIDE * CHUNKS):
        i_n = step // CHUNKS
        o_k = step % CHUNKS * BK + tl.arange(0, BK)
        source = row - i_n
        m_source = (source >= begin) & (source < end)
        # dy [BM, BK] and w [BN, BK]
        b_dy = load_rows(dy + i_h * DOUT, source.to(tl.int64), o_k, HKV * DOUT, m_source, DOUT)
        b_w = load_rows(w, (i_h * L + i_c + i_n * STRIDE) * D + o_n, o_k, DOUT, o_n < D, DOUT)
        acc += dot(b_dy, tl.trans(b_w))
    # Units past the last block have no gradient; the last of them may end beyond the sequence.
    m_row = (begin < end) & (row - (L // STRIDE - 1) < end)
    store_rows(dx + i_h * D, acc, token + i_c, o_n, HKV * D, m_row, D)


@triton.jit(do_not_specialize=["num_units", "steps"])
def _product_dw(
    dy, x, dw, units, num_units, stride_row, stride_head, steps,
    HKV: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DOUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dw[split, j] = sum_u x[token_u + j]^T @ dy[u] over steps * BK units, for a tile [BM, BN] of w[j]."""
    j = tl.program_id(0) % L
    i_tile = tl.program_id(0) // L
    i_h, i_split = (tl.program_id(1) % HKV).to(tl.int64), tl.program_id(1) // HKV
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    COLUMNS: tl.constexpr = (DOUT + BN - 1) // BN
    o_m = i_tile // COLUMNS * BM + tl.arange(0, BM)
    o_n = i_tile % COLUMNS * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    for step in range(i_split * steps, (i_split + 1) * steps):
        token, row, _, end = load_units(units, step * BK + tl.arange(0, BK), num_units)
        # x [BK, BM] and dy [BK, BN]
        b_x = load_rows(x + i_h * stride_head, token + j, o_m, stride_row, row < end, D)
        b_dy = load_rows(dy + i_h * DOUT, row.to(tl.int64), o_n, HKV * DOUT, row < end, DOUT)
        acc += dot(tl.trans(b_x), b_dy)
    o_row = ((i_split * HKV + i_h) * L + j) * D + o_m
    store_rows(dw, acc, o_row, o_n, DOUT, o_m < D, DOUT)


def _product_knobs(x: Tensor, rows: int, cols: int, depth: int) -> dict[str, int]:
    """Output tile up to 128 x 128 with 8 warps: 64 accumulators a thread, 32 KiB a stage, two programs an SM.

    Types wider than 16 bits have no such tensor cores and twice the bytes: half the edge, two stages.
    """
    narrow = x.element_size() <= 2
    edge = 128 if narrow else 64
    bm, bn = min(edge, next_power_of_2(rows)), min(edge, next_power_of_2(cols))
    return {
        "BM": bm,
        "BN": bn,
        "BK": 64 if narrow and depth % 64 == 0 else 32,
        "num_warps": 8 if bm * bn > 8192 else 4,
        "num_stages": 3 if narrow else 2,
    }


def _product(
    x: Tensor, w: Tensor, b: Tensor, units: Tensor, rows: int, dtype: torch.dtype | None = None
) -> Tensor:
    """y [rows, Hkv, Dout] of x [*, Hkv, D], w [Hkv, l, D, Dout], b [Hkv, Dout]; rows without a unit are 0."""
    heads, l, d_in, d_out = w.shape
    y = x.new_zeros(rows, heads, d_out, dtype=dtype)
    knobs = _product_knobs(x, 128, d_out, d_in)
    grid = (cdiv(units.shape[1], knobs["BM"]), cdiv(d_out, knobs["BN"]), heads)
    _product_fwd[grid](
        x, w.to(x.dtype), b, y, units, units.shape[1], x.stride(0), x.stride(1),
        HKV=heads, L=l, D=d_in, DOUT=d_out, **knobs,
    )  # fmt: skip
    return y


def _product_bwd(
    dy: Tensor, x: Tensor, w: Tensor, units: Tensor, stride: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx in `dtype`, dw in the accumulator's."""
    heads, l, d_in, d_out = w.shape
    num_units = units.shape[1]
    acc = lse_dtype(x)
    dx = x.new_zeros(x.shape, dtype=dtype)
    knobs = _product_knobs(x, 128, d_in, d_out)
    grid = (cdiv(num_units, knobs["BM"]), stride * cdiv(d_in, knobs["BN"]), heads)
    _product_dx[grid](
        dy, w.to(x.dtype), dx, units, num_units, HKV=heads, L=l, STRIDE=stride, D=d_in, DOUT=d_out, **knobs
    )

    knobs = _product_knobs(x, d_in, d_out, DW_UNITS)
    # The units load ahead of the rows they point at: the compiler shares the stages out between the two.
    if shared_memory(x.device) > 64 * 1024:
        knobs["num_stages"] = 2 * knobs["num_stages"] - 1
    tiles = l * cdiv(d_in, knobs["BM"]) * cdiv(d_out, knobs["BN"])
    steps = cdiv(num_units, knobs["BK"])
    splits = max(1, min(DW_PROGRAMS // (tiles * heads), steps // DW_STEPS))
    dw = x.new_empty((splits, *w.shape), dtype=acc)
    _product_dw[(tiles, heads * splits)](
        dy, x, dw, units, num_units, x.stride(0), x.stride(1), cdiv(steps, splits),
        HKV=heads, L=l, D=d_in, DOUT=d_out, **knobs,
    )  # fmt: skip
    return dx, dw.sum(dim=0) if splits > 1 else dw[0]


def _sum_rows(dy: Tensor, plan: Plan) -> Tensor:
    """Gradient of a bias: dy summed over the rows that exist, in the accumulator's dtype."""
    real = torch.arange(dy.shape[0], device=dy.device) < plan.cu_cmp[-1]
    return torch.where(real[:, None, None], dy, 0).sum(dim=0, dtype=lse_dtype(dy))


# mean, gated


@triton.jit(do_not_specialize=["num_units"])
def _pool_fwd_kernel(
    x, w, pe, y, lse2, units, num_units, stride_row, stride_head,
    HKV: tl.constexpr, L: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[u] = sum_j p_j x[token_u + j], p = softmax_j(x . w + pe[j]) or 1/l, for BM units of one KV head."""
    o_d = tl.arange(0, BD)
    i_h = tl.program_id(1).to(tl.int64)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    token, row, _, end = load_units(units, tl.program_id(0) * BM + tl.arange(0, BM), num_units)
    m_row = row < end
    acc = tl.zeros([BM, BD], ACC)
    total = tl.zeros([BM], ACC)
    top = tl.full([BM], -1e38, ACC)  # finite, so that a position may be shut off with pe = -inf
    if GATED:
        b_w = tl.load(w + i_h * D + o_d, mask=o_d < D, other=0.0).to(ACC)
    for j in range(L):
        b_x = load_rows(x + i_h * stride_head, token + j, o_d, stride_row, m_row, D).to(ACC)  # [BM, BD]
        if GATED:
            s2 = (tl.sum(b_x * b_w[None, :], 1) + tl.load(pe + i_h * L + j).to(ACC)) * LOG2E
            top_new = tl.maximum(top, s2)
            shrink = tl.exp2(top - top_new)
            p = tl.exp2(s2 - top_new)
            acc = acc * shrink[:, None] + p[:, None] * b_x
            total = total * shrink + p
            top = top_new
        else:
            acc += b_x
    if GATED:
        acc = acc / total[:, None]
        tl.store(lse2 + row.to(tl.int64) * HKV + i_h, top + tl.log2(total), mask=m_row)
    else:
        acc = acc / L
    store_rows(y + i_h * D, acc, row.to(tl.int64), o_d, HKV * D, m_row, D)


@triton.jit(do_not_specialize=["num_units"])
def _pool_bwd_kernel(
    dy, x, w, pe, lse2, delta, dx, dw, dpe, units, num_units, stride_row, stride_head,
    HKV: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, GATED: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx of all tokens of BM units of one KV head, and this tile's part of dw and dpe.

    For token t = token_u + c and the rows r = u - n that hold it at j = c + n*d:
    p = exp(x_t . w + pe[j] - lse_r), ds = p (dy_r . x_t - delta_r), delta_r = dy_r . y_r,
    dx_t = sum_n p dy_r + ds w, dw = sum_t,n ds x_t, dpe[j] = sum_u ds.
    """
    i_tile, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    token, row, begin, end = load_units(units, tl.program_id(0) * BM + tl.arange(0, BM), num_units)
    m_row = (begin < end) & (row - (L // STRIDE - 1) < end)
    if GATED:
        b_w = tl.load(w + i_h * D + o_d, mask=o_d < D, other=0.0).to(ACC)
        b_dw = tl.zeros([BM, BD], ACC)
    for c in range(STRIDE):
        b_dx = tl.zeros([BM, BD], ACC)
        if GATED:
            b_x = load_rows(x + i_h * stride_head, token + c, o_d, stride_row, m_row, D).to(ACC)  # [BM, BD]
            score = tl.sum(b_x * b_w[None, :], 1)
            ds_sum = tl.zeros([BM], ACC)
        for n in range(L // STRIDE):
            source = (row - n).to(tl.int64)
            m_source = (source >= begin) & (source < end)
            b_dy = load_rows(dy + i_h * D, source, o_d, HKV * D, m_source, D).to(ACC)  # [BM, BD]
            if GATED:
                j = c + n * STRIDE
                b_lse2 = tl.load(lse2 + source * HKV + i_h, mask=m_source, other=0.0)
                b_delta = tl.load(delta + source * HKV + i_h, mask=m_source, other=0.0)
                s2 = (score + tl.load(pe + i_h * L + j).to(ACC)) * LOG2E
                p = tl.where(m_source, tl.exp2(s2 - b_lse2), 0.0)
                ds = p * (tl.sum(b_dy * b_x, 1) - b_delta)
                b_dx += p[:, None] * b_dy
                ds_sum += ds
                tl.store(dpe + (i_tile * HKV + i_h) * L + j, tl.sum(ds, 0))
            else:
                b_dx += b_dy
        if GATED:
            b_dx += ds_sum[:, None] * b_w[None, :]
            b_dw += ds_sum[:, None] * b_x
        else:
            b_dx = b_dx / L
        store_rows(dx + i_h * D, b_dx, token + c, o_d, HKV * D, m_row, D)
    if GATED:
        tl.store(dw + (i_tile * HKV + i_h) * D + o_d, tl.sum(b_dw, 0), mask=o_d < D)


def _pool_knobs(d: int) -> dict[str, int]:
    bd = next_power_of_2(d)
    return {"BM": max(1, POOL_TILE // bd), "BD": bd, "num_warps": 4}


def _pool(
    x: Tensor, params: tuple[Tensor, ...], units: Tensor, plan: Plan, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y in `dtype`, and with a gate the base-2 log-sum-exp of its logits [total_cmp, Hkv]. No params: the mean."""
    heads, d = x.shape[1:]
    y = x.new_zeros(plan.total_cmp, heads, d, dtype=dtype)
    lse2 = x.new_empty(plan.total_cmp, heads, dtype=lse_dtype(x))
    knobs = _pool_knobs(d)
    _pool_fwd_kernel[(cdiv(units.shape[1], knobs["BM"]), heads)](
        x, *(params or (x, x)), y, lse2, units, units.shape[1], x.stride(0), x.stride(1),
        HKV=heads, L=plan.config.cmp_block, D=d, GATED=bool(params), **knobs,
    )  # fmt: skip
    return y, lse2


def _pool_bwd(
    dy: Tensor, x: Tensor, params: tuple[Tensor, ...], units: Tensor, plan: Plan
) -> tuple[Tensor, ...]:
    """(dx, dw, dpe), the last two in the accumulator's dtype, or (dx,) without a gate."""
    heads, d = x.shape[1:]
    l, acc = plan.config.cmp_block, lse_dtype(x)
    dx = x.new_zeros(x.shape)
    knobs = _pool_knobs(d)
    tiles = cdiv(units.shape[1], knobs["BM"])
    gate, scratch = (x, x), (x, x, dx, x, x)
    if params:
        # Not rounded to x.dtype: ds is a small difference of two products, which the rounding of y would drown.
        y, lse2 = _pool(x, params, units, plan, acc)
        delta = (dy.to(acc) * y).sum(dim=-1)
        dw, dpe = x.new_empty(tiles, heads, d, dtype=acc), x.new_empty(tiles, heads, l, dtype=acc)
        gate, scratch = params, (lse2, delta, dx, dw, dpe)
    _pool_bwd_kernel[(tiles, heads)](
        dy, x, *gate, *scratch, units, units.shape[1], x.stride(0), x.stride(1),
        HKV=heads, L=l, STRIDE=plan.config.cmp_stride, D=d, GATED=bool(params), **knobs,
    )  # fmt: skip
    return (dx, dw.sum(dim=0), dpe.sum(dim=0)) if params else (dx,)
