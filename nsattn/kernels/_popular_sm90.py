"""Popular blocks of the selected branch, Eq 11 and 12, for Hopper GPUs in Gluon: D and Dv of 64 to 256, 16-bit inputs.

A block that many neighbouring tokens chose is cheaper query-major: its partials alone would cost more than its products
for all rows of a tile. So a program holds the query rows of a few neighbouring tokens, 128 of them, and runs over the
blocks that are popular with them (`_lists.Popular`): the forced ones always, and whatever a real text makes its
neighbours choose alike. Rows whose token did not choose a block are masked. One output and one lse for all of these
blocks together go where the output will lie, and `_kvmajor.merge` takes them as one more partial.

Two warpgroups of 64 rows share the keys and values of a step of 64, two deep in shared memory. At D = Dv = 128 two
programs an SM hide each other's waits: 96 KiB and 128 registers a thread. Wider heads have room for one program.
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

from nsattn.kernels._chunks import Chunk
from nsattn.kernels._dense_sm90 import barrier
from nsattn.kernels._lists import PopularBlocks
from nsattn.kernels._pieces_sm90 import COPY, WIDEST, allocate, allocate_stages, copy, pieces, zeros
from nsattn.kernels._tile import LOG2E, cdiv
from nsattn.plan import TILE, Plan

ROWS = gl.constexpr(128)
BN = gl.constexpr(64)  # keys of a step
TABLE_ROWS = gl.constexpr(TILE)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16]))


@gluon.jit
def _fetch(step, block, k_tiles, v_tiles, p_k, p_v, len_k, sk_t, sv_t, B: gl.constexpr):
    """Start to copy the keys and values of a step: BN of a block. Rows past the end become zeros."""
    o_n = block * B + step % (B // BN) * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, COPY))
    m = o_n < len_k
    for i in gl.static_range(len(k_tiles)):
        copy(p_k + WIDEST * i, k_tiles[i].index(step % 2), o_n.to(gl.int64) * sk_t * 8, m)
    for i in gl.static_range(len(v_tiles)):
        copy(p_v + WIDEST * i, v_tiles[i].index(step % 2), o_n.to(gl.int64) * sv_t * 8, m)
    async_copy.commit_group()


@gluon.jit
def hide(s, last):
    """-inf for the keys of scores [R, B] after key `last` of each row.

    Key 8i + 2j + e belongs to lane j of four. Seen as [R, i, j, e], what varies inside a thread is a constant, and no
    registers hold key numbers through the loop.
    """
    ROWS: gl.constexpr = s.shape[0]
    B: gl.constexpr = s.shape[1]
    x = s.reshape([ROWS, B // 8, 4, 2])
    LAYOUT: gl.constexpr = x.type.layout
    i = gl.arange(0, B // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    j = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    e = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    last = gl.convert_layout(last, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    o_k = 8 * i[None, :, None, None] + e[None, None, None, :]
    x = gl.where(o_k <= last[:, None, None, None] - 2 * j[None, None, :, None], x, float("-inf"))
    return gl.convert_layout(x.reshape([ROWS, B]), s.type.layout)


@gluon.jit
def _add_values(p, v_tile, acc, shrink):
    """shrink * acc + p V for the columns of a tile of V."""
    OUTPUT: gl.constexpr = acc.type.layout
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, OUTPUT, 2)), v_tile, acc, is_async=True)


@gluon.jit
def _store_output(O, acc, l, o_row, m_row):
    """Store acc / l to rows that begin at o_row elements; whole rows a warp, by way of shared memory."""
    o = acc * gl.convert_layout(1.0 / l, gl.SliceLayout(1, acc.type.layout))[:, None]
    o = gl.convert_layout(o.to(O.dtype.element_ty), COPY)
    o_d = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, COPY))
    gl.store(O + (o_row[:, None] + o_d[None, :]), o, mask=m_row[:, None])


@gluon.jit(do_not_specialize=["tile0", "row0", "row1", "heads", "num_heads"])
def _popular_sm90_kernel(
    Q, K, V, COUNTS, BLOCKS, MEMBERS, Q_TILES, CU_Q, CU_K, O, LSE, sq_t, sq_h, sk_t, sk_h, sv_t, sv_h,
    tile0, row0, row1, heads, num_heads, scale,
    D: gl.constexpr, DV: gl.constexpr, G: gl.constexpr, B: gl.constexpr, TOKENS: gl.constexpr, MOST: gl.constexpr,
):
    """Output and base-2 lse of the rows of TOKENS tokens over the blocks that are popular with them (Eq 11, 12).

    Row r is token r // G, head r % G. Where there is no such block, O and LSE stay as they are. Strides count 8
    elements.
    """
    PARTS: gl.constexpr = (TABLE_ROWS + TOKENS - 1) // TOKENS
    DTYPE: gl.constexpr = Q.dtype.element_ty
    WORD: gl.constexpr = gl.int32 if TOKENS <= 32 else gl.int64
    i_row, i_h = gl.program_id(0) // heads, gl.program_id(0) % heads
    p_tile = Q_TILES + 2 * (tile0 + i_row // PARTS)
    i_s, i_tile = gl.load(p_tile), gl.load(p_tile + 1)
    first = i_tile + i_row % PARTS * TOKENS
    if i_s < 0:
        return
    start_q, start_k = gl.load(CU_Q + i_s), gl.load(CU_K + i_s)
    len_q, len_k = gl.load(CU_Q + i_s + 1) - start_q, gl.load(CU_K + i_s + 1) - start_k
    table = i_row.to(gl.int64) * heads + i_h
    steps = gl.load(COUNTS + table) * (B // BN)
    p_blocks, p_members = BLOCKS + table * MOST, MEMBERS + table * MOST

    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    token = o_m // G
    if steps == 0:
        return

    KEYS: gl.constexpr = pieces(D)
    VALUES: gl.constexpr = pieces(DV)
    q_tiles = allocate(DTYPE, ROWS, KEYS)
    k_tiles = allocate_stages(DTYPE, 2, BN, KEYS)
    v_tiles = allocate_stages(DTYPE, 2, BN, VALUES)
    o_c = gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
    t_c = gl.minimum(first + gl.minimum(o_c // G, TOKENS - 1), len_q - 1) + start_q  # idle rows repeat the last token
    o_q = (t_c.to(gl.int64) * sq_t + (i_h * G + o_c % G).to(gl.int64) * sq_h) * 8
    for i in gl.static_range(len(q_tiles)):
        copy(Q + WIDEST * i, q_tiles[i], o_q, None)
    p_k = K + (start_k.to(gl.int64) * sk_t + i_h.to(gl.int64) * sk_h) * 8
    p_v = V + (start_k.to(gl.int64) * sv_t + i_h.to(gl.int64) * sv_h) * 8
    block = gl.load(p_blocks)
    _fetch(0, block, k_tiles, v_tiles, p_k, p_v, len_k, sk_t, sv_t, B)
    after = gl.load(p_blocks + gl.minimum(1, steps - 1) // (B // BN))

    shift = first + len_k - len_q  # position of the first token
    scale2 = scale * LOG2E
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    acc = zeros(ROWS, VALUES, 8)
    for j in range(steps):
        members = gl.load(p_members + j // (B // BN)).to(WORD)
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()  # the keys and values are there, and nobody reads those of the step before
        if j + 1 < steps:  # ahead of the product: a branch while one is under way makes its pieces wait for each other
            _fetch(j + 1, after, k_tiles, v_tiles, p_k, p_v, len_k, sk_t, sv_t, B)
        s = gl.zeros([ROWS, BN], gl.float32, SCORES)
        for i in gl.static_range(len(q_tiles)):
            kt = k_tiles[i].index(j % 2).permute((1, 0))
            s = warpgroup_mma(q_tiles[i], kt, s, use_acc=i > 0, is_async=True)
        i_n = block * B + j % (B // BN) * BN
        block = after
        after = gl.load(p_blocks + gl.minimum(j + 2, steps - 1) // (B // BN))
        s = warpgroup_mma_wait(0, deps=(s,))
        if i_n + BN - 1 > shift:  # else every row sees all of the keys
            s = hide(s, token + (shift - i_n))
        member = ((members >> token.to(WORD)) & 1) != 0
        # A member sees a key of its first step, so that its maximum is finite. Others add exp2(-inf) = 0.
        m_new = gl.where(member, gl.maximum(m, gl.max(s, 1) * scale2), m)
        shrink = gl.exp2(m - gl.where(m_new == float("-inf"), 0.0, m_new))
        p = gl.exp2(s * scale2 - gl.where(member, m_new, float("inf"))[:, None])
        l = l * shrink + gl.sum(p, 1)
        m = m_new
        p = p.to(DTYPE)
        if len(VALUES) == 1:
            acc = (_add_values(p, v_tiles[0].index(j % 2), acc[0], shrink),)
            acc = (warpgroup_mma_wait(0, deps=(acc[0],)),)
        else:
            left = _add_values(p, v_tiles[0].index(j % 2), acc[0], shrink)
            right = _add_values(p, v_tiles[1].index(j % 2), acc[1], shrink)
            acc = warpgroup_mma_wait(0, deps=(left, right))

    some = l > 0
    end = gl.minimum(i_tile + TABLE_ROWS, len_q)  # the last part of a tile may be shorter
    row_c = start_q + first + o_c // G
    m_c = (o_c // G < TOKENS) & (first + o_c // G < end) & (row_c >= row0) & (row_c < row1)
    out_c = (row_c.to(gl.int64) * num_heads + i_h * G + o_c % G) * DV
    for i in gl.static_range(len(v_tiles)):
        _store_output(O + WIDEST * i, acc[i], gl.where(some, l, 1.0), out_c, m_c)
    row = start_q + first + token
    m_row = (token < TOKENS) & (first + token < end) & (row >= row0) & (row < row1)
    lse2 = gl.where(some, m + gl.log2(gl.where(some, l, 1.0)), float("-inf"))
    gl.store(LSE + (row.to(gl.int64) * num_heads + i_h * G + o_m % G), lse2, mask=m_row)


def popular_tokens(G: int) -> int:
    """Tokens of a program: a tile cut into as few equal parts as its rows have room for. One head a token does not pay:
    1.23 ms instead of 1.19 at T=65536 with four KV heads on an H100."""
    return cdiv(TILE, cdiv(TILE, ROWS.value // G)) if 1 < G <= ROWS.value else 0


def attend_popular(
    q: Tensor, k: Tensor, v: Tensor, popular: PopularBlocks, plan: Plan, chunk: Chunk, scale: float, o: Tensor,
    lse: Tensor,
) -> None:
    """Write the partial output and base-2 lse over popular blocks of the rows of a chunk that have any to o and lse.

    Args:
        q, k, v, o, lse: all rows, and the heads of the chunk; rows of q, k, v start at multiples of 16 bytes.
    """
    G = q.shape[1] // k.shape[1]
    strides = [x.stride(dim) // 8 for x in (q, k, v) for dim in (0, 1)]
    _popular_sm90_kernel[(popular.counts.numel(),)](
        q, k, v, *popular[:3], plan.q_tiles, plan.cu_q, plan.cu_k, o, lse, *strides,
        popular.tile0, chunk.row0, chunk.row1, chunk.heads, lse.stride(0), scale,
        D=q.shape[-1], DV=o.shape[-1], G=G, B=plan.config.slc_block, TOKENS=popular.tokens,
        MOST=popular.blocks.shape[-1], num_warps=8, maxnreg=128 if max(q.shape[-1], o.shape[-1]) <= 128 else 248,
    )  # fmt: skip
