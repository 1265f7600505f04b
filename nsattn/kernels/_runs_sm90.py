"""dK and dV of the dense branches, Eq 8 and section 3.3.3, by the gradient kernel of the selected branch.

Keys are cut into blocks, and every block has the list of the queries that see it, as in the selected branch; here a
list is a run of neighbouring tokens, so it is written down instead of inverted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._gradient import Gradient, KeyBlocks, walk_keys
from nsattn.kernels._lists import BlockLists, Chunk, cut_lists, last_at_most
from nsattn.kernels._tile import bounds
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


def key_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, plan: Plan, keys: KeyBlocks, *,
    scale: float, workspace: int, kernel: Gradient, longest: int,
) -> tuple[Tensor, Tensor]:
    """dk and dv of attention to `keys`, of which a sequence has at most `longest`. See `walk_keys`."""
    N = most_blocks(keys, longest)

    def lists_of(chunk: Chunk) -> BlockLists:
        return runs(plan, keys, chunk, N, pairs_per_item=kernel.pairs_per_item(chunk.group))

    return walk_keys(
        do, q, k, v, lse, delta, lists_of, N, plan, keys, scale=scale, workspace=workspace, kernel=kernel,
    )  # fmt: skip
