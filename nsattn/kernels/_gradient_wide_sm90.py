"""Gradient of keys and values, and the dQ partials, for heads wider than 128: Hopper (sm_90), in Gluon.

As `_gradient_sm90`, for D and Dv up to 256, and in its terms. 64 keys of wide heads are too much for one warpgroup:
their dK and dV alone take its registers. So two share the keys, by columns: each holds half of the columns of dK and dV
and computes the scores of half of a tile's rows. Hence P^T and dS^T pass through shared memory, where both find what
the other made. The scores of the next tile are under way while dQ of this one is stored.

A block of 128 keys is done in two parts, by two programs.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsattn.kernels._gradient import KeyBlocks
from nsattn.kernels._gradient_sm90 import barrier, start_values, store_keys, tokens_of
from nsattn.kernels._lists import BlockLists
from nsattn.kernels._pieces_sm90 import (
    COPY,
    SHARED,
    WIDEST,
    allocate,
    allocate_stages,
    copy,
    pieces,
    sums_layout,
    zeros,
    zeros_of,
)
from nsattn.kernels._tile import LOG2E
from nsattn.plan import Plan

BK = gl.constexpr(64)  # keys of a program
BM = gl.constexpr(64)  # rows of a tile
WARPS = gl.constexpr(8)
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
SCORES = gl.constexpr(sums_layout(64, 64, 8))  # [keys, rows]


@gluon.jit
def _fetch(
    stage, q_tiles, do_tiles, Q, DO, token, row, num_rows, sq_t8, sq_h8, head0, num_heads,
    DV: gl.constexpr, G: gl.constexpr,
):
    """Start the copy of gathered rows of q and do. Rows past the end become zeros."""
    head = head0 + row % G
    m = row < num_rows
    for i in gl.static_range(len(q_tiles)):
        o_q = (token.to(gl.int64) * sq_t8 + head.to(gl.int64) * sq_h8) * 8
        copy(Q + WIDEST * i, q_tiles[i].index(stage), o_q, m)
    for i in gl.static_range(len(do_tiles)):
        o_do = (token * num_heads + head).to(gl.int64) * DV
        copy(DO + WIDEST * i, do_tiles[i].index(stage), o_do, m)
    async_copy.commit_group()


@gluon.jit
def _scores(tiles, row_tiles, stage, starts):
    """Start the product of keys and rows, over all their columns, from one value per row."""
    x = gl.broadcast(starts.load(gl.SliceLayout(0, SCORES))[None, :], gl.zeros([BK, BM], gl.float32, SCORES))[0]
    for i in gl.static_range(len(tiles)):
        x = warpgroup_mma(tiles[i], row_tiles[i].index(stage).permute((1, 0)), x, is_async=True)
    return x


@gluon.jit
def _add(tile, row_tiles, stage, acc):
    """Start to add the product of [keys, rows] with the columns of the rows."""
    left = warpgroup_mma(tile, row_tiles[0].index(stage), acc[0], is_async=True)
    if len(row_tiles) == 1:
        return (left,)
    else:
        return (left, warpgroup_mma(tile, row_tiles[1].index(stage), acc[1], is_async=True))


@gluon.jit
def _columns(k_tiles, i: gl.constexpr):
    """The first 128 columns of the keys, or those behind them."""
    if k_tiles[0].shape[1] > WIDEST:
        return k_tiles[0].slice(WIDEST * i, WIDEST, 1)
    else:
        return k_tiles[i]


@gluon.jit
def _product(tile, k_tile):
    """Start the product of [rows, keys] with columns of the keys."""
    return warpgroup_mma(tile, k_tile, zeros_of(BM, k_tile.shape[1], WARPS), use_acc=False, is_async=True)


@gluon.jit
def _wait(dv, dk, dq, UNDER_WAY: gl.constexpr):
    """Wait for sums, but not for what was started after them."""
    sums = warpgroup_mma_wait(UNDER_WAY, deps=dv + dk + (dq,))
    return sums[: len(dv)], sums[len(dv) : len(dv) + len(dk)], sums[len(dv) + len(dk)]


@gluon.jit
def _store_rows(p, stage, dq, left, D: gl.constexpr):
    """Store columns of dQ of the first `left` rows: staged, to be whole cache lines, and the first to leave L2."""
    stage.store(dq.to(stage.dtype))
    barrier()
    o_r = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, stage.shape[1], layout=gl.SliceLayout(0, COPY))
    gl.store(p + (o_r * D)[:, None] + o_d[None, :], stage.load(COPY), mask=(o_r < left)[:, None], cache_modifier=".cs")


@gluon.jit(do_not_specialize=["num_heads"])
def _gradient_wide_sm90_kernel(
    Q, K, V, DO, LSE, DELTA, TOKENS, ITEMS, CU_Q, CU_K, CU_KEYS, DQP, DK_OUT, DV_OUT, REST, SLICES,
    sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8, out_heads, num_heads, scale,
    D: gl.constexpr, DV: gl.constexpr, G: gl.constexpr, B: gl.constexpr, ADD: gl.constexpr,
):
    """dK, dV of 64 keys of a block over one item of its list, and the dQ partial of every row (Eq 11, 12):

        P^T = exp(scale K Q^T - lse)    dV += P^T dO    dS^T = scale P^T (V dO^T - delta)    dK += dS^T Q    dQ = dS K

    Strides ending in 8 count 8 elements: this tells the compiler that rows start at whole 16 bytes.
    """
    TYPE: gl.constexpr = Q.dtype.element_ty
    KEYS: gl.constexpr = pieces(D, 256)
    VALUES: gl.constexpr = pieces(DV, 256)
    UNDER_WAY: gl.constexpr = len(KEYS) + len(VALUES)  # products of the next scores
    # The right columns of dQ in turn: beside these sums there are no registers for them.
    IN_TURN: gl.constexpr = D > WIDEST and D + DV > 320
    LEFT: gl.constexpr = min(D, WIDEST)  # columns of dQ that are stored at a time
    SUBS: gl.constexpr = B // BK
    p_item = ITEMS + 6 * (gl.program_id(0) // SUBS)
    i_sub = gl.program_id(0) % SUBS
    count = gl.load(p_item + 4)
    if count == 0:
        return
    i_h, i_s, block = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
    first = gl.load(p_item + 3).to(gl.int64)
    key0 = block * B + i_sub * BK
    start_k = gl.load(CU_KEYS + i_s)
    len_keys = gl.load(CU_KEYS + i_s + 1) - start_k
    # from a query's row to its position
    shift = gl.load(CU_K + i_s + 1) - gl.load(CU_K + i_s) - gl.load(CU_Q + i_s + 1)
    num_rows = count * G
    head0 = i_h * G
    TOKENS += first

    k_tiles = allocate(TYPE, BK, KEYS)
    v_tiles = allocate(TYPE, BK, VALUES)
    q_tiles = allocate_stages(TYPE, 2, BM, KEYS)
    do_tiles = allocate_stages(TYPE, 2, BM, VALUES)
    p_tile = gl.allocate_shared_memory(TYPE, [BK, BM], SHARED)
    ds_tile = gl.allocate_shared_memory(TYPE, [BK, BM], SHARED)
    stage = gl.allocate_shared_memory(TYPE, [BM, LEFT], SHARED)
    starts = gl.allocate_shared_memory(gl.float32, [2 * BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    lse_starts = starts.slice(0, BM)
    delta_starts = starts.slice(BM, BM)

    o_k = key0 + gl.arange(0, BK, layout=gl.SliceLayout(1, COPY))
    m_k = o_k < len_keys
    key = (start_k + o_k).to(gl.int64)
    kv_head = i_h.to(gl.int64)
    for i in gl.static_range(len(k_tiles)):
        copy(K + WIDEST * i, k_tiles[i], (key * sk_t8 + kv_head * sk_h8) * 8, m_k)
    for i in gl.static_range(len(v_tiles)):
        copy(V + WIDEST * i, v_tiles[i], (key * sv_t8 + kv_head * sv_h8) * 8, m_k)
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    for j in gl.static_range(2):
        token = tokens_of(TOKENS, j * BM + row, count, G)
        _fetch(j, q_tiles, do_tiles, Q, DO, token, j * BM + row, num_rows, sq_t8, sq_h8, head0, num_heads, DV, G)
    token = tokens_of(TOKENS, 2 * BM + row, count, G)
    line = gl.arange(0, 2 * BM, layout=LINE)
    is_lse = line < BM
    line = line % BM
    start_token = tokens_of(TOKENS, line, count, G)
    starts.store(start_values(LSE, DELTA, start_token, line, num_rows, is_lse, head0, num_heads, scale, G))
    start_token = tokens_of(TOKENS, BM + line, count, G)
    start = start_values(LSE, DELTA, start_token, BM + line, num_rows, is_lse, head0, num_heads, scale, G)
    start_token = tokens_of(TOKENS, 2 * BM + line, count, G)
    first_token = tokens_of(TOKENS, 0, count, G)

    scale2 = scale * LOG2E
    dk = zeros(BK, KEYS, WARPS)
    dv = zeros(BK, VALUES, WARPS)
    p_dq = DQP + (first * (G * SUBS) + i_sub) * D
    async_copy.wait_group(1)
    fence_async_shared()
    s = _scores(k_tiles, q_tiles, 0, lse_starts)
    dp = _scores(v_tiles, do_tiles, 0, delta_starts)
    for i in range(gl.cdiv(num_rows, BM)):
        hides = first_token + shift < key0 + BK - 1  # tokens ascend: only the first tiles of a list hide late keys
        first_token = tokens_of(TOKENS, i * BM + BM, count, G)
        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
        s = s * scale2
        if hides:
            o_row = i * BM + gl.arange(0, BM, layout=gl.SliceLayout(0, SCORES))
            position = tokens_of(TOKENS, o_row, count, G) + shift
            o_key = key0 + gl.arange(0, BK, layout=gl.SliceLayout(1, SCORES))
            s = gl.where(o_key[:, None] <= position[None, :], s, -float("inf"))
        p = gl.exp2(s)
        p_tile.store(p.to(TYPE))
        ds_tile.store((p * (dp * scale)).to(TYPE))
        starts.store(start)
        fence_async_shared()
        dv = _add(p_tile, do_tiles, i % 2, dv)
        dk = _add(ds_tile, q_tiles, i % 2, dk)
        ds_rows = ds_tile.permute((1, 0))
        dq = _product(ds_rows, _columns(k_tiles, 0))
        if D > WIDEST and not IN_TURN:
            dq_right = _product(ds_rows, _columns(k_tiles, 1))
        line_next = (i + 2) * BM + line
        start = start_values(LSE, DELTA, start_token, line_next, num_rows, is_lse, head0, num_heads, scale, G)
        start_token = tokens_of(TOKENS, line_next + BM, count, G)
        async_copy.wait_group(0)
        fence_async_shared()
        s = _scores(k_tiles, q_tiles, (i + 1) % 2, lse_starts)
        dp = _scores(v_tiles, do_tiles, (i + 1) % 2, delta_starts)
        if D > WIDEST and not IN_TURN:
            dq_right = warpgroup_mma_wait(UNDER_WAY, deps=(dq_right,))
        dv, dk, dq = _wait(dv, dk, dq, UNDER_WAY)
        # A warp only knows that its own products have read the tiles: wait for the others before they are overwritten.
        barrier()
        row_next = (i + 2) * BM + row
        _fetch(i % 2, q_tiles, do_tiles, Q, DO, token, row_next, num_rows, sq_t8, sq_h8, head0, num_heads, DV, G)
        token = tokens_of(TOKENS, row_next + BM, count, G)
        _store_rows(p_dq, stage, dq, num_rows - i * BM, SUBS * D)
        if D > WIDEST:
            if IN_TURN:
                dq_right = warpgroup_mma_wait(0, deps=(_product(ds_rows, _columns(k_tiles, 1)),))
            barrier()
            _store_rows(p_dq + WIDEST, stage.slice(0, D - LEFT, 1), dq_right, num_rows - i * BM, SUBS * D)
        p_dq += BM * SUBS * D
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    async_copy.wait_group(0)

    slot = gl.load(p_item + 5)
    key, num_keys = start_k + key0, len_keys - key0
    p_slice = SLICES + (slot.to(gl.int64) * B + i_sub * BK) * (D + DV)
    for i in gl.static_range(len(dk)):
        p_rest = None
        if REST is not None:
            p_rest = REST + WIDEST * i
        store_keys(DK_OUT + i_h * D + WIDEST * i, p_rest, p_slice + WIDEST * i, dk[i], key, num_keys, out_heads * D,
                   slot, D + DV, ADD)
    for i in gl.static_range(len(dv)):
        p_rest = None
        if REST is not None:
            p_rest = REST + D + WIDEST * i
        store_keys(DV_OUT + i_h * DV + WIDEST * i, p_rest, p_slice + D + WIDEST * i, dv[i], key, num_keys,
                   out_heads * DV, slot, D + DV, ADD)


def gradient(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: BlockLists, plan: Plan,
    keys: KeyBlocks, scale: float, dq_partials: Tensor | None, out_k: Tensor, out_v: Tensor, rest: Tensor | None,
    slices: Tensor, add: bool,
) -> None:
    """`_gradient.gradient` on Hopper for selected blocks, with dQ partials, one `part` for each 64 keys of a block.
    Rows of q, k, v and do start at multiples of 16 bytes."""
    D, Dv, B = q.shape[2], v.shape[2], keys.size
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
    _gradient_wide_sm90_kernel[(lists.items.shape[0] * (B // BK.value),)](
        q, k, v, do, lse, delta, lists.tokens, lists.items, plan.cu_q, plan.cu_k, keys.cu, dq_partials, out_k, out_v,
        rest, slices, *strides, out_k.stride(0) // D, lse.stride(0), scale,
        D=D, DV=Dv, G=q.shape[1] // k.shape[1], B=B, ADD=add, num_warps=WARPS.value,
    )  # fmt: skip
