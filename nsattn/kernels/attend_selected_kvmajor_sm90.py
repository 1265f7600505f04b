"""attend_selected, KV-block-major, with the two kernels that take the time written for Hopper in Gluon.

Everything else is _kvmajor.py. The gradient is in _gradient_sm90.py; this is the partial kernel: same lists and same
results as that of attend_selected_kvmajor.py, what differs is who owns which register. For D = Dv = 128, bf16 or fp16,
blocks of 64 or 128 keys, any group size.

The kernel is bound by memory traffic and by latency, so as many independent warpgroups per SM as fit run on one tile of
64 rows each, with at most 128 registers a thread: four. A program for a block of 64 keys is one warpgroup and takes
48 KiB of shared memory (K, V, one tile of q). A block of 128 keys takes 64 KiB for K and V, so two warpgroups share it.
One q buffer is enough, because the next tile is fetched as soon as the scores of this one exist. Outputs go from the
accumulators to memory without passing through shared memory.
"""

from __future__ import annotations

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsattn.kernels import _kvmajor
from nsattn.kernels._gradient import Gradient, Pair, selected_cut
from nsattn.kernels._gradient_sm90 import aligned, gradient
from nsattn.kernels._kvmajor import Dense, Schedule
from nsattn.kernels._lists import BlockLists
from nsattn.kernels._popular_sm90 import attend_popular, hide, popular_tokens
from nsattn.kernels._tile import LOG2E
from nsattn.plan import Plan

D = gl.constexpr(128)
BM = gl.constexpr(64)  # rows of a tile: what one warpgroup multiplies at a time
SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# Rows [64, 128] of 16-bit numbers over 4 warps of 16 rows, 8 columns (16 bytes) at a time and eight lanes to 128
# neighbouring bytes, which is one L2 request. The owners are those of an accumulator after `swap_columns`, but for one
# lane bit and one register bit, exchanged: a few shuffles.
STORE = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [1, 0], [0, 64], [8, 0]], [[0, 8], [0, 16], [0, 32], [2, 0], [4, 0]], [[16, 0], [32, 0]],
    [], [64, 128]))


@gluon.constexpr_function
def fetch_layout(rows):
    """The same pieces for reading `rows` rows, 64 or 128, with no accumulator to fit."""
    more = [[64, 0]] if rows == 128 else []
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 64], [4, 0], [8, 0], *more], [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        [[16, 0], [32, 0]], [], [rows, 128])


FETCH = gl.constexpr(fetch_layout(64))


@gluon.jit
def swap_columns(x):
    """Column 32a + 8j + 2i + e of [R, 128] goes to 32a + 8i + 2j + e. Its own inverse; moves no data.

    In an accumulator, lane j of four owns columns 8i + 2j and 8i + 2j + 1. If V is stored with swapped columns, these
    are the neighbours 8j + 2i and 8j + 2i + 1 of the true output: 16 bytes for one store, with no shared memory.
    """
    ROWS: gl.constexpr = x.shape[0]
    return x.reshape([ROWS, 4, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, 128])


@gluon.jit
def fetch_q(Q, q_smem, token, head, sq_t, sq_h):
    """Start to copy the query rows of a tile."""
    o = (token.to(gl.int64) * sq_t + head.to(gl.int64) * sq_h) * 8
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, FETCH))
    async_copy.async_copy_global_to_shared(q_smem, Q + (o[:, None] + o_d[None, :]))
    async_copy.commit_group()


