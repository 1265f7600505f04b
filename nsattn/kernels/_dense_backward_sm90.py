"""Backward of the dense branches, Eq 8 and section 3.3.3, for Hopper GPUs in Gluon: D = Dv = 128, 16-bit inputs.

Two passes. *dQ* is built like the forward in `_dense_sm90`: a program does parts of 128 rows of q and do in turn, two
warpgroups own 64 each and wait for each other's copies only, keys and values of 64 a step pass through shared memory
four deep. *dK, dV* is `_dense_keys_sm90` over lists of runs, as in `_runs_sm90`. Seven products for each pair of a
query and a key instead of the five of one pass, and no scratch that grows with both lengths.
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
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from nsattn.kernels._dense import UNLIMITED, Keys
from nsattn.kernels._dense_keys_sm90 import KEYS, gradient
from nsattn.kernels._dense_sm90 import (
    BM,
    COPY,
    ROWS,
    SHARED,
    D,
    barrier,
    barriers,
    clear_slack,
    fetch,
    fetch_queries,
    first_key,
    hide,
    key_steps,
    pair_of,
    part,
    parts_of,
    programs,
    release,
    wait_for,
)
from nsattn.kernels._gradient import Gradient, KeyBlocks
from nsattn.kernels._gradient_sm90 import aligned
from nsattn.kernels._lists import Cut
from nsattn.kernels._runs_sm90 import key_gradients
from nsattn.kernels._tile import LOG2E, row_delta
from nsattn.plan import TILE, Plan


def key_cut(G: int) -> Cut:
    """8192 rows an item; 3072 in short sequences, whose items would not fill the GPU."""
    return Cut(-(-8192 // G), -(-3072 // G))


KEY_GRADIENT = Gradient(gradient, parts=1, cut=key_cut)
BN = gl.constexpr(64)  # keys of a step of dQ
STAGES = gl.constexpr(4)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
GRADIENT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of q
OPERAND = gl.constexpr(gl.DotOperandLayout(0, GRADIENT, 2))


@gluon.jit
def _step(
    j, acc, lse2, delta, i_n, n, i_fetch, steps, n0, q_tile, do_tile, k_tiles, v_tiles, k_full, v_full, k_empty,
    v_empty, tiles, full, empty, p_fetch, len_keys, stride8, t, row, scale2,
    G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr, MASK: gl.constexpr,
):
    """Add the part of step j to dQ / scale, a product that is still under way at the end; copy for step n."""
    wait_for(n0 + j, k_full, STAGES)
    wait_for(n0 + j, v_full, STAGES)
    fence_async_shared()
    k_tile = k_tiles.index((n0 + j) % STAGES)
    zero = gl.zeros([BM, BN], gl.float32, SCORES)
    s = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    v_tile = v_tiles.index((n0 + j) % STAGES)
    dp = warpgroup_mma(do_tile, v_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    if n < steps:
        fetch(n0 + n, i_fetch, tiles, full, empty, p_fetch, len_keys, stride8, BN, STAGES)
    s, acc = warpgroup_mma_wait(1, deps=(s, acc))  # and so the product of the last step
    if j > 0:
        release(n0 + j - 1, k_empty, STAGES)
    if MASK:
        s = hide(s, t, i_n, row, G, STRIDE, SPAN, WINDOW)
    p = gl.exp2(s * scale2 - lse2[:, None])
    dp = warpgroup_mma_wait(0, deps=(dp,))
    release(n0 + j, v_empty, STAGES)
    ds = (p * (dp - delta[:, None])).to(q_tile.dtype)
    return warpgroup_mma(gl.convert_layout(ds, OPERAND), k_tile, acc, is_async=True)


@gluon.jit
def _rows(
    Q, DO, DQ, LSE, DELTA, i_pair, n0, q_tile, do_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV, PAIRS,
    CU_Q, CU_K, CU_KEYS, sq_t8, sq_h8, sn_t8, sn_h8, kv_head, row, scale, num_heads,
    WARPGROUP: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
    ADD: gl.constexpr,
):
    """dQ of 64 rows of the i-th pair of tiles: those of this warpgroup among the 128 from `row`. Steps are numbered
    from n0; returns the number of the next.

    The first warpgroup copies keys, two steps ahead since a step needs them to its end, the other one values: `KV`.
    """
    AHEAD: gl.constexpr = 2 if WARPGROUP == 0 else 3
    if WARPGROUP == 0:
        tiles, full, empty = k_tiles, k_full, k_empty
    else:
        tiles, full, empty = v_tiles, v_full, v_empty
    kv_head = kv_head.to(gl.int64)
    start_q, t, left, start_k, len_keys = pair_of(PAIRS, CU_Q, CU_K, CU_KEYS, i_pair)
    if row // G < left:
        t0, t1 = t + row // G, t + gl.minimum((row + ROWS - 1) // G, left - 1)
        lo, steps, late, early = key_steps(t0, t1, STRIDE, SPAN, WINDOW, BN)
        row += WARPGROUP * BM
        barrier()  # until what the tile held of other rows is stored
        fetch_queries(q_tile, Q, start_q, row, left, sq_t8, sq_h8, kv_head, G)
        fetch_queries(do_tile, DO, start_q, row, left, num_heads * (D // 8), D // 8, kv_head, G)
        async_copy.commit_group()
        p_fetch = KV + (start_k.to(gl.int64) * sn_t8 + kv_head * sn_h8) * 8
        for n in gl.static_range(AHEAD):
            if n < steps:
                i_fetch = first_key(n, lo, steps, late, early, BN)
                fetch(n0 + n, i_fetch, tiles, full, empty, p_fetch, len_keys, sn_t8, BN, STAGES)
        o_first = start_q.to(gl.int64) * num_heads + kv_head * G
        r = row + gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))
        o_r = o_first + (r // G).to(gl.int64) * num_heads + r % G
        lse = gl.load(LSE + o_r, mask=r // G < left, other=-float("inf"))
        lse2 = gl.where(lse == -float("inf"), float("inf"), lse * LOG2E)  # p = 0 for rows that see nothing
        delta = gl.load(DELTA + o_r, mask=r // G < left, other=0.0)
        scale2 = scale * LOG2E
        acc = warpgroup_mma_init(gl.zeros([BM, D], gl.float32, GRADIENT))
        async_copy.wait_group(0)
        barrier()
        for j in range(late + early):
            i_n = first_key(j, lo, steps, late, early, BN)
            i_fetch = first_key(j + AHEAD, lo, steps, late, early, BN)
            acc = _step(
                j, acc, lse2, delta, i_n, j + AHEAD, i_fetch, steps, n0, q_tile, do_tile, k_tiles, v_tiles, k_full,
                v_full, k_empty, v_empty, tiles, full, empty, p_fetch, len_keys, sn_t8, t, row, scale2,
                G, STRIDE, SPAN, WINDOW, True,
            )  # fmt: skip
        for j in range(late + early, steps):
            i_fetch = first_key(j + AHEAD, lo, steps, late, early, BN)
            acc = _step(
                j, acc, lse2, delta, 0, j + AHEAD, i_fetch, steps, n0, q_tile, do_tile, k_tiles, v_tiles, k_full,
                v_full, k_empty, v_empty, tiles, full, empty, p_fetch, len_keys, sn_t8, t, row, scale2,
                G, STRIDE, SPAN, WINDOW, False,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(n0 + steps - 1, k_empty, STAGES)
        n0 += steps
        q_tile.store((acc * scale).to(q_tile.dtype))
        barrier()
        r = row + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        o_dq = (o_first + (r // G).to(gl.int64) * num_heads + r % G) * D
        p_dq, m_dq = DQ + (o_dq[:, None] + o_d[None, :]), (r // G < left)[:, None]
        dq = q_tile.load(COPY)
        if ADD:
            dq = (dq.to(gl.float32) + gl.load(p_dq, mask=m_dq, other=0.0).to(gl.float32)).to(q_tile.dtype)
        gl.store(p_dq, dq, mask=m_dq)
    return n0


@gluon.jit
def _warpgroup(
    Q, DO, DQ, LSE, DELTA, q_tile, do_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV, PAIRS, CU_Q, CU_K,
    CU_KEYS, sq_t8, sq_h8, sn_t8, sn_h8, scale, num_parts, num_heads,
    WARPGROUP: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
    ADD: gl.constexpr,
):
    """`_rows` for all parts of a program."""
    n = 0
    first, end, step = parts_of(num_parts, WINDOW)
    for k in range(first, end, step):
        i_pair, kv_head, row = part(k, num_parts, num_heads, G)
        n = _rows(
            Q, DO, DQ, LSE, DELTA, i_pair, n, q_tile, do_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV,
            PAIRS, CU_Q, CU_K, CU_KEYS, sq_t8, sq_h8, sn_t8, sn_h8, kv_head, row, scale, num_heads,
            WARPGROUP, G, STRIDE, SPAN, WINDOW, ADD,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_parts", "num_seqs", "total"])
def _dense_dq_sm90_kernel(
    Q, K, V, DO, LSE, DELTA, PAIRS, CU_Q, CU_K, CU_KEYS, DQ, sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8,
    num_parts, num_heads, num_seqs, total, scale,
    G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr, ADD: gl.constexpr,
):
    """dQ of parts of 128 rows of a pair of tiles: scale * sum of ds * k over the keys they see,
    ds = p * (do . v - delta).

    With ADD, what DQ holds is added.
    """
    TYPE: gl.constexpr = Q.dtype.element_ty
    if not ADD:
        clear_slack(DQ, None, CU_Q, num_parts, num_heads, num_seqs, total, G, WINDOW)
    q_tiles = gl.allocate_shared_memory(TYPE, [2, BM, D], SHARED)
    do_tiles = gl.allocate_shared_memory(TYPE, [2, BM, D], SHARED)
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, D], SHARED)
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, D], SHARED)
    k_full, k_empty = barriers(STAGES)
    v_full, v_empty = barriers(STAGES)
    barrier()
    gl.warp_specialize([
        (_warpgroup, (Q, DO, DQ, LSE, DELTA, q_tiles.index(0), do_tiles.index(0), k_tiles, v_tiles, k_full, v_full,
                      k_empty, v_empty, K, PAIRS, CU_Q, CU_K, CU_KEYS, sq_t8, sq_h8, sk_t8, sk_h8, scale, num_parts,
                      num_heads, 0, G, STRIDE, SPAN, WINDOW, ADD)),
        (_warpgroup, (Q, DO, DQ, LSE, DELTA, q_tiles.index(1), do_tiles.index(1), k_tiles, v_tiles, k_full, v_full,
                      k_empty, v_empty, V, PAIRS, CU_Q, CU_K, CU_KEYS, sq_t8, sq_h8, sv_t8, sv_h8, scale, num_parts,
                      num_heads, 1, G, STRIDE, SPAN, WINDOW, ADD)),
    ], [4], [256])


def query_gradient(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Plan, keys: Keys, *, scale: float,
    total: Tensor | None = None,
) -> Tensor:
    """dq, or `total` to which it has been added; rows of q, k and v start at multiples of 16 bytes, do is
    contiguous."""
    T, Hq, _ = q.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if total is None else total
    if T:
        strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
        num_parts = plan.q_pairs.shape[0] * Hq
        _dense_dq_sm90_kernel[(programs(num_parts, q.device),)](
            q, k, v, do, lse, delta, plan.q_pairs, plan.cu_q, plan.cu_k, keys.cu, dq, *strides, num_parts, Hq,
            plan.num_seqs, T, scale, G=Hq // k.shape[1], STRIDE=keys.stride, SPAN=keys.span,
            WINDOW=None if keys.window >= UNLIMITED else keys.window, ADD=total is not None, num_warps=4, maxnreg=256,
        )  # fmt: skip
    return dq


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan, keys: Keys, *,
    scale: float, workspace: int, delta: Tensor | None, dq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_dense.backward` on Hopper, D = Dv = 128."""
    do, q, k, v = map(aligned, (do, q, k, v))
    delta = row_delta(o, do, dlse) if delta is None else delta
    pairs = (len(keys.tiles) - plan.num_seqs) * TILE // KEYS + plan.num_seqs
    blocks = KeyBlocks(keys.cu, keys.cu_pairs, pairs, KEYS, keys.stride, keys.span, keys.window)
    dq = query_gradient(do, q, k, v, lse, delta, plan, keys, scale=scale, total=dq)
    dk, dv = key_gradients(do, q, k, v, lse, delta, plan, blocks, scale=scale, workspace=workspace, kernel=KEY_GRADIENT)
    return dq, dk, dv
