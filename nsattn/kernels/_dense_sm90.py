"""Forward of the dense branches, Eq 8 and section 3.3.3, for Hopper GPUs in Gluon: D = Dv = 128, 16-bit inputs.

Replaces the forward kernel of `_dense`, with the same rule for who sees which key. The queries of a KV head are rows
ordered by token, then head of the group. A pair of table tiles has 128 G of them, G parts of 128 rows, and a program
does many parts in turn. Two warpgroups own 64 rows each and share the keys and values of a step, 128 of each, in shared
memory three deep: the first copies the keys, the second the values. They wait for each other's data only, between parts
too, so one multiplies while the other takes exponentials, or begins. Inside a warpgroup the product of the last step's
probabilities with V is under way while this step's softmax is computed.

On an H200, compressed keys of 64K tokens and 32/8 heads: 4.2 ms where `_dense` takes 5.3 (docs/log.md, 2026-11-23 and
27).
"""

from __future__ import annotations

import torch
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

from nsattn.kernels._dense import UNLIMITED, Keys
from nsattn.kernels._gradient_sm90 import aligned, barrier
from nsattn.kernels._tile import LN2, LOG2E
from nsattn.plan import TILE, Plan

D = gl.constexpr(128)
ROWS = gl.constexpr(128)  # rows of a part
BM = gl.constexpr(64)  # of a warpgroup
BN = gl.constexpr(128)  # keys of a step
PAIR = gl.constexpr(2 * TILE)  # queries of an entry of `Plan.q_pairs`
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of the output too
OPERAND = gl.constexpr(gl.DotOperandLayout(0, SCORES, 2))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # pieces of 16 bytes, 128 bytes a warp and row
STAGES = gl.constexpr(3)
TURNS = gl.constexpr(2)  # of a multiprocessor where there are many parts


@gluon.jit
def _ended(t, STRIDE: gl.constexpr, SPAN: gl.constexpr):
    """Number of keys of an endless sequence that end at or before position t."""
    return gl.maximum(t + 1 - SPAN + STRIDE, 0) // STRIDE


@gluon.jit
def key_steps(t0, t1, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr, BN: gl.constexpr):
    """Steps of BN keys for queries at positions t0 .. t1: first key, number of steps, how many of them need a mask for
    keys that come too late, and how many more for keys that the window left behind."""
    lo, hi, full_hi = 0, _ended(t1, STRIDE, SPAN), _ended(t0, STRIDE, SPAN)
    early = 0
    if WINDOW is not None:
        lo = _ended(t0 - WINDOW, STRIDE, SPAN)
        early = gl.cdiv(_ended(t1 - WINDOW, STRIDE, SPAN) - lo, BN)
    steps = gl.maximum(gl.cdiv(hi - lo, BN), 1)  # a step that hides everything, where nothing is seen
    seen = gl.maximum(full_hi - lo, 0) // BN  # steps that hide nothing for being late
    return lo, steps, steps - seen, gl.minimum(early, seen)


@gluon.jit
def first_key(j, lo, steps, late, early, BN: gl.constexpr):
    """First key of the j-th step: the late steps that need a mask, the early ones that do, those that do not."""
    k = gl.where(j < late, steps - 1 - j, j - late)
    return lo + gl.where(j < late + early, k, j - late) * BN


@gluon.jit
def fetch(n, i_n, tiles, full, empty, p, len_keys, stride8, BN: gl.constexpr, STAGES: gl.constexpr):
    """Start to copy the keys or values of step n, from row i_n, once everybody has used what the tile held.

    Rows past the end become zeros. Every thread arrives at `full` when its pieces are there.
    """
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), (n // STAGES & 1) ^ 1)
    o_n = i_n + gl.arange(0, BN, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o = (o_n.to(gl.int64) * stride8 * 8)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(tiles.index(stage), p + o, mask=(o_n < len_keys)[:, None])
    async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def hide(s, t, i_n, row, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr):
    """-inf for the scores of keys from i_n on that the rows from `row` do not see; t is the position of row 0."""
    LAYOUT: gl.constexpr = s.type.layout
    position = t + (row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, LAYOUT))) // G
    end = (i_n + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, LAYOUT))) * STRIDE + SPAN - 1
    visible = end[None, :] <= position[:, None]
    if WINDOW is not None:
        visible &= end[None, :] > position[:, None] - WINDOW
    return gl.where(visible, s, -float("inf"))


