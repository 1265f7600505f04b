"""Backward of the dense branches, Eq 8 and section 3.3.3, in one pass over their keys.

Keys are cut into blocks, and every block has the list of the queries that see it, as in the selected branch; here a
list is a run of neighbouring tokens, so it is written down instead of inverted. One pass then gives dK, dV and the
partial dQ of every (query, block), five products for each pair instead of the seven of two passes; *sum* adds the
partials of a row in the order of the blocks. No float atomics.

Partials take `blocks that a query sees * D` numbers a row, so queries are cut to fit the workspace as in `_gradient`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._gradient import Gradient, KeyBlocks, walk_keys
from nsattn.kernels._lists import BlockLists, Chunk, cut_lists, last_at_most
from nsattn.kernels._tile import bounds, next_power_of_2, row_delta
from nsattn.plan import Plan, cumulative


def key_blocks(cu: Tensor, total: int, size: int, **rule: int) -> KeyBlocks:
    """The packed keys of sequences that start at `cu`, cut into blocks; `rule`: stride, span, window."""
    return KeyBlocks(cu, cumulative((cu.diff() + size - 1) // size), total // size + len(cu) - 1, size, **rule)


def most_blocks(keys: KeyBlocks, longest: int) -> int:
    """Blocks that one query of a sequence of `longest` keys can see."""
    in_window = keys.window // keys.stride + 2  # keys
    return max(1, min(-(-longest // keys.size), -(-in_window // keys.size) + 1))


@triton.jit
def _run(CU_Q, CU_K, CU_KEYS, CU_BLK, blk, row0, row1, num_seqs, window, B: tl.constexpr, STRIDE: tl.constexpr,
         SPAN: tl.constexpr):
    """First row and number of the query rows row0 .. row1 - 1 that see keys of the packed blocks `blk`."""
    i_s = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, blk), num_seqs - 1)
    start_q, len_q = bounds(CU_Q, i_s)
    start_q = start_q.to(tl.int32)
    _, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    first_key = (blk - tl.load(CU_BLK + i_s)) * B
    # Blocks past the last sequence's end begin past its keys, or have none.
    some = (first_key < len_keys) & (blk < tl.load(CU_BLK + num_seqs))
    end0 = first_key * STRIDE + SPAN - 1
    end1 = (tl.minimum(first_key + B, len_keys) - 1) * STRIDE + SPAN - 1
    lo = start_q + tl.minimum(tl.maximum(end0 - shift, 0), len_q)
    hi = start_q + tl.minimum(tl.maximum(end1 - shift + window, 0), len_q)
    lo, hi = tl.maximum(lo, row0), tl.minimum(hi, row1)
    return lo, tl.where(some, tl.maximum(hi - lo, 0), 0)


@triton.jit(do_not_specialize=["row0", "row1", "num_seqs", "window", "num_blk", "num_lists", "pairs_per_item"])
def _run_counts_kernel(
    COUNTS, CU_Q, CU_K, CU_KEYS, CU_BLK, row0, row1, num_seqs, window, num_blk, num_lists, pairs_per_item,
    B: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, BL: tl.constexpr,
):
    """Lengths of BL lists, their items and their slices, as `_lists._count_kernel` writes them."""
    i_list = tl.program_id(0) * BL + tl.arange(0, BL)
    m = i_list < num_lists
    _, total = _run(CU_Q, CU_K, CU_KEYS, CU_BLK, i_list % num_blk, row0, row1, num_seqs, window, B, STRIDE, SPAN)
    pieces = (total + pairs_per_item - 1) // pairs_per_item
    p = COUNTS + 1 + i_list
    tl.store(p, total, mask=m)
    tl.store(p + num_lists + 1, pieces, mask=m)
    tl.store(p + 2 * (num_lists + 1), tl.where(pieces > 1, pieces, 0), mask=m)
    if tl.program_id(0) == 0:
        for i in range(3):
            tl.store(COUNTS + i * (num_lists + 1), 0)


@triton.jit(do_not_specialize=["row0", "row1", "num_seqs", "window", "num_blk"])
def _run_tokens_kernel(
    TOKENS, STARTS, CU_Q, CU_K, CU_KEYS, CU_BLK, row0, row1, num_seqs, window, num_blk,
    B: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, BT: tl.constexpr,
):
    """BT entries of a list: query rows, one after the other."""
    i_list = tl.program_id(0)
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    blk = tl.full([1], i_list % num_blk, tl.int32)
    lo, total = _run(CU_Q, CU_K, CU_KEYS, CU_BLK, blk, row0, row1, num_seqs, window, B, STRIDE, SPAN)
    tl.store(TOKENS + tl.load(STARTS + i_list).to(tl.int64) + o_t, lo + o_t, mask=o_t < total)


def runs(plan: Plan, keys: KeyBlocks, chunk: Chunk, N: int, *, pairs_per_item: int) -> BlockLists:
    """The block lists of a chunk; `inverse` is left out, since a place follows from the list's start."""
    device, num_lists = keys.cu.device, chunk.heads * keys.total_blk
    num_pairs = chunk.rows * chunk.heads * N
    tables = (plan.cu_q, plan.cu_k, keys.cu, keys.cu_blk)
    rule = {"B": keys.size, "STRIDE": keys.stride, "SPAN": keys.span}
    counts = torch.empty(3 * (num_lists + 1), dtype=torch.int32, device=device)
    BL, BT = 64, 1024
    _run_counts_kernel[(triton.cdiv(num_lists, BL),)](
        counts, *tables, chunk.row0, chunk.row1, plan.num_seqs, keys.window, keys.total_blk, num_lists, pairs_per_item,
        **rule, BL=BL, num_warps=2,
    )  # fmt: skip
    starts = counts.cumsum(0, dtype=torch.int32)
    tokens = torch.empty(num_pairs, dtype=torch.int32, device=device)
    _run_tokens_kernel[(num_lists, triton.cdiv(min(chunk.rows, plan.max_q), BT))](
        tokens, starts, *tables, chunk.row0, chunk.row1, plan.num_seqs, keys.window, keys.total_blk,
        **rule, BT=BT, num_warps=4,
    )  # fmt: skip
    return cut_lists(
        starts, tokens, starts[: num_lists + 1], keys.cu_blk, keys.total_blk, 1, plan.num_seqs, num_pairs, num_lists,
        pairs_per_item,
    )  # fmt: skip


