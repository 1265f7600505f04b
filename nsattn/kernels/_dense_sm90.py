"""Forward of the dense branches, Eq 8 and section 3.3.3, for Hopper GPUs in Gluon: D = Dv = 128, 16-bit inputs.

Replaces the forward kernel of `_dense`, with the same rule for who sees which key. A program holds 128 rows, which are
2 to 16 query heads of one KV head for 64 to 8 neighbouring tokens, and its two warpgroups share the keys and values that
stream by: half the reads of L2 that one warpgroup alone would need. In a step the product of the previous step's
probabilities with V is under way while this step's softmax is computed. Odd groups leave one of their rounded up heads
idle; a group of one is left to the plain kernel.
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
from nsattn.kernels._tile import LN2, LOG2E
from nsattn.plan import TILE, Plan

D = gl.constexpr(128)
BM = gl.constexpr(128)  # rows of a program
BN = gl.constexpr(128)  # keys of a step
TABLE_ROWS = gl.constexpr(TILE)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))  # of the output too
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))  # pieces of 16 bytes, 128 bytes a warp and row
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name before triton 3.7


@gluon.jit
def _ended(t, STRIDE: gl.constexpr, SPAN: gl.constexpr):
    """Number of keys of an endless sequence that end at or before position t."""
    return gl.maximum(t + 1 - SPAN + STRIDE, 0) // STRIDE


@gluon.jit
def _fetch(tile, p, i_n, len_keys, stride8):
    """Start to copy keys i_n .. i_n + BN - 1; those past the end become zeros."""
    o_n = i_n + gl.arange(0, BN, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o = ((o_n * stride8).to(gl.int64) * 8)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(tile, p + o, mask=(o_n < len_keys)[:, None])


@gluon.jit
def _first_key(j, lo, steps, edges, late, early):
    """First key of the j-th step: the late steps that need a mask, the early ones that do, those that do not."""
    k = gl.where(j < late, steps - 1 - j, j - late)
    return lo + gl.where(j < edges, k, early + j - edges) * BN


@gluon.jit
def _softmax(s, m, l, t, i_n, scale2, HEADS: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr,
             WINDOW: gl.constexpr, MASK: gl.constexpr):
    """Probabilities of BN keys from i_n relative to the new maximum; that, the new sum, and what older sums shrink by.

    `t` is the position of row 0.
    """
    s = s * scale2
    if MASK:
        position = t + gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES)) // HEADS
        end = (i_n + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))) * STRIDE + SPAN - 1
        visible = end[None, :] <= position[:, None]
        if WINDOW is not None:
            visible &= end[None, :] > position[:, None] - WINDOW
        s = gl.where(visible, s, -float("inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    m_ref = gl.where(m_new == -float("inf"), 0.0, m_new)
    shrink = gl.exp2(m - m_ref)
    p = gl.exp2(s - m_ref[:, None])
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _step(
    j, p, acc, shrink, m, l, i_n, i_next, q_tile, k_tiles, v_tiles, p_k, p_v, len_keys, sk_t8, sv_t8, t0, scale2,
    HEADS: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr, MASK: gl.constexpr,
):
    """Scores and probabilities of step j, while those of step j - 1 are multiplied with V.

    That product is still under way at the end. It is waited for here, at the start of the next step, because the
    assembler moves a wait ahead of the exponentials in the same block of code.
    """
    acc = warpgroup_mma_wait(0, deps=(acc,)) * shrink[:, None]
    p = gl.convert_layout(p.to(q_tile.dtype), OPERAND)
    # Keys of this step and values of the last are here, and every warp is done with those before.
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    s = gl.zeros([BM, BN], gl.float32, SCORES)
    s = warpgroup_mma(q_tile, k_tiles.index(j % 2).permute((1, 0)), s, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_tiles.index((j - 1) % 2), acc, is_async=True)
    _fetch(k_tiles.index((j + 1) % 2), p_k, i_next, len_keys, sk_t8)
    _fetch(v_tiles.index(j % 2), p_v, i_n, len_keys, sv_t8)
    async_copy.commit_group()
    s = warpgroup_mma_wait(1, deps=(s,))
    p, m, l, shrink = _softmax(s, m, l, t0, i_n, scale2, HEADS, STRIDE, SPAN, WINDOW, MASK)
    return p, acc, shrink, m, l


@gluon.jit(do_not_specialize=["num_seqs", "total"])
def _dense_fwd_sm90_kernel(
    Q, K, V, TILES, CU_Q, CU_K, CU_KEYS, O, LSE, sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8,
    num_heads, num_seqs, total, scale,
    G: gl.constexpr, HEADS: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
):
    """Output and lse of 128 rows: online softmax over the keys they see (Eq 8; 3.3.3).

    Row r is query head head0 + r % HEADS, where the group has it, of token first + r // HEADS. Strides ending in 8 count 8 elements: this tells
    the compiler that rows start at whole 16 bytes.
    """
    BT: gl.constexpr = BM // HEADS
    TYPE: gl.constexpr = Q.dtype.element_ty
    i = gl.num_programs(0) - 1 - gl.program_id(0)  # late queries see most compressed keys: they start first
    PARTS: gl.constexpr = (G + HEADS - 1) // HEADS  # of a group
    parts = num_heads // G * PARTS
    i_t, kv_head = i // parts, i % parts // PARTS
    part0 = i % PARTS * HEADS  # first head of the part in its group
    head0 = kv_head * G + part0
    o_r = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o_s = gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))

    # Rows that belong to no sequence: tile tables have at least total / TILE entries, so the programs reach them all.
    packed_end = gl.load(CU_Q + num_seqs)
    if (i_t + 1).to(gl.int64) * BT > packed_end:
        row = i_t.to(gl.int64) * BT + o_r // HEADS
        o = row * num_heads + head0 + o_r % HEADS
        m_slack = (row >= packed_end) & (row < total) & (part0 + o_r % HEADS < G)
        gl.store(O + ((o * D)[:, None] + o_d[None, :]), gl.zeros([BM, D], TYPE, COPY), mask=m_slack[:, None])
        gl.store(LSE + o, gl.full([BM], -float("inf"), gl.float32, gl.SliceLayout(1, COPY)), mask=m_slack)
    p_entry = TILES + i_t // (TABLE_ROWS // BT) * 2
    i_s = gl.load(p_entry)
    if i_s < 0:
        return
    first = gl.load(p_entry + 1) + i_t % (TABLE_ROWS // BT) * BT
    start_q = gl.load(CU_Q + i_s)
    len_q = gl.load(CU_Q + i_s + 1) - start_q
    if first >= len_q:
        return
    start_k = gl.load(CU_KEYS + i_s)
    len_keys = gl.load(CU_KEYS + i_s + 1) - start_k
    shift = gl.load(CU_K + i_s + 1) - gl.load(CU_K + i_s) - len_q
    t0, t1 = first + shift, gl.minimum(first + BT, len_q) - 1 + shift
    lo, hi, full_hi = 0, _ended(t1, STRIDE, SPAN), _ended(t0, STRIDE, SPAN)
    early = 0
    if WINDOW is not None:
        lo = _ended(t0 - WINDOW, STRIDE, SPAN)
        early = gl.cdiv(_ended(t1 - WINDOW, STRIDE, SPAN) - lo, BN)
    steps = gl.cdiv(hi - lo, BN)
    seen = gl.maximum(full_hi - lo, 0) // BN  # steps that hide nothing for being late
    late, early = steps - seen, gl.minimum(early, seen)
    edges = late + early

    kv_head = kv_head.to(gl.int64)
    p_k = K + (start_k.to(gl.int64) * sk_t8 + kv_head * sk_h8) * 8
    p_v = V + (start_k.to(gl.int64) * sv_t8 + kv_head * sv_h8) * 8
    q_tile = gl.allocate_shared_memory(TYPE, [BM, D], SHARED)
    k_tiles = gl.allocate_shared_memory(TYPE, [2, BN, D], SHARED)
    v_tiles = gl.allocate_shared_memory(TYPE, [2, BN, D], SHARED)
    m_q = (first + o_r // HEADS < len_q) & (part0 + o_r % HEADS < G)
    token = (start_q + first + o_r // HEADS).to(gl.int64)
    o_q = (token * sq_t8 + (head0 + o_r % HEADS).to(gl.int64) * sq_h8) * 8
    async_copy.async_copy_global_to_shared(q_tile, Q + (o_q[:, None] + o_d[None, :]), mask=m_q[:, None])
    i_n = _first_key(0, lo, steps, edges, late, early)
    i_next = _first_key(1, lo, steps, edges, late, early)
    _fetch(k_tiles.index(0), p_k, i_n, len_keys, sk_t8)
    async_copy.commit_group()
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    _fetch(k_tiles.index(1), p_k, i_next, len_keys, sk_t8)
    _fetch(v_tiles.index(0), p_v, i_n, len_keys, sv_t8)
    async_copy.commit_group()

    scale2 = scale * LOG2E
    zero = gl.zeros([BM, D], gl.float32, SCORES)
    acc = warpgroup_mma_init(zero)
    m = gl.full([BM], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l = gl.zeros([BM], gl.float32, gl.SliceLayout(1, SCORES))
    s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    p, m, l, shrink = _softmax(s, m, l, t0, i_n, scale2, HEADS, STRIDE, SPAN, WINDOW, True)
    for j in range(1, edges):
        i_n, i_next = i_next, _first_key(j + 1, lo, steps, edges, late, early)
        p, acc, shrink, m, l = _step(
            j, p, acc, shrink, m, l, i_n, i_next, q_tile, k_tiles, v_tiles, p_k, p_v, len_keys, sk_t8, sv_t8, t0,
            scale2, HEADS, STRIDE, SPAN, WINDOW, True,
        )  # fmt: skip
    for j in range(gl.maximum(edges, 1), steps):
        i_n, i_next = i_next, _first_key(j + 1, lo, steps, edges, late, early)
        p, acc, shrink, m, l = _step(
            j, p, acc, shrink, m, l, i_n, i_next, q_tile, k_tiles, v_tiles, p_k, p_v, len_keys, sk_t8, sv_t8, t0,
            scale2, HEADS, STRIDE, SPAN, WINDOW, False,
        )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=(acc,)) * shrink[:, None]
    p = gl.convert_layout(p.to(TYPE), OPERAND)
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    acc = warpgroup_mma(p, v_tiles.index(gl.maximum(steps - 1, 0) % 2), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    some = l > 0
    l = gl.where(some, l, 1.0)
    lse = gl.where(some, (m + gl.log2(l)) * LN2, -float("inf"))
    o_lse = (start_q + first + o_s // HEADS).to(gl.int64) * num_heads + head0 + o_s % HEADS
    gl.store(LSE + o_lse, lse, mask=(first + o_s // HEADS < len_q) & (part0 + o_s % HEADS < G))
    q_tile.store((acc / l[:, None]).to(TYPE))
    barrier()
    o_r = gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    o_o = ((start_q + first + o_r // HEADS).to(gl.int64) * num_heads + head0 + o_r % HEADS) * D
    m_o = (first + o_r // HEADS < len_q) & (part0 + o_r % HEADS < G)
    gl.store(O + (o_o[:, None] + o_d[None, :]), q_tile.load(COPY), mask=m_o[:, None])


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, keys: Keys, *, scale: float) -> tuple[Tensor, Tensor]:
    """`_dense.forward` on Hopper: rows of q, k and v start at multiples of 16 bytes."""
    (T, Hq, _), G = q.shape, q.shape[1] // k.shape[1]
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    if T == 0:
        return o, lse
    heads = max(2, min(G & -G, 16))
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
    programs = plan.q_tiles.shape[0] * (TILE * heads // BM.value) * (Hq // G * -(-G // heads))
    _dense_fwd_sm90_kernel[(programs,)](
        q, k, v, plan.q_tiles, plan.cu_q, plan.cu_k, keys.cu, o, lse, *strides, Hq, plan.num_seqs, T, scale,
        G=G, HEADS=heads, STRIDE=keys.stride, SPAN=keys.span,
        WINDOW=None if keys.window >= UNLIMITED else keys.window, num_warps=8,
    )  # fmt: skip
    return o, lse
