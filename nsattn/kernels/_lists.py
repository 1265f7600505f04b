"""Block lists: the selection turned around.

The selection names, for each token, the blocks it chose. The KV-major schedule needs the inverse: for each block the
ascending list of tokens that chose it. A *pair* is one (token, slot) entry; a *row* is one query head of a pair, so
row r of a list is pair r // G, head r % G, and any group size G fills a tile. Lists are cut into *items*, one program
each.

Everything is built on the device, without a sort, in four passes over *membership masks*: for each (block, tile of 64
query tokens) a 64-bit word that tells which tokens of the tile chose the block.

1. mask: each pair sets its bit. An integer `or`, so the order does not matter.
2. count: running totals of the words' bit counts along the tiles give each word its place in its list.
3. place: a pair's place is that of its word plus the number of lower bits in it.
4. items: cut the lists.

The words also show which blocks are *dense* for a few neighbouring tokens: chosen by so many of them that reading the
block once for all of them is cheaper than a partial result for each (DESIGN section 4). Such pairs stay out of the
lists; each tile of neighbours gets a list of its dense blocks instead.
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

PAIR_BYTES = 8  # per pair: its token and its place
WORD_BYTES = 12  # per (block, tile): the membership mask and its place in the list
DENSE_BYTES = 16  # per entry of a dense list: block and members
SLACK = 64 << 20  # what lists and tables may take beyond the workspace, which counts for the partials
LONGEST = tl.constexpr(TILE)


class BlockLists(NamedTuple):
    """Inverse of a selection, for the rows and KV heads of a `Chunk`."""

    tokens: Tensor  # int32 [pairs] query row of each pair, sorted by (KV head, token range, block, token)
    inverse: Tensor  # int32 [rows, heads, N] place of each pair in `tokens`; -1 where the entry is ignored or dense
    items: Tensor  # int32 [items, 6] KV head, sequence, block in the sequence, first pair, number of pairs, slice or -1
    slices: Tensor  # int32 [lists + 1] first slice of each list that is cut into several items, plus slices[0]
    num_slices: int  # upper bound
    dense: Tensor  # int64 [heads, dense tiles, entries, 2] dense blocks of each tile: block in the sequence, members
    dense_counts: Tensor  # int32 [heads, dense tiles]


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


class Dense(NamedTuple):
    """Which blocks a tile of neighbouring tokens takes whole: those that at least `members` of its tokens chose."""

    tokens: int  # a power of two, 2 to 64
    members: int

    def entries(self, N: int) -> int:
        """Most dense blocks of a tile."""
        return self.tokens * N // self.members


def chunk_bytes(plan: Plan, rows: int, heads: int, bytes_per_row: int) -> int:
    """Scratch of one chunk: `bytes_per_row` for each row and KV head, and the membership masks."""
    return heads * (rows * bytes_per_row + plan.total_blk * _columns(plan, rows) * WORD_BYTES)


def chunks(plan: Plan, num_kv_heads: int, bytes_per_row: int, workspace: int) -> Iterator[Chunk]:
    """Cut by KV heads first, which costs nothing; by token rows only if one head does not fit the workspace."""
    total = plan.total_q
    if total == 0:
        return
    budget = workspace + SLACK if workspace >= SLACK else workspace
    heads = min(num_kv_heads, budget // chunk_bytes(plan, total, 1, bytes_per_row))
    rows = total
    if heads == 0:
        heads, pieces = 1, 2
        while rows > TILE and chunk_bytes(plan, rows, 1, bytes_per_row) > budget:
            rows = -(-total // (pieces * TILE)) * TILE  # equal pieces of whole tiles
            pieces += 1
    for head0 in range(0, num_kv_heads, heads):
        for row0 in range(0, total, rows):
            yield Chunk(row0, min(row0 + rows, total), head0, min(head0 + heads, num_kv_heads))


def _columns(plan: Plan, rows: int) -> int:
    """Tiles of one sequence that meet a chunk of so many rows, at most."""
    return min(-(-plan.max_q // TILE), rows // TILE + 2)


@triton.jit
def field_counts(x, BITS: tl.constexpr):
    """Bits set in each field of BITS (a power of two) bits of the uint64 words x, each count in its own field."""
    x = x - ((x >> 1) & 0x5555555555555555)
    if BITS >= 4:
        x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    if BITS >= 8:
        x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    if BITS >= 16:
        x = (x + (x >> 8)) & 0x00FF00FF00FF00FF
    if BITS >= 32:
        x = (x + (x >> 16)) & 0x0000FFFF0000FFFF
    if BITS >= 64:
        x = (x + (x >> 32)) & 0xFF
    return x


@triton.jit
def dense_fields(x, BITS: tl.constexpr, MEMBERS: tl.constexpr):
    """All bits of each field of BITS bits of x that has at least MEMBERS bits set: the dense tiles of a word."""
    EACH: tl.constexpr = (2**64 - 1) // (2**BITS - 1)  # bit 0 of every field
    # Adding 2^(BITS - 1) - MEMBERS carries into a field's top bit exactly if its count reaches MEMBERS.
    counts = field_counts(x, BITS) + (2 ** (BITS - 1) - MEMBERS) * EACH
    return ((counts >> (BITS - 1)) & EACH) * (2**BITS - 1)


@triton.jit
def _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0):
    """Sequence (-1: no tile), first row, its position, rows and column among the sequence's tiles in the chunk."""
    i_s = tl.load(Q_TILES + 2 * i_tile)
    first = tl.load(Q_TILES + 2 * i_tile + 1)
    start_q, len_q = bounds(CU_Q, tl.maximum(i_s, 0))
    _, len_k = bounds(CU_K, tl.maximum(i_s, 0))
    column = first // LONGEST - (tl.maximum(row0 - start_q, 0) // LONGEST).to(tl.int32)
    return i_s, start_q + first, first + len_k - len_q, len_q - first, column


