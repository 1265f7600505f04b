"""attend_selected, KV-block-major, with the two kernels that take the time written for Hopper in Gluon.

Everything else is _kvmajor.py. The gradient is in _gradient_sm90.py, that of wide heads in _gradient_wide_sm90.py; this
is the partial kernel: same lists and same results as that of attend_selected_kvmajor.py, what differs is who owns which
register. For D and Dv of 64, 128, 192 or 256, bf16 or fp16, blocks of 64 or 128 keys, any group size.

The kernel is bound by memory traffic and by latency, so as many independent warpgroups per SM as fit run on one tile of
64 rows each: for D = Dv = 128 four, with at most 128 registers a thread. A program for a block of 64 keys is one
warpgroup and takes 48 KiB of shared memory (K, V, one tile of q). A block of 128 keys takes 64 KiB for K and V, so two
warpgroups share it. One q buffer is enough, because the next tile is fetched as soon as the scores of this one exist.
Outputs go from the accumulators to memory without passing through shared memory. Wide heads take more of both: three
warpgroups for D = 192 and Dv = 128, two for D = Dv = 256.
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

from nsattn.kernels import _gradient_sm90, _gradient_wide_sm90, _kvmajor
from nsattn.kernels._gradient import Gradient, Pair, selected_cut
from nsattn.kernels._gradient_sm90 import aligned, barrier
from nsattn.kernels._kvmajor import Dense, Schedule
from nsattn.kernels._lists import BlockLists
from nsattn.kernels._pieces_sm90 import SHARED, WIDEST, allocate, pieces
from nsattn.kernels._popular_sm90 import attend_popular, hide, popular_tokens
from nsattn.kernels._tile import LOG2E
from nsattn.plan import Plan

BM = gl.constexpr(64)  # rows of a tile: what one warpgroup multiplies at a time
RESERVED = 1024  # bytes of shared memory that every program takes besides its own


@gluon.constexpr_function
def store_layout(cols):
    """Rows [64, cols] of 16-bit numbers over 4 warps of 16 rows, 8 columns (16 bytes) at a time and eight lanes to 128
    neighbouring bytes, which is one L2 request; cols is 64 or 128. The owners are those of an accumulator after
    `swap_columns`, but for one lane bit and one register bit, exchanged: a few shuffles."""
    more = [[0, 64]] if cols == 128 else []
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [1, 0], *more, [8, 0]], [[0, 8], [0, 16], [0, 32], [2, 0], [4, 0]],
        [[16, 0], [32, 0]], [], [64, cols])


@gluon.constexpr_function
def fetch_layout(rows, cols):
    """The same pieces for reading `rows` rows, 64 or 128, with no accumulator to fit."""
    right, below = [[0, 64]] if cols == 128 else [], [[64, 0]] if rows == 128 else []
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *right, [4, 0], [8, 0], *below], [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        [[16, 0], [32, 0]], [], [rows, cols])


@gluon.jit
def swap_columns(x):
    """Column 32a + 8j + 2i + e of [R, C] goes to 32a + 8i + 2j + e. Its own inverse; moves no data.

    In an accumulator, lane j of four owns columns 8i + 2j and 8i + 2j + 1. If V is stored with swapped columns, these
    are the neighbours 8j + 2i and 8j + 2i + 1 of the true output: 16 bytes for one store, with no shared memory.
    """
    R: gl.constexpr = x.shape[0]
    C: gl.constexpr = x.shape[1]
    return x.reshape([R, C // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([R, C])


@gluon.jit
def fetch(P, tile, o_row, m):
    """Start to copy the columns of a tile from rows that begin at o_row elements."""
    LAYOUT: gl.constexpr = fetch_layout(tile.shape[0], tile.shape[1])
    o_row = gl.convert_layout(o_row, gl.SliceLayout(1, LAYOUT))[:, None]
    o = o_row + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if m is None:
        async_copy.async_copy_global_to_shared(tile, P + o)
    else:
        m = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT))[:, None]
        async_copy.async_copy_global_to_shared(tile, P + o, mask=m)


@gluon.jit
def fetch_q(Q, q_tiles, token, head, sq_t, sq_h):
    """Start to copy the query rows of a tile."""
    o = (token.to(gl.int64) * sq_t + head.to(gl.int64) * sq_h) * 8
    for i in gl.static_range(len(q_tiles)):
        fetch(Q + WIDEST * i, q_tiles[i], o, None)
    async_copy.commit_group()


@gluon.jit
def load_swapped(V, o_row, m, ROWS: gl.constexpr, COLS: gl.constexpr):
    """A tile in shared memory of rows of V, with columns as `swap_columns` leaves them."""
    LAYOUT: gl.constexpr = fetch_layout(ROWS, COLS)
    o_row = gl.convert_layout(o_row, gl.SliceLayout(1, LAYOUT))[:, None]
    m = gl.convert_layout(m, gl.SliceLayout(1, LAYOUT))[:, None]
    b_v = gl.load(V + (o_row + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))[None, :]), mask=m, other=0.0)
    return gl.allocate_shared_memory(V.dtype.element_ty, [ROWS, COLS], SHARED, swap_columns(b_v))


@gluon.jit
def store_output(OP, p, v_tile, l, row0, last, DV: gl.constexpr):
    """Multiply probabilities p, with sums l, by columns of V and store these columns of the partial output."""
    COLS: gl.constexpr = v_tile.shape[1]
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    STORE: gl.constexpr = store_layout(COLS)
    o_row = gl.minimum(row0 + gl.arange(0, BM, layout=gl.SliceLayout(1, STORE)), last)
    o_d = gl.arange(0, COLS, layout=gl.SliceLayout(0, STORE))
    p = gl.convert_layout(p, gl.DotOperandLayout(0, OUTPUT, 2))
    o = warpgroup_mma(p, v_tile, gl.zeros([BM, COLS], gl.float32, OUTPUT), use_acc=False, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    o = o * gl.convert_layout(1.0 / l, gl.SliceLayout(1, OUTPUT))[:, None]
    o = gl.convert_layout(swap_columns(o.to(v_tile.dtype)), STORE)
    gl.store(OP + (o_row * DV)[:, None] + o_d[None, :], o, cache_modifier=".cs")


@gluon.jit
def tiles(
    Q, q_tiles, k_tiles, v_tiles, TOKENS, OP, LSEP, num_rows, shift, scale2, sq_t, sq_h,
    FIRST: gl.constexpr, STEP: gl.constexpr, G: gl.constexpr, B: gl.constexpr, DV: gl.constexpr,
):
    """Partial outputs of tiles FIRST, FIRST + STEP, ... of an item, by one warpgroup. See `_partial_sm90_kernel`.

    Q, TOKENS, OP and LSEP point at the first head of the group and the first row of the item; the last key of the
    block that a token sees is token + shift.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    FETCH: gl.constexpr = gl.SliceLayout(1, fetch_layout(BM, q_tiles[0].shape[1]))
    # The tail of an item repeats its last row: it writes the same values again, which costs less than masks.
    last = num_rows - 1
    o_fetch = gl.arange(0, BM, layout=FETCH)
    o_score = gl.arange(0, BM, layout=gl.SliceLayout(1, SCORES))
    row = gl.minimum(FIRST * BM + o_fetch, last)
    fetch_q(Q, q_tiles, gl.load(TOKENS + row // G), row % G, sq_t, sq_h)
    token = gl.load(TOKENS + gl.minimum((FIRST + STEP) * BM + o_fetch, last) // G)  # of the rows to fetch next
    for i in range(FIRST, gl.cdiv(num_rows, BM), STEP):
        async_copy.wait_group(0)
        fence_async_shared()
        s = gl.zeros([BM, B], gl.float32, SCORES)
        for j in gl.static_range(len(q_tiles)):
            s = warpgroup_mma(q_tiles[j], k_tiles[j].permute((1, 0)), s, use_acc=j > 0, is_async=True)
        earliest = gl.load(TOKENS + i * BM // G)  # tokens of a list ascend
        s = warpgroup_mma_wait(0, deps=(s,))
        fetch_q(Q, q_tiles, token, gl.minimum((i + STEP) * BM + o_fetch, last) % G, sq_t, sq_h)
        token = gl.load(TOKENS + gl.minimum((i + 2 * STEP) * BM + o_fetch, last) // G)
        o_row = gl.minimum(i * BM + o_score, last)
        if earliest + shift < B - 1:  # else every row sees the whole block
            s = hide(s, gl.load(TOKENS + o_row // G) + shift)
        m = gl.max(s, 1) * scale2  # finite: a listed row sees the first key of the block
        p = gl.exp2(s * scale2 - m[:, None])
        l = gl.sum(p, 1)
        p = p.to(v_tiles[0].dtype)
        for j in gl.static_range(len(v_tiles)):
            if j > 0:
                barrier()  # else the compiler keeps both pieces of the output in registers
            store_output(OP + WIDEST * j, p, v_tiles[j], l, i * BM, last, DV)
        gl.store(LSEP + o_row, m + gl.log2(l))
    async_copy.wait_group(0)


@gluon.jit
def _partial_sm90_kernel(
    Q, K, V, TOKENS, ITEMS, CU_Q, CU_K, OP, LSEP, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, scale,
    D: gl.constexpr, DV: gl.constexpr, G: gl.constexpr, B: gl.constexpr, GROUPS: gl.constexpr,
    REGISTERS: gl.constexpr,
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
    KEYS: gl.constexpr = pieces(D)
    VALUES: gl.constexpr = pieces(DV)

    o_k = block * B + gl.arange(0, B, layout=gl.SliceLayout(1, fetch_layout(B, KEYS[0])))
    m_k = o_k < len_k
    o_k = (start_k + o_k).to(gl.int64)
    k_tiles = allocate(K.dtype.element_ty, B, KEYS)
    for i in gl.static_range(len(k_tiles)):
        fetch(K + WIDEST * i, k_tiles[i], (kv_head * sk_h + o_k * sk_t) * 8, m_k)
    async_copy.commit_group()
    o_v = (kv_head * sv_h + o_k * sv_t) * 8
    v_tiles = (load_swapped(V, o_v, m_k, B, VALUES[0]),)
    if len(VALUES) > 1:
        barrier()  # one piece is in registers at a time
        v_tiles = (v_tiles[0], load_swapped(V + WIDEST, o_v, m_k, B, VALUES[1]))

    p_q = Q + kv_head * G * sq_h * 8
    p_tokens, p_o, p_lse = TOKENS + first, OP + first * (G * DV), LSEP + first * G
    shift = len_k - len_q - start_q - block * B  # from a query row to its position inside the block
    rows, scale2 = count * G, scale * LOG2E
    q_tiles = allocate(Q.dtype.element_ty, BM, KEYS)
    if GROUPS == 1:
        tiles(p_q, q_tiles, k_tiles, v_tiles, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h, 0, 1, G, B, DV)
    else:
        more_q = allocate(Q.dtype.element_ty, BM, KEYS)
        async_copy.wait_group(0)
        fence_async_shared()
        gl.warp_specialize([
            (tiles, (p_q, q_tiles, k_tiles, v_tiles, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h,
                     0, 2, G, B, DV)),
            (tiles, (p_q, more_q, k_tiles, v_tiles, p_tokens, p_o, p_lse, rows, shift, scale2, sq_t, sq_h,
                     1, 2, G, B, DV)),
        ], [4], [REGISTERS])


def most_registers(D: int, Dv: int, B: int, groups: int) -> int:
    """Registers a thread with which as many programs share a multiprocessor as its shared memory has room for, or as
    many as have the registers for scores, an output piece and 32 more."""
    shared = 2 * (B * (D + Dv) + groups * BM.value * D) + RESERVED
    programs = 228 * 1024 // shared
    needed = min(128, 32 + (B + min(Dv, WIDEST.value)) // 2)
    return max(needed, min(248, 65536 // (programs * groups * 128) // 8 * 8))


def partial(
    q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, plan: Plan, scale: float, partials: Tensor, partial_lse: Tensor
) -> None:
    """`attend_selected_kvmajor.partial` on Hopper; rows of q, k and v start at multiples of 16 bytes."""
    D, Dv, B = q.shape[-1], v.shape[-1], plan.config.slc_block
    groups = B // 64
    registers = most_registers(D, Dv, B, groups)
    strides = [x.stride(dim) // 8 for x in (q, k, v) for dim in (0, 1)]
    _partial_sm90_kernel[(lists.items.shape[0],)](
        q, k, v, lists.tokens, lists.items, plan.cu_q, plan.cu_k, partials, partial_lse, *strides, scale,
        D=D, DV=Dv, G=q.shape[1] // k.shape[1], B=B, GROUPS=groups, REGISTERS=registers,
        num_warps=4, maxnreg=registers,
    )  # fmt: skip


# By block size. A block of 128 keys needs more rows to pay for reading its K and V.
SCHEDULES = {
    64: Schedule(partial, rows_per_item=1024, rows_per_range=32768, dense=Dense(attend_popular, popular_tokens, 38)),
    128: Schedule(partial, rows_per_item=2048, rows_per_range=131072, dense=Dense(attend_popular, popular_tokens, 60)),
}


def schedule_of(q: Tensor, v: Tensor, B: int) -> Schedule:
    """The schedule for a head. Of wide heads a multiprocessor has room for one program of popular blocks instead of
    two: a block costs as much as twice the rows of partials."""
    schedule = SCHEDULES[B]
    if max(q.shape[2], v.shape[2]) > 128 and schedule.dense:
        return schedule._replace(dense=schedule.dense._replace(worth=2 * schedule.dense.worth))
    return schedule


def gradient_of(q: Tensor, v: Tensor, B: int) -> Gradient:
    """The gradient kernel for a head."""
    cut = functools.partial(selected_cut, fewest=2048)
    if max(q.shape[2], v.shape[2]) > 128:
        return Gradient(_gradient_wide_sm90.gradient, parts=B // 64, cut=cut)
    return Gradient(_gradient_sm90.gradient, parts=1, cut=cut)


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_idx: Tensor, plan: Plan, *, scale: float, workspace: int
) -> tuple[Tensor, Tensor]:
    """Eq 11, 12, KV-block-major. See `nsattn.attend_selected`."""
    q, k, v = map(aligned, (q, k, v))
    schedule = schedule_of(q, v, plan.config.slc_block)
    return _kvmajor.forward(q, k, v, block_idx, plan, scale=scale, workspace=workspace, schedule=schedule)


def attend_selected_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, block_idx: Tensor,
    plan: Plan, *, scale: float, workspace: int, delta: Tensor | None = None, dq: Tensor | None = None,
    dkv: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_selected` with respect to q, k, v. See `attend_selected_kvmajor`."""
    do, q, k, v = map(aligned, (do, q, k, v))
    kernel = gradient_of(q, v, plan.config.slc_block)
    return _kvmajor.backward(
        do, dlse, q, k, v, o, lse, block_idx, plan, scale=scale, workspace=workspace, kernel=kernel,
        delta=delta, dq=dq, dkv=dkv,
    )  # fmt: skip


def scratch_bytes(q: Tensor, k: Tensor, v: Tensor, N: int, plan: Plan, *, workspace: int, backward: bool) -> int:
    """Peak scratch of `attend_selected` or `attend_selected_bwd`, in bytes; the data of the tensors is not read."""
    B = plan.config.slc_block
    return _kvmajor.scratch_bytes(
        q, k, v, N, plan, workspace=workspace, backward=backward, schedule=schedule_of(q, v, B),
        kernel=gradient_of(q, v, B),
    )  # fmt: skip