@gluon.jit
def _softmax(s, m, l, t, i_n, row, scale2, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr,
             WINDOW: gl.constexpr, MASK: gl.constexpr):
    """Probabilities of BN keys from i_n relative to the new maximum; that, the new sum, and what older sums shrink by.

    `t` is the position of row 0 of the pair of tiles, `row` the first of this warpgroup's.
    """
    if MASK:
        s = hide(s, t, i_n, row, G, STRIDE, SPAN, WINDOW)
    m_new = gl.maximum(m, gl.max(s, 1) * scale2)
    m_ref = gl.where(m_new == -float("inf"), 0.0, m_new)
    shrink = gl.exp2(m - m_ref)
    p = gl.exp2(s * scale2 - m_ref[:, None])
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def wait_for(n, full, STAGES: gl.constexpr):
    """Wait for the keys or values of step n."""
    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)


@gluon.jit
def release(n, empty, STAGES: gl.constexpr):
    """This warpgroup is done with the keys or values of step n."""
    barrier()
    mbarrier.arrive(empty.index(n % STAGES), count=1)


@gluon.jit
def _step(
    j, p, acc, shrink, m, l, i_n, n, i_fetch, steps, n0, q_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty,
    tiles, full, empty, p_fetch, len_keys, stride8, t, row, scale2,
    G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
    MASK: gl.constexpr,
):
    """Scores and probabilities of step j >= 1, while those of step j - 1 are multiplied with V; copy for step n.

    That product is still under way at the end. It is waited for here, at the start of the next step, because the
    assembler moves a wait ahead of the exponentials in the same block of code.
    """
    acc = warpgroup_mma_wait(0, deps=(acc,)) * shrink[:, None]
    if j > 1:
        release(n0 + j - 2, v_empty, STAGES)
    wait_for(n0 + j, k_full, STAGES)
    wait_for(n0 + j - 1, v_full, STAGES)
    fence_async_shared()
    s = gl.zeros([BM, BN], gl.float32, SCORES)
    s = warpgroup_mma(q_tile, k_tiles.index((n0 + j) % STAGES).permute((1, 0)), s, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_tiles.index((n0 + j - 1) % STAGES), acc, is_async=True)
    if n < steps:
        fetch(n0 + n, i_fetch, tiles, full, empty, p_fetch, len_keys, stride8, BN, STAGES)
    s = warpgroup_mma_wait(1, deps=(s,))
    release(n0 + j, k_empty, STAGES)
    p, m, l, shrink = _softmax(s, m, l, t, i_n, row, scale2, G, STRIDE, SPAN, WINDOW, MASK)
    return gl.convert_layout(p.to(q_tile.dtype), OPERAND), acc, shrink, m, l