@gluon.jit
def tiles(
    Q, q_smem, k_smem, v_smem, TOKENS, OP, LSEP, num_rows, shift, scale2, sq_t, sq_h,
    FIRST: gl.constexpr, STEP: gl.constexpr, G: gl.constexpr, B: gl.constexpr,
):
    """Partial outputs of tiles FIRST, FIRST + STEP, ... of an item, by one warpgroup. See `_partial_sm90_kernel`.

    Q, TOKENS, OP and LSEP point at the first head of the group and the first row of the item; the last key of the
    block that a token sees is token + shift.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DTYPE: gl.constexpr = q_smem.dtype
    # The tail of an item repeats its last row: it writes the same values again, which costs less than masks.
    last = num_rows - 1
    o_fetch = gl.arange(0, BM, layout=gl.SliceLayout(1, FETCH))
    o_score = gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))
    o_store = gl.arange(0, BM, layout=gl.SliceLayout(1, STORE))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    kt_smem = k_smem.permute((1, 0))
    row = gl.minimum(FIRST * BM + o_fetch, last)
    fetch_q(Q, q_smem, gl.load(TOKENS + row // G), row % G, sq_t, sq_h)
    token = gl.load(TOKENS + gl.minimum((FIRST + STEP) * BM + o_fetch, last) // G)  # of the rows to fetch next
    for i in range(FIRST, gl.cdiv(num_rows, BM), STEP):
        async_copy.wait_group(0)
        fence_async_shared()
        s = warpgroup_mma(q_smem, kt_smem, gl.zeros([BM, B], gl.float32, SCORES), use_acc=False, is_async=True)
        earliest = gl.load(TOKENS + i * BM // G)  # tokens of a list ascend
        s = warpgroup_mma_wait(0, deps=(s,))
        fetch_q(Q, q_smem, token, gl.minimum((i + STEP) * BM + o_fetch, last) % G, sq_t, sq_h)
        token = gl.load(TOKENS + gl.minimum((i + 2 * STEP) * BM + o_fetch, last) // G)
        o_row = gl.minimum(i * BM + o_score, last)
        if earliest + shift < B - 1:  # else every row sees the whole block
            s = hide(s, gl.load(TOKENS + o_row // G) + shift)
        m = gl.max(s, 1) * scale2  # finite: a listed row sees the first key of the block
        p = gl.exp2(s * scale2 - m[:, None])
        l = gl.sum(p, 1)
        p = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, OUTPUT, 2))
        o = warpgroup_mma(p, v_smem, gl.zeros([BM, D], gl.float32, OUTPUT), use_acc=False, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        o = o * gl.convert_layout(1.0 / l, gl.SliceLayout(1, OUTPUT))[:, None]
        o = gl.convert_layout(swap_columns(o.to(DTYPE)), STORE)
        gl.store(OP + (gl.minimum(i * BM + o_store, last) * D)[:, None] + o_d[None, :], o, cache_modifier=".cs")
        gl.store(LSEP + o_row, m + gl.log2(l))
    async_copy.wait_group(0)


@gluon.jit
def _partial_sm90_kernel(
    Q, K, V, TOKENS, ITEMS, CU_Q, CU_K, OP, LSEP, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, scale,
    G: gl.constexpr, B: gl.constexpr, GROUPS: gl.constexpr,
):
    """Partial outputs of the rows of one item: softmax over the visible keys of one block (Eq 11, 12).

    Row r of an item is pair r // G, head r % G: o_r = sum_j exp2(s_rj - lse_r) v_j over the keys j of the block at or
    before the position of the row's token, s the scores in base 2. GROUPS warpgroups share the block's K and V and
    take tiles of 64 rows in turn. Strides count 8 elements, so that the compiler sees that rows start at multiples of
    16 bytes.
    """
    p_item = ITEMS + 6 * gl.program_id(0)
    count = gl.load(p_item + 4)
    if count == 0:
        return
    i_h, i_s, block = gl.load(p_item), gl.load(p_item + 1), gl.load(p_item + 2)
    first = gl.load(p_item + 3).to(gl.int64)
    start_q, start_k = gl.load(CU_Q + i_s), gl.load(CU_K + i_s)
    len_k = gl.load(CU_K + i_s + 1) - start_k
    len_q = gl.load(CU_Q + i_s + 1) - start_q
    kv_head = i_h.to(gl.int64)

    LAYOUT: gl.constexpr = fetch_layout(B)
    o_k = block * B + gl.arange(0, B, layout=gl.SliceLayout(1, LAYOUT))
    m_k = (o_k < len_k)[:, None]
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    o_k = (start_k + o_k).to(gl.int64)
    k_smem = gl.allocate_shared_memory(K.dtype.element_ty, [B, D], SHARED)
    o_kd = ((kv_head * sk_h + o_k * sk_t) * 8)[:, None] + o_d[None, :]
    async_copy.async_copy_global_to_shared(k_smem, K + o_kd, mask=m_k)
    async_copy.commit_group()
    o_vd = ((kv_head * sv_h + o_k * sv_t) * 8)[:, None] + o_d[None, :]
    b_v = gl.load(V + o_vd, mask=m_k, other=0.0)
    v_smem = gl.allocate_shared_memory(V.dtype.element_ty, [B, D], SHARED, swap_columns(b_v))
    q_smem = gl.allocate_shared_memory(Q.dtype.element_ty, [GROUPS, BM, D], SHARED)

    p_q = Q + kv_head * G * sq_h * 8
    p_tokens, p_o, p_lse = TOKENS + first, OP + first * (G * D), LSEP + first * G
    shift = len_k - len_q - start_q - block * B  # from a query row to its position inside the block
    rows, scale2 = count * G, scale * LOG2E
    if GROUPS == 1:
        tiles(p_q, q_smem.index(0), k_smem, v_smem, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h, 0, 1, G, B)
    else:
        async_copy.wait_group(0)
        fence_async_shared()
        gl.warp_specialize([
            (tiles, (p_q, q_smem.index(0), k_smem, v_smem, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h,
                     0, 2, G, B)),
            (tiles, (p_q, q_smem.index(1), k_smem, v_smem, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h,
                     1, 2, G, B)),
        ], [4], [128])


def partial(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, plan: Plan, scale: float, partials: Tensor, partial_lse: Tensor
) -> None:
    """`attend_selected_kvmajor.partial` on Hopper; rows of q, k and v start at multiples of 16 bytes."""
    B = plan.config.slc_block
    strides = [x.stride(dim) // 8 for x in (q, k, v) for dim in (0, 1)]
    _partial_sm90_kernel[(lists.items.shape[0],)](
        q, k, v, lists.tokens, lists.items, plan.cu_q, plan.cu_k, partials, partial_lse, *strides, scale,
        G=q.shape[1] // k.shape[1], B=B, GROUPS=B // 64, num_warps=4, maxnreg=128,
    )  # fmt: skip


# By block size. A block of 128 keys needs more rows to pay for reading its K and V.
SCHEDULES = {
    64: Schedule(partial, rows_per_item=1024, rows_per_range=32768, dense=Dense(attend_popular, popular_tokens, 38)),
    128: Schedule(partial, rows_per_item=2048, rows_per_range=131072, dense=Dense(attend_popular, popular_tokens, 60)),
}
GRADIENT = Gradient(gradient, parts=1, cut=functools.partial(selected_cut, fewest=2048))


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, KV-block-major. See `nsattn.attend_selected`."""
    q, k, v = map(aligned, (q, k, v))
    schedule = SCHEDULES[plan.config.slc_block]
    return _kvmajor.forward(q, k, v, block_idx, plan, scale=scale, workspace=workspace, schedule=schedule)


def attend_selected_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block_idx: Tensor,
    plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
    dkv: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_selected` with respect to q, k, v. See `attend_selected_kvmajor`."""
    do, q, k, v = map(aligned, (do, q, k, v))
    return _kvmajor.backward(
        do, dlse, q, k, v, o, lse, block_idx, plan, scale=scale, workspace=workspace, kernel=GRADIENT,
        delta=delta, dq=dq, dkv=dkv,
    )  # fmt: skip


def scratch_bytes(q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, *, workspace: int, backward: bool) -> int:
    """Peak scratch of `attend_selected` or `attend_selected_bwd`, in bytes; the data of the tensors is not read."""
    return _kvmajor.scratch_bytes(
        q, k, v, N, plan, workspace=workspace, backward=backward, schedule=SCHEDULES[plan.config.slc_block],
        kernel=GRADIENT,
    )  # fmt: skip
