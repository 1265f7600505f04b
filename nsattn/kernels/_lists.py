"""Block lists: the selection turned around, and the gradient of keys and values that walks it.

The selection names, for each token, the blocks it chose. The KV-major schedule needs the inverse: for each block the
ascending list of tokens that chose it. A *pair* is one (token, slot) entry; a *row* is one query head of a pair, so
row r of a list is pair r // G, head r % G, and any group size G fills a tile. Lists are cut into *items*, one program
each. Everything is built on the device by a stable sort: no host sync, no [blocks x tokens] table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsattn.kernels._tile import LOG2E, bounds, dot, load_rows, lse_dtype, next_power_of_2, shared_memory
from nsattn.plan import TILE, Plan

LIST_BYTES = 8  # per pair, as long as the lists live: its token and its place
SLACK = 64 << 20  # what lists and statistics may take beyond the workspace, which counts for the partials


class BlockLists(NamedTuple):
    """Inverse of a selection, for the rows and KV heads of a `Chunk`. All int32."""

    tokens: Tensor  # [pairs] query row of each pair, sorted by (KV head, token range, block, token); unused pairs last
    inverse: Tensor  # [rows, heads, N] place of each pair in `tokens`, -1 where the entry is ignored
    items: Tensor  # [items, 6] KV head, sequence, block in the sequence, first pair, number of pairs, slice or -1
    slices: Tensor  # [lists + 1] first slice of each list that is cut into several items
    num_slices: int  # upper bound


class Chunk(NamedTuple):
    """Part of a batch that one launch works on, so that scratch stays below the workspace."""

    row0: int
    row1: int
    head0: int
    head1: int

    @property
    def heads(self) -> int:
        return self.head1 - self.head0

    @property
    def rows(self) -> int:
        return self.row1 - self.row0


def chunks(total: int, num_kv_heads: int, bytes_per_row: int, workspace: int) -> Iterator[Chunk]:
    """Cut by KV heads first, which costs nothing; by token rows only if one head does not fit the workspace."""
    if total == 0:
        return
    budget = workspace + SLACK if workspace >= SLACK else workspace
    heads = min(num_kv_heads, budget // (total * bytes_per_row))
    rows = total
    if heads == 0:
        heads = 1
        pieces = -(-total * bytes_per_row // budget)
        rows = -(-total // (pieces * TILE)) * TILE  # equal pieces of whole tiles
    for head0 in range(0, num_kv_heads, heads):
        for row0 in range(0, total, rows):
            yield Chunk(row0, min(row0 + rows, total), head0, min(head0 + heads, num_kv_heads))


@triton.jit
def _pair_keys_kernel(
    IDX, KEYS, Q_TILES, CU_Q, CU_K, CU_BLK, row0, row1, head0, heads, num_kv_heads, span, ranges, num_blk,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, BT: tl.constexpr,
):
    """Sort key of the pairs of BT tokens of one KV head: (head, token range, block of the batch); ignored pairs keep
    their initial key, the largest."""
    i_tile, i_h = tl.program_id(0) // (64 // BT), tl.program_id(1)
    i_s = tl.load(Q_TILES + 2 * i_tile)
    if i_s < 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    _, len_k = bounds(CU_K, i_s)
    o_t = tl.load(Q_TILES + 2 * i_tile + 1) + (tl.program_id(0) % (64 // BT)) * BT + tl.arange(0, BT)
    row = start_q + o_t
    o_n = tl.arange(0, BN)
    m_t = (o_t < len_q) & (row >= row0) & (row < row1)
    m = m_t[:, None] & (o_n < N)[None, :]
    p_idx = (row * num_kv_heads + head0 + i_h)[:, None] * N
    # [BT, BN]
    block = tl.load(IDX + p_idx + o_n[None, :], mask=m, other=-1)
    position = o_t + len_k - len_q
    # Dividing the position keeps the test free of overflow for hostile block numbers.
    valid = m & (block >= 0) & (position[:, None] >= 0) & (block <= position[:, None] // B)
    for i in range(N - 1):  # an entry that repeats an earlier one is ignored
        earlier = tl.load(IDX + p_idx + i, mask=m_t[:, None], other=-1)
        valid = valid & ((o_n[None, :] <= i) | (block != earlier))
    part = ((row - row0) // span).to(tl.int32)[:, None]
    key = (i_h * ranges + part) * num_blk + tl.load(CU_BLK + i_s) + block
    tl.store(KEYS + ((row - row0) * heads + i_h)[:, None] * N + o_n[None, :], key, mask=valid)


@triton.jit
def _places_kernel(KEYS, ORDER, TOKENS, INVERSE, num_pairs, per_token, row0, num_lists, BP: tl.constexpr):
    """Token of each place in the lists, and the place of each pair, for BP places."""
    i = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    m = i < num_pairs
    pair = tl.load(ORDER + i, mask=m, other=0)
    tl.store(TOKENS + i, (pair // per_token).to(tl.int32) + row0, mask=m)
    used = tl.load(KEYS + i, mask=m, other=num_lists) < num_lists
    tl.store(INVERSE + pair, tl.where(used, i.to(tl.int32), -1), mask=m)


@triton.jit
def _cut_kernel(STARTS, PIECES, num_lists, pairs_per_item, BL: tl.constexpr):
    """Number of items of BL lists, and of slices: as many if a list is cut, else none. A zero goes in front."""
    i = tl.program_id(0) * BL + tl.arange(0, BL)
    m = i <= num_lists
    is_list = m & (i > 0)
    count = tl.load(STARTS + i, mask=is_list, other=0) - tl.load(STARTS + i - 1, mask=is_list, other=0)
    pieces = (count + pairs_per_item - 1) // pairs_per_item
    tl.store(PIECES + i, pieces, mask=m)
    tl.store(PIECES + num_lists + 1 + i, tl.where(pieces > 1, pieces, 0), mask=m)


@triton.jit
def last_at_most(P, size, x):
    """Index of the last entry of the ascending array P[:size] that is <= x, element by element; 0 if none is."""
    low = tl.zeros_like(x)
    high = low + size - 1
    while tl.max(high - low, 0) > 0:
        middle = (low + high + 1) // 2
        left = tl.load(P + middle) <= x
        low = tl.where(left, middle, low)
        high = tl.where(left, high, tl.maximum(middle - 1, low))
    return low


@triton.jit
def _items_kernel(
    STARTS, FIRST, CU_BLK, ITEMS, num_lists, num_items, pairs_per_item, num_blk, ranges, num_seqs, BI: tl.constexpr,
):
    """The six numbers of BI items, see `BlockLists.items`; unused items get no pairs."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    m = i < num_items
    # The last list whose first item is at most i; empty lists share that number with the next and come before it.
    i_list = tl.minimum(last_at_most(FIRST, num_lists + 1, i), num_lists - 1)
    first_item = tl.load(FIRST + i_list)
    items_here = tl.load(FIRST + i_list + 1) - first_item
    piece = i - first_item
    first = tl.load(STARTS + i_list) + piece * pairs_per_item
    count = tl.minimum(tl.load(STARTS + i_list + 1) - first, pairs_per_item)
    block = i_list % num_blk
    seq = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, block), num_seqs - 1)
    slot = tl.where(items_here > 1, tl.load(FIRST + num_lists + 1 + i_list) + piece, -1)
    p = ITEMS + i * 6
    tl.store(p, i_list // (num_blk * ranges), mask=m)
    tl.store(p + 1, seq, mask=m)
    tl.store(p + 2, block - tl.load(CU_BLK + seq), mask=m)
    tl.store(p + 3, first, mask=m)
    tl.store(p + 4, tl.where(piece < items_here, tl.maximum(count, 0), 0), mask=m)
    tl.store(p + 5, slot, mask=m)


def invert(block_idx: Tensor, plan: Plan, chunk: Chunk, *, pairs_per_item: int, span: int | None = None) -> BlockLists:
    """Invert a selection. Entries that are negative, repeat, lie in the future or outside the sequence are dropped.

    Args:
        block_idx: int32 `[total_q, Hkv, N]`.
        chunk: rows and KV heads to take.
        pairs_per_item: longest piece of a list that one program gets.
        span: cut every list by ranges of so many token rows, and walk all blocks of a range before the next: the
            queries of a range then stay in the L2 cache. Default: no cut.
    """
    N, device = block_idx.shape[-1], block_idx.device
    span = span or chunk.rows
    ranges = -(-chunk.rows // span)
    num_lists = chunk.heads * ranges * plan.total_blk
    num_pairs = chunk.rows * chunk.heads * N
    keys = torch.full((num_pairs,), num_lists, dtype=torch.int32, device=device)
    BT = 16
    grid = (plan.q_tiles.shape[0] * (TILE // BT), chunk.heads)
    _pair_keys_kernel[grid](
        block_idx, keys, plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_blk, chunk.row0, chunk.row1, chunk.head0,
        chunk.heads, block_idx.shape[1], span, ranges, plan.total_blk,
        N=N, BN=triton.next_power_of_2(N), B=plan.config.slc_block, BT=BT, num_warps=1,
    )
    keys, order = torch.sort(keys, stable=True)
    tokens, inverse = torch.empty_like(keys), torch.empty_like(keys)
    BP = 1024
    _places_kernel[(triton.cdiv(num_pairs, BP),)](
        keys, order, tokens, inverse, num_pairs, chunk.heads * N, chunk.row0, num_lists, BP=BP
    )
    lists = torch.arange(num_lists + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(keys, lists, out_int32=True)
    pieces = torch.empty(2, num_lists + 1, dtype=torch.int32, device=device)
    BL = 256
    _cut_kernel[(triton.cdiv(num_lists + 1, BL),)](starts, pieces, num_lists, pairs_per_item, BL=BL)
    firsts = pieces.cumsum(1, dtype=torch.int32)  # first item and first slice of each list
    items = torch.empty(num_lists + num_pairs // pairs_per_item, 6, dtype=torch.int32, device=device)
    BI = 128
    _items_kernel[(triton.cdiv(items.shape[0], BI),)](
        starts, firsts, plan.cu_blk, items, num_lists, items.shape[0], pairs_per_item, plan.total_blk, ranges,
        plan.num_seqs, BI=BI,
    )
    # A list cut into p > 1 items holds more than (p - 1) * pairs_per_item pairs, so p <= 2 * pairs / pairs_per_item.
    num_slices = 2 * num_pairs // pairs_per_item
    return BlockLists(tokens, inverse.view(chunk.rows, chunk.heads, N), items, firsts[1], num_slices)


@triton.jit
def load_item(ITEMS, i):
    """KV head, sequence, block, first pair (int64), number of pairs and slice of an item."""
    p = ITEMS + 6 * i
    return (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3).to(tl.int64), tl.load(p + 4), tl.load(p + 5))


def gradient_tile(q: Tensor, v: Tensor, B: int) -> tuple[int, int, int, int]:
    """Rows of a tile, keys of a sub-block, warps, stages of the gradient kernel: the first that fits the chip.

    dK^T and dV^T of a sub-block live in registers, (BD + BDV) * BK floats, beside dQ of a tile, BM * BD. At D = 128 a
    study on the H200 found 128 rows, 64 keys, 8 warps, 2 stages best without spills; wider heads take fewer of both.
    """
    BD, BDV = next_power_of_2(q.shape[-1]), next_power_of_2(v.shape[-1])
    size = q.element_size()
    if size > 2:
        tiles = [(32, 32, 4, 1), (16, 16, 4, 1)]
    elif max(BD, BDV) <= 64:
        tiles = [(64, 64, 4, 2), (64, 32, 4, 1)]
    elif max(BD, BDV) <= 128:
        tiles = [(128, 64, 8, 2), (128, 64, 8, 1), (64, 32, 8, 1)]
    else:
        tiles = [(64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)]
    tiles = [(BM, min(B, BK), warps, stages) for BM, BK, warps, stages in tiles]
    limit = shared_memory(q.device) - 2048

    def fits(BM: int, BK: int, warps: int, stages: int) -> bool:
        return size * ((BM * stages + BK) * (BD + BDV) + 2 * BM * BK) <= limit

    return next((tile for tile in tiles if fits(*tile)), tiles[-1])


@triton.jit
def _gradient_kernel(
    Q, K, V, DO, LSE, DELTA, TOKENS, ITEMS, CU_Q, CU_K, DQP, DK, DV, SLICES,
    sq_t, sq_h, sk_t, sk_h, sv_t, sv_h, sdk_t, sdk_h, sdv_t, sdv_h, head0, kv_head0, num_heads, scale,
    D: tl.constexpr, DVAL: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    BK: tl.constexpr, BM: tl.constexpr, WITH_DQ: tl.constexpr, ADD: tl.constexpr,
):
    """dK, dV of BK keys of a block over one item of its list, and with WITH_DQ the dQ partial of every row (Eq 11, 12).

    Scores are kept as [rows, keys] and dK, dV as their transposes, so that no product takes a transposed accumulator.
    """
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    SUBS: tl.constexpr = B // BK
    i_item, i_sub = tl.program_id(0) // SUBS, tl.program_id(0) % SUBS
    i_h, i_s, block, first, count, slot = load_item(ITEMS, i_item)
    if count == 0:
        return
    start_q, len_q = bounds(CU_Q, i_s)
    start_k, len_k = bounds(CU_K, i_s)
    o_k = block * B + i_sub * BK + tl.arange(0, BK)
    m_k = o_k < len_k
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BDV)
    kv_head = (kv_head0 + i_h).to(tl.int64)
    b_k = load_rows(K + kv_head * sk_h, start_k + o_k, o_d, sk_t, m_k, D)
    b_v = load_rows(V + kv_head * sv_h, start_k + o_k, o_v, sv_t, m_k, DVAL)
    b_dk = tl.zeros([BD, BK], ACC)
    b_dv = tl.zeros([BDV, BK], ACC)
    for r0 in range(0, count * G, BM):
        row = r0 + tl.arange(0, BM)
        m_r = row < count * G
        row = tl.minimum(row, count * G - 1)  # the tail repeats the last row instead of masking every load
        token = tl.load(TOKENS + first + row // G)
        head = (kv_head0 + i_h) * G + row % G
        wide = token.to(tl.int64)
        # [BM, BD], [BM, BDV]
        b_q = load_rows(Q, wide * sq_t + head * sq_h, o_d, 1, row >= 0, D)
        b_do = load_rows(DO, (wide * num_heads + head) * DVAL, o_v, 1, row >= 0, DVAL)
        lse2 = tl.load(LSE + wide * num_heads + head) * LOG2E
        delta = tl.load(DELTA + wide * num_heads + head)
        position = token - start_q.to(tl.int32) + len_k - len_q
        s2 = dot(b_q, tl.trans(b_k)) * (scale * LOG2E)
        visible = (o_k[None, :] <= position[:, None]) & m_r[:, None]
        p = tl.where(visible, tl.exp2(s2 - lse2[:, None]), 0.0)
        dp = dot(b_do, tl.trans(b_v))
        ds = (p * (dp - delta[:, None]) * scale).to(b_q.dtype)
        b_dv += dot(tl.trans(b_do), p.to(b_do.dtype))
        b_dk += dot(tl.trans(b_q), ds)
        if WITH_DQ:
            o_p = ((first * G + row) * SUBS + i_sub) * D
            dq = dot(ds, b_k)
            tl.store(DQP + o_p[:, None] + o_d[None, :], dq.to(DQP.dtype.element_ty),
                     mask=m_r[:, None] & (o_d < D)[None, :])
    m_dk = (o_d < D)[:, None] & m_k[None, :]
    m_dv = (o_v < DVAL)[:, None] & m_k[None, :]
    if slot >= 0:
        p_slice = SLICES + slot.to(tl.int64) * (B * (D + DVAL)) + (i_sub * BK + tl.arange(0, BK))[None, :] * (D + DVAL)
        tl.store(p_slice + o_d[:, None], b_dk, mask=m_dk)
        tl.store(p_slice + D + o_v[:, None], b_dv, mask=m_dv)
    else:
        out_head = (head0 + i_h).to(tl.int64)
        p_dk = DK + out_head * sdk_h + (start_k + o_k)[None, :] * sdk_t + o_d[:, None]
        p_dv = DV + out_head * sdv_h + (start_k + o_k)[None, :] * sdv_t + o_v[:, None]
        if ADD:
            b_dk += tl.load(p_dk, mask=m_dk, other=0.0)
            b_dv += tl.load(p_dv, mask=m_dv, other=0.0)
        tl.store(p_dk, b_dk.to(DK.dtype.element_ty), mask=m_dk)
        tl.store(p_dv, b_dv.to(DV.dtype.element_ty), mask=m_dv)


@triton.jit
def _sum_slices_kernel(
    SLICES, FIRST, DK, DV, CU_K, CU_BLK, sdk_t, sdk_h, sdv_t, sdv_h, head0, num_blk, num_seqs,
    D: tl.constexpr, DVAL: tl.constexpr, BDD: tl.constexpr, B: tl.constexpr, BR: tl.constexpr, ADD: tl.constexpr,
):
    """dK, dV of BR keys of a block whose list was cut: the sum of its slices, in order."""
    ACC: tl.constexpr = SLICES.dtype.element_ty
    i_list = tl.program_id(0)
    first = tl.load(FIRST + i_list).to(tl.int64)
    last = tl.load(FIRST + i_list + 1).to(tl.int64)
    if first == last:
        return
    blk = i_list % num_blk
    i_s = tl.max(last_at_most(CU_BLK, num_seqs, tl.full([1], blk, tl.int32)), 0)
    start_k, len_k = bounds(CU_K, i_s)
    o_r = tl.program_id(1) * BR + tl.arange(0, BR)
    o_k = (blk - tl.load(CU_BLK + i_s)) * B + o_r
    o_d = tl.arange(0, BDD)
    acc = tl.zeros([BR, BDD], ACC)
    for i in range(first, last):
        p = SLICES + i * (B * (D + DVAL)) + o_r[:, None] * (D + DVAL) + o_d[None, :]
        acc += tl.load(p, mask=(o_d < D + DVAL)[None, :] & (o_k < len_k)[:, None], other=0.0)
    head = (head0 + i_list // num_blk).to(tl.int64)
    m_k = (o_k < len_k)[:, None]
    p_dk = DK + head * sdk_h + (start_k + o_k)[:, None] * sdk_t + o_d[None, :]
    p_dv = DV + head * sdv_h + (start_k + o_k)[:, None] * sdv_t + (o_d - D)[None, :]
    m_dk, m_dv = m_k & (o_d < D)[None, :], m_k & ((o_d >= D) & (o_d < D + DVAL))[None, :]
    if ADD:
        acc += tl.load(p_dk, mask=m_dk, other=0.0) + tl.load(p_dv, mask=m_dv, other=0.0)
    tl.store(p_dk, acc.to(DK.dtype.element_ty), mask=m_dk)
    tl.store(p_dv, acc.to(DV.dtype.element_ty), mask=m_dv)


def pairs_per_gradient_item(G: int) -> int:
    """Long items mean few slices of dK, dV; beyond 4096 pairs or 16384 rows the popular blocks become the tail."""
    return min(4096, -(-16384 // G))


def selected_dkv(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, block_idx: Tensor, plan: Plan, *,
    scale: float, workspace: int, take_dq: Callable[[Chunk, BlockLists, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """dk and dv of the selected branch.

    Args:
        take_dq: if given, called for each chunk with the dQ partials `[pairs * G * sub-blocks, D]` in list order, which
            the same pass over the lists then writes. They are valid until it returns.
    """
    T, D, Dv, Hkv, N = q.shape[0], q.shape[-1], v.shape[-1], k.shape[1], block_idx.shape[-1]
    G, B = q.shape[1] // Hkv, plan.config.slc_block
    BM, BK, warps, stages = gradient_tile(q, v, B)
    kind = lse_dtype(q)
    pairs_per_item = pairs_per_gradient_item(G)
    per_pair = LIST_BYTES + 2 * B * (D + Dv) * kind.itemsize // pairs_per_item
    if take_dq:
        per_pair += G * D * (B // BK) * q.element_size()
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for chunk in chunks(T, Hkv, N * per_pair, workspace):
        by_rows = chunk.rows < T  # the lists of one head come in several chunks: sum them in float32
        if by_rows and chunk.row0 == 0:
            sum_k = torch.zeros(k.shape[0], 1, D, dtype=kind, device=k.device)
            sum_v = torch.zeros(k.shape[0], 1, Dv, dtype=kind, device=k.device)
        out_k, out_v, head0 = (sum_k, sum_v, 0) if by_rows else (dk, dv, chunk.head0)
        lists = invert(block_idx, plan, chunk, pairs_per_item=pairs_per_item)
        partial_rows = chunk.rows * chunk.heads * N * G * (B // BK) if take_dq else 0
        dq_partials = torch.empty(partial_rows, D, dtype=q.dtype, device=q.device)
        slices = torch.empty(lists.num_slices * B * (D + Dv), dtype=kind, device=q.device)
        out_strides = (out_k.stride(0), out_k.stride(1), out_v.stride(0), out_v.stride(1))
        _gradient_kernel[(lists.items.shape[0] * (B // BK),)](
            q, k, v, do, lse, delta, lists.tokens, lists.items, plan.cu_q, plan.cu_k, dq_partials, out_k, out_v, slices,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *out_strides,
            head0, chunk.head0, q.shape[1], scale,
            D=D, DVAL=Dv, BD=next_power_of_2(D), BDV=next_power_of_2(Dv), G=G, B=B, BK=BK, BM=BM,
            WITH_DQ=take_dq is not None, ADD=by_rows, num_warps=warps, num_stages=stages,
        )
        BR = 16
        _sum_slices_kernel[(lists.slices.shape[0] - 1, B // BR)](
            slices, lists.slices, out_k, out_v, plan.cu_k, plan.cu_blk, *out_strides,
            head0, plan.total_blk, plan.num_seqs,
            D=D, DVAL=Dv, BDD=next_power_of_2(D + Dv), B=B, BR=BR, ADD=by_rows, num_warps=4,
        )
        if take_dq:
            take_dq(chunk, lists, dq_partials)
        if by_rows and chunk.row1 == T:
            dk[:, chunk.head0 : chunk.head1] = sum_k
            dv[:, chunk.head0 : chunk.head1] = sum_v
        del lists, dq_partials, slices  # before the next chunk allocates its own
    return dk, dv