@gluon.jit
def _rows(
    Q, O, LSE, i_pair, n0, q_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV, PAIRS, CU_Q, CU_K, CU_KEYS,
    sq_t8, sq_h8, sn_t8, sn_h8, kv_head, row, scale, num_heads,
    WARPGROUP: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
):
    """Output and lse of 64 rows of the i-th pair of tiles: those of this warpgroup among the 128 from `row`. Steps are
    numbered from n0; returns the number of the next.

    The first warpgroup copies keys two steps ahead, the other one values, which are needed a step later: `KV`.
    """
    AHEAD: gl.constexpr = 2 if WARPGROUP == 0 else 1
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
        barrier()  # until what this tile held of other rows is stored
        fetch_queries(q_tile, Q, start_q, row, left, sq_t8, sq_h8, kv_head, G)
        async_copy.commit_group()
        p_fetch = KV + (start_k.to(gl.int64) * sn_t8 + kv_head * sn_h8) * 8
        i_n = first_key(0, lo, steps, late, early, BN)
        fetch(n0, i_n, tiles, full, empty, p_fetch, len_keys, sn_t8, BN, STAGES)
        for n in gl.static_range(1, AHEAD + 1):
            if n < steps:
                i_fetch = first_key(n, lo, steps, late, early, BN)
                fetch(n0 + n, i_fetch, tiles, full, empty, p_fetch, len_keys, sn_t8, BN, STAGES)
        scale2 = scale * LOG2E
        zero = gl.zeros([BM, D], gl.float32, SCORES)
        acc = warpgroup_mma_init(zero)
        m = gl.full([BM], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
        l = gl.zeros([BM], gl.float32, gl.SliceLayout(1, SCORES))
        async_copy.wait_group(0)
        barrier()
        wait_for(n0, k_full, STAGES)
        fence_async_shared()
        s = warpgroup_mma(q_tile, k_tiles.index(n0 % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        release(n0, k_empty, STAGES)
        p, m, l, shrink = _softmax(s, m, l, t, i_n, row, scale2, G, STRIDE, SPAN, WINDOW, True)
        p = gl.convert_layout(p.to(q_tile.dtype), OPERAND)
        for j in range(1, late + early):
            i_n = first_key(j, lo, steps, late, early, BN)
            i_fetch = first_key(j + AHEAD, lo, steps, late, early, BN)
            p, acc, shrink, m, l = _step(
                j, p, acc, shrink, m, l, i_n, j + AHEAD, i_fetch, steps, n0, q_tile, k_tiles, v_tiles, k_full, v_full,
                k_empty, v_empty, tiles, full, empty, p_fetch, len_keys, sn_t8, t, row, scale2,
                G, STRIDE, SPAN, WINDOW, True,
            )  # fmt: skip
        for j in range(gl.maximum(late + early, 1), steps):
            i_fetch = first_key(j + AHEAD, lo, steps, late, early, BN)
            p, acc, shrink, m, l = _step(
                j, p, acc, shrink, m, l, 0, j + AHEAD, i_fetch, steps, n0, q_tile, k_tiles, v_tiles, k_full, v_full,
                k_empty, v_empty, tiles, full, empty, p_fetch, len_keys, sn_t8, t, row, scale2,
                G, STRIDE, SPAN, WINDOW, False,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,)) * shrink[:, None]
        if steps > 1:
            release(n0 + steps - 2, v_empty, STAGES)
        wait_for(n0 + steps - 1, v_full, STAGES)
        fence_async_shared()
        acc = warpgroup_mma(p, v_tiles.index((n0 + steps - 1) % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        release(n0 + steps - 1, v_empty, STAGES)
        n0 += steps

        some = l > 0
        l = gl.where(some, l, 1.0)
        lse = gl.where(some, (m + gl.log2(l)) * LN2, -float("inf"))
        o_first = start_q.to(gl.int64) * num_heads + kv_head * G
        r = row + gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))
        gl.store(LSE + (o_first + (r // G).to(gl.int64) * num_heads + r % G), lse, mask=r // G < left)
        q_tile.store((acc / l[:, None]).to(q_tile.dtype))
        barrier()
        r = row + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
        o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        o_o = (o_first + (r // G).to(gl.int64) * num_heads + r % G) * D
        gl.store(O + (o_o[:, None] + o_d[None, :]), q_tile.load(COPY), mask=(r // G < left)[:, None])
    return n0


@gluon.jit
def _warpgroup(
    Q, O, LSE, q_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV, PAIRS, CU_Q, CU_K, CU_KEYS,
    sq_t8, sq_h8, sn_t8, sn_h8, scale, num_parts, num_heads,
    WARPGROUP: gl.constexpr, G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
):
    """`_rows` for all parts of a program."""
    n = 0
    first, end, step = parts_of(num_parts, WINDOW)
    for k in range(first, end, step):
        i_pair, kv_head, row = part(k, num_parts, num_heads, G)
        n = _rows(
            Q, O, LSE, i_pair, n, q_tile, k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, KV, PAIRS, CU_Q, CU_K,
            CU_KEYS, sq_t8, sq_h8, sn_t8, sn_h8, kv_head, row, scale, num_heads, WARPGROUP, G, STRIDE, SPAN, WINDOW,
        )  # fmt: skip


@gluon.jit
def parts_of(num_parts, WINDOW: gl.constexpr):
    """The parts of this program: first, end, step. Those of all programs that run at the same time are neighbours and
    so are, in a window, the parts of one turn: the next turn reads other keys. Compressed keys stay in the L2 cache."""
    if WINDOW is None:
        return gl.program_id(0), num_parts, gl.num_programs(0)
    else:
        turns = gl.where(gl.num_programs(0) < num_parts, TURNS, 1)
        places, each = gl.num_programs(0) // turns, gl.cdiv(num_parts, turns)
        turn = gl.program_id(0) // places
        return turn * each + gl.program_id(0) % places, gl.minimum((turn + 1) * each, num_parts), places


@gluon.jit
def part(k, num_parts, num_heads, G: gl.constexpr):
    """The k-th part of a launch: pair of tiles, KV head and first of its 128 rows. Late queries, which see most
    compressed keys, come first."""
    i = num_parts - 1 - k
    return i // num_heads, i % num_heads // G, i % G * ROWS


@gluon.jit
def clear_slack(O, LSE, CU_Q, num_parts, num_heads, num_seqs, total, G: gl.constexpr, WINDOW: gl.constexpr):
    """Zeros in O, and -inf in LSE unless it is None, for rows that belong to no sequence, among those of this program's
    parts if pairs were cut from the packed rows. The table has at least total / PAIR entries, so the programs of a
    launch reach all of them."""
    end = gl.load(CU_Q + num_seqs)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    zero = gl.zeros([ROWS, D], O.dtype.element_ty, COPY)
    first, last, step = parts_of(num_parts, WINDOW)
    reach = num_parts - (end // PAIR).to(gl.int32) * num_heads  # the rows of parts from there on are all of sequences
    for k in range(first, gl.minimum(last, reach), step):
        i_pair, kv_head, row = part(k, num_parts, num_heads, G)
        token = i_pair.to(gl.int64) * PAIR + (row + r) // G
        o_r, slack = token * num_heads + kv_head * G + (row + r) % G, (token >= end) & (token < total)
        gl.store(O + ((o_r * D)[:, None] + o_d[None, :]), zero, mask=slack[:, None])
        if LSE is not None:
            gl.store(LSE + o_r, gl.full([ROWS], -float("inf"), gl.float32, gl.SliceLayout(1, COPY)), mask=slack)


@gluon.jit
def pair_of(PAIRS, CU_Q, CU_K, CU_KEYS, i_pair):
    """The i-th pair of tiles: packed row and position of its first token, tokens from there to the end of its sequence
    (0: there is no such pair), first row and number of its keys."""
    entry = gl.load(PAIRS + 2 * i_pair)
    i_s = gl.maximum(entry, 0)
    first = gl.load(CU_Q + i_s) + gl.load(PAIRS + 2 * i_pair + 1)
    left = gl.where(entry < 0, 0, gl.load(CU_Q + i_s + 1) - first)
    start_k = gl.load(CU_KEYS + i_s)
    t = gl.load(CU_K + i_s + 1) - gl.load(CU_K + i_s) - left
    return first, t, left, start_k, gl.load(CU_KEYS + i_s + 1) - start_k


@gluon.jit
def fetch_queries(tile, P, start, row, left, stride_t8, stride_h8, kv_head, G: gl.constexpr):
    """Start to copy 64 rows, from `row` of a pair whose first token is packed row `start`; missing ones are zeros."""
    r = row + gl.arange(0, BM, layout=gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o = ((start + r // G).to(gl.int64) * stride_t8 + (kv_head * G + r % G) * stride_h8) * 8
    async_copy.async_copy_global_to_shared(tile, P + (o[:, None] + o_d[None, :]), mask=(r // G < left)[:, None])


@gluon.jit
def barriers(STAGES: gl.constexpr):
    """(full, empty) of a ring of tiles: all threads of the warpgroup that copies arrive at one, both warpgroups at the
    other."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


@gluon.jit(do_not_specialize=["num_parts", "num_seqs", "total"])
def _dense_fwd_sm90_kernel(
    Q, K, V, PAIRS, CU_Q, CU_K, CU_KEYS, O, LSE, sq_t8, sq_h8, sk_t8, sk_h8, sv_t8, sv_h8,
    num_parts, num_heads, num_seqs, total, scale,
    G: gl.constexpr, STRIDE: gl.constexpr, SPAN: gl.constexpr, WINDOW: gl.constexpr,
):
    """Output and lse of parts of 128 rows of a pair of tiles: online softmax over the keys they see (Eq 8; 3.3.3).

    Row r of a pair is head r % G of the group and token r // G. Strides ending in 8 count 8 elements: this tells the
    compiler that rows start at whole 16 bytes.
    """
    TYPE: gl.constexpr = Q.dtype.element_ty
    clear_slack(O, LSE, CU_Q, num_parts, num_heads, num_seqs, total, G, WINDOW)
    q_tiles = gl.allocate_shared_memory(TYPE, [2, BM, D], SHARED)
    k_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, D], SHARED)
    v_tiles = gl.allocate_shared_memory(TYPE, [STAGES, BN, D], SHARED)
    k_full, k_empty = barriers(STAGES)
    v_full, v_empty = barriers(STAGES)
    barrier()
    gl.warp_specialize([
        (_warpgroup, (Q, O, LSE, q_tiles.index(0), k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, K, PAIRS, CU_Q,
                      CU_K, CU_KEYS, sq_t8, sq_h8, sk_t8, sk_h8, scale, num_parts, num_heads,
                      0, G, STRIDE, SPAN, WINDOW)),
        (_warpgroup, (Q, O, LSE, q_tiles.index(1), k_tiles, v_tiles, k_full, v_full, k_empty, v_empty, V, PAIRS, CU_Q,
                      CU_K, CU_KEYS, sq_t8, sq_h8, sv_t8, sv_h8, scale, num_parts, num_heads,
                      1, G, STRIDE, SPAN, WINDOW)),
    ], [4], [256])


def programs(num_parts: int, device: torch.device) -> int:
    """Programs of a launch, one to a multiprocessor at a time. Many parts are done by two programs on each, in turn:
    then few of them begin with nothing to multiply, and parts may still differ in length."""
    places = 132 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    return num_parts if num_parts < 2 * TURNS.value * places else TURNS.value * places


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, keys: Keys, *, scale: float) -> tuple[Tensor, Tensor]:
    """`_dense.forward` on Hopper, D = Dv = 128."""
    q, k, v = map(aligned, (q, k, v))
    T, Hq, _ = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    if T == 0:
        return o, lse
    strides = [stride // 8 for x in (q, k, v) for stride in x.stride()[:2]]
    num_parts = plan.q_pairs.shape[0] * Hq
    _dense_fwd_sm90_kernel[(programs(num_parts, q.device),)](
        q, k, v, plan.q_pairs, plan.cu_q, plan.cu_k, keys.cu, o, lse, *strides, num_parts, Hq, plan.num_seqs, T, scale,
        G=Hq // k.shape[1], STRIDE=keys.stride, SPAN=keys.span,
        WINDOW=None if keys.window >= UNLIMITED else keys.window, num_warps=4, maxnreg=256,
    )  # fmt: skip
    return o, lse