@triton.jit(do_not_specialize=["row0", "row1", "num_seqs", "window", "num_blk", "heads", "num_heads"])
def _sum_run_dq_kernel(
    DQP, STARTS, DQ, CU_Q, CU_K, CU_KEYS, CU_BLK, row0, row1, num_seqs, window, num_blk, heads, num_heads,
    D: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, SUBS: tl.constexpr, B: tl.constexpr, STRIDE: tl.constexpr,
    SPAN: tl.constexpr, BT: tl.constexpr,
):
    """dQ of BT tokens of one head: the sum of their partials, block by block, in float32."""
    ACC: tl.constexpr = tl.float64 if DQP.dtype.element_ty == tl.float64 else tl.float32
    i_head = tl.program_id(1)
    i_h = i_head // G
    row = row0 + tl.program_id(0) * BT + tl.arange(0, BT)
    m_row = row < row1
    o_d = tl.arange(0, BD)
    i_s = tl.minimum(last_at_most(CU_Q, num_seqs + 1, row), num_seqs - 1)
    start_q, len_q = bounds(CU_Q, i_s)
    _, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    t = row - start_q.to(tl.int32) + shift
    real = m_row & (row < tl.load(CU_Q + num_seqs)) & (t >= 0)
    # Keys that ended before the window, and keys that end at or before t.
    key0 = tl.maximum(t - window + 1 - SPAN + STRIDE, 0) // STRIDE
    key1 = tl.minimum(tl.maximum(t + 1 - SPAN + STRIDE, 0) // STRIDE, len_keys)
    blk0 = tl.load(CU_BLK + i_s)
    first = tl.where(real & (key0 < key1), blk0 + key0 // B, 0x7FFFFFFF)
    last = tl.where(real & (key0 < key1), blk0 + (key1 - 1) // B, -1)
    acc = tl.zeros([BT, BD], ACC)
    for blk in range(tl.min(first, 0), tl.max(last, 0) + 1):
        i_blk = tl.full([1], 0, tl.int32) + blk
        lo, _length = _run(CU_Q, CU_K, CU_KEYS, CU_BLK, i_blk, row0, row1, num_seqs, window, B, STRIDE, SPAN)
        m = (blk >= first) & (blk <= last)
        place = tl.load(STARTS + i_h * num_blk + blk) + row - lo
        for i_sub in range(SUBS):
            p = DQP + (((place.to(tl.int64) * G + i_head % G) * SUBS + i_sub) * D)[:, None] + o_d[None, :]
            acc += tl.load(p, mask=m[:, None] & (o_d < D)[None, :], other=0.0).to(ACC)
    p_dq = DQ + ((row.to(tl.int64) * num_heads + i_head) * D)[:, None] + o_d[None, :]
    tl.store(p_dq, acc.to(DQ.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


def backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, plan: Plan,
    keys: KeyBlocks, *, scale: float, workspace: int, kernel: Gradient, longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of attention to `keys`, of which a sequence has at most `longest`."""
    (_, Hq, D), G = q.shape, q.shape[1] // k.shape[1]
    N = most_blocks(keys, longest)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    BD = next_power_of_2(D)
    BT = max(1, 2048 // BD)

    def lists_of(chunk: Chunk) -> BlockLists:
        return runs(plan, keys, chunk, N, pairs_per_item=kernel.pairs_per_item(chunk.group))

    def sum_dq(chunk: Chunk, lists: BlockLists, partials: Tensor) -> None:
        _sum_run_dq_kernel[(triton.cdiv(chunk.rows, BT), chunk.heads * chunk.group)](
            partials, lists.inverse, chunk.of_queries(dq, G), plan.cu_q, plan.cu_k, keys.cu, keys.cu_blk, chunk.row0,
            chunk.row1, plan.num_seqs, keys.window, keys.total_blk, chunk.heads, Hq, D=D, BD=BD, G=chunk.group,
            SUBS=kernel.parts, B=keys.size, STRIDE=keys.stride, SPAN=keys.span, BT=BT, num_warps=2,
        )  # fmt: skip

    delta = row_delta(o, do, dlse)
    dk, dv = walk_keys(
        do, q, k, v, lse, delta, lists_of, N, plan, keys, scale=scale, workspace=workspace, kernel=kernel,
        take_dq=sum_dq,
    )  # fmt: skip
    return dq, dk, dv
