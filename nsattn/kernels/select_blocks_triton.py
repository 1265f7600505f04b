"""select_blocks: importance of every selection block and the exact best N of each row (Eq 9, 10).

With P = B/d and R = l/d, the importance of block j is the sum of p_cmp over compressed blocks j*P + o, o =
-(R-1) .. P-1, each counted as often as m - n = o for 0 <= m < P, 0 <= n < R, summed over the heads of a KV
group.

*scores*, one program per (tile of queries, KV head, tile of selection blocks): outer loop over the offsets o,
whose key rows it gathers with stride P, inner loop over the heads of the group. Probabilities are recomputed
from the known lse and added in registers (float32), so neither the heads nor the pooling of Eq 9 need a
reduction between threads. *select*, one program per row: the scores of a row stay in registers, the N best
are found by bisection on their bits.

Scores live in scratch `[rows of a chunk, Hkv, blocks]`; chunks of query tiles keep it within the workspace.
Limit: 16384 selection blocks per sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._select import keep_best
from nsattn.kernels._tile import LOG2E, bounds, dot, load_rows, next_power_of_2
from nsattn.plan import TILE, Plan

MAX_BLOCKS = 16384


def score_tile(D: int, max_blk: int, element_size: int) -> tuple[int, int, int]:
    """Selection blocks of a tile, warps, stages.

    In a study on the H200 64 queries x 128 keys with 4 warps was fastest. One stage: two programs on a
    multiprocessor hide each other's loads, and a second stage spills registers.
    """
    if element_size > 2:
        return 32, 4, 1
    return 128 if D <= 128 and max_blk > 64 else 64, 4, 1


@triton.jit
def _scores_kernel(
    Q, K, LSE, SCORE, Q_TILES, CU_Q, CU_K, CU_CMP, sq_t, sq_h, sk_t, sk_h,
    last_tile, num_kv_heads, num_cols, scale,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    B: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr,
):
    """Importance of BJ selection blocks for a tile of BT queries of one KV head (Eq 9, 10)."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = B // STRIDE
    R: tl.constexpr = L // STRIDE
    i_tile = tl.program_id(0) // (num_cols // BJ)
    i_j = (tl.program_id(0) % (num_cols // BJ)) * BJ
    i_h = tl.program_id(1).to(tl.int64)
    p_tile = Q_TILES + 2 * (last_tile - i_tile)  # last tiles of a sequence see most: start them first
    i_s, first = tl.load(p_tile), tl.load(p_tile + 1)
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    _, len_k = bounds(CU_K, i_s)
    start_c, len_c = bounds(CU_CMP, i_s)
    if i_j * B > tl.minimum(first + BT, len_q) - 1 + len_k - len_q:  # no query sees the first of these blocks
        return
    # The inner loop adds offsets of less than BT rows to these, in int32: int64 costs too many registers.
    p_q, p_lse = Q + (start_q + first) * sq_t, LSE + (start_q + first) * (num_kv_heads * G)
    o_r, o_d = tl.arange(0, BT), tl.arange(0, BD)
    o_j, o_t = i_j + tl.arange(0, BJ), first + o_r + len_k - len_q
    m_q = first + o_r < len_q
    acc = tl.zeros([BT, BJ], ACC)
    for o in range(1 - R, P):
        weight = tl.minimum(o + R, P) - tl.maximum(o, 0)
        o_i = o_j * P + o
        m_i = (o_i >= 0) & (o_i < len_c)
        b_k = load_rows(K + i_h * sk_h, start_c + o_i, o_d, sk_t, m_i, D)  # [BJ, BD]
        last_key = tl.where(m_i, o_i * STRIDE + (L - 1), 0x7FFFFFFF)
        visible = last_key[None, :] <= o_t[:, None]
        for g in range(G):
            head = i_h * G + g
            b_q = load_rows(p_q + head * sq_h, o_r, o_d, sq_t, m_q, D)  # [BT, BD]
            lse = tl.load(p_lse + head + o_r * (num_kv_heads * G), mask=m_q, other=-float("inf"))
            lse2 = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)  # a row that saw nothing adds 0
            s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
            acc += tl.where(visible, tl.exp2(s2 - lse2[:, None]), 0.0) * weight
    p_row = SCORE + ((i_tile.to(tl.int64) * BT + o_r) * num_kv_heads + i_h) * num_cols
    tl.store(p_row[:, None] + o_j[None, :], acc.to(tl.float32))


@triton.jit
def _select_kernel(
    SCORE, IDX, Q_TILES, CU_Q, CU_K, last_tile, num_kv_heads, num_cols,
    N: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):
    """The N best visible blocks of one (query, KV head), ascending: forced ones, then highest scores (Eq 10)."""
    i_row, i_h = tl.program_id(0), tl.program_id(1)
    p_tile = Q_TILES + 2 * (last_tile - i_row // BT)
    i_s, i_q = tl.load(p_tile), tl.load(p_tile + 1) + i_row % BT
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    _, len_k = bounds(CU_K, i_s)
    t = i_q + len_k - len_q
    if (i_q >= len_q) | (t < 0):
        return
    visible = tl.minimum(t // B + 1, num_cols)
    o_j = tl.arange(0, BC)
    forced = (o_j < visible) & ((o_j < INIT) | (o_j >= visible - LOCAL))
    free = N - tl.minimum(tl.minimum(INIT, visible) + tl.minimum(LOCAL, visible), visible)

    p_score = SCORE + (i_row.to(tl.int64) * num_kv_heads + i_h) * num_cols
    competes = (o_j < visible) & ~forced
    keep = keep_best(tl.load(p_score + o_j, mask=competes, other=0.0), competes, free) | forced
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(IDX + ((start_q + i_q) * num_kv_heads + i_h) * N + slot, o_j, mask=keep)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> Tensor:
    """Eq 9, 10. See `nsattn.select_blocks`."""
    config = plan.config
    (T, Hq, D), Hkv, N, B = q.shape, k_cmp.shape[1], config.num_selected, config.slc_block
    if plan.max_blk > MAX_BLOCKS:
        raise ValueError(
            f"select_blocks takes at most {MAX_BLOCKS} selection blocks per sequence, got {plan.max_blk}. "
            "Raise slc_block, or pass max_seqlen where sequences are shorter than the batch."
        )
    block_idx = torch.full((T, Hkv, N), -1, dtype=torch.int32, device=q.device)
    if T == 0 or plan.max_blk == 0:
        return block_idx
    BJ, warps, stages = score_tile(D, plan.max_blk, q.element_size())
    num_cols = triton.cdiv(plan.max_blk, BJ) * BJ
    BC = next_power_of_2(plan.max_blk, 64)
    num_tiles = plan.q_tiles.shape[0]
    chunk = min(num_tiles, max(1, workspace // (TILE * Hkv * num_cols * 4)))
    score = torch.empty(chunk * TILE, Hkv, num_cols, dtype=torch.float32, device=q.device)
    for end in range(num_tiles, 0, -chunk):
        tiles = min(chunk, end)
        _scores_kernel[(tiles * (num_cols // BJ), Hkv)](
            q, k_cmp, lse_cmp, score, plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_cmp,
            q.stride(0), q.stride(1), k_cmp.stride(0), k_cmp.stride(1), end - 1, Hkv, num_cols, scale,
            D=D, BD=next_power_of_2(D), G=Hq // Hkv, L=config.cmp_block, STRIDE=config.cmp_stride, B=B,
            BT=TILE, BJ=BJ, num_warps=warps, num_stages=stages,
        )
        # One warp holds up to 1024 scores, 32 a thread: counting then needs no barrier.
        _select_kernel[(tiles * TILE, Hkv)](
            score, block_idx, plan.q_tiles, plan.cu_q, plan.cu_k, end - 1, Hkv, num_cols,
            N=N, B=B, INIT=config.init_blocks, LOCAL=config.local_blocks, BT=TILE, BC=BC,
            num_warps=max(1, BC // 1024),
        )
    return block_idx
