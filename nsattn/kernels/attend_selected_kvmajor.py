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
    DENSE_BYTES,
    PAIR_BYTES,
    BlockLists,
    Chunk,
    Dense,
    chunks,
    gradient_tile,
    invert,
    load_item,
    selected_dkv,
)
from nsattn.kernels._tile import (
    LOG2E,
    bounds,
    dot,
    fill_slack,
    load_rows,
    lse_dtype,
    next_power_of_2,
    row_delta,
    softmax_finish,
    softmax_step,
    store_rows,
)
from nsattn.plan import TILE, Plan

ROWS_PER_ITEM = 1024  # 16 tiles a program: long enough to pay for loading K and V, short enough to balance
DENSE_SHARE = 0.4  # of a tile's tokens must have chosen a block that is worth reading whole
L2_ROWS = 32768  # query rows (tokens x G) of one token range: their 8 MB at D = 128 stay in the L2 cache


def merge_rows(width: int) -> int:
    """Rows that one program adds up: 1024 accumulators, and N gathers of a row in flight."""
    return max(1, 1024 // width)


def dense_tile(G: int) -> Dense:
    """Neighbouring tokens whose popular blocks are read once for all: 64 rows for one head, 128 for groups.

    Reading a block of 64 keys from L2 for 128 rows takes about as long as writing and reading 50 rows of partials.
    """
    tokens = max(2, 1 << ((128 // G).bit_length() - 1)) if G > 1 else TILE
    return Dense(tokens, max(1, round(DENSE_SHARE * tokens)) if G > 1 else 41)


def forward_bytes_per_row(G: int, N: int, Dv: int, q: Tensor) -> int:
    """Scratch of the forward for one token and KV head: lists, partials and their lse."""
    dense = dense_tile(G)
    pairs = N * (PAIR_BYTES + G * (Dv * q.element_size() + lse_dtype(q).itemsize))
    return pairs + -(-dense.entries(N) * DENSE_BYTES // dense.tokens)


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
def _dense_kernel(
    Q, K, V, DENSE_LISTS, DENSE_COUNTS, O, LSE, Q_TILES, CU_Q, CU_K,
    sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, tile0, row0, row1, head0, num_heads, num_dense_tiles, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, TOKENS: tl.constexpr, ENTRIES: tl.constexpr, TILE: tl.constexpr,
):
    """Output and lse of the heads of TOKENS neighbouring tokens over the dense blocks of their tile (Eq 11, 12)."""
    SUBS: tl.constexpr = TILE // TOKENS
    i_tile, i_sub, i_h = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS, tl.program_id(1)
    i_s = tl.load(Q_TILES + 2 * (tile0 + i_tile))
    if i_s < 0:
        return
    first = tl.load(Q_TILES + 2 * (tile0 + i_tile) + 1) + i_sub * TOKENS
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_k = bounds(CU_K, i_s)
    o_r = tl.arange(0, BM)
    o_t = o_r // G  # token of the tile; o_r % G is the head of the group
    token = start_q + first + o_t
    m_r = (o_t < TOKENS) & (first + o_t < len_q) & (token >= row0) & (token < row1)
    kv_head = (head0 + i_h).to(tl.int64)
    head = kv_head * G + o_r % G
    position = first + o_t + len_k - len_q
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    # [BM, BD]
    b_q = load_rows(Q, token * sq_t + head * sq_h, o_d, 1, m_r, D)
    ACC: tl.constexpr = LSE.dtype.element_ty
    m = tl.full([BM], -float("inf"), ACC)
    l = tl.zeros([BM], ACC)
    acc = tl.zeros([BM, BDV], ACC)
    i_dense = i_h.to(tl.int64) * num_dense_tiles + tl.program_id(0)
    for i in range(tl.load(DENSE_COUNTS + i_dense) * (B // BK)):
        p = DENSE_LISTS + (i_dense * ENTRIES + i // (B // BK)) * 2
        o_k = tl.load(p) * B + i % (B // BK) * BK + tl.arange(0, BK)
        chose = ((tl.load(p + 1) >> o_t) & 1) != 0
        # [BK, BD], [BK, BDV]
        b_k = load_rows(K + kv_head * sk_h, start_k + o_k, o_d, sk_t, o_k < len_k, D)
        b_v = load_rows(V + kv_head * sv_h, start_k + o_k, o_v, sv_t, o_k < len_k, DVAL)
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        s2 = tl.where(chose[:, None] & (o_k[None, :] <= position[:, None]), s2, -float("inf"))
        m, l, acc = softmax_step(m, l, acc, s2, b_v)
    b_o, lse = softmax_finish(m, l, acc)
    store_rows(O, b_o, token * num_heads + head, o_v, DVAL, m_r, DVAL)
    tl.store(LSE + token * num_heads + head, lse, mask=m_r)


@triton.jit
def _merge_kernel(
    OP, LSEP, INVERSE, O, LSE, row0, num_rows, heads, head0, num_heads,
    DVAL: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, N: tl.constexpr, UNROLL: tl.constexpr, BR: tl.constexpr,
):
    """Output and lse of BR rows (token, head): what O and LSE hold of the dense blocks and the N partials of the row,
    weighed by exp2(lse_i - lse) (Eq 11, 12)."""
    i_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_row = i_row < num_rows
    token, head = i_row // (heads * G), i_row % (heads * G)
    p_inv = INVERSE + (token * heads + head // G) * N
    out = (row0 + token) * num_heads + head0 * G + head
    o_v = tl.arange(0, BDV)
    m_dense = tl.load(LSE + out, mask=m_row, other=-float("inf")) * LOG2E
    m = m_dense
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            m = tl.maximum(m, tl.load(LSEP + place * G + head % G, mask=place >= 0, other=-float("inf")))
    m_ref = tl.where(m == -float("inf"), 0.0, m)
    l = tl.exp2(m_dense - m_ref)
    acc = l[:, None] * load_rows(O, out, o_v, DVAL, m_row, DVAL)
    for i in range(0, N, UNROLL):
        for j in tl.static_range(UNROLL):
            place = tl.load(p_inv + i + j, mask=m_row & (i + j < N), other=-1).to(tl.int64)
            partial = place * G + head % G
            w = tl.exp2(tl.load(LSEP + partial, mask=place >= 0, other=-float("inf")) - m_ref)
            l += w
            acc += w[:, None] * load_rows(OP, partial, o_v, DVAL, place >= 0, DVAL)
    b_o, lse = softmax_finish(m, l, acc)
    store_rows(O, b_o, out, o_v, DVAL, m_row, DVAL)
    tl.store(LSE + out, lse, mask=m_row)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, KV-block-major. See `nsattn.attend_selected`."""
    (T, Hq, D), (Hkv, Dv), N = q.shape, v.shape[1:], block_idx.shape[-1]
    G, B = Hq // Hkv, plan.config.slc_block
    kind = lse_dtype(q)
    o = torch.empty(T, Hq, Dv, dtype=q.dtype, device=q.device)
    lse = torch.empty(T, Hq, dtype=kind, device=q.device)
    fill_slack(o, lse, plan.cu_q)
    BD, BDV = next_power_of_2(D), next_power_of_2(Dv)
    BM, warps, stages = forward_tile(D, Dv, B, q.element_size())
    dense = dense_tile(G)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    sizes = {"D": D, "DVAL": Dv, "BD": BD, "BDV": BDV, "G": G, "B": B}
    for chunk in chunks(plan, Hkv, forward_bytes_per_row(G, N, Dv, q), workspace):
        lists = invert(
            block_idx, plan, chunk, pairs_per_item=-(-ROWS_PER_ITEM // G), span=max(1, L2_ROWS // G), dense=dense
        )
        rows = chunk.rows * chunk.heads * N * G
        partials = torch.empty(rows, Dv, dtype=q.dtype, device=q.device)
        partial_lse = torch.empty(rows, dtype=kind, device=q.device)
        _partial_kernel[(lists.items.shape[0],)](
            q, k, v, lists.tokens, lists.items, plan.cu_q, plan.cu_k, partials, partial_lse, *strides, chunk.head0,
            scale, **sizes, BM=BM, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        _dense_kernel[(lists.dense.shape[1], chunk.heads)](
            q, k, v, lists.dense, lists.dense_counts, o, lse, plan.q_tiles, plan.cu_q, plan.cu_k, *strides,
            chunk.row0 // TILE, chunk.row0, chunk.row1, chunk.head0, Hq, lists.dense.shape[1], scale,
            **sizes, BK=min(B, 64), BM=next_power_of_2(dense.tokens * G), TOKENS=dense.tokens,
            ENTRIES=dense.entries(N), TILE=TILE, num_warps=8 if dense.tokens * G > 64 else 4, num_stages=2,
        )  # fmt: skip
        num_rows = chunk.rows * chunk.heads * G
        BR = merge_rows(BDV)
        _merge_kernel[(triton.cdiv(num_rows, BR),)](
            partials, partial_lse, lists.inverse, o, lse, chunk.row0, num_rows, chunk.heads, chunk.head0, Hq,
            DVAL=Dv, BDV=BDV, G=G, N=N, UNROLL=min(N, 16), BR=BR, num_warps=2,
        )  # fmt: skip
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
