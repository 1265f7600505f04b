"""select_blocks: importance of every selection block and the exact best N of each row (Eq 9, 10).

With P = B/d and R = l/d, the importance of block j is the sum of p_cmp over compressed blocks j*P + o, o = -(R-1) ..
P-1, each counted as often as m - n = o for 0 <= m < P, 0 <= n < R, summed over the heads of a KV group. Probabilities
are recomputed from the known lse and added up in registers (float32); they are never stored.

*scores*, one program per (tile of queries, KV head, range of blocks): loop over tiles of keys. For R <= 2 the keys of a
tile are permuted so that a thread owns whole neighbouring blocks: it adds up the heads, then the keys of a block, in
its own registers, and only what the last key of a block gives to the next one crosses threads, twice a tile. For R > 2
there is an inner loop over the offsets o instead. Blocks at the end that are selected anyway need no score, and the
keys of the others lie in the past of the query: with `(local_blocks - 1) * B >= l - d - 1` no score needs a causal
mask.

*select*, one warp per row: a group is GS neighbouring blocks, with its maximum stored beside the scores. The K best
blocks lie in the K groups with the best maxima, so the search runs over the groups, then over the blocks of K of them:
exact, and it reads 2 * blocks / GS numbers where K = blocks / GS^2. Both searches are `_select.keep_best`.

Scores and maxima live in scratch `[KV heads of a chunk, rows of a chunk, blocks]`; chunks of KV heads, then of query
tiles keep it within the workspace. Limit: 16384 selection blocks per sequence.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.config import NSAConfig
from nsattn.kernels._select import keep_best
from nsattn.kernels._tile import LOG2E, bounds, cdiv, dot, load_rows, next_power_of_2
from nsattn.plan import TILE, Plan

MAX_BLOCKS = 16384
RANGE = 1024  # blocks of a program: 64K tokens at B = 64. Longer sequences would leave multiprocessors without work


class ScoreShape(NamedTuple):
    """Launch knobs of the score kernels."""

    keys: int  # of a tile
    warps: int
    stages: int


def score_shape(D: int, element_size: int) -> ScoreShape:
    """64 queries x 128 keys, 4 warps and two stages were fastest on the H200: q of the heads streams by, the next one
    under way while this one is multiplied. With q of all heads on chip and one stage, 32/8 heads take 4.16 ms, not
    3.79; eight warps 5.8, half the keys 5.5 (docs/log.md, 2026-11-23)."""
    if element_size > 2:
        return ScoreShape(32, 4, 1)
    return ScoreShape(64, 4, 1) if D > 128 else ScoreShape(128, 4, 2)


@triton.jit
def query_tile(Q_TILES, CU_Q, CU_K, CU_CMP, i_tile):
    """Sequence (-1: none) and first row in it; start and number of its query rows, number of keys, start and number of
    compressed rows."""
    p_tile = Q_TILES + 2 * i_tile
    i_s, first = tl.load(p_tile), tl.load(p_tile + 1)
    start_q, len_q = bounds(CU_Q, tl.maximum(i_s, 0))
    _, len_k = bounds(CU_K, tl.maximum(i_s, 0))
    start_c, len_c = bounds(CU_CMP, tl.maximum(i_s, 0))
    return i_s, first, start_q, len_q, len_k, start_c, len_c


@triton.jit
def last_candidate(o_m, len_q, len_k, B: tl.constexpr, LOCAL: tl.constexpr):
    """Last block that competes for the rows o_m of a sequence, negative if none does; the first one is INIT."""
    t = o_m + len_k - len_q
    return tl.where((o_m < len_q) & (t >= 0), t // B - LOCAL, -1)


@triton.jit
def range_of(
    i_range, first, len_q, len_k, num_cols,
    B: tl.constexpr, LOCAL: tl.constexpr, BM: tl.constexpr, RANGE: tl.constexpr,
):
    """Begin and end of the i-th RANGE blocks, as far as BM rows from `first` need scores; one of the first at least.

    A sequence longer than the plan's bound has more blocks than a row of the scratch: those are left out.
    """
    last = last_candidate(tl.minimum(first + BM, len_q) - 1, len_q, len_k, B, LOCAL)
    return i_range * RANGE, tl.minimum(tl.minimum((i_range + 1) * RANGE, num_cols), tl.maximum(last, 0) + 1)


@triton.jit
def load_lse2(p_lse, o_row):
    """Base-2 lse of some rows; inf for rows that saw nothing, whose probabilities are 0."""
    lse = tl.load(p_lse + o_row)
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)


@triton.jit
def _halves(x):
    """x [BM, 4, n] -> its even and odd entries along the last axis. Moves no data where a thread owns that axis."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, x.shape[2] // 2, 2]))
    return tl.reshape(even, [x.shape[0], 4, x.shape[2] // 2]), tl.reshape(odd, [x.shape[0], 4, x.shape[2] // 2])


@triton.jit
def _join_pairs(total, rest, last):
    """Sum of all keys, sum without the last one, and last key of runs twice as long. Infinities stay infinities."""
    even, odd = _halves(total)
    _, rest = _halves(rest)
    _, last = _halves(last)
    return even + odd, even + rest, last


@triton.jit
def key_of_column(o_c, NI: tl.constexpr):
    """Key of the tile that column o_c of an accumulator [rows, 16 * NI] stands for.

    Column 16i + 8h + 2j + e belongs to lane j of four and holds key 4 * NI * j + 4i + 2h + e: a lane owns neighbours.
    """
    return 4 * NI * (o_c // 2 % 4) + 4 * (o_c // 16) + 2 * (o_c // 8 % 2) + o_c % 2


@triton.jit
def pool(a, prev, o_j, BM: tl.constexpr, NI: tl.constexpr, P: tl.constexpr, R: tl.constexpr):
    """Importance [BM, 4, 4 * NI / P] from probabilities [BM, 16 * NI] of permuted keys (Eq 9, R <= 2), and the new
    carry.

    Columns are keys as `key_of_column` says. Weights of a block's keys are R, ..., R, 1; of the last key before it
    R - 1. prev [BM, 4]: entry 0 is the last key before the tile. o_j [1, 4]: 0 to 3. Gluon calls this too, so no
    tensor is made here, which would need a layout.
    """
    keys = tl.reshape(tl.permute(tl.reshape(a, [BM, NI, 2, 4, 2]), (0, 3, 1, 2, 4)), [BM, 4, 4 * NI])
    total, rest, last = keys, 0.0, keys
    if P >= 2:
        rest, last = _halves(keys)
        total = rest + last
    if P >= 4:
        total, rest, last = _join_pairs(total, rest, last)
    if P >= 8:
        total, rest, last = _join_pairs(total, rest, last)
    if P >= 16:
        total, rest, last = _join_pairs(total, rest, last)
    if P >= 32:
        total, rest, last = _join_pairs(total, rest, last)
    if R == 1:
        return total, prev
    # The last keys move on by one block: inside a thread by taking apart and joining, between threads by a gather.
    NB: tl.constexpr = 4 * NI // P
    x = last
    e1, e2, e3, e4, e5 = x, x, x, x, x
    if NB >= 2:
        e1, x = _halves(x)
    if NB >= 4:
        e2, x = _halves(x)
    if NB >= 8:
        e3, x = _halves(x)
    if NB >= 16:
        e4, x = _halves(x)
    if NB >= 32:
        e5, x = _halves(x)
    turned = tl.gather(tl.reshape(x, [BM, 4]), tl.broadcast_to((o_j + 3) % 4, [BM, 4]), 1)
    y = tl.reshape(tl.where(o_j == 0, prev, turned), [BM, 4, 1])
    if NB >= 32:
        y = tl.reshape(tl.join(y, e5), [BM, 4, NB // 16])
    if NB >= 16:
        y = tl.reshape(tl.join(y, e4), [BM, 4, NB // 8])
    if NB >= 8:
        y = tl.reshape(tl.join(y, e3), [BM, 4, NB // 4])
    if NB >= 4:
        y = tl.reshape(tl.join(y, e2), [BM, 4, NB // 2])
    if NB >= 2:
        y = tl.reshape(tl.join(y, e1), [BM, 4, NB])
    return total + rest + y, turned


@triton.jit
def _scores_kernel(
    Q, K, LSE, SCORE, GROUP_MAX, Q_TILES, CU_Q, CU_K, CU_CMP, sq_t, sq_h, sk_t, sk_h,
    last_tile, num_tiles, head0, num_kv_heads, num_cols, scale,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, RANGE: tl.constexpr,
):
    """Importance of up to RANGE selection blocks for BM queries of one KV head, and its group maxima; R <= 2."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = B // STRIDE
    R: tl.constexpr = L // STRIDE
    NI: tl.constexpr = BK // 16
    NB: tl.constexpr = 4 * NI // P  # blocks of a lane, and of a group
    MASK: tl.constexpr = (LOCAL - 1) * B < L - STRIDE - 1
    i_tile, i_range = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    i_h = tl.program_id(1)
    kv_head = (head0 + i_h).to(tl.int64)
    # The last tiles of a sequence see most: they start first.
    i_s, first, start_q, len_q, len_k, start_c, len_c = query_tile(Q_TILES, CU_Q, CU_K, CU_CMP, last_tile - i_tile)
    if i_s < 0:
        return
    o_m = first + tl.arange(0, BM)
    last_block = last_candidate(o_m, len_q, len_k, B, LOCAL)
    j_begin, j_end = range_of(i_range, first, len_q, len_k, num_cols, B, LOCAL, BM, RANGE)
    if j_begin >= j_end:
        return
    # Rows past the end repeat the last one, whose scores they do not keep.
    o_q = tl.minimum(tl.arange(0, BM), len_q - 1 - first)
    p_q = Q + (start_q + first) * sq_t + kv_head * G * sq_h
    p_lse = LSE + (start_q + first) * (num_kv_heads * G) + kv_head * G
    scale2 = tl.full([], scale, ACC) * LOG2E
    o_d, o_c = tl.arange(0, BD), tl.arange(0, BK)
    m_d = (o_d < D)[None, :]
    o_key = key_of_column(o_c, NI)
    o_b = NB * tl.arange(0, 4)[:, None] + tl.arange(0, NB)[None, :]  # block of a tile, by lane and place
    # Scalar bases and int32 offsets inside a tile: pointers of 64 bits would not leave room for two programs.
    i_row = (i_h.to(tl.int64) * num_tiles + i_tile) * BM
    p_score, p_max = SCORE + i_row * num_cols, GROUP_MAX + i_row * (num_cols // NB)
    o_row, o_lane = tl.arange(0, BM), tl.arange(0, 4)
    p_k = K + kv_head * sk_h + start_c * sk_t
    prev = tl.zeros([BM, 4], ACC)
    # A range starts with the tile before it, for the key that its first block shares with the one before.
    for j in range(tl.maximum(j_begin - 4 * NB, 0) if R > 1 else j_begin, j_end, 4 * NB):
        # [BK, BD]
        b_k = load_rows(p_k + tl.cast(j * P, tl.int64) * sk_t, o_key, o_d, sk_t, o_key < len_c - j * P, D)
        a = tl.zeros([BM, BK], ACC)
        for g in range(G):
            b_q = tl.load(p_q + g * sq_h + (o_q * sq_t)[:, None] + o_d[None, :], mask=m_d, other=0.0)
            lse2 = load_lse2(p_lse + g, o_q * (num_kv_heads * G))
            a += tl.exp2(dot(b_q, tl.trans(b_k)) * scale2 - lse2[:, None])
        if MASK:
            a = tl.where(((j * P + o_key) * STRIDE + L - 1)[None, :] <= (o_m + len_k - len_q)[:, None], a, 0.0)
        x, prev = pool(a, prev, o_lane[None, :], BM, NI, P, R)
        if j >= j_begin:
            competes = (j + o_b >= INIT)[None, :, :] & ((j + o_b)[None, :, :] <= last_block[:, None, None])
            x = tl.where(competes, x.to(tl.float32), -1.0)
            tl.store(p_score + j + (o_row * num_cols)[:, None, None] + o_b[None, :, :], x)
            o_max = (o_row * (num_cols // NB))[:, None] + o_lane[None, :]
            tl.store(p_max + j // NB + o_max, tl.max(x, 2))


@triton.jit
def _offset_scores_kernel(
    Q, K, LSE, SCORE, GROUP_MAX, Q_TILES, CU_Q, CU_K, CU_CMP, sq_t, sq_h, sk_t, sk_h,
    last_tile, num_tiles, head0, num_kv_heads, num_cols, scale,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, GS: tl.constexpr,
):
    """Importance of BJ selection blocks for BM queries of one KV head, and its maximum in each group, for any R.

    Outer loop over the offsets o, whose key rows it gathers with stride P, inner loop over the heads of the group.
    """
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    P: tl.constexpr = B // STRIDE
    R: tl.constexpr = L // STRIDE
    i_tile, i_j = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles * BJ
    i_h = tl.program_id(1)
    kv_head = (head0 + i_h).to(tl.int64)
    i_s, first, start_q, len_q, len_k, start_c, len_c = query_tile(Q_TILES, CU_Q, CU_K, CU_CMP, last_tile - i_tile)
    if i_s < 0:
        return
    o_m = first + tl.arange(0, BM)
    t = o_m + len_k - len_q
    last_block = last_candidate(o_m, len_q, len_k, B, LOCAL)
    if i_j > tl.max(last_block, 0):
        return
    o_q = tl.minimum(tl.arange(0, BM), len_q - 1 - first)
    p_q = Q + (start_q + first) * sq_t + kv_head * G * sq_h
    p_lse = LSE + (start_q + first) * (num_kv_heads * G) + kv_head * G
    scale2 = tl.full([], scale, ACC) * LOG2E
    o_d, o_j = tl.arange(0, BD), i_j + tl.arange(0, BJ)
    acc = tl.zeros([BM, BJ], ACC)
    for o in range(1 - R, P):
        weight = tl.minimum(o + R, P) - tl.maximum(o, 0)
        o_i = o_j * P + o
        m_i = (o_i >= 0) & (o_i < len_c)
        b_k = load_rows(K + kv_head * sk_h, start_c + o_i, o_d, sk_t, m_i, D)  # [BJ, BD]
        visible = m_i[None, :] & ((o_i * STRIDE + L - 1)[None, :] <= t[:, None])
        for g in range(G):
            b_q = load_rows(p_q + g * sq_h, o_q.to(tl.int64), o_d, sq_t, o_q >= 0, D)  # [BM, BD]
            lse2 = load_lse2(p_lse + g, o_q * (num_kv_heads * G))
            p = tl.exp2(dot(b_q, tl.trans(b_k)) * scale2 - lse2[:, None])
            acc += tl.where(visible, p, 0.0) * weight
    x = tl.where((o_j >= INIT)[None, :] & (o_j[None, :] <= last_block[:, None]), acc.to(tl.float32), -1.0)
    i_row = (i_h.to(tl.int64) * num_tiles + i_tile) * BM + tl.arange(0, BM)
    tl.store(SCORE + i_row[:, None] * num_cols + o_j[None, :], x)
    o_g = i_j // GS + tl.arange(0, BJ // GS)
    best = tl.max(tl.reshape(x, [BM, BJ // GS, GS]), 2)
    tl.store(GROUP_MAX + i_row[:, None] * (num_cols // GS) + o_g[None, :], best)


@triton.jit
def _select_kernel(
    SCORE, GROUP_MAX, IDX, Q_TILES, CU_Q, CU_K, CU_CMP, last_tile, num_tiles, head0, num_kv_heads, num_cols,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, BM: tl.constexpr,
    GS: tl.constexpr, BG: tl.constexpr, ROWS: tl.constexpr,
):
    """The N best visible blocks of ROWS queries of one KV head, ascending: forced ones, then highest scores (Eq 10)."""
    i_tile = tl.program_id(0) // (BM // ROWS)
    i_h = tl.program_id(1)
    i_s, first, start_q, len_q, len_k, _, _ = query_tile(Q_TILES, CU_Q, CU_K, CU_CMP, last_tile - i_tile)
    if i_s < 0:
        return
    o_n, o_g, o_i = tl.arange(0, BN), tl.arange(0, BG), tl.arange(0, GS)
    for i in range(ROWS):
        i_m = tl.program_id(0) % (BM // ROWS) * ROWS + i
        t = first + i_m + len_k - len_q
        if (first + i_m < len_q) & (t >= 0):
            p_idx = IDX + ((start_q + first + i_m) * num_kv_heads + head0 + i_h) * N
            visible = t // B + 1
            if visible <= N:
                tl.store(p_idx + o_n, tl.where(o_n < visible, o_n, -1), mask=o_n < N)
            else:
                free = N - INIT - LOCAL
                i_row = (i_h.to(tl.int64) * num_tiles + i_tile) * BM + i_m
                # Groups of the blocks INIT .. visible - LOCAL - 1, as far as there are scores
                end = tl.minimum(visible - LOCAL, num_cols)
                m_g = o_g * GS < end
                best = tl.load(GROUP_MAX + i_row * (num_cols // GS) + o_g, mask=m_g, other=-1.0)
                # -1 stands for a group without a block that competes; NaN is not less than 0.
                keep = keep_best(best, m_g & ((best >= 0) | (best != best)), free, BN)
                place = tl.cumsum(keep.to(tl.int32), 0) - 1
                tl.store(p_idx + place, o_g, mask=keep)  # the row of IDX serves to hand them over
                tl.debug_barrier()
                num_groups = tl.sum(keep.to(tl.int32), 0)
                group = tl.load(p_idx + o_n, mask=o_n < num_groups, other=0)
                tl.debug_barrier()
                # [BN, GS], ascending
                block = group[:, None] * GS + o_i[None, :]
                m_b = (o_n < num_groups)[:, None] & (block >= INIT) & (block < end)
                score = tl.load(SCORE + i_row * num_cols + block, mask=m_b, other=-1.0)
                score, block = tl.reshape(score, [BN * GS]), tl.reshape(block, [BN * GS])
                keep = keep_best(score, tl.reshape(m_b, [BN * GS]), free, BN)
                place = INIT + tl.cumsum(keep.to(tl.int32), 0) - 1
                tl.store(p_idx + place, block, mask=keep)
                forced = tl.where(o_n < INIT, o_n, visible - N + o_n)
                tl.store(p_idx + o_n, forced, mask=(o_n < N) & ((o_n < INIT) | (o_n >= N - LOCAL)))


class Chunk(NamedTuple):
    """Scratch, and the tiles of queries and the KV heads whose scores it holds at a time."""

    score: Tensor  # [rows, blocks]
    group_max: Tensor  # [rows, groups of blocks]
    last_tile: int
    num_tiles: int
    head0: int
    num_heads: int


class Scores(Protocol):
    """Launch of a score kernel: fills the scratch of a chunk."""

    def __call__(
        self, q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, chunk: Chunk, *, scale: float
    ) -> None: ...


def group_size(config: NSAConfig, keys: int) -> int:
    """Blocks of a group: those of a lane of the score kernel."""
    P = config.slc_block // config.cmp_stride
    return max(1, keys // 4 // P)


def in_lanes(config: NSAConfig, keys: int) -> bool:
    """Whether lanes can own whole blocks of a tile of keys, and a key counts for at most one block more."""
    P = config.slc_block // config.cmp_stride
    return config.cmp_block // config.cmp_stride <= 2 and P * group_size(config, keys) * 4 == keys


def step_size(config: NSAConfig, keys: int) -> int:
    """Blocks that a step of the score kernel writes."""
    GS = group_size(config, keys)
    return 4 * GS if in_lanes(config, keys) else max(64, GS)


def scores(q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, chunk: Chunk, *, scale: float) -> None:
    """Eq 9 for a chunk of queries and KV heads, on any GPU."""
    config = plan.config
    (_, Hq, D), Hkv, (_, num_cols) = q.shape, k_cmp.shape[1], chunk.score.shape
    keys, warps, stages = score_shape(D, q.element_size())
    GS = group_size(config, keys)
    args = (
        q, k_cmp, lse_cmp, chunk.score, chunk.group_max, plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_cmp, q.stride(0),
        q.stride(1), k_cmp.stride(0), k_cmp.stride(1), chunk.last_tile, chunk.num_tiles, chunk.head0, Hkv, num_cols,
        scale,
    )  # fmt: skip
    sizes = {
        "D": D, "BD": next_power_of_2(D), "G": Hq // Hkv, "L": config.cmp_block, "STRIDE": config.cmp_stride,
        "B": config.slc_block, "INIT": config.init_blocks, "LOCAL": config.local_blocks, "BM": TILE,
    }  # fmt: skip
    if in_lanes(config, keys):
        _scores_kernel[(chunk.num_tiles * cdiv(num_cols, RANGE), chunk.num_heads)](
            *args, **sizes, BK=keys, RANGE=RANGE, num_warps=warps, num_stages=stages
        )
    else:
        BJ = step_size(config, keys)
        _offset_scores_kernel[(chunk.num_tiles * (num_cols // BJ), chunk.num_heads)](
            *args, **sizes, BJ=BJ, GS=GS, num_warps=warps, num_stages=1
        )


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int, launch: Scores = scores
) -> Tensor:
    """Eq 9, 10 with the score kernel of `launch`. See `nsattn.select_blocks`."""
    config = plan.config
    (T, _, D), Hkv, N = q.shape, k_cmp.shape[1], config.num_selected
    if plan.max_blk > MAX_BLOCKS:
        raise ValueError(
            f"select_blocks takes at most {MAX_BLOCKS} selection blocks per sequence, got {plan.max_blk}. "
            "Raise slc_block, or pass max_seqlen where sequences are shorter than the batch."
        )
    block_idx = torch.full((T, Hkv, N), -1, dtype=torch.int32, device=q.device)
    if T == 0 or plan.max_blk == 0:
        return block_idx
    BN = next_power_of_2(N)
    keys = score_shape(D, q.element_size()).keys
    GS, BJ = group_size(config, keys), step_size(config, keys)
    num_cols = cdiv(plan.max_blk, BJ) * BJ
    BG = next_power_of_2(cdiv(num_cols, GS), max(64, BN))
    num_tiles = plan.q_tiles.shape[0]
    row_bytes = TILE * num_cols * (4 + 4 // GS)
    heads = max(1, min(Hkv, workspace // (row_bytes * num_tiles)))
    tiles = min(num_tiles, max(1, workspace // (row_bytes * heads)))
    score = torch.empty(heads * tiles * TILE, num_cols, dtype=torch.float32, device=q.device)
    group_max = torch.empty(heads * tiles * TILE, num_cols // GS, dtype=torch.float32, device=q.device)
    ROWS = 4
    for head0 in range(0, Hkv, heads):
        for end in range(num_tiles, 0, -tiles):
            chunk = Chunk(score, group_max, end - 1, min(tiles, end), head0, min(heads, Hkv - head0))
            launch(q, k_cmp, lse_cmp, plan, chunk, scale=scale)
            _select_kernel[(chunk.num_tiles * (TILE // ROWS), chunk.num_heads)](
                score, group_max, block_idx, plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_cmp, chunk.last_tile,
                chunk.num_tiles, head0, Hkv, num_cols, N=N, BN=BN, B=config.slc_block, INIT=config.init_blocks,
                LOCAL=config.local_blocks, BM=TILE, GS=GS, BG=BG, ROWS=ROWS, num_warps=1 if BG <= 1024 else 4,
            )  # fmt: skip
    return block_idx
