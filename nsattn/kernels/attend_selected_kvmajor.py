"""attend_selected, KV-block-major: the Flash Sparse Attention schedule (arXiv 2508.18224) of Eq 11, 12.

Outer loop over KV blocks, inner loop over the query rows that chose the block, so tiles are full for any group size.

Forward: *partial*, one program per item of a block's list, keeps K and V of the block on chip, gathers query rows and
writes, in list order, the normalised partial output (input type) and its base-2 lse (float32) of every row. *merge*,
one program per few rows, weighs the N partials of a row by exp2(lse_i - lse) and adds them in float32. There is no
statistics pass: partials carry their own lse, as in split-KV decoding.

Backward: `_lists.selected_dkv` accumulates dK and dV of a block on chip and writes dQ partials in list order; *sum*
adds the partials of a row. No atomics: everything repeats bit for bit.

Work is cut by KV heads, then by token rows, so that partials fit the workspace.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._lists import (
    LIST_BYTES,
    BlockLists,
    Chunk,
    chunks,
    gradient_tile,
    invert,
    load_item,
    selected_dkv,
)
from nsattn.kernels._tile import LN2, LOG2E, bounds, dot, load_rows, lse_dtype, next_power_of_2, row_delta
from nsattn.plan import Plan

ROWS_PER_ITEM = 1024  # 16 tiles a program: long enough to pay for loading K and V, short enough to balance
L2_ROWS = 32768  # query rows (tokens x G) of one token range: their 8 MB at D = 128 stay in the L2 cache


def merge_rows(width: int) -> int:
    """Rows that one program adds up: 1024 accumulators, and N gathers of a row in flight."""
    return max(1, 1024 // width)



def forward_tile(D: int, Dv: int, B: int, element_size: int) -> tuple[int, int, int]:
    """Rows of a tile, warps, stages. Small independent programs hide the latency of the gathers: 64 rows, 4 warps."""
    wide = max(next_power_of_2(D), next_power_of_2(Dv)) > 128
    if element_size > 2:
        return 32, 4, 1
    return 64, 8 if wide and B >= 64 else 4, 1


@triton.jit
def _partial_kernel(
    Q, K, V, TOKENS, ITEMS, CU_Q, CU_K, OP, LSEP, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, kv_head0, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    BM: tl.constexpr,
):
    """Partial outputs of the rows of one item: softmax over the visible keys of one block (Eq 11, 12)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    i_h, i_s, block, first, count, _ = load_item(ITEMS, tl.program_id(0))
    if count == 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_k = bounds(CU_K, i_s)
    o_k = block * B + tl.arange(0, B)
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    kv_head = (kv_head0 + i_h).to(tl.int64)
    b_k = load_rows(K + kv_head * sk_h, start_k + o_k, o_d, sk_t, o_k < len_k, D)
    b_v = load_rows(V + kv_head * sv_h, start_k + o_k, o_v, sv_t, o_k < len_k, DVAL)
    for r0 in range(0, count * G, BM):
        # The tail repeats the last row: it writes the same values again, which costs less than masks.
        row = tl.minimum(r0 + tl.arange(0, BM), count * G - 1)
        token = tl.load(TOKENS + first + row // G)
        head = (kv_head0 + i_h) * G + row % G
        # [BM, BD]
        b_q = load_rows(Q, token.to(tl.int64) * sq_t + head * sq_h, o_d, 1, row >= 0, D)
        position = token - start_q.to(tl.int32) + len_k - len_q
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        s2 = tl.where(o_k[None, :] <= position[:, None], s2, -float("inf"))
        m = tl.max(s2, 1)  # finite: a listed row sees the first key of the block
        p = tl.exp2(s2 - m[:, None])
        l = tl.sum(p, 1)
        o = dot(p.to(b_v.dtype), b_v).to(ACC) / l[:, None]
        out = first * G + row
        tl.store(OP + (out * DVAL)[:, None] + o_v[None, :], o.to(OP.dtype.element_ty), mask=(o_v < DVAL)[None, :])
        tl.store(LSEP + out, m + tl.log2(l))


@triton.jit
def _merge_kernel(
    OP, LSEP, INVERSE, O, LSE, row0, num_rows, heads, head0, num_heads,
    DVAL: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, BR: tl.constexpr,
):
    """Output and lse of BR rows (token, head): their N partials weighed by exp2(lse_i - lse) (Eq 11, 12)."""
    ACC: tl.constexpr = LSEP.dtype.element_ty
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < num_rows
    token, head = i_row // (heads * G), i_row % (heads * G)
    p_inv = INVERSE + (token * heads + head // G) * N
    o_v = tl.arange(0, BDV)
    m = tl.full([BR], -float("inf"), ACC)
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            m = tl.maximum(m, tl.load(LSEP + place * G + head % G, mask=place >= 0, other=-float("inf")))
    m_ref = tl.where(m == -float("inf"), 0.0, m)
    l = tl.zeros([BR], ACC)
    acc = tl.zeros([BR, BDV], ACC)
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            partial = place * G + head % G
            w = tl.exp2(tl.load(LSEP + partial, mask=place >= 0, other=-float("inf")) - m_ref)
            l += w
            acc += w[:, None] * tl.load(OP + (partial * DVAL)[:, None] + o_v[None, :],
                                        mask=(place >= 0)[:, None] & (o_v < DVAL)[None, :], other=0.0)
    some = l > 0
    l = tl.where(some, l, 1.0)
    out = (row0 + token) * num_heads + head0 * G + head
    tl.store(O + (out * DVAL)[:, None] + o_v[None, :], (acc / l[:, None]).to(O.dtype.element_ty),
             mask=m_row[:, None] & (o_v < DVAL)[None, :])
    tl.store(LSE + out, tl.where(some, (m + tl.log2(l)) * LN2, -float("inf")), mask=m_row)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, KV-block-major. See `nsattn.attend_selected`."""
    (T, Hq, D), (Hkv, Dv), N = q.shape, v.shape[1:], block_idx.shape[-1]
    G, B = Hq // Hkv, plan.config.slc_block
    kind = lse_dtype(q)
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=kind, device=q.device)
    BD, BDV = next_power_of_2(D), next_power_of_2(Dv)
    BM, warps, stages = forward_tile(D, Dv, B, q.element_size())
    per_pair = LIST_BYTES + G * (Dv * q.element_size() + kind.itemsize)
    for chunk in chunks(T, Hkv, N * per_pair, workspace):
        lists = invert(block_idx, plan, chunk, pairs_per_item=-(-ROWS_PER_ITEM // G), span=max(1, L2_ROWS // G))
        rows = chunk.rows * chunk.heads * N * G
        partials = torch.empty(rows, Dv, dtype=q.dtype, device=q.device)
        partial_lse = torch.empty(rows, dtype=kind, device=q.device)
        _partial_kernel[(lists.items.shape[0],)](
            q, k, v, lists.tokens, lists.items, plan.cu_q, plan.cu_k, partials, partial_lse,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), chunk.head0, scale,
            D=D, DVAL=Dv, BD=BD, BDV=BDV, G=G, B=B, BM=BM, num_warps=warps, num_stages=stages,
        )
        num_rows = chunk.rows * chunk.heads * G
        BR = merge_rows(BDV)
        _merge_kernel[(triton.cdiv(num_rows, BR),)](
            partials, partial_lse, lists.inverse, o, lse, chunk.row0, num_rows, chunk.heads, chunk.head0, Hq,
            DVAL=Dv, BDV=BDV, G=G, N=N, UNROLL=min(N, 16), BR=BR, num_warps=2,
        )
        del lists, partials, partial_lse  # before the next chunk allocates its own
    return o, lse


@triton.jit
def _sum_dq_kernel(
    DQP, INVERSE, DQ, row0, num_rows, heads, head0, num_heads,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, N: tl.constexpr, SUBS: tl.constexpr, UNROLL: tl.constexpr,
    BR: tl.constexpr,
):
    """dQ of BR rows (token, head): the sum of their partials, slot by slot, in float32."""
    ACC: tl.constexpr = tl.float64 if DQP.dtype.element_ty == tl.float64 else tl.float32
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < num_rows
    token, head = i_row // (heads * G), i_row % (heads * G)
    o_d = tl.arange(0, BD)
    acc = tl.zeros([BR, BD], ACC)
    p_inv = INVERSE + (token * heads + head // G) * N
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            m = (place >= 0)[:, None] & (o_d < D)[None, :]
            for i_sub in range(SUBS):
                p = DQP + (((place * G + head % G) * SUBS + i_sub) * D)[:, None] + o_d[None, :]
                acc += tl.load(p, mask=m, other=0.0).to(ACC)
    out = (row0 + token) * num_heads + head0 * G + head
    tl.store(DQ + (out * D)[:, None] + o_d[None, :], acc.to(DQ.dtype.element_ty),
             mask=m_row[:, None] & (o_d < D)[None, :])


def attend_selected_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block_idx: Tensor,
    plan: Plan, *, scale: float, workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_selected` with respect to q, k, v."""
    (T, Hq, D), N = q.shape, block_idx.shape[-1]
    G, B = Hq // k.shape[1], plan.config.slc_block
    BK = gradient_tile(q, v, B)[1]
    dq = torch.empty(T, Hq, D, dtype=q.dtype, device=q.device)

    BD = next_power_of_2(D)
    BR = merge_rows(BD)

    def sum_dq(chunk: Chunk, lists: BlockLists, partials: Tensor) -> None:
        num_rows = chunk.rows * chunk.heads * G
        _sum_dq_kernel[(triton.cdiv(num_rows, BR),)](
            partials, lists.inverse, dq, chunk.row0, num_rows, chunk.heads, chunk.head0, Hq,
            D=D, BD=BD, G=G, N=N, SUBS=B // BK, UNROLL=min(N, 16) if BK == B else 1, BR=BR, num_warps=2,
        )

    delta = row_delta(o, do, dlse)
    dk, dv = selected_dkv(
        do, q, k, v, lse, delta, block_idx, plan, scale=scale, workspace=workspace, take_dq=sum_dq
    )
    return dq, dk, dv
