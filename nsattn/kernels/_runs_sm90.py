"""dK and dV of the dense branches, Eq 8 and section 3.3.3, chunk by chunk: which program does what.

Keys are cut into blocks, and every block has the list of the queries that see it, as in the selected branch. Here a
list is a run of neighbouring query rows, so nothing is inverted and nothing stored but its items. The kernel is
`_dense_keys_sm90`; in tests also the plain one of `_gradient`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._chunks import Chunk
from nsattn.kernels._gradient import UNLIMITED, Gradient, KeyBlocks, key_rest, slice_bytes, walk_keys
from nsattn.kernels._lists import BlockLists, Cut, most_pairs
from nsattn.kernels._tile import bounds, cdiv, last_at_most
from nsattn.plan import Plan


@triton.jit
def _run(
    CU_Q, CU_K, CU_KEYS, CU_BLK, blk, row0, row1, num_seqs, window,
    B: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr,
):
    """The query rows row0 .. row1 - 1 that see keys of the packed blocks `blk`: sequence and block in it, first row,
    number."""
    i_s = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, blk), num_seqs - 1)
    start_q, len_q = bounds(CU_Q, i_s)
    start_q = start_q.to(tl.int32)
    _, len_keys = bounds(CU_KEYS, i_s)
    shift = bounds(CU_K, i_s)[1] - len_q
    block = blk - tl.load(CU_BLK + i_s)
    first_key = block * B
    # Blocks past the last sequence's end begin past its keys, or have none.
    some = (first_key < len_keys) & (blk < tl.load(CU_BLK + num_seqs))
    end0 = first_key * STRIDE + SPAN - 1
    end1 = (tl.minimum(first_key + B, len_keys) - 1) * STRIDE + SPAN - 1
    lo = start_q + tl.minimum(tl.maximum(end0 - shift, 0), len_q)
    hi = start_q + tl.minimum(tl.maximum(end1 - shift + window, 0), len_q)
    lo, hi = tl.maximum(lo, row0), tl.minimum(hi, row1)
    return i_s, block, lo, tl.where(some, tl.maximum(hi - lo, 0), 0)


@triton.jit(
    do_not_specialize=[
        "row0", "row1", "num_seqs", "window", "num_blk", "num_lists", "pieces", "pairs", "short_pairs", "short",
    ]
)
def _run_items_kernel(
    ITEMS, SLICES, CU_Q, CU_K, CU_KEYS, CU_BLK, row0, row1, num_seqs, window, num_blk, num_lists, pieces,
    pairs, short_pairs, short,
    B: tl.constexpr, STRIDE: tl.constexpr, SPAN: tl.constexpr, BI: tl.constexpr,
):
    """BI items: every list has room for `pieces` of them, and item i fills slice i if its list has several."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    i_list, piece = i // pieces, i % pieces
    m = i_list < num_lists
    seq, block, lo, total = _run(
        CU_Q, CU_K, CU_KEYS, CU_BLK, i_list % num_blk, row0, row1, num_seqs, window, B, STRIDE, SPAN
    )
    most = most_pairs(CU_Q, seq, pairs, short_pairs, short)
    first = piece * most
    # Longer than the plan's bound on the lengths: there is no room, what comes after the last piece is dropped.
    several = (total > most) & (pieces > 1)
    p = ITEMS + i * 6
    tl.store(p, i_list // num_blk, mask=m)
    tl.store(p + 1, seq, mask=m)
    tl.store(p + 2, block, mask=m)
    tl.store(p + 3, lo + first, mask=m)
    tl.store(p + 4, tl.minimum(tl.maximum(total - first, 0), most), mask=m)
    tl.store(p + 5, tl.where(several, i, -1), mask=m)
    used = tl.where(several, tl.minimum((total + most - 1) // most, pieces), 0)
    tl.store(SLICES + 2 * i_list, i, mask=m & (piece == 0))
    tl.store(SLICES + 2 * i_list + 1, i + used, mask=m & (piece == 0))


def most_pieces(plan: Plan, keys: KeyBlocks, rows: int, cut: Cut) -> int:
    """Items of the longest list, for so many query rows: those that see some key of a block."""
    longest = min(rows, plan.max_q, (keys.size - 1) * keys.stride + keys.window)
    return max(1, -(-longest // cut.pairs), -(-min(longest, cut.short) // cut.short_pairs))


def runs(plan: Plan, keys: KeyBlocks, chunk: Chunk, *, cut: Cut) -> BlockLists:
    """The block lists of a chunk; an item's first pair is its first query row."""
    device, num_lists = keys.cu.device, chunk.heads * keys.total_blk
    pieces = most_pieces(plan, keys, chunk.rows, cut)
    items = torch.empty(num_lists * pieces, 6, dtype=torch.int32, device=device)
    slices = torch.empty(num_lists, 2, dtype=torch.int32, device=device)
    BI = 128
    _run_items_kernel[(cdiv(len(items), BI),)](
        items, slices, plan.cu_q, plan.cu_k, keys.cu, keys.cu_blk, chunk.row0, chunk.row1, plan.num_seqs, keys.window,
        keys.total_blk, num_lists, pieces, *cut,
        B=keys.size, STRIDE=keys.stride, SPAN=keys.span, BI=BI, num_warps=4,
    )  # fmt: skip
    return BlockLists(None, None, items, slices, len(items) if pieces > 1 else 0, by_block=False)


def key_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Plan, keys: KeyBlocks, *,
    scale: float, workspace: int, kernel: Gradient,
) -> tuple[Tensor, Tensor]:
    """dk and dv of attention to `keys`. See `walk_keys`."""

    def cut_of(group: int) -> Cut:
        cut = kernel.cut(group)  # in a window all lists are alike, and short
        return cut if keys.window >= UNLIMITED else cut._replace(short_pairs=cut.pairs)

    def size(rows: int, heads: int, group: int) -> int:
        pieces = most_pieces(plan, keys, rows, cut_of(group))
        lists = heads * keys.total_blk
        slices = lists * pieces * slice_bytes(q, v, keys.size) if pieces > 1 else 0
        return slices + 4 * lists * (6 * pieces + 2) + key_rest(q, k, v, plan, rows, group, workspace)

    def lists_of(chunk: Chunk) -> BlockLists:
        return runs(plan, keys, chunk, cut=cut_of(chunk.group))

    return walk_keys(
        do, q, k, v, lse, delta, lists_of, size, plan, keys, scale=scale, workspace=workspace, kernel=kernel
    )
