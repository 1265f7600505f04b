"""Gradient of keys and values, and the dQ partials, of one pass over the block lists: Hopper (sm_90), in Gluon.

Replaces the kernel of `_gradient` in the selected branch, for D and Dv of 64 or 128, blocks of 64 and 128 keys, and
16-bit inputs. A warpgroup holds 64 keys: their dK and dV stay in its registers, 128 of 255 for D = Dv = 128, while
tiles of 64 gathered rows pass through shared memory, two deep. What decides the speed is the rest of the registers:
nothing may spill. Therefore

- scores are computed as S^T = K Q^T, so that P^T and dS^T are register operands of dV and dK, and only dS^T, which dQ
  reads transposed, goes through shared memory;
- the accumulators of S^T and dP^T start at -lse / scale and -delta, which so need no registers later;
- token numbers and statistics are loaded a tile ahead of their use, the statistics by one thread per number;
- dQ of a 64-key block is multiplied 64 columns at a time;
- what the end of the program needs is loaded there once more.

At B = 64 two programs of one warpgroup share a multiprocessor; at B = 128 one program has two warpgroups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsattn.kernels._gradient import KeyBlocks, store_sum
from nsattn.kernels._lists import BlockLists
from nsattn.kernels._pieces_sm90 import SHARED, sums_layout
from nsattn.plan import Plan

LOG2E = gl.constexpr(1.4426950408889634)
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before triton 3.7


@gluon.jit
def tokens_of(TOKENS, row, count, G: gl.constexpr):
    """Query rows behind rows of an item, whose list begins at TOKENS; past the end that of the last pair."""
    return gl.load(TOKENS + gl.minimum(row // G, count - 1))


@gluon.jit
def _fetch(
    q_tile, do_tile, Q, DO, token, row, num_rows, sq_t8, sq_h8, head0, num_heads,
    D: gl.constexpr, DV: gl.constexpr, G: gl.constexpr, Q_PACKED: gl.constexpr, COPY: gl.constexpr,
):
    """Start the copy of 64 gathered rows of q and do to shared memory. Rows past the end become zeros.

    Q_PACKED: rows of q lie as those of do.
    """
    head = head0 + row % G
    o_v = gl.arange(0, DV, layout=gl.SliceLayout(0, COPY))[None, :]
    o_do = ((token * num_heads + head).to(gl.int64) * DV)[:, None] + o_v
    if Q_PACKED:
        o_q = o_do
    else:
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
        o_q = ((token.to(gl.int64) * sq_t8 + head.to(gl.int64) * sq_h8) * 8)[:, None] + o_d
    m = (row < num_rows)[:, None]
    async_copy.async_copy_global_to_shared(q_tile, Q + o_q, mask=m)
    async_copy.async_copy_global_to_shared(do_tile, DO + o_do, mask=m)
    async_copy.commit_group()


@gluon.jit
def start_values(LSE, DELTA, token, row, num_rows, is_lse, head0, num_heads, scale, G: gl.constexpr):
    """What S^T (where is_lse) and dP^T of a row start at: -lse / scale, -inf past the end so that p = 0; -delta."""
    o = token * num_heads + head0 + row % G
    m = row < num_rows
    lse = gl.load(LSE + o, mask=m & is_lse, other=float("inf"))
    delta = gl.load(DELTA + o, mask=m & (is_lse == 0), other=0.0)
    return gl.where(is_lse, -lse / scale, -delta)


@gluon.jit
def _spread(starts, zero, LAYOUT: gl.constexpr):
    """Accumulator [keys, rows] that starts at one value per row."""
    return gl.broadcast(starts.load(gl.SliceLayout(0, LAYOUT))[None, :], zero)[0]


@gluon.jit
def _store_rows(p, stage, left, D: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """Store the first `left` rows of a staged tile [64, COLS] to rows of D: whole cache lines, first to leave L2."""
    o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    o_d = gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(p + (o_r * D)[:, None] + o_d[None, :], stage.load(LAYOUT), mask=(o_r < left)[:, None],
             cache_modifier=".cs")


@gluon.jit
def store_keys(P, REST, SLICE, dk, key, num_keys, out_row, slot, WIDTH: gl.constexpr, ADD: gl.constexpr):
    """Store columns of dK or dV: to a slice, in rows of WIDTH, or to the keys' own rows."""
    LAYOUT: gl.constexpr = dk.type.layout
    o_b = gl.arange(0, dk.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    o_c = gl.arange(0, dk.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if slot >= 0:
        gl.store(SLICE + (o_b * WIDTH)[:, None] + o_c, dk)
    else:
        o_key = (key + o_b).to(gl.int64)
        p_rest = None
        if REST is not None:
            p_rest = REST + ((o_key * WIDTH)[:, None] + o_c)
        store_sum(P + ((o_key * out_row)[:, None] + o_c), p_rest, dk, (o_b < num_keys)[:, None], ADD)


@gluon.jit(do_not_specialize=["num_heads"])
def _gradient_sm90_kernel(
    Q, K, V, DO, LSE, DELTA, TOKENS, ITEMS, CU_Q, CU_K, CU_KEYS, DQP, DK_OUT, DV_OUT, REST, SLICES,
    sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8, out_heads, num_heads, scale,
    D: gl.constexpr, DV: gl.constexpr, G: gl.constexpr, B: gl.constexpr, Q_PACKED: gl.constexpr, ADD: gl.constexpr,
):
    """dK, dV of a block over one item of its list, and the dQ partial of every row (Eq 11, 12):

        P^T = exp(scale K Q^T - lse)    dV += P^T dO    dS^T = scale P^T (V dO^T - delta)    dK += dS^T Q    dQ = dS K

    Strides ending in 8 count 8 elements: this tells the compiler that rows start at whole 16 bytes.
    """
    W: gl.constexpr = B // 16
    COLS: gl.constexpr = min(16 * W, D)  # of dQ, multiplied at a time
    TYPE: gl.constexpr = Q.dtype.element_ty
    S_LAYOUT: gl.constexpr = sums_layout(B, 64, W)
    K_LAYOUT: gl.constexpr = sums_layout(B, D, W)
    V_LAYOUT: gl.constexpr = sums_layout(B, DV, W)
    P: gl.constexpr = gl.DotOperandLayout(0, V_LAYOUT, 2)
    DS: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    DQ_LAYOUT: gl.constexpr = sums_layout(64, COLS, W)
    # A warp copies 4 pieces of 128 bytes, or stores pieces as wide as the staged tile.
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [W, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])

    p_item = ITEMS + 6 * gl.program_id(0)
    count = gl.load(p_item + 4)
    if count == 0:
        return
    i_h, i_s, block = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
    first = gl.load(p_item + 3).to(gl.int64)
    start_k = gl.load(CU_KEYS + i_s)
    len_keys = gl.load(CU_KEYS + i_s + 1) - start_k
    # from a query's row to its position
    shift = gl.load(CU_K + i_s + 1) - gl.load(CU_K + i_s) - gl.load(CU_Q + i_s + 1)
    num_rows = count * G
    head0 = i_h * G
    TOKENS += first

    k_tile = gl.allocate_shared_memory(TYPE, [B, D], SHARED)
    v_tile = gl.allocate_shared_memory(TYPE, [B, DV], SHARED)
    q_tiles = gl.allocate_shared_memory(TYPE, [2, 64, D], SHARED)
    do_tiles = gl.allocate_shared_memory(TYPE, [2, 64, DV], SHARED)
    ds_tile = gl.allocate_shared_memory(TYPE, [B, 64], SHARED)
    stage = gl.allocate_shared_memory(TYPE, [64, COLS], SHARED)
    starts = gl.allocate_shared_memory(gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    lse_starts = starts.slice(0, 64)
    delta_starts = starts.slice(64, 64)

    o_k = block * B + gl.arange(0, B, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    o_v = gl.arange(0, DV, layout=gl.SliceLayout(0, COPY))[None, :]
    m_k = (o_k < len_keys)[:, None]
    key = (start_k + o_k).to(gl.int64)
    kv_head = i_h.to(gl.int64)
    async_copy.async_copy_global_to_shared(k_tile, K + ((key * sk_t8 + kv_head * sk_h8) * 8)[:, None] + o_d, mask=m_k)
    async_copy.async_copy_global_to_shared(v_tile, V + ((key * sv_t8 + kv_head * sv_h8) * 8)[:, None] + o_v, mask=m_k)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    for j in gl.static_range(2):
        token = tokens_of(TOKENS, j * 64 + row, count, G)
        _fetch(q_tiles.index(j), do_tiles.index(j), Q, DO, token, j * 64 + row, num_rows, sq_t8, sq_h8, head0,
               num_heads, D, DV, G, Q_PACKED, COPY)
    token = tokens_of(TOKENS, 128 + row, count, G)
    line = gl.arange(0, 128, layout=LINE)
    is_lse = line < 64
    line = line % 64
    start_token = tokens_of(TOKENS, line, count, G)
    start = start_values(LSE, DELTA, start_token, line, num_rows, is_lse, head0, num_heads, scale, G)
    starts.store(start)
    start_token = tokens_of(TOKENS, 64 + line, count, G)
    start = start_values(LSE, DELTA, start_token, 64 + line, num_rows, is_lse, head0, num_heads, scale, G)
    start_token = tokens_of(TOKENS, 128 + line, count, G)
    first_token = tokens_of(TOKENS, 0, count, G)

    scale2 = scale * LOG2E
    zero_s = gl.zeros([B, 64], gl.float32, S_LAYOUT)
    zero_dq = gl.zeros([64, COLS], gl.float32, DQ_LAYOUT)
    dk = gl.zeros([B, D], gl.float32, K_LAYOUT)
    dv = gl.zeros([B, DV], gl.float32, V_LAYOUT)
    p_dq = DQP + first * (G * D)
    for i in range(gl.cdiv(num_rows, 64)):
        q_tile = q_tiles.index(i % 2)
        do_tile = do_tiles.index(i % 2)
        async_copy.wait_group(1)
        fence_async_shared()
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), _spread(lse_starts, zero_s, S_LAYOUT), is_async=True)
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), _spread(delta_starts, zero_s, S_LAYOUT), is_async=True)
        hides = first_token + shift < block * B + B - 1  # tokens ascend: only the first tiles of a list hide late keys
        first_token = tokens_of(TOKENS, i * 64 + 64, count, G)
        s = warpgroup_mma_wait(1, deps=(s,))
        s = s * scale2
        if hides:
            o_row = i * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, S_LAYOUT))
            position = tokens_of(TOKENS, o_row, count, G) + shift
            o_key = block * B + gl.arange(0, B, layout=gl.SliceLayout(1, S_LAYOUT))
            s = gl.where(o_key[:, None] <= position[None, :], s, -float("inf"))
        p = gl.exp2(s)
        dv = warpgroup_mma(gl.convert_layout(p.to(TYPE), P), do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * (dp * scale)).to(TYPE)
        ds_tile.store(ds)
        dk = warpgroup_mma(gl.convert_layout(ds, DS), q_tile, dk, is_async=True)
        fence_async_shared()
        ds_rows = ds_tile.permute((1, 0))
        dq = warpgroup_mma(ds_rows, k_tile.slice(0, COLS, 1), zero_dq, use_acc=False, is_async=True)
        dv, dk, dq = warpgroup_mma_wait(0, deps=(dv, dk, dq))
        if COLS < D:
            dq_right = warpgroup_mma(ds_rows, k_tile.slice(COLS, COLS, 1), zero_dq, use_acc=False, is_async=True)
        stage.store(dq.to(TYPE))
        # A warp only knows that its own products have read the tile: wait for the others before it is overwritten.
        barrier()
        starts.store(start)
        row_next = (i + 2) * 64 + row
        _fetch(q_tile, do_tile, Q, DO, token, row_next, num_rows, sq_t8, sq_h8, head0, num_heads, D, DV, G,
               Q_PACKED, COPY)
        line_next = (i + 2) * 64 + line
        start = start_values(LSE, DELTA, start_token, line_next, num_rows, is_lse, head0, num_heads, scale, G)
        token = tokens_of(TOKENS, row_next + 64, count, G)
        start_token = tokens_of(TOKENS, line_next + 64, count, G)
        left = num_rows - i * 64
        _store_rows(p_dq, stage, left, D, COLS, STORE)
        if COLS < D:
            dq_right = warpgroup_mma_wait(0, deps=(dq_right,))
            stage.store(dq_right.to(TYPE))
            _store_rows(p_dq + COLS, stage, left, D, COLS, STORE)
        p_dq += 64 * D
    async_copy.wait_group(0)

    i_h, i_s, block, slot = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2), gl.load(p_item + 5)
    start_k = gl.load(CU_KEYS + i_s)
    key, num_keys = start_k + block * B, gl.load(CU_KEYS + i_s + 1) - start_k - block * B
    p_slice = SLICES + slot.to(gl.int64) * B * (D + DV)
    p_rest = None
    if REST is not None:
        p_rest = REST + D
    store_keys(DK_OUT + i_h * D, REST, p_slice, dk, key, num_keys, out_heads * D, slot, D + DV, ADD)
    store_keys(DV_OUT + i_h * DV, p_rest, p_slice + D, dv, key, num_keys, out_heads * DV, slot, D + DV, ADD)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, with rows that start at multiples of 16 bytes, as asynchronous copies need them."""
    rows = all(stride % 8 == 0 or size == 1 for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
    return x if rows and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def gradient(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: BlockLists, plan: Plan,
    keys: KeyBlocks, scale: float, dq_partials: Tensor | None, out_k: Tensor, out_v: Tensor, rest: Tensor | None,
    slices: Tensor, add: bool,
) -> None:
    """`_gradient.gradient` on Hopper for selected blocks, with dQ partials, `parts` 1. Rows of q, k, v and do start at
    multiples of 16 bytes."""
    D, Dv, B, num_heads = q.shape[2], v.shape[2], keys.size, lse.stride(0)
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
    _gradient_sm90_kernel[(lists.items.shape[0],)](
        q, k, v, do, lse, delta, lists.tokens, lists.items, plan.cu_q, plan.cu_k, keys.cu, dq_partials, out_k, out_v,
        rest, slices, *strides, out_k.stride(0) // D, num_heads, scale,
        D=D, DV=Dv, G=q.shape[1] // k.shape[1], B=B, Q_PACKED=D == Dv and q.stride()[:2] == (num_heads * D, D), ADD=add,
        num_warps=B // 16,
    )  # fmt: skip