@triton.jit
def _load_blocks(IDX, row, m_t, position, o_n, num_kv_heads, i_h, N: tl.constexpr, B: tl.constexpr):
    """Selected blocks [tokens, BN] of some query rows; -1 for entries that are unused, future or out of range."""
    p = IDX + (row * num_kv_heads + i_h)[:, None] * N + o_n[None, :]
    block = tl.load(p, mask=m_t[:, None] & (o_n < N)[None, :], other=-1)
    # Dividing the position keeps the test free of overflow for hostile block numbers.
    visible = (block >= 0) & (position[:, None] >= 0) & (block <= position[:, None] // B)
    return tl.where(visible, block, -1)


@triton.jit
def _mask_kernel(
    IDX, MASKS, Q_TILES, CU_Q, CU_K, CU_BLK, tile0, row0, row1, head0, num_kv_heads, num_blk, columns,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, BT: tl.constexpr,
):
    """Pass 1: set the bits of BT tokens of a tile, one KV head."""
    SUBS: tl.constexpr = LONGEST // BT
    i_tile, i_sub, i_h = tile0 + tl.program_id(0) // SUBS, tl.program_id(0) % SUBS, tl.program_id(1)
    i_s, row, position, rows, column = _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0)
    if (i_s < 0) | (row >= row1) | (row + LONGEST <= row0):
        return
    o_t = i_sub * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    # Tokens of the tile beyond the chunk's rows count too: what is dense must not depend on the cut.
    block = _load_blocks(IDX, row + o_t, o_t < rows, position + o_t, o_n, num_kv_heads, head0 + i_h, N, B)
    bit = tl.full([BT, BN], 1, tl.uint64) << o_t.to(tl.uint64)[:, None]
    word = (i_h.to(tl.int64) * num_blk + tl.load(CU_BLK + i_s) + block) * columns + column
    tl.atomic_or(MASKS + word, bit.to(tl.int64, bitcast=True), mask=block >= 0, sem="relaxed")


