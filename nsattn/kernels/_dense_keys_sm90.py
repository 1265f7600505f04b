"""dK and dV of the dense branches, Eq 8 and section 3.3.3, for Hopper GPUs in Gluon: D = Dv = 128, 16-bit inputs.

A program owns 128 keys, two warpgroups 64 each, whose dK and dV stay in registers, 128 of 255. The query rows that see
the keys are a run of neighbours (`_runs_sm90`): tiles of 64 pass through shared memory, four deep, and both warpgroups
read them; the first one copies q and lse, the second do and delta. As in `_gradient_sm90`, scores are S^T = K Q^T, so
that P^T and dS^T are register operands, and their accumulators start at -lse / scale and -delta.

No warpgroup waits for the products of a step before it has issued the first ones of the next: the tensor core always
has something to do while exponentials are taken, of its own warpgroup or of the other.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from nsattn.kernels._dense_sm90 import BM, COPY, SHARED, D, barrier, release, wait_for
from nsattn.kernels._gradient import UNLIMITED, KeyBlocks, store_sum
from nsattn.kernels._lists import BlockLists
from nsattn.kernels._tile import LOG2E
from nsattn.plan import Plan

KEYS = 128  # of a program
STAGES = gl.constexpr(4)
AHEAD = gl.constexpr(2)  # steps between the copy of a tile and its use; one more is left for the other warpgroup's lag
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
GRADIENT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of keys and of values
OPERAND = gl.constexpr(gl.DotOperandLayout(0, GRADIENT, 2))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _fetch(n, tiles, stats, full, empty, P, STAT, num_rows, stride_t8, stride_h8, num_heads, G: gl.constexpr):
    """Start to copy 64 rows of step n and their statistics, once everybody has used what the tiles held.

    Rows past the end become zeros: they give p = 1, but nothing to multiply it with.
    """
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
    r = n * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o = ((r // G).to(gl.int64) * stride_t8 + (r % G).to(gl.int64) * stride_h8) * 8
    m = (r < num_rows)[:, None]
    async_copy.async_copy_global_to_shared(tiles.index(stage), P + (o[:, None] + o_d[None, :]), mask=m)
    r = n * BM + gl.arange(0, BM, layout=LINE)
    async_copy.async_copy_global_to_shared(stats.index(stage), STAT + (r // G * num_heads + r % G), mask=r < num_rows)
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _spread(stats, factor):
    """Accumulator [keys, rows] that starts at factor * the statistic of each row."""
    x = stats.load(gl.SliceLayout(0, SCORES)) * factor
    return gl.broadcast(x[None, :], gl.zeros([BM, BM], gl.float32, SCORES))[0]


@gluon.jit
def _hide(s, t, j, G: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr):
    """-inf for the scores of step j where a row does not see a key.

    Row 8i + 2l + e of the step belongs to lane l of four. Seen as [keys, i, l, e], what varies inside a thread is a
    constant, and no registers hold row numbers through the loop.
    """
    x = s.reshape([BM, BM // 8, 4, 2])
    LAYOUT: gl.constexpr = x.type.layout
    i = gl.arange(0, BM // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    l = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    key = gl.arange(0, BM, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    row = (j * BM + 2 * l)[None, None, :, None] + 8 * i[None, :, None, None] + e[None, None, None, :]
    age = row // G + (t - key * STRIDE)[:, None, None, None]  # of a key, when the row looks back at it
    visible = age >= 0
    if WINDOW is not None:
        visible &= age < WINDOW
    return gl.convert_layout(gl.where(visible, x, -float("inf")).reshape([BM, BM]), s.type.layout)


@gluon.jit
def _keys(
    q_tiles, do_tiles, lses, deltas, q_full, do_full, empty, k_tile, v_tile, P, STAT, stride_t8, stride_h8, num_heads,
    count, t, scale, p_dk, p_dv, p_rest, p_slice, cut, keys_left, out_stride,
    WARPGROUP: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr, ADD: gl.constexpr,
):
    """dK and dV of 64 keys over an item of `count` tokens.

    Args:
        P, STAT: first of the rows, and of their statistics, that this warpgroup copies.
        t: position of the first token, counted from that at which the first of the keys ends.
        p_dk, p_dv, p_rest, p_slice: where the results go, to p_slice if the list is `cut`. p_rest may be None.
        keys_left: how many keys the sequence has from the first one.
    """
    if WARPGROUP == 0:
        tiles, stats, full = q_tiles, lses, q_full
    else:
        tiles, stats, full = do_tiles, deltas, do_full
    TYPE: gl.constexpr = k_tile.dtype
    LAST: gl.constexpr = (BM - 1) * STRIDE  # where the last key ends
    num_rows = count * G
    steps = gl.cdiv(num_rows, BM)
    # Of all steps, those whose rows see some of these 64 keys.
    begin, end = gl.minimum(gl.maximum(-t, 0) * G // BM, steps), steps
    if WINDOW is not None:
        end = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(LAST + WINDOW - t, 0) * G, BM), steps), begin)
    for n in gl.static_range(AHEAD):
        if n < steps:
            _fetch(n, tiles, stats, full, empty, P, STAT, num_rows, stride_t8, stride_h8, num_heads, G)
    for j in range(begin):
        if j + AHEAD < steps:
            _fetch(j + AHEAD, tiles, stats, full, empty, P, STAT, num_rows, stride_t8, stride_h8, num_heads, G)
        release(j, empty, STAGES)

    scale2, minus = scale * LOG2E, -1.0 / scale
    dk = warpgroup_mma_init(gl.zeros([BM, D], gl.float32, GRADIENT))
    dv = warpgroup_mma_init(gl.zeros([BM, D], gl.float32, GRADIENT))
    for j in range(begin, end):
        stage = j % STAGES
        q_tile, do_tile = q_tiles.index(stage), do_tiles.index(stage)
        wait_for(j, q_full, STAGES)
        wait_for(j, do_full, STAGES)
        fence_async_shared()
        dv = warpgroup_mma_wait(1, deps=(dv,))  # its operand is free now; `tests/products.py` checks that
        s = _spread(lses.index(stage), minus)
        dp = _spread(deltas.index(stage), -1.0)
        s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), s, is_async=True)
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), dp, is_async=True)
        s, dk = warpgroup_mma_wait(1, deps=(s, dk))  # and so the products of the last step
        if j > begin:
            release(j - 1, empty, STAGES)
        if j + AHEAD < steps:
            _fetch(j + AHEAD, tiles, stats, full, empty, P, STAT, num_rows, stride_t8, stride_h8, num_heads, G)
        s = s * scale2
        # Rows ascend: only the first steps hide late keys, only the last ones those that a window left.
        hides = t + j * BM // G < LAST
        if WINDOW is not None:
            hides |= t + gl.minimum((j * BM + BM - 1) // G, count - 1) >= WINDOW
        if hides:
            s = _hide(s, t, j, G, STRIDE, WINDOW)
        p = gl.exp2(s)
        dv = warpgroup_mma(gl.convert_layout(p.to(TYPE), OPERAND), do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = (p * dp).to(TYPE)
        dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q_tile, dk, is_async=True)
    if end > begin:
        # Where the zeros of no step at all reach the wait too, the assembler may let every product wait for itself.
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        dk, dv = warpgroup_mma_init(dk), warpgroup_mma_init(dv)
        release(end - 1, empty, STAGES)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    dk *= scale
    for j in range(end, steps):
        if j + AHEAD < steps:
            _fetch(j + AHEAD, tiles, stats, full, empty, P, STAT, num_rows, stride_t8, stride_h8, num_heads, G)
        release(j, empty, STAGES)

    o_b = gl.arange(0, BM, layout=gl.SliceLayout(1, GRADIENT))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, GRADIENT))[None, :]
    if cut:
        p = p_slice + (o_b * (2 * D))[:, None] + o_d
        gl.store(p, dk)
        gl.store(p + D, dv)
    else:
        m_b = (o_b < keys_left)[:, None]
        o = (o_b.to(gl.int64) * out_stride)[:, None] + o_d
        p_dk_rest, p_dv_rest = None, None
        if p_rest is not None:
            p_dk_rest = p_rest + ((o_b * (2 * D))[:, None] + o_d)
            p_dv_rest = p_dk_rest + D
        store_sum(p_dk + o, p_dk_rest, dk, m_b, ADD)
        store_sum(p_dv + o, p_dv_rest, dv, m_b, ADD)


@gluon.jit(do_not_specialize=["num_heads"])
def _dense_dkv_sm90_kernel(
    Q, K, V, DO, LSE, DELTA, ITEMS, CU_Q, CU_K, CU_KEYS, DK, DV, REST, SLICES,
    sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8, out_stride, num_heads, scale,
    G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr, ADD: gl.constexpr,
):
    """dK, dV of 128 keys over one item of the run of queries that see them:

        P^T = exp(scale K Q^T - lse)    dV += P^T dO    dS^T = P^T (V dO^T - delta)    dK += scale dS^T Q

    Strides ending in 8 count 8 elements: this tells the compiler that rows start at whole 16 bytes.
    """
    TYPE: gl.constexpr = Q.dtype.element_ty
    p_item = ITEMS + 6 * gl.program_id(0)
    count = gl.load(p_item + 4)
    if count == 0:
        return
    i_h, i_s, block = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
    first, slot = gl.load(p_item + 3), gl.load(p_item + 5)
    start_k = gl.load(CU_KEYS + i_s)
    len_keys = gl.load(CU_KEYS + i_s + 1) - start_k
    t = first + gl.load(CU_K + i_s + 1) - gl.load(CU_K + i_s) - gl.load(CU_Q + i_s + 1)
    i_key = block * (2 * BM)

    k_tiles = gl.allocate_shared_memory(TYPE, [2, BM, D], SHARED)
    v_tiles = gl.allocate_shared_memory(TYPE, [2, BM, D], SHARED)
    q_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BM, D], SHARED)
    do_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BM, D], SHARED)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=128)
        mbarrier.init(do_full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=2)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    kv_head = i_h.to(gl.int64)
    for g in gl.static_range(2):
        o_k = i_key + g * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
        key = (start_k + o_k).to(gl.int64)
        m_k = (o_k < len_keys)[:, None]
        o_kd = ((key * sk_t8 + kv_head * sk_h8) * 8)[:, None] + o_d
        async_copy.async_copy_global_to_shared(k_tiles.index(g), K + o_kd, mask=m_k)
        o_vd = ((key * sv_t8 + kv_head * sv_h8) * 8)[:, None] + o_d
        async_copy.async_copy_global_to_shared(v_tiles.index(g), V + o_vd, mask=m_k)
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()

    t -= i_key * STRIDE + SPAN - 1
    o_row = first.to(gl.int64) * num_heads + i_h * G
    p_q = Q + (first.to(gl.int64) * sq_t8 + kv_head * G * sq_h8) * 8
    o_out = (start_k + i_key).to(gl.int64) * out_stride + kv_head * D
    p_slice = SLICES + slot.to(gl.int64) * (4 * BM * D)
    left = len_keys - i_key
    p_rest, p_rest1 = None, None
    if REST is not None:
        p_rest = REST + (start_k + i_key).to(gl.int64) * (2 * D)
        p_rest1 = p_rest + 2 * BM * D
    gl.warp_specialize([
        (_keys, (q_tiles, do_tiles, lses, deltas, q_full, do_full, empty, k_tiles.index(0), v_tiles.index(0),
                 p_q, LSE + o_row, sq_t8, sq_h8, num_heads, count, t, scale, DK + o_out, DV + o_out, p_rest,
                 p_slice, slot >= 0, left, out_stride, 0, G, STRIDE, WINDOW, ADD)),
        (_keys, (q_tiles, do_tiles, lses, deltas, q_full, do_full, empty, k_tiles.index(1), v_tiles.index(1),
                 DO + o_row * D, DELTA + o_row, num_heads * (D // 8), D // 8, num_heads, count, t - BM * STRIDE, scale,
                 DK + o_out + BM * out_stride, DV + o_out + BM * out_stride, p_rest1, p_slice + 2 * BM * D, slot >= 0,
                 left - BM, out_stride, 1, G, STRIDE, WINDOW, ADD)),
    ], [4], [256])


def gradient(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: BlockLists, plan: Plan,
    keys: KeyBlocks, scale: float, dq_partials: Tensor | None, out_k: Tensor, out_v: Tensor, rest: Tensor | None,
    slices: Tensor, add: bool,
) -> None:
    """`_gradient.gradient` for runs of query rows and blocks of 128 keys: rows of q, k, v and do start at multiples of
    16 bytes."""
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
    _dense_dkv_sm90_kernel[(lists.items.shape[0],)](
        q, k, v, do, lse, delta, lists.items, plan.cu_q, plan.cu_k, keys.cu, out_k, out_v, rest, slices,
        *strides, out_k.stride(0), lse.stride(0), scale, G=q.shape[1] // k.shape[1], STRIDE=keys.stride, SPAN=keys.span,
        WINDOW=None if keys.window >= UNLIMITED else keys.window, ADD=add, num_warps=4, maxnreg=256,
    )  # fmt: skip
