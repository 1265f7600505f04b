"""Attention to a range of keys: the kernels of attend_compressed (Eq 8) and attend_window (section 3.3.3).

One visibility rule serves both. Key i ends at position e(i) = i * STRIDE + SPAN - 1 of its sequence, and the
query at position t sees it iff t - window < e(i) <= t. Raw keys have STRIDE = SPAN = 1; compressed keys have
STRIDE = d, SPAN = l and an unlimited window. So a query sees a range of keys, a key is seen by a range of
queries, and a tile visits the range that any of its rows needs, cut into tiles that need the mask (the edges)
and tiles that do not.

Forward and dQ: one program per (query tile, query head); the query tile and its accumulators stay on chip,
keys and values stream by. dK and dV: one program per (key tile, KV head); the key tile and both accumulators
stay on chip, queries and output gradients of all heads of the group stream by. Nothing is shared between
programs: no atomics, and every result repeats bit for bit. Sums are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._tile import (
    LOG2E,
    UNLIMITED,
    bounds,
    dot,
    load_rows,
    lse_dtype,
    next_power_of_2,
    row_delta,
    shared_memory,
    softmax_finish,
    softmax_step,
    store_rows,
)
from nsattn.plan import TILE, Plan

TABLE_ROWS = tl.constexpr(TILE)


class Keys(NamedTuple):
    """The keys of a branch: where they lie in the packed rows, and who sees them."""

    cu: Tensor  # [n + 1] first key row of each sequence
    tiles: Tensor  # [*, 2] tile table of the key rows, see `Plan`
    cu_pairs: Tensor  # [n + 1] first pair of tiles of each sequence
    stride: int  # positions between the ends of neighbouring keys
    span: int  # positions one key covers
    window: int  # positions a query looks back, its own one counted


def compressed_keys(plan: Plan) -> Keys:
    """The keys of attend_compressed."""
    config = plan.config
    return Keys(
        plan.cu_cmp, plan.cmp_tiles, plan.cu_cmp_pairs, stride=config.cmp_stride, span=config.cmp_block,
        window=UNLIMITED,
    )  # fmt: skip


def window_keys(plan: Plan) -> Keys:
    """The keys of attend_window."""
    return Keys(plan.cu_k, plan.k_tiles, plan.cu_k_pairs, stride=1, span=1, window=plan.config.window)


class Shape(NamedTuple):
    """Launch knobs of a kernel: rows of the tile that stays and of those that stream by, warps, stages."""

    stay: int
    stream: int
    warps: int
    stages: int


def launch_shapes(q: Tensor, v: Tensor) -> tuple[Shape, Shape, Shape]:
    """Shapes of the forward, dQ and dK/dV kernels: for each the first that fits the shared memory.

    64 rows and one warp group fill the matrix unit of Hopper, and two or three such programs share a
    multiprocessor and hide each other's waits. What bends that is the register file: accumulators of 256
    columns need two warp groups, and dK with dV leave room for 32 queries at a time (64 spill inside the
    loop), beyond 128 columns only if they are 32 keys each.
    """
    BD, BDV = next_power_of_2(q.shape[-1]), next_power_of_2(v.shape[-1])
    if q.element_size() > 2:
        forward = dq = dkv = (Shape(32, 32, 8, 1), Shape(16, 16, 4, 1))
    else:
        forward = (
            (Shape(64, 64, 4, 3), Shape(64, 64, 4, 2), Shape(64, 32, 4, 1)) if max(BD, BDV) <= 128
            else (Shape(64, 32, 4, 2), Shape(64, 32, 4, 1)) if BDV <= 128
            else (Shape(64, 64, 8, 2), Shape(64, 32, 8, 1))
        )
        dq = (
            (Shape(64, 64, 4, 2), Shape(64, 32, 4, 1)) if max(BD, BDV) <= 128
            else (Shape(64, 32, 8, 2), Shape(64, 32, 8, 1), Shape(32, 16, 8, 1))
        )
        dkv = (
            (Shape(64, 64, 4, 2), Shape(64, 32, 4, 1)) if max(BD, BDV) <= 64
            else (Shape(64, 32, 4, 2), Shape(64, 32, 4, 1)) if max(BD, BDV) <= 128
            else (Shape(32, 64, 8, 2), Shape(32, 32, 8, 1), Shape(32, 16, 8, 1))
        )
    limit, size = shared_memory(q.device), q.element_size()

    def first_fit(shapes: tuple[Shape, ...], stays: int, streams: int, scores: int) -> Shape:
        for shape in shapes:
            tiles = shape.stay * stays + shape.stream * shape.stages * streams
            if size * (tiles + shape.stay * shape.stream * scores) + 2048 <= limit:
                break
        return shape

    both = BD + BDV
    return first_fit(forward, BD, both, 1), first_fit(dq, both, both, 1), first_fit(dkv, both, both, 2)


@triton.jit
def _visible(i, t, window, STRIDE: tl.constexpr, SPAN: tl.constexpr):
    """The visibility rule: key i ends at or before position t and inside its window."""
    end = i * STRIDE + SPAN - 1
    return (end <= t) & (end > t - window)


@triton.jit
def _ended(t, STRIDE: tl.constexpr, SPAN: tl.constexpr):
    """Number of keys of an endless sequence that end at or before position t."""
    return tl.maximum(t + 1 - SPAN + STRIDE, 0) // STRIDE


@triton.jit
def _cut(lo, hi, full_lo, full_hi, STEP: tl.constexpr):
    """Cut the range [lo, hi) into steps of STEP rows; those inside [full_lo, full_hi) need no mask.

    Returns steps before, first row and number of the steps without mask, steps before and after together.
    """
    before = tl.minimum(tl.cdiv(full_lo - lo, STEP), tl.cdiv(hi - lo, STEP))
    first = lo + before * STEP
    count = tl.maximum(full_hi - first, 0) // STEP
    after = tl.cdiv(tl.maximum(hi - first - count * STEP, 0), STEP)
    return before, first, count, before + after


@triton.jit
def _edge(j, lo, before, count, STEP: tl.constexpr):
    """First row of the j-th step that needs the mask."""
    return lo + (j + tl.where(j < before, 0, count)) * STEP


@triton.jit
def _tile_entry(TILES, i_t, ROWS: tl.constexpr):
    """Sequence (-1: none) and first row in it of the i_t-th tile of ROWS rows."""
    p = TILES + i_t // (TABLE_ROWS // ROWS) * 2
    return tl.load(p), tl.load(p + 1) + i_t % (TABLE_ROWS // ROWS) * ROWS


@triton.jit
def _clear_slack(P, CU, i_t, i_h, num_heads, num_seqs, total, value, ROWS: tl.constexpr, COLS: tl.constexpr,
                 BCOLS: tl.constexpr):
    """Write `value` to the i_t-th run of ROWS packed rows as far as they belong to no sequence.

    Tile tables have at least total / ROWS entries, so the programs of a launch reach all of these rows.
    """
    end = tl.load(CU + num_seqs)
    o_r = i_t.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if (i_t + 1).to(tl.int64) * ROWS > end:
        b = tl.full([ROWS, BCOLS], value, tl.float32)
        m_r = (o_r >= end) & (o_r < total)
        store_rows(P, b, o_r * num_heads + i_h, tl.arange(0, BCOLS), COLS, m_r, COLS)


@triton.jit
def _key_range(t0, t1, window, STRIDE: tl.constexpr, SPAN: tl.constexpr, BN: tl.constexpr):
    """Keys that queries at positions t0 .. t1 see: the first one, then their steps as `_cut` gives them."""
    lo, hi = _ended(t0 - window, STRIDE, SPAN), _ended(t1, STRIDE, SPAN)
    full_lo, full_hi = _ended(t1 - window, STRIDE, SPAN), _ended(t0, STRIDE, SPAN)
    before, first, count, edges = _cut(lo, hi, full_lo, full_hi, BN)
    return lo, before, first, count, edges


@triton.jit
def _fwd_step(
    m, l, acc, b_q, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, MASK: tl.constexpr,
):
    """Online softmax over BN keys from row i_n."""
    o_n = i_n + tl.arange(0, BN)
    # [BN, BD], [BN, BDV]
    b_k = load_rows(p_k, o_n.to(tl.int64), tl.arange(0, BD), sk_t, o_n < len_keys, D)
    b_v = load_rows(p_v, o_n.to(tl.int64), tl.arange(0, BDV), sv_t, o_n < len_keys, DVAL)
    s2 = dot(b_q, tl.trans(b_k)) * scale2
    if MASK:
        s2 = tl.where(_visible(o_n[None, :], t[:, None], window, STRIDE, SPAN), s2, -float("inf"))
    return softmax_step(m, l, acc, s2, b_v)


@triton.jit(do_not_specialize=["num_seqs", "total", "window"])
def _dense_fwd_kernel(
    Q, K, V, TILES, CU_Q, CU_K, CU_KEYS, O, LSE, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h,
    num_heads, num_seqs, total, window, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """Output and lse of BM queries of one head: online softmax over the keys they see (Eq 8; 3.3.3)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most compressed keys: they start first
    i_t, i_h = i // num_heads, i % num_heads
    _clear_slack(O, CU_Q, i_t, i_h, num_heads, num_seqs, total, 0.0, BM, DVAL, BDV)
    _clear_slack(LSE, CU_Q, i_t, i_h, num_heads, num_seqs, total, -float("inf"), BM, 1, 1)
    i_s, first_m = _tile_entry(TILES, i_t, BM)
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    o_m = first_m + tl.arange(0, BM)
    t = o_m + shift
    p_k = K + start_k * sk_t + (i_h // G).to(tl.int64) * sk_h
    p_v = V + start_k * sv_t + (i_h // G).to(tl.int64) * sv_h
    # [BM, BD]
    b_q = load_rows(Q + i_h.to(tl.int64) * sq_h, start_q + o_m, tl.arange(0, BD), sq_t, o_m < len_q, D)
    scale2 = tl.full([], scale, ACC) * LOG2E
    m = tl.full([BM], -float("inf"), ACC)
    l = tl.zeros([BM], ACC)
    acc = tl.zeros([BM, BDV], ACC)
    last_m = tl.minimum(first_m + BM, len_q) - 1
    lo, before, first, count, edges = _key_range(first_m + shift, last_m + shift, window, STRIDE, SPAN, BN)
    for j in range(edges):
        i_n = _edge(j, lo, before, count, BN)
        m, l, acc = _fwd_step(m, l, acc, b_q, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
                              D, DVAL, BD, BDV, BN, STRIDE, SPAN, True)
    for j in range(count):
        i_n = first + j * BN
        m, l, acc = _fwd_step(m, l, acc, b_q, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
                              D, DVAL, BD, BDV, BN, STRIDE, SPAN, False)
    o, lse = softmax_finish(m, l, acc)
    o_r = (start_q + o_m) * num_heads + i_h
    store_rows(O, o, o_r, tl.arange(0, BDV), DVAL, o_m < len_q, DVAL)
    tl.store(LSE + o_r, lse, mask=o_m < len_q)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, keys: Keys, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, Dv]` and natural lse `[T, Hq]` of attention to `keys`."""
    (T, Hq, D), (Hkv, Dv) = q.shape, v.shape[1:]
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=lse_dtype(q), device=q.device)
    if T == 0:
        return o, lse
    BM, BN, warps, stages = launch_shapes(q, v)[0]
    _dense_fwd_kernel[(_num_tiles(plan.q_tiles, BM) * Hq,)](
        q, k, v, plan.q_tiles, plan.cu_q, plan.cu_k, keys.cu, o, lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        Hq, plan.num_seqs, T, min(keys.window, UNLIMITED), scale,
        D=D, DVAL=Dv, BD=next_power_of_2(D), BDV=next_power_of_2(Dv), G=Hq // Hkv,
        STRIDE=keys.stride, SPAN=keys.span, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
    )
    return o, lse


def _num_tiles(tiles: Tensor, rows: int) -> int:
    """Tiles of `rows` rows that a tile table stands for."""
    return tiles.shape[0] * (TILE // rows)


@triton.jit
def _dq_step(
    acc, b_q, b_do, lse2, delta, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, MASK: tl.constexpr,
):
    """Add the part of BN keys from row i_n to dQ / scale."""
    o_n = i_n + tl.arange(0, BN)
    # [BN, BD], [BN, BDV]
    b_k = load_rows(p_k, o_n.to(tl.int64), tl.arange(0, BD), sk_t, o_n < len_keys, D)
    b_v = load_rows(p_v, o_n.to(tl.int64), tl.arange(0, BDV), sv_t, o_n < len_keys, DVAL)
    p = tl.exp2(dot(b_q, tl.trans(b_k)) * scale2 - lse2[:, None])
    ds = p * (dot(b_do, tl.trans(b_v)) - delta[:, None])
    if MASK:
        ds = tl.where(_visible(o_n[None, :], t[:, None], window, STRIDE, SPAN), ds, 0.0)
    return acc + dot(ds.to(b_k.dtype), b_k)


@triton.jit(do_not_specialize=["num_seqs", "total", "window"])
def _dense_dq_kernel(
    Q, K, V, DO, LSE, DELTA, TILES, CU_Q, CU_K, CU_KEYS, DQ, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h,
    num_heads, num_seqs, total, window, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """dQ of BM queries of a head: scale * sum of ds * k over the keys they see, ds = p * (do . v - delta)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i = tl.num_programs(0) - 1 - tl.program_id(0)
    i_t, i_h = i // num_heads, i % num_heads
    _clear_slack(DQ, CU_Q, i_t, i_h, num_heads, num_seqs, total, 0.0, BM, D, BD)
    i_s, first_m = _tile_entry(TILES, i_t, BM)
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    o_m = first_m + tl.arange(0, BM)
    m_m = o_m < len_q
    t = o_m + shift
    o_r = (start_q + o_m) * num_heads + i_h
    p_k = K + start_k * sk_t + (i_h // G).to(tl.int64) * sk_h
    p_v = V + start_k * sv_t + (i_h // G).to(tl.int64) * sv_h
    # [BM, BD], [BM, BDV], [BM], [BM]
    b_q = load_rows(Q + i_h.to(tl.int64) * sq_h, start_q + o_m, tl.arange(0, BD), sq_t, m_m, D)
    b_do = load_rows(DO, o_r, tl.arange(0, BDV), DVAL, m_m, DVAL)
    lse2 = tl.load(LSE + o_r, mask=m_m, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + o_r, mask=m_m, other=0.0)
    scale2 = tl.full([], scale, ACC) * LOG2E
    acc = tl.zeros([BM, BD], ACC)
    last_m = tl.minimum(first_m + BM, len_q) - 1
    lo, before, first, count, edges = _key_range(first_m + shift, last_m + shift, window, STRIDE, SPAN, BN)
    for j in range(edges):
        i_n = _edge(j, lo, before, count, BN)
        acc = _dq_step(acc, b_q, b_do, lse2, delta, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
                       D, DVAL, BD, BDV, BN, STRIDE, SPAN, True)
    for j in range(count):
        i_n = first + j * BN
        acc = _dq_step(acc, b_q, b_do, lse2, delta, p_k, p_v, t, i_n, len_keys, sk_t, sv_t, window, scale2,
                       D, DVAL, BD, BDV, BN, STRIDE, SPAN, False)
    store_rows(DQ, acc * scale, o_r, tl.arange(0, BD), D, m_m, D)


@triton.jit
def _dkv_step(
    dk, dv, b_k, b_v, p_q, DO, LSE, DELTA, i_n, i_m, i_h, start_q, len_q, shift, sq_t, num_heads,
    window, scale2, D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, MASK: tl.constexpr,
):
    """Add the part of BM queries of head i_h from row i_m to dK / scale and dV. Scores: [keys, queries]."""
    o_m = i_m + tl.arange(0, BM)
    m_m = o_m < len_q
    o_r = (start_q + o_m) * num_heads + i_h
    # [BM, BD], [BM, BDV], [BM], [BM]; rows that do not exist get lse = inf, so p = 0
    b_q = load_rows(p_q, o_m.to(tl.int64), tl.arange(0, BD), sq_t, m_m, D)
    b_do = load_rows(DO, o_r, tl.arange(0, BDV), DVAL, m_m, DVAL)
    lse2 = tl.load(LSE + o_r, mask=m_m, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + o_r, mask=m_m, other=0.0)
    p = tl.exp2(dot(b_k, tl.trans(b_q)) * scale2 - lse2[None, :])
    ds = p * (dot(b_v, tl.trans(b_do)) - delta[None, :])
    if MASK:
        o_n = i_n + tl.arange(0, BN)
        seen = _visible(o_n[:, None], (o_m + shift)[None, :], window, STRIDE, SPAN)
        p = tl.where(seen, p, 0.0)
        ds = tl.where(seen, ds, 0.0)
    dv += dot(p.to(b_do.dtype), b_do)
    dk += dot(ds.to(b_q.dtype), b_q)
    return dk, dv


@triton.jit(do_not_specialize=["num_seqs", "total", "window"])
def _dense_dkv_kernel(
    Q, K, V, DO, LSE, DELTA, TILES, CU_Q, CU_K, CU_KEYS, DK, DV, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h,
    num_kv_heads, num_seqs, total, window, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr,
    STRIDE: tl.constexpr, SPAN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """dK, dV of BN keys of one KV head: scale * sum of ds * q, sum of p * do, over the queries that see them.

    The G heads of the group alternate in one loop, so that the queries of a token are read together.
    """
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    # Early compressed keys have most queries: they start first.
    i_t, i_kv = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    _clear_slack(DK, CU_KEYS, i_t, i_kv, num_kv_heads, num_seqs, total, 0.0, BN, D, BD)
    _clear_slack(DV, CU_KEYS, i_t, i_kv, num_kv_heads, num_seqs, total, 0.0, BN, DVAL, BDV)
    i_s, i_n = _tile_entry(TILES, i_t, BN)
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    num_heads = num_kv_heads * G
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < len_keys
    # [BN, BD], [BN, BDV]
    b_k = load_rows(K + i_kv.to(tl.int64) * sk_h, start_k + o_n, tl.arange(0, BD), sk_t, m_n, D)
    b_v = load_rows(V + i_kv.to(tl.int64) * sv_h, start_k + o_n, tl.arange(0, BDV), sv_t, m_n, DVAL)
    scale2 = tl.full([], scale, ACC) * LOG2E
    dk = tl.zeros([BN, BD], ACC)
    dv = tl.zeros([BN, BDV], ACC)
    # A key is seen from the position where it ends until the window has passed it.
    end0 = i_n * STRIDE + SPAN - 1 - shift
    end1 = end0 + (tl.minimum(i_n + BN, len_keys) - 1 - i_n) * STRIDE
    lo = tl.minimum(tl.maximum(end0, 0), len_q)
    hi = tl.minimum(tl.maximum(end1 + window, lo), len_q)
    before, first, count, edges = _cut(lo, hi, tl.maximum(end1, lo), tl.minimum(end0 + window, len_q), BM)
    for j in range(edges * G):
        i_m, i_h = _edge(j // G, lo, before, count, BM), i_kv * G + j % G
        p_q = Q + start_q * sq_t + i_h.to(tl.int64) * sq_h
        dk, dv = _dkv_step(dk, dv, b_k, b_v, p_q, DO, LSE, DELTA, i_n, i_m, i_h, start_q, len_q, shift, sq_t,
                           num_heads, window, scale2, D, DVAL, BD, BDV, BM, BN, STRIDE, SPAN, True)
    for j in range(count * G):
        i_m, i_h = first + j // G * BM, i_kv * G + j % G
        p_q = Q + start_q * sq_t + i_h.to(tl.int64) * sq_h
        dk, dv = _dkv_step(dk, dv, b_k, b_v, p_q, DO, LSE, DELTA, i_n, i_m, i_h, start_q, len_q, shift, sq_t,
                           num_heads, window, scale2, D, DVAL, BD, BDV, BM, BN, STRIDE, SPAN, False)
    o_r = (start_k + o_n) * num_kv_heads + i_kv
    store_rows(DK, dk * scale, o_r, tl.arange(0, BD), D, m_n, D)
    store_rows(DV, dv, o_r, tl.arange(0, BDV), DVAL, m_n, DVAL)


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan,
    keys: Keys, *, scale: float, delta: Tensor | None, dq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k, v. See `attend_window_triton.attend_window_bwd`."""
    (T, Hq, D), (total, Hkv, Dv) = q.shape, v.shape
    total_dq = dq
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = row_delta(o, do, dlse) if delta is None else delta
    inputs = (q, k, v, do, lse, delta)
    cu = (plan.cu_q, plan.cu_k, keys.cu)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    window = min(keys.window, UNLIMITED)
    fixed = {"D": D, "DVAL": Dv, "BD": next_power_of_2(D), "BDV": next_power_of_2(Dv), "G": Hq // Hkv,
             "STRIDE": keys.stride, "SPAN": keys.span}
    _, shape_dq, shape_dkv = launch_shapes(q, v)
    if T:
        BM, BN, warps, stages = shape_dq
        _dense_dq_kernel[(_num_tiles(plan.q_tiles, BM) * Hq,)](
            *inputs, plan.q_tiles, *cu, dq, *strides, Hq, plan.num_seqs, T, window, scale,
            **fixed, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
        )
    if total:
        BN, BM, warps, stages = shape_dkv
        _dense_dkv_kernel[(_num_tiles(keys.tiles, BN) * Hkv,)](
            *inputs, keys.tiles, *cu, dk, dv, *strides, Hkv, plan.num_seqs, total, window, scale,
            **fixed, BM=BM, BN=BN, num_warps=warps, num_stages=stages,
        )
    return dq if total_dq is None else total_dq.add_(dq), dk, dv