@triton.jit
def _count_kernel(
    MASKS, PLACES, COUNTS, CU_Q, CU_BLK, row0, row1, num_blk, num_seqs, columns, span, ranges, num_lists,
    pairs_per_item, BL: tl.constexpr, BC: tl.constexpr, DENSE: tl.constexpr, MEMBERS: tl.constexpr,
):
    """Pass 2, for BL blocks and one token range of one KV head: place of each word in its list, length of the lists,
    and into how many items they are cut (the same again where that is more than one: slices)."""
    i_range, i_h = tl.program_id(1), tl.program_id(2)
    blk = tl.program_id(0) * BL + tl.arange(0, BL)
    m_blk = blk < num_blk
    i_s = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, tl.minimum(blk, num_blk - 1)), num_seqs - 1)
    start_q = tl.load(CU_Q + i_s)
    first = start_q + tl.maximum(row0 - start_q, 0) // LONGEST * LONGEST  # row of column 0
    total = tl.zeros([BL], tl.int32)
    for c0 in range(i_range * span, tl.minimum((i_range + 1) * span, columns), BC):
        o_c = c0 + tl.arange(0, BC)
        m = m_blk[:, None] & (o_c < tl.minimum((i_range + 1) * span, columns))[None, :]
        word = (i_h.to(tl.int64) * num_blk + blk)[:, None] * columns + o_c[None, :]
        # [BL, BC]
        listed = tl.load(MASKS + word, mask=m, other=0).to(tl.uint64, bitcast=True)
        if DENSE:
            listed ^= listed & dense_fields(listed, DENSE, MEMBERS)
        listed = listed & _rows_between(first[:, None] + o_c[None, :] * LONGEST, row0, row1)
        count = field_counts(listed, LONGEST).to(tl.int32)
        tl.store(PLACES + word, total[:, None] + tl.cumsum(count, 1) - count, mask=m)
        total += tl.sum(count, 1)
    i_list = (i_h * ranges + i_range) * num_blk + blk
    pieces = (total + pairs_per_item - 1) // pairs_per_item
    p = COUNTS + 1 + i_list
    tl.store(p, total, mask=m_blk)
    tl.store(p + num_lists + 1, pieces, mask=m_blk)
    tl.store(p + 2 * (num_lists + 1), tl.where(pieces > 1, pieces, 0), mask=m_blk)
    if (tl.program_id(0) == 0) & (i_range == 0) & (i_h == 0):
        for i in range(3):
            tl.store(COUNTS + i * (num_lists + 1), 0)


@triton.jit
def _rows_between(row, row0, row1):
    """Bits of the 64 tokens from `row` on that lie in [row0, row1)."""
    low = tl.minimum(tl.maximum(row0 - row, 0), LONGEST).to(tl.uint64)
    high = tl.minimum(tl.maximum(row1 - row, 0), LONGEST).to(tl.uint64)
    return _lower_bits(high) ^ _lower_bits(low)


@triton.jit
def _lower_bits(n):
    """Words with the n lowest bits set, n = 0 to 64 (a shift by 64 is undefined)."""
    one = tl.full(n.shape, 1, tl.uint64)
    return tl.where(n >= 64, 0xFFFFFFFFFFFFFFFF, (one << tl.minimum(n, 63)) - 1)


