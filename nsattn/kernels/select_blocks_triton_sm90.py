"""select_blocks, Eq 9 and 10, with the score kernel written for Hopper in Gluon: D = 128, bf16 or fp16.

Everything else is `_select_blocks`: the same permuted keys, the same pooling, the same scratch. What differs is what
waits for what. One warpgroup scores 64 queries, two programs share a multiprocessor. The queries of up to 5 heads of a
group stay in shared memory, beside one tile of 128 keys; the heads of larger groups take turns. Two products are under
way at a time: while the exponentials of one head are taken, the next head is multiplied. The last head of a tile is
waited for at the top of the loop, where a new block of code begins, because the assembler moves a wait ahead of
exponentials in the same block. Then the copy of the next keys starts, and flies during the last exponentials, pooling
and stores.

`dispatch` offers it for l / d <= 2 and B / d <= 32; heads take turns for l / d = 2 and B / d = 4 only.
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

from nsattn.kernels import _select_blocks
from nsattn.kernels._dense_sm90 import barrier
from nsattn.kernels._gradient_sm90 import aligned
from nsattn.kernels._select_blocks import (
    Chunk,
    key_of_column,
    last_candidate,
    load_lse2,
    pool,
    query_tile,
    range_of,
)
from nsattn.kernels._tile import LOG2E, cdiv
from nsattn.plan import TILE, Plan

D = gl.constexpr(128)
BM = gl.constexpr(TILE)  # queries of a tile: what one warpgroup multiplies at a time
BK = gl.constexpr(128)  # keys of a tile, as `_select_blocks.score_shape` says for these inputs
NI = gl.constexpr(BK.value // 16)
MOST_HEADS = 5  # whose queries fit in half of the shared memory of a multiprocessor, beside a tile of keys
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK.value, 16]))
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # pieces of 16 bytes, 128 bytes a warp and row
# SCORES with the registers in the order that `pool` keeps, columns before rows, and what is left of it after a sum over
# the columns of a lane. Owners are the same, so that no data moves.
OWNED = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 8], [0, 16], [0, 32], [0, 64], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]],
    [], [BM.value, BK.value]))
LANES = gl.constexpr(gl.DistributedLinearLayout(
    [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [BM.value, 4]))


@gluon.jit
def _fetch_keys(k_tile, p_k, i_k, len_c, stride8):
    """Start to copy the tile of keys from i_k on, in the order that `pool` expects; keys past the end become zeros."""
    o_key = i_k + key_of_column(gl.arange(0, BK, layout=gl.SliceLayout(1, COPY)), NI)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    o_k = (o_key.to(gl.int64) * stride8 * 8)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(k_tile, p_k + o_k, mask=(o_key < len_c)[:, None])
    async_copy.commit_group()


@gluon.jit
def _heads(q_tiles, k_tile, lse2, scale2, zero, never, HEADS: gl.constexpr):
    """Probabilities of a tile of keys, summed over all heads but the last, whose product is still under way.

    A product takes the accumulator of two heads before, and adds nothing to it, for `never` is false. The compiler does
    not know that: with a third accumulator it would run out of registers, and wait for each product at once.
    """
    async_copy.wait_group(0)
    barrier()
    fence_async_shared()
    b_k = k_tile.permute((1, 0))
    s = warpgroup_mma(q_tiles.index(0), b_k, zero, use_acc=False, is_async=True)
    a = zero
    if HEADS > 1:
        s_next = warpgroup_mma(q_tiles.index(1), b_k, zero, use_acc=False, is_async=True)
    for g in gl.static_range(HEADS - 1):
        done = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(done * scale2 - lse2[g][:, None])
        a = a + p if g > 0 else p
        s = s_next
        if g + 2 < HEADS:
            s_next = warpgroup_mma(q_tiles.index(g + 2), b_k, done, use_acc=never, is_async=True)
    return a, s


@gluon.jit
def _finish(
    a, prev, p_score, p_max, j, j_begin, first, len_q, len_k, num_cols,
    L: gl.constexpr, STRIDE: gl.constexpr, B: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr,
    ADD: gl.constexpr,
):
    """Store the importance of the blocks from j on, -1 for those that do not compete, and group maxima; the new carry.
    ADD: to the importance that is there.

    What lies before j_begin is masked, not skipped by a branch, into which the compiler would move all exponentials.
    """
    P: gl.constexpr = B // STRIDE
    if (LOCAL - 1) * B < L - STRIDE - 1:  # else keys of blocks that compete lie in the past
        end = (j * P + key_of_column(gl.arange(0, BK, layout=gl.SliceLayout(0, SCORES)), NI)) * STRIDE + L - 1
        t = first + gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES)) + len_k - len_q
        a = gl.where(end[None, :] <= t[:, None], a, 0.0)
    o_j = gl.arange(0, 4, layout=gl.SliceLayout(0, LANES))[None, :]
    x, prev = pool(gl.convert_layout(a, OWNED), prev, o_j, BM, NI, P, L // STRIDE)
    NB: gl.constexpr = x.shape[2]
    LAYOUT: gl.constexpr = x.type.layout
    GROUPS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    o_row = gl.arange(0, BM, layout=gl.SliceLayout(1, GROUPS))
    o_lane = gl.arange(0, 4, layout=gl.SliceLayout(0, GROUPS))
    o_i = gl.arange(0, NB, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    o_i, o_b = o_i[None, None, :], j + NB * o_lane[None, :, None]  # what varies inside a thread is a constant
    last_block = last_candidate(first + o_row, len_q, len_k, B, LOCAL)
    # One int32 offset: added to the pointer on its own, j would become an int64 and cost registers.
    o_score = (o_row * num_cols)[:, None, None] + o_b + o_i
    if ADD:
        x += gl.load(p_score + o_score, mask=j >= j_begin, other=0.0)
    x = gl.where((o_i >= INIT - o_b) & (o_i <= last_block[:, None, None] - o_b), x, -1.0)
    gl.store(p_score + o_score, x, mask=j >= j_begin)
    o_max = (j // NB + o_row * (num_cols // NB))[:, None] + o_lane[None, :]
    gl.store(p_max + o_max, gl.max(x, 2), mask=j >= j_begin)
    return prev


@gluon.jit
def _scores_sm90_kernel(
    Q, K, LSE, SCORE, GROUP_MAX, Q_TILES, CU_Q, CU_K, CU_CMP, sq_t8, sq_h8, sk_t8, sk_h8,
    last_tile, num_tiles, head0, num_kv_heads, num_cols, scale,
    G: gl.constexpr, L: gl.constexpr, STRIDE: gl.constexpr, B: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr,
    RANGE: gl.constexpr, HEADS: gl.constexpr, ADD: gl.constexpr,
):
    """Importance of up to RANGE selection blocks for 64 queries of one KV head, and its group maxima; R <= 2 (Eq 9).

    Of each group of G heads HEADS count, from that at which Q and LSE begin. ADD: to what SCORE holds. Strides ending
    in 8 count 8 elements: this tells the compiler that rows start at whole 16 bytes.
    """
    TYPE: gl.constexpr = Q.dtype.element_ty
    P: gl.constexpr = B // STRIDE
    R: gl.constexpr = L // STRIDE
    NB: gl.constexpr = BK // 4 // P  # blocks of a lane, and of a group
    i_tile, i_range = gl.program_id(0) % num_tiles, gl.program_id(0) // num_tiles
    i_h = gl.program_id(1)
    kv_head = (head0 + i_h).to(gl.int64)
    # The last tiles of a sequence see most: they start first.
    i_s, first, start_q, len_q, len_k, start_c, len_c = query_tile(Q_TILES, CU_Q, CU_K, CU_CMP, last_tile - i_tile)
    if i_s < 0:
        return
    j_begin, j_end = range_of(i_range, first, len_q, len_k, num_cols, B, LOCAL, BM, RANGE)
    if j_begin >= j_end:
        return
    p_lse = LSE + (start_q + first) * (num_kv_heads * G) + kv_head * G
    o_lse = gl.minimum(gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES)), len_q - 1 - first) * (num_kv_heads * G)
    lse2 = ()
    for g in gl.static_range(HEADS):
        lse2 = lse2 + (load_lse2(p_lse + g, o_lse),)
    q_tiles = gl.allocate_shared_memory(TYPE, [HEADS, BM, D], SHARED)
    k_tile = gl.allocate_shared_memory(TYPE, [BK, D], SHARED)
    # Rows past the end repeat the last one, whose scores they do not keep.
    o_q = gl.minimum(gl.arange(0, BM, layout=gl.SliceLayout(1, COPY)), len_q - 1 - first)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
    p_q = Q + ((start_q + first) * sq_t8 + kv_head * G * sq_h8) * 8
    for g in gl.static_range(HEADS):
        o = ((o_q.to(gl.int64) * sq_t8 + g * sq_h8) * 8)[:, None] + o_d[None, :]
        async_copy.async_copy_global_to_shared(q_tiles.index(g), p_q + o)
    p_k = K + (start_c * sk_t8 + kv_head * sk_h8) * 8
    # A range starts with the tile before it, for the key that its first block shares with the one before.
    j_first = gl.maximum(j_begin - 4 * NB, 0) if R > 1 else j_begin
    _fetch_keys(k_tile, p_k, j_first * P, len_c, sk_t8)

    scale2 = scale * LOG2E
    i_row = (i_h.to(gl.int64) * num_tiles + i_tile) * BM
    p_score, p_max = SCORE + i_row * num_cols, GROUP_MAX + i_row * (num_cols // NB)
    prev = gl.zeros([BM, 4], gl.float32, LANES)
    never = len_q < 0  # false, unknown to the compiler
    zero = gl.zeros([BM, BK], gl.float32, SCORES)
    a, s = _heads(q_tiles, k_tile, lse2, scale2, zero, never, HEADS)
    j_last = j_first + (j_end - 1 - j_first) // (4 * NB) * (4 * NB)
    for j in range(j_first, j_last, 4 * NB):
        s = warpgroup_mma_wait(0, deps=(s,))
        # A warp only knows that its own products have read the tile: wait for the others before it is overwritten.
        barrier()
        _fetch_keys(k_tile, p_k, (j + 4 * NB) * P, len_c, sk_t8)
        a += gl.exp2(s * scale2 - lse2[HEADS - 1][:, None])
        prev = _finish(
            a, prev, p_score, p_max, j, j_begin, first, len_q, len_k, num_cols, L, STRIDE, B, INIT, LOCAL, ADD
        )  # fmt: skip
        a, s = _heads(q_tiles, k_tile, lse2, scale2, zero, never, HEADS)
    s = warpgroup_mma_wait(0, deps=(s,))
    a += gl.exp2(s * scale2 - lse2[HEADS - 1][:, None])
    _finish(a, prev, p_score, p_max, j_last, j_begin, first, len_q, len_k, num_cols, L, STRIDE, B, INIT, LOCAL, ADD)


def _scores(q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, chunk: Chunk, *, scale: float) -> None:
    """`_select_blocks.scores` on Hopper, for D = 128, l <= 2 d and B <= 32 d. The heads of a group take turns, as many
    at a time as fit."""
    config = plan.config
    G, Hkv, num_cols = q.shape[1] // k_cmp.shape[1], k_cmp.shape[1], chunk.score.shape[1]
    RANGE, HEADS = _select_blocks.RANGE, cdiv(G, cdiv(G, MOST_HEADS))
    strides = [stride // 8 for x in (q, k_cmp) for stride in x.stride()[:2]]
    for head in range(0, G, HEADS):
        _scores_sm90_kernel[(chunk.num_tiles * cdiv(num_cols, RANGE), chunk.num_heads)](
            q[:, head:], k_cmp, lse_cmp[:, head:], chunk.score, chunk.group_max, plan.q_tiles, plan.cu_q, plan.cu_k,
            plan.cu_cmp, *strides, chunk.last_tile, chunk.num_tiles, chunk.head0, Hkv, num_cols, scale,
            G=G, L=config.cmp_block, STRIDE=config.cmp_stride, B=config.slc_block, INIT=config.init_blocks,
            LOCAL=config.local_blocks, RANGE=RANGE, HEADS=min(HEADS, G - head), ADD=head > 0, num_warps=4,
        )  # fmt: skip


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse_cmp: Tensor, plan: Plan, *, scale: float, workspace: int
) -> Tensor:
    """Eq 9, 10. See `nsattn.select_blocks`."""
    q, k_cmp, config = aligned(q), aligned(k_cmp), plan.config
    # Heads in turn have run on a GPU with the paper's sizes only; others get the score kernel for any GPU until then.
    tried = q.shape[1] <= MOST_HEADS * k_cmp.shape[1] or (config.overlap, config.keys_per_block) == (2, 4)
    launch = _scores if tried else _select_blocks.scores
    return _select_blocks.select_blocks(q, k_cmp, lse_cmp, plan, scale=scale, workspace=workspace, launch=launch)