@triton.jit
def _place_kernel(
    IDX, MASKS, PLACES, STARTS, TOKENS, INVERSE, DENSE_LISTS, DENSE_COUNTS, Q_TILES, CU_Q, CU_K, CU_BLK,
    tile0, row0, row1, head0, heads, num_kv_heads, num_blk, columns, span, ranges, num_dense_tiles,
    N: tl.constexpr, BN: tl.constexpr, B: tl.constexpr, BT: tl.constexpr, DENSE: tl.constexpr, MEMBERS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """Pass 3, for BT tokens of a tile, one KV head: the place of each pair and the token at that place; the dense list,
    in the order in which the tokens name the blocks."""
    SUBS: tl.constexpr = LONGEST // BT
    i_tile, i_sub, i_h = tile0 + tl.program_id(0) // SUBS, tl.program_id(0) % SUBS, tl.program_id(1)
    i_s, row, position, rows, column = _query_tile(Q_TILES, CU_Q, CU_K, i_tile, row0)
    p_dense = i_h.to(tl.int64) * num_dense_tiles + tl.program_id(0)
    if (i_s < 0) | (row >= row1) | (row + LONGEST <= row0):
        if DENSE:
            tl.store(DENSE_COUNTS + p_dense, 0)
        return
    o_t = i_sub * BT + tl.arange(0, BT)
    o_n = tl.arange(0, BN)
    first_row, row = row, row + o_t
    block = _load_blocks(IDX, row, o_t < rows, position + o_t, o_n, num_kv_heads, head0 + i_h, N, B)
    p_idx = IDX + (row * num_kv_heads + head0 + i_h) * N
    for i in range(N - 1):  # an entry that repeats an earlier one is ignored
        earlier = tl.load(p_idx + i, mask=o_t < rows, other=-1)
        block = tl.where((o_n[None, :] > i) & (block == earlier[:, None]), -1, block)
    used = block >= 0
    blk = tl.load(CU_BLK + i_s) + block
    word = (i_h.to(tl.int64) * num_blk + blk) * columns + column
    # [BT, BN]
    members = tl.load(MASKS + word, mask=used, other=0).to(tl.uint64, bitcast=True)
    listed = members
    if DENSE:
        listed ^= members & dense_fields(members, DENSE, MEMBERS)
        mine = (members >> (i_sub * BT + tl.zeros([1, 1], tl.uint64))) & (2**BT - 1)  # this tile's field of the words
        is_dense = used & (field_counts(mine, LONGEST) >= MEMBERS)
        # The first token of the tile that chose a block names it.
        names = is_dense & ((mine & _lower_bits(tl.arange(0, BT).to(tl.uint64))[:, None]) == 0)
        flat = tl.reshape(names.to(tl.int32), [BT * BN])
        entry = tl.reshape(tl.cumsum(flat, 0) - flat, [BT, BN])
        p = DENSE_LISTS + (p_dense * ENTRIES + entry) * 2
        tl.store(p, block.to(tl.int64), mask=names)
        tl.store(p + 1, mine.to(tl.int64, bitcast=True), mask=names)
        tl.store(DENSE_COUNTS + p_dense, tl.sum(flat, 0))
        used = used & ~is_dense
    used = used & ((row >= row0) & (row < row1))[:, None]
    listed = listed & _rows_between(first_row + tl.zeros([1, 1], tl.int64), row0, row1)  # as `PLACES` counts
    i_list = (i_h * ranges + column // span) * num_blk + blk
    place = tl.load(STARTS + i_list, mask=used, other=0) + tl.load(PLACES + word, mask=used, other=0)
    place += field_counts(listed & _lower_bits(o_t.to(tl.uint64))[:, None], LONGEST).to(tl.int32)
    tl.store(TOKENS + place, tl.broadcast_to(row.to(tl.int32)[:, None], [BT, BN]), mask=used)
    tl.store(INVERSE + (((row - row0) * heads + i_h) * N)[:, None] + o_n[None, :], place, mask=used)


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
    STARTS, CU_BLK, ITEMS, num_lists, num_items, pairs_per_item, num_blk, ranges, num_seqs, BI: tl.constexpr,
):
    """Pass 4: the six numbers of BI items, see `BlockLists.items`; unused items get no pairs."""
    FIRST = STARTS + num_lists + 1  # the running sums of items and of slices begin where those before them end
    SLICES = FIRST + num_lists + 1
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    m = i < num_items
    # The last list whose first item is at most i; empty lists share that number with the next and come before it.
    item0 = tl.load(FIRST)
    i_list = tl.minimum(last_at_most(FIRST, num_lists + 1, item0 + i), num_lists - 1)
    first_item = tl.load(FIRST + i_list) - item0
    items_here = tl.load(FIRST + i_list + 1) - item0 - first_item
    piece = i - first_item
    first = tl.load(STARTS + i_list) + piece * pairs_per_item
    count = tl.minimum(tl.load(STARTS + i_list + 1) - first, pairs_per_item)
    block = i_list % num_blk
    seq = tl.minimum(last_at_most(CU_BLK, num_seqs + 1, block), num_seqs - 1)
    slot = tl.where(items_here > 1, tl.load(SLICES + i_list) - tl.load(SLICES) + piece, -1)
    p = ITEMS + i * 6
    tl.store(p, i_list // (num_blk * ranges), mask=m)
    tl.store(p + 1, seq, mask=m)
    tl.store(p + 2, block - tl.load(CU_BLK + seq), mask=m)
    tl.store(p + 3, first, mask=m)
    tl.store(p + 4, tl.where(piece < items_here, tl.maximum(count, 0), 0), mask=m)
    tl.store(p + 5, slot, mask=m)


def invert(
    block_idx: Tensor, plan: Plan, chunk: Chunk, *, pairs_per_item: int, span: int | None = None,
    dense: Dense | None = None,
) -> BlockLists:
    """Invert a selection. Entries that are negative, repeat, lie in the future or outside the sequence are dropped.

    Args:
        block_idx: int32 `[total_q, Hkv, N]`.
        chunk: rows and KV heads to take.
        pairs_per_item: longest piece of a list that one program gets.
        span: cut every list by ranges of so many tokens of its sequence, and walk all blocks of a range before the
            next: the queries of a range then stay in the L2 cache. Default: no cut.
        dense: which pairs to keep out of the lists. Default: none.
    """
    N, B, device = block_idx.shape[-1], plan.config.slc_block, block_idx.device
    (row0, row1, head0, _), heads, num_blk = chunk, chunk.heads, plan.total_blk
    columns = _columns(plan, chunk.rows)
    span_columns = max(1, span // TILE) if span else columns
    ranges = -(-columns // span_columns)
    num_lists = heads * ranges * num_blk
    tile0 = row0 // TILE
    num_tiles = min(plan.q_tiles.shape[0], (row1 - 1) // TILE + plan.num_seqs + 1) - tile0
    tables = (plan.q_tiles, plan.cu_q, plan.cu_k, plan.cu_blk)
    sizes = {"N": N, "BN": triton.next_power_of_2(N), "B": B}
    tokens_per_tile, members = dense or (0, 0)
    options = {"DENSE": tokens_per_tile, "MEMBERS": members}

    masks = torch.zeros(heads, num_blk, columns, dtype=torch.int64, device=device)
    BT = 16
    _mask_kernel[(num_tiles * (TILE // BT), heads)](
        block_idx, masks, *tables, tile0, row0, row1, head0, block_idx.shape[1], num_blk, columns,
        **sizes, BT=BT, num_warps=2,
    )  # fmt: skip
    places = torch.empty(heads, num_blk, columns, dtype=torch.int32, device=device)
    counts = torch.empty(3 * (num_lists + 1), dtype=torch.int32, device=device)
    BL, BC = 16, 32
    _count_kernel[(triton.cdiv(num_blk, BL), ranges, heads)](
        masks, places, counts, plan.cu_q, plan.cu_blk, row0, row1, num_blk, plan.num_seqs, columns, span_columns,
        ranges, num_lists, pairs_per_item, BL=BL, BC=BC, **options, num_warps=2,
    )  # fmt: skip
    starts = counts.cumsum(0, dtype=torch.int32)  # three running sums, each begun where the one before ends
    num_pairs = chunk.rows * heads * N
    tokens = torch.empty(num_pairs, dtype=torch.int32, device=device)
    inverse = torch.full((chunk.rows, heads, N), -1, dtype=torch.int32, device=device)
    BT = tokens_per_tile or 16
    dense_tiles, entries = (num_tiles * (TILE // BT), dense.entries(N)) if dense else (0, 0)
    dense_lists = torch.empty(heads, dense_tiles, entries, 2, dtype=torch.int64, device=device)
    dense_counts = torch.empty(heads, dense_tiles, dtype=torch.int32, device=device)
    _place_kernel[(num_tiles * (TILE // BT), heads)](
        block_idx, masks, places, starts, tokens, inverse, dense_lists, dense_counts, *tables,
        tile0, row0, row1, head0, heads, block_idx.shape[1], num_blk, columns, span_columns, ranges, dense_tiles,
        **sizes, BT=BT, **options, ENTRIES=entries, num_warps=2,
    )  # fmt: skip
    items = torch.empty(num_lists + num_pairs // pairs_per_item, 6, dtype=torch.int32, device=device)
    BI = 128
    _items_kernel[(triton.cdiv(items.shape[0], BI),)](
        starts, plan.cu_blk, items, num_lists, items.shape[0], pairs_per_item, num_blk, ranges, plan.num_seqs, BI=BI,
    )  # fmt: skip
    # A list cut into p > 1 items holds more than (p - 1) * pairs_per_item pairs, so p <= 2 * pairs / pairs_per_item.
    num_slices = 2 * num_pairs // pairs_per_item
    return BlockLists(
        tokens, inverse, items, starts[2 * (num_lists + 1) :], num_slices, dense_lists, dense_counts
    )


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
    first = (tl.load(FIRST + i_list) - tl.load(FIRST)).to(tl.int64)
    last = (tl.load(FIRST + i_list + 1) - tl.load(FIRST)).to(tl.int64)
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
    per_pair = PAIR_BYTES + 2 * B * (D + Dv) * kind.itemsize // pairs_per_item
    if take_dq:
        per_pair += G * D * (B // BK) * q.element_size()
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    for chunk in chunks(plan, Hkv, N * per_pair, workspace):
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
